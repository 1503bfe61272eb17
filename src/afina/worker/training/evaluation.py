"""One evaluation on every rank: logits of all rows on rank 0, in input order; loss and metrics from them, on every rank.

Batches are sorted by length and do not depend on the number of processes, and everything that is summed is summed over rows in
input order: the same model gives the same numbers on any number of processes.

Float32 logits cost little: 650,000 rows of 5 labels are 13 MB, less than the batch that is being computed. So they are kept, but
on rank 0 only, handed over every so many batches; above a size they lie in a file that is mapped into memory. What is derived from
them (losses, predictions) is derived in blocks of rows; only one number a row and label is kept of that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from afina.worker.model.tasks import decisions, per_example_loss
from afina.worker.startup import uncollected
from afina.worker.survival.stop import CAUSES
from afina.worker.training.control import agree, stop_cause

if TYPE_CHECKING:
    from afina.worker.data.prepared import Split
    from afina.worker.training.trainer import RunTrainer

__all__ = ["EvaluationAbandoned", "logits_of", "on_every_rank", "scores"]

Array = np.ndarray[Any, Any]
Share = tuple[list[int], Array]

#: Bytes of logits from which on they lie in a file.
_IN_MEMORY = 256_000_000

#: Batches after which a rank hands its logits over: at most so many are held by a rank that is not 0.
_HAND_OVER = 256


class EvaluationAbandoned(Exception):
    """A stop was asked for during an evaluation; the next attempt makes it."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def logits_of(trainer: RunTrainer, dataloader: Any) -> Array:
    """Logits of the rows that `trainer.get_eval_dataloader` gives, float32 (N, K), on rank 0; (0, K) on the others. Collective.

    Raises:
        EvaluationAbandoned: the run was asked to stop.
    """
    split: Split = dataloader.dataset.split
    width = trainer.model.config.num_labels
    logits = _room((len(split), width), trainer.run.path / "trainer") if trainer.rank == 0 else np.empty((0, width))
    trainer.model.eval()
    mine: list[Share] = []
    trainer.callback_handler.eval_dataloader = dataloader
    batches, most = iter(dataloader), dataloader.batch_sampler.most
    with torch.inference_mode():
        for number in range(most):
            for rows, inputs in itertools.islice(batches, 1):  # none where the other ranks have one more
                inputs.pop("labels")
                found = trainer.model(**trainer._prepare_inputs(inputs))["logits"]
                mine.append((rows, found.float().cpu().numpy()))
                trainer.control = trainer.callback_handler.on_prediction_step(
                    trainer.args, trainer.state, trainer.control
                )
            trainer.watchdog.beat(f"batch {number + 1} of an evaluation")
            if trainer.is_in_train and (cause := agree(trainer, stop_cause(trainer))[0]):
                raise EvaluationAbandoned(CAUSES[cause])
            if (number + 1) % _HAND_OVER == 0 or number + 1 == most:
                for share in _on_rank_zero(trainer, mine):
                    for rows, values in share:
                        logits[rows] = values
                mine = []
    return logits


def _room(shape: tuple[int, int], folder: Path) -> Array:
    """Room for float32 logits: in memory, or above `_IN_MEMORY` in a file that has no name any more."""
    if shape[0] * shape[1] * 4 <= _IN_MEMORY:
        return np.empty(shape, np.float32)
    folder.mkdir(exist_ok=True)
    path = folder / "logits.f32"
    mapped = np.memmap(path, np.float32, "w+", shape=shape)
    path.unlink()  # its space goes back when the last one who maps it is gone, also when this process is killed
    return mapped


def _on_rank_zero(trainer: RunTrainer, mine: list[Share]) -> list[list[Share]]:
    """The shares of all ranks, on rank 0; nothing on the others."""
    if trainer.geometry.num_processes == 1:
        return [mine]
    everyone: list[Any] | None = [None] * trainer.geometry.num_processes if trainer.rank == 0 else None
    dist.gather_object(mine, everyone)
    return everyone or []


def on_every_rank(trainer: RunTrainer, value: Any) -> Any:
    """Rank 0's value. Collective."""
    if trainer.geometry.num_processes == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def scores(task: str, names: list[str], logits: Array, labels: Array) -> dict[str, Any]:
    """The loss, a mean in float64 over rows, and the named metrics."""
    count = len(logits)
    loss, predictions = np.empty(count, np.float64), []
    for block in blocks(count):
        loss[block] = per_example_loss(task, logits[block], labels[block])
        predictions.append(decisions(task, logits[block]))
    with uncollected():  # the first time brings large libraries
        from afina.worker.model.metrics import compute_metrics

        found = compute_metrics(task, names, np.concatenate(predictions), labels, logits.shape[1])
    return {"loss": float(loss.mean()), **found}


def blocks(count: int, size: int = 65_536) -> Iterator[slice]:
    """Rows 0 to `count` - 1 in blocks; one empty block where there are none."""
    return (slice(start, min(start + size, count)) for start in range(0, max(count, 1), size))
