"""Submission, queries and cancelling: the words of every command, and what a refusal says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import program
from tests.tiny import tiny_model, tiny_reviews, write_csv
from tests.unit.conftest import Ran, tree
from tests.unit.slurm.conftest import no_slurm

from afina.errors import SlurmError
from afina.run.commands import sbatch_argv
from afina.run.directory import RunDir, task_of
from afina.run.plan import Plan
from afina.site.settings import Site
from afina.slurm.client import need_slurm
from afina.slurm.query import Job, cancel, query
from afina.slurm.submit import max_array_size, submit_sbatch


def test_submission_passes_every_word_and_the_site(bin: Path, tmp_path: Path, run: RunDir) -> None:
    argv_file, env_file = tmp_path / "argv", tmp_path / "env"
    program(
        bin,
        "sbatch",
        f'printf "%s\\0" "$@" >{shlex.quote(str(argv_file))}; env -0 >{shlex.quote(str(env_file))}; echo "4711;cluster one"\n',
    )
    site = Site(
        scratch=run.plan().site.scratch,
        image=tmp_path / "it's.sif",
        runtime="apptainer",
        sbatch={"SBATCH_ACCOUNT": "a b", "SBATCH_COMMENT": "two\nlines"},
        file=tmp_path / "si te.env",
    )
    plan = run.plan().model_copy(update={"site": site})
    assert submit_sbatch(plan, run) == "4711;cluster one"
    words = [os.fsdecode(word) for word in argv_file.read_bytes().split(b"\0")[:-1]]
    comment = words.pop(1)
    assert comment.startswith("--comment=two\nlines afina:") and words == sbatch_argv(plan, run.path)[1:]
    given = dict(e.split(b"=", 1) for e in env_file.read_bytes().split(b"\0") if b"=" in e)
    assert given[b"SBATCH_ACCOUNT"] == b"a b" and given[b"SBATCH_COMMENT"] == b"two\nlines"
    assert given[b"AFINA_SCRATCH"] == os.fsencode(site.scratch) and given[b"AFINA_IMAGE"] == os.fsencode(
        site.image or ""
    )
    assert given[b"AFINA_SITE"] == os.fsencode(site.file or "")
    (record,) = run.lines("submissions.jsonl")
    assert (record["job_id"], record["via"], record["argv"]) == (
        "4711;cluster one",
        "sbatch",
        sbatch_argv(plan, run.path),
    )
    assert not (run.path / "intent.json").exists()


@pytest.mark.parametrize(
    ("refusal", "remedy"),
    [
        ("sbatch: error: invalid partition specified: gqu", "SBATCH_PARTITION"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified", "SBATCH_ACCOUNT"),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "--time"),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", "sinfo"),
        ("sbatch: error: Batch job submission failed: Invalid generic resource (gres) specification", "--gpus-per-node 0"),
        ("sbatch: error: Invalid qos specification", "SBATCH_QOS"),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit\nJob violates accounting/QOS policy (job submit limit, …)", "wait for some"),
        ("sbatch: error: QOSMaxWallDurationPerJobLimit\nJob violates accounting/QOS policy (job submit limit, …)", "shorter --time"),
        ("sbatch: error: QOSMaxGRESPerJob\nJob violates accounting/QOS policy (job submit limit, …)", "ask for less"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "less time, fewer nodes"),
        ("sbatch: error: something else entirely", "site.env"),
    ],
)  # fmt: skip
def test_a_refused_submission_gives_slurms_words_and_a_remedy(
    bin: Path, run: RunDir, refusal: str, remedy: str
) -> None:
    program(bin, "sbatch", f"echo {shlex.quote(refusal)} >&2; exit 1\n")
    with pytest.raises(SlurmError) as caught:
        submit_sbatch(run.plan(), run)
    assert refusal in caught.value.message and remedy in caught.value.remedy and caught.value.exit_code == 3
    assert list(run.lines("submissions.jsonl")) == [] and not (run.path / "intent.json").exists()


@pytest.mark.parametrize("body", ["exit 0\n", "echo\n", "echo 'Submitted nothing'\n"])
def test_an_answer_without_a_job_number_is_refused(bin: Path, run: RunDir, body: str) -> None:
    program(bin, "sbatch", body)
    with pytest.raises(SlurmError):
        submit_sbatch(run.plan(), run)
    assert list(run.lines("submissions.jsonl")) == []


def test_foreign_variables_do_not_reach_slurms_commands(
    bin: Path, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a surrounding job or salloc, of a profile; what reaches Slurm at all stays, and what the user says to sbatch."""
    foreign = "SLURM_ARRAY_TASK_ID SLURM_CPU_BIND SLURM_JOB_ID SQUEUE_PARTITION SINFO_FORMAT SACCT_FORMAT SCANCEL_STATE SBATCH_EXPORT SBATCH_WAIT"
    for name in foreign.split():
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SBATCH_RESERVATION", "mine")
    for name in ("sbatch", "squeue"):
        program(bin, name, f"env >{shlex.quote(str(tmp_path / name))}; echo 1\n")
    submit_sbatch(run.plan(), run)
    query(["1"], account=())
    for name in ("sbatch", "squeue"):
        seen = dict(line.split("=", 1) for line in (tmp_path / name).read_text().splitlines() if "=" in line)
        assert not seen.keys() & set(foreign.split()) and seen["SLURM_CONF"] == "/etc/slurm.conf", name
        assert seen["SBATCH_RESERVATION"] == "mine"


