"""Runs on a terminal: numbers in words, columns, one line a run, the page about one run."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from afina.text import aligned, plural, short_duration, size_in_words

if TYPE_CHECKING:
    from afina.watch.overview import RunSummary

__all__ = ["columns", "list_lines", "number", "page", "status_lines", "totals"]

_COLOURS = {
    "RUNNING": "green",
    "PENDING": "yellow",
    "FINISHED": "blue",
    "STOPPED": "yellow",
    "FAILED": "red",
    "UNKNOWN": "magenta",
}
_DASH = "-"


def number(value: float | None, digits: int = 4) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> list[str]:
    """Aligned lines, the heads first; the columns named in `right` are aligned to the right.

    To a terminal the state is coloured and lines are cut at its width; into a pipe they are whole.
    """
    flat = [list(heads), *([" ".join(cell.split()) for cell in row] for row in rows)]
    lines = aligned(flat, [number for number, head in enumerate(heads) if head in right])
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return [_coloured(row[0]) + line[:width][len(row[0]) :] for row, line in zip(flat, lines, strict=True)]


def _coloured(word: str) -> str:
    """A state in its colour, where somebody sees it (https://no-color.org)."""
    wanted = word in _COLOURS and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return click.style(word, fg=_COLOURS[word]) if wanted else word


def status_lines(summaries: Sequence[RunSummary], names: Sequence[str]) -> list[str]:
    """One line a run: where it is, how fast, what it waits for."""
    heads = ("state", "run", "step", "epoch", "loss", "best", "tokens/s", "tries", "left", "job", "")
    rows = [_status_row(summary, name) for summary, name in zip(summaries, names, strict=True)]
    return columns(heads, rows, right=("step", "epoch", "loss", "tokens/s", "tries", "left"))


def _status_row(s: RunSummary, name: str) -> list[str]:
    return [
        s.state,
        name,
        f"{s.step}/{s.max_steps}" if s.max_steps else str(s.step),
        number(s.epoch, 2),
        number(s.loss),
        f"{s.best_metric} {number(s.best_value)}" if s.best_value is not None else _DASH,
        f"{s.tokens_per_s:,.0f}" if s.tokens_per_s else _DASH,
        str(s.attempts),
        short_duration(s.seconds_left),
        s.job_id or _DASH,
        s.why or "",
    ]


def list_lines(summaries: Sequence[RunSummary], names: Sequence[str], sizes: Sequence[int] | None) -> list[str]:
    """One line a run: how it stands, how good, how old, and how large if that was asked for."""
    heads = ["state", "best", "", "age", *(["size"] if sizes is not None else []), "run"]
    now = time.time()
    rows = [
        [
            s.state,
            number(s.best_value),
            s.best_metric or "",
            short_duration(now - s.made) if s.made else _DASH,
            *([size_in_words(sizes[i])] if sizes is not None else []),
            name,
        ]
        for i, (s, name) in enumerate(zip(summaries, names, strict=True))
    ]
    return columns(heads, rows, right=("best", "age", "size"))


def totals(summaries: Sequence[RunSummary]) -> str:
    counted = Counter(s.state for s in summaries)
    parts = ", ".join(f"{count} {state.lower()}" for state, count in counted.most_common())
    return f"{plural(len(summaries), 'run')}: {parts}"


def page(s: RunSummary) -> list[str]:
    """All about one run."""
    step = f"{s.step} of {s.max_steps}" if s.max_steps else str(s.step)
    lines = [f"{_coloured(s.state)}  step {step}  job {s.job_id or '-'}  {s.run}"]
    facts: list[tuple[bool, Callable[[], str]]] = [
        (bool(s.why), lambda: f"{s.why}"),
        (s.starts is not None, lambda: f"Slurm expects it to start at {_clock(s.starts)}"),
        (s.epoch is not None, lambda: f"epoch {number(s.epoch, 2)}"),
        (s.loss is not None, lambda: f"loss {number(s.loss)}"),
        (
            s.best_value is not None and not s.metrics,
            lambda: f"best {s.best_metric} {number(s.best_value)} at step {s.best_step}",
        ),
        (bool(s.tokens_per_s), lambda: f"{s.tokens_per_s:,.0f} real tokens/s"),
        (s.seconds_left is not None, lambda: f"about {short_duration(s.seconds_left)} of training left"),
        (s.limit_s is not None, lambda: f"{short_duration(s.limit_s)} to the job's time limit"),
        (s.attempts > 1, lambda: f"{s.attempts} attempts, the newest {s.attempt}"),
        (bool(s.nodes), lambda: f"on {s.nodes}"),
    ]
    lines += [f"  {text()}" for there, text in facts if there]
    lines += [f"  {name} {value:.6f}" for name, value in (s.metrics or {}).items() if isinstance(value, float)]
    lines += [f"  warning: {warning}" for warning in s.warnings]
    if s.error and s.state == "FAILED":
        lines = [line for line in lines if line != f"  {s.why}"] + [f"  {s.error}"]
    elif s.remedy:
        lines.append(f"  to do: {s.remedy}")
    lines += [f"  records: {command}" for command in s.sync]
    return lines


def _clock(when: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
