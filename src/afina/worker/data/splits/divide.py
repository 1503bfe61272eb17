"""Divides rows among splits: by a key of each row, in whole groups, or by a shuffled order in exact shares.

Pure arithmetic: the same input gives the same rows on every platform. Shares are exact fractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

__all__ = [
    "rank_groups",
    "sample_by_key",
    "sample_rows",
    "split_by_key",
    "split_groups",
    "stratified_split",
    "value_groups",
]

Array = np.ndarray[Any, Any]

_HASH_BITS = 53
_RANK_GROUPS = 10
#: A sample's hash is another one than that of the split it is taken from.
_SAMPLE_SALT = 0x5851F42D4C957F2D


def stratified_split(strata: Array | None, num_rows: int, shares: Sequence[Fraction], seed: int) -> list[Array]:
    """Disjoint row numbers for each share, ascending, int64.

    Args:
        strata: stratum of each row, int64 (num_rows,), or None. A stratum of one row goes to the first share, and every
            stratum has at least one row there.
        shares: of the whole; where they add up to less than 1, some rows are in none.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_rows)
    if strata is None:
        groups = [order]
    else:
        by_stratum = order[np.argsort(strata[order], kind="stable")]
        bounds = np.flatnonzero(np.diff(strata[by_stratum])) + 1
        groups = np.split(by_stratum, bounds)
    wanted = [*shares, 1 - sum(shares, Fraction(0))]
    carry = [Fraction(0)] * len(wanted)
    taken: list[list[Array]] = [[] for _ in wanted]
    for group in groups:
        counts = _divide(len(group), wanted, carry)
        start = 0
        for index, count in enumerate(counts):
            taken[index].append(group[start : start + count])
            start += count
    empty = np.empty(0, np.int64)
    return [np.sort(np.concatenate([empty, *some])) for some in taken[:-1]]


def _divide(size: int, wanted: Sequence[Fraction], carry: list[Fraction]) -> list[int]:
    """Whole numbers that add up to `size`, near `wanted * size + carry`; `carry` is set to the difference."""
    if size == 1:
        return [1, *[0] * (len(wanted) - 1)]
    ideal = [share * size + left for share, left in zip(wanted, carry, strict=True)]
    counts = [max(0, int(value)) for value in ideal]
    while sum(counts) > size:
        counts[max(range(len(counts)), key=lambda i: (counts[i] - ideal[i], -i))] -= 1
    while sum(counts) < size:
        counts[max(range(len(counts)), key=lambda i: (ideal[i] - counts[i], -i))] += 1
    if not counts[0]:
        counts[counts.index(max(counts))] -= 1
        counts[0] = 1
    carry[:] = [value - count for value, count in zip(ideal, counts, strict=True)]
    return counts


def split_by_key(keys: Array, strata: Array | None, shares: Sequence[Fraction], seed: int) -> list[Array]:
    """Disjoint row numbers for each share, ascending, int64: a row's share follows from its key and the seed alone.

    Exceptions, for the sake of small data: a stratum without a row in the first share gives it one, and a stratum (or the
    whole) that should have a row in another share and has none gives it the one whose key is nearest. Rows with one key stay
    together.

    Args:
        keys: uint64 (N, K).
        strata: stratum of each row, int64 (N,), or None.
        shares: of the whole; where they add up to less than 1, some rows are in none.
    """
    place = _hashed(keys, seed)
    total = Fraction(0)
    bounds = [round((total := total + share) * (1 << _HASH_BITS)) for share in shares]
    taken = np.searchsorted(np.array(bounds, np.int64), place, side="right")
    groups = [np.arange(len(place))] if strata is None else _groups(strata)
    division = _Division(place, taken, bounds, shares)
    for rows in groups:
        division.fill(rows)
    division.fill(np.arange(len(place)), kept=groups)
    return [np.flatnonzero(taken == index) for index in range(len(shares))]


def _hashed(keys: Array, seed: int, salt: int = 0) -> Array:
    """Uniform in [0, 2**53) by SplitMix64's finaliser, int64 (N,)."""
    mixed = np.full(len(keys), seed ^ salt, np.uint64)
    with np.errstate(over="ignore"):
        for column in np.asarray(keys, np.uint64).T:
            mixed = (mixed ^ column) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(64 - _HASH_BITS)).astype(np.int64)


def _groups(strata: Array) -> list[Array]:
    """Rows of each stratum."""
    order = np.argsort(strata, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(strata[order])) + 1)


@dataclass(frozen=True)
class _Division:
    """Rows and their shares.

    Attributes:
        place: hash of each row, int64 (N,).
        taken: index of each row's share, int64 (N,); `fill` changes it.
        bounds: upper ends of the shares' places.
    """

    place: Array
    taken: Array
    bounds: Sequence[int]
    shares: Sequence[Fraction]

    def fill(self, rows: Array, kept: Sequence[Array] = ()) -> None:
        """Give each share that should have some of `rows`, and has none, the key that is nearest to it.

        Args:
            kept: strata that must keep a row in the first share.
        """
        for index, share in enumerate(self.shares):
            if (self.taken[rows] == index).any() or (index and share * len(rows) < (Fraction(1, 2) if kept else 1)):
                continue
            low = self.bounds[index - 1] if index else 0
            distance = np.where(self.place[rows] < low, low - self.place[rows], self.place[rows] - self.bounds[index])
            for row in rows[np.argsort(distance, kind="stable")]:
                source = self.taken[row]
                alone = len(np.unique(self.place[rows[self.taken[rows] == source]])) < 2
                alone |= any(
                    row in stratum and len(np.unique(self.place[stratum[self.taken[stratum] == 0]])) < 2
                    for stratum in kept
                )
                if index and alone and source < len(self.shares):
                    continue
                self.taken[self.place == self.place[row]] = index
                break


