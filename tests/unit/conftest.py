"""A hostile environment for every unit test, and the inputs they share.

HOME and the working directory are new folders whose names hold a space and a quote, the time zone and the locale have
moved, and no variable of afina, Slurm or Hugging Face is set. Warnings are errors (pyproject.toml), also in the
processes that the `afina` fixture starts.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.common import NASTY
from tests.unit.forks import exit_code_here

from afina.recipe.parse import load_recipe
from afina.recipe.schema import Recipe
from afina.site.settings import Site

_FOREIGN = ("AFINA_", "SBATCH_", "SLURM_", "HF_", "APPTAINER", "SINGULARITY", "TRANSFORMERS_", "CUDA_VISIBLE")


@pytest.fixture(autouse=True)
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(_FOREIGN):
            monkeypatch.delenv(name)
    home = tmp_path / "ho me's"
    here = tmp_path / "working 'here'"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TZ", "Pacific/Chatham")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.chdir(here)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture(autouse=True)
def a_job_that_squeue_does_not_show_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that stand for squeue forget jobs of a second ago, which Slurm does not."""
    monkeypatch.setattr("afina.slurm.query.NEW_S", 0.0)


@pytest.fixture(autouse=True)
def a_lost_job_is_looked_for_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the programs that stand for squeue do not say at once they never say."""
    monkeypatch.setattr("afina.slurm.submit._PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture(params=NASTY)
def nasty(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scra tch, 'of' \"all\": $(touch pwned) ☃"
    folder.mkdir()
    return folder


@pytest.fixture
def site(scratch: Path) -> Site:
    """A site without a container."""
    return Site(scratch=scratch)


@pytest.fixture
def sif(tmp_path: Path) -> Path:
    """A file with the header of a SIF image, as whole as that header says, and nothing of use in it."""
    path = tmp_path / "an image.sif"
    path.write_bytes(sif_bytes())
    return path


def sif_bytes(data: int = 512) -> bytes:
    head = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0") + b"SIF_MAGIC\0" + b"01\0" + b"02\0" + bytes(16)
    return head + struct.pack("<8q", 0, 0, 0, 0, 128, 0, 128, data) + bytes(data)


def recipe_dict(**changes: Any) -> dict[str, Any]:
    """The recipe of the interface; `train__epochs=2` sets `train: {epochs: 2}`, and `DROP` leaves a key out."""
    recipe: dict[str, Any] = {
        "name": "amazon-stars",
        "model": "owner/model",
        "data": {
            "files": {"all": "reviews.csv"},
            "text": "text",
            "label": "stars",
            "train": {"fraction": 0.8, "sample": 600, "seed": 42},
            "eval": {"fraction": 0.2, "sample": 300, "seed": 42},
        },
        "tokens": {"max_length": 256},
        "train": {
            "batch_size": 8,
            "epochs": 1,
            "learning_rate": 5.0e-5,
            "seed": 1,
            "arguments": {"weight_decay": 0.01},
        },
        "metrics": ["accuracy", "f1"],
    }
    for path, value in changes.items():
        *above, last = path.split("__")
        here = recipe
        for key in above:
            here = here.setdefault(key, {})
        if value == DROP:
            here.pop(last, None)
        else:
            here[last] = value
    return recipe


#: A value, not an object of its own: pytest and the tests import this file under two names.
DROP = "<drop this key>"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe into a folder with a nasty name, and its data file beside it."""
    folder = tmp_path / "re cipes, 'mine'"

    def write(**changes: Any) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "reviews.csv").write_text("text,stars\ngood,5\nbad,1\n", encoding="utf-8")
        path = folder / "recipe.yaml"
        with path.open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(recipe_dict(**changes), file)
        return path

    return write


@pytest.fixture
def recipe(recipe_file: Callable[..., Path]) -> Callable[..., Recipe]:
    def load(**changes: Any) -> Recipe:
        return load_recipe(recipe_file(**changes))

    return load


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """What the host side looks for in a model folder; nothing that could be loaded."""
    folder = tmp_path / "mo del"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors").write_bytes(b"\0" * 16)
    return folder


Ran = subprocess.CompletedProcess[str]


@pytest.fixture
def afina(scratch: Path) -> Callable[..., Ran]:
    """Runs `python -W error -m afina ARGUMENTS` with AFINA_SCRATCH set; `env` adds to it, None removes."""

    def run(*arguments: str | Path, env: Mapping[str, str | None] | None = None, cwd: Path | None = None) -> Ran:
        given = {**os.environ, "AFINA_SCRATCH": str(scratch), **(env or {})}
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "afina", *map(str, arguments)],
            env={k: v for k, v in given.items() if v is not None},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture
def command(scratch: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """As `afina`, in this process, and its workers in forks."""

    def run(*arguments: str | Path, env: Mapping[str, str | None] | None = None) -> Ran:
        argv = [*map(str, arguments)]
        code = exit_code_here(argv, {"AFINA_SCRATCH": str(scratch), **(env or {})})
        captured = capfd.readouterr()
        return subprocess.CompletedProcess(argv, code, captured.out, captured.err)

    return run


def tree(*folders: Path) -> dict[str, str]:
    """Every path below `folders` with its kind, mode and digest: equal trees are equal values."""
    found: dict[str, str] = {}
    for folder in folders:
        for path in sorted([folder, *folder.rglob("*")]):
            mode = f"{path.lstat().st_mode:o}"
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path)] = f"{mode} {content}"
    return found


def private_mounts(script: str, *arguments: str | Path) -> Ran:
    """Run a shell script in a mount namespace of its own; skips where the kernel or the user forbids it."""
    probe = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=4k tmpfs /mnt"], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"no private mounts here: {probe.stderr.strip()}")
    return subprocess.run(
        ["unshare", "--mount", "sh", "-euc", script, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
