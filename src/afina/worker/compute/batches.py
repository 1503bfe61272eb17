"""Batches: the rows of each step, planned once an epoch, the same on every rank, resumable at the exact batch; and collators.

An epoch is a permutation of the rows, drawn as accelerate's seedable sampler draws it (`torch.randperm` seeded with
seed + epoch), so that a run with the tutorial's settings sees the tutorial's batches. Each step takes the next
`global_batch` rows, which ranks and accumulation share. The rows of a step do not depend on the number of processes.

    padded   padded to `max_length`, as in the tutorial
    longest  padded to the longest of the batch
    grouped  as longest, with rows of similar length together: sorted in windows of 50 steps, then the steps shuffled
    packed   the rows of padded and longest, one behind the other without padding (`afina.worker.compute.packing`)

`packed` and `grouped` balance the rows of a step by cost, not by count, so that every rank gets about the same work.
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
from afina.worker.compute.packing import Group, filled_width, group_windows, pack, pool
from afina.worker.data.prepared import Split

__all__ = [
    "TOKENS_PER_ROW",
    "Batching",
    "Collator",
    "EvalBatches",
    "PackedCollator",
    "Targets",
    "Rows",
    "scored_logits",
    "StepBatches",
    "costs",
    "balance",
    "epoch_steps",
    "pool_windows",
    "row_numbers",
]

Batching = Literal["auto", "packed", "grouped", "longest", "padded"]

#: Steps of one length-sorted window; transformers' length-grouped sampler uses 50 too.
_WINDOW = 50

#: Token budget of a packed evaluation batch for each row of `eval_batch_size`.
TOKENS_PER_ROW = 128

#: Labels (B,) or (B, K), and the weight of each row in the loss, float32 (B,): 0 for a row that only keeps a rank in step with the
#: others. Of a token classification labels and weights of the words, (W,), and the place of each among the batch's tokens, int64
#: (W,). A plain tuple, which `Trainer` moves to the device.
Targets = tuple[torch.Tensor, ...]


def scored_logits(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Those of a model's logits that targets are for: (B, K), or of the words' tokens (W, K)."""
    return logits if len(targets) == 2 else logits.flatten(0, 1).index_select(0, targets[2].to(logits.device))


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
        # A short last step stays last: the schedule assumes full steps before it.
        whole = len(steps) - (len(steps[-1]) < global_batch)
        return [steps[i] for i in torch.randperm(whole, generator=generator).tolist()] + steps[whole:]
    return [order[i : i + global_batch] for i in range(0, len(order), global_batch)]


def costs(lengths: np.ndarray[Any, Any], hidden_size: int) -> np.ndarray[Any, Any]:
    """Cost of each row, float64 (N,), in units of a token without attention.

    A layer's matrix products are 24 H² FLOPs a token, attention over L tokens adds 4 L H: a share of L / 6H. Measurements on a
    CPU, dropout and softmax included, give about the same.
    """
    each = lengths.astype(np.float64)
    return np.asarray(each + each**2 / (6 * hidden_size))