def test_a_job_on_another_cluster_is_asked_and_cancelled_there(bin: Path, run: RunDir, tmp_path: Path) -> None:
    program(bin, "sbatch", "echo '18;gpu'\n")
    assert submit_sbatch(run.plan(), run) == "18;gpu" and run.job_ids() == ("18;gpu",)
    answer = "case \"$*\" in *--clusters=gpu*) echo 'CLUSTER: gpu'; echo '18|18|PENDING|1:00|N/A||Priority';; esac"
    program(bin, "squeue", answer + "\n")
    program(bin, "sacct", "exit 1\n")
    jobs = query(["18;gpu", "18", "19;gpu"])
    assert {job_id: job.state for job_id, job in jobs.items()} == {"18;gpu": "PENDING", "18": "GONE", "19;gpu": "GONE"}
    assert jobs["18;gpu"].job_id == "18;gpu"
    record = tmp_path / "cancelled"
    program(bin, "scancel", f'echo "$*" >>{shlex.quote(str(record))}\n')
    cancel("18;gpu", "7")
    assert record.read_text().splitlines() == ["--clusters=gpu 18", "7"]
    assert task_of("18;gpu", 3) == "18_3;gpu"


@pytest.mark.parametrize(
    ("body", "size"), [("echo 'MaxArraySize            = 301'", 301), ("echo nothing", 1001), ("exit 1", 1001)]
)
def test_the_largest_array(bin: Path, body: str, size: int) -> None:
    program(bin, "scontrol", body + "\n")
    assert max_array_size() == size


# -- states ------------------------------------------------------------------------------------------------------------


