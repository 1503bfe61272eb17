"""Attempt: the frozen value that trainer, control, evaluation and results share, and that lies below all of them.

It holds the facts of one process in one attempt at a run (plan, geometry, rank, data, batching) and, made once on first use,
the objects that accompany it: schedule, meter, saver, watchdog.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afina.errors import TrainingError
from afina.recipe.metrics import (
    METRICS,
    default_metrics,
    lower_is_better,
    metric_name,
    metric_texts,
    own_metric,
    selection_metric,
)
from afina.run.allocation import Allocation
from afina.run.directory import RunDir
from afina.run.plan import Geometry, Plan
from afina.schedule import Schedule, stop_lead_s
from afina.sizes import Sizes
from afina.worker.compute.batches import Batching
from afina.worker.compute.precision import PrecisionChoice
from afina.worker.data import prepared as store
from afina.worker.data.labels.loss_weights import label_weights
from afina.worker.data.prepared import Split
from afina.worker.data.splits.folds import open_splits
from afina.worker.model.model_files import verify_model
from afina.worker.survival.early_stop import EarlyStop, MedianStop
from afina.worker.survival.lease import Lease
from afina.worker.survival.snapshot import Saver
from afina.worker.survival.stop import StepTimes, StopRequest
from afina.worker.survival.watchdog import Watchdog
from afina.worker.task.losses import Loss
from afina.worker.training.meter import Meter, Work, seconds_since_launch

__all__ = ["Attempt", "TrainingData", "open_data"]

#: Bytes per second that any scratch file system takes, used before the first save is measured.
_SLOW_DISK = 50e6


@dataclass(frozen=True)
class TrainingData:
    """The prepared data of a run, and its task.

    Attributes:
        folder: of the prepared data.
        model_folder: of the pretrained model.
        labels: their names, None for regression.
        word_units: of a token classification, see `afina.worker.data.tables.words.Units`.
        num_labels: outputs of the model.
        loss: of training and evaluation, on the CPU.
        pad_token_id, padding_side: of the tokenizer.
        rows: of a fold, the rows of train and eval among those of train on disk.
        metric_texts: what an evaluation computes, `best_metric` and that of early stopping included, as the recipe writes it.
        metric_code: the modules of the user's own metrics, by name.
        best_metric: the name of the one that chooses the best checkpoint.
    """

    folder: Path
    model_folder: str
    task: str
    labels: list[str] | None
    num_labels: int
    loss: Loss
    pad_token_id: int
    padding_side: str
    splits: Mapping[str, Split]
    rows: Mapping[str, np.ndarray[Any, Any]]
    metric_texts: Sequence[str]
    metric_code: Mapping[str, str]
    best_metric: str
    word_units: str | None = None


def open_data(plan: Plan, prepared: Mapping[str, Any], *, verify: bool) -> TrainingData:
    """Open the prepared data.

    Args:
        prepared: `prepared.json` of the run, as this node reads it.
        verify: compare every file of data and model with its digest first.

    Raises:
        SiteError: prepared data are missing or altered.
        TrainingError: a metric of the recipe does not fit the task.
    """
    folder = Path(prepared["prepared"])
    manifest = store.load_manifest(folder)
    if verify:
        store.verify(folder)
        verify_model(prepared)
    task = manifest["task"]
    best = plan.recipe.train.best_metric
    early = plan.recipe.train.early_stopping
    texts = metric_texts(
        default_metrics(task, plan.recipe.metrics), best or selection_metric(task), early.metric if early else None
    )
    for name in texts:
        if name not in METRICS[task] and own_metric(name) is None:
            raise TrainingError(
                f"metric `{name}` does not fit the task {task}", f"choose from: {', '.join(METRICS[task])}"
            )
    splits, rows = open_splits(folder, list(manifest["splits"]), task, plan.recipe.data)
    weights = label_weights(plan.recipe.train, task, manifest["labels"], splits["train"].labels)
    return TrainingData(
        folder=folder,
        model_folder=prepared["model_folder"],
        task=task,
        labels=manifest["labels"],
        num_labels=manifest["num_labels"],
        loss=Loss.of(plan.recipe.train, task, weights),
        pad_token_id=manifest["pad_token_id"],
        padding_side=manifest.get("padding_side", "right"),
        splits=splits,
        rows=rows,
        metric_texts=texts,
        metric_code=plan.metric_code,
        best_metric=selection_metric(task, best),
        word_units=manifest.get("word_units"),
    )


@dataclass(frozen=True)
class Attempt:
    """One process of one attempt at a run.

    Attributes:
        geometry: of the processes that really run.
        device: of this process.
        precision: what training computes in; on a CPU evaluations are in float32 whatever it is, so that anybody who
            computes with the exported model gets what the run recorded of it.
        batching: the recipe's, or what the model can take.
        flops: floating-point operations of the forward and backward pass of each training row, (N,).
        parameters: how many are trained, and how many there are.
        sizes: of the training, in bytes.
        host_mesh: of the shards' copies in host memory; None where the model is whole in each process.
    """

    run: RunDir
    allocation: Allocation
    rank: int
    plan: Plan
    geometry: Geometry
    device: torch.device
    data: TrainingData
    precision: PrecisionChoice
    batching: Batching
    flops: np.ndarray[Any, Any]
    parameters: tuple[int, int]
    sizes: Sizes
    host_mesh: Any
    stop: StopRequest
    lease: Lease

    @property
    def name(self) -> str:
        """`<job>.<restart>` or `local-<n>`."""
        return self.allocation.attempt

    @cached_property
    def schedule(self) -> Schedule:
        rows = {part: len(split) for part, split in self.data.splits.items()}
        return self.plan.recipe.train.schedule(rows["train"], rows.get("eval", 0))

    @cached_property
    def work(self) -> Work:
        """Examples, tokens, operations and the loss's divisor of any step, over all processes."""
        train, seed = self.data.splits["train"], self.plan.recipe.train.seed
        divisors = self.data.loss.divisors(np.asarray(train.labels), train.loss_weights)
        if train.words is not None and divisors is not None:
            ends = np.concatenate([[0], np.cumsum(divisors, dtype=np.float64)])[train.words.offsets]
            divisors = np.diff(ends)
        return Work(train.lengths, self.flops, self.schedule, seed, self.batching, divisors)

    @cached_property
    def meter(self) -> Meter:
        return Meter(seconds_since_launch(self.run.attempts / self.name))

    @cached_property
    def times(self) -> StepTimes:
        return StepTimes()

    @property
    def in_shards(self) -> bool:
        """Checkpoints are written in shards, also by one process: the recipe decides."""
        return self.plan.recipe.train.sharding != "none"

    @property
    def is_sharded(self) -> bool:
        """Each process holds a shard of the model, and each forward pass is collective."""
        return self.host_mesh is not None

    @cached_property
    def saver(self) -> Saver:
        """Writes the checkpoints; of a model that is not sharded on rank 0 alone."""
        record = partial(self.event, "checkpoint")
        keep = self.plan.recipe.train.keep_checkpoints
        return Saver(self.run.checkpoints, keep, self.run.metrics_file, record, self.host_mesh)

    @cached_property
    def early_stop(self) -> EarlyStop | None:
        """The counters of early stopping, where the recipe has it."""
        early = self.plan.recipe.train.early_stopping
        if early is None:
            return None
        metric = metric_name(early.metric) if early.metric else self.data.best_metric
        lower = lower_is_better(metric, self.data.metric_texts)
        return EarlyStop(metric, lower, early.patience, early.min_delta)

    @cached_property
    def median_stop(self) -> MedianStop | None:
        """The rule that prunes a trial, where the search has it."""
        return MedianStop.of(self.run)

    @property
    def ended_early(self) -> str | None:
        """Why the training has ended before its last step; None: it has not."""
        if self.early_stop is not None and self.early_stop.stopped:
            return self.early_stop.reason
        return self.median_stop.reason if self.median_stop is not None else None

    @cached_property
    def watchdog(self) -> Watchdog:
        minutes = self.plan.recipe.train.stall_minutes
        return Watchdog(self.run, self.name, self.rank, minutes, lambda: self.times.usual)

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event of this attempt to `events.jsonl`."""
        self.run.event(kind, attempt=self.name, **fields)

    def stop_cause(self) -> int:
        """The stop request that this rank knows of, as an index into `CAUSES`; rank 0 also checks file and deadline."""
        if self.rank:
            return self.stop.signalled()
        save_s = self.saver.seconds or self.sizes.checkpoint / _SLOW_DISK
        return self.stop.check(stop_lead_s(save_s, self.times.longest))

    @property
    def keeps_best(self) -> bool:
        return self.plan.recipe.train.keep == "best"
