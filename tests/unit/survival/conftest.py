"""A run directory with one attempt, under a path with a space."""

from __future__ import annotations

from pathlib import Path

import pytest

from afina.run.directory import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    folder = tmp_path / "r un"
    (folder / "attempts/1.0").mkdir(parents=True)
    return RunDir(folder)
