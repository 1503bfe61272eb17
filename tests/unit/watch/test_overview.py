"""status, list and cancel over many runs, with small programs for squeue, sacct and scancel on PATH that count their calls."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import NASTY, program
from tests.unit.conftest import Ran

from afina.errors import InputError, SlurmError
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.slurm.reasons import explain
from afina.slurm.submit import check_not_queued
from afina.text import short_duration, size_in_words
from afina.watch.cancel import cancel_runs
from afina.watch.find import find_runs, known_runs, resolve_folder, short_names
from afina.watch.overview import RunSummary, summarise, summary_of


class Slurm:
    """What squeue and sacct will say, and what they and scancel were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answer("squeue")
        self.answer("sacct")
        self.answer("scancel")

    def answer(self, name: str, *lines: str, fails: str = "") -> None:
        calls = shlex.quote(str(self.folder / "calls"))
        note = f'printf "%s " "${{0##*/}}" "$@" >>{calls}; echo >>{calls}\n'
        body = (
            f"echo {shlex.quote(fails)} >&2; exit 1\n" if fails else "".join(f"echo {shlex.quote(x)}\n" for x in lines)
        )
        program(self.folder, name, note + body)

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path / 'fake slurm'}:{os.environ['PATH']}")
    return Slurm(tmp_path / "fake slurm")


@pytest.fixture
def runs(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    (scratch / "runs").mkdir()
    return scratch / "runs"


def make(path: Path, *, job: str | None = None, **train: Any) -> RunDir:
    """A run directory as far as looking at it needs one."""
    (path / "attempts").mkdir(parents=True)
    (path / "plan.json").write_text(json.dumps({"recipe": {"name": path.name, "task": "auto", "train": train}}))
    (path / "prepared.json").write_text(json.dumps({"rows": {"train": 100}}))
    run = RunDir(path)
    if job:
        run.append("submissions.jsonl", {"job_id": job, "via": "sbatch"})
        time.sleep(
            0.01
        )  # the times of files are a few milliseconds behind the clock: nothing of it ends before it was submitted
    return run


def begin(run: RunDir, attempt: str, step: int = 0) -> None:
    run.begin_attempt(attempt)
    run.event("attempt_started", attempt=attempt)
    run.event("training", attempt=attempt, step=step, max_steps=50)


def end(run: RunDir, attempt: str, how: Any, cause: str, following: str) -> None:
    code = {"finished": 0, "stopped": 75, "failed": 4}[how]
    run.record(
        Outcome(outcome=how, exit_code=code, attempt=attempt, global_step=20, cause=cause, error="it broke\nhere")
    )
    run.event("attempt_ended", attempt=attempt, outcome=how, cause=cause, next=following)


def metric(run: RunDir, **record: Any) -> None:
    with run.metrics_file.open("a") as file:
        file.write(json.dumps(record) + "\n")


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
        "planned": "PLANNED",
        "pending": "PENDING",
        "running": "RUNNING",
        "finished": "FINISHED",
        "requeued": "PENDING",
        "stopped": "STOPPED",
        "failed": "FAILED",
        "gone": "FAILED",
        "cancelled": "STOPPED",
        "cancelled-here": "STOPPED",
        "died": "FAILED",
        "cell": "RUNNING",
        "resubmitted": "PENDING",
        "waits-again": "PENDING",
    }
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


def test_reasons_are_words_with_something_to_do() -> None:
    for reason, words, remedy in [
        ("Priority", "higher priority", "shorter --time"),
        ("(Resources)", "busy", "shorter --time"),
        ("AssocGrpGRESMinutes", "budget of compute time is used up", "SBATCH_ACCOUNT"),
        ("AssocGrpCPURunMinutesLimit", "at once", "starts when another"),
        ("QOSMaxJobsPerUserLimit", "as many jobs as the limits allow", "sacctmgr show qos"),
        ("QOSMaxWallDurationPerJobLimit", "more time than your limits allow", "shorter --time"),
        ("QOSMaxGRESPerNode", "one job may have", "submit again for less"),
        ("MaxJobsPerAccount", "as many jobs", "starts when another"),
        ("PartitionTimeLimit", "never start", "scontrol update JobId=4_2 TimeLimit"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "down, drained or reserved", "scontrol show reservation"),
        ("JobHeldUser", "held", "scontrol release 4_2"),
        ("DependencyNeverSatisfied", "never start", "scancel 4_2"),
        ("JobArrayTaskLimit", "sweep", "nothing"),
        ("SomethingNewOfSlurm", "keeps it waiting (SomethingNewOfSlurm)", "scontrol show job 4_2"),
    ]:
        waiting = explain(reason, "4_2")
        assert words in str(waiting) and remedy in waiting.remedy, waiting


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "-"), (0, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 00"), (3700, "1 h 02"), (90000, "1 d 1 h")],
)
def test_times_in_words(seconds: float | None, said: str) -> None:
    assert short_duration(seconds) == said


