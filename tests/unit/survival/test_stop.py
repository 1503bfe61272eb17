"""Stop requests: signals, the stop file, the deadline and its lead."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from afina.run.directory import RunDir
from afina.schedule import stop_lead_s
from afina.worker.survival.stop import CAUSES, StepTimes

STOP = """
import os, signal, sys
from afina.run.allocation import Allocation
from afina.run.directory import RunDir
from afina.worker.survival.stop import StopRequest
stop = StopRequest(RunDir(sys.argv[1]), Allocation.from_env().deadline)
for name in sys.argv[2:]:
    os.kill(os.getpid(), getattr(signal, name))
print(stop.check(lead_s=30), stop.signalled())
"""


def _stop(run: RunDir, *signals: str, **env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", STOP, str(run.path), *signals],
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return [CAUSES[int(n)] for n in done.stdout.split()]


@pytest.mark.parametrize(
    ("content", "cause"),
    [("", "asked"), ("asked\n", "asked"), ("limit\n", "limit"), ("signal\n", "signal"), ("?", "asked")],
)
def test_the_stop_file_holds_the_cause(run: RunDir, content: str, cause: str) -> None:
    assert _stop(run) == ["", ""]
    run.stop_file.write_text(content)
    assert _stop(run) == [cause, ""]


def test_signals_and_the_deadline(run: RunDir) -> None:
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
        assert _stop(run, name, name) == ["signal", "signal"]
    assert _stop(run, AFINA_DEADLINE=str(time.time() + 25)) == ["limit", ""]
    assert _stop(run, AFINA_DEADLINE=str(time.time() + 3600)) == ["", ""]
    assert _stop(run, AFINA_DEADLINE="") == ["", ""]


def test_the_lead_grows_with_saves_and_steps() -> None:
    times = StepTimes()
    assert times.usual is None
    assert stop_lead_s(2.0, times.longest) == pytest.approx(15 + 4)
    times.last.extend([1.0, 1.0, 9.0, 1.0, 1.0])
    assert times.usual == 1.0
    assert stop_lead_s(2.0, times.longest) == pytest.approx(15 + 4 + 27)
