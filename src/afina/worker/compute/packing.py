"""How the sequences of a micro-batch lie behind each other, and which of them attention takes together.

Packed sequences need no padding anywhere but in attention, where a call for each sequence is right for long ones and too many
small calls for short ones. So sequences, longest first, are cut into groups; a group whose lengths differ is padded for
the time of its attention only. The cut is the cheapest by a cost model: a call costs as much as so many scores.

Nothing here knows a model or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["CALL_SCORES", "Group", "Packing", "group_sequences", "pack"]

#: What a call of attention costs, in scores (elements of heads × L × L) that take as long, forward and backward.
#: CPU: 19,000 to 23,000 with one thread (`tests/bench/batching.py --calls`), more with more. GPU: a guess, not measured.
CALL_SCORES = {"cpu": 30_000, "cuda": 4_000_000}


@dataclass(frozen=True, eq=False)
class Group:
    """`count` sequences that attention takes together, `tokens` in all, padded to `width`.

    Attributes:
        real: the rows of the padded group that are no padding, int64 (tokens,); None: no padding.
        mask: True where a key is real, bool (count, 1, 1, width); None: no padding.
    """

    count: int
    width: int
    tokens: int
    real: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Packing:
    """A micro-batch of B sequences behind each other, longest first.

    Attributes:
        lengths: tokens of each.
        starts: of each, its first token, int64 (B,).
        bounds: the same and where the last ends, int32 (B + 1,).
        groups: what attention takes together; behind each other they are all tokens.
    """

    lengths: tuple[int, ...]
    starts: torch.Tensor
    bounds: torch.Tensor
    groups: tuple[Group, ...]

    def to(self, device: torch.device) -> Packing:
        """The same on `device`."""
        if self.starts.device == device:
            return self

        def moved(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        groups = tuple(Group(g.count, g.width, g.tokens, moved(g.real), moved(g.mask)) for g in self.groups)
        starts, bounds = (x.to(device, non_blocking=True) for x in (self.starts, self.bounds))
        return Packing(self.lengths, starts, bounds, groups)


def group_sequences(lengths: Sequence[int], call: float) -> list[int]:
    """Sizes of the groups that cost least.

    Args:
        lengths: longest first.
        call: what a group costs beyond its scores, in units of L × L.

    Returns: sequences of each group, longest first. Minimises sum(call + count × longest²) exactly, by dynamic programming.
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
    """The packing of sequences of `lengths`, longest first, for attention with so many heads on a kind of device."""
    assert list(lengths) == sorted(lengths, reverse=True), "longest first"
    sizes = group_sequences(lengths, CALL_SCORES.get(device, CALL_SCORES["cpu"]) / heads)
    groups, done = [], 0
    for size in sizes:
        groups.append(_group(lengths[done : done + size]))
        done += size
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return Packing(tuple(int(n) for n in lengths), bounds[:-1], bounds.int(), tuple(groups))


def _group(lengths: Sequence[int]) -> Group:
    each: Any = np.asarray(lengths, np.int64)
    count, width, tokens = len(each), int(each[0]), int(each.sum())
    if each[-1] == width:
        return Group(count, width, tokens)
    mask = np.arange(width)[None] < each[:, None]
    return Group(count, width, tokens, torch.from_numpy(np.flatnonzero(mask)), torch.from_numpy(mask[:, None, None, :]))
