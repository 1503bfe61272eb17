"""Groups: rows of one author, document or patient, which no two splits may share.

A row without a group is one with the rows of the same text. Names that differ in case, white space, the form of their Unicode characters or the way a
whole number is written (`7`, `7.0`, `007`) are one group: what two groups are together costs little, what one is in two splits leaks. Not covered: equal texts of two groups may be in two splits, which
`afina.worker.data.splits.duplicates` warns of.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError
from afina.formats.text_files import MISSING_WORDS
from afina.text import plural
from afina.worker.data.splits.divide import split_groups
from afina.worker.data.tables.data_table import DataTable, Examples, TextDigests, as_text, list_places

__all__ = [
    "check_group_names",
    "check_groups",
    "check_shared_groups",
    "divide_groups",
    "group_codes",
    "group_names",
    "has_group",
]

Array = np.ndarray[Any, Any]

#: A whole number in one of the ways that programs write it.
_WHOLE = r"^\+?(-?)0*([0-9]+)(?:\.0*)?$"
#: One that a program had as a floating-point number: digits are gone.
_ROUNDED = r"^-?[0-9](\.[0-9]+)?e\+[0-9]+$"


def group_names(column: pa.Array) -> pa.Array:
    """A column of groups as names that are equal where the groups are, large_string (N,)."""
    names = pc.utf8_lower(pc.utf8_normalize(as_text(column), "NFKC"))
    spaced = pc.binary_join(pc.utf8_split_whitespace(names), pa.scalar(" ", pa.large_string()))
    return pc.replace_substring_regex(spaced, _WHOLE, r"\1\2")


def check_group_names(name: str, tables: Sequence[DataTable], warnings: list[str]) -> None:
    """Warn of groups that are written in several ways, and of numbers that have lost digits.

    Args:
        name: of the column.
    """
    written = pc.unique(pa.concat_arrays([as_text(table.columns[name]) for table in tables]))
    pairs = zip(group_names(written).to_pylist(), written.to_pylist(), strict=True)
    ways: dict[str, list[str]] = {}
    for group, way in pairs:
        if group:
            ways.setdefault(group, []).append(way)
    several = [each for each in ways.values() if len(each) > 1]
    if several:
        listed = " and ".join(map(repr, several[0][:2]))
        warnings.append(
            f"{plural(len(several), 'group')} of `{name}` {'are' if len(several) > 1 else 'is'} written in several ways, as {listed}, "
            "and each is one group"
        )
    for table in tables:
        names = as_text(table.columns[name])
        rounded = np.flatnonzero(
            pc.fill_null(pc.match_substring_regex(names, _ROUNDED, ignore_case=True), False).to_numpy(
                zero_copy_only=False
            )
        )
        if len(rounded):
            warnings.append(
                f"{plural(len(rounded), 'row has', 'rows have')} a group (`{name}`) that was rounded, as {names[int(rounded[0])].as_py()}: rows of one group may be "
                f"taken for several; write that column as text: {list_places(table, rounded)}"
            )


def has_group(groups: pa.Array) -> Array:
    """True if each row has a group, bool (N,)."""
    return np.asarray(pc.fill_null(pc.not_equal(groups, ""), False).to_numpy(zero_copy_only=False), bool)


def group_codes(groups: pa.Array | None, keys: Array) -> Array:
    """The code of each row's group, int64 (N,) from 0 on: of its name, or of its text where it has none.

    Args:
        groups: from `group_names`, large_string (N,); None: no row has one.
        keys: digests of the texts, uint64 (N, K), K >= 2.
    """
    keys = keys.copy()
    if groups is not None:
        named = has_group(groups)
        keys[named] = 0
        keys[named, :2] = TextDigests.of(groups.filter(pa.array(named))).keys
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)


def check_groups(name: str, splits: Mapping[str, Examples], warnings: list[str]) -> None:
    """Warn of rows without a group, of one that means none, and of groups of one row each.

    Args:
        name: of the column.

    Raises:
        DataError: no row of a split has a group.
    """
    for split, examples in splits.items():
        assert examples.groups is not None
        without = np.flatnonzero(~has_group(examples.groups))
        if len(without) == len(examples):
            raise DataError(
                f"{split}: no row has a group (`{name}`)", "name another column in `data.group`, or leave it out"
            )
        if len(without):
            warnings.append(
                f"{len(without):,} of {len(examples):,} rows of {split} have no group (`{name}`); each counts as one of its own: "
                f"{list_places(examples.table, without)}"
            )
        filled = np.flatnonzero(pc.is_in(examples.groups, pa.array(MISSING_WORDS, pa.large_string())))
        if len(filled) > 1:
            warnings.append(
                f"{len(filled):,} rows of {split} have a word for a missing value as their group (`{name}`: "
                f"{examples.groups[int(filled[0])].as_py()}), and are one group: leave the cell empty where there is none: {list_places(examples.table, filled)}"
            )
        if not len(without) and split == "train" and len(pc.unique(examples.groups)) == len(examples) > 1:
            warnings.append(
                f"every row of train is a group of its own: is `{name}` the column of authors, documents or patients?"
            )


def divide_groups(
    name: str, codes: Array, strata: Array | None, shares: Mapping[str, Fraction], seed: int, warnings: list[str]
) -> list[Array]:
    """Row numbers for each share, see `split_groups`; warns of sizes that are far from what was asked for.

    Args:
        name: of the column.
        shares: of the rows, by the name of the split.

    Raises:
        DataError: a group is larger than every split, or there are fewer groups than splits.
    """
    total, largest = len(codes), int(np.bincount(codes).max(initial=0))
    most = max(shares.values())
    if largest > most * total:
        raise DataError(
            f"data.group: one group (`{name}`) has {largest:,} of {total:,} rows, and the largest split holds "
            f"{int(most * total):,}: it is not divided",
            "give fractions that hold it, leave rows of it out, or give each split a file of its own",
        )
    divided = split_groups(codes, strata, list(shares.values()), seed)
    for (split, share), rows in zip(shares.items(), divided, strict=True):
        if not len(rows):
            raise DataError(
                f"data.{split}: no group (`{name}`) is left for this split: there are {int(codes.max(initial=-1)) + 1}",
                "give it a larger `fraction`, more groups, or a file of its own",
            )
        if not share / 2 <= Fraction(len(rows), total) <= share * 3 / 2:
            warnings.append(
                f"{split} has {len(rows) / total:.1%} of the rows, {float(share):.1%} were asked for: groups (`{name}`) are not "
                "divided, and these are few or large"
            )
    return divided


def check_shared_groups(name: str, splits: Mapping[str, Examples]) -> dict[str, list[str]]:
    """Warnings about groups that two splits share, by the split whose numbers they spoil."""
    warnings: dict[str, list[str]] = {}
    for first, second in itertools.combinations(splits, 2):
        here, there = splits[first], splits[second]
        if here.source == there.source and np.array_equal(here.rows, there.rows):
            continue  # asked for: `choose_sources` has said so
        assert here.groups is not None and there.groups is not None
        shared = pc.is_in(there.groups, pc.unique(here.groups.filter(pa.array(has_group(here.groups)))))
        rows = np.flatnonzero(shared.to_numpy(zero_copy_only=False))
        if len(rows):
            names: Sequence[str] = pc.unique(there.groups.take(pa.array(rows))).to_pylist()
            warnings.setdefault(second, []).append(
                f"{len(rows):,} of {len(there):,} rows of {second} belong to groups (`{name}`) that are in {first} too: "
                f"{len(names):,} groups, the first {names[0]!r} ({there.table.where(int(rows[0]))})"
            )
    return warnings
