"""Which rows make which step: planned once an epoch, the same on every rank, resumable to the exact batch.

An epoch is a permutation of the rows, drawn as accelerate's seedable sampler draws it (`torch.randperm` seeded with
seed + epoch), so that a run with the tutorial's settings sees the tutorial's batches. Each step takes the next
`global_batch` rows; ranks and accumulation share them out. The rows of a step do not depend on the number of processes.

    padded   pad to `max_length`, as the tutorial does
    longest  pad to the longest of the batch (what `auto` takes)
    grouped  as longest, and rows of like length are brought together: in windows of 50 steps, steps then shuffled
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from afina.plan import Geometry
from afina.worker.store import Split

__all__ = ["Collator", "EvalBatches", "Rows", "StepBatches", "epoch_steps"]

Batching = Literal["auto", "grouped", "longest", "padded"]

#: Steps that share one length-sorted window; 50 is what transformers' own length-grouped sampler uses.
_WINDOW = 50

#: Label of a row that only keeps a rank in step with the others: it carries no loss.
IGNORED = -100


def epoch_steps(
    lengths: np.ndarray[Any, Any], global_batch: int, seed: int, epoch: int, batching: Batching
) -> list[np.ndarray[Any, Any]]:
    """The rows of every optimizer step of an epoch, int64 arrays of at most `global_batch` rows each.

    Args:
        lengths: tokens per row, shape (N,).
        seed: the run's seed; the permutation is seeded with seed + epoch.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    if batching == "grouped":
        window = global_batch * _WINDOW
        order = np.concatenate(
            [
                w[np.argsort(-lengths[w], kind="stable")]
                for w in (order[i : i + window] for i in range(0, len(order), window))
            ]
        )
        steps = [order[i : i + global_batch] for i in range(0, len(order), global_batch)]
        # A short last step stays last: the schedule counts on full steps before it.
        whole = len(steps) - (len(steps[-1]) < global_batch)
        return [steps[i] for i in torch.randperm(whole, generator=generator).tolist()] + steps[whole:]
    return [order[i : i + global_batch] for i in range(0, len(order), global_batch)]


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one rank. A row `~i` (negative) stands for row i without a label.

    The last step of an epoch may be short: its rows are shared out evenly, and a rank that would go without gets one
    row without a label, so that every rank takes part in every collective.
    """

    def __init__(
        self, lengths: np.ndarray[Any, Any], geometry: Geometry, rank: int, seed: int, batching: Batching
    ) -> None:
        self.lengths, self.geometry, self.rank, self.seed, self.batching = lengths, geometry, rank, seed, batching
        self.epoch = 0

    @property
    def batch_sampler(self) -> StepBatches:
        # Trainer reaches for `dataloader.batch_sampler.batch_sampler.set_epoch`, whole or behind a skip.
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def _short(self) -> int:
        """Micro-batches of the short last step of an epoch; 0 where all steps are whole."""
        left = len(self.lengths) % self.geometry.global_batch
        return -(-left // (self.geometry.num_processes * self.geometry.batch_per_device))

    def __len__(self) -> int:
        return len(self.lengths) // self.geometry.global_batch * self.geometry.accumulation + self._short

    def __iter__(self) -> Iterator[list[int]]:
        geometry = self.geometry
        for rows in epoch_steps(self.lengths, geometry.global_batch, self.seed, self.epoch, self.batching):
            micros = geometry.accumulation if len(rows) == geometry.global_batch else self._short
            shares = np.array_split(rows, micros * geometry.num_processes)
            for micro in range(micros):
                share = shares[micro * geometry.num_processes + self.rank]
                yield share.tolist() if len(share) else [~int(rows[0])]


class EvalBatches(Sampler[list[int]]):
    """Rows sorted by length, longest first, in batches that do not depend on the number of ranks; dealt out in turn.

    Attributes:
        most: batches of the rank that has most; another may have one fewer.
    """

    def __init__(self, lengths: np.ndarray[Any, Any], batch_size: int, rank: int, num_processes: int) -> None:
        order = np.argsort(-lengths, kind="stable")
        batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
        self.batches = batches[rank::num_processes]
        self.most = -(-len(batches) // num_processes)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class Rows(Dataset[list[int]]):
    """A split as torch sees it: rows are numbers until the collator reads their tokens."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> int:  # type: ignore[override]
        return row

    def __getitems__(self, rows: list[int]) -> list[int]:
        return rows


@dataclass(frozen=True)
class Collator:
    """Rows to tensors: `input_ids`, `attention_mask` (and `token_type_ids`) int64 (B, L), `labels` (B,) or (B, K).

    Attributes:
        pad_to: L, or None for the longest of the batch.
    """

    split: Split
    pad_token_id: int
    pad_to: int | None = None

    def __call__(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        real = [row if row >= 0 else ~row for row in rows]
        bounds = [(int(self.split.offsets[row]), int(self.split.offsets[row + 1])) for row in real]
        width = self.pad_to or max(end - start for start, end in bounds)
        ids = np.full((len(rows), width), self.pad_token_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        types = np.zeros((len(rows), width), np.int64) if self.split.types is not None else None
        for i, (start, end) in enumerate(bounds):
            ids[i, : end - start] = self.split.tokens[start:end]
            mask[i, : end - start] = 1
            if types is not None:
                assert self.split.types is not None
                types[i, : end - start] = self.split.types[start:end]
        labels = np.array(self.split.labels[real])
        labels[[i for i, row in enumerate(rows) if row < 0]] = IGNORED
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if types is not None:
            batch["token_type_ids"] = types
        return {name: torch.from_numpy(array) for name, array in batch.items()}