def test_states_come_from_one_call(bin: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    lines = [
        "1|1|RUNNING|1-02:03:04|1795627570|n[1-2]|None",
        "2|2|PENDING|UNLIMITED|N/A||Resources",
        "3|3|COMPLETING|0:00|1795627570|n1|None",
        "4|4|CONFIGURING|1:30|1795627570|n1|None",
        "5|5|SUSPENDED|59:59|1795627570|n1|None",
        "7|7|TIMEOUT|0:00|1795627570|n1|TimeLimit",
        "8|8|PENDING|INVALID|1795631170||(ReqNodeNotAvail, UnavailableNodes:n[1-3]|4)",
        "squeue: a line of a wrapper that greets",
    ]
    words = " ".join(map(shlex.quote, lines))
    program(bin, "squeue", f'echo "$SLURM_TIME_FORMAT $*" >>{shlex.quote(str(calls))}; printf "%s\\n" {words}\n')
    program(
        bin, "sacct", f'echo "$*" >>{shlex.quote(str(calls))}; printf "%s\\n" "6|6|CANCELLED by 1000" "9_1|12|FAILED"\n'
    )
    jobs = query(["1", "2", "3", "4", "5", "6", "7", "8", "9_1"])
    assert {job_id: job.state for job_id, job in jobs.items()} == {
        "1": "RUNNING", "2": "PENDING", "3": "RUNNING", "4": "PENDING", "5": "PENDING", "6": "GONE", "7": "GONE",
        "8": "PENDING", "9_1": "GONE",
    }  # fmt: skip
    assert jobs["1"] == Job("1", "RUNNING", "RUNNING", "None", 93784, 1795627570.0, "n[1-2]")
    assert (jobs["2"].time_left_s, jobs["2"].start, jobs["5"].time_left_s) == (None, None, 3599)
    assert jobs["8"].reason == "(ReqNodeNotAvail, UnavailableNodes:n[1-3]|4)"
    assert (jobs["6"].slurm_state, jobs["7"].slurm_state, jobs["9_1"].slurm_state) == ("CANCELLED", "TIMEOUT", "FAILED")
    called = calls.read_text().splitlines()
    assert len(called) == 2 and called[0].startswith("%s --me") and called[1].endswith("--jobs=6,9_1")
    assert query([]) == {} and len(calls.read_text().splitlines()) == 2


def test_tasks_of_an_array_are_found_by_both_their_numbers(bin: Path) -> None:
    """Once it has begun a task has a number of its own; the last one to begin has that of the array."""
    lines = (
        "40_0|41|RUNNING|10:00|1|n1|None",
        "40_1|40|PENDING|20:00|1||BeginTime",
        "50_0|51|RUNNING|20:00|1|n2|None",
        "50_1|50|PENDING|30:00|N/A||JobArrayTaskLimit",
        "50_2|50|PENDING|30:00|N/A||JobArrayTaskLimit",
    )
    program(bin, "squeue", f'printf "%s\\n" {" ".join(map(shlex.quote, lines))}\n')
    program(bin, "sacct", "exit 1\n")
    jobs = query(["40_0", "41", "40_1", "40", "50_0", "50_2", "50_3"])
    assert {job_id: (job.state, job.time_left_s) for job_id, job in jobs.items()} == {
        "40_0": ("RUNNING", 600),
        "41": ("RUNNING", 600),
        "40_1": ("PENDING", 1200),
        "40": ("PENDING", 1200),
        "50_0": ("RUNNING", 1200),
        "50_2": ("PENDING", 1800),
        "50_3": ("GONE", None),
    }
    assert jobs["50_2"].reason == "JobArrayTaskLimit"


@pytest.mark.parametrize(
    "body",
    ["exit 1\n", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1\n', "kill -9 $$\n"],
)
def test_a_query_that_fails_is_unknown_never_failed(bin: Path, body: str) -> None:
    program(bin, "squeue", body)
    assert {job_id: job.state for job_id, job in query(["1", "2"]).items()} == {"1": "UNKNOWN", "2": "UNKNOWN"}


@pytest.mark.parametrize("body", ["exit 1\n", "echo 'Slurm accounting storage is disabled' >&2; exit 1\n", ""])
def test_without_accounting_gone_is_gone(bin: Path, body: str) -> None:
    program(bin, "squeue", "true\n")
    program(bin, "sacct", body)
    assert query(["1"]) == {"1": Job("1", "GONE")}


def test_no_squeue_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", no_slurm(tmp_path))
    assert query(["1"]) == {"1": Job("1", "UNKNOWN", reason="squeue is not on PATH: no Slurm here")}
    with pytest.raises(SlurmError, match="sbatch is not on PATH: no Slurm here"):
        need_slurm()


# -- the command line --------------------------------------------------------------------------------------------------


def test_without_slurm_nothing_is_claimed(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path, scratch: Path
) -> None:
    path = recipe_file()
    before = tree(scratch)
    done = command("submit", path, env={"PATH": no_slurm(tmp_path)})
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("error: sbatch is not on PATH: no Slurm here\n  remedy: run this on a login node")
    assert tree(scratch) == before


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_a_dry_run_prints_what_would_be_run_and_changes_nothing(
    bin: Path, command: Callable[..., Ran], recipe_file: Callable[..., Path], scratch: Path, tmp_path: Path, via: str
) -> None:
    path = recipe_file()
    before = tree(tmp_path)
    given = ["submit", path, "--via", via, "--nodes", "2", "--gpus-per-node", "2", "--time", "1:30:00", "--dry-run"]
    done = command(*given)
    assert done.returncode == 0, done.stderr
    as_json = command(*given, "--json")
    assert tree(tmp_path) == before, "a dry run left something behind"
    answer = json.loads(as_json.stdout)
    plan = Plan.model_validate(answer["plan"])
    assert (plan.geometry.nodes, plan.geometry.processes_per_node, plan.recipe.resources.time) == (2, 2, 90)
    assert answer["via"] == via and answer["run"].startswith(str(scratch / "runs"))
    text = done.stdout
    assert f"  run      {answer['run']} (new)\n" in text and 8 <= len(text.splitlines()) <= 12
    assert f"  command  {shlex.join(answer['command'])}\n" in text
    if via == "sbatch":
        assert answer["command"] == sbatch_argv(plan, Path(answer["run"]))
    else:
        assert "#SBATCH --nodes=2" in answer["script"] and "  script   " in text
        checked = subprocess.run(["bash", "-n"], input=answer["script"], text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_a_dry_run_needs_no_slurm(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    done = command("submit", recipe_file(), "--dry-run", env={"PATH": no_slurm(tmp_path)})
    assert done.returncode == 0 and "  command  sbatch --parsable" in done.stdout, done.stderr


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_a_refused_submission_leaves_no_run_behind(
    bin: Path, command: Callable[..., Ran], recipe_file: Callable[..., Path], scratch: Path, tmp_path: Path, via: str
) -> None:
    for name in ("sbatch", "srun"):
        program(bin, name, "echo 'sbatch: error: invalid partition specified: gqu' >&2; exit 1\n")
    path = recipe_file(model=str(tiny_model(tmp_path / "model")))
    write_csv(path.parent / "reviews.csv", tiny_reviews(40))
    settings = ("data.train={fraction: 0.5}", "data.eval={fraction: 0.5}", "tokens.max_length=32")
    done = command("submit", path, "--via", via, *[word for setting in settings for word in ("--set", setting)])
    assert done.returncode == 3 and "invalid partition specified" in done.stderr, done
    assert "  remedy: " in done.stderr and "Traceback" not in done.stderr
    assert not list((scratch / "runs").iterdir())


# -- submitit ----------------------------------------------------------------------------------------------------------


def test_the_room_does_not_import_submitit_and_old_pickles_find_their_task() -> None:
    """Runs that earlier versions submitted name `afina.slurm.NodeTask`."""
    code = (
        "import pickle, sys, afina.slurm; assert 'afina.slurm.submitit_job' not in sys.modules\n"
        "from afina.slurm import submitit_job; assert 'submitit' not in sys.modules\n"
        "task = pickle.loads(b'cafina.slurm\\nNodeTask\\n)\\x81}Vrun\\nV/runs/1\\nsb.')\n"
        "assert isinstance(task, submitit_job.NodeTask) and task.run == '/runs/1'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
