"""When to log, evaluate, save and stop: the callback that stands in for Trainer's own flow.

At the end of each step the ranks agree, by one all-reduce of three numbers, whether to stop, whether to save because the last
checkpoint is old, and whether the loss of any of them is not finite.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from afina.errors import ClaimedError, TrainingError
from afina.worker.compute.batches import epoch_steps
from afina.worker.survival.stop import CAUSES, lead

if TYPE_CHECKING:
    from afina.worker.training.trainer import RunTrainer

__all__ = ["Flow", "agree", "stop_cause", "truncate"]


class Flow(TrainerCallback):  # type: ignore[misc]
    """When to log, evaluate, save and stop. Stands in for Trainer's DefaultFlowCallback."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer
        self.train = trainer.plan.recipe.train
        self.learning_rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        trainer.began_at = state.global_step
        if trainer.rank == 0:
            trainer.run.event("training", attempt=trainer.attempt, step=state.global_step, max_steps=state.max_steps)
        if state.global_step:
            trainer.resumed_from(trainer.run.checkpoints / f"step-{state.global_step}")
        elif trainer.rank:
            # Trainer gives every rank the same seed, and so the same dropout masks on different rows.
            torch.manual_seed(args.seed + trainer.rank)
        elif trainer.run.metrics_file.exists():
            truncate(trainer.run.metrics_file, 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.times.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.learning_rate = float(self.trainer._get_learning_rate())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        trainer.times.end()
        trainer.watchdog.beat(f"step {step}")
        if args.device.type == "cpu":
            trainer.meter.enter("other")
        if trainer.rank == 0:
            trainer.meter.did(*trainer.work(step))
            trainer.saver.check()
            if trainer.lease.lost:
                raise ClaimedError(
                    f"{trainer.run.path}: another attempt has taken over this run; this one was silent for too long",
                    "nothing to do: look at the other attempt",
                    cause="claimed",
                )
            if step == trainer.began_at + 1:
                trainer.run.event("first_step", attempt=trainer.attempt, step=step)
        cause, save_due, broken = agree(
            trainer,
            stop_cause(trainer),
            int(trainer.rank == 0 and _is_old(trainer, self.train.save_minutes)),
            int(not torch.isfinite(trainer._tr_loss)),
        )
        trainer.meter.enter("other")  # on a GPU only now: the question about the loss has waited for it
        if broken:
            raise _broken_loss(trainer, step, self.learning_rate)
        last = step >= state.max_steps
        control.should_log = step % self.train.log_every == 0 or last
        if cause and not last:
            trainer.stopped = CAUSES[cause]
            control.should_save = control.should_training_stop = True
            return
        control.should_evaluate = trainer.schedule.evaluates_at(step)
        control.should_save = bool(save_due) or trainer.schedule.saves_at(step)
        control.should_training_stop = last

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = dict(logs or {})
        state.log_history.clear()  # it would grow in memory and in every checkpoint; the metrics log has it all
        if "train_runtime" in logs or self.trainer.rank:
            return
        kept = {k: v for k, v in logs.items() if not k.endswith(("_runtime", "_per_second", "_preparation_time"))}
        kept.pop("epoch", None)
        line = json.dumps({"step": state.global_step, "epoch": round(state.epoch, 6), **kept}) + "\n"
        with self.trainer.run.metrics_file.open("ab", buffering=0) as file:
            file.write(line.encode())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # All was decided at the end of the step.
        control.should_log = control.should_evaluate = control.should_save = False


def stop_cause(trainer: RunTrainer) -> int:
    """What this rank knows of a stop, as an index into `CAUSES`."""
    if trainer.rank:
        return trainer.stop_request(look=False)
    return trainer.stop_request(look=True, lead_s=lead(trainer.times, trainer.saver.seconds, trainer.state_bytes))


def agree(trainer: RunTrainer, *mine: int) -> list[int]:
    """The maximum over all ranks, of each number."""
    if trainer.geometry.num_processes == 1:
        return list(mine)
    numbers = torch.tensor(mine, device=trainer.args.device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return [int(n) for n in numbers.tolist()]


def _is_old(trainer: RunTrainer, minutes: float | None) -> bool:
    return minutes is not None and time.monotonic() - trainer.saver.began > minutes * 60


def _broken_loss(trainer: RunTrainer, step: int, learning_rate: float) -> TrainingError:
    """Names the step, the rows of its batch as the data files number them, and the learning rate."""
    epoch, number = trainer.schedule.position(step)
    split, recipe = trainer.splits["train"], trainer.plan.recipe
    steps = epoch_steps(
        split.lengths,
        trainer.geometry.global_batch,
        recipe.train.seed,
        epoch,
        trainer.batching,
    )
    rows = steps[number]
    return TrainingError(
        f"the loss is not finite at step {step} (learning rate {learning_rate:.3g}); rows of that step: {_named(trainer, rows)}",
        "lower train.learning_rate, or look at those rows; the newest checkpoint is from before",
        cause="loss",
    )


def _named(trainer: RunTrainer, rows: np.ndarray[Any, Any]) -> str:
    import pyarrow.parquet as pq

    table = pq.read_table(Path(trainer.run.prepared()["prepared"]) / "train.rows.parquet")
    columns = [name for name in ("file", "row", "id") if name in table.column_names]
    chosen = table.select(columns).take([int(row) for row in rows]).to_pylist()
    return "; ".join(" ".join(f"{k} {v}" for k, v in row.items()) for row in chosen)


def truncate(path: Path, size: int) -> None:
    """Keep the first `size` bytes: what a resumed run will write again is taken away."""
    kept = path.read_bytes()[:size] if path.exists() else b""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(kept)
    os.replace(aside, path)
