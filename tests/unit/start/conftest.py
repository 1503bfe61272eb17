"""`afina init` in the process of the test, without a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.common import program

from afina import cli
from afina.recipe.parse import load_recipe

Init = Callable[..., dict[str, Any]]


@pytest.fixture
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """First on PATH, a cluster that does not answer and no module system."""
    folder = tmp_path / "fake bin"
    for name in ("sinfo", "scontrol", "sacctmgr"):
        program(folder, name, "exit 1\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def init(no_cluster: Path, scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Init:
    """Runs `afina init FOLDER … --json` here; returns what it says and the recipe it wrote."""

    def run(folder: Path | str, *arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        cli.main(["init", str(folder), *map(str, arguments), "--scratch", str(scratch), "--json"])
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        answer["recipe"] = load_recipe(Path(folder) / "recipe.yaml")
        answer["text"] = (Path(folder) / "recipe.yaml").read_text()
        monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
        return answer

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("it's a model") / "tiny model")


def reviews(count: int = 150, seed: int = 3) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", **row} for n, row in enumerate(tiny.tiny_reviews(count, seed))]
