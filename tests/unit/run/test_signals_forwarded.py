"""Signals to the supervisor of an attempt: the first asks for a stop, and does not end the worker."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from afina.run.directory import RunDir
from afina.run.supervise import SignalForwarder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_asks_for_a_stop(tmp_path: Path, number: int) -> None:
    run, received = RunDir(tmp_path), []  # type: ignore[var-annotated]
    worker = subprocess.Popen(["sleep", "30"], start_new_session=True)
    try:
        with SignalForwarder(run, received) as forwarder:
            forwarder.worker = worker
            for count in (1, 2) if number != signal.SIGINT else (1,):
                os.kill(os.getpid(), number)
                deadline = time.monotonic() + 5
                while len(received) < count and time.monotonic() < deadline:
                    time.sleep(0.01)
        assert received == [number] * len(received) and run.stop_file.read_text() in ("asked\n", "signal\n")
        time.sleep(0.1)
        assert worker.poll() is None, "Slurm delivers a signal two or three times"
    finally:
        worker.kill()
        worker.wait()
