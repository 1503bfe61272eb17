"""Folds of cross-validation: index sets over the rows of train in prepared data, which all folds share.

With `data.fold` the prepared data have no eval split: all rows that are neither test nor left out are in `train`, with their texts and with
`train.groups.npy`, the group of each row. Rows without a group, or of data without groups, are grouped by their texts (but for case
and white space), so that no text is in two folds. Folds are stratified as `split_groups` says, and the same on every machine and
for every model.

Not covered: equal texts of two groups may be in two folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from afina.errors import DataError, SiteError
from afina.recipe.keys.data_keys import Data
from afina.worker.data.prepared import Split, open_split
from afina.worker.data.splits.divide import split_groups, value_groups

__all__ = ["GROUPS", "check_folds", "folds_of", "open_rows", "open_splits"]

Array = np.ndarray[Any, Any]

#: The group of each row of train, int64 (N,) from 0 on; only where there are folds.
GROUPS = "train.groups.npy"


def folds_of(folder: Path, train: Split, task: str, data: Data, repeat: int) -> Array:
    """The fold of each row of `train`, from 0 on, int64 (N,). Another repeat divides with another seed."""
    assert data.fold is not None
    try:
        groups = np.load(folder / GROUPS, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SiteError(
            f"prepared data {folder / GROUPS}: cannot be read: {error}", "make it again: `afina prefetch RECIPE`"
        ) from None
    labels = np.asarray(train.labels)
    strata = value_groups(labels) if task == "regression" else labels > 0 if task == "multi-label" else labels
    fold = np.empty(len(groups), np.int64)
    shares = [Fraction(1, data.fold.of)] * data.fold.of
    for number, rows in enumerate(split_groups(groups, strata, shares, data.train.seed + repeat - 1)):
        fold[rows] = number
    return fold


def _rows(folder: Path, train: Split, task: str, data: Data) -> dict[str, Array]:
    """The rows of train and of eval, as indices into the rows of train on disk."""
    assert data.fold is not None
    fold = folds_of(folder, train, task, data, data.fold.repeat)
    return {"train": np.flatnonzero(fold != data.fold.number - 1), "eval": np.flatnonzero(fold == data.fold.number - 1)}


def open_splits(folder: Path, names: Sequence[str], task: str, data: Data) -> tuple[dict[str, Split], dict[str, Array]]:
    """The splits that a run trains and evaluates on; and of a fold the rows of train and eval among those of train on disk.

    Args:
        names: of the splits on disk.

    Raises:
        SiteError: a file is missing or damaged.
    """
    splits = {name: open_split(folder, name) for name in names}
    if data.fold is None:
        return splits, {}
    whole = splits.pop("train")
    rows = _rows(folder, whole, task, data)
    return {**{name: whole.take(some) for name, some in rows.items()}, **splits}, rows


def open_rows(folder: Path, split: str, rows: Mapping[str, Array], columns: Sequence[str] | None = None) -> Any:
    """Where the rows of a split came from, with their texts but for train: a pyarrow table.

    Args:
        rows: of a fold, from `open_splits`.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(folder / f"{'train' if split in rows else split}.rows.parquet", columns=columns)
    return table.take(pa.array(rows[split])) if split in rows else table


def check_folds(folder: Path, task: str, data: Data) -> list[list[dict[str, int]]]:
    """Rows, tokens and groups of each fold, of every repeat up to the recipe's.

    Raises:
        DataError: a group is larger than a fold, or there are fewer groups than folds.
    """
    assert data.fold is not None
    train = open_split(folder, "train")
    groups = np.load(folder / GROUPS, allow_pickle=False)
    sizes = np.bincount(groups)
    what = f"groups (`{data.group}`)" if data.group else "different texts"
    if len(sizes) < data.fold.of:
        other = "name another column in `data.group`, or leave it out" if data.group else "give rows of other texts"
        remedy = f"at most --folds {len(sizes)}" if len(sizes) > 1 else other
        raise DataError(f"data.fold: {data.fold.of} folds of {len(sizes)} {what}", remedy)
    if int(sizes.max()) > -(-len(train) // data.fold.of):
        most = len(train) // int(sizes.max())
        raise DataError(
            f"data.fold: one of the {what} has {int(sizes.max()):,} of {len(train):,} rows, more than one of {data.fold.of} folds",
            f"--folds {most} or fewer, or leave rows of it out" if most > 1 else "leave rows of it out",
        )
    return [
        _sizes(folds_of(folder, train, task, data, repeat), train, groups if data.group else None)
        for repeat in range(1, data.fold.repeat + 1)
    ]


def _sizes(fold: Array, train: Split, groups: Array | None) -> list[dict[str, int]]:
    """Rows, tokens and, where there are any, groups of each fold."""
    chosen = [np.flatnonzero(fold == number) for number in range(int(fold.max()) + 1)]
    return [
        {
            "rows": len(rows),
            "tokens": int(train.lengths[rows].sum()),
            **({"groups": len(np.unique(groups[rows]))} if groups is not None else {}),
        }
        for rows in chosen
    ]
