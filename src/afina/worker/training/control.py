"""Step control: when to log, evaluate, save and stop, in place of Trainer's own flow.

At the end of each step the ranks agree, by one all-reduce of three numbers, whether to stop, whether to save because the last
checkpoint is old, and whether the loss of any of them is not finite.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from afina.errors import ClaimedError, TrainingError
from afina.files import append_line
from afina.worker.compute import ranks
from afina.worker.data.splits.folds import open_rows
from afina.worker.survival.stop import CAUSES
from afina.worker.training.attempt import Attempt
from afina.worker.training.log import say

__all__ = ["StepControl", "truncate"]


class StepControl(TrainerCallback):  # type: ignore[misc]
    """Decides when to log, evaluate, save and stop. Replaces Trainer's DefaultFlowCallback."""

    def __init__(
        self,
        attempt: Attempt,
        resume: Callable[[Path], None],
        loss: Callable[[], torch.Tensor],
        count_loss: Callable[[int], None],
    ) -> None:
        """Args:
        resume: restores from a checkpoint what Trainer does not.
        loss: the sum of this rank's losses since the last log line.
        count_loss: counts the loss of the step that has just ended.
        """
        self.attempt, self.resume, self.loss, self.count_loss = attempt, resume, loss, count_loss
        self.train = attempt.plan.recipe.train
        self.first_step = 1
        self.learning_rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        attempt, done = self.attempt, state.global_step
        self.first_step = done + 1
        if attempt.rank == 0:
            attempt.event("training", step=done, max_steps=state.max_steps)
        if done:
            self.resume(attempt.run.checkpoints / f"step-{done}")
        elif attempt.rank:
            # Trainer gives every rank the same seed, and so the same dropout masks on different rows.
            torch.manual_seed(args.seed + attempt.rank)
        elif attempt.run.metrics_file.exists():
            truncate(attempt.run.metrics_file, 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.attempt.times.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.learning_rate = float(named["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        attempt, step, train = self.attempt, state.global_step, self.train
        attempt.times.end()
        attempt.watchdog.beat(f"step {step}")
        if args.device.type == "cpu":
            attempt.meter.enter("other")
        if attempt.rank == 0:
            self._on_rank_zero(step)
        cause, save_due, broken = ranks.maximum(
            attempt.device,
            attempt.stop_cause(),
            int(attempt.rank == 0 and self._checkpoint_is_old()),
            int(not torch.isfinite(self.loss())),
        )
        attempt.meter.enter("other")  # on a GPU only now: `isfinite` has waited for the step
        if broken:
            raise _broken_loss(attempt, step, self.learning_rate)
        self.count_loss(step)
        last = step >= state.max_steps
        control.should_log = step % train.log_every == 0 or last or (step == 1 and args.logging_first_step)
        if cause and not last:
            attempt.stop.agreed = CAUSES[cause]
            control.should_save = control.should_training_stop = True
            return
        schedule = replace(attempt.schedule, total_steps=state.max_steps)  # a rehearsal ends early
        control.should_evaluate = schedule.evaluates_at(step)
        control.should_save = bool(save_due) or schedule.saves_at(step)
        control.should_training_stop = last

    def _on_rank_zero(self, step: int) -> None:
        attempt = self.attempt
        attempt.meter.count_step(*attempt.work(step))
        attempt.saver.check()
        if attempt.lease.lost:
            raise ClaimedError(
                f"{attempt.run.path}: another attempt has taken over this run, because this one did not renew its lease in time",
                "nothing to do: the other attempt continues the run",
                cause="claimed",
            )
        if step == self.first_step:
            attempt.event("first_step", step=step)

    def _checkpoint_is_old(self) -> bool:
        minutes = self.train.save_minutes
        return minutes is not None and time.monotonic() - self.attempt.saver.began > minutes * 60

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = dict(logs or {})
        state.log_history.clear()  # it would grow in memory and in every checkpoint; the metrics log has it all
        if "train_runtime" in logs or self.attempt.rank:
            return
        kept = {k: v for k, v in logs.items() if not k.endswith(("_runtime", "_per_second", "_preparation_time"))}
        kept.pop("epoch", None)
        log = self.attempt.run.metrics_file
        if torn := append_line(log, json.dumps({"step": state.global_step, "epoch": round(state.epoch, 6), **kept})):
            say(f"WARNING: {log}: its last line was torn ({torn} bytes), and has been removed")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The end of the step has decided everything.
        control.should_log = control.should_evaluate = control.should_save = False


def truncate(path: Path, size: int) -> None:
    """Keep the first `size` bytes: a resumed run writes the rest again."""
    kept = path.read_bytes()[:size] if path.exists() else b""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(kept)
    os.replace(aside, path)


def _broken_loss(attempt: Attempt, step: int, learning_rate: float) -> TrainingError:
    """Names the step, the rows of its batch as the data files number them, and the learning rate."""
    table = open_rows(attempt.data.folder, "train", attempt.data.rows)
    columns = [name for name in ("file", "row", "id") if name in table.column_names]
    records = table.select(columns).take([int(row) for row in attempt.work.rows(step)]).to_pylist()
    rows = "; ".join(" ".join(f"{k} {v}" for k, v in record.items()) for record in records)
    return TrainingError(
        f"the loss is not finite at step {step} (learning rate {learning_rate:.3g}); rows of that step: {rows}",
        "lower train.learning_rate or check those rows, and start another run: this one would meet them again",
        cause="loss",
    )