def test_sizes_in_words() -> None:
    assert [size_in_words(n) for n in (0, 999, 1000, 438_000_000)] == ["0 B", "999 B", "1.0 kB", "438.0 MB"]


# -- finding -----------------------------------------------------------------------------------------------------------


def test_runs_are_found_below_any_folder_and_by_their_short_names(slurm: Slurm, runs: Path) -> None:
    scratch = runs.parent
    for number in (10, 9, 1):
        make(runs / f"a-{number}")
    make(scratch / "sweeps/my sweep/runs/lr=1e-5")
    (scratch / "sweeps/my sweep/sweep.json").write_text("{}")
    make(runs / "a-1/checkpoints/not a run of its own")
    (runs / ".staging").mkdir()
    everything = [*(runs / f"a-{n}" for n in (1, 9, 10)), scratch / "sweeps/my sweep/runs/lr=1e-5"]
    assert known_runs() == everything
    assert find_runs([runs, runs / "a-9"]) == everything[:3]
    names = short_names(everything)
    assert names == ["a-1", "a-9", "a-10", "my sweep/lr=1e-5"]
    assert [find_runs([name]) for name in names] == [[run] for run in everything]
    assert find_runs(["my sweep"]) == everything[3:]
    with pytest.raises(InputError, match="a-11: no such folder") as caught:
        find_runs(["a-11"])
    assert "did you mean `a-1" in caught.value.remedy
    with pytest.raises(InputError, match="there is none below it"):
        find_runs([scratch / "sweeps/my sweep/runs/lr=1e-5/attempts"])


def test_the_beginning_of_a_name_is_enough_where_it_is_of_one(slurm: Slurm, runs: Path) -> None:
    sweep = runs.parent / "sweeps/lr-5f5f5f5f"
    for folder in (runs / "yelp-1a2b3c4d-1", runs / "yelp-1a9f0000-10", sweep / "runs/lr=1e-5,seed=1"):
        make(folder)
    (runs / ".yelp-1a2-staging").mkdir()
    assert resolve_folder("yelp-1a2") == runs / "yelp-1a2b3c4d-1"
    assert resolve_folder("lr-") == sweep and resolve_folder("lr-5f5f5f5f/lr=1") == sweep / "runs/lr=1e-5,seed=1"
    with pytest.raises(InputError, match="yelp: several names begin so: yelp-1a2b3c4d-1, yelp-1a9f0000-10"):
        resolve_folder("yelp")
    with pytest.raises(InputError, match="yelp-1a9f0000-1: no such folder"):  # never run 10
        resolve_folder("yelp-1a9f0000-1")


def test_what_cannot_be_looked_into_hides_nothing_else(slurm: Slurm, runs: Path) -> None:
    """Another user's runs are closed (0700); a link may lead in a circle."""
    make(runs / "mine")
    (runs / "a circle").symlink_to(runs / "a circle")
    (runs / "nowhere").symlink_to(runs / "gone")
    make(runs / "theirs/run")
    (runs / "theirs").chmod(0)
    open_to_us = os.access(runs / "theirs", os.R_OK)  # as everything is to root
    assert known_runs() == [runs / "mine", *([runs / "theirs/run"] if open_to_us else [])]
    (runs / "theirs").chmod(0o700)


