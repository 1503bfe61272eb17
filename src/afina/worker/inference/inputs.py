"""Files to predict on: looked through once, cut into chunks, read chunk by chunk. Memory stays that of a chunk.

    CSV, TSV     every cell is text, as in training; a cell that is empty is an empty text
    JSON Lines   text, whole numbers, numbers, true/false; what is mixed or nested becomes text (JSON)
    Parquet      as it is
    text         lines of standard input: column `text`; for pairs two texts with a tab between, `text` and `text_pair`

Looking through is strict (encoding, quotes, number of cells, JSON) and notes where each chunk begins, so that what is wrong
is said before the model is loaded, and any chunk can be read without those before it. A chunk may span files.

Not covered: compressed files; a `.json` file that holds one array is read whole.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from afina.errors import DataError
from afina.recipe.formats import (
    check_characters,
    check_columns,
    json_kind,
    json_unit,
    no_text,
    read_delimited,
    read_json,
    undecodable,
)
from afina.run.plan import DATA_SUFFIXES
from afina.worker.data.readers import open_reader, readable, to_texts

__all__ = ["CHUNK_BYTES", "Inputs", "Reader", "Segment", "as_texts", "look_through"]

#: A chunk ends after so many bytes of a file too: rows may be long.
CHUNK_BYTES = 32 << 20
_BATCH = 8192
_TEXT = {".txt": "text", **DATA_SUFFIXES}


@dataclass(frozen=True)
class Segment:
    """Rows of one file that lie behind each other.

    Attributes:
        file: its number among the inputs.
        first: what users call the first row: the data row from 1, in JSON Lines the line.
        rows: how many.
        start, stop: bytes of the file; of Parquet, row numbers from 0.
    """

    file: int
    first: int
    rows: int
    start: int
    stop: int


@dataclass(frozen=True)
class Inputs:
    """What there is to predict on.

    Attributes:
        files: in order.
        columns: of each file, those that it has.
        schema: of all of them together.
        chunks: segments of each chunk.
        rows: of all chunks.
    """

    files: tuple[Path, ...]
    columns: tuple[tuple[str, ...], ...]
    schema: pa.Schema
    chunks: tuple[tuple[Segment, ...], ...]

    @property
    def rows(self) -> int:
        return sum(segment.rows for chunk in self.chunks for segment in chunk)

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [str(path) for path in self.files],
            "columns": self.columns,
            "schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
            "chunks": [[[s.file, s.first, s.rows, s.start, s.stop] for s in chunk] for chunk in self.chunks],
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Inputs:
        return cls(
            tuple(map(Path, said["files"])),
            tuple(map(tuple, said["columns"])),
            pa.ipc.read_schema(pa.py_buffer(base64.b64decode(said["schema"]))),
            tuple(tuple(Segment(*numbers) for numbers in chunk) for chunk in said["chunks"]),
        )


def look_through(files: Sequence[Path], text: Sequence[str], chunk_rows: int) -> Inputs:
    """Check all files from end to end, and cut them into chunks of `chunk_rows` rows at most.

    Args:
        text: the columns that will be predicted on.

    Raises:
        DataError: with file and row.
    """
    cutter = _Cutter(chunk_rows)
    schemas: list[pa.Schema] = []
    for number, path in enumerate(files):
        try:
            schema = _LOOK[_kind(path)](path, number, text, cutter)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}", "check the path and its permissions") from None
        _check_columns(path, text, schema.names)
        schemas.append(schema)
    if not cutter.rows:
        named = ", ".join(map(str, files[:3])) + (", …" if len(files) > 3 else "")
        raise DataError(f"{named}: no rows", "give a file that has rows")
    names = tuple(tuple(schema.names) for schema in schemas)
    return Inputs(tuple(files), names, _united(files, schemas), cutter.done())


def as_texts(column: pa.ChunkedArray) -> list[str | None]:
    """A column as the tokenizer wants it: texts as they are, other values as in training."""
    return [text for chunk in column.chunks for text in to_texts(chunk).to_pylist()]


class Reader:
    """Reads chunks, best in ascending order: a Parquet file is then decoded once."""

    def __init__(self, inputs: Inputs, files: Sequence[Path] | None = None) -> None:
        """Args:
        files: where they lie, if not where `inputs` says.
        """
        self.inputs, self.files = inputs, tuple(files) if files is not None else inputs.files
        self._tables: dict[int, _ParquetRows] = {}
        self._arrays: dict[int, list[Any]] = {}

    def table(self, chunk: int) -> pa.Table:
        """All rows of a chunk, with the schema of the inputs.

        Raises:
            DataError: a file is not what it was when it was looked through.
        """
        return pa.concat_tables([self._segment(segment) for segment in self.inputs.chunks[chunk]]).combine_chunks()

    def places(self, chunk: int) -> tuple[list[str], list[int]]:
        """File and number of each row."""
        segments = self.inputs.chunks[chunk]
        files = [str(self.inputs.files[s.file]) for s in segments for _ in range(s.rows)]
        return files, [s.first + i for s in segments for i in range(s.rows)]

    def _segment(self, segment: Segment) -> pa.Table:
        path = self.files[segment.file]
        try:
            table = self._read(path, _kind(path), segment)
        except (OSError, pa.ArrowInvalid, ValueError) as error:
            raise DataError(f"{path}: cannot be read any more: {error}", "was it changed? put it back") from None
        if len(table) != segment.rows:
            raise DataError(
                f"{path}: {len(table)} rows from row {segment.first} on, {segment.rows} were there before",
                "was it changed while it was read? put it back",
            )
        missing = [name for name in self.inputs.schema.names if name not in table.column_names]
        for name in missing:
            table = table.append_column(name, pa.nulls(len(table)))
        return table.select(self.inputs.schema.names).cast(self.inputs.schema)

    def _read(self, path: Path, kind: str, segment: Segment) -> pa.Table:
        if kind == "parquet":
            for other in [number for number in self._tables if number != segment.file]:
                del self._tables[other]
            rows = self._tables.setdefault(segment.file, _ParquetRows(path))
            return rows.take(segment.start, segment.stop)
        names = self.inputs.columns[segment.file]
        if kind == "jsonl" and json_unit(path) == "record":
            if segment.file not in self._arrays:
                self._arrays = {segment.file: json.loads(path.read_text(encoding="utf-8-sig"))}
            records = self._arrays[segment.file][segment.start : segment.stop]
            return _records_table(records, names, self.inputs.schema)
        with path.open("rb") as file:
            file.seek(segment.start)
            raw = file.read(segment.stop - segment.start)
        if kind == "jsonl":
            lines = (line for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip())
            return _records_table([json.loads(line) for line in lines], names, self.inputs.schema)
        if kind == "text":
            texts = [line.removesuffix(b"\r").decode() for line in raw.removesuffix(b"\n").split(b"\n")]
            cells = zip(*(line.split("\t", len(names) - 1) for line in texts), strict=True)
            return pa.table(dict(zip(names, map(list, cells), strict=True)))
        return _parse_delimited(raw, "\t" if kind == "tsv" else ",", names)


# -- where chunks begin -----------------------------------------------------------------------------------------------


@dataclass
class _Cutter:
    """Takes rows one after the other and cuts them into chunks."""

    chunk_rows: int
    rows: int = 0
    _chunks: list[tuple[Segment, ...]] = field(default_factory=list)
    _open: list[Segment] = field(default_factory=list)
    _row: list[int] = field(default_factory=lambda: [-1, 0, 0, 0, 0])
    _filled: int = 0
    _bytes: int = 0

    def add(self, file: int, number: int, start: int, stop: int, size: int | None = None) -> None:
        """One row that lies from `start` to `stop`."""
        self._open_at(file, number, start)
        self._take(1, stop, stop - start if size is None else size)

    def _open_at(self, file: int, number: int, start: int) -> None:
        # A blank line of JSON Lines is a number left out: numbers of a segment follow each other.
        if self._row[0] != file or number != self._row[1] + self._row[2]:
            self._close()
            self._row = [file, number, 0, start, start]

    def _take(self, rows: int, stop: int, size: int) -> None:
        self._row[2] += rows
        self._row[4] = stop
        self.rows += rows
        self._filled += rows
        self._bytes += size
        if self._filled >= self.chunk_rows or self._bytes >= CHUNK_BYTES:
            self._cut()

    def add_rows(self, file: int, at: int, count: int, size: int) -> None:
        """Rows `at` to `at + count` of a file that is read by row numbers, of about `size` bytes each."""
        end = at + count
        while at < end:
            room = -(-(CHUNK_BYTES - self._bytes) // max(1, size))
            stop = min(end, at + min(self.chunk_rows - self._filled, room))
            self._open_at(file, at + 1, at)
            self._take(stop - at, stop, (stop - at) * size)
            at = stop

    def _close(self) -> None:
        if self._row[2]:
            self._open.append(Segment(*self._row))
        self._row = [-1, 0, 0, 0, 0]

    def _cut(self) -> None:
        self._close()
        if self._open:
            self._chunks.append(tuple(self._open))
        self._open, self._filled, self._bytes = [], 0, 0

    def done(self) -> tuple[tuple[Segment, ...], ...]:
        self._cut()
        return tuple(self._chunks)


def _kind(path: Path) -> str:
    return _TEXT[path.suffix.lower()]


def _check_columns(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    check_columns(path, wanted, found, found, "name the columns with the texts: --text COLUMN")


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


# -- CSV and TSV ------------------------------------------------------------------------------------------------------


def _look_delimited(path: Path, number: int, text: Sequence[str], cutter: _Cutter) -> pa.Schema:
    rows = read_delimited(path)
    _, start, header = next(rows)
    _check_columns(path, text, header)
    for row, end, _ in rows:
        cutter.add(number, row, start, end)
        start = end
    return pa.schema([(name, pa.string()) for name in header])


def _parse_delimited(raw: bytes, delimiter: str, names: Sequence[str]) -> pa.Table:
    return pa_csv.read_csv(
        pa.BufferReader(raw),
        read_options=pa_csv.ReadOptions(column_names=list(names), block_size=len(raw) + 1, use_threads=False),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, quoted_strings_can_be_null=False
        ),
    )


# -- JSON Lines, and texts line by line -------------------------------------------------------------------------------


def _look_json(path: Path, number: int, text: Sequence[str], cutter: _Cutter) -> pa.Schema:
    kinds: dict[str, set[type]] = {}
    unit, start = json_unit(path), 0
    for place, end, record in read_json(path):
        check_characters(path, unit, place, record)
        for name, value in record.items():
            found = kinds.setdefault(name, set())
            if isinstance(value, list | dict) and name in text:
                raise no_text(path, unit, place, name, json_kind(value))
            if value is not None:  # a whole number beyond 64 bits is kept as text
                found.add(str if type(value) is int and abs(value) >= 2**63 else type(value))
        cutter.add(number, place, start, end, size=200 if unit == "record" else None)
        start = end
    return pa.schema([(name, _JSON_TYPES.get(frozenset(found), pa.string())) for name, found in kinds.items()])


_JSON_TYPES = {
    frozenset({int}): pa.int64(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
    frozenset({bool}): pa.bool_(),
}


def _records_table(records: Sequence[Mapping[str, Any]], names: Sequence[str], schema: pa.Schema) -> pa.Table:
    columns = {}
    for name in names:
        kind = schema.field(name).type
        values = [record.get(name) for record in records]
        if pa.types.is_string(kind):
            values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        elif pa.types.is_floating(kind):
            values = [v if v is None else float(v) for v in values]
        columns[name] = pa.array(values, kind)
    return pa.table(columns)


def _look_text(path: Path, number: int, text: Sequence[str], cutter: _Cutter) -> pa.Schema:
    at = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            start, at = at, at + len(raw)
            try:
                raw.decode()
            except UnicodeDecodeError:
                raise undecodable(path) from None
            if raw.count(b"\t") < len(text) - 1:
                raise DataError(
                    f"{path}, line {line}: one text, this model reads two", "write both on one line with a tab between"
                )
            cutter.add(number, line, start, at)
    return pa.schema([(name, pa.string()) for name in text])


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _look_parquet(path: Path, number: int, text: Sequence[str], cutter: _Cutter) -> pa.Schema:
    with readable(path), pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    _check_columns(path, text, schema.names)
    reader = open_reader(path)
    for batch in reader.batches(text):
        for name in text:
            reader.texts(name, batch)
    row = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        cutter.add_rows(number, row, group.num_rows, group.total_byte_size // max(1, group.num_rows))
        row += group.num_rows
    return pa.schema([column.remove_metadata() for column in schema])


class _ParquetRows:
    """Rows of a Parquet file by number; what lies ahead is reached without decoding row groups in between."""

    def __init__(self, path: Path) -> None:
        self.file = pq.ParquetFile(path)
        counts = [self.file.metadata.row_group(g).num_rows for g in range(self.file.metadata.num_row_groups)]
        self.starts = [sum(counts[:g]) for g in range(len(counts) + 1)]
        self._at = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._left: pa.RecordBatch | None = None

    def take(self, start: int, stop: int) -> pa.Table:
        group = max(g for g, first in enumerate(self.starts) if first <= start)
        if self._at < 0 or start < self._at or self.starts[group] > self._at:
            groups = list(range(group, len(self.starts) - 1))
            self._batches = self.file.iter_batches(batch_size=_BATCH, row_groups=groups, use_threads=False)
            self._at, self._left = self.starts[group], None
        found: list[pa.RecordBatch] = []
        while self._at < stop:
            batch = self._left if self._left is not None else next(self._batches)
            skipped = min(len(batch), max(0, start - self._at))
            used = min(len(batch), stop - self._at)
            found.append(batch.slice(skipped, used - skipped))
            self._left = batch.slice(used) if used < len(batch) else None
            self._at += used
        table = pa.Table.from_batches(found, self.file.schema_arrow).replace_schema_metadata(None)
        strings = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        for name in strings:
            table.column(name).validate(full=True)
        return table


_LOOK = {
    "csv": _look_delimited,
    "tsv": _look_delimited,
    "jsonl": _look_json,
    "parquet": _look_parquet,
    "text": _look_text,
}
