"""The deadline, the stop file, the watchdog, and what a checkpoint copies: each alone, in real processes where it ends one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.conftest import private_mounts

from afina.errors import EnvironmentProblem
from afina.run.directory import RunDir
from afina.worker.survival import preflight
from afina.worker.survival.snapshot import copy_to_host, random_state, set_random_state
from afina.worker.survival.stop import CAUSES, StepTimes, stop_lead_s

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


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    folder = tmp_path / "r un"
    (folder / "attempts/1.0").mkdir(parents=True)
    return RunDir(folder)


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
    ("said", "cause"),
    [("", "asked"), ("asked\n", "asked"), ("limit\n", "limit"), ("signal\n", "signal"), ("?", "asked")],
)
def test_the_stop_file_says_why(run: RunDir, said: str, cause: str) -> None:
    assert _stop(run) == ["", ""]
    run.stop_file.write_text(said)
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
    assert stop_lead_s(times, 0.0, 500_000_000) == pytest.approx(15 + 20), "before the first save: from the bytes"
    assert stop_lead_s(times, 2.0, 500_000_000) == pytest.approx(15 + 4)
    times.last.extend([1.0, 1.0, 9.0, 1.0, 1.0])
    assert times.usual == 1.0
    assert stop_lead_s(times, 2.0, 0) == pytest.approx(15 + 4 + 27)


BITE = """
import sys, time
from afina.run.directory import RunDir
from afina.worker.survival.watchdog import Watchdog
dog = Watchdog(RunDir(sys.argv[1]), "1.0", 3, float(sys.argv[2]) / 60, lambda: None)
dog.start()
def where_it_hangs():
    for _ in range(int(sys.argv[3])):
        time.sleep(0.05); dog.beat("step 7")
    time.sleep(60)
where_it_hangs()
"""


def test_the_watchdog_ends_a_process_that_does_not_move(run: RunDir) -> None:
    argv = [sys.executable, "-c", BITE, str(run.path), "1", "40"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 4
    assert "where_it_hangs" in done.stderr, "the stack says where"
    said = json.loads((run.attempts / "1.0/failed.rank3.json").read_text())
    assert said["cause"] == "stall" and "after step 7" in said["error"] and "remedy" in said["error"]


def test_a_process_that_was_halted_itself_is_spared(run: RunDir) -> None:
    """`scontrol suspend` stops the watchdog too: time that did not pass for the process does not count."""
    process = subprocess.Popen([sys.executable, "-c", BITE, str(run.path), "2", "100000"], stderr=subprocess.PIPE)
    try:
        time.sleep(1.0)
        subprocess.run(["kill", "-STOP", str(process.pid)], check=True)
        time.sleep(8.0)
        subprocess.run(["kill", "-CONT", str(process.pid)], check=True)
        time.sleep(3.0)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_copy_stays_as_it_was_and_shares_what_was_shared() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    value = {"a": weight, "tied": weight, "part": weight[0], "n": [1, (weight, "x")], "none": None}
    copy = copy_to_host(value)
    assert copy["a"] is copy["tied"] is copy["n"][1][0]
    weight.zero_()
    assert copy["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] and copy["part"].tolist() == [0.0, 1.0, 2.0]
    assert copy["n"][1][1] == "x" and copy["none"] is None


def test_random_states_come_back_through_a_file(tmp_path: Path) -> None:
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        random.gauss(0, 1)
        np.random.standard_normal()
        torch.save(random_state(), tmp_path / "state")
        expected = (random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
        torch.save(random_state(), tmp_path / "later")
        set_random_state(torch.load(tmp_path / "state", weights_only=True))
        assert (
            random.random(),
            random.gauss(0, 1),
            np.random.standard_normal(3).tolist(),
            torch.rand(3).tolist(),
        ) == expected


def test_too_little_room_is_said_before_the_first_step(run: RunDir, tmp_path: Path) -> None:
    assert preflight.check_room(run, 1000, 2)["needed_gb"] == 0
    with pytest.raises(EnvironmentProblem, match="GB are free") as caught:
        preflight.check_room(run, 10**18, 2)
    assert caught.value.cause == "disk" and "keep_checkpoints" in caught.value.remedy
    done = private_mounts(
        'mount -t tmpfs -o size=40m,nr_inodes=150 tmpfs "$1"; shift; exec "$@"',
        tmp_path,
        sys.executable,
        "-c",
        "import sys; from afina.run.directory import RunDir; from afina.worker.survival import preflight\n"
        "preflight.check_room(RunDir(sys.argv[1]), 1000, 2)",
        tmp_path,
    )
    assert done.returncode == 1 and "inodes are free" in done.stderr