def balance(costs: np.ndarray[Any, Any], parts: int, most: int) -> list[list[int]]:
    """Split items 0 to N - 1 into parts of at most `most` items and similar cost.

    Longest processing time first: the costliest item goes to the part with the least cost so far. Deterministic. Each part is in
    ascending order; a part is empty only where there are fewer items than parts.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    open_parts = [(0.0, part) for part in range(parts)]
    for number in np.argsort(-costs, kind="stable").tolist():
        load, part = heapq.heappop(open_parts)
        shares[part].append(number)
        if len(shares[part]) < most:
            heapq.heappush(open_parts, (load + float(costs[number]), part))
    return [sorted(share) for share in shares]


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one rank. A row `~i` (negative) is row i with weight 0 in the loss.

    The last step of an epoch may be short. Its rows are shared evenly, and a rank without a row gets one with weight 0, so that
    every rank takes part in every collective.
    """

    def __init__(
        self,
        lengths: np.ndarray[Any, Any],
        geometry: Geometry,
        rank: int,
        seed: int,
        batching: Batching,
        hidden_size: int = 768,
        each: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """Args:
        each: the cost of each row, (N,), where it is not one sequence.
        """
        self.lengths, self.geometry, self.rank, self.seed, self.batching = lengths, geometry, rank, seed, batching
        self.costs = costs(lengths, hidden_size) if each is None else each
        self.epoch = 0

    @property
    def batch_sampler(self) -> StepBatches:
        # Trainer calls `dataloader.batch_sampler.batch_sampler.set_epoch`, with and without skipped batches.
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def _short(self) -> int:
        """Micro-batches of the short last step of an epoch; 0 where all steps are full."""
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
        # Ranks wait for each other once a step, so what counts is the sum of a rank's micro-batches.
        mine = rows[balance(self.costs[rows], ranks, micros * most)[self.rank]]
        shares = [mine[part] for part in balance(self.costs[mine], micros, most)]
        return [share[np.argsort(-self.lengths[share], kind="stable")] for share in shares]


class EvalBatches(Sampler[list[int]]):
    """Rows sorted by length, longest first, in batches that do not depend on the number of ranks; rank r takes every n-th.

    Attributes:
        most: the number of batches of the rank with most; others may have one fewer.
    """

    def __init__(
        self,
        lengths: np.ndarray[Any, Any],
        batch_size: int,
        rank: int,
        num_processes: int,
        max_tokens: int | None = None,
        sequences: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """Args:
        max_tokens: fill batches up to this many tokens, at least one row each, instead of `batch_size` sequences.
        sequences: windows of each row, (N,); None: 1 each.
        """
        order = np.argsort(-lengths, kind="stable")
        sizes, most = (lengths, max_tokens) if max_tokens is not None else (sequences, batch_size)
        if sizes is None:
            starts = list(range(0, len(order), batch_size))
        else:
            ends, starts, start = np.cumsum(sizes[order]), [], 0
            while start < len(order):
                starts.append(start)
                before = int(ends[start - 1]) if start else 0
                start = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        batches = [order[i:j].tolist() for i, j in zip(starts, [*starts[1:], len(order)], strict=True)]
        self.batches = batches[rank::num_processes]
        self.most = -(-len(batches) // num_processes)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class Rows(Dataset[list[int]]):
    """A split as a torch dataset of row numbers; the collator reads their tokens."""

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
    """Collates rows to padded tensors: `input_ids`, `attention_mask` (and `token_type_ids`) int64 (B, L), `labels`
    `Targets`; and where rows have windows, each a sequence, `windows` (`packing.group_windows`).

    Attributes:
        pad_to: L, or None for the longest of the batch.
        side: of the padding, see `afina.worker.model.padding`.
    """

    split: Split
    pad_token_id: int
    pad_to: int | None = None
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[int]) -> dict[str, Any]:
        starts, ends, counts = self.split.spans(row_numbers(rows))
        bounds = list(zip(starts.tolist(), ends.tolist(), strict=True))
        width = self.pad_to or int((ends - starts).max())
        ids = np.full((len(bounds), width), self.pad_token_id, np.int64)
        mask = np.zeros((len(bounds), width), np.int64)
        types = np.zeros((len(bounds), width), np.int64) if self.split.types is not None else None
        for i, (start, end) in enumerate(bounds):
            place = slice(0, end - start) if self.side == "right" else slice(width - (end - start), width)
            ids[i, place] = self.split.tokens[start:end]
            mask[i, place] = 1
            if types is not None:
                assert self.split.types is not None
                types[i, place] = self.split.types[start:end]
        batch = {"input_ids": ids, "attention_mask": mask}
        if types is not None:
            batch["token_type_ids"] = types
        before = width - (ends - starts) if self.side == "left" else 0
        return {
            **{name: torch.from_numpy(array) for name, array in batch.items()},
            **({"windows": group_windows(counts)} if self.split.windows is not None else {}),
            "labels": _targets(self.split, rows, np.arange(len(bounds)) * width + before),
        }


@dataclass(frozen=True)
class PackedCollator:
    """Collates rows, longest first, to a packed batch: `input_ids`, `position_ids` (and `token_type_ids`) int64 (1, T), `labels` as
    and `windows` as in `Collator`, and `packing`.

    Attributes:
        heads, device: attention heads and kind of device, for the packing's groups.
        offset: positions begin at `pad_token_id` + 1 and do not count padding tokens (RoBERTa and its relatives).
        fill: padding is added behind the sequences, see `filled_width`: zeros, which are valid tokens and positions in all architectures.
    """

    split: Split
    pad_token_id: int
    heads: int
    offset: bool = False
    device: str = "cpu"
    fill: bool = False

    def __call__(self, rows: Sequence[int]) -> dict[str, Any]:
        starts, ends, counts = self.split.spans(row_numbers(rows))
        extra = {}
        if self.split.windows is not None:
            order = np.argsort(starts - ends, kind="stable")
            starts, ends, extra = starts[order], ends[order], {"windows": group_windows(counts, order)}
        bounds = list(zip(starts.tolist(), ends.tolist(), strict=True))
        lengths = (ends - starts).tolist()
        ids = np.concatenate([self.split.tokens[start:end] for start, end in bounds]).astype(np.int64)
        counted = ids != self.pad_token_id if self.offset else np.ones(len(ids), bool)
        positions = np.cumsum(counted)
        firsts = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64)
        positions -= np.repeat(positions[firsts] - counted[firsts], lengths)
        positions = positions * counted + self.pad_token_id if self.offset else positions - 1
        batch = {"input_ids": ids[None], "position_ids": positions[None]}
        if self.split.types is not None:
            batch["token_type_ids"] = np.concatenate([self.split.types[a:b] for a, b in bounds]).astype(np.int64)[None]
        if self.fill:
            behind = filled_width(len(ids)) - len(ids)
            batch = {name: np.pad(array, ((0, 0), (0, behind))) for name, array in batch.items()}
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
        packing = pack(lengths, self.heads, self.device)
        return {**tensors, **extra, "labels": _targets(self.split, rows, firsts), "packing": packing}


def pool_windows(model: Any, how: str) -> None:
    """Let `model` accept `windows=`, as the collators make it, and then return logits of rows, (B, K), not of their windows.

    Training, evaluation and prediction all call the model, so none of them knows of windows. Batches without are as before.
    """
    current: list[Group | None] = [None]

    def remember(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        current[0] = named.pop("windows", None)
        return arguments, named

    def pooled(_: torch.nn.Module, arguments: Any, output: Any) -> Any:
        if current[0] is not None:
            output["logits"] = pool(output["logits"], current[0].to(output["logits"].device), how)
        return output

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.register_forward_hook(pooled)


def row_numbers(rows: Sequence[int]) -> np.ndarray[Any, Any]:
    """Row numbers, also of rows that carry no loss (~row)."""
    each = np.asarray(rows, np.int64)
    return np.where(each >= 0, each, ~each)


def _targets(split: Split, rows: Sequence[int], firsts: np.ndarray[Any, Any]) -> Targets:
    """Args:
    firsts: the place of each sequence's first token among all positions of the batch, (S,); a row whose words have labels is one sequence.
    """
    real = row_numbers(rows)
    weights = np.ones(len(rows), np.float32) if split.weights is None else np.array(split.weights[real])
    weights[[i for i, row in enumerate(rows) if row < 0]] = 0
    if split.words is not None:
        words, owner = split.words.scored(np.array(real, np.int64))
        places = firsts[owner] + np.asarray(split.words.pieces)[words]
        each = (np.asarray(split.labels)[words], weights[owner], places.astype(np.int64))
        return tuple(torch.from_numpy(np.ascontiguousarray(values)) for values in each)
    return torch.from_numpy(np.array(split.labels[real])), torch.from_numpy(weights)
