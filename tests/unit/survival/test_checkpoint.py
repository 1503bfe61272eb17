"""Checkpoints: what counts as one, what is set aside, and what is used instead."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afina.errors import EnvironmentProblem
from afina.worker.survival import checkpoint as checkpoints

NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "ranks.pt", "progress.json")


def _make(folder: Path, step: int) -> Path:
    staging = checkpoints.stage(folder, step)
    for name in NAMES:
        (staging / name).write_bytes(os.urandom(300))
    (staging / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoints.commit(staging, step, {"plan": "p" * 64, "world_size": 1})


@pytest.fixture
def two(tmp_path: Path) -> Path:
    folder = tmp_path / "check points"
    for step in (20, 30):
        _make(folder, step)
    return folder


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _flip(path: Path, where: bytes, bit: int = 2) -> None:
    raw = bytearray(path.read_bytes())
    raw[raw.index(where) + len(where)] ^= bit
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the step": lambda at: _flip(at / "manifest.json", b'"step": ', 4),
    "a flipped bit in the plan": lambda at: _flip(at / "manifest.json", b'"plan": "'),
    "a flipped bit in a digest": lambda at: _flip(at / "manifest.json", b'"sha256": "'),
    "a flipped bit in the format": lambda at: _flip(at / "manifest.json", b'"format": ', 1),
    "no files": lambda at: (at / "manifest.json").write_text('{"files": {}}'),
    "null": lambda at: (at / "manifest.json").write_text("null"),
    "a list": lambda at: (at / "manifest.json").write_text("[1]"),
    "nothing": lambda at: (at / "manifest.json").write_text(""),
    "bytes": lambda at: (at / "manifest.json").write_bytes(b"\xff\xfe{"),
    "unsealed, without files": lambda at: (at / "manifest.json").write_text('{"format": 1, "step": 30, "files": {}}'),
    "files of another kind": lambda at: _edit(at / "manifest.json", lambda m: m.update(format=1, files={"a": 3})),
    "another step, unsealed": lambda at: _edit(at / "manifest.json", lambda m: m.update(format=1, step=70)),
    "no manifest": lambda at: (at / "manifest.json").unlink(),
    "a truncated file": lambda at: os.truncate(at / "optimizer.pt", 100),
    "an empty file": lambda at: os.truncate(at / "model.safetensors", 0),
    "a missing file": lambda at: (at / "ranks.pt").unlink(),
    "a flipped bit in a file": lambda at: (at / "ranks.pt").write_bytes(bytes(300)),
    "a folder of another step": lambda at: (shutil.rmtree(at), shutil.copytree(at.with_name("step-20"), at)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_is_used(two: Path, kind: str) -> None:
    assert checkpoints.newest(two) == (two / "step-30", [])
    DAMAGES[kind](two / "step-30")
    path, notes = checkpoints.newest(two)
    assert path == two / "step-20" and len(notes) == 1
    assert notes[0].startswith("checkpoint step-30 is damaged (") and notes[0].endswith(
        "set aside as step-30.damaged-1"
    )
    assert not (two / "step-30").exists()
    DAMAGES[kind](_make(two, 40).rename(two / "step-40"))
    assert checkpoints.newest(two)[0] == two / "step-20", "a damage in another step counts as much"


def test_a_trainer_state_of_another_step_is_damage(tmp_path: Path) -> None:
    staging = checkpoints.stage(tmp_path, 30)
    for name in NAMES:
        (staging / name).write_bytes(b"x")
    (staging / "trainer_state.json").write_text('{"global_step": 20}')
    assert checkpoints.damage(checkpoints.commit(staging, 30, {})) == "trainer_state.json is of step 20"


def test_a_renamed_folder_does_not_move_the_run_ahead(two: Path) -> None:
    (two / "step-30").rename(two / "step-70")
    path, notes = checkpoints.newest(two)
    assert path == two / "step-20" and "step-70 is damaged (manifest is of step 30)" in notes[0]


def test_without_a_usable_checkpoint_the_run_ends(two: Path) -> None:
    for step in (20, 30):
        os.truncate(two / f"step-{step}/optimizer.pt", 1)
    with pytest.raises(EnvironmentProblem, match="no checkpoint is usable"):
        checkpoints.newest(two)


def test_checkpoints_without_a_seal_are_those_of_older_versions(two: Path) -> None:
    _edit(two / "step-30/manifest.json", lambda m: (m.update(format=1), m.pop("sealed")))
    assert checkpoints.newest(two) == (two / "step-30", [])
