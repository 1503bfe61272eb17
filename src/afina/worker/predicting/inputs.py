"""Files to predict on: checked once from end to end, then read again chunk by chunk. Memory is that of one chunk.

Files are read by the prepare stage's readers (`afina.worker.data.tables.readers`), so what one accepts the other accepts. A chunk is a
number of rows and may span files; the n-th chunk is found by reading from the beginning, 0.2 to 0.7 million short rows a second.
Columns are copied to the output in these types: CSV and TSV text; JSON Lines text, whole numbers, numbers, true/false, and JSON
text for what is mixed or nested; Parquet as it is.

Not covered: JSON that is not JSON Lines is read whole.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from afina.errors import DataError, InputError
from afina.formats.columnar import is_list
from afina.formats.read_options import PLAIN, ReadOptions, format_of
from afina.worker.data.tables.readers import open_reader
from afina.worker.data.tables.row_batches import FileReader, RowBatch, note_texts
from afina.worker.data.tables.words import given_words, raw_values, row_texts

__all__ = ["CHUNK_BYTES", "Chunk", "Inputs", "check_columns", "examine", "read_chunks"]

Array = np.ndarray[Any, Any]

#: A chunk ends after so many bytes of its columns too: rows may be long.
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Inputs:
    """The rows to predict on.

    Attributes:
        files: in order.
        text: the columns of texts.
        others: further columns that are copied to the output, where a file has them; None: all.
        schema: of the columns that are copied to the output, of all files together.
        chunks: rows of each chunk.
        reading: how the files are read.
        warnings: what was odd in them.
        words: lists of words are texts, as in a token classification.
    """

    files: tuple[Path, ...]
    text: tuple[str, ...]
    others: tuple[str, ...] | None
    schema: pa.Schema
    chunks: tuple[int, ...]
    reading: ReadOptions = PLAIN
    warnings: tuple[str, ...] = ()
    words: bool = False

    @property
    def rows(self) -> int:
        return sum(self.chunks)

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [str(path) for path in self.files],
            "text": self.text,
            "others": self.others,
            "schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
            "chunks": self.chunks,
            "reading": self.reading.given(),
            "warnings": self.warnings,
            "words": self.words,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Inputs:
        return cls(
            tuple(map(Path, record["files"])),
            tuple(record["text"]),
            tuple(record["others"]) if record["others"] is not None else None,
            pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record["schema"]))),
            tuple(record["chunks"]),
            ReadOptions.model_validate(record.get("reading", {})),
            tuple(record.get("warnings", ())),
            record.get("words", False),
        )


@dataclass(frozen=True)
class Chunk:
    """N rows.

    Attributes:
        number: of the chunk.
        texts: of each column of texts, large_string (N,).
        table: the columns that are copied to the output.
        file: number of each row's file, int64 (N,).
        row: number of each row in its file, as its reader counts, int64 (N,).
        divided: where the words of each text are that is a list of words, int32 (n, 2), else None; (N,).
        units: the word for a row of each file: row, line, record.
    """

    number: int
    texts: list[pa.Array]
    table: pa.Table
    file: Array
    row: Array
    divided: Array
    units: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.row)

    def part(self, number: int, rows: slice) -> Chunk:
        """Some of the rows as a part of chunk `number`."""
        start, count = rows.start, rows.stop - rows.start
        texts = [column.slice(start, count) for column in self.texts]
        table = self.table.slice(start, count)
        return Chunk(number, texts, table, self.file[rows], self.row[rows], self.divided[rows], self.units)

    def where(self, index: int, files: Sequence[Path]) -> str:
        """`reviews.csv, row 12`."""
        file = int(self.file[index])
        return f"{files[file]}, {self.units[file]} {self.row[index]}"


def check_columns(
    files: Sequence[Path], text: Sequence[str], taken: Collection[str], reading: ReadOptions = PLAIN
) -> None:
    """Examine the first rows of each file, before anything reads all of them.

    Args:
        taken: names of columns that the predictions need.

    Raises:
        DataError, InputError: a column of texts is missing, or a column has the name of one that the predictions need.
    """
    for path in files:
        reader = open_reader(path, reading)
        first = next(iter(reader.batches(text, None)), None)
        for name in first.values if first is not None else ():
            if name in taken:
                raise InputError(
                    f"{path}: has a column `{name}`, which the predictions need",
                    "rename it, or leave the input's columns out: --keep id",
                )


def examine(
    files: Sequence[Path],
    text: Sequence[str],
    others: Sequence[str] | None,
    chunk_rows: int,
    reading: ReadOptions = PLAIN,
    *,
    words: bool = False,
) -> Inputs:
    """Check all files from end to end, and divide their rows into chunks of at most `chunk_rows`.

    Args:
        words: as in `Inputs`.

    Raises:
        DataError: with file and row.
    """
    divider = _Divider(chunk_rows)
    schemas: list[pa.Schema] = []
    warnings: list[str] = []
    for path in files:
        fields: dict[str, pa.DataType] = {}
        reader = open_reader(path, reading)
        for batch in reader.batches(text, others):
            texts = [_texts(reader, name, batch, words) for name in text]
            if words:
                _words(reader, text[0], batch)
            for name, column in zip(text, texts, strict=True):
                note_texts(reader.notes, column, batch.row, name)
            copied = [name for name in batch.values if others is None or name in others]
            columns = {name: reader.typed(name, batch) for name in copied}
            for name, column in columns.items():
                fields[name] = _merged(fields.get(name), column.type)
            held = list(columns.values()) if others is None else [*texts, *columns.values()]
            divider.add(len(batch), sum(column.nbytes for column in held))
        schemas.append(pa.schema([(name, _known(reader, name, kind)) for name, kind in fields.items()]))
        warnings += reader.notes.warnings(path, reader.unit)
    chunks = divider.chunks()
    if not chunks:
        named = ", ".join(map(str, files[:3])) + (", …" if len(files) > 3 else "")
        raise DataError(f"{named}: no rows", "give a file that has rows")
    return Inputs(
        tuple(files),
        tuple(text),
        tuple(others) if others is not None else None,
        _united(files, schemas),
        chunks,
        reading,
        tuple(warnings),
        words,
    )


def read_chunks(inputs: Inputs, files: Sequence[Path], wanted: Collection[int]) -> Iterator[Chunk]:
    """The chunks whose numbers are `wanted`, in ascending order.

    Args:
        files: paths to read from: standard input is a copy elsewhere.

    Raises:
        DataError: a file is not what it was when it was examined.
    """
    ends = np.cumsum(inputs.chunks)
    last, start, number = max(wanted), 0, 0
    parts: list[Chunk] = []
    units: dict[int, str] = {}
    for file, path in enumerate(files):
        reader = open_reader(path, inputs.reading)
        units[file] = reader.unit
        for batch in reader.batches(inputs.text, inputs.others):
            at, whole = 0, None  # made once, if a part of it is wanted
            while at < len(batch):
                stop = min(len(batch), at + int(ends[number]) - start)
                if number in wanted:
                    whole = whole or _whole(inputs, reader, batch, file)
                    parts.append(whole.part(number, slice(at, stop)))
                at, start = stop, start + stop - at
                if start == ends[number]:
                    if parts:
                        yield _joined(parts, units)
                    parts, number = [], number + 1
                    if number > last:
                        return
    raise DataError(
        f"{', '.join(map(str, files))}: {start:,} rows, {inputs.rows:,} were there before",
        "was it changed while it was read? put it back",
    )


class _Divider:
    """Counts rows and bytes, and divides them into chunks."""

    def __init__(self, chunk_rows: int) -> None:
        self._chunk_rows = chunk_rows
        self._chunks: list[int] = []
        self._rows = self._bytes = 0

    def add(self, rows: int, nbytes: int) -> None:
        """The next rows, which have `nbytes` together."""
        each = -(-nbytes // max(1, rows))
        while rows:
            room = max(1, -(-(CHUNK_BYTES - self._bytes) // max(1, each)))
            taken = min(rows, self._chunk_rows - self._rows, room)
            self._rows, self._bytes, rows = self._rows + taken, self._bytes + taken * each, rows - taken
            if self._rows == self._chunk_rows or self._bytes >= CHUNK_BYTES:
                self._chunks.append(self._rows)
                self._rows = self._bytes = 0

    def chunks(self) -> tuple[int, ...]:
        return (*self._chunks, self._rows) if self._rows else tuple(self._chunks)


def _whole(inputs: Inputs, reader: FileReader, batch: RowBatch, file: int) -> Chunk:
    """The rows of a batch, of no chunk yet."""
    count = len(batch)
    columns = [
        reader.typed(field.name, batch, field.type) if field.name in batch.values else pa.nulls(count, field.type)
        for field in inputs.schema
    ]
    texts = [_texts(reader, name, batch, inputs.words) for name in inputs.text]
    table = pa.table(columns, schema=inputs.schema)
    divided = _words(reader, inputs.text[0], batch) if inputs.words else np.full(count, None, object)
    return Chunk(-1, texts, table, np.full(count, file), batch.row, divided, {})


def _texts(reader: FileReader, name: str, batch: RowBatch, words: bool) -> pa.Array:
    """A column of texts; of a CoNLL file its words with one space between them, and where `words` of lists of words in other files too."""
    words = format_of(reader.path) == "conll" or (words and _has_lists(batch.values[name]))
    return row_texts(reader, name, batch, words=words)


def _has_lists(values: Any) -> bool:
    """True if a column, as a reader gives it, has lists of words."""
    if isinstance(values, pa.Array):
        return is_list(values.type)
    return any(isinstance(value, list) for value in values)


def _words(reader: FileReader, name: str, batch: RowBatch) -> Array:
    """Where the words of each text are that is a list of words, see `given_words`."""
    if not _has_lists(batch.values[name]):
        return np.full(len(batch), None, object)
    return given_words(
        raw_values(reader, name, batch), lambda number: f"{reader.path}, {reader.unit} {batch.row[number]}"
    )


def _joined(parts: Sequence[Chunk], units: Mapping[int, str]) -> Chunk:
    texts = [pa.concat_arrays(columns) for columns in zip(*(part.texts for part in parts), strict=True)]
    table = pa.concat_tables([part.table for part in parts]).combine_chunks()
    file, row, divided = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("file", "row", "divided")
    )
    return Chunk(parts[0].number, texts, table, file, row, divided, dict(units))


# -- types ------------------------------------------------------------------------------------------------------------


def _merged(before: pa.DataType | None, now: pa.DataType) -> pa.DataType:
    """Of two batches of a file; only in JSON can they differ."""
    if before is None or before == now or pa.types.is_null(before):
        return now
    if pa.types.is_null(now):
        return before
    numbers = {pa.int64(), pa.float64()}
    return pa.float64() if {before, now} == numbers else pa.string()


def _known(reader: FileReader, name: str, kind: pa.DataType) -> pa.DataType:
    """JSON without any value is text, and so are whole numbers beside fractions if a double cannot hold them; a Parquet column
    of nulls stays one."""
    if pa.types.is_floating(kind) and name in reader.wide:
        return pa.string()
    return pa.string() if pa.types.is_null(kind) and reader.unit != "row" else kind


def _united(files: Sequence[Path], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema for all files: columns that one lacks are null there, whole numbers become numbers beside numbers."""
    whole = schemas[0]
    for path, schema in zip(files[1:], schemas[1:], strict=True):
        for column in schema:
            at = whole.get_field_index(column.name)
            if at < 0:
                whole = whole.append(column)
                continue
            before = whole.field(at)
            if before.type != column.type:
                try:
                    merged = pa.unify_schemas([pa.schema([before]), pa.schema([column])], promote_options="permissive")
                except (pa.ArrowInvalid, pa.ArrowTypeError):
                    raise DataError(
                        f"{path}: column `{column.name}` is {column.type}, in {files[0]} it is {before.type}",
                        "predict these files apart, or keep only row numbers: --keep id",
                    ) from None
                whole = whole.set(at, merged.field(0))
    return whole
