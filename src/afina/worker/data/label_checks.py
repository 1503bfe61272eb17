"""Checks of labels and splits: suspicious label names, labels that a split lacks, duplicates across splits.

Label names that the recipe or a `ClassLabel` gives are not checked.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, nearest
from afina.recipe.schema import Data
from afina.worker.data.labels import LabelColumns, Labels, as_number, listed
from afina.worker.data.tables import DataTable, Examples, list_places

__all__ = ["check_duplicates", "check_found_labels", "check_labels", "nearest_label"]

Array = np.ndarray[Any, Any]

_SHOWN = 5
#: How programs write a missing value.
_MISSING = {"nan", "na", "n/a", "#n/a", "<na>", "none", "null", "nat"}
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


def nearest_label(name: str, known: Iterable[str]) -> str:
    """'did you mean …' for a label that differs only in case, spaces or the way a number is written, else for the nearest."""
    names = list(known)
    alike = next((other for other in names if _meaning(other) == _meaning(name)), None)
    return f"did you mean `{alike}`?" if alike is not None else nearest(name, names)


def check_found_labels(labels: Labels, data: Data, columns: Sequence[LabelColumns], warnings: list[str]) -> None:
    """Warn of labels that look alike, of missing values written as text, and of several labels in one text.

    Raises:
        DataError: a missing value (`nan`) where all other labels are numbers; lists of 0 and 1.
    """
    if labels.names is None or len(data.label) > 1 or data.labels is not None:
        return
    if any(data.label[0] in column.table.classes for column in columns):
        return
    if data.label_separator is not None and not any(_holds(column, data.label_separator) for column in columns):
        warnings.append(
            f"no label contains data.label_separator {data.label_separator!r}: every row has at most one label"
        )
    if labels.task == "multi-label":
        _refuse_flags(data.label[0], columns)
    _check_missing(labels, columns, warnings)
    groups: dict[str, list[str]] = {}
    for name in labels.names:
        groups.setdefault(_meaning(name), []).append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    for group in alike[:_SHOWN]:
        shown = ", ".join(f"{name!r} ({_place(columns, labels, name)})" for name in group)
        warnings.append(f"labels that look alike are separate classes: {shown}")
    if len(alike) > _SHOWN:
        warnings.append(f"{len(alike) - _SHOWN} more groups of labels look alike")
    lists = [name for name in labels.names if name.startswith("[") and name.endswith("]")]
    if lists:
        warnings.append(
            f"label {lists[0]!r} ({_place(columns, labels, lists[0])}) looks like a list written as text, but is one class: "
            "for several labels a row give lists (JSON, Parquet) or `data.label_separator`"
        )
    commas = [name for name in labels.names if _DECIMAL_COMMA.fullmatch(name)]
    if commas and all(_DECIMAL_COMMA.fullmatch(name) or as_number(name) is not None for name in labels.names):
        warnings.append(
            f"label {commas[0]!r} ({_place(columns, labels, commas[0])}) looks like a number with a decimal comma, but is one "
            "class: for a regression write 1.5"
        )


def check_labels(labels: Labels, splits: Mapping[str, Examples], warnings: list[str]) -> None:
    """Check that train shows what there is to learn, and that the other splits measure it.

    Raises:
        DataError: all labels of train are equal; eval or test has a single label that train lacks.
    """
    train = splits["train"]
    if labels.task == "regression":
        if len(np.unique(train.labels)) < 2:
            raise DataError(
                f"train: every label is {train.labels[0]:g}: there is nothing to learn", "check `data.label`"
            )
        return
    assert labels.names is not None
    names = np.array(labels.names, dtype=object)
    counts = {
        split: np.bincount(e.labels, minlength=len(names)) if labels.task == "single-label" else e.labels.sum(0)
        for split, e in splits.items()
    }
    if labels.task == "single-label" and (counts["train"] > 0).sum() < 2:
        only = names[counts["train"] > 0][0]
        raise DataError(
            f"train: every row has the label {only!r}; at least two labels are needed",
            "check `data.label`, or add rows",
        )
    if labels.task == "multi-label" and not counts["train"].any():
        raise DataError("train: no row has any label: there is nothing to learn", "check `data.label`")
    for split in splits:
        if split == "train":
            continue
        lacking = names[(counts["train"] == 0) & (counts[split] > 0)]
        if len(lacking) and labels.task == "single-label":
            row = int(np.flatnonzero(np.isin(splits[split].labels, np.flatnonzero(names == lacking[0])))[0])
            there = [str(name) for name in names[counts["train"] > 0]]
            hint = nearest_label(lacking[0], there)
            raise DataError(
                f"train has no row with label {listed(lacking)}, {split} has ({splits[split].table.where(row)})",
                f"{hint + ' ' if hint else ''}train has {listed(there)}; add such rows to train, or use a "
                "larger `data.train.sample` or another seed",
            )
        if len(lacking):
            warnings.append(f"train has no row with label {listed(lacking)}, {split} has")
        absent = names[(counts[split] == 0) & (counts["train"] > 0)]
        if len(absent):
            warnings.append(f"{split} has no row with label {listed(absent)}: nothing is measured for it")
    nowhere = names[sum(counts.values()) == 0]
    if len(nowhere):
        warnings.append(f"no row with label {listed(nowhere)} in any split; the model keeps an output for it")
    for index in np.flatnonzero(counts["train"] == 1)[:_SHOWN]:
        row = np.flatnonzero(train.labels == index if labels.task == "single-label" else train.labels[:, index])[0]
        warnings.append(f"label {names[index]!r} occurs once in train ({train.table.where(int(row))})")
    more = int((counts["train"] == 1).sum()) - _SHOWN
    if more > 0:
        warnings.append(f"{more} more labels occur once in train")


def _first_alike(keys: Array) -> Array:
    """For each row the first one with the same key, int64 (N,).

    Args:
        keys: uint64 (N, K).
    """
    order = np.lexsort(keys.T)  # stable: rows that are alike stay in their order
    new = np.ones(len(keys), bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def _pair(table: DataTable, index: int, train: DataTable, twin: int) -> str:
    there = train.where(twin)
    if table.sources[table.source[index]] == train.sources[train.source[twin]]:
        there = f"{train.unit} {train.row[twin]}"
    return f"{table.where(index)} = {there}"


def check_duplicates(
    labels: Labels, splits: Mapping[str, Examples], keys: Mapping[str, Array], warnings: list[str]
) -> None:
    """Warn of texts of train that another split has too, and of equal texts with different labels.

    Args:
        keys: digests of the texts of each split, uint64 (N, K).
    """
    train = splits["train"].table
    for split, examples in splits.items():
        if split == "train":
            continue
        twins = _first_alike(np.concatenate([keys["train"], keys[split]]))[len(train) :]
        both = np.flatnonzero(twins < len(train))
        if len(both):
            shown = "; ".join(_pair(examples.table, int(i), train, int(twins[i])) for i in both[:_SHOWN])
            warnings.append(
                f"{len(both):,} of {len(examples):,} rows of {split} are in train too, word for word: {shown}"
            )
    if labels.task == "regression":
        return
    codes = _first_alike(keys["train"])
    values = splits["train"].labels
    if values.ndim == 2:
        values = np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)
    pairs = np.unique(codes * (int(values.max()) + 1) + values)
    texts, times = np.unique(pairs // (int(values.max()) + 1), return_counts=True)
    conflicting = texts[times > 1]
    if len(conflicting):
        groups = [list_places(train, np.flatnonzero(codes == code)) for code in conflicting[:_SHOWN]]
        warnings.append(
            f"{len(conflicting):,} texts of train occur more than once with different labels: " + " | ".join(groups)
        )


def _meaning(name: str) -> str:
    number = as_number(name)
    if number is not None and number == number:
        # Whole numbers exactly: two ids may be one double.
        return str(int(name)) if re.fullmatch(r"[+-]?\d{1,300}", name) else f"{number:.17g}"
    visible = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) not in ("Cf", "Cc"))
    return " ".join(visible.casefold().split())


def _holds(column: LabelColumns, separator: str) -> bool:
    values = column.columns[0]
    if pa.types.is_list(values.type):
        return True
    return bool(pc.any(pc.match_substring(values.cast(pa.large_string()), separator)).as_py())


def _check_missing(labels: Labels, columns: Sequence[LabelColumns], warnings: list[str]) -> None:
    assert labels.names is not None
    missing = [name for name in labels.names if name.casefold() in _MISSING]
    others = [as_number(name) for name in labels.names if name not in missing]
    for name in missing:
        place = _place(columns, labels, name)
        if others and None not in others:
            raise DataError(
                f"{place}: label {name!r} among numbers: is the label missing?",
                "label these rows or remove them; if it is a class, name all classes in `data.labels`",
            )
        warnings.append(f"label {name!r} ({place}) is text and a class; does it mean that the label is missing?")


def _refuse_flags(name: str, columns: Sequence[LabelColumns]) -> None:
    """Lists of 0 and 1, all of one length, are not lists of label names."""
    lengths: set[int] = set()
    for column in columns:
        values = column.columns[0]
        if not pa.types.is_list(values.type):
            return
        lengths.update(pc.unique(pc.drop_null(pc.list_value_length(values))).to_pylist())
        if set(pc.unique(column.lists()[0]).to_pylist()) - {"0", "1", "0.0", "1.0", "false", "true"}:
            return
    if len(lengths) == 1 and min(lengths) > 1:
        raise DataError(
            f"{columns[0].table.where(0)}: column `{name}` holds {min(lengths)} values of 0 and 1; lists of label names are "
            "expected",
            "write the names of the labels that are 1, or give one 0/1 column per label: `label: [a, b]`",
        )


def _place(columns: Sequence[LabelColumns], labels: Labels, name: str) -> str:
    """The first row that has the label."""
    for column in columns:
        if labels.task == "single-label":
            texts, rows = column.text(), np.arange(len(column.table))
        else:
            texts, rows = column.lists()
        index = pc.index(texts, pa.scalar(name, pa.large_string())).as_py()
        if index >= 0:
            return column.table.where(int(rows[index]))
    return columns[0].table.sources[0]