def test_nasty_names(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    for name in NASTY:
        make(runs / name)
    done = command("list", "--json")
    assert done.returncode == 0, done.stderr
    assert {Path(r["run"]).name for r in json.loads(done.stdout)} == set(NASTY)
    shown = command("status").stdout.splitlines()
    assert len(shown) == len(NASTY) + 2, "a name with a line break is one line"
    assert not (runs.parent / "pwned").exists()


# -- the commands ------------------------------------------------------------------------------------------------------


def test_status_of_one_is_an_object_and_of_many_a_list(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    make(runs / "a")
    one = json.loads(command("status", runs / "a", "--json").stdout)
    assert {"run", "state", "step", "job_id", "metrics", "error"} <= set(one) and one["metrics"] == {}
    assert json.loads(command("status", "a", "--json").stdout)["run"] == str(runs / "a")
    assert [r["run"] for r in json.loads(command("status", runs, "--json").stdout)] == [str(runs / "a")]
    assert set(one) == set(RunSummary.__dataclass_fields__)


def test_warnings_stand_below_the_metrics(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    run = make(runs / "a")
    begin(run, "local-1")
    shared = "3 of 9 rows of eval are in train too"
    metrics = {"eval_accuracy": 0.9}
    run.record(Outcome(outcome="finished", exit_code=0, attempt="local-1", metrics=metrics, warnings=[shared]))
    shown = command("status", "a").stdout
    assert shown.index("eval_accuracy 0.900000") < shown.index(f"warning: {shared}")
    assert json.loads(command("status", "a", "--json").stdout)["warnings"] == [shared]
    # An older afina's outcome has none; its data warnings are in prepared.json.
    outcome = json.loads(run.outcome_file.read_text())
    del outcome["warnings"]
    run.outcome_file.write_text(json.dumps(outcome))
    (run.path / "prepared.json").write_text(json.dumps({"warnings": [f"{shared}, word for word: b.csv, row 1"]}))
    assert f"warning: {shared}, word for word" in command("status", "a").stdout


def test_status_without_runs_says_how_to_make_one(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    done = command("status")
    assert done.returncode == 0 and done.stdout.startswith("no runs yet: `afina submit RECIPE`")
    assert json.loads(command("status", "--json").stdout) == []
    assert command("list").stdout == "no runs yet\n"
    done = command("status", env={"AFINA_SCRATCH": None})
    assert done.returncode == 3 and "AFINA_SCRATCH is not set" in done.stderr


def test_status_is_a_table_with_totals(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    slurm.answer("squeue", "2|2|PENDING|30:00|N/A||Resources")
    begin(done_ := make(runs / "done"), "local-1")
    end(done_, "local-1", "finished", "", "")
    make(runs / "waits", job="2")
    said = command("status").stdout.splitlines()
    assert said[0].split()[:3] == ["state", "run", "step"]
    assert said[1].startswith("FINISHED  done") and said[2].startswith("PENDING   waits")
    assert said[2].endswith("it is next, and the nodes or GPUs it asks for are busy (Resources)"), "not cut in a pipe"
    assert said[3] == "2 runs: 1 finished, 1 pending"


def test_list_filters_and_sorts(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    for number, (name, value) in enumerate([("b", 0.5), ("a", 0.75), ("c", None)]):
        run = make(runs / name)
        os.utime(run.plan_file, (time.time() - 3600 * (number + 1),) * 2)
        if value is not None:
            begin(run, "local-1")
            metric(run, step=3, eval_loss=1.0, eval_accuracy=value)
            end(run, "local-1", "stopped", "asked", "")

    def names(*options: str) -> list[str]:
        return [line.split()[-1] for line in command("list", *options).stdout.splitlines()[1:]]

    assert (names(), names("--sort", "name"), names("--sort", "best")) == (
        ["b", "a", "c"],
        ["a", "b", "c"],
        ["a", "b", "c"],
    )
    assert (names("--state", "stopped"), names("--state", "PLANNED")) == (["b", "a"], ["c"])
    assert command("list", "--state", "failed").stdout == "no runs that are failed\n"
    sized = command("list", "--size").stdout.splitlines()
    assert sized[0].split() == ["state", "accuracy", "age", "size", "run"] and re.search(r"\d k?B  b$", sized[1])
    as_json = json.loads(command("list", "--json", "--size").stdout)
    on_disk = sum(f.stat().st_size for f in (runs / "b").rglob("*") if f.is_file())
    assert as_json[0]["size_bytes"] == on_disk


def test_list_sorts_by_a_metric_of_ones_own_in_its_direction(
    slurm: Slurm, runs: Path, command: Callable[..., Ran]
) -> None:
    for name, value in (("dear", 9.0), ("cheap", 2.0)):
        begin(run := make(runs / name, best_metric="costs:total:lower"), "local-1")
        metric(run, step=3, eval_loss=1.0, eval_total=value)
        end(run, "local-1", "stopped", "asked", "")
    lines = command("list", "--sort", "best").stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["cheap", "dear"] and "2.0000" in lines[1]


def test_watch_needs_a_terminal(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    make(runs / "a")
    done = command("status", "--watch")
    assert done.returncode == 2 and "--watch draws on a terminal" in done.stderr
    assert json.loads(command("status", "a", "--watch", "--json").stdout)["state"] == "PLANNED"


def test_watch_redraws_until_ctrl_c_which_is_silent(slurm: Slurm, runs: Path) -> None:
    """On a terminal of its own, as somebody watches."""
    import pty
    import signal

    slurm.answer("squeue", "2|2|RUNNING|30:00|N/A|n1|None")
    begin(make(runs / "runs", job="2"), "2.0")
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover
        os.execv(sys.executable, [sys.executable, "-m", "afina.cli", "status", "--watch"])
    said = b""
    while b"1 running" not in said:
        said += os.read(terminal, 4096)
    time.sleep(0.2)
    os.kill(child, signal.SIGINT)
    try:
        while more := os.read(terminal, 4096):
            said += more
    except OSError:  # the other end has gone
        pass
    _, code = os.waitpid(child, 0)
    os.close(terminal)
    assert code == 0 and b"RUNNING" in said and b"\x1b[32m" in said, said
    assert b"interrupted" not in said and b"Traceback" not in said, said


# -- cancel ------------------------------------------------------------------------------------------------------------


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
