"""The rows of a file of any format as dictionaries, for `afina init`. The stages that train and predict read columns instead:
`afina.worker.data.tables.readers`, from the same parsers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from afina.errors import DataError
from afina.formats.columnar import open_columnar
from afina.formats.columns import check_columns, distinct, flatten, other_separator, separator_words
from afina.formats.conll import column_names, read_conll
from afina.formats.delimited import read_delimited
from afina.formats.json_rows import read_json, records_below
from afina.formats.notes import Notes
from afina.formats.read_options import PLAIN, ReadOptions, format_of

__all__ = ["check_file", "not_a_text", "read_rows"]

_BATCH_ROWS, _BATCH_BYTES = 1024, 4_000_000


def read_rows(path: Path, reading: ReadOptions = PLAIN, notes: Notes | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file of any format by column, nested ones as `a.b`; of Parquet and Arrow with the names of class labels.

    Raises:
        DataError: as the reader of the format; the one column of a CSV or TSV looks like several.
    """
    kind = format_of(path)
    if kind == "conll":
        for _, columns in read_conll(path, reading):
            yield dict(zip(column_names(len(columns)), columns, strict=True))
    elif kind in ("parquet", "arrow"):
        yield from _columnar_rows(path)
    elif kind in ("csv", "tsv"):
        rows = read_delimited(path, reading, notes)
        _, header = next(rows)
        if mark := other_separator(path, header, reading.delimiter):
            words, remedy = separator_words(mark)
            raise DataError(f"{path}: the file seems to be separated by {words}", remedy)
        names = distinct(header)
        for _, cells in rows:
            yield dict(zip(names, cells, strict=True))
    else:
        first: dict[str, Any] | None = None
        for number, (_, record) in enumerate(read_json(path, reading)):
            if number == 0:
                first = record
                continue
            if number == 1 and first is not None:
                yield flatten(first, lists=True)
            yield flatten(record, lists=True)
            first = None
        if first is not None:
            if reading.field is None and (error := records_below(path, first)):
                raise error
            yield flatten(first, lists=True)


def _columnar_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_columnar(path) as file:
        for columns in file.batches(file.top, _BATCH_ROWS, _BATCH_BYTES):
            values = {name: column.to_pylist() for name, column in columns.items()}
            for name, classes in file.classes.items():
                if name in values:
                    values[name] = [_class_name(value, classes) for value in values[name]]
            for row in zip(*values.values(), strict=True):
                record = json.loads(json.dumps(dict(zip(values, row, strict=True)), default=_plain))
                yield flatten(record, lists=True)


def _plain(value: Any) -> str | float:
    """Decimals as numbers; dates and bytes as text."""
    return float(value) if isinstance(value, Decimal) else str(value)


def check_file(path: Path, names: Sequence[str], reading: ReadOptions = PLAIN) -> None:
    """Refuse a file that lacks a column, or has it twice; JSON, whose rows may differ, is not checked.

    Raises:
        DataError: as the stages that train and predict would.
    """
    kind = format_of(path)
    if kind in ("parquet", "arrow"):
        with open_columnar(path) as file:
            known = [*file.schema.names, *(name for name in names if name not in file.schema.names and file.has(name))]
    elif kind in ("csv", "tsv"):
        known = next(read_delimited(path, reading))[1]
    elif kind == "conll":
        known = column_names(next((len(columns) for _, columns in read_conll(path, reading)), 2))
    else:
        return
    check_columns(path, names, known, "name another column: --text, --label")


def _class_name(value: Any, classes: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_class_name(v, classes) if isinstance(v, int) and 0 <= v < len(classes) else v for v in value]
    if not isinstance(value, int):
        return value
    return classes[value] if 0 <= value < len(classes) else None


def not_a_text(path: Path, unit: str, number: int, name: str, kind: str) -> DataError:
    """The error for a row that holds `kind` (a list, an object) where a text is expected."""
    return DataError(
        f"{path}, {unit} {number}: column `{name}` holds {kind}, a text is expected",
        "name a column of texts (`data.text`, --text) or of single values (`data.id`); `a.b` is `b` in the object `a`",
    )
