"""Watchdog: a thread that ends a process which makes no step for too long. The training itself may hang in a collective.

Not covered: a process that is itself halted (SIGSTOP, a dead node). The watchdogs of the other ranks end the attempt then.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from afina.errors import EXIT_FAILED, AfinaError, TrainingError
from afina.run.directory import RunDir

__all__ = ["Watchdog"]


class Watchdog:
    """Ends a process that has made no step for too long, and writes the stacks of all its threads to the log if it can."""

    #: Before five steps are measured: start-up, the first batches, an evaluation on a slow disk.
    FIRST_S = 1800.0
    LEAST_S = 600.0
    #: For the reason, before the process ends.
    WORDS_S = 20.0

    def __init__(self, run: RunDir, attempt: str, rank: int, minutes: float | None, usual: Callable[[], float | None]):
        """Args:
        minutes: the limit; None derives it from the usual step.
        usual: the seconds of a usual step, None where not known yet.
        """
        self.run, self.attempt, self.rank, self.usual = run, attempt, rank, usual
        self.given_s = minutes * 60 if minutes else None
        self._last_beat = time.monotonic()
        self._last_event = "the start"

    def start(self) -> None:
        threading.Thread(target=self._watch, name="afina-watchdog", daemon=True).start()

    def beat(self, event: str) -> None:
        """Report progress: a step, a batch of an evaluation, a save."""
        self._last_beat, self._last_event = time.monotonic(), event

    @property
    def limit_s(self) -> float:
        if self.given_s is not None:
            return self.given_s
        usual = self.usual()
        return self.FIRST_S if usual is None else max(self.LEAST_S, 30 * usual)

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            pause = min(5.0, self.limit_s / 4)
            time.sleep(pause)
            now = time.monotonic()
            if now - before > pause + 5:
                self._last_beat = now  # this process itself was halted (`scontrol suspend`, SIGSTOP): count anew
            elif now - self._last_beat > self.limit_s:
                self._end_process(now - self._last_beat)
            before = now

    def _end_process(self, silent_s: float) -> None:
        """End the process, whatever hangs: the disk of the run and the reader of its output have a moment to take the reason."""
        last_words = threading.Thread(target=self._explain, args=(silent_s,), daemon=True)
        last_words.start()
        last_words.join(self.WORDS_S)
        os._exit(EXIT_FAILED)

    def _explain(self, silent_s: float) -> None:
        message = (
            f"no progress for {silent_s:.0f} s after {self._last_event} on {os.uname().nodename} (rank {self.rank}); "
            "the stacks of its threads are in the log"
        )
        remedy = "check the other ranks: one that hangs or has died blocks all; train.stall_minutes sets the limit"
        failure = TrainingError(message, remedy, cause="stall").failure
        with contextlib.suppress(AfinaError, OSError):
            self.run.report_failure(self.attempt, f"rank{self.rank}", failure)
        # Into a file first: faulthandler would wait for a full pipe while no other thread may run.
        with tempfile.TemporaryFile("w+", errors="replace") as stacks:
            faulthandler.dump_traceback(file=stacks, all_threads=True)
            stacks.seek(0)
            print(f"error: rank {self.rank}: {message}\n{stacks.read()}", file=sys.stderr, flush=True)
