"""One attempt at a time in a run directory, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from tests.processes import wait_until

from afina.errors import ClaimedError
from afina.processes import Process, boot_id
from afina.run.directory import RunDir
from afina.worker.survival.lease import Lease

HOLD = """
import sys, time
from afina.run.directory import RunDir
from afina.worker.survival import lease
lease.BEAT_S = 0.1
lease.Lease(RunDir(sys.argv[1]), sys.argv[2]).take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path), "7.0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_living_attempt_is_not_disturbed(run: RunDir, holder: subprocess.Popen[str]) -> None:
    before = json.loads((run.path / "lease.json").read_text())
    with pytest.raises(ClaimedError, match=rf"attempt 7\.0 is running .*process {holder.pid} on") as caught:
        Lease(run, "8.0").take()
    assert caught.value.cause == "claimed"
    after = json.loads((run.path / "lease.json").read_text())
    assert before | {"beats": 0} == after | {"beats": 0}


def test_a_killed_attempt_is_replaced_immediately(run: RunDir, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lease = Lease(run, "8.0")
    lease.take(wait_s=0)
    assert json.loads((run.path / "lease.json").read_text())["attempt"] == "8.0"
    lease.release()
    assert not (run.path / "lease.json").exists()


def test_a_requeued_job_takes_over_from_its_earlier_start(run: RunDir, holder: subprocess.Popen[str]) -> None:
    lease = Lease(run, "7.1")
    lease.take(wait_s=0)
    time.sleep(1)
    assert json.loads((run.path / "lease.json").read_text())["attempt"] == "7.1", (
        "the older start must not take it back"
    )
    assert not lease.lost
    lease.release()


def _elsewhere(run: RunDir, **changes: object) -> dict[str, object]:
    record = {"attempt": "3.0", "beats": 1, "host": "far", "boot": "another", "pid": 1, "started": "2", **changes}
    aside = run.path / "aside"
    aside.write_text(json.dumps(record))
    os.replace(aside, run.path / "lease.json")
    return record


def test_a_silent_attempt_of_another_machine_is_presumed_dead(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    _elsewhere(run)
    lease = Lease(run, "8.0")
    lease.take(wait_s=1.5)
    assert "attempt 3.0 on far may still be running" in capfd.readouterr().out
    assert json.loads((run.path / "lease.json").read_text())["attempt"] == "8.0"
    lease.release()


def test_a_living_attempt_of_another_machine_is_recognised_by_its_beats(run: RunDir) -> None:
    _elsewhere(run)
    beat = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import json, os, sys, time\n"
            "p = sys.argv[1]\n"
            "r = json.load(open(p))\n"
            "for i in range(200):\n"
            "    time.sleep(0.1); r['beats'] += 1; open(p + '.x', 'w').write(json.dumps(r)); os.replace(p + '.x', p)\n",
            str(run.path / "lease.json"),
        ]
    )
    try:
        with pytest.raises(ClaimedError, match=r"attempt 3\.0 is running .* on far"):
            Lease(run, "8.0").take(wait_s=10)
    finally:
        beat.kill()
        beat.wait()


def test_a_process_number_counts_in_its_own_namespace_only(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    """Two containers of one machine may both have a process of this number."""
    here = asdict(Process.current()) | {"space": 1, "boot": boot_id()}
    _elsewhere(run, **here)
    lease = Lease(run, "8.0")
    lease.take(wait_s=1.5)
    assert "may still be running" in capfd.readouterr().out
    lease.release()


def test_an_attempt_that_was_presumed_dead_notices(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afina.worker.survival.lease.BEAT_S", 0.05)
    lease = Lease(run, "1.0")
    lease.take()
    _elsewhere(run, attempt="2.0")
    wait_until(lambda: lease.lost, 20, pause_s=0.02)
    assert json.loads((run.path / "lease.json").read_text())["attempt"] == "2.0"
