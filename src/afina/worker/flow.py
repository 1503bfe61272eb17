"""When to log, evaluate, save and stop, and what is seen of it: the callbacks of `worker.trainer`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from afina.errors import TrainingError

if TYPE_CHECKING:
    from afina.worker.trainer import RunTrainer

__all__ = ["Flow", "Progress", "evaluates_at", "steps_per_epoch", "truncate_lines"]


class Flow(TrainerCallback):  # type: ignore[misc]
    """When to log, evaluate, save and stop. Stands in for Trainer's DefaultFlowCallback."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer
        self.train = trainer.plan.recipe.train

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if trainer.rank == 0:
            trainer.run.event("training", attempt=trainer.attempt, step=state.global_step, max_steps=state.max_steps)
        if state.global_step:
            trainer.resumed_from(trainer.run.checkpoints / f"step-{state.global_step}")
        elif trainer.rank:
            # Trainer gives every rank the same seed, and so the same dropout masks on different rows.
            torch.manual_seed(args.seed + trainer.rank)
        elif trainer.run.metrics_file.exists():
            truncate_lines(trainer.run.metrics_file, 0)
        trainer.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        trainer.clock.examples += _examples_of(trainer, step)
        if trainer.rank == 0 and step == trainer._initial_global_step + 1:
            trainer.run.event("first_step", attempt=trainer.attempt, step=step)
        last = step >= state.max_steps
        control.should_log = step % self.train.log_every == 0 or last
        if self._asked_to_stop() and not last:
            trainer.stopped = True
            control.should_save = control.should_training_stop = True
            trainer.clock.stop()
            return
        by_epoch = step % steps_per_epoch(trainer) == 0
        control.should_evaluate = evaluates_at(trainer, step)
        control.should_save = last or (
            by_epoch if self.train.save_every == "epoch" else step % self.train.save_every == 0
        )
        control.should_training_stop = last
        if control.should_evaluate or control.should_save:
            trainer.clock.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = dict(logs or {})
        if "train_runtime" in logs:
            return
        if "loss" in logs and not np.isfinite(logs["loss"]):
            raise TrainingError(
                f"the loss is {logs['loss']} at step {state.global_step} (learning rate {logs.get('learning_rate')})",
                "lower train.learning_rate, or look at the rows of that step; the newest checkpoint is from before",
            )
        if self.trainer.rank == 0:
            kept = {k: v for k, v in logs.items() if not k.endswith(("_runtime", "_per_second", "_preparation_time"))}
            kept.pop("epoch", None)
            with self.trainer.run.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "epoch": round(state.epoch, 6), **kept}) + "\n")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.clock._since is None:
            self.trainer.clock.start()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # All was decided at the end of the step.
        control.should_log = control.should_evaluate = control.should_save = False

    def _asked_to_stop(self) -> bool:
        trainer = self.trainer
        asked = trainer.stop_request(look=trainer.rank == 0)
        if trainer.geometry.num_processes == 1:
            return bool(asked)
        flag = torch.tensor([int(asked)], device=trainer.args.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar where there is a terminal, else one line a minute (and at the first step)."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.spoken = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)
        elif time.monotonic() - self.spoken > 60:
            self.spoken = time.monotonic()
            print(f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}")
        if "eval_loss" in logs:
            shown = {
                k: v
                for k, v in logs.items()
                if k.startswith("eval_") and isinstance(v, float) and not k.endswith(("_runtime", "_per_second"))
            }
            line = f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}  " + "  ".join(
                f"{k} {v:.4f}" for k, v in shown.items()
            )
            self.bar.write(line) if self.bar is not None else print(line, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def steps_per_epoch(trainer: RunTrainer) -> int:
    return -(-len(trainer.splits["train"]) // trainer.geometry.global_batch)


def _examples_of(trainer: RunTrainer, step: int) -> int:
    """Examples of the step that ended: the global batch, or what was left of the epoch."""
    left = len(trainer.splits["train"]) % trainer.geometry.global_batch
    return left if left and step % steps_per_epoch(trainer) == 0 else trainer.geometry.global_batch


def truncate_lines(path: Path, lines: int) -> None:
    """Keep the first `lines` lines: what a resumed run will write again is taken away."""
    kept = path.read_bytes().splitlines(keepends=True)[:lines] if path.exists() else []
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(b"".join(kept))
    os.replace(aside, path)


def evaluates_at(trainer: RunTrainer, step: int) -> bool:
    """Whether an evaluation belongs to `step`: the end of an epoch, of an interval, or of the run."""
    every = trainer.plan.recipe.train.evaluate
    if trainer.eval_dataset is None:
        return False
    last = step >= trainer.state.max_steps
    return last or (step % steps_per_epoch(trainer) == 0 if every == "epoch" else step % every == 0)
