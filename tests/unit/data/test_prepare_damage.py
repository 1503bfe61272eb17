"""The prepare stage killed, interrupted and run twice at once; its data purged, altered and read-only."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_reviews, write_csv
from tests.unit.conftest import private_mounts, tree
from tests.unit.data.stage import finished, leftovers, prepare_here, refused, result, start
from tests.unit.model_hub.test_prepare_hub import flip

from afina.errors import SiteError
from afina.processes import advisory_lock
from afina.run.plan import Plan
from afina.worker.data import prepared as store
from afina.worker.model.model_files import verify_model

#: Read before the test environment forgets them.
KILLS = int(os.environ.get("AFINA_TEST_KILLS", "8"))
SEED = int(os.environ.get("AFINA_TEST_SEED", str(random.SystemRandom().randrange(1 << 30))))


@pytest.fixture
def plan(plan: Callable[..., Plan], models: Callable[..., Path], tmp_path: Path) -> Plan:
    """Over a model folder that the test may damage."""
    folder = shutil.copytree(models(), tmp_path / "a model of my own")
    return plan(folder, {"files": {"all": str(write_csv(tmp_path / "reviews.csv", tiny_reviews(3000)))}})


# -- twice at once, and killed ----------------------------------------------------------------------------------------


def test_a_second_process_waits_and_finds_the_data(plan: Plan) -> None:
    first = prepare_here(plan)
    folder = Path(first["prepared"])
    away = folder.rename(folder.with_name("away"))
    with advisory_lock(folder.with_name(f".turn-{first['digest'][:16]}"), "preparing tiny", print):
        second = start(plan)
        assert second.stderr is not None
        message = second.stderr.readline()
        assert f"waiting: process {os.getpid()} on {os.uname().nodename} has been preparing tiny since 20" in message
        away.rename(folder)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and "waiting" not in err
    assert json.loads(out.splitlines()[-1]) == {**first, "reused": True}
    assert leftovers(plan) == [folder.name]


#: Paths that appear beside and below prepared/ while it works, in this order.
STAGES = (
    ".turn-*", "../cache/prepare/*", "../cache/prepare/*/0-00002.npz", ".staging-*", ".staging-*/train.tokens.npy",
    ".staging-*/train.rows.parquet", ".staging-*/eval.tokens.npy", ".staging-*/tokenizer",
    ".staging-*/manifest.json", "[0-9a-f]*",
)  # fmt: skip


def test_killed_at_any_instant(plan: Plan) -> None:
    print(f"AFINA_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    began = time.monotonic()
    final = Path(result(finished(start(plan)))["prepared"])
    usual = time.monotonic() - began
    shutil.rmtree(final)
    late = 0
    for number in range(KILLS):
        process = start(plan)
        stage = STAGES[number % len(STAGES)] if chance.random() < 0.8 else None
        instant = time.monotonic() + (chance.uniform(0, usual) if stage is None else usual * 20)
        while (
            process.poll() is None
            and time.monotonic() < instant
            and not (stage and next(plan.site.prepared.glob(stage), None))
        ):
            time.sleep(0.001)
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.02))))
        process.send_signal(chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
        process.communicate(timeout=60)
        if final.exists():
            store.verify(final)
            late += 1
            shutil.rmtree(final)
    ran = finished(start(plan))
    assert result(ran)["prepared"] == str(final) and "waiting" not in ran.stderr
    store.verify(final)
    assert leftovers(plan) == [final.name], f"after {KILLS} kills, {late} of them too late"
    assert list(plan.site.cache.glob("prepare/*")) == []


# -- purged, altered ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.tokens.npy", "eval.rows.parquet", "tokenizer/tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("how", ["purged", "altered"])
def test_damaged_data_is_made_again(plan: Plan, name: str, how: str) -> None:
    folder = Path(prepare_here(plan)["prepared"])
    reader = store.open_split(folder, "train")
    tokens = reader.tokens[:100].tolist()
    path = folder / name
    if how == "purged":
        path.unlink()
        content = b""
    else:
        content = flip(path)
    with pytest.raises(SiteError) as error:
        store.verify(folder)
    assert str(path) in error.value.message and "afina prefetch RECIPE" in error.value.remedy
    messages: list[str] = []
    assert prepare_here(plan, messages)["reused"] is False and str(path) in messages[0]
    store.verify(folder)
    assert not content or path.read_bytes() == content
    # Files that a job has open keep their content.
    if name != "train.tokens.npy":
        assert reader.tokens[:100].tolist() == tokens
    assert prepare_here(plan)["reused"] is True


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_model_folder_is_named_at_the_start(plan: Plan, name: str) -> None:
    prepared = prepare_here(plan)
    folder = Path(prepared["model_folder"])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(prepared["model_files"])
    verify_model(prepared)
    content = flip(folder / name)
    verify_model(prepared, digests=False)
    with pytest.raises(SiteError) as error:
        verify_model(prepared)
    assert error.value.message == f"model {folder / name}: its content differs from what was written"
    assert "afina prefetch RECIPE" in error.value.remedy
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(SiteError, match=f"has {len(content) - 1} bytes, {len(content)} were written"):
        verify_model(prepared, digests=False)
    (folder / name).unlink()
    with pytest.raises(SiteError, match="is missing"):
        verify_model(prepared, digests=False)
    (folder / name).write_bytes(content)
    verify_model(prepared)
    (folder / "README.md").write_text("may change")
    verify_model(prepared)


def test_a_run_from_before_models_were_recorded(plan: Plan) -> None:
    verify_model({"model_folder": str(plan.model_folder)})


# -- read-only ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def closed(*folders: Path) -> Iterator[None]:
    """Only root can write there."""
    changed = [path for folder in folders for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    modes = {path: path.stat().st_mode for path in changed}
    try:
        for path in changed:
            path.chmod(modes[path] & ~0o222)
        yield
    finally:
        for path in changed:
            path.chmod(modes[path])


def test_existing_data_is_found_on_read_only_storage(plan: Plan, tmp_path: Path) -> None:
    first = prepare_here(plan)
    home = tmp_path / "caches of the site"
    home.mkdir()
    plan.site.cache.mkdir(exist_ok=True)
    folders = [plan.site.prepared, plan.site.cache, plan.site.scratch / "pins", home, Path(first["model_folder"])]
    before = tree(*folders)
    script = 'for f in "$3" "$4" "$5" "$6" "$7"; do mount --bind "$f" "$f"; mount -o remount,bind,ro "$f"; done\n'
    script += 'if touch "$3/x" 2>/dev/null; then exit 9; fi\nHF_HOME="$6" exec "$1" -m afina.worker prepare < "$2"'
    (tmp_path / "plan.json").write_text(plan.to_json())
    ran = private_mounts(script, sys.executable, tmp_path / "plan.json", *folders)
    assert result(ran) == {**first, "reused": True}, ran.stderr
    # A check without a record is made, and not recorded.
    for record in (plan.site.scratch / "pins").iterdir():
        record.unlink()
    before = {path: about for path, about in before.items() if "/pins" not in path}
    ran = private_mounts(script, sys.executable, tmp_path / "plan.json", *folders)
    assert result(ran) == {**first, "reused": True}, ran.stderr
    after = {path: about for path, about in tree(*folders).items() if "/pins" not in path}
    assert after == before


def test_missing_data_on_read_only_storage_is_one_message(plan: Plan, tmp_path: Path) -> None:
    plan.site.prepared.mkdir()
    (tmp_path / "plan.json").write_text(plan.to_json())
    script = 'mount --bind "$3" "$3"; mount -o remount,bind,ro "$3"; exec "$1" -m afina.worker prepare < "$2"'
    ran = private_mounts(script, sys.executable, tmp_path / "plan.json", plan.site.prepared)
    assert "Read-only file system" in refused(ran, 3) and str(plan.site.prepared) in ran.stderr


def test_read_only_modes_are_enough(plan: Plan) -> None:
    """By modes alone; root must drop the capability to override them."""
    first = prepare_here(plan)
    folders = [plan.site.prepared, plan.site.scratch / "pins"]
    humble = (
        ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    )
    with closed(*folders):
        tried = subprocess.run([*humble, "touch", str(folders[0] / "x")], capture_output=True, text=True)
        if tried.returncode == 0 or "Permission denied" not in tried.stderr:
            pytest.skip(f"modes do not bind here: {tried.stderr}")
        before = tree(*folders)
        ran = subprocess.run(
            [*humble, sys.executable, "-m", "afina.worker", "prepare"],
            input=plan.to_json(),
            env={**os.environ, "HF_HOME": str(plan.site.prepared)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result(ran) == {**first, "reused": True}
        assert tree(*folders) == before


def test_a_waiting_process_is_interrupted_at_once(plan: Plan) -> None:
    digest = prepare_here(plan)["digest"]
    shutil.rmtree(plan.site.prepared / digest)
    held: Callable[..., Any] = advisory_lock
    with held(plan.site.prepared / f".turn-{digest[:16]}", "preparing tiny", print):
        second = start(plan)
        assert second.stderr is not None and "waiting: process" in second.stderr.readline()
        second.send_signal(signal.SIGINT)
        out, err = second.communicate(timeout=60)
        assert (second.returncode, out) == (130, "") and "Traceback" not in err
        assert leftovers(plan) == [f".turn-{digest[:16]}"], "the other process's lock stays"


@pytest.mark.slow
def test_training_writes_into_no_cache(plan: Plan, tmp_path: Path) -> None:
    """Prepared data, pins, model and every cache read-only: a run needs its run directory and nothing else."""
    prepare_here(plan)
    assert plan.model_folder is not None
    home = tmp_path / "caches of the site"
    home.mkdir()
    plan.site.cache.mkdir(exist_ok=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**plan.recipe.model_dump(mode="json"), "train": {"max_steps": 2, "batch_size": 4}}))
    folders = [plan.site.prepared, plan.site.cache, plan.site.scratch / "pins", home, plan.model_folder]
    script = 'for f in "$3" "$4" "$5" "$6" "$7"; do mount --bind "$f" "$f"; mount -o remount,bind,ro "$f"; done\n'
    script += 'HF_HOME="$6" AFINA_SCRATCH="$8" exec "$1" -m afina train "$2" --run "$9" --num-processes 1'
    run = tmp_path / "run"
    before = tree(*folders)
    ran = private_mounts(script, sys.executable, recipe, *folders, plan.site.scratch, run)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "finished"
    assert tree(*folders) == before
    assert json.loads((run / "prepared.json").read_text())["reused"] is True
