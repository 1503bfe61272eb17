"""Readers of data files, one batch of rows at a time: CSV and TSV, JSON Lines, Parquet, plain text. Errors name file and row.

The prepare stage and prediction read through these. How CSV, TSV and JSON Lines are parsed: see `afina.recipe.formats`. Memory is
that of one batch, whatever the file's size, except for a `.json` file that holds one array, which is parsed whole.
"""

from __future__ import annotations

import contextlib
import json
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
from afina.recipe.data_files import DATA_SUFFIXES
from afina.recipe.formats import (
    check_characters,
    check_columns,
    class_names,
    json_kind,
    json_unit,
    not_a_text,
    number_text,
    read_delimited,
    read_json,
    readable_parquet,
    undecodable,
)

__all__ = ["FileReader", "RowBatch", "as_text", "is_blank", "open_reader"]

Array = np.ndarray[Any, Any]

#: A batch ends at so many rows or bytes (characters of text), whichever comes first. Arrow's builders double their buffers: a
#: little more than a power of two costs twice the memory.
_BATCH_ROWS = 2048
_BATCH_BYTES = 1_000_000
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RowBatch:
    """Some rows of a file.

    Attributes:
        values: N values of each column, in the file's order of columns: an Arrow array; of JSON a list.
        row: number of each row, int64 (N,): in CSV, TSV and Parquet the data row, counted from 1 without the header (blank
            lines not counted); in JSON Lines and text the line.
    """

    values: Mapping[str, Any]
    row: Array

    def __len__(self) -> int:
        return len(self.row)


class FileReader(Protocol):
    """One file of one format.

    Attributes:
        unit: the word for its rows in messages: row, line, record.
    """

    unit: str

    def classes(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Label names, in their order, of the columns that declare them (`ClassLabel`)."""

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        """All rows of some columns.

        Args:
            wanted: columns that must be there.
            others: columns that may be missing; None: all that the file has.

        Raises:
            DataError: a column is missing or there twice, a row is ragged, bytes are not UTF-8, JSON is broken; with file
                and row.
        """

    def values(self, name: str, batch: RowBatch) -> Any:
        """A column of one batch, as `column` takes it."""

    def column(self, name: str, values: Sequence[Any], row: Array) -> pa.Array:
        """A whole column from the `values` of all batches: large_string, int64, double, bool or list<large_string>; null where
        there was no value."""

    def texts(self, name: str, batch: RowBatch) -> pa.Array:
        """A column of one batch as texts, large_string; each depends on its own value only, and nothing is trimmed."""

    def typed(self, name: str, batch: RowBatch, dtype: pa.DataType | None = None) -> pa.Array:
        """A column of one batch as prediction copies it to its output: in the file's own type, or in `dtype`."""


def open_reader(path: Path) -> FileReader:
    return _READERS[path.suffix.lower()](path)


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


def is_blank(texts: pa.Array) -> Array:
    """Where nothing but white space is left of a text, or there is none; bool (N,)."""
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)
    return np.asarray(empty.to_numpy(zero_copy_only=False))


def _choose_columns(path: Path, found: Sequence[str], wanted: Sequence[str], others: Sequence[str] | None) -> list[str]:
    """The columns to read, in the file's order."""
    chosen = [name for name in found if others is None or name in wanted or name in others]
    check_columns(
        path,
        wanted,
        found,
        chosen,
        "name another column: `data.text`, `data.label`, `data.id` in a recipe, else --text",
    )
    return chosen


# -- CSV and TSV, text ------------------------------------------------------------------------------------------------


