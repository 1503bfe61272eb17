"""Wait for runs: one poller for all that wait in this process, with growing pauses between its questions to Slurm.

A hundred handles in a hundred threads ask squeue as often as one does.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from afina.errors import WaitTimeout, check_argument
from afina.slurm.client import need_command
from afina.watch.overview import RunSummary, State, summarise

__all__ = ["OPEN", "wait_for", "wait_until_ended"]

#: A run in one of these states may still end by itself.
OPEN: tuple[State, ...] = ("PENDING", "RUNNING", "UNKNOWN")
#: Seconds between two questions: the first, the last, and the factor.
_FIRST_S, _LAST_S, _GROWTH = 0.5, 15.0, 1.3
#: A job that left the queue without an outcome: a shared file system may show the file a little later.
_LATE_S = 5.0


class _Poller:
    """The runs that are waited for in this process, and their newest summaries."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: Counter[Path] = Counter()
        self._known: dict[Path, RunSummary] = {}
        self._gone: dict[Path, float] = {}
        self._due = 0.0
        self._pause = _FIRST_S

    def enter(self, paths: Sequence[Path]) -> None:
        with self._lock:
            new = [path for path in paths if not self._waiting[path]]
            self._waiting.update(paths)
            if new:  # soon, but not at once for each of many
                self._pause = _FIRST_S
                self._due = min(self._due, time.monotonic() + _FIRST_S / 5)

    def leave(self, paths: Sequence[Path]) -> None:
        with self._lock:
            self._waiting.subtract(paths)
            for path in paths:
                if self._waiting[path] <= 0:
                    for table in (self._waiting, self._known, self._gone):
                        table.pop(path, None)

    def ended(self, paths: Sequence[Path]) -> tuple[dict[Path, RunSummary], float]:
        """Those of `paths` that have ended, and the seconds until the next question is due."""
        with self._lock:
            now = time.monotonic()
            if now >= self._due:
                for summary in summarise([path for path, count in self._waiting.items() if count > 0]):
                    self._known[summary.run] = summary
                now = time.monotonic()
                self._due, self._pause = now + self._pause, min(_LAST_S, self._pause * _GROWTH)
            known = {path: self._known[path] for path in paths if path in self._known}
            ended = {path: summary for path, summary in known.items() if self._has_ended(summary, now)}
            return ended, max(0.01, self._due - now)

    def check_answers(self, paths: Sequence[Path]) -> None:
        """Refuse to wait for a job that nobody here can see.

        Raises:
            SlurmError: one of the runs has a job, and there is no squeue on this machine.
        """
        with self._lock:
            unknown = [s for path in paths if (s := self._known.get(path)) is not None and s.state == "UNKNOWN"]
        if any(summary.job_id for summary in unknown):
            need_command("squeue")

    def _has_ended(self, summary: RunSummary, now: float) -> bool:
        if summary.state in OPEN:
            self._gone.pop(summary.run, None)
            return False
        if summary.state == "FAILED" and summary.error is None:
            since = self._gone.setdefault(summary.run, now)
            self._due = min(self._due, since + _LATE_S)
            return now - since >= _LATE_S
        return True


_POLLER = _Poller()
# A child of os.fork has its own: its parent's lock may be held by a thread that the child does not have.
os.register_at_fork(after_in_child=_POLLER.__init__)  # type: ignore[misc]


async def wait_until_ended(path: Path) -> None:
    """As `wait_for` of one run, for asyncio: a task that is cancelled stops at once, and no thread goes on waiting."""
    import asyncio

    _POLLER.enter([path])
    try:
        while True:
            ended, pause = await asyncio.to_thread(_POLLER.ended, [path])
            if ended:
                return
            _POLLER.check_answers([path])
            await asyncio.sleep(pause)
    finally:
        _POLLER.leave([path])


def wait_for(paths: Sequence[Path], timeout: float | None = None, *, first: bool = False) -> dict[Path, RunSummary]:
    """Wait until none of these runs is queued or running, or with `first` one of them is not; the summaries of the ended ones.

    Raises:
        WaitTimeout: after `timeout` seconds.
        SlurmError: a job is waited for where there is no squeue.
    """
    check_argument("timeout", timeout, (int, float), "a number of seconds", least=0)
    end = None if timeout is None else time.monotonic() + timeout
    wanted = list(dict.fromkeys(paths))
    _POLLER.enter(wanted)
    try:
        while True:
            ended, pause = _POLLER.ended(wanted)
            if len(ended) == len(wanted) or (first and ended):
                return ended
            _POLLER.check_answers(wanted)
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                missing = [str(path) for path in wanted if path not in ended]
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise WaitTimeout(
                    f"{missing[0]}{more}: still queued or running after {timeout:g} s",
                    "wait longer, or see run.summary",
                )
            time.sleep(pause if left is None else min(pause, left))
    finally:
        _POLLER.leave(wanted)
