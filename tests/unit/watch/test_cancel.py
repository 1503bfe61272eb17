"""`afina cancel`: jobs of Slurm with one call, trainings outside of it by their stop file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.conftest import Ran
from tests.unit.watch.conftest import Slurm, begin, end, make

from afina.errors import SlurmError
from afina.watch.cancel import cancel_runs
from afina.watch.find import known_runs
from afina.watch.overview import summarise


def test_cancel_takes_queued_and_running_jobs_with_one_call(
    slurm: Slurm, runs: Path, command: Callable[..., Ran]
) -> None:
    begin(done_ := make(runs / "done", job="1"), "1.0")
    end(done_, "1.0", "finished", "", "end")
    make(runs / "waits", job="2")
    twice = make(runs / "twice", job="3")
    twice.append("submissions.jsonl", {"job_id": "4", "via": "resubmit"})
    make(runs / "planned")
    slurm.answer(
        "squeue", "2|2|PENDING|1:00|N/A||Priority", "3|3|COMPLETING|1:00|N/A||None", "4|4|PENDING|1:00|N/A||Priority"
    )
    done = command("cancel", runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "done: nothing to cancel: it has finished",
        "planned: nothing to cancel: none of its jobs is queued or running",
        "twice: cancelled job 3, 4",
        "waits: cancelled job 2",
    ]
    assert [call for call in slurm.calls() if call[0] == "scancel"] == [["scancel", "3", "4", "2"]]
    assert [call[0] for call in slurm.calls()] == ["squeue", "scancel"]
    slurm.answer("squeue")
    slurm.answer("sacct", fails="Slurm accounting storage is disabled")
    assert {s.run.name: s.state for s in summarise(known_runs())}["waits"] == "STOPPED", "known without accounting"
    again = json.loads(command("cancel", "waits", "--json").stdout)
    assert [(a["did"], a["job_ids"]) for a in again] == [("nothing", [])]


def test_cancel_asks_a_training_outside_of_slurm_by_its_stop_file(slurm: Slurm, runs: Path) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])
    run = make(runs / "here")
    begin(run, "local-1")
    own = {"attempt": "local-1", "boot": boot, "host": "me", "pid": os.getpid(), "started": started}
    (run.path / "lease.json").write_text(json.dumps(own))
    (done_,) = cancel_runs([run.path])
    assert (done_.did, run.stop_file.read_text()) == ("asked", "asked\n")
    assert (
        done_.message
        == f"asked attempt local-1 (process {os.getpid()} on me) to stop at its next step, with a checkpoint"
    )
    run.stop_file.write_text("signal\n")
    assert cancel_runs([run.path])[0].did == "asked" and run.stop_file.read_text() == "signal\n"
    assert slurm.calls() == []


def test_cancel_says_that_slurm_does_not_answer(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    make(runs / "waits", job="2")
    slurm.answer("squeue", fails="Unable to contact slurm controller")
    done = command("cancel", "waits")
    assert done.returncode == 3 and "Slurm does not answer: nothing was cancelled" in done.stderr
    slurm.answer("squeue", "2|2|PENDING|1:00|N/A||Priority")
    slurm.answer("scancel", fails="scancel: error: Access denied")
    with pytest.raises(SlurmError, match="Access denied"):
        cancel_runs([runs / "waits"])
    assert not (runs / "waits/events.jsonl").exists()
