"""Labels: the task that the data shows, label names in order, and the array that training reads.

An empty or blank cell, null, and -1 of a `ClassLabel` are missing labels; in lists and separated texts an empty value is a row
without labels. Single labels are compared as trimmed text: 1, 1.0 and "1" are one label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, RecipeError, nearest
from afina.recipe.keys.data_keys import Data
from afina.text import plural
from afina.worker.data.tables.data_table import DataTable, as_text, list_places
from afina.worker.data.tables.words import TaggedWords

__all__ = ["LabelColumns", "Labels", "as_number", "as_numbers", "find_labels", "label_array", "listed"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Labels:
    """Task and label names.

    Attributes:
        task: single-label, multi-label, regression or token-classification.
        names: label names in the order of the model's outputs; None for regression.
    """

    task: str
    names: tuple[str, ...] | None


class LabelColumns:
    """The label columns of one source, read once for all splits that share it.

    Attributes:
        words: of a token classification; their codes are numbers of labels.
    """

    def __init__(self, table: DataTable, data: Data) -> None:
        self.table = table
        self.columns = [table.columns[name] for name in data.label] if table.words is None else []
        self.words: TaggedWords | None = None
        self.names, self.separator = data.label, data.label_separator

    def unwrap(self) -> None:
        """Take lists of one label each as single labels."""
        column = self.columns[0]
        indices = np.full(len(column), -1)
        indices[pc.list_parent_indices(column).to_numpy(zero_copy_only=False)] = np.arange(len(pc.list_flatten(column)))
        self.columns[0] = pc.list_flatten(column).take(pa.array(indices, mask=indices < 0))

    @property
    def has_one_each(self) -> bool:
        """True if every label that is there is a list of one."""
        lengths = pc.list_value_length(self.columns[0]) if self.is_list else pa.array([], pa.int32())
        return bool(pc.all(pc.fill_null(pc.equal(lengths, 1), True), min_count=0).as_py())

    @property
    def is_list(self) -> bool:
        return any(pa.types.is_list(column.type) for column in self.columns)

    def text(self) -> pa.Array:
        """Single labels: trimmed text, null where the label is missing."""
        return _filled(self.columns[0])

    def numbers(self) -> Array:
        """float64 (N,): NaN where there is no number."""
        return as_numbers(self.columns[0])

    def present(self) -> Array:
        """Where a label is not missing (an empty text or list is a multi-label row without labels), bool (N,)."""
        if self.table.words is not None:
            return self.table.words.present
        is_there = np.ones(len(self.table), bool)
        for column in self.columns:
            if not pa.types.is_list(column.type) and self.separator is None:
                column = pc.if_else(pc.equal(text := as_text(column), ""), None, text)
            is_there &= column.is_valid().to_numpy(zero_copy_only=False)
        return is_there

    def lists(self) -> tuple[pa.Array, Array]:
        """Multi-label, one column: every label as trimmed text, and the row of each."""
        column = self.columns[0]
        if not pa.types.is_list(column.type):
            if self.separator is None:
                raise DataError(
                    f"task multi-label: column `{self.names[0]}` of {self.table.sources[0]} holds single values",
                    "name several 0/1 columns in `data.label`, give lists (JSON, Parquet), or set `data.label_separator`",
                )
            column = pc.split_pattern(column.cast(pa.large_string()), self.separator)
        labels, rows = as_text(pc.list_flatten(column)), pc.list_parent_indices(column)
        filled = pc.fill_null(pc.not_equal(labels, ""), False)
        return labels.filter(filled), rows.filter(filled).to_numpy(zero_copy_only=False)

    def flags(self) -> Array:
        """Multi-label, several columns: float32 (N, L) of 0 and 1, NaN where there is no value."""
        values = np.full((len(self.table), len(self.columns)), np.nan, np.float32)
        for index, column in enumerate(self.columns):
            texts = pc.utf8_lower(as_text(column))
            for words, value in ((("0", "0.0", "false"), 0), (("1", "1.0", "true"), 1)):
                hit = pc.fill_null(pc.is_in(texts, pa.array(words, pa.large_string())), False)
                values[hit.to_numpy(zero_copy_only=False), index] = value
            odd = np.isnan(values[:, index]) & pc.fill_null(pc.not_equal(texts, ""), False).to_numpy(
                zero_copy_only=False
            )
            if odd.any():
                row = int(np.flatnonzero(odd)[0])
                raise DataError(
                    f"{self.table.where(row)}: column `{self.names[index]}` holds {texts[row].as_py()!r}; 0 or 1 is expected",
                    "several label columns mean one 0/1 column per label; for one label name one column",
                )
        return values


def _filled(column: pa.Array) -> pa.Array:
    """Trimmed text, null where it is empty."""
    texts = as_text(column)
    return pc.if_else(pc.equal(texts, ""), None, texts)


def as_numbers(column: pa.Array) -> Array:
    """A column as float64 (N,): NaN where there is no number."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        texts = _filled(column)
        try:
            column = texts.cast(pa.float64())
        except pa.ArrowInvalid:
            column = pa.array([as_number(text) for text in texts.to_pylist()], pa.float64())
    # Whole numbers beyond 2^53 become the nearest double: this decides the task, and a regression's labels are float32.
    numbers = column.cast(pa.float64(), safe=False)
    return np.asarray(pc.fill_null(numbers, float("nan")).to_numpy(zero_copy_only=False))


