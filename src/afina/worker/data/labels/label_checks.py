"""Checks of labels: suspicious label names, labels that a split lacks.

Label names that the recipe or a `ClassLabel` gives are not checked.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import isinf
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, nearest
from afina.formats.text_files import MISSING_WORDS
from afina.recipe.keys.data_keys import Data
from afina.text import plural
from afina.worker.data.labels.find_labels import LabelColumns, Labels, as_number, listed
from afina.worker.data.tables.data_table import Examples, list_places

__all__ = ["check_found_labels", "check_labels", "nearest_label"]

Array = np.ndarray[Any, Any]

_SHOWN = 5
#: How a missing label is written.
_MISSING = MISSING_WORDS | {"?"}
#: Near-misses: at most so many labels are compared, and the other one must have so many times the rows.
_MOST_COMPARED = 1000
_TIMES_AS_FREQUENT = 10
#: What people write between the labels of a row.
_SEPARATORS = ",;|/&+"
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
    counts = _counts(labels, columns)
    warnings += _near_misses(counts, labels, columns)
    warnings += _mixed_kinds(counts, labels, columns)
    alike = [group for group in groups.values() if len(group) > 1]
    for group in alike[:_SHOWN]:
        shown = ", ".join(f"{name!r} ({_place(columns, labels, name)}; {counts[name]:,} in all)" for name in group)
        warnings.append(f"labels that look alike are separate classes: {shown}")
    if len(alike) > _SHOWN:
        warnings.append(f"{len(alike) - _SHOWN} more groups of labels look alike")
    lists = [name for name in labels.names if name.startswith("[") and name.endswith("]")]
    if lists:
        warnings.append(
            f"label {lists[0]!r} ({_place(columns, labels, lists[0])}) looks like a list written as text, but is one class: "
            "for several labels a row give lists (JSON, Parquet) or `data.label_separator`"
        )
    warnings += _joined(labels.names, columns, labels)
    commas = [name for name in labels.names if _DECIMAL_COMMA.fullmatch(name)]
    if commas and all(_DECIMAL_COMMA.fullmatch(name) or as_number(name) is not None for name in labels.names):
        warnings.append(
            f"label {commas[0]!r} ({_place(columns, labels, commas[0])}) looks like a number with a decimal comma, but is one "
            "class: for a regression write 1.5"
        )


def _joined(names: Sequence[str], columns: Sequence[LabelColumns], labels: Labels) -> Iterator[str]:
    """Labels that are others with a separator between them: `a, b` beside `a`, where `b` occurs elsewhere too."""
    for mark in _SEPARATORS:
        parts = {name: {part.strip() for part in name.split(mark)} for name in names}
        often = Counter(part for each in parts.values() for part in each)
        joined = [
            n for n, each in parts.items() if len(each) > 1 and each & set(names) and all(often[p] > 1 for p in each)
        ]
        if joined:
            more = f", as are {len(joined) - 1} more" if len(joined) > 1 else ""
            yield (
                f"label {joined[0]!r} ({_place(columns, labels, joined[0])}) looks like several labels, but is one class{more}: "
                f"for several labels a row set `data.label_separator: {mark!r}`"
            )


def _counts(labels: Labels, columns: Sequence[LabelColumns]) -> dict[str, int]:
    """Rows of each label, in all sources."""
    rows_of: Counter[str] = Counter()
    for column in columns:
        texts = column.text() if labels.task == "single-label" else column.lists()[0]
        for each in pc.value_counts(texts).to_pylist():
            if each["values"] is not None:
                rows_of[each["values"]] += each["counts"]
    return rows_of


def _near_misses(counts: Mapping[str, int], labels: Labels, columns: Sequence[LabelColumns]) -> Iterator[str]:
    """Rare labels that are one or two letters away from a frequent one."""
    if len(counts) > _MOST_COMPARED:
        return
    count = 0
    for rare, rows in counts.items():
        common = [name for name, more in counts.items() if more >= _TIMES_AS_FREQUENT * rows and _is_typo(rare, name)]
        if not common:
            continue
        count += 1
        if count <= _SHOWN:
            name = max(common, key=counts.__getitem__)
            yield (
                f"label {rare!r} ({plural(rows, 'row')}: {_places(columns, labels, {rare})}) is nearly {name!r} ({plural(counts[name], 'row')}), "
                "and a class of its own: correct these rows, or name all classes in `data.labels`, which refuses others"
            )
    if count > _SHOWN:
        yield f"{count - _SHOWN} more rare labels are nearly a frequent one"


def _is_typo(rare: str, name: str) -> bool:
    """One edit in four letters or more, two in eight or more; digits that differ make another label."""
    length = min(len(rare), len(name))
    most = 2 if length >= 8 else 1 if length >= 4 else 0
    if not most or abs(len(rare) - len(name)) > most or re.sub(r"\D", "", rare) != re.sub(r"\D", "", name):
        return False
    return _meaning(rare) != _meaning(name) and _edits(_meaning(rare), _meaning(name)) <= most


def _edits(a: str, b: str) -> int:
    """Optimal string alignment: insertions, deletions, substitutions and swaps of neighbours."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, right in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right)))
            if i > 1 and j > 1 and left == b[j - 2] and right == a[i - 2]:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]


