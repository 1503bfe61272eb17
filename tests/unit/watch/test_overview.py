"""The state of each run, and what is shown of it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.unit.watch.conftest import Slurm, begin, end, make, metric

from afina.errors import InputError, SlurmError
from afina.slurm.submit import check_not_queued
from afina.watch.find import known_runs
from afina.watch.overview import summarise, summary_of

# -- states ------------------------------------------------------------------------------------------------------------


def test_every_state_with_one_question_each_to_squeue_and_sacct(slurm: Slurm, runs: Path) -> None:
    made = {name: make(runs / name, job=job) for name, job in [
        ("planned", None), ("pending", "1"), ("running", "2"), ("finished", "3"), ("requeued", "4"), ("stopped", "5"),
        ("failed", "6"), ("gone", "7"), ("cancelled", "8"), ("cancelled-here", "9"), ("died", "10"), ("cell", "11_3"),
        ("resubmitted", "12"), ("waits-again", "13"),
    ]}  # fmt: skip
    begin(made["running"], "2.0")
    begin(made["finished"], "3.0")
    end(made["finished"], "3.0", "finished", "", "end")
    begin(made["requeued"], "4.0")
    end(made["requeued"], "4.0", "stopped", "signal", "requeue")
    begin(made["stopped"], "5.0")
    end(made["stopped"], "5.0", "stopped", "asked", "end")
    begin(made["failed"], "6.0")
    end(made["failed"], "6.0", "failed", "loss", "end")
    made["cancelled-here"].event("cancelled", job_ids=["9"])
    begin(made["died"], "10.0")
    end(made["died"], "10.0", "stopped", "signal", "requeue")
    begin(made["died"], "10.1", step=20)
    begin(made["resubmitted"], "112.0")
    end(made["resubmitted"], "112.0", "failed", "memory", "end")
    os.utime(made["resubmitted"].outcome_file, (1e9, 1e9))  # before it was submitted again
    begin(made["waits-again"], "13.0")
    slurm.answer(
        "squeue",
        "1|1|PENDING|1:00:00|N/A||QOSMaxGRESPerUser",
        "2|2|RUNNING|1:00:00|N/A|n7|None",
        f"4|4|PENDING|1:00:00|{int(time.time()) + 90}||BeginTime",
        "11_3|17|RUNNING|1:00:00|N/A|n1|None",
        "12|12|PENDING|1:00:00|N/A||Priority",
        "13|13|REQUEUE_HOLD|1:00:00|N/A||launch failed requeued held",
    )
    slurm.answer("sacct", "8|8|CANCELLED by 1000", "10|10|NODE_FAIL")
    found = {s.run.name: s for s in summarise(known_runs())}
    assert {name: s.state for name, s in found.items()} == {
        "planned": "PLANNED", "pending": "PENDING", "running": "RUNNING", "finished": "FINISHED",
        "requeued": "PENDING", "stopped": "STOPPED", "failed": "FAILED", "gone": "FAILED", "cancelled": "STOPPED",
        "cancelled-here": "STOPPED", "died": "FAILED", "cell": "RUNNING", "resubmitted": "PENDING",
        "waits-again": "PENDING",
    }  # fmt: skip
    squeue, sacct = slurm.calls()
    assert (squeue[0], sacct[0]) == ("squeue", "sacct")
    assert set(sacct[-1].removeprefix("--jobs=").split(",")) == {"7", "8", "9", "10"}, (
        "only those whose end is not written down"
    )
    assert "as many GPUs, cores or nodes as one user may have" in (found["pending"].why or "")
    assert "QOSMaxGRESPerUser" in (found["pending"].why or "") and "sacctmgr show qos" in (
        found["pending"].remedy or ""
    )
    assert found["requeued"].starts and found["requeued"].attempts == 1
    assert (found["running"].nodes, found["running"].limit_s) == ("n7", 3600)
    assert found["stopped"].why == "a user asked for the stop"
    assert (found["failed"].why, found["failed"].error) == ("it broke", "it broke\nhere")
    assert found["gone"].why == "job 7 left the queue without an outcome: it left no log"
    assert "do all nodes see" in (found["gone"].remedy or "")
    assert (found["died"].why or "").startswith("attempt 10.1 left the queue without an outcome (Slurm: NODE_FAIL)")
    assert found["waits-again"].remedy and "scontrol release 13" in found["waits-again"].remedy
    assert "afina submit" in (found["planned"].remedy or "")


def test_the_decisive_line_is_of_the_log_of_the_job_that_ended(slurm: Slurm, runs: Path) -> None:
    """Not of an earlier job's; a sweep's tasks have theirs in the sweep's folder."""
    refused = make(runs / "refused", job="7")
    (refused.path / "slurm-7.out").write_text(
        "hello\nerror: AFINA_SITE=/home/me/site.env: no such file on n1\n  remedy: put it there\nlogout\n"
    )
    again = make(runs / "again", job="8")
    (again.path / "slurm-7.out").write_text("error: of an earlier job\n")
    cell = make(runs.parent / "sweeps/s/runs/c", job="9_3")
    (runs.parent / "sweeps/s/logs").mkdir()
    (runs.parent / "sweeps/s/logs/9_3.out").write_text("slurmstepd: error: couldn't chdir\n\n")
    slurm.answer("squeue", "7|7|FAILED|0:00|N/A|n1|NonZeroExitCode", "8|8|FAILED|0:00|N/A|n1|NonZeroExitCode")
    slurm.answer("sacct", "9_3|9|TIMEOUT")
    first, second, third = summarise([refused.path, again.path, cell.path])
    assert "(Slurm: FAILED): AFINA_SITE=/home/me/site.env: no such file on n1" in (first.why or "")
    assert (first.remedy or "").startswith("put it there; then: afina submit")
    assert "earlier job" not in (second.why or "") and "it left no log" in (second.why or "")
    assert "couldn't chdir" in (third.why or "") and "ask for more time" in (third.remedy or "")