def as_number(text: str | None) -> float | None:
    """The number that a text represents, or None."""
    try:
        return None if text is None or "_" in text else float(text)  # 1_000 is Python's alone
    except ValueError:
        return None


def find_labels(
    recipe_task: str, data: Data, columns: Sequence[LabelColumns], warnings: list[str] | None = None
) -> Labels:
    """The task and the label names.

    Args:
        recipe_task: the recipe's task.
        warnings: a remark is appended where lists of one label are taken as single labels.
    """
    lists = [c for c in columns if c.is_list]
    if len(data.label) == 1 and lists and recipe_task != "multi-label" and all(c.has_one_each for c in columns):
        for column in lists:
            column.unwrap()
        if warnings is not None:
            warnings.append(
                f"column `{data.label[0]}` holds lists of one label each: taken as single labels; "
                "for several per row set `task: multi-label`"
            )
    elif (
        recipe_task == "auto"
        and warnings is not None
        and len(lists) == len(columns)
        and (rows := _empty_lists(columns))
    ):
        warnings.append(
            f"no row has more than one label in column `{data.label[0]}`, and some have an empty list: taken as multi-label; for "
            f"one label per row correct or remove {rows}"
        )
    task = _find_task(data, columns) if recipe_task == "auto" else recipe_task
    several = len(data.label) > 1
    if several and task != "multi-label":
        raise RecipeError(f"data.label: {plural(len(data.label), 'column')}, task {task} has one", "name one column")
    if task == "single-label" and any(c.is_list for c in columns):
        raise _several_labels(data.label[0], next(c for c in columns if not c.has_one_each))
    if task == "regression":
        if data.labels is not None:
            raise RecipeError("data.labels: a regression has no label names", "leave it out")
        return Labels(task, None)
    if several:
        if data.labels is not None and set(data.labels) != set(data.label):
            raise RecipeError(
                "data.labels: differ from the label columns", f"use the columns' names: {', '.join(data.label)}"
            )
        return Labels(task, data.label)
    if data.labels is not None:
        if len(set(data.labels)) != len(data.labels):
            raise RecipeError("data.labels: a label occurs twice", "name each label once")
        return Labels(task, tuple(data.labels))
    declared = {c.table.classes.get(data.label[0]) for c in columns}
    if len(declared) == 1 and (names := declared.pop()) is not None:
        return Labels(task, names)
    label_names: set[str] = set()
    for column in columns:
        values = column.text() if task == "single-label" else column.lists()[0]
        label_names.update(v for v in pc.unique(values).to_pylist() if v is not None)
    return Labels(task, tuple(_sorted(label_names)))