def _mixed_kinds(counts: Mapping[str, int], labels: Labels, columns: Sequence[LabelColumns]) -> Iterator[str]:
    """Numbers in some rows, words in others."""
    names = [name for name in counts if name.casefold() not in _MISSING]
    numbers = {name for name in names if as_number(name) is not None}
    words = set(names) - numbers
    if numbers and words:
        shown = (
            f"{listed(sorted(kind)[:_SHOWN])}{', …' if len(kind) > _SHOWN else ''} in {plural(sum(counts[name] for name in kind), 'row')} "
            f"({_places(columns, labels, kind)})"
            for kind in (numbers, words)
        )
        yield (
            f"labels are numbers in some rows and words in others: {' and '.join(shown)}; each is a class of its own: is one "
            "label written in two ways? `data.labels` names all classes and refuses others"
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
    if len(ignored := names[(counts["train"] > 0) & (_weighed(train, len(names)) == 0)]):
        warnings.append(f"every row of train with label {listed(ignored)} has weight 0: nothing is learnt from it")
    for index in np.flatnonzero(counts["train"] == 1)[:_SHOWN]:
        row = np.flatnonzero(train.labels == index if labels.task == "single-label" else train.labels[:, index])[0]
        warnings.append(f"label {names[index]!r} occurs once in train ({train.table.where(int(row))})")
    more = int((counts["train"] == 1).sum()) - _SHOWN
    if more > 0:
        warnings.append(f"{more} more labels occur once in train")


def _weighed(train: Examples, width: int) -> Array:
    """Sum of the weights of each label's rows, (K,)."""
    weights = np.ones(len(train.labels)) if train.weights is None else train.weights
    return np.bincount(train.labels, weights, width) if train.labels.ndim == 1 else weights @ train.labels


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
    numbers = {name: as_number(name) for name in labels.names}
    missing = [n for n, number in numbers.items() if n.casefold() in _MISSING or (number is not None and isinf(number))]
    others = [number for name, number in numbers.items() if name not in missing]
    for name in missing:
        place = _place(columns, labels, name)
        if others and None not in others:
            raise DataError(
                f"{place}: label {name!r} among numbers: is the label missing?",
                "label these rows or remove them; if it is a class, name all classes in `data.labels`",
            )
        if name.casefold() not in _MISSING:
            continue
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


def _places(columns: Sequence[LabelColumns], labels: Labels, names: Collection[str]) -> str:
    """Where the first rows with one of `names` came from, in each source."""
    wanted = pa.array(sorted(names), pa.large_string())
    places = []
    for column in columns:
        if labels.task == "single-label":
            texts, rows = column.text(), np.arange(len(column.table))
        else:
            texts, rows = column.lists()
        mine = rows[pc.fill_null(pc.is_in(texts, wanted), False).to_numpy(zero_copy_only=False)]
        if len(mine):
            places.append(list_places(column.table, mine))
    return "; ".join(places)


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
