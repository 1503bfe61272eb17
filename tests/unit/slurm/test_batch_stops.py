"""slurm/finetune.sbatch when an attempt ends: exit codes, signals, requeues."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import program
from tests.unit.slurm.conftest import SCRIPT, in_job, recorded, sbatch

from afina.recipe.schema import Recipe
from afina.run.commands import job_scripts
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site


def test_a_signal_in_the_first_seconds_does_not_kill_the_job(
    slurm_commands: Path, run: RunDir, scratch: Path, tmp_path: Path
) -> None:
    """Where the time limit is short Slurm sends USR1 while the site file is still read."""
    (tmp_path / "site.env").write_text("kill -USR1 $$\n")
    leaves = f"echo 0 >{shlex.quote(str(run.attempts / '4242.0/exit'))}"
    done = sbatch(run.path, env=in_job(scratch, FAKE_SRUN=leaves, AFINA_SITE=str(tmp_path / "site.env")))
    assert done.returncode == 0, done
    assert recorded(slurm_commands)[0][-2:] == run.worker_argv()


def test_words_that_no_disk_took_are_a_full_disk(slurm_commands: Path, run: RunDir, scratch: Path) -> None:
    done = sbatch(run.path, env=in_job(scratch, FAKE_SRUN="exit 120"))
    assert done.returncode == 3, done


@pytest.mark.parametrize("code", [0, 2, 3, 4, 75])
def test_the_exit_code_is_what_the_worker_wrote(slurm_commands: Path, run: RunDir, scratch: Path, code: int) -> None:
    """Also where srun itself says something else."""
    exit_file = shlex.quote(str(run.attempts / "4242.0/exit"))
    done = sbatch(run.path, env=in_job(scratch, FAKE_SRUN=f"echo {code} >{exit_file}; exit 1"))
    assert done.returncode == code, done
    assert not (slurm_commands / "requeued").exists(), "no time limit was near"


def test_a_worker_that_left_no_outcome_is_recorded_as_failed(
    slurm_commands: Path, plan_for_worker: Plan, scratch: Path
) -> None:
    run = claim(
        plan_for_worker,
        {},
        [sys.executable, "-m", "afina.worker", "launch", "{run}"],
        "",
        scratch / "r un",
        scripts=job_scripts(),
    )
    log = run.attempts / "4242.0/node0.log"
    done = sbatch(run.path, env=in_job(scratch, FAKE_SRUN=f"echo 'last words' >>{shlex.quote(str(log))}; exit 137"))
    assert done.returncode == 4, done
    outcome = run.outcome()
    assert outcome is not None and (outcome.outcome, outcome.attempt) == ("failed", "4242.0")
    assert "signal 9" in (outcome.error or "") and "last words" in (outcome.error or "")


@pytest.fixture
def plan_for_worker(recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site) -> Plan:
    return make_plan(recipe(), site, recipe_file=recipe_file())


def next_file(run: RunDir, *lines: str) -> str:
    """Shell words that write `attempts/4242.0/next`, as the worker's settle module does."""
    path = shlex.quote(str(run.attempts / "4242.0/next"))
    return f"printf '%s\\n' {' '.join(map(shlex.quote, lines))} >{path}"


@pytest.mark.parametrize(
    ("number", "left", "says"),
    [
        (signal.SIGUSR1, "UNLIMITED", "limit"),
        (signal.SIGUSR1, "1-00:00:00", "limit"),
        (signal.SIGTERM, "10:00", "signal"),
    ],
)
def test_signals_ask_for_a_stop_by_the_stop_file(
    slurm_commands: Path, run: RunDir, bin: Path, scratch: Path, number: signal.Signals, left: str, says: str
) -> None:
    program(bin, "squeue", f'case "$*" in *%L*) echo {left} ;; *%T*) echo RUNNING ;; esac\n')
    run.stop_file.touch()  # of an earlier attempt
    exit_file = shlex.quote(str(run.attempts / "4242.0/exit"))
    stop = shlex.quote(str(run.stop_file))
    body = f"for i in {{1..200}}; do [ -e {stop} ] && break; sleep 0.05; done; echo 75 >{exit_file}"
    given = {**os.environ, **{k: v for k, v in in_job(scratch, FAKE_SRUN=body).items() if v is not None}}
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(run.path)], env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 20
    while not (slurm_commands / "srun.env").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not run.stop_file.exists()
    process.send_signal(number)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert run.stop_file.read_text() == f"{says}\n" and process.returncode == 75, output
    assert not (slurm_commands / "requeued").exists(), "nothing has decided so"
    _, env = recorded(slurm_commands)
    ends = float(env.get("AFINA_DEADLINE") or 0)
    assert ends == 0 if left == "UNLIMITED" else abs(ends - time.time() - {"10:00": 600}.get(left, 86400)) < 60


