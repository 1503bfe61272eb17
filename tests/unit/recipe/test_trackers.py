"""Trackers: what a recipe may name, what is refused and when, and that a killed and resumed run is recorded once and whole."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import tiny
from tests.processes import wait_until
from tests.unit.conftest import Ran, tree
from tests.unit.forks import run_here
from tests.unit.training.in_process import train_here

from afina.errors import RecipeError
from afina.recipe import trackers
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir
from afina.run.plan import make_plan
from afina.site.settings import Site

KEY = "0123456789abcdef0123456789abcdef01234567"


def test_one_or_several_are_named_and_do_not_change_what_is_trained(
    recipe: Callable[..., Recipe], site: Site, recipe_file: Callable[..., Path]
) -> None:
    plain = make_plan(recipe(), site, recipe_file=recipe_file())
    several = (["mlflow", "wandb", "mlflow"], ("mlflow", "wandb"))
    for given, read in [("wandb", ("wandb",)), several, (None, ()), ([], ())]:
        loaded = recipe(trackers=given)
        assert loaded.trackers == read
        assert make_plan(loaded, site, recipe_file=recipe_file()).digest == plain.digest


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mlflow", "wandbb"], "`wandbb` is not a tracker; did you mean `wandb`? known: tensorboard, wandb, mlflow"),
        ([{"wandb": 1}], "trackers.0"),
        (7, "must be text, or a list of texts"),
        ("hf_" + "a" * 34, "holds a token or a password"),
    ],
)
def test_not_a_tracker(recipe: Callable[..., Recipe], given: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(trackers=given)
    assert message in str(caught.value)


def test_a_missing_package_is_refused_before_anything_is_made(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], model_folder: Path, scratch: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed here")
    path = recipe_file(model=str(model_folder), trackers=["mlflow"])
    before = tree(scratch)
    done = command("train", path, "--run", tmp_path / "run")
    assert done.returncode == 3 and "trackers: mlflow needs the package mlflow" in done.stderr, done
    assert f"remedy: {shlex.quote(sys.executable)} -m pip install mlflow; or leave mlflow out" in done.stderr
    assert not (tmp_path / "run").exists()
    left = set(tree(scratch)) - set(before)
    assert not [path for path in left if Path(path).is_file()], left


def test_the_environment_is_offline_and_inside_the_run(tmp_path: Path) -> None:
    run = tmp_path / "it's a run"
    env = trackers.tracker_environment(run, "stars", "abc", {})
    assert env["WANDB_MODE"] == "offline" and env["WANDB_PROJECT"] == "stars"
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TENSORBOARD_LOGGING_DIR"):
        assert Path(env[name]).is_relative_to(run), name
    assert env["MLFLOW_TRACKING_URI"] == f"sqlite:///{run}/tracking/mlflow.db"
    mine = {"WANDB_MODE": "online", "WANDB_PROJECT": "mine", "WANDB_DIR": "/elsewhere", "WANDB_API_KEY": KEY}
    env = trackers.tracker_environment(run, "stars", "abc", mine)
    assert "WANDB_MODE" not in env and "WANDB_PROJECT" not in env, "what the user has set stays"
    assert Path(env["WANDB_DIR"]).is_relative_to(run) and KEY not in str(env)


def test_commands_name_only_what_is_there_and_quote_it(tmp_path: Path) -> None:
    run = tmp_path / "it's a run"
    assert trackers.sync_commands(run, trackers.TRACKERS) == []
    for name in ("tensorboard", "wandb"):
        (run / "tracking" / name).mkdir(parents=True)
    (run / "tracking/wandb/offline-run-1").mkdir()
    tensorboard, wandb = trackers.sync_commands(run, trackers.TRACKERS)
    script = f"printf '%s\\n' {tensorboard}; printf '%s\\n' {wandb}"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.splitlines()
    assert shown[:3] == ["tensorboard", "--logdir", str(run / "tracking/tensorboard")]
    assert shown[3:] == ["wandb", "sync", str(run / "tracking/wandb/offline-run-1")]
    assert len(trackers.sync_commands(run, ["wandb"])) == 1


# -- the worker's side -------------------------------------------------------------------------------------------------


class Recorder:
    """In place of a library's callback: what it received."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        pass

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if logs.get("loss") == 13:
            raise RuntimeError("the service died\nat length")
        self.logged.append((state.global_step, logs))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run/tracking").mkdir(parents=True)
    run = RunDir(tmp_path / "run")
    losses = [{"step": step, "loss": loss} for step, loss in ((1, 0.9), (2, 0.8), (3, 0.6))]
    lines = [*losses[:2], {"step": 2, "eval_loss": 0.7, "eval_x": [1]}, losses[2]]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_an_attempt_records_what_was_logged_up_to_its_checkpoint(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb without a server: the files of the attempt before are set aside, and nothing is missing or twice."""
    from afina.worker.training.tracking import Tracked, _set_aside

    inner = Recorder()
    monkeypatch.setattr(Tracked, "_make", lambda self: inner)
    tracked = Tracked("wandb", run, resumed_step=2)
    state = SimpleNamespace(global_step=2, epoch=0.5)
    tracked.on_train_begin(None, state, None)
    state.global_step = 3
    tracked.on_log(None, state, None, {"loss": 0.61, "names": ["a"]})
    names = [(step, *logs) for step, logs in inner.logged]
    assert names == [(1, "loss"), (2, "loss"), (2, "eval_loss"), (3, "loss")]
    old, uploaded = (run.path / "tracking/wandb" / name for name in ("offline-run-1-x", "offline-run-2-x"))
    old.mkdir(parents=True)
    assert not _set_aside(old.parent) and [p.name for p in old.parent.iterdir()] == ["replaced-offline-run-1-x"]
    uploaded.mkdir()
    (uploaded / "run-x.wandb.synced").touch()
    assert _set_aside(old.parent) and uploaded.is_dir()


def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from afina.worker.training.tracking import Tracked

    inner = Recorder()
    monkeypatch.setattr(Tracked, "_make", lambda self: inner)
    tracked = Tracked("tensorboard", run, resumed_step=0)
    state = SimpleNamespace(global_step=1)
    tracked.on_train_begin(None, state, None)
    for loss in (12, 13, 14):
        tracked.on_log(None, state, None, {"loss": loss})
    tracked.on_train_end(None, state, None)
    assert [logs["loss"] for _, logs in inner.logged] == [12]
    warning = "afina: WARNING: tensorboard is switched off: RuntimeError: the service died\n"
    assert capfd.readouterr() == ("", warning)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_and_resumed_run_is_on_tensorboard_once(tmp_path: Path) -> None:
    """The real library: killed some steps after a checkpoint, so that they are made twice."""
    pytest.importorskip("tensorboard", reason="the extra `trackers` is not installed")
    file = tiny.write_project(tmp_path, train={"epochs": 8, "save_every": 20}, trackers=["tensorboard"])
    run = tmp_path / "it's a run"
    env = {"AFINA_SCRATCH": str(tmp_path / "scratch"), "WANDB_API_KEY": KEY}
    log = run / "metrics.jsonl"
    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(train_here, file, run, env=env, code=-signal.SIGKILL)
        wait_until(lambda: killed.done() or (log.exists() and len(log.read_text().splitlines()) > 25), 120)
        os.kill(json.loads((run / "lease.json").read_text())["pid"], signal.SIGKILL)
        killed.result()
    done = run_here("resume", run, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    command = trackers.sync_commands(run, ["tensorboard"])[0]
    assert f"afina: tensorboard: {command}" in done.stdout
    status = run_here("status", run, env=env)
    assert f"  records: {command}\n" in status.stdout, status.stdout + status.stderr

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    folder = run / "tracking/tensorboard"
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    shown.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key, tag in (("loss", "train/loss"), ("eval_accuracy", "eval/accuracy")):
        recorded = {event.step: event.value for event in shown.Scalars(tag)}
        logged = {line["step"]: line[key] for line in lines if key in line}
        assert len(shown.Scalars(tag)) == len(logged) and recorded == pytest.approx(logged), tag
    raw = [
        event.step
        for file in sorted(folder.iterdir())
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    ]
    assert max(Counter(raw).values()) == 2, "no step was made twice: the kill came too early to prove anything"
    assert not [p for p in run.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
