"""ResumableTrainer: `transformers.Trainer` that saves an attempt's state through `survival.snapshot` and resumes from it exactly.

Trainer would wait for the disk at each save, and write neither each process's random state, nor the losses since the last log
line and the last evaluation, nor where the metrics log ended.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer
from transformers.trainer_callback import (
    TrainerControl,
    TrainerState,
)

from afina.errors import EnvironmentProblem
from afina.version import __version__
from afina.worker.compute import dropout, ranks
from afina.worker.model.adapters import checkpoint_weights, has_adapter, load_adapter, save_weights
from afina.worker.survival import checkpoint as checkpoints
from afina.worker.survival import sharded_state
from afina.worker.survival.snapshot import (
    PROGRESS,
    RANKS,
    Snapshot,
    copy_to_host,
    random_state,
    read_progress,
    read_ranks,
    set_random_state,
)
from afina.worker.training.attempt import Attempt
from afina.worker.training.control import truncate
from afina.worker.training.evaluation import EvaluationAbandoned, StoppedEarly
from afina.worker.training.log import say

__all__ = ["ResumableTrainer"]


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are an attempt's: written in the background, in shards where the model is, read by any number of processes."""

    control: TrainerControl

    def __init__(self, attempt: Attempt, **named: Any) -> None:
        self.attempt = attempt
        self._abandoned_evaluation = False
        # Of this rank since the last evaluation: the losses of its steps times their divisors, and those divisors.
        self._summed = self._divided = 0.0
        super().__init__(**named)

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*arguments, **named)
        except EvaluationAbandoned as abandoned:
            self.attempt.stop.agreed, self._abandoned_evaluation = abandoned.cause, True
            self.control.should_training_stop = True
            self._save_checkpoint(None, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy the state; rank 0, or each rank its shards, writes it in the background. Waits for the disk only at a stop."""
        attempt, began, step = self.attempt, time.monotonic(), self.state.global_step
        with attempt.meter.within("saving"):
            due = bool(attempt.stop.agreed) and attempt.schedule.evaluates_at(step)
            if due and not self._abandoned_evaluation:
                # The draw that iterating over the evaluation's DataLoader would have made before this checkpoint.
                torch.empty((), dtype=torch.int64).random_()
            of_ranks = ranks.everyone(
                {
                    "random": random_state(),
                    # This rank's part of the loss that the next log line will show.
                    "loss": float(self._tr_loss),
                    "logged": self._globalstep_last_logged,
                    "since_evaluation": (self._summed, self._divided),
                }
            )
            if attempt.rank == 0 or attempt.is_sharded:
                attempt.saver.finish()
                attempt.saver.begin(self._snapshot(step, of_ranks, due), time.monotonic() - began)
            attempt.watchdog.beat(f"the save of step {step}")
            if attempt.stop.agreed:
                attempt.saver.finish()
                ranks.barrier()

    def _snapshot(self, step: int, of_ranks: list[Any], evaluation_due: bool) -> Snapshot:
        attempt = self.attempt
        memory: dict[Any, torch.Tensor] = {}
        scaler = getattr(self.accelerator, "scaler", None)
        log, early, median = attempt.run.metrics_file, attempt.early_stop, attempt.median_stop
        progress = {
            "utilisation": attempt.meter.state(),
            "evaluation_due": evaluation_due,
            **({"early_stopping": early.state()} if early is not None else {}),
            **({"pruned": median.reason} if median is not None else {}),
            "metrics_bytes": log.stat().st_size if log.exists() else 0,
        }
        state = dataclasses.asdict(self.state) | {"log_history": [], "stateful_callbacks": {}}
        model = self.accelerator.unwrap_model(self.model)
        weights, optimizer = checkpoint_weights(model), self.optimizer.state_dict()
        parts: dict[str, torch.Tensor] = {}
        if attempt.in_shards:
            parts, optimizer = sharded_state.split_state(weights, optimizer)
            weights = {}
        return Snapshot(
            step=step,
            write_model=lambda folder, copied: save_weights(model, folder, copied) if copied else None,
            weights=copy_to_host(weights, memory),
            shards=sharded_state.host_copy(parts, attempt.host_mesh),
            tensors={
                "optimizer.pt": copy_to_host(optimizer, memory),
                "scheduler.pt": copy_to_host(self.lr_scheduler.state_dict(), memory),
                **({"scaler.pt": copy_to_host(scaler.state_dict(), memory)} if scaler is not None else {}),
                RANKS: of_ranks,
            },
            texts={"trainer_state.json": json.dumps(state), PROGRESS: json.dumps(progress)},
            about={
                "world_size": attempt.geometry.num_processes,
                "geometry": attempt.geometry.model_dump(),
                "plan": attempt.plan.digest,
                "versions": {
                    "afina": __version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            },
            protected=self.state.best_global_step if attempt.keeps_best else None,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            for name in ("optimizer.pt", "scheduler.pt", *(["scaler.pt"] if self.accelerator.scaler else [])):
                if not (Path(checkpoint) / name).is_file():
                    raise EnvironmentProblem(
                        f"{checkpoint}: {name} is missing", "resume from another checkpoint: move this folder away"
                    )
        if checkpoint is None or not self.attempt.in_shards:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        left, schedule = (
            torch.load(Path(checkpoint) / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt")
        )
        sharded_state.read_optimizer(Path(checkpoint), left, self.optimizer)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        of_ranks, rank = read_ranks(Path(checkpoint)), self.attempt.rank
        if len(of_ranks) == self.attempt.geometry.num_processes:
            set_random_state(of_ranks[rank]["random"])
        else:
            seed = self.args.seed + 1_000_003 * self.state.global_step
            transformers.set_seed(seed + rank)
            dropout.seed(seed, rank)

    def resume(self, folder: Path) -> None:
        """Restore what Trainer does not: the loss since the last log line, times, the metrics log, a pending evaluation."""
        attempt, progress = self.attempt, read_progress(folder)
        attempt.meter.restore(progress["utilisation"])
        if attempt.early_stop is not None:
            attempt.early_stop.restore(progress["early_stopping"])
        if attempt.median_stop is not None:
            attempt.median_stop.reason = progress["pruned"]
        of_ranks, count = read_ranks(folder), attempt.geometry.num_processes
        same = len(of_ranks) == count
        loss = of_ranks[attempt.rank]["loss"] if same else sum(r["loss"] for r in of_ranks) / len(of_ranks)
        self._tr_loss = torch.tensor(loss, device=self.args.device)
        self._globalstep_last_logged = of_ranks[0]["logged"]
        # Checkpoints of afina before 0.2 do not have it.
        sums = [r.get("since_evaluation", (0.0, 0.0)) for r in of_ranks]
        self._summed, self._divided = sums[attempt.rank] if same else (sum(s for s, _ in sums) / len(sums), sums[0][1])
        if attempt.rank == 0:
            log, expected = attempt.run.metrics_file, progress["metrics_bytes"]
            if (size := log.stat().st_size if log.exists() else 0) < expected:
                say(f"WARNING: {log} has {size} bytes instead of {expected}: lines are missing")
            truncate(log, expected)
            if not same:
                say(
                    f"{len(of_ranks)} processes made this checkpoint, {count} resume it: same data, different dropout masks"
                )
        ranks.barrier()
        if progress["evaluation_due"]:
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            if attempt.ended_early is not None:
                raise StoppedEarly

    def restore(self, folder: Path) -> None:
        """Restore a checkpoint of the last step, or of an early stop: no step is left, only the export."""
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.load_weights(folder)
        self.resume(folder)

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a checkpoint.

        Raises:
            EnvironmentProblem: it is damaged.
        """
        if wrong := checkpoints.damage(folder):
            raise EnvironmentProblem(
                f"{folder}: the best checkpoint is damaged: {wrong}",
                "set `--set train.keep=last` in a new run, or restore the folder",
            )
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.attempt.in_shards:
            sharded_state.read_weights(Path(resume_from_checkpoint), checkpoint_weights(self.model))
        elif has_adapter(self.model):
            load_adapter(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
