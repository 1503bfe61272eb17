"""What watches a training from beside it: whether to stop, and whether it still moves.

A stop has one of four causes. Rank 0 looks at the stop file and at the deadline, every rank hears signals; the ranks agree at
the end of a step (`afina.worker.training.control`). The watchdog is a thread: the training itself may hang in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from afina.errors import EXIT_FAILED, TrainingError
from afina.run.directory import RunDir

__all__ = ["CAUSES", "StepTimes", "StopRequest", "Watchdog", "lead"]

#: Numbered, so that ranks agree by their maximum; the last one to matter wins.
CAUSES = ("", "asked", "signal", "limit")

#: Seconds between two looks at the stop file: a shared file system answers slowly.
_LOOK_S = 0.5
#: Before a save has been measured: bytes per second that any scratch will take.
_SLOW_DISK = 50e6


class StepTimes:
    """Wall seconds of the last steps, evaluations and saves left out."""

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
    """Whether this rank has been asked to stop, and why.

    The signal handler only sets a flag: Slurm and Apptainer deliver one signal two or three times, and a handler that prints
    dies of re-entrance.

    Attributes:
        deadline: when Slurm will end the job, in seconds of `time.time`; None where there is no limit.
    """

    def __init__(self, run: RunDir) -> None:
        self._file = run.stop_file
        self._signalled = False
        self._looked = float("-inf")
        self._found = 0
        self.deadline = float(os.environ.get("AFINA_DEADLINE") or 0) or None
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
            signal.signal(getattr(signal, name), self._hear)

    def _hear(self, number: int, frame: Any) -> None:
        self._signalled = True

    def __call__(self, *, look: bool, lead_s: float = 0.0) -> int:
        """An index into `CAUSES`; 0: go on.

        Args:
            look: also look at the deadline, and for the stop file at most every half second.
            lead_s: how long before the deadline a stop must begin.
        """
        cause = CAUSES.index("signal") if self._signalled else 0
        if not look:
            return cause
        if self.deadline is not None and time.time() + lead_s >= self.deadline:
            return CAUSES.index("limit")
        if not self._found and time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            try:
                said = self._file.read_text(encoding="utf-8").strip()
            except OSError:
                return cause
            self._found = CAUSES.index(said) if said in CAUSES[1:] else CAUSES.index("asked")
        return max(cause, self._found)


def lead(times: StepTimes, save_s: float, state_bytes: int) -> float:
    """Seconds before the deadline at which a stop begins: two saves, three steps, and what Slurm and the clocks may be off.

    Args:
        save_s: the longest save so far, 0 before the first.
        state_bytes: what a save writes.
    """
    save = save_s or state_bytes / _SLOW_DISK
    return 15.0 + 2 * save + 3 * times.longest


class Watchdog:
    """Ends a process that has made no step for too long, with the stacks of all its threads in the log.

    Every rank has one. A rank that is itself halted (SIGSTOP, a dead node) says nothing: the others do, and end the attempt.
    """

    #: Before there is a measure: start-up, the first batches, an evaluation on a slow disk.
    FIRST_S = 1800.0
    LEAST_S = 600.0

    def __init__(self, run: RunDir, attempt: str, rank: int, minutes: float | None, usual: Callable[[], float | None]):
        self.run, self.attempt, self.rank, self.usual = run, attempt, rank, usual
        self.given_s = minutes * 60 if minutes else None
        self._beaten = time.monotonic()
        self._what = "the start"
        self._over = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="afina-watchdog", daemon=True).start()

    def beat(self, what: str) -> None:
        """Something was done: a step, a batch of an evaluation, a save."""
        self._beaten, self._what = time.monotonic(), what

    def stop(self) -> None:
        self._over.set()

    @property
    def limit_s(self) -> float:
        if self.given_s is not None:
            return self.given_s
        usual = self.usual()
        return self.FIRST_S if usual is None else max(self.LEAST_S, 30 * usual)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(pause := min(5.0, self.limit_s / 4)):
            now, before = time.monotonic(), looked
            looked = now
            if now - before > pause + 5:
                self._beaten = now  # this process was halted itself (`scontrol suspend`, SIGSTOP): begin to count anew
            elif now - self._beaten > self.limit_s:
                self._bite(now - self._beaten)

    def _bite(self, silent: float) -> None:
        said = (
            f"nothing has moved for {silent:.0f} s after {self._what} on {os.uname().nodename} (rank {self.rank}); "
            "the stacks of its threads are in the log"
        )
        remedy = (
            "look at the other ranks: one that hangs or has gone holds up all; train.stall_minutes sets the patience"
        )
        print(f"error: rank {self.rank}: {said}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            failure = TrainingError(said, remedy, cause="stall").failure
            self.run.report_failure(self.attempt, f"rank{self.rank}", failure)
        finally:
            os._exit(EXIT_FAILED)