class _Delimited:
    unit = "row"

    def __init__(self, path: Path) -> None:
        self.path = path

    def classes(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        rows = read_delimited(self.path)
        _, header = next(rows)
        names = _choose_columns(self.path, header, wanted, others)
        places = [header.index(name) for name in names]
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
        try:
            with self.path.open(encoding="utf-8", newline="\n") as file:
                for number, line in enumerate(file, 1):
                    texts = line.removesuffix("\n").removesuffix("\r").split("\t", width - 1)
                    if len(texts) < width:
                        raise DataError(
                            f"{self.path}, line {number}: one text, this model reads two",
                            "write both on one line with a tab between",
                        )
                    yield texts
        except UnicodeDecodeError:
            raise undecodable(self.path) from None


def _text_batches(names: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[RowBatch]:
    taken: list[Sequence[str]] = []
    last = size = 0
    for last, cells in enumerate(rows, 1):
        taken.append(cells)
        size += sum(map(len, cells))
        if len(taken) == _BATCH_ROWS or size > _BATCH_BYTES:
            yield _text_batch(names, taken, last)
            taken, size = [], 0
    if taken:
        yield _text_batch(names, taken, last)


def _text_batch(names: Sequence[str], rows: Sequence[Sequence[str]], last: int) -> RowBatch:
    columns = zip(*rows, strict=True)
    values = {name: pa.array(column, pa.large_string()) for name, column in zip(names, columns, strict=True)}
    return RowBatch(values, np.arange(last - len(rows) + 1, last + 1))


# -- JSON Lines -------------------------------------------------------------------------------------------------------


class _Json:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.unit = json_unit(path)

    def classes(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        found: dict[str, None] = {}
        columns: dict[str, list[Any]] = {} if others is None else {name: [] for name in (*wanted, *others)}
        rows: list[int] = []
        number = size = 0
        for number, record in read_json(self.path):
            found.update(dict.fromkeys(record))
            if others is None:
                for name in record.keys() - columns.keys():
                    columns[name] = [None] * len(rows)
            rows.append(number)
            for name, column in columns.items():
                value = record.get(name)
                if isinstance(value, str):
                    size += len(value)
                    if len(value) < 64:  # most likely a label: thousands of rows share one
                        value = sys.intern(value)
                column.append(value)
            if len(rows) == _BATCH_ROWS or size > _BATCH_BYTES:
                yield self._batch(columns, found, wanted, rows)
                columns, rows, size = {name: [] for name in columns}, [], 0
        if number:
            _choose_columns(self.path, list(found), wanted, others)
        if rows:
            yield self._batch(columns, found, wanted, rows)

    def _batch(
        self, columns: dict[str, list[Any]], found: Mapping[str, None], wanted: Sequence[str], rows: list[int]
    ) -> RowBatch:
        values = {name: columns[name] for name in found if name in columns}
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
        texts = [v if isinstance(v, str) or v is None else number_text(v) for v in values]
        with self._whole_characters(name, values, batch.row):
            return pa.array(texts, pa.large_string())

    def typed(self, name: str, batch: RowBatch, dtype: pa.DataType | None = None) -> pa.Array:
        values = batch.values[name]
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
    # A whole number beyond 64 bits is kept as text.
    if kinds <= {int, float} and all(abs(value) < 2**63 for value in values if type(value) is int):
        return pa.int64() if kinds == {int} else pa.float64()
    return pa.string()


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
        raise DataError(
            f"{path}, {unit} {rows[place]}: column `{name}` holds {json_kind(values[place])} here, other values elsewhere",
            "give every row a value of one kind: text, number, or list of texts",
        )
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds <= {int, float}:
        try:
            return pa.array(values, pa.int64() if kinds == {int} else pa.float64())
        except (OverflowError, pa.ArrowInvalid):
            pass
    return pa.array([None if value is None else _scalar_text(value) for value in values], pa.large_string())


def _scalar_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# -- Parquet ----------------------------------------------------------------------------------------------------------


class _Parquet:
    unit = "row"

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable_parquet(path):
            self._classes = class_names(pq.read_schema(path).metadata or {})

    def classes(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {name: tuple(self._classes[name]) for name in names if name in self._classes}

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        done = 0
        # Not memory-mapped, one column chunk after the other: pages that were read do not stay in this process's memory.
        with readable_parquet(self.path), pq.ParquetFile(self.path, buffer_size=_BLOCK_BYTES, pre_buffer=False) as file:
            schema = file.schema_arrow
            names = _choose_columns(self.path, schema.names, wanted, others)
            size = _batch_size(file.metadata, names)
            for batch in file.iter_batches(size, columns=names, use_threads=False):
                yield self._batch(names, batch, done)
                done += len(batch)
            if not done:
                yield self._batch(names, schema.empty_table().combine_chunks(), 0)

    def _batch(self, names: Sequence[str], batch: Any, done: int) -> RowBatch:
        values = {}
        for name in names:
            column = batch.column(name)
            if isinstance(column, pa.ChunkedArray):
                column = column.combine_chunks()
            _check_utf8(self.path, name, column, done)
            values[name] = column
        return RowBatch(values, np.arange(done + 1, done + len(batch) + 1))

    def values(self, name: str, batch: RowBatch) -> pa.Array:
        return _plain(self.path, name, batch.values[name], self._classes.get(name))

    def column(self, name: str, values: Sequence[Any], row: Array) -> pa.Array:
        return pa.concat_arrays(values)

    def texts(self, name: str, batch: RowBatch) -> pa.Array:
        column = self.values(name, batch)
        if pa.types.is_list(column.type):
            raise not_a_text(self.path, self.unit, batch.row[0] if len(batch.row) else 1, name, "lists")
        if pa.types.is_floating(column.type):
            # Not `as_text`, where 1.0 beside 0.5 is not "1": each text depends on its own value only.
            return pa.array([None if v is None else number_text(v) for v in column.to_pylist()], pa.large_string())
        return as_text(column) if pa.types.is_boolean(column.type) else column.cast(pa.large_string())

    def typed(self, name: str, batch: RowBatch, dtype: pa.DataType | None = None) -> pa.Array:
        column = batch.values[name]
        return column if dtype is None or column.type == dtype else column.cast(dtype)


def _batch_size(metadata: Any, names: Sequence[str]) -> int:
    """Rows of a batch, by their mean size in the row group with the largest rows."""
    most = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in names)
        most = max(most, size // max(1, group.num_rows))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // most))


def _check_utf8(path: Path, name: str, column: pa.Array, done: int) -> None:
    """Arrow takes a writer's word for its strings; a row number is given where the column itself holds strings."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        kind = column.type
        strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
        place = f", row {done + _undecodable_value(column) + 1}" if strings else ""
        raise DataError(
            f"{path}{place}: column `{name}` holds bytes that are not UTF-8", "write the file again"
        ) from None


def _undecodable_value(column: pa.Array) -> int:
    for index, value in enumerate(column.cast(pa.large_binary())):
        try:
            (value.as_py() or b"").decode()
        except UnicodeDecodeError:
            return index
    return 0


def _plain(path: Path, name: str, column: pa.Array, classes: list[str] | None) -> pa.Array:
    """A column in one of the types that `FileReader.column` names."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _plain(path, name, pc.list_flatten(column), classes)
        lengths = pc.list_value_length(column)
        offsets = np.concatenate([[0], np.cumsum(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False))])
        marks = pa.array(offsets, pa.int32(), mask=np.append(pc.is_null(column).to_numpy(zero_copy_only=False), False))
        return pa.ListArray.from_arrays(marks, as_text(inner))
    if pa.types.is_dictionary(kind):
        return _plain(path, name, column.dictionary_decode(), classes)
    if pa.types.is_integer(kind) and classes is not None:
        # -1 is how datasets writes a missing label.
        ids = pc.if_else(pc.and_(pc.greater_equal(column, 0), pc.less(column, len(classes))), column, None)
        return pa.array(classes, pa.large_string()).take(ids)
    if pa.types.is_boolean(kind):
        return column
    if pa.types.is_uint64(kind):  # may be too large for int64: a hash
        return column.cast(pa.large_string())
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind) or kind == pa.string_view():
        return column.cast(pa.large_string())
    raise DataError(
        f"{path}: column `{name}` is of type {kind}", "text, number, true/false or a list of texts can be read"
    )


_FORMATS: Mapping[str, type[_Delimited] | type[_Json] | type[_Parquet]] = {
    "csv": _Delimited,
    "tsv": _Delimited,
    "jsonl": _Json,
    "parquet": _Parquet,
}
_READERS = {".txt": _Lines, **{suffix: _FORMATS[name] for suffix, name in DATA_SUFFIXES.items()}}
