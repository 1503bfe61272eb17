"""Evaluation on all ranks: logits of all rows on rank 0, in input order; the loss and the metrics from them.

Batches are sorted by length and do not depend on the number of processes, and all sums run over rows in input order: the
same model gives the same numbers on any number of processes.

Float32 logits are small: 650,000 rows of 5 labels are 13 MB, less than one batch in computation. So rank 0 keeps them; the
other ranks hand theirs over every `_HAND_OVER` batches. Above `_IN_MEMORY` bytes they lie in a memory-mapped file. Losses and
predictions are computed in blocks of rows; only one number per row and label is kept of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afina.recipe.metrics import NEED_SCORES, own_metric
from afina.statistics.decision_rule import probabilities
from afina.statistics.entities import count_rows, entities, entity_types
from afina.statistics.measures import compute
from afina.worker.compute import ranks
from afina.worker.compute.batches import scored_logits
from afina.worker.data.prepared import Split
from afina.worker.startup import gc_paused
from afina.worker.survival.stop import CAUSES
from afina.worker.task.losses import Loss
from afina.worker.task.tasks import decisions
from afina.worker.task.word_places import word_labels
from afina.worker.training.attempt import Attempt

__all__ = ["EvaluationAbandoned", "StoppedEarly", "logits_of", "scores"]

Array = np.ndarray[Any, Any]
Share = tuple[list[int], Array]
Forward = Callable[[dict[str, Any]], torch.Tensor]

#: Bytes above which logits lie in a file.
_IN_MEMORY = 256_000_000

#: Batches between two handovers to rank 0; the other ranks hold at most so many.
_HAND_OVER = 256


class EvaluationAbandoned(Exception):
    """A stop was requested during an evaluation; the next attempt repeats it.

    Attributes:
        cause: of the stop, see `CAUSES`.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class StoppedEarly(Exception):
    """A pending evaluation of an earlier attempt has ended the training: no step is left."""


def logits_of(attempt: Attempt, dataloader: Any, forward: Forward, *, may_stop: bool) -> Array:
    """Logits of all rows of an evaluation's data loader, float32 (N, K), on rank 0; (0, K) on the others. Collective.

    Of a token classification those of the words, (W, K); 0 for a word that has no token of its own.

    Args:
        forward: a batch without labels -> logits (B, K).
        may_stop: check for stop requests after each batch.

    Raises:
        EvaluationAbandoned: the run was asked to stop.
    """
    split: Split = dataloader.dataset.split
    shape = (len(split.labels) if attempt.rank == 0 else 0, attempt.data.num_labels)
    logits = _allocate(shape, attempt.run.path / "trainer")
    mine: list[Share] = []
    batches, most = iter(dataloader), dataloader.batch_sampler.most
    with torch.inference_mode():
        for number in range(1, most + 1):
            batch = next(batches, None)  # none where the other ranks have one more
            if batch is not None:
                values = scored_logits(forward(_inputs(batch)).float().cpu(), batch[1]["labels"])
                mine.append((batch[0], values.numpy()))
            elif attempt.is_sharded:
                forward(_inputs(dataloader.collate_fn([0])))  # the other ranks wait for this one's shards
            attempt.watchdog.beat(f"batch {number} of an evaluation")
            if may_stop and (cause := ranks.maximum(attempt.device, attempt.stop_cause())[0]):
                raise EvaluationAbandoned(CAUSES[cause])
            if number % _HAND_OVER == 0 or number == most:
                for rows, values in itertools.chain.from_iterable(ranks.on_rank_zero(mine)):
                    logits[split.scored(rows)] = values
                mine = []
    return logits


def _inputs(batch: tuple[list[int], dict[str, Any]]) -> dict[str, Any]:
    """The inputs of a batch, without its labels."""
    return {name: value for name, value in batch[1].items() if name != "labels"}


def _allocate(shape: tuple[int, int], folder: Path) -> Array:
    """A float32 array of zeros: in memory, or above `_IN_MEMORY` bytes in an unnamed file."""
    if shape[0] * shape[1] * 4 <= _IN_MEMORY:
        return np.zeros(shape, np.float32)
    folder.mkdir(exist_ok=True)
    path = folder / "logits.f32"
    mapped = np.memmap(path, np.float32, "w+", shape=shape)
    path.unlink()  # frees the space when the last process that maps it ends, even if it is killed
    return mapped


def scores(
    loss: Loss,
    texts: Sequence[str],
    logits: Array,
    split: Split,
    names: Sequence[str] | None = None,
    code: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The loss, a mean in float64 over rows (None where all of them have weight 0), and the metrics of the recipe (`afina.worker.task.scoring.compute_metrics`).

    Args:
        split: of the logits, for labels and weights. Metrics are not weighted.
        names: of the labels.
        code: the modules of the user's own metrics, by name.
    """
    count, task, labels, weights = len(logits), loss.task, np.asarray(split.labels), split.loss_weights
    each, predictions = np.empty(count, np.float64), []
    for block in blocks(count):
        each[block] = loss.of_rows(logits[block], labels[block])
        predictions.append(decisions(task, logits[block]))
    with gc_paused():  # the first call imports large libraries
        from afina.worker.task.scoring import compute_metrics

        of_scores = any(text in NEED_SCORES or own_metric(text) for text in texts)
        known = probabilities(task, logits) if of_scores else None
        if known is not None and task == "regression":
            known = known[:, 0]
        decided, width = np.concatenate(predictions), logits.shape[1]
        if split.words is not None:
            metrics = entity_metrics(texts, decided, split, names or ())
        else:
            metrics = compute_metrics(task, texts, decided, labels, width, known, code)
    mean = loss.mean(each, labels, weights)
    return {"loss": None if math.isnan(mean) else mean, **metrics}


def entity_metrics(texts: Sequence[str], decided: Array, split: Split, names: Sequence[str]) -> dict[str, Any]:
    """The metrics of a token classification, of the labels of words with a token of their own, int (W,)."""
    assert split.words is not None
    labels = word_labels(decided, split.words)
    offsets, types = split.words.offsets, len(entity_types(names))
    counts = count_rows(entities(np.asarray(split.labels), offsets), entities(labels, offsets), len(split), types)
    values, undefined = compute("token-classification", texts, *counts, None, types)
    if "accuracy" in texts:
        values["accuracy"] = float((labels == np.asarray(split.labels)).mean())
    return {**values, **({"undefined": undefined} if undefined else {})}


def blocks(count: int, size: int = 65_536) -> Iterator[slice]:
    """Rows 0 to `count` - 1 in blocks; one empty block where there are none."""
    return (slice(start, min(start + size, count)) for start in range(0, max(count, 1), size))