def split_groups(groups: Array, strata: Array | None, shares: Sequence[Fraction], seed: int) -> list[Array]:
    """Disjoint row numbers for each share, ascending, int64; rows of one group stay together.

    The largest groups come first, each to the share that leaves the least squared deviation from its rows and from its rows
    of each label, relative to the label's frequency; of equal groups those with the rarest label come first. With groups of one
    row this is stratification, for several labels a row that of Sechidis et al. (2011, "On the Stratification of Multi-Label
    Data"). All in whole numbers: every machine gets the same rows.

    Args:
        groups: code of each row's group, int64 (N,) from 0 on, none left out.
        strata: stratum of each row, int64 (N,); or its labels, bool (N, L); or None.
        shares: of the whole; where they add up to less than 1, some rows are in none.
    """
    rest = 1 - sum(shares, Fraction(0))
    wanted = [*shares, *([rest] if rest else [])]
    scale = math.lcm(*(share.denominator for share in wanted))
    parts = [int(share * scale) for share in wanted]
    per_part = [math.lcm(*parts) // part for part in parts]
    of_group, totals, sizes = _label_counts(groups, strata)
    rarest = np.array([min(totals[label] for label, _ in counts) for counts in of_group], np.int64)
    hashed = _hashed(np.arange(len(of_group), dtype=np.uint64).reshape(-1, 1), seed)
    weights = [(1 << 40) // max(1, total) for total in totals]
    needed = [[part * total for total in totals] for part in parts]
    taken = np.empty(len(of_group), np.int64)
    for group in np.lexsort((hashed, rarest, -sizes)).tolist():
        counts = of_group[group]
        costs = [
            many * sum(weights[at] * count * (scale * count - 2 * need[at]) for at, count in counts)
            for many, need in zip(per_part, needed, strict=True)
        ]
        best = costs.index(min(costs))
        taken[group] = best
        for at, count in counts:
            needed[best][at] -= scale * count
    for index in range(len(shares)):  # no share without a group, where there are enough
        if not (taken == index).any():
            others = np.flatnonzero(np.bincount(taken, minlength=len(parts))[taken] > 1)
            taken[others[np.argsort(sizes[others], kind="stable")[:1]]] = index
    return [np.flatnonzero(taken[groups] == index) for index in range(len(shares))]


def _label_counts(groups: Array, strata: Array | None) -> tuple[list[list[tuple[int, int]]], list[int], Array]:
    """Of each group how many rows have each label, as pairs; the rows of each label; the rows of each group. A last label is that of
    every row."""
    if strata is None:
        rows, labels, width = np.empty(0, np.int64), np.empty(0, np.int64), 0
    elif strata.ndim == 2:
        (rows, labels), width = np.nonzero(strata), strata.shape[1]
    else:
        _, labels = np.unique(strata, return_inverse=True)
        rows, width = np.arange(len(strata)), int(labels.max(initial=-1)) + 1
    rows = np.concatenate([rows, np.arange(len(groups))])
    labels = np.concatenate([labels, np.full(len(groups), width)])
    pairs, counts = np.unique(groups[rows] * (width + 1) + labels, return_counts=True)
    found, at = np.divmod(pairs, width + 1)
    of_group: list[list[tuple[int, int]]] = [[] for _ in range(int(groups.max(initial=-1)) + 1)]
    for group, label, count in zip(found.tolist(), at.tolist(), counts.tolist(), strict=True):
        of_group[group].append((label, count))
    return of_group, np.bincount(labels, minlength=width + 1).tolist(), np.bincount(groups)


def sample_rows(num_rows: int, sample: int | None, seed: int) -> Array:
    """Row numbers as `datasets.Dataset.shuffle(seed=seed).select(range(sample))` orders them; all, in order, if None."""
    if sample is None:
        return np.arange(num_rows)
    return np.random.default_rng(seed).permutation(num_rows)[:sample]


def sample_by_key(keys: Array, sample: int, seed: int) -> Array:
    """The `sample` rows whose keys have the smallest hashes, ascending: rows that are added replace few of them.

    Args:
        keys: uint64 (N, K); of rows with one key the first come first.
    """
    return np.sort(np.argsort(_hashed(keys, seed, _SAMPLE_SALT), kind="stable")[:sample])


def rank_groups(values: Array) -> Array:
    """Ten equal groups of numbers by their rank, those of equal numbers in order; int64 (N,)."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks * _num_groups(values) // max(1, len(values))


def value_groups(values: Array) -> Array:
    """Ten groups of numbers between their quantiles, equal numbers in one; int64 (N,)."""
    return np.searchsorted(np.sort(values), values) * _num_groups(values) // max(1, len(values))


def _num_groups(values: Array) -> int:
    return max(1, min(_RANK_GROUPS, len(values) // _RANK_GROUPS))
