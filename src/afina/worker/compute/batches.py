"""Which rows make which step: planned once an epoch, the same on every rank, resumable to the exact batch.

An epoch is a permutation of the rows, drawn as accelerate's seedable sampler draws it (`torch.randperm` seeded with
seed + epoch), so that a run with the tutorial's settings sees the tutorial's batches. Each step takes the next
`global_batch` rows; ranks and accumulation share them out. The rows of a step do not depend on the number of processes.

    padded   pad to `max_length`, as the tutorial does
    longest  pad to the longest of the batch
    grouped  as longest, and rows of like length are brought together: in windows of 50 steps, steps then shuffled
    packed   the rows of padded and longest, behind each other without padding (`afina.worker.compute.packing`)

`packed` and `grouped` deal the rows of a step out by cost, not by count: every rank gets about the same work.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from afina.run.plan import Geometry
from afina.worker.compute.packing import pack
from afina.worker.data.prepared import Split

__all__ = [
    "TOKENS_PER_ROW",
    "Batching",
    "Collator",
    "EvalBatches",
    "PackedCollator",
    "Rows",
    "StepBatches",
    "costs",
    "balance",
    "epoch_steps",
]

Batching = Literal["auto", "packed", "grouped", "longest", "padded"]

#: Steps that share one length-sorted window; 50 is what transformers' own length-grouped sampler uses.
_WINDOW = 50

#: A packed batch of evaluation holds so many tokens for each row that `eval_batch_size` allows.
TOKENS_PER_ROW = 128

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


def costs(lengths: np.ndarray[Any, Any], hidden_size: int) -> np.ndarray[Any, Any]:
    """What the rows cost, in tokens that attend to nothing, float64 (N,).

    A layer's matrix products are 24 H² FLOPs a token, attention over L tokens adds 4 L H: a share of L / 6H. Measured on a
    CPU, dropout and softmax included, it is about the same (tests/bench/batching.py).
    """
    each = lengths.astype(np.float64)
    return np.asarray(each + each**2 / (6 * hidden_size))


def balance(costs: np.ndarray[Any, Any], parts: int, most: int) -> list[list[int]]:
    """Share numbers 0 to N - 1 out into parts of at most `most`, so that the costliest part costs little.

    The costliest first, each to the part that has least (longest processing time first); the same input gives the same
    parts. Each part is in ascending order; there are empty ones only where there is too little to deal out.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    open_parts = [(0.0, part) for part in range(parts)]
    for number in np.argsort(-costs, kind="stable").tolist():
        load, part = heapq.heappop(open_parts)
        found[part].append(number)
        if len(found[part]) < most:
            heapq.heappush(open_parts, (load + float(costs[number]), part))
    return [sorted(part) for part in found]


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one rank. A row `~i` (negative) stands for row i without a label.

    The last step of an epoch may be short: its rows are shared out evenly, and a rank that would go without gets one
    row without a label, so that every rank takes part in every collective.
    """

    def __init__(
        self,
        lengths: np.ndarray[Any, Any],
        geometry: Geometry,
        rank: int,
        seed: int,
        batching: Batching,
        hidden_size: int = 768,
    ) -> None:
        self.lengths, self.geometry, self.rank, self.seed, self.batching = lengths, geometry, rank, seed, batching
        self.costs = costs(lengths, hidden_size)
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
        for rows in epoch_steps(self.lengths, self.geometry.global_batch, self.seed, self.epoch, self.batching):
            micros = self.geometry.accumulation if len(rows) == self.geometry.global_batch else self._short
            for share in self._shares(rows, micros):
                yield share.tolist() if len(share) else [~int(rows[0])]

    def _shares(self, rows: np.ndarray[Any, Any], micros: int) -> list[np.ndarray[Any, Any]]:
        """This rank's micro-batches of a step."""
        ranks, most = self.geometry.num_processes, self.geometry.batch_per_device
        if self.batching in ("longest", "padded"):
            return np.array_split(rows, micros * ranks)[self.rank :: ranks]
        # Ranks wait for each other once a step, so that the sum of a rank's micro-batches is what counts.
        mine = rows[balance(self.costs[rows], ranks, micros * most)[self.rank]]
        shares = [mine[part] for part in balance(self.costs[mine], micros, most)]
        return [share[np.argsort(-self.lengths[share], kind="stable")] for share in shares]


class EvalBatches(Sampler[list[int]]):
    """Rows sorted by length, longest first, in batches that do not depend on the number of ranks; dealt out in turn.

    Attributes:
        most: batches of the rank that has most; another may have one fewer.
    """

    def __init__(
        self,
        lengths: np.ndarray[Any, Any],
        batch_size: int,
        rank: int,
        num_processes: int,
        max_tokens: int | None = None,
    ) -> None:
        """Args:
        max_tokens: batches of as many rows as have so many tokens together, one at least, instead of `batch_size` rows.
        """
        order = np.argsort(-lengths, kind="stable")
        if max_tokens is None:
            starts = list(range(0, len(order), batch_size))
        else:
            ends, starts, done = np.cumsum(lengths[order]), [], 0
            while done < len(order):
                starts.append(done)
                before = int(ends[done - 1]) if done else 0
                done = max(done + 1, int(np.searchsorted(ends, before + max_tokens, side="right")))
        batches = [order[i:j].tolist() for i, j in zip(starts, [*starts[1:], len(order)], strict=True)]
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
        batch = {"input_ids": ids, "attention_mask": mask, "labels": _labels(self.split, rows)}
        if types is not None:
            batch["token_type_ids"] = types
        return {name: torch.from_numpy(array) for name, array in batch.items()}


@dataclass(frozen=True)
class PackedCollator:
    """Rows, longest first, to one packed batch: `input_ids`, `position_ids` (and `token_type_ids`) int64 (1, T), `labels` as
    `Collator`, and `packing`.

    Attributes:
        heads: attention heads, for the plan of attention.
        offset: positions begin at `pad_token_id` + 1 and leave out padding tokens (RoBERTa and its kin).
        device: the kind of device, for the plan of attention.
    """

    split: Split
    pad_token_id: int
    heads: int
    offset: bool = False
    device: str = "cpu"

    def __call__(self, rows: Sequence[int]) -> dict[str, Any]:
        real = [row if row >= 0 else ~row for row in rows]
        bounds = [(int(self.split.offsets[row]), int(self.split.offsets[row + 1])) for row in real]
        lengths = [end - start for start, end in bounds]
        ids = np.concatenate([self.split.tokens[start:end] for start, end in bounds]).astype(np.int64)
        counted = ids != self.pad_token_id if self.offset else np.ones(len(ids), bool)
        positions = np.cumsum(counted)
        firsts = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64)
        positions -= np.repeat(positions[firsts] - counted[firsts], lengths)
        positions = positions * counted + self.pad_token_id if self.offset else positions - 1
        batch = {"input_ids": ids[None], "position_ids": positions[None], "labels": _labels(self.split, rows)}
        if self.split.types is not None:
            batch["token_type_ids"] = np.concatenate([self.split.types[a:b] for a, b in bounds]).astype(np.int64)[None]
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {**tensors, "packing": pack(lengths, self.heads, self.device)}


def _labels(split: Split, rows: Sequence[int]) -> np.ndarray[Any, Any]:
    labels = np.array(split.labels[[row if row >= 0 else ~row for row in rows]])
    labels[[i for i, row in enumerate(rows) if row < 0]] = IGNORED
    return labels
