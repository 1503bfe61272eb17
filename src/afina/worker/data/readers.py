"""Data files a batch of rows at a time, as they are: CSV and TSV, JSON Lines, Parquet. Errors name file and row.

What is taken of CSV, TSV and JSON Lines, and what is not: see `afina.recipe.formats`. Memory is that of one batch, whatever the file's
size, except for a `.json` file that is one array: it is parsed whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from afina.errors import DataError
from afina.recipe.formats import (
    check_characters,
    check_columns,
    json_kind,
    json_unit,
    no_text,
    number_text,
    read_delimited,
    read_json,
)
from afina.run.plan import DATA_SUFFIXES

__all__ = ["Batch", "Reader", "as_text", "class_names", "open_reader", "readable", "to_texts"]

Array = np.ndarray[Any, Any]

#: A batch ends at so many rows or bytes (characters of JSON), whichever comes first.
_BATCH_ROWS = 2048
_BATCH_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Some rows of a file.

    Attributes:
        values: by column, as the format has them: a list or an Arrow array of N values.
        row: number of each row, int64 (N,): in CSV, TSV and Parquet the data row, counted from 1 without the header (blank
            lines not counted); in JSON Lines the line.
    """

    values: Mapping[str, Any]
    row: Array


class Reader(Protocol):
    """One file of one format.

    Attributes:
        unit: what its rows are called: row, line, record.
    """

    unit: str

    def classes(self, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Label names, in their order, of the columns that declare them (`ClassLabel`)."""

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        """All rows, these columns.

        Raises:
            DataError: a column is missing or there twice, a row is ragged, bytes are not UTF-8, JSON is broken; with file
                and row.
        """

    def column(self, name: str, pieces: Sequence[Any], row: Array) -> pa.Array:
        """A whole column from the values of all batches: large_string, int64, double, bool or list<large_string>; null where
        there was no value."""

    def texts(self, name: str, batch: Batch) -> pa.Array:
        """A column of one batch as texts, large_string; each depends on its own value only, and nothing is trimmed."""


def open_reader(path: Path) -> Reader:
    return _READERS[DATA_SUFFIXES[path.suffix.lower()]](path)


def as_text(column: pa.Array) -> pa.Array:
    """Any scalar column as large_string: 1 is "1", true is "true", 1.0 is "1", 0.5 is "0.5", NaN is null; texts are trimmed."""
    if pa.types.is_boolean(column.type):
        return pc.if_else(column, pa.scalar("true", pa.large_string()), pa.scalar("false", pa.large_string()))
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**53))
        if pc.all(pc.fill_null(whole, True)).as_py():
            column = column.cast(pa.int64())
    return pc.utf8_trim_whitespace(column.cast(pa.large_string()))


def to_texts(column: pa.Array) -> pa.Array:
    """A column of texts, numbers, or true and false as large_string: 1 is "1", true is "true", 1.0 is "1", 0.5 is "0.5", NaN is
    null; each depends on its own value only, and nothing is trimmed."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    if pa.types.is_floating(column.type):
        return pa.array([None if v is None else number_text(v) for v in column.to_pylist()], pa.large_string())
    return as_text(column) if pa.types.is_boolean(column.type) else column.cast(pa.large_string())


def _check_columns(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    check_columns(path, wanted, found, wanted, "correct `data.text`, `data.label` or `data.id` in the recipe")


# -- CSV and TSV ------------------------------------------------------------------------------------------------------


class _Delimited:
    unit = "row"

    def __init__(self, path: Path) -> None:
        self.path = path

    def classes(self, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        rows = read_delimited(self.path)
        _, start, header = next(rows)
        _check_columns(self.path, wanted, header)
        places = [header.index(name) for name in wanted]
        taken: list[list[str]] = [[] for _ in wanted]
        first, number = 1, 0
        for number, end, cells in rows:
            for values, place in zip(taken, places, strict=True):
                values.append(cells[place])
            if number - first + 1 == _BATCH_ROWS or end - start > _BATCH_BYTES:
                yield _texts_batch(wanted, taken, first, number)
                taken, first, start = [[] for _ in wanted], number + 1, end
        if number >= first:
            yield _texts_batch(wanted, taken, first, number)

    def column(self, name: str, pieces: Sequence[Any], row: Array) -> pa.Array:
        return pa.concat_arrays([pa.array([], pa.large_string()), *pieces])

    def texts(self, name: str, batch: Batch) -> pa.Array:
        return batch.values[name]


def _texts_batch(wanted: Sequence[str], columns: Sequence[list[str]], first: int, last: int) -> Batch:
    values = {name: pa.array(column, pa.large_string()) for name, column in zip(wanted, columns, strict=True)}
    return Batch(values, np.arange(first, last + 1))


# -- JSON Lines -------------------------------------------------------------------------------------------------------


class _Json:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.unit = json_unit(path)

    def classes(self, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        found: dict[str, None] = {}
        values: dict[str, list[Any]] = {name: [] for name in wanted}
        numbers: list[int] = []
        number = size = 0
        for number, _, record in read_json(self.path):
            found.update(dict.fromkeys(record))
            numbers.append(number)
            for name in wanted:
                value = record.get(name)
                if isinstance(value, str):
                    size += len(value)
                    if len(value) < 64:  # most likely a label: thousands of rows share one
                        value = sys.intern(value)
                values[name].append(value)
            if len(numbers) == _BATCH_ROWS or size > _BATCH_BYTES:
                yield Batch(values, np.array(numbers, np.int64))
                values, numbers, size = {name: [] for name in wanted}, [], 0
        if number:
            _check_columns(self.path, wanted, list(found))
        if numbers:
            yield Batch(values, np.array(numbers, np.int64))

    def column(self, name: str, pieces: Sequence[Any], row: Array) -> pa.Array:
        values = [value for piece in pieces for value in piece]
        with self._whole_characters(name, values, row):
            return _json_column(self.path, name, values, row, self.unit)

    def texts(self, name: str, batch: Batch) -> pa.Array:
        values = batch.values[name]
        for number, value in zip(batch.row, values, strict=True):
            if isinstance(value, list | dict):
                raise no_text(self.path, self.unit, number, name, json_kind(value))
        texts = [v if isinstance(v, str) or v is None else number_text(v) for v in values]
        with self._whole_characters(name, values, batch.row):
            return pa.array(texts, pa.large_string())

    @contextlib.contextmanager
    def _whole_characters(self, name: str, values: Sequence[Any], row: Array) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError:
            for number, value in zip(row, values, strict=True):
                check_characters(self.path, self.unit, number, {name: value})
            raise


def _json_column(path: Path, name: str, values: list[Any], rows: Array, unit: str) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if not kinds or kinds == {str}:
        return pa.array(values, pa.large_string())
    if kinds == {list}:
        texts = [None if value is None else [_scalar_text(v) for v in value] for value in values]
        for number, value in zip(rows, values, strict=True):
            if value is not None and any(v is None or isinstance(v, dict | list) for v in value):
                raise DataError(
                    f"{path}, {unit} {number}: column `{name}` is not a plain list of values", 'for example ["a", "b"]'
                )
        return pa.array(texts, pa.list_(pa.large_string()))
    if list in kinds or dict in kinds:
        place = next(
            i for i, v in enumerate(values) if isinstance(v, dict) or (isinstance(v, list) and kinds != {list})
        )
        raise _not_one_kind(path, name, unit, rows[place], values[place])
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds <= {int, float}:
        try:
            return pa.array(values, pa.int64() if kinds == {int} else pa.float64())
        except (OverflowError, pa.ArrowInvalid):
            pass
    return pa.array([None if value is None else _scalar_text(value) for value in values], pa.large_string())


def _not_one_kind(path: Path, name: str, unit: str, row: int, value: Any) -> DataError:
    return DataError(
        f"{path}, {unit} {row}: column `{name}` holds {json_kind(value)} here, other values elsewhere",
        "give every row a value of one kind: text, number, or list of texts",
    )


def _scalar_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# -- Parquet ----------------------------------------------------------------------------------------------------------


class _Parquet:
    unit = "row"

    def __init__(self, path: Path) -> None:
        self.path = path

    def classes(self, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
        with readable(self.path):
            names = class_names(pq.read_schema(self.path).metadata or {})
        return {name: tuple(names[name]) for name in wanted if name in names}

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        done = 0
        # Not memory-mapped, one column chunk after the other: what was read does not stay in this process's memory.
        with readable(self.path), pq.ParquetFile(self.path, buffer_size=_BLOCK_BYTES, pre_buffer=False) as file:
            schema = file.schema_arrow
            _check_columns(self.path, wanted, schema.names)
            names = class_names(schema.metadata or {})
            size = _batch_size(file.metadata, wanted)
            for batch in file.iter_batches(size, columns=list(wanted), use_threads=False):
                yield self._batch(wanted, batch, names, done)
                done += len(batch)
            if not done:
                yield self._batch(wanted, schema.empty_table(), names, 0)

    def _batch(self, wanted: Sequence[str], batch: Any, names: Mapping[str, list[str]], done: int) -> Batch:
        values = {name: _parquet_column(self.path, name, batch.column(name), names.get(name), done) for name in wanted}
        return Batch(values, np.arange(done + 1, done + len(batch) + 1))

    def column(self, name: str, pieces: Sequence[Any], row: Array) -> pa.Array:
        return pa.concat_arrays(pieces)

    def texts(self, name: str, batch: Batch) -> pa.Array:
        column = batch.values[name]
        if pa.types.is_list(column.type):
            raise no_text(self.path, self.unit, batch.row[0] if len(batch.row) else 1, name, "lists")
        return to_texts(column)


def _batch_size(metadata: Any, wanted: Sequence[str]) -> int:
    """Rows of a batch, by what they have on average in the row group where they have most."""
    most = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in wanted)
        most = max(most, size // max(1, group.num_rows))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // most))


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around whatever reads a Parquet file.

    Raises:
        DataError: it is none, or a damaged one, or cannot be opened.
    """
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: {os.strerror(error.errno)}", "check the path and its permissions") from None
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file: {reason}", "copy or write the file again") from None


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """ClassLabel names that `datasets` left in the schema, by column; those of a list of labels too."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    found = {}
    for name, feature in features.items():
        feature = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            found[name] = [str(n) for n in feature["names"]]
    return found


def _parquet_column(path: Path, name: str, column: pa.Array, names: list[str] | None, done: int | None) -> pa.Array:
    """`done`: rows before the first one; None where values are no rows."""
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _parquet_column(path, name, pc.list_flatten(column), names, None)
        lengths = pc.list_value_length(column)
        offsets = np.concatenate([[0], np.cumsum(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False))])
        marks = pa.array(offsets, pa.int32(), mask=np.append(pc.is_null(column).to_numpy(zero_copy_only=False), False))
        return pa.ListArray.from_arrays(marks, as_text(inner))
    if pa.types.is_dictionary(kind):
        return _parquet_column(path, name, column.dictionary_decode(), names, done)
    if pa.types.is_integer(kind) and names is not None:
        # -1 is how datasets writes a label that is not there.
        ids = pc.if_else(pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names))), column, None)
        return pa.array(names, pa.large_string()).take(ids)
    if pa.types.is_boolean(kind):
        return column
    if pa.types.is_uint64(kind):  # may be too large for int64: a hash
        return column.cast(pa.large_string())
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind) or kind == pa.string_view():
        column = column.cast(pa.large_string())
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            place = "" if done is None else f", row {done + _undecodable_value(column) + 1}"
            raise DataError(
                f"{path}{place}: column `{name}` holds bytes that are not UTF-8", "write the file again"
            ) from None
        return column
    raise DataError(
        f"{path}: column `{name}` is of type {kind}", "text, number, true/false or a list of texts can be read"
    )


def _undecodable_value(column: pa.Array) -> int:
    for index, value in enumerate(column.cast(pa.large_binary())):
        try:
            (value.as_py() or b"").decode()
        except UnicodeDecodeError:
            return index
    return 0


_READERS: Mapping[str, type[_Delimited] | type[_Json] | type[_Parquet]] = {
    "csv": _Delimited,
    "tsv": _Delimited,
    "jsonl": _Json,
    "parquet": _Parquet,
}