def test_a_job_that_squeue_does_not_show_yet_is_not_lost(
    slurm: Slurm, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some sites serve answers of squeue that are a minute old; a second job would train beside the first."""
    monkeypatch.setattr("afina.slurm.query.NEW_S", 120.0)
    run = make(runs / "new")
    run.append("submissions.jsonl", {"job_id": "7", "via": "sbatch"})
    slurm.answer("squeue")
    slurm.answer("sacct")
    summary = summary_of(run.path)
    assert summary.state == "UNKNOWN" and "squeue does not show it yet" in (summary.why or "")
    with pytest.raises(SlurmError, match="squeue does not show it yet"):
        check_not_queued(run)
    slurm.answer("sacct", "7|7|FAILED")
    assert summary_of(run.path).state == "FAILED"
    check_not_queued(run)


@pytest.mark.parametrize(
    ("state", "shown", "words"),
    [
        ("SUSPENDED", "PENDING", "has suspended it"),
        ("SPECIAL_EXIT", "PENDING", "holds it"),
        ("REQUEUED", "PENDING", "putting it back"),
        ("CONFIGURING", "PENDING", "being prepared"),
        ("REVOKED", "RUNNING", "has started"),
    ],
)
def test_states_in_which_slurm_gives_no_reason(slurm: Slurm, runs: Path, state: str, shown: str, words: str) -> None:
    """REVOKED: another cluster of the federation runs the job."""
    run = make(runs / "one", job="7")
    slurm.answer("squeue", f"7|7|{state}|1:00|N/A|n1|None")
    summary = summary_of(run.path)
    assert (summary.state, words in (summary.why or "")) == (shown, True), summary
    with pytest.raises(InputError, match="of this run is"):
        check_not_queued(run)


def test_a_question_that_fails_is_unknown_never_failed(slurm: Slurm, runs: Path) -> None:
    begin(make(runs / "begun", job="1"), "1.0")
    begin(failed := make(runs / "may be back", job="2"), "2.0")
    end(failed, "2.0", "failed", "killed", "requeue")
    begin(over := make(runs / "over", job="3"), "3.0")
    end(over, "3.0", "failed", "loss", "end")
    begin(alive := make(runs / "alive", job="4"), "4.0")
    (alive.path / "lease.json").write_text(json.dumps({"attempt": "4.0", "boot": "another", "host": "n9", "pid": 1}))
    slurm.answer("squeue", fails="slurm_load_jobs error: Unable to contact slurm controller")
    found = {s.run.name: s for s in summarise(known_runs())}
    assert {name: s.state for name, s in found.items()} == {
        "begun": "UNKNOWN",
        "may be back": "UNKNOWN",
        "over": "FAILED",  # written down, and nobody put it back
        "alive": "RUNNING",  # its lease was renewed a moment ago
    }
    assert "Slurm does not answer: squeue refused: slurm_load_jobs error: Unable to contact" in (
        found["begun"].why or ""
    )
    assert [call[0] for call in slurm.calls()] == ["squeue"]


def test_a_run_that_trains_outside_of_slurm_is_known_by_its_lease(slurm: Slurm, runs: Path) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    sleeper = subprocess.Popen(["sleep", "60"])
    started = int(Path(f"/proc/{sleeper.pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    own = {"attempt": "local-2", "boot": boot, "host": os.uname().nodename, "pid": sleeper.pid, "started": started}
    here = make(runs / "here")
    begin(here, "local-1")
    end(here, "local-1", "stopped", "asked", "")
    begin(here, "local-2", step=20)
    lease = here.path / "lease.json"
    try:
        lease.write_text(json.dumps(own))
        assert summary_of(here.path).state == "RUNNING"
    finally:
        sleeper.kill()
        sleeper.wait()
    killed = summary_of(here.path)
    assert (killed.state, killed.why) == ("FAILED", "attempt local-2 died without an outcome")
    lease.write_text(json.dumps(own | {"boot": "before", "host": "another"}))
    assert summary_of(here.path).state == "RUNNING", "on another machine, renewed just now"
    os.utime(lease, (time.time() - 600,) * 2)
    silent = summary_of(here.path)
    assert silent.state == "UNKNOWN" and "another has not renewed its lease for 10 min" in (silent.why or "")
    lease.unlink()
    end(here, "local-2", "stopped", "asked", "")
    assert summary_of(here.path).state == "STOPPED"
    assert slurm.calls() == [], "there is no job to ask for"


def test_a_run_that_was_claimed_inside_its_job_is_known_by_its_attempt(slurm: Slurm, runs: Path) -> None:
    begin(make(runs / "inside"), "77.0")
    slurm.answer("squeue", "77|77|RUNNING|9:00|N/A|n1|None")
    assert (summary_of(runs / "inside").state, summary_of(runs / "inside").job_id) == ("RUNNING", "77")


@pytest.mark.parametrize(
    ("log", "why", "remedy"),
    [
        ("error: AFINA_SITE=/home/me/s.env: no such file on n1\n  remedy: put it where every node sees it\nlast\n", "no such file on n1", "put it where every node sees it; then: afina submit "),
        ("a\nslurmstepd: error: *** JOB 7 ON n1 CANCELLED DUE TO TIME LIMIT ***\n", "DUE TO TIME LIMIT", "see `afina logs "),
        ("/home/me/.bashrc: line 3: X: unbound variable\n\n", "X: unbound variable", "afina logs"),
    ],
)  # fmt: skip
def test_a_dead_run_shows_the_decisive_line_of_its_log(
    slurm: Slurm, runs: Path, log: str, why: str, remedy: str
) -> None:
    make(runs / "dead", job="7")
    (runs / "dead/slurm-7.out").write_text(log)
    summary = summary_of(runs / "dead")
    assert summary.state == "FAILED" and why in (summary.why or "") and remedy in (summary.remedy or "")


def test_a_lost_answer_is_unknown(slurm: Slurm, runs: Path) -> None:
    make(runs / "lost")
    (runs / "lost/intent.json").write_text("{}")
    summary = summary_of(runs / "lost")
    assert summary.state == "UNKNOWN" and "looks for its job first" in (summary.remedy or "")


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_progress_comes_from_the_newest_attempt(slurm: Slurm, runs: Path) -> None:
    slurm.answer("squeue", "5|5|RUNNING|30:00|N/A|n1|None")
    run = make(runs / "r", job="5")
    begin(run, "5.0")
    run.event("pace", attempt="5.0", step=40, max_steps=50, tokens_per_s=999.0, seconds_left=60)
    begin(run, "5.1", step=20)
    metric(run, step=10, epoch=0.8, loss=0.9)
    metric(run, step=13, epoch=1.0, eval_loss=0.7, eval_accuracy=0.75, eval_f1_per_class=[0.1])
    metric(run, step=20, epoch=1.6, loss=0.5)
    s = summary_of(run.path)
    assert (s.step, s.max_steps, s.epoch, s.loss, s.attempts, s.attempt) == (20, 50, 1.6, 0.5, 2, "5.1")
    assert (s.best_metric, s.best_value, s.best_step, s.tokens_per_s) == ("accuracy", 0.75, 13, None)
    run.event("first_step", attempt="5.1", step=21)
    run.append("events.jsonl", {"event": "checkpoint", "attempt": "5.1", "step": 30, "time": time.time() + 9})
    left = summary_of(run.path).seconds_left
    assert left is not None and 25 <= left <= 29.1, "20 steps of a second each, and nine seconds that have not passed"
    run.event("pace", attempt="5.1", step=33, max_steps=50, epoch=2.6, loss=0.4, tokens_per_s=1234.5, seconds_left=17)
    s = summary_of(run.path)
    assert (s.step, s.epoch, s.loss, s.tokens_per_s) == (33, 2.6, 0.5, 1234.5) and 15 < (s.seconds_left or 0) <= 17


@pytest.mark.parametrize(
    ("train", "expected"), [({}, 39), ({"epochs": 1.5, "batch_size": 30}, 6), ({"max_steps": 7}, 7)]
)
def test_the_steps_of_a_run_that_has_not_begun(slurm: Slurm, runs: Path, train: dict[str, Any], expected: int) -> None:
    make(runs / "r", **({"batch_size": 8} | train))
    assert summary_of(runs / "r").max_steps == expected


def test_the_best_is_found_beyond_the_end_of_a_long_log(slurm: Slurm, runs: Path) -> None:
    run = make(runs / "long", best_metric="mse")
    metric(run, step=1, eval_loss=1, eval_mse=0.25)
    for step in range(2, 3000):
        metric(run, step=step, loss=0.123456789, learning_rate=5e-5)
    metric(run, step=3000, eval_loss=1, eval_mse=0.5)
    assert run.metrics_file.stat().st_size > 2 * 65536
    folder = run.checkpoints / "step-2900"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"best_metric": 0.25, "best_global_step": 1}))
    s = summary_of(run.path)
    assert (s.best_metric, s.best_value, s.best_step, s.step) == ("mse", 0.25, 1, 3000)


def test_torn_and_damaged_files_hide_nothing_else(slurm: Slurm, runs: Path) -> None:
    run = make(runs / "torn", job="5")
    begin(run, "5.0")
    metric(run, step=5, epoch=0.5, loss=0.5)
    for file in (run.metrics_file, run.path / "events.jsonl"):
        with file.open("a") as open_file:
            open_file.write('{"step": 99, "loss": 0.')
    run.plan_file.write_text('{"recipe": {"na')
    run.outcome_file.write_text("")
    (run.path / "lease.json").write_text("[]")
    slurm.answer("squeue", "5|5|RUNNING|30:00|N/A|n1|None")
    s = summary_of(run.path)
    assert (s.name, s.state, s.step, s.loss) == ("torn", "RUNNING", 5, 0.5)
