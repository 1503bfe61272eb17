"""Stop requests and their four causes.

Rank 0 checks the stop file and the deadline, every rank catches signals; the ranks agree at the end of a step
(`afina.worker.training.control`).
"""

from __future__ import annotations

import signal
import statistics
import time
from collections import deque
from typing import Any

from afina.run.directory import RunDir

__all__ = ["CAUSES", "StepTimes", "StopRequest"]

#: Numbered, so that the ranks agree by their maximum; where several apply, the highest wins.
CAUSES = ("", "asked", "signal", "limit")

#: Seconds between two checks of the stop file: a shared file system answers slowly.
_CHECK_EVERY_S = 0.5


class StepTimes:
    """Wall seconds of the last 50 steps, without evaluations and saves."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=50)
        self._since: float | None = None

    def begin(self) -> None:
        self._since = time.monotonic()

    def end(self) -> None:
        if self._since is not None:
            self.last.append(time.monotonic() - self._since)
        self._since = None

    @property
    def usual(self) -> float | None:
        """The median, in seconds; None before five steps."""
        return statistics.median(self.last) if len(self.last) >= 5 else None

    @property
    def longest(self) -> float:
        return max(self.last, default=0.0)


class StopRequest:
    """Records requests to stop this process, and their cause.

    The signal handler only sets a flag: Slurm and Apptainer deliver one signal two or three times, and a handler that prints
    fails with a reentrant call.

    Attributes:
        deadline: when Slurm will end the job, in seconds of `time.time`; None without a limit.
        agreed: the cause that all ranks agreed on (`CAUSES`); empty until then.
    """

    def __init__(self, run: RunDir, deadline: float | None = None) -> None:
        self._file = run.stop_file
        self._signalled = False
        self._checked = float("-inf")
        self._from_file = 0
        self.agreed = ""
        self.deadline = deadline
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
            signal.signal(getattr(signal, name), self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True

    def signalled(self) -> int:
        """An index into `CAUSES`, from signals alone; 0: continue."""
        return CAUSES.index("signal") if self._signalled else 0

    def check(self, lead_s: float) -> int:
        """An index into `CAUSES`, from signals, the deadline and the stop file; 0: continue.

        Args:
            lead_s: how long before the deadline a stop must begin.
        """
        if self.deadline is not None and time.time() + lead_s >= self.deadline:
            return CAUSES.index("limit")
        if not self._from_file and time.monotonic() - self._checked > _CHECK_EVERY_S:
            self._checked = time.monotonic()
            try:
                cause = self._file.read_text(encoding="utf-8", errors="replace").strip()
            except OSError:
                return self.signalled()
            self._from_file = CAUSES.index(cause if cause in CAUSES[1:] else "asked")
        return max(self.signalled(), self._from_file)
