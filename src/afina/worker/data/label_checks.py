"""Labels that were found in the data and look as if nobody had wanted them.

Names that the recipe or a `ClassLabel` gives are taken as they are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, nearest
from afina.recipe.schema import Data
from afina.worker.data.labels import LabelColumns, Labels, as_number

__all__ = ["check_found_labels", "nearest_label"]

_SHOWN = 5
#: How programs write that there is no value.
_MISSING = {"nan", "na", "n/a", "#n/a", "<na>", "none", "null", "nat"}
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


def nearest_label(name: str, known: Iterable[str]) -> str:
    """'did you mean …' for the label that is the same but for case, spaces or the way a number is written, else the nearest."""
    names = list(known)
    alike = next((other for other in names if _meaning(other) == _meaning(name)), None)
    return f"did you mean `{alike}`?" if alike is not None else nearest(name, names)


def check_found_labels(labels: Labels, data: Data, columns: Sequence[LabelColumns], warnings: list[str]) -> None:
    """Say which labels are alike, or a missing value in words, or several labels in one text.

    Raises:
        DataError: a number is missing in words (`nan`) where all other labels are numbers; lists of 0 and 1.
    """
    if labels.names is None or len(data.label) > 1 or data.labels is not None:
        return
    if any(data.label[0] in column.table.classes for column in columns):
        return
    if data.label_separator is not None and not any(_holds(column, data.label_separator) for column in columns):
        warnings.append(
            f"no label holds data.label_separator {data.label_separator!r}: every row has one label at most"
        )
    if labels.task == "multi-label":
        _refuse_flags(data.label[0], columns)
    _check_missing(labels, columns, warnings)
    groups: dict[str, list[str]] = {}
    for name in labels.names:
        groups.setdefault(_meaning(name), []).append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    for group in alike[:_SHOWN]:
        said = ", ".join(f"{name!r} ({_place(columns, labels, name)})" for name in group)
        warnings.append(f"labels that look alike are classes of their own: {said}")
    if len(alike) > _SHOWN:
        warnings.append(f"{len(alike) - _SHOWN} more groups of labels look alike")
    lists = [name for name in labels.names if name.startswith("[") and name.endswith("]")]
    if lists:
        warnings.append(
            f"label {lists[0]!r} ({_place(columns, labels, lists[0])}) looks like a list written as text, and is one class: "
            "for several labels a row give lists (JSON, Parquet) or `data.label_separator`"
        )
    commas = [name for name in labels.names if _DECIMAL_COMMA.fullmatch(name)]
    if commas and all(_DECIMAL_COMMA.fullmatch(name) or as_number(name) is not None for name in labels.names):
        warnings.append(
            f"label {commas[0]!r} ({_place(columns, labels, commas[0])}) looks like a number with a decimal comma, and is one "
            "class: for a regression write 1.5"
        )


def _meaning(name: str) -> str:
    number = as_number(name)
    if number is not None and number == number:
        return f"{number:.17g}"
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
                f"{place}: label {name!r} among numbers: is it a label that is missing?",
                "label these rows or remove them; if it is a class, name all classes in `data.labels`",
            )
        warnings.append(
            f"label {name!r} ({place}) is text, and a class of its own; does it mean that there is no label?"
        )


def _refuse_flags(name: str, columns: Sequence[LabelColumns]) -> None:
    """Lists of 0 and 1, all of one length, are no lists of labels."""
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
            "wanted",
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
