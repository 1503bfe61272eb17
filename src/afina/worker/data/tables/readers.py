"""Readers of data files, one batch of rows at a time, in columns: CSV and TSV, JSON, Parquet and Arrow, plain text.

The prepare stage and prediction read through these; `afina.formats` parses. Memory is that of one batch, whatever the file's size,
except for JSON that is not JSON Lines, which is parsed whole.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from afina.errors import DataError
from afina.formats.columns import distinct, flatten, value_at
from afina.formats.conll import column_names, read_conll
from afina.formats.delimited import read_delimited
from afina.formats.json_rows import check_characters, json_kind, json_unit, number_text, read_json, records_below
from afina.formats.notes import Notes
from afina.formats.read_options import PLAIN, ReadOptions, format_of
from afina.formats.rows import not_a_text
from afina.formats.text_files import open_text
from afina.worker.data.tables.columnar_reader import ColumnarReader
from afina.worker.data.tables.row_batches import BATCH_BYTES, BATCH_ROWS, FileReader, RowBatch, choose_columns

__all__ = ["open_reader"]

Array = np.ndarray[Any, Any]


def open_reader(path: Path, reading: ReadOptions = PLAIN) -> FileReader:
    return _READERS[format_of(path) or ""](path, reading)


# -- CSV and TSV, text ------------------------------------------------------------------------------------------------


class _Delimited:
    unit = "row"

    def __init__(self, path: Path, reading: ReadOptions) -> None:
        self.path, self.reading, self.notes = path, reading, Notes()
        self.wide: set[str] = set()

    def classes(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        rows = read_delimited(self.path, self.reading, self.notes)
        _, header = next(rows)
        names = choose_columns(self.path, header, wanted, others)
        columns = distinct(header)
        places = [columns.index(name) for name in names]
        return _text_batches(names, ([cells[place] for place in places] for _, cells in rows))

    def values(self, name: str, batch: RowBatch) -> pa.Array:
        return batch.values[name]

    def column(self, name: str, values: Sequence[Any], row: Array) -> pa.Array:
        return pa.concat_arrays([pa.array([], pa.large_string()), *values])

    def texts(self, name: str, batch: RowBatch) -> pa.Array:
        return batch.values[name]

    def typed(self, name: str, batch: RowBatch, dtype: pa.DataType | None = None) -> pa.Array:
        return batch.values[name].cast(dtype or pa.string())


class _Lines(_Delimited):
    """Text, one row a line; of a pair, two texts with a tab between."""

    unit = "line"

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        return _text_batches(wanted, self._rows(len(wanted)))

    def _rows(self, width: int) -> Iterator[list[str]]:
        with open_text(self.path, self.reading, newline="\n") as file:
            for number, line in enumerate(file, 1):
                texts = line.removesuffix("\n").removesuffix("\r").split("\t", width - 1)
                if len(texts) < width:
                    raise DataError(
                        f"{self.path}, line {number}: {len(texts)} of {width} texts",
                        "write all texts of a row on one line with a tab between",
                    )
                yield texts


def _text_batches(names: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[RowBatch]:
    taken: list[Sequence[str]] = []
    last = size = 0
    for last, cells in enumerate(rows, 1):
        taken.append(cells)
        size += sum(map(len, cells))
        if len(taken) == BATCH_ROWS or size > BATCH_BYTES:
            yield _text_batch(names, taken, last)
            taken, size = [], 0
    if taken:
        yield _text_batch(names, taken, last)


def _text_batch(names: Sequence[str], rows: Sequence[Sequence[str]], last: int) -> RowBatch:
    columns = zip(*rows, strict=True)
    values = {name: pa.array(column, pa.large_string()) for name, column in zip(names, columns, strict=True)}
    return RowBatch(values, np.arange(last - len(rows) + 1, last + 1))


# -- JSON -------------------------------------------------------------------------------------------------------------


class _Json:
    def __init__(self, path: Path, reading: ReadOptions) -> None:
        self.path, self.reading, self.notes = path, reading, Notes()
        self.wide: set[str] = set()
        self.unit = json_unit(path, reading)

    def classes(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        names: dict[str, None] = {}
        nested = {name for name in (*wanted, *(others or ())) if "." in name}
        columns: dict[str, list[Any]] = {name: [] for name in (nested if others is None else (*wanted, *others))}
        rows: list[int] = []
        first: dict[str, Any] = {}
        number = size = count = 0
        for number, record in read_json(self.path, self.reading):
            first = first or record
            count += 1
            names.update(dict.fromkeys(record))
            if others is None:
                for name in record.keys() - columns.keys():
                    columns[name] = [None] * len(rows)
            rows.append(number)
            for name, column in columns.items():
                value = record.get(name) if name not in nested else value_at(record, name)
                if isinstance(value, str):
                    size += len(value)
                    if len(value) < 64:  # most likely a label: thousands of rows share one
                        value = sys.intern(value)
                if value is not None and name in nested:
                    names[name] = None
                column.append(value)
            if len(rows) == BATCH_ROWS or size > BATCH_BYTES:
                yield self._batch(columns, names, wanted, rows)
                columns, rows, size = {name: [] for name in columns}, [], 0
        if number:
            self._check(names, first, count, wanted, others)
        if rows:
            yield self._batch(columns, names, wanted, rows)

    def _check(
        self,
        columns: Mapping[str, None],
        first: Mapping[str, Any],
        count: int,
        wanted: Sequence[str],
        others: Sequence[str] | None,
    ) -> None:
        if not columns.keys() >= set(wanted):
            if count == 1 and (below := records_below(self.path, first)):
                raise below
            columns = {**columns, **dict.fromkeys(flatten(first, lists=True))}  # nested ones, for the hint
        choose_columns(self.path, list(columns), wanted, others)

    def _batch(
        self, columns: dict[str, list[Any]], names: Mapping[str, None], wanted: Sequence[str], rows: list[int]
    ) -> RowBatch:
        values = {name: columns[name] for name in names if name in columns}
        for name in wanted:
            values.setdefault(name, [None] * len(rows))
        return RowBatch(values, np.array(rows, np.int64))

    def values(self, name: str, batch: RowBatch) -> list[Any]:
        return batch.values[name]  # type: ignore[no-any-return]

    def column(self, name: str, values: Sequence[Any], row: Array) -> pa.Array:
        all_values = [value for some in values for value in some]
        with self._whole_characters(name, all_values, row):
            return _json_column(self.path, name, all_values, row, self.unit)

    def texts(self, name: str, batch: RowBatch) -> pa.Array:
        values = batch.values[name]
        for number, value in zip(batch.row, values, strict=True):
            if isinstance(value, list | dict):
                raise not_a_text(self.path, self.unit, number, name, json_kind(value))
        texts = list(map(_text, values))
        with self._whole_characters(name, values, batch.row):
            return pa.array(texts, pa.large_string())

    def typed(self, name: str, batch: RowBatch, dtype: pa.DataType | None = None) -> pa.Array:
        values = batch.values[name]
        if any(type(value) is int and abs(value) > 2**53 for value in values):
            self.wide.add(name)
        dtype = dtype or _json_type(values)
        if pa.types.is_string(dtype):
            values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        elif pa.types.is_floating(dtype):
            values = [v if v is None else float(v) for v in values]
        with self._whole_characters(name, batch.values[name], batch.row):
            return pa.array(values, dtype)

    @contextlib.contextmanager
    def _whole_characters(self, name: str, values: Sequence[Any], row: Array) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError:
            for number, value in zip(row, values, strict=True):
                check_characters(self.path, self.unit, number, {name: value})
            raise


def _json_type(values: Sequence[Any]) -> pa.DataType:
    """Whole numbers, numbers, true/false are kept as such; mixed and nested values become text (JSON)."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.null()
    if kinds == {bool}:
        return pa.bool_()
    # A whole number beyond 64 bits is kept as text; so is one beside fractions that a double cannot hold.
    most = 2**63 - 1 if kinds == {int} else 2**53
    if kinds <= {int, float} and all(abs(value) <= most for value in values if type(value) is int):
        return pa.int64() if kinds == {int} else pa.float64()
    return pa.string()


