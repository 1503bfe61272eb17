"""A run to submit, and fakes of Slurm's commands on PATH. tests/slurm uses a real Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import ROOT, program
from tests.unit.conftest import Ran

from afina.recipe.schema import Recipe
from afina.run.commands import job_scripts
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.plan import make_plan
from afina.site.settings import Site


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
    return claim(plan, {}, ["echo", "{run}"], "", tmp_path / "runs; it's $(a) 100%", scripts=job_scripts())


def no_slurm(tmp_path: Path, *programs: str) -> str:
    """A PATH with bash, Python's folder left out, and only the named programs of this machine."""
    folder = tmp_path / "only these"
    folder.mkdir(exist_ok=True)
    for name in (
        *[
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
        ],
        *programs,
    ):
        found = subprocess.run(["/bin/bash", "-c", f"command -v {name}"], capture_output=True, text=True).stdout.strip()
        if found.startswith("/") and not (folder / name).exists():
            (folder / name).symlink_to(found)
    return str(folder)


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
