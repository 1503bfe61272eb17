"""The records of a run for TensorBoard, Weights & Biases and MLflow: transformers' own callbacks, with two promises added.

A run that goes on from a checkpoint makes steps anew that were recorded before. They must not appear twice: TensorBoard is told
to forget them (its purge step); the other two have no such thing where there is no server, and get each step once.

A tracker that fails (a full disk, a service that died) is left out with a warning: it is not worth a training.

Only scalars are recorded. Only rank 0 records. Not covered: artifacts and models (WANDB_LOG_MODEL, HF_MLFLOW_LOG_ARTIFACTS).
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from afina.plan import Plan
from afina.rundir import RunDir, write_atomic
from afina.trackers import sync_commands, tracker_environment

__all__ = ["Tracked", "track"]


def track(run: RunDir, plan: Plan, resumed_step: int) -> list[TrainerCallback]:
    """The callbacks of the recipe's trackers, for rank 0.

    Args:
        resumed_step: the step of the checkpoint that this attempt goes on from, 0 for a new run.
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
    return [Tracked(name, folder, resumed_step) for name in names]


class Tracked(TrainerCallback):  # type: ignore[misc]
    """One of transformers' callbacks, guarded: each record once, and no error of its own ends the training."""

    def __init__(self, name: str, folder: Path, resumed_step: int) -> None:
        self.name, self.folder, self.resumed_step = name, folder, resumed_step
        self._inner: Any = None
        self._dead = False
        self._steps = _Steps(folder / f"{name}.steps") if name != "tensorboard" else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._call("on_train_begin", args, state, control, **named)
        if self.name == "mlflow" and not self._dead and not (self.folder / "mlflow.id").exists():
            import mlflow

            if active := mlflow.active_run():
                write_atomic(self.folder / "mlflow.id", active.info.run_id + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **named: Any) -> None:
        scalars = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        if scalars and (self._steps is None or self._steps.is_new(scalars, int(state.global_step))):
            self._call("on_log", args, state, control, logs=scalars, **named)

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self._call("on_train_end", args, state, control, **named)
        for command in [] if self._dead else sync_commands(self.folder.parent, [self.name]):
            print(f"afina: {self.name}: {command}", flush=True)

    def _call(self, event: str, *arguments: Any, **named: Any) -> None:
        if self._dead:
            return
        try:
            if self._inner is None:
                self._inner = self._make()
            getattr(self._inner, event)(*arguments, **named)
        except Exception as error:
            # Whatever it is, in a library that is not ours: the training matters more.
            self._dead = True
            print(
                f"afina: WARNING: {self.name} records no more: {type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )

    def _make(self) -> Any:
        from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

        if self.name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # Records of this step itself were written before its checkpoint was made.
            purge = self.resumed_step + 1 if self.resumed_step else None
            return TensorBoardCallback(SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge))
        return WandbCallback() if self.name == "wandb" else MLflowCallback()


class _Steps:
    """The last step that was recorded of each kind of record, in a file of fixed length that is written in place.

    A job that is killed between a record and this note records that step twice; one that is killed while the library still
    holds records in memory loses those.
    """

    _KINDS = ("train", "eval", "end")

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fields = os.pread(self._descriptor, 64, 0).split()
        last = [int(field) for field in fields] if len(fields) == len(self._KINDS) else [-1] * len(self._KINDS)
        self._last = dict(zip(self._KINDS, last, strict=True))

    def is_new(self, record: dict[str, Any], step: int) -> bool:
        kind = "end" if "train_runtime" in record else "eval" if "eval_loss" in record else "train"
        if step <= self._last[kind]:
            return False
        self._last[kind] = step
        os.pwrite(self._descriptor, "".join(f"{self._last[k]:>12}" for k in self._KINDS).encode() + b"\n", 0)
        return True


def _id(path: Path) -> str:
    """An id of its own for the run, kept for its later attempts."""
    if not path.is_file():
        write_atomic(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()
