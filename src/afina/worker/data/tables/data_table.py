"""Data files as tables that know where each row came from. Of texts only digests are kept; they are read again in batches.

Formats, and how rows are counted: see `afina.worker.data.tables.readers`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError
from afina.formats.read_options import PLAIN, ReadOptions
from afina.worker.data.tables.readers import open_reader
from afina.worker.data.tables.row_batches import FileReader, RowBatch, as_text, is_blank, note_texts
from afina.worker.data.tables.words import TaggedWords, raw_values, read_row, row_texts

__all__ = ["DataSource", "DataTable", "Examples", "TextDigests", "as_text", "list_places", "read_files"]

Array = np.ndarray[Any, Any]
Advance = Callable[[int], None]

_SHOWN = 5
_KEY_BYTES = 16


@dataclass(frozen=True)
class TextDigests:
    """Digests of a text column, 25 bytes a row: all that the checks need.

    Attributes:
        keys: BLAKE2b of the text, uint64 (N, 2): equal where texts are equal but for case and white space.
        blank: see `is_blank`; bool (N,).
        sizes: bytes in UTF-8, int64 (N,).
    """

    keys: Array
    blank: Array
    sizes: Array

    @classmethod
    def of(cls, texts: pa.Array) -> TextDigests:
        hashed = [
            hashlib.blake2b(b" ".join((text or b"").split()), digest_size=_KEY_BYTES).digest()
            for text in pc.utf8_lower(texts).cast(pa.large_binary()).to_pylist()
        ]
        return cls(
            np.frombuffer(b"".join(hashed), np.uint64).reshape(-1, 2),
            is_blank(texts),
            pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False).astype(np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[TextDigests]) -> TextDigests:
        parts = [cls(np.empty((0, 2), np.uint64), np.empty(0, bool), np.empty(0, np.int64)), *parts]
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("keys", "blank", "sizes")))

    def take(self, rows: Array) -> TextDigests:
        return TextDigests(self.keys[rows], self.blank[rows], self.sizes[rows])


@dataclass(frozen=True)
class DataTable:
    """Columns of equal length, and where each row came from.

    Attributes:
        columns: large_string, int64, double, bool or list<large_string> each; null where there was no value.
        classes: label names, in their order, of the columns that declare them (`ClassLabel`).
        sources: names of the files that rows came from, or `dataset/split`.
        source: index into `sources`, int32 (N,).
        row: number of the row in its source, counted from 1, int64 (N,).
        texts: digests of the text columns.
        warnings: what was odd in the files.
        words: words and tags of the rows, of a token classification.
    """

    columns: Mapping[str, pa.Array]
    classes: Mapping[str, tuple[str, ...]]
    sources: tuple[str, ...]
    source: Array
    row: Array
    unit: str = "row"
    texts: Mapping[str, TextDigests] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    words: TaggedWords | None = None

    def __len__(self) -> int:
        return len(self.row)

    def take(self, rows: Array) -> DataTable:
        columns = {name: column.take(pa.array(rows)) for name, column in self.columns.items()}
        texts = {name: column.take(rows) for name, column in self.texts.items()}
        return DataTable(
            columns,
            self.classes,
            self.sources,
            self.source[rows],
            self.row[rows],
            self.unit,
            texts,
            (),
            self.words.take(rows) if self.words else None,
        )

    def places(self, rows: Array) -> DataTable:
        """Where `rows` came from, without columns."""
        return DataTable({}, {}, self.sources, self.source[rows], self.row[rows], self.unit)

    def where(self, index: int) -> str:
        """`reviews.csv, row 12`."""
        return f"{self.sources[self.source[index]]}, {self.unit} {self.row[index]}"


def list_places(table: DataTable, indices: Array) -> str:
    """Where the first five of some rows came from: `a.csv, rows 3, 9, 12; b.csv, row 1 (and 40 more)`."""
    shown = indices[:_SHOWN]
    groups: dict[int, list[int]] = {}
    for index in shown:
        groups.setdefault(int(table.source[index]), []).append(int(table.row[index]))
    listed = "; ".join(
        f"{table.sources[source]}, {table.unit}{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"
        for source, rows in groups.items()
    )
    more = len(indices) - len(shown)
    return f"{listed} (and {more:,} more)" if more else listed


@dataclass(frozen=True)
class Examples:
    """The rows of one split, ready to be tokenised.

    Attributes:
        source: the key of the table that the rows belong to.
        rows: their indices in it, int64 (N,).
        table: where they came from, without columns.
        sizes: bytes of each row's text, or of both texts of a pair, int64 (N,).
        labels: int64 (N,) single-label, float32 (N, L) multi-label, float32 (N,) regression.
        ids: large_string (N,), or None where the recipe names no id column.
        weights: float32 (N,), or None where the recipe names no column of weights.
        groups: names of the rows' groups (`afina.worker.data.splits.groups.group_names`), large_string (N,), or None where the recipe names no column of groups.
        words: of a token classification, whose `labels` are of words, int64 (W,).
        codes: of the groups, int64 (N,), rows without one by their text; None where there are neither groups nor folds.
    """

    source: str
    rows: Array
    table: DataTable
    sizes: Array
    labels: Array
    ids: pa.Array | None
    weights: Array | None = None
    groups: pa.Array | None = None
    codes: Array | None = None
    words: TaggedWords | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class DataSource:
    """Where rows come from: files, one after the other, or one split of a Hub data set.

    Attributes:
        paths: local files.
        reading: how they are read.
        name: used in messages instead of the path of its one file: `dataset/split`.
        tags: of a token classification, the column of tags or spans; texts may be lists of words.
    """

    paths: tuple[Path, ...]
    name: str | None = None
    reading: ReadOptions = PLAIN
    tags: str | None = None

    def read(
        self,
        columns: Sequence[str],
        texts: Sequence[str],
        advance: Advance = lambda rows: None,
        *,
        ids: Sequence[str] = (),
    ) -> DataTable:
        """See `read_files`."""
        with self._renamed():
            table = read_files(self.paths, columns, texts, advance, reading=self.reading, ids=ids, tags=self.tags)
        if self.name is None:
            return table
        warnings = tuple(line.replace(str(self.paths[0]), self.name) for line in table.warnings)
        return replace(table, sources=(self.name,), unit="row", warnings=warnings)

    def stream(self, names: Sequence[str]) -> Iterator[list[pa.Array]]:
        """Text columns batch by batch, in the order of `read`: large_string (n,) each."""
        with self._renamed():
            for path in self.paths:
                reader = open_reader(path, self.reading)
                for batch in reader.batches(list(dict.fromkeys(names))):
                    yield [row_texts(reader, name, batch, words=self.tags is not None) for name in names]

    def state(self) -> list[tuple[int, int, int]]:
        """Inode, size and modification time of each file: they differ when somebody has written to it."""
        return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in (path.stat() for path in self.paths)]

    @contextlib.contextmanager
    def _renamed(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            if self.name is None:
                raise
            raise DataError(error.message.replace(str(self.paths[0]), self.name), error.remedy) from None


def read_files(
    paths: Sequence[Path],
    columns: Sequence[str],
    texts: Sequence[str] = (),
    advance: Advance = lambda rows: None,
    *,
    reading: ReadOptions = PLAIN,
    ids: Sequence[str] = (),
    tags: str | None = None,
) -> DataTable:
    """Read all files, one after the other.

    Args:
        columns: kept in full.
        texts: only digests are kept of these.
        advance: called with the number of rows of each batch.
        ids: those of `columns` that are kept as texts, each digit of a number with them.
        tags: the column, one of `columns`, with a tag for each word of the text, or spans in it.

    Raises:
        DataError: a column is missing or there twice, a row is ragged, bytes are not in the encoding, JSON is broken; with
            file and row.
    """
    columns, texts = list(dict.fromkeys(columns)), list(dict.fromkeys(texts))
    tables = [_read(open_reader(path, reading), columns, texts, ids, advance, tags) for path in paths]
    return tables[0] if len(tables) == 1 else _concatenate(tables)


def _read(
    reader: FileReader,
    columns: Sequence[str],
    texts: Sequence[str],
    ids: Sequence[str],
    advance: Advance,
    tags: str | None,
) -> DataTable:
    wanted = list(dict.fromkeys([*texts, *columns]))
    kept: dict[str, list[Any]] = {name: [] for name in columns if name != tags}
    words: list[TaggedWords] = []
    digested: dict[str, list[TextDigests]] = {name: [] for name in texts}
    rows = [np.empty(0, np.int64)]
    for batch in reader.batches(wanted):
        for name, values in kept.items():
            values.append(reader.texts(name, batch) if name in ids else reader.values(name, batch))
        for name, digests in digested.items():
            column = row_texts(reader, name, batch, words=tags is not None)
            note_texts(reader.notes, column, batch.row, name)
            digests.append(TextDigests.of(column))
        if tags is not None:
            words.append(_tagged(reader, texts[0], tags, batch))
        rows.append(batch.row)
        advance(len(batch))
    row = np.concatenate(rows)
    empty = pa.array([], pa.large_string())
    return DataTable(
        {
            name: pa.concat_arrays([empty, *values]) if name in ids else reader.column(name, values, row)
            for name, values in kept.items()
        },
        reader.classes(columns),
        (str(reader.path),),
        np.zeros(len(row), np.int32),
        row,
        reader.unit,
        {name: TextDigests.joined(digests) for name, digests in digested.items()},
        tuple(reader.notes.warnings(reader.path, reader.unit)),
        None if tags is None else TaggedWords.joined(words),
    )


def _tagged(reader: FileReader, text: str, tags: str, batch: RowBatch) -> TaggedWords:
    """Words and tags of a batch.

    Raises:
        DataError: a row of neither kind; with file and row.
    """
    rows, units = [], None
    for number, value, tagged in zip(
        batch.row, raw_values(reader, text, batch), raw_values(reader, tags, batch), strict=True
    ):
        rows.append(read_row(f"{reader.path}, {reader.unit} {number}", value, tagged))
        units = units or ("spaces" if isinstance(value, list) else "letters" if value is not None else None)
    return TaggedWords.of(rows, units)  # type: ignore[arg-type]


def _concatenate(tables: Sequence[DataTable]) -> DataTable:
    columns, classes = {}, {}
    for name in tables[0].columns:
        parts = [table.columns[name] for table in tables]
        types = {str(part.type) for part in parts}
        if len(types) > 1:
            lists = [table for table in tables if pa.types.is_list(table.columns[name].type)]
            if lists:
                plain = next(table for table in tables if table not in lists)
                raise DataError(
                    f"column `{name}` holds lists in {lists[0].sources[0]} and single values in {plain.sources[0]}",
                    "give all files of a split the same columns",
                )
            numbers = all(pa.types.is_integer(p.type) or pa.types.is_floating(p.type) for p in parts)
            whole = [p for p in parts if pa.types.is_integer(p.type)]
            numbers = numbers and all(not len(p) or _fits_a_double(p) for p in whole)
            parts = [p.cast(pa.float64()) if numbers else as_text(p) for p in parts]
        columns[name] = pa.concat_arrays(parts)
        names = {table.classes.get(name) for table in tables}
        if len(names) == 1 and None not in names:
            classes[name] = tables[0].classes[name]
    sources = tuple(source for table in tables for source in table.sources)
    units = {table.unit for table in tables}
    return DataTable(
        columns,
        classes,
        sources,
        np.concatenate([np.full(len(table), number, np.int32) for number, table in enumerate(tables)]),
        np.concatenate([table.row for table in tables]),
        units.pop() if len(units) == 1 else "row",
        {name: TextDigests.joined([table.texts[name] for table in tables]) for name in tables[0].texts},
        tuple(line for table in tables for line in table.warnings),
        TaggedWords.joined([table.words for table in tables if table.words]) if tables[0].words else None,
    )


def _fits_a_double(numbers: pa.Array) -> bool:
    bounds = pc.min_max(numbers).as_py()
    return all(value is None or abs(value) <= 2**53 for value in bounds.values())