def _json_column(path: Path, name: str, values: list[Any], rows: Array, unit: str) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if not kinds or kinds == {str}:
        return pa.array(values, pa.large_string())
    if kinds == {list}:
        texts = [None if value is None else [_text(v) for v in value] for value in values]
        for number, value in zip(rows, values, strict=True):
            if value is not None and any(v is None or isinstance(v, dict | list) for v in value):
                raise DataError(
                    f"{path}, {unit} {number}: column `{name}` is not a plain list of values",
                    'for example ["a", "b"]; spans of entities have `task: token-classification`',
                )
        return pa.array(texts, pa.list_(pa.large_string()))
    if list in kinds or dict in kinds:
        place = next(
            i for i, v in enumerate(values) if isinstance(v, dict) or (isinstance(v, list) and kinds != {list})
        )
        raise DataError(
            f"{path}, {unit} {rows[place]}: column `{name}` holds {json_kind(values[place])} here, other values elsewhere",
            "give every row a value of one kind: text, number, or list of texts",
        )
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds <= {int, float} and pa.types.is_primitive(kind := _json_type(values)):
        return pa.array([v if v is None or kinds == {int} else float(v) for v in values], kind)
    return pa.array([_text(value) for value in values], pa.large_string())


def _text(value: Any) -> str | None:
    """A text as it is; else as `number_text`, so that 1 and 1.0 are one label."""
    return value if isinstance(value, str) or value is None else number_text(value)


class _Conll(_Json):
    """CoNLL files as rows of lists: one a sentence, numbered by its first line."""

    def __init__(self, path: Path, reading: ReadOptions) -> None:
        super().__init__(path, reading)
        self.unit = "line"

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        names: list[str] = []
        columns: list[list[Any]] = []
        rows: list[int] = []
        size = 0
        for number, sentence in read_conll(self.path, self.reading):
            if not names:
                known = column_names(len(sentence))
                names = choose_columns(self.path, known, wanted, others)
                places = [known.index(name) for name in names]
                columns = [[] for _ in names]
            rows.append(number)
            for column, place in zip(columns, places, strict=True):
                column.append(sentence[place])
            size += sum(map(len, sentence[0]))
            if len(rows) == BATCH_ROWS or size > BATCH_BYTES:
                yield RowBatch(dict(zip(names, columns, strict=True)), np.array(rows, np.int64))
                columns, rows, size = [[] for _ in names], [], 0
        if rows:
            yield RowBatch(dict(zip(names, columns, strict=True)), np.array(rows, np.int64))


_READERS: Mapping[str, type[_Delimited] | type[_Json] | type[_Conll] | type[ColumnarReader]] = {
    "csv": _Delimited,
    "tsv": _Delimited,
    "txt": _Lines,
    "jsonl": _Json,
    "conll": _Conll,
    "parquet": ColumnarReader,
    "arrow": ColumnarReader,
}
