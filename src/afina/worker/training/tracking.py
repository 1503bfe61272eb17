"""Trackers: TensorBoard, Weights & Biases and MLflow through Transformers' callbacks, each step recorded exactly once.

A resumed run repeats steps that were recorded before. TensorBoard discards them by its purge step; for MLflow the store is asked
which steps it has; Weights & Biases offers neither without its server, so each attempt records the whole run from
`metrics.jsonl` again, under one id, and the files of the previous attempt are set aside. Records that a killed job's library
still held in memory are written again too.

A tracker that fails (a full disk, a dead service) is switched off with a warning; the training continues.

Only scalars are recorded, by rank 0 only. Not covered: artifacts and models (WANDB_LOG_MODEL, HF_MLFLOW_LOG_ARTIFACTS).
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from afina.files import write_atomic
from afina.recipe.trackers import sync_commands, tracker_environment
from afina.run.directory import RunDir
from afina.run.plan import Plan

__all__ = ["Tracked", "track"]


def track(run: RunDir, plan: Plan, resumed_step: int) -> list[TrainerCallback]:
    """The callbacks of the recipe's trackers, for rank 0.

    Args:
        resumed_step: the step of the checkpoint that this attempt resumes from, 0 for a new run.
    """
    names = plan.recipe.trackers
    if not names:
        return []
    folder = run.path / "tracking"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ.update(tracker_environment(run.path, plan.recipe.name, _id(folder / "wandb.id"), os.environ))
    mlflow_id = folder / "mlflow.id"
    if mlflow_id.is_file():
        os.environ["MLFLOW_RUN_ID"] = mlflow_id.read_text().strip()
    return [Tracked(name, run, resumed_step) for name in names]


class Tracked(TrainerCallback):  # type: ignore[misc]
    """One of Transformers' callbacks, guarded: it records each step once, and its errors do not end the training."""

    def __init__(self, name: str, run: RunDir, resumed_step: int) -> None:
        self.name, self.run, self.resumed_step = name, run, resumed_step
        self.folder = run.path / "tracking"
        self._inner: Any = None
        self._dead = self._uploaded = False
        self._known: dict[str, set[int]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        with self._guarded():
            self._inner = self._make()
            self._inner.on_train_begin(args, state, control, **named)
            if self.name == "mlflow":
                self._known = _name_and_steps(self.folder, self.run.path.name)
            if self.name != "tensorboard" and not self._uploaded:
                self._catch_up(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **named: Any) -> None:
        scalars = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        kind, step = _kind(scalars), int(state.global_step)
        if scalars and self._inner is not None and step not in self._known.get(kind, ()):
            with self._guarded():
                self._inner.on_log(args, state, control, logs=scalars, **named)

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        with self._guarded():
            if self._inner is not None:
                self._inner.on_train_end(args, state, control, **named)
        for command in [] if self._dead else sync_commands(self.run.path, [self.name]):
            print(f"afina: {self.name}: {command}", flush=True)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Any error of somebody else's library: the training matters more.
            self._dead, self._inner = True, None
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"afina: WARNING: {self.name} is switched off: {reason}", file=sys.stderr, flush=True)

    def _catch_up(self, args: Any, state: Any, control: Any) -> None:
        """Record the lines of earlier attempts up to the checkpoint that the tracker lacks."""
        for record in self.run.lines("metrics.jsonl"):
            if int(record["step"]) <= self.resumed_step:
                then = copy.copy(state)
                then.global_step, then.epoch = int(record["step"]), record.get("epoch")
                self.on_log(args, then, control, {k: v for k, v in record.items() if k != "step"})

    def _make(self) -> Any:
        from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

        if self.name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # The records of this step itself precede its checkpoint.
            purge = self.resumed_step + 1 if self.resumed_step else None
            return TensorBoardCallback(SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge))
        if self.name == "mlflow":
            return MLflowCallback()
        self._uploaded = _set_aside(self.folder / "wandb")
        return WandbCallback()


def _kind(record: dict[str, Any]) -> str:
    return "end" if "train_runtime" in record else "eval_loss" if "eval_loss" in record else "loss"


def _name_and_steps(folder: Path, name: str) -> dict[str, set[int]]:
    """Name the run at MLflow, keep its id for later attempts, and return the steps in its store by kind of record."""
    import mlflow

    run_id = mlflow.active_run().info.run_id
    write_atomic(folder / "mlflow.id", run_id + "\n")
    mlflow.set_tag("mlflow.runName", name)
    client = mlflow.MlflowClient()
    return {key: {metric.step for metric in client.get_metric_history(run_id, key)} for key in ("loss", "eval_loss")}


def _set_aside(folder: Path) -> bool:
    """Rename the offline runs of earlier attempts, whose records this attempt repeats; True: one was uploaded already.

    Then all stay, and this attempt records only new steps; steps that both made are at the server twice.
    """
    old = list(folder.glob("offline-run-*"))
    uploaded = any(list(one.glob("*.wandb.synced")) for one in old)
    for one in [] if uploaded else old:
        one.rename(one.with_name(f"replaced-{one.name}"))
    return uploaded


def _id(path: Path) -> str:
    """The run's id, created once and kept for its later attempts."""
    if not path.is_file():
        write_atomic(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()