@pytest.mark.parametrize(
    ("lines", "state", "asked", "submitted"),
    [
        (("end", "", "it would fail again"), "RUNNING", False, None),
        (("requeue", "", "go on"), "RUNNING", True, []),
        (("requeue", "", "go on"), "COMPLETING", False, None),
        (("requeue", "", "go on"), "PREEMPTED", False, []),
        (("requeue", "n1,n2", "n1, n2 cannot run this job"), "RUNNING", False, ["--exclude=n1,n2"]),
    ],
)
def test_what_the_worker_decided_is_done(
    slurm_commands: Path,
    run: RunDir,
    bin: Path,
    scratch: Path,
    lines: tuple[str, ...],
    state: str,
    asked: bool,
    submitted: list[str] | None,
) -> None:
    """Slurm refuses the requeue here: then, and where nodes are to be left out, a new job goes on with the run."""
    program(bin, "squeue", f'case "$*" in *%L*) echo 10:00 ;; *%T*) echo {state} ;; *%l*) echo 2:00:00 ;; esac\n')
    argv_file = slurm_commands / "sbatch.argv"
    program(bin, "sbatch", f'printf "%s\\0" "$@" >{shlex.quote(str(argv_file))}; echo 4300\n')
    exit_file = shlex.quote(str(run.attempts / "4242.0/exit"))
    body = f"echo 75 >{exit_file}; {next_file(run, *lines)}"
    given = in_job(
        scratch,
        FAKE_SRUN=body,
        SLURM_JOB_NAME="it's $(a) job",
        SLURM_JOB_PARTITION="gpu",
        SLURM_GPUS_PER_NODE="2",
        SBATCH_MAIL_TYPE="END,FAIL",
    )
    done = sbatch(run.path, env=given)
    assert done.returncode == 75 and lines[2] in done.stdout, done
    assert (slurm_commands / "requeued").exists() is asked
    if submitted is None:
        assert not argv_file.exists() and list(run.lines("submissions.jsonl")) == []
        return
    argv = [os.fsdecode(w) for w in argv_file.read_bytes().split(b"\0")[:-1]]
    assert argv[-2:] == [str(run.path / "finetune.sbatch"), str(run.path)]
    expected = {
        "--job-name=it's $(a) job",
        "--mail-type=END,FAIL",
        "--nodes=2",
        "--partition=gpu",
        "--gpus-per-node=2",
        "--time=2:00:00",
    }
    assert expected | set(submitted) <= set(argv)
    (record,) = run.lines("submissions.jsonl")
    assert (record["job_id"], record["via"]) == ("4300", "resubmit")


@pytest.mark.parametrize(
    ("answers", "calls", "submitted"),
    [("ok", 1, False), ("lost ok", 2, False), ("lost refused", 2, True), ("lost lost lost", 3, True)],
)
def test_a_requeue_whose_answer_is_lost_is_no_refusal(
    slurm_commands: Path, run: RunDir, bin: Path, scratch: Path, answers: str, calls: int, submitted: bool
) -> None:
    """A new job beside the one that Slurm has put back would be a second one. Slurm's TERM ends the pause after it."""
    program(bin, "squeue", 'case "$*" in *%T*) echo RUNNING ;; esac\n')
    program(bin, "sleep", 'case $1 in 10) ;; 120) exit 143 ;; *) exec /bin/sleep "$@" ;; esac\n')
    counter = shlex.quote(str(slurm_commands / "requeued"))
    body = f"""
[ "$1" = requeue ] || exit 1
echo >>{counter}
case $(cut -d ' ' -f "$(wc -l <{counter})" <<<"{answers}") in
  lost) echo "slurm_load_jobs error: Socket timed out on send/recv operation" >&2; exit 1 ;;
  refused) echo "Requested operation is presently disabled" >&2; exit 1 ;;
esac
"""
    program(bin, "scontrol", body)
    program(bin, "sbatch", "echo 4300\n")
    exit_file = shlex.quote(str(run.attempts / "4242.0/exit"))
    done = sbatch(
        run.path, env=in_job(scratch, FAKE_SRUN=f"echo 75 >{exit_file}; {next_file(run, 'requeue', '', 'go on')}")
    )
    assert (slurm_commands / "requeued").read_text().count("\n") == calls, done
    assert len(list(run.lines("submissions.jsonl"))) == submitted, done


def test_a_stop_for_an_attempt_that_lives_is_left_alone(slurm_commands: Path, run: RunDir, scratch: Path) -> None:
    run.stop_file.touch()
    lease = run.path / "lease.json"
    lease.write_text("{}")
    exit_file = shlex.quote(str(run.attempts / "4242.0/exit"))
    assert sbatch(run.path, env=in_job(scratch, FAKE_SRUN=f"echo 2 >{exit_file}")).returncode == 2
    assert run.stop_file.exists(), "its lease was renewed a moment ago"
    os.utime(lease, (1e9, 1e9))
    assert sbatch(run.path, env=in_job(scratch, FAKE_SRUN=f"echo 0 >{exit_file}")).returncode == 0
    assert not run.stop_file.exists()
