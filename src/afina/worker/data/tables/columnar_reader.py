"""The reader of Parquet and Arrow files; see `afina.worker.data.tables.readers`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError
from afina.formats.columnar import is_list, open_columnar
from afina.formats.columns import check_columns
from afina.formats.json_rows import number_text
from afina.formats.notes import Notes
from afina.formats.read_options import ReadOptions
from afina.formats.rows import not_a_text
from afina.worker.data.tables.row_batches import BATCH_BYTES, BATCH_ROWS, RowBatch, as_text, choose_columns

__all__ = ["ColumnarReader"]

Array = np.ndarray[Any, Any]


class ColumnarReader:
    unit = "row"

    def __init__(self, path: Path, reading: ReadOptions) -> None:
        self.path, self.notes = path, Notes()
        self.wide: set[str] = set()
        with open_columnar(path) as file:
            self._classes = file.classes

    def classes(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {name: tuple(known) for name in names if (known := self._classes_of(name)) is not None}

    def _classes_of(self, name: str) -> list[str] | None:
        """The label names that a column, or the list of which it is an element, declares."""
        return self._classes.get(name) or self._classes.get(re.sub(r"(\.\d+)+$", "", name))

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        done = 0
        with open_columnar(self.path) as file:
            listed = [n for n in wanted if n not in file.names and file.has(n)]
            known = choose_columns(self.path, [*file.names, *listed], wanted, others)
            names = [name for name in known if name in file.top or name in wanted]
            twice = [name for name in (*wanted, *(others or ())) if name in file.repeated]
            check_columns(self.path, twice, file.schema.names, "")
            for columns in file.batches(names, BATCH_ROWS, BATCH_BYTES):
                for name, column in columns.items():
                    _check_utf8(self.path, name, column, done)
                count = len(next(iter(columns.values())))
                yield RowBatch(columns, np.arange(done + 1, done + count + 1))
                done += count

    def values(self, name: str, batch: RowBatch) -> pa.Array:
        return _plain(self.path, name, batch.values[name], self._classes_of(name))

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
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if is_list(kind):
        inner = _plain(path, name, pc.list_flatten(column), classes)
        if pa.types.is_list(inner.type):
            raise _unreadable(path, name, kind)
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
    if pa.types.is_decimal(kind) and kind.scale <= 0:
        return column.cast(pa.large_string())
    if pa.types.is_float32(kind):  # 0.1 as it is written, not 0.10000000149011612
        return column.cast(pa.large_string()).cast(pa.float64())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):  # how Impala and old Spark write texts
        try:
            return column.cast(pa.large_string())
        except pa.ArrowInvalid:
            raise DataError(
                f"{path}, row {_undecodable_value(column) + 1}: column `{name}` holds bytes that are not UTF-8",
                "write the column as text",
            ) from None
    if pa.types.is_temporal(kind):
        return column.cast(pa.large_string())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind) or kind == pa.string_view():
        return column.cast(pa.large_string())
    raise _unreadable(path, name, kind)


def _unreadable(path: Path, name: str, kind: pa.DataType) -> DataError:
    remedy = "text, number, true/false or a list of texts can be read"
    if pa.types.is_struct(kind) and kind.num_fields:
        remedy += f"; of an object name one value: `{name}.{kind.field(0).name}`"
    return DataError(f"{path}: column `{name}` is of type {kind}", remedy)
