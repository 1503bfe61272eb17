"""Batches of rows: what every reader of data files yields, and how its columns become texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.formats.columns import check_columns, distinct
from afina.formats.notes import Notes
from afina.formats.text_files import note_damaged, note_missing

__all__ = [
    "BATCH_BYTES",
    "BATCH_ROWS",
    "FileReader",
    "RowBatch",
    "as_text",
    "choose_columns",
    "is_blank",
    "note_texts",
]

Array = np.ndarray[Any, Any]

#: A word of letters and digits, as ids are.
_ID = r"^[A-Za-z_.:/-]*[0-9][\w.:/-]*$"

#: A batch ends at so many rows or bytes (characters of text), whichever comes first. Arrow's builders double their buffers: a
#: little more than a power of two costs twice the memory.
BATCH_ROWS = 2048
BATCH_BYTES = 1_000_000


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
        path: of the file.
        unit: the word for its rows in messages: row, line, record.
        notes: what was odd in the rows that have been read.
        wide: columns with whole numbers that a double cannot hold.
    """

    path: Path
    unit: str
    notes: Notes
    wide: set[str]

    def classes(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Label names, in their order, of the columns that declare them (`ClassLabel`)."""

    def batches(self, wanted: Sequence[str], others: Sequence[str] | None = ()) -> Iterator[RowBatch]:
        """All rows of some columns.

        Args:
            wanted: columns that must be there.
            others: columns that may be missing; None: all that the file has.

        Raises:
            DataError: a column is missing or there twice, a row is ragged, bytes are not in the encoding, JSON is broken;
                with file and row.
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


def choose_columns(path: Path, header: Sequence[str], wanted: Sequence[str], others: Sequence[str] | None) -> list[str]:
    """The columns to read, in the file's order; of columns that nobody names a second `a` is `a.1`."""
    named = [*wanted, *(name for name in others or () if name in header)]
    check_columns(
        path, named, header, "name another column: `data.text`, `data.label`, `data.id` in a recipe, else --text"
    )
    return [name for name in distinct(header) if others is None or name in named]


def note_texts(notes: Notes, texts: pa.Array, rows: Array, name: str) -> None:
    """Note texts that a wrong conversion has damaged or that say that there is none, and columns that look like ids.

    Args:
        rows: number of each text's row.
    """
    note_damaged(notes, texts, rows)
    note_missing(notes, texts, rows)
    if len(texts) > 1 and rows[0] == 1:
        like_ids = pc.fill_null(pc.match_substring_regex(texts, _ID), False)
        if pc.all(like_ids).as_py() and len(pc.unique(texts)) == len(texts):
            notes.add(f"column `{name}` looks like ids: is it the one with the texts?")