def _several_labels(name: str, column: LabelColumns) -> DataError:
    lengths = pc.fill_null(pc.list_value_length(column.columns[0]), 1).to_numpy(zero_copy_only=False)
    row = int(np.flatnonzero(lengths != 1)[0])
    return DataError(
        f"{column.table.where(row)}: column `{name}` holds a list of {lengths[row]} labels, and task single-label has one per row",
        "set task: multi-label, or correct the row",
    )


def _empty_lists(columns: Sequence[LabelColumns]) -> str:
    """Where lists are empty, if none has more than one label."""
    lengths = [pc.fill_null(pc.list_value_length(c.columns[0]), 1).to_numpy(zero_copy_only=False) for c in columns]
    if any((each > 1).any() for each in lengths):
        return ""
    rows = [np.flatnonzero(each == 0) for each in lengths]
    return "; ".join(list_places(c.table, some) for c, some in zip(columns, rows, strict=True) if len(some))


def _find_task(data: Data, columns: Sequence[LabelColumns]) -> str:
    if len(data.label) > 1 or data.label_separator is not None or any(c.is_list for c in columns):
        return "multi-label"
    if data.labels is not None or any(data.label[0] in c.table.classes for c in columns):
        return "single-label"
    fractional = False
    for column in columns:
        numbers, present = column.numbers(), column.present()
        if np.isnan(numbers[present]).any():
            return "single-label"
        finite = numbers[np.isfinite(numbers)]
        fractional |= bool((np.floor(finite) != finite).any())
    return "regression" if fractional else "single-label"


def _sorted(names: set[str]) -> list[str]:
    """Numbers by value, other names by code point."""
    numbers = {name: as_number(name) for name in names}
    if any(value is None or value != value for value in numbers.values()):
        return sorted(names)
    return sorted(names, key=lambda name: (numbers[name], name))


def label_array(columns: LabelColumns, labels: Labels, rows: Array) -> Array:
    """Labels of `rows` in the dtype and shape of prepared data.

    Raises:
        DataError: a label is unknown or is not a finite number; with file and row.
    """
    table = columns.table
    if labels.task == "regression":
        with np.errstate(over="ignore"):
            values = columns.numbers()[rows].astype(np.float32)
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            row = int(rows[wrong[0]])
            value = columns.columns[0][row].as_py()
            raise DataError(
                f"{table.where(row)}: label {value!r} is not a finite number, and task regression needs one "
                f"({plural(len(wrong), 'such row')})",
                "correct these rows, or set task: single-label",
            )
        return values
    assert labels.names is not None
    names = pa.array(labels.names, pa.large_string())
    if labels.task == "single-label":
        texts = columns.text().take(pa.array(rows))
        ids = pc.index_in(texts, names)
        _refuse_unknown(table, texts, ids, rows, labels.names)
        return np.asarray(ids.cast(pa.int64()).to_numpy(zero_copy_only=False))
    if len(columns.columns) > 1:
        return columns.flags()[rows]
    texts, owners = columns.lists()
    ids = pc.index_in(texts, names)
    used = np.zeros(len(table), bool)
    used[rows] = True
    keep = pa.array(used[owners])
    _refuse_unknown(table, texts.filter(keep), ids.filter(keep), owners[used[owners]], labels.names)
    matrix = np.zeros((len(table), len(names)), np.float32)
    valid = ids.is_valid().to_numpy(zero_copy_only=False)
    matrix[owners[valid], ids.filter(ids.is_valid()).to_numpy(zero_copy_only=False)] = 1
    return matrix[rows]


def _refuse_unknown(table: DataTable, texts: pa.Array, ids: pa.Array, rows: Array, names: Sequence[str]) -> None:
    if not ids.null_count:
        return
    wrong = np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))
    text = texts[int(wrong[0])].as_py()
    hint = nearest(text, names)
    raise DataError(
        f"{table.where(int(rows[wrong[0]]))}: label {text!r} is not one of {listed(names)} ({plural(len(wrong), 'such row')})",
        f"{hint + ' ' if hint else ''}correct the row, or add it to `data.labels`".strip(),
    )


def listed(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
