"""A run to submit, and fakes of Slurm's commands on PATH. tests/slurm uses a real Slurm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import program

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
