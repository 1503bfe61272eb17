"""Model and data copied to the node's own disk: copies, leftovers, and the same run."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest
from tests import tiny
from tests.unit.forks import run_forked

from afina.worker.data import stage_in as module
from afina.worker.data.stage_in import remove, stage, staged


@pytest.fixture
def prepared(tmp_path: Path) -> dict[str, str]:
    """A model whose weights are a link, as in a Hub cache, and prepared data."""
    model, data = tmp_path / "mo del", tmp_path / "da,ta"
    for folder in (model, data, tmp_path / "blobs"):
        folder.mkdir()
    (tmp_path / "blobs/weights").write_bytes(b"w" * 5000)
    (model / "model.safetensors").symlink_to(tmp_path / "blobs/weights")
    (data / "train.arrow").write_bytes(b"rows")
    return {"prepared": str(data), "model_folder": str(model), "other": "stays"}


def test_a_copy_is_made_read_and_removed(prepared: dict[str, str], tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    assert staged(prepared, {}) == prepared
    copied = stage(prepared, local, "7.0")
    (folder,) = local.iterdir()
    assert "staged in" in copied.message and copied.folder == folder
    env = {module.VARIABLE: str(folder)}
    seen = staged(prepared, env)
    assert seen == {"prepared": f"{folder}/prepared", "model_folder": f"{folder}/model", "other": "stays"}
    weights = Path(seen["model_folder"]) / "model.safetensors"
    assert weights.read_bytes() == b"w" * 5000 and not weights.is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o700
    remove(env)
    assert list(local.iterdir()) == []


def test_unlocked_copies_are_removed_and_locked_ones_stay(prepared: dict[str, str], tmp_path: Path) -> None:
    local = tmp_path / "local"
    for name in ("dead", "living"):
        (local / f"afina-stage-{os.getuid()}-{name}").mkdir(parents=True)
        (local / f"afina-stage-{os.getuid()}-{name}/lock").touch()
    (local / "afina-stage-0000-other").mkdir()
    with (local / f"afina-stage-{os.getuid()}-living/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        stage(prepared, local, "7.0")
    left = sorted(path.name.split("-")[3].split(".")[0] for path in local.iterdir())
    assert left == ["7", "living", "other"]


@pytest.mark.parametrize("why", ["full", "missing", "gone"])
def test_a_failed_copy_is_reported_and_leaves_nothing(
    prepared: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    local = tmp_path / "local"
    if why != "missing":
        local.mkdir()
    if why == "full":
        monkeypatch.setattr(module, "_SPARE", 1 << 60)
    if why == "gone":
        (Path(prepared["model_folder"]) / "config.json").symlink_to("/no/such/file")
    copied = stage(prepared, local, "7.0")
    assert copied.message.startswith("not staged: ") and copied.folder is None
    assert why == "missing" or list(local.iterdir()) == []


def test_a_staged_run_is_the_same_run(tmp_path: Path) -> None:
    """As a Slurm job starts it: `afina.worker.node.launcher`, which copies, and becomes the training."""
    (tmp_path / "local").mkdir()
    tiny.write_project(tmp_path, 60, train={"max_steps": 4}, resources={"gpus_per_node": 0})
    env = {**os.environ, "AFINA_SCRATCH": str(tmp_path / "scratch")}
    argv = [sys.executable, "-m", "afina"]
    pointer = tmp_path / "pointer"
    for words in (("train", "recipe.yaml", "--run", "plain"), ("claim", "--pointer", pointer, "recipe.yaml")):
        done = run_forked([*argv, *words], cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
    run = Path(pointer.read_text())
    job = {"AFINA_LAUNCH": "slurm", "SLURM_JOB_ID": "7", "AFINA_ATTEMPT": "7.0", "AFINA_STAGE": str(tmp_path / "local")}
    launch = [sys.executable, "-m", "afina.worker", "launch", str(run)]
    done = run_forked(launch, env={**env, **job})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"staged in {tmp_path / 'local'}" in done.stdout and list((tmp_path / "local").iterdir()) == []
    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json"):
        assert (run / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
