"""Progress of long work: a bar on a terminal, else a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from afina.text import can_draw, seconds_in_words

__all__ = ["Progress"]

LINE_S = 60.0

Say = Callable[[str], None]


class Progress:
    """Counts and shows the work of a `with` block.

    Args:
        doing, done: the word for it: tokenising, tokenised.
        unit: what is counted: texts.
        total: how many there are; None if that is not known.
        before: how many of them were done by an earlier process.
    """

    def __init__(
        self,
        doing: str,
        done: str,
        unit: str,
        total: int | None,
        say: Say,
        *,
        before: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.doing, self.past, self.unit, self.total, self.say = doing, done, unit, total, say
        self.done = self.before = before
        self._clock = clock
        self._began = self._shown = clock()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if can_draw(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn(self.doing),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.add_task(self.doing, total=self.total, completed=self.done)
            self._bar.start()
        return self

    def advance(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif self._clock() - self._shown >= LINE_S:
            self._shown = self._clock()
            self.say(self._line())

    def _line(self) -> str:
        rate = (self.done - self.before) / (self._shown - self._began)
        line = f"{self.past} {self.done:,}"
        if self.total is None:
            return f"{line} {self.unit}, {rate:,.0f} per second"
        left = (self.total - self.done) / rate if rate else 0.0
        return f"{line} of {self.total:,} {self.unit}, {rate:,.0f} per second, about {seconds_in_words(left)} left"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
