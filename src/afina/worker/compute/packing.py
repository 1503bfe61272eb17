"""Packing: the layout of a micro-batch's sequences one behind the other, and their groups for attention.

Packed sequences need padding in attention only. There, one call for each sequence is right for long sequences but makes too many
small calls for short ones. So the sequences, longest first, are split into groups; a group of unequal lengths is padded during its
attention. A cost model decides the split: a call costs as much as a fixed number of scores.

This module knows neither models nor tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["CALL_SCORES", "Group", "Packing", "filled_width", "group_sequences", "group_windows", "pack", "pool"]

#: Overhead of one call of attention, as the number of scores (elements of heads × L × L) that take as long, forward and
#: backward. CPU: 19,000 to 23,000 with one thread by least squares over calls, more with more. GPU: a guess.
CALL_SCORES = {"cpu": 30_000, "cuda": 4_000_000}


@dataclass(frozen=True, eq=False)
class Group:
    """`count` sequences for one call of attention, `tokens` in all, padded to `width`.

    Attributes:
        real: the rows of the padded group that hold tokens, int64 (tokens,); None: nothing is padded.
        mask: True where a key is a token, bool (count, 1, 1, width); None: nothing is padded.
    """

    count: int
    width: int
    tokens: int
    real: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def to(self, device: torch.device) -> Group:
        """A copy on `device`."""
        real, mask = (None if x is None else x.to(device, non_blocking=True) for x in (self.real, self.mask))
        return Group(self.count, self.width, self.tokens, real, mask)

    def pad(self, rows: torch.Tensor, value: int = 0) -> torch.Tensor:
        """Tokens (tokens, …), and what may lie behind them, as sequences (count, width, …), filled up with `value`."""
        rows = rows[: self.tokens]
        if self.real is not None:
            empty = rows.new_full((self.count * self.width, *rows.shape[1:]), value)
            rows = empty.index_copy(0, self.real, rows)
        return rows.view(self.count, self.width, *rows.shape[1:])

    def unpad(self, batch: torch.Tensor) -> torch.Tensor:
        """Sequences (count, width, …) as their tokens (tokens, …)."""
        rows = batch.reshape(-1, *batch.shape[2:])
        return rows if self.real is None else rows.index_select(0, self.real)


@dataclass(frozen=True, eq=False)
class Packing:
    """A micro-batch of B sequences one behind the other, longest first; padding may lie behind them.

    Attributes:
        lengths: tokens of each sequence.
        starts: position of each sequence's first token, int64 (B,).
        bounds: the same, and the end of the last sequence, int32 (B + 1,).
        groups: the groups for attention; together they hold all tokens in order.
        whole: all sequences as one group, for a module that takes padded tokens.
    """

    lengths: tuple[int, ...]
    starts: torch.Tensor
    bounds: torch.Tensor
    groups: tuple[Group, ...]
    whole: Group | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the sequences have together."""
        return sum(self.lengths)

    def to(self, device: torch.device) -> Packing:
        """A copy on `device`."""
        if self.starts.device == device:
            return self

        starts, bounds = (x.to(device, non_blocking=True) for x in (self.starts, self.bounds))
        whole = None if self.whole is None else self.whole.to(device)
        return Packing(self.lengths, starts, bounds, tuple(group.to(device) for group in self.groups), whole)


def filled_width(tokens: int) -> int:
    """`tokens` or a little more (at most 15, or a 32nd): one of so few widths that they recur.

    oneDNN builds a kernel for each new width of a matrix product: 2 ms each, 11 of them in a step of a BERT, a fifth of the time of a
    step of eight short texts (measured with AMX, torch 2.13).
    """
    unit = max(16, (1 << tokens.bit_length() - 1) // 32)
    return -(-tokens // unit) * unit


def group_sequences(lengths: Sequence[int], call: float) -> list[int]:
    """The cheapest split of sequences into groups: the number of sequences in each.

    Minimises sum(call + count × longest²) exactly, by dynamic programming.

    Args:
        lengths: longest first.
        call: overhead of a group, in units of L × L.
    """
    squares = np.asarray(lengths, np.float64) ** 2
    number = np.arange(len(squares) + 1, dtype=np.float64)
    best = np.zeros(len(squares) + 1)
    before = np.zeros(len(squares) + 1, np.int64)
    for end in range(1, len(squares) + 1):
        costs = best[:end] + (end - number[:end]) * squares[:end]
        before[end] = int(np.argmin(costs))
        best[end] = costs[before[end]] + call
    sizes: list[int] = []
    end = len(squares)
    while end:
        sizes.append(int(end - before[end]))
        end = int(before[end])
    return sizes[::-1]


def pack(lengths: Sequence[int], heads: int, device: str = "cpu") -> Packing:
    """The packing of sequences of `lengths`, longest first, for attention with `heads` heads on this kind of device."""
    assert list(lengths) == sorted(lengths, reverse=True), "longest first"
    sizes = group_sequences(lengths, CALL_SCORES.get(device, CALL_SCORES["cpu"]) / heads)
    groups, start = [], 0
    for size in sizes:
        groups.append(_group(lengths[start : start + size]))
        start += size
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return Packing(tuple(int(n) for n in lengths), bounds[:-1], bounds.int(), tuple(groups), _group(lengths))


def group_windows(counts: Any, order: Any = None) -> Group:
    """Rows of windows as a group: its `pad` makes (B, W, …) of (S, …), whose windows may be in another order.

    Args:
        counts: windows of each of B rows, int64 (B,).
        order: of the S windows, int64 (S,), as numbers among those of the first row, the second one, …
    """
    each: Any = np.asarray(counts, np.int64)
    mask = np.arange(each.max())[None] < each[:, None]
    real = np.flatnonzero(mask)
    real = real if order is None else real[np.asarray(order)]
    return Group(len(each), mask.shape[1], len(real), torch.from_numpy(real), torch.from_numpy(mask[:, None, None, :]))


def pool(logits: torch.Tensor, windows: Group, how: str) -> torch.Tensor:
    """Logits of windows (S, K) to those of rows (B, K): their `mean`, or for each label the largest (`max`).

    Logits and not vectors: a linear head's mean over windows is the same either way, and no head of Transformers, nor an exported
    model, need say where its vector is. Pappagari et al. 2019, "Hierarchical Transformers for Long Document Classification", average
    the segments' predictions as their simplest way; Sun et al. 2019 pool vectors by mean and max.
    """
    assert windows.mask is not None
    real = windows.mask[:, 0, 0, :, None]
    if how == "max":
        return windows.pad(logits).masked_fill(~real, -torch.inf).amax(1)
    return windows.pad(logits).sum(1) / real.sum(1)


def _group(lengths: Sequence[int]) -> Group:
    each: Any = np.asarray(lengths, np.int64)
    count, width, tokens = len(each), int(each[0]), int(each.sum())
    if each[-1] == width:
        return Group(count, width, tokens)
    mask = np.arange(width)[None] < each[:, None]
    return Group(count, width, tokens, torch.from_numpy(np.flatnonzero(mask)), torch.from_numpy(mask[:, None, None, :]))
