"""Data files to columns: CSV, TSV, JSON Lines and Parquet, read as they are and located to the row.

Every cell of a CSV or TSV is text: nothing is guessed, an empty cell is an empty text, `NA` is the two letters. A row's
number is what `Table.where` says: in CSV, TSV and Parquet the data row, counted from 1 without the header (blank lines
not counted); in JSON Lines the line.

Not covered: compressed files, separators other than comma and tab, encodings other than UTF-8.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from afina.errors import DataError, nearest
from afina.plan import DATA_SUFFIXES

__all__ = ["Table", "as_text", "examples_of", "read_files"]

Array = np.ndarray[Any, Any]

#: A CSV row must fit into a block; a longer one is read again in one block as large as the file.
_BLOCK_BYTES = 16 << 20
_SHOWN = 5
_UTF8 = "save the file as UTF-8 (a spreadsheet calls it `CSV UTF-8`; or: iconv -f latin1 -t utf-8 FILE > NEW)"


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and where each row came from.

    Attributes:
        columns: large_string, int64, double, bool or list<large_string> each; null where there was no value.
        classes: label names, in their order, of the columns that declare them (`ClassLabel`).
        sources: what users call the places that rows came from: files, or `dataset/split`.
        source: index into `sources`, int32 (N,).
        row: number of the row in its source, counted from 1, int64 (N,).
    """

    columns: Mapping[str, pa.Array]
    classes: Mapping[str, tuple[str, ...]]
    sources: tuple[str, ...]
    source: Array
    row: Array
    unit: str = "row"

    def __len__(self) -> int:
        return len(self.row)

    def take(self, rows: Array) -> Table:
        columns = {name: column.take(pa.array(rows)) for name, column in self.columns.items()}
        return Table(columns, self.classes, self.sources, self.source[rows], self.row[rows], self.unit)

    def where(self, index: int) -> str:
        """`reviews.csv, row 12`."""
        return f"{self.sources[self.source[index]]}, {self.unit} {self.row[index]}"


def examples_of(table: Table, indices: Array) -> str:
    """The first five of some rows, by file: `a.csv, rows 3, 9, 12; b.csv, row 1 (and 40 more)`."""
    shown = indices[:_SHOWN]
    groups: dict[int, list[int]] = {}
    for index in shown:
        groups.setdefault(int(table.source[index]), []).append(int(table.row[index]))
    said = "; ".join(
        f"{table.sources[source]}, {table.unit}{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"
        for source, rows in groups.items()
    )
    more = len(indices) - len(shown)
    return f"{said} (and {more:,} more)" if more else said


def read_files(paths: Sequence[Path], columns: Sequence[str]) -> Table:
    """Read `columns` of all files, one after the other.

    Raises:
        DataError: a column is missing or there twice, a row is ragged, bytes are not UTF-8, JSON is broken; with file and row.
    """
    tables = [_READERS[DATA_SUFFIXES[path.suffix.lower()]](path, list(dict.fromkeys(columns))) for path in paths]
    return tables[0] if len(tables) == 1 else _concatenate(tables)


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


def _concatenate(tables: Sequence[Table]) -> Table:
    columns, classes = {}, {}
    for name in tables[0].columns:
        pieces = [table.columns[name] for table in tables]
        types = {str(piece.type) for piece in pieces}
        if len(types) > 1:
            lists = [table for table in tables if pa.types.is_list(table.columns[name].type)]
            if lists:
                plain = next(table for table in tables if table not in lists)
                raise DataError(
                    f"column `{name}` holds lists in {lists[0].sources[0]} and single values in {plain.sources[0]}",
                    "give all files of a part the same columns",
                )
            numbers = all(pa.types.is_integer(p.type) or pa.types.is_floating(p.type) for p in pieces)
            pieces = [p.cast(pa.float64()) if numbers else as_text(p) for p in pieces]
        columns[name] = pa.concat_arrays(pieces)
        names = {table.classes.get(name) for table in tables}
        if len(names) == 1 and None not in names:
            classes[name] = tables[0].classes[name]
    sources = tuple(source for table in tables for source in table.sources)
    units = {table.unit for table in tables}
    return Table(
        columns,
        classes,
        sources,
        np.concatenate([np.full(len(table), number, np.int32) for number, table in enumerate(tables)]),
        np.concatenate([table.row for table in tables]),
        units.pop() if len(units) == 1 else "row",
    )


def _table(path: Path, columns: Mapping[str, pa.Array], row: Array | None = None, **more: Any) -> Table:
    row = np.arange(1, len(next(iter(columns.values()))) + 1) if row is None else row
    return Table(
        columns, more.get("classes", {}), (str(path),), np.zeros(len(row), np.int32), row, more.get("unit", "row")
    )


def _check_columns(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    for name in found:
        if found.count(name) > 1 and name in wanted:
            raise DataError(f"{path}: column `{name}` is there twice", "rename one of them")
    for name in wanted:
        if name not in found:
            listed = ", ".join(f"`{f}`" for f in found) or "none"
            hint = nearest(name, found)
            if not hint and len(found) == 1 and path.suffix.lower() in (".csv", ".tsv"):
                other = next((sep for sep in ";\t|," if sep in found[0]), None)
                if other:
                    shown = "tab" if other == "\t" else f"`{other}`"
                    hint = f"the file looks separated by {shown}: save .csv with commas, .tsv with tabs"
            raise DataError(
                f"{path}: there is no column `{name}`; columns: {listed}",
                hint or "correct `data.text`, `data.label` or `data.id` in the recipe",
            )


# -- CSV and TSV ------------------------------------------------------------------------------------------------------


def _read_delimited(path: Path, wanted: list[str]) -> Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    names = _check_quotes(path, delimiter)
    _check_columns(path, wanted, names)
    try:
        table = _parse_delimited(path, delimiter, wanted, _BLOCK_BYTES)
    except pa.ArrowInvalid as error:
        if "straddl" not in str(error):
            raise _undecodable(path) or DataError(f"{path}: {error}", "correct that row") from None
        try:
            table = _parse_delimited(path, delimiter, wanted, min(path.stat().st_size + 1, 2**31 - 1))
        except pa.ArrowInvalid as again:
            raise _undecodable(path) or DataError(f"{path}: {again}", "correct that row") from None
    return _table(path, {name: table.column(name).combine_chunks() for name in wanted})


def _parse_delimited(path: Path, delimiter: str, wanted: list[str], block: int) -> pa.Table:
    return pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(block_size=block),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            include_columns=wanted,
            column_types={name: pa.large_string() for name in wanted},
            strings_can_be_null=False,
            quoted_strings_can_be_null=False,
        ),
    )


def _check_quotes(path: Path, delimiter: str) -> list[str]:
    """Header of the file, after a strict pass over all rows: their number of cells, their quotes, their encoding.

    Arrow reads on to the end of the file after a quote that is never closed and drops quotes in odd places, silently.
    """
    csv.field_size_limit(2**31 - 1)
    header: list[str] | None = None
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if not cells:
                    continue
                if header is None:
                    header = cells
                    continue
                number += 1
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, row {number} (line {reader.line_num}): {len(cells)} cells, the header has {len(header)}",
                        'quote the cell that holds the separator: "like, this"; or correct the row',
                    )
        except UnicodeDecodeError:
            raise _undecodable(path) or AssertionError(path) from None
        except csv.Error as error:
            line = reader.line_num
            if "end of data" in str(error):
                raise DataError(
                    f'{path}, row {number + 1}: a quote (") is opened and never closed',
                    'close it, or double each quote that belongs to the text: ""like this""',
                ) from None
            raise DataError(
                f'{path}, row {number + 1} (line {line}): text follows a closing quote (")',
                'double each quote that belongs to the text: "He said ""no""."; or use JSON Lines',
            ) from None
    if header is None:
        raise DataError(f"{path}: the file is empty", "the first line names the columns")
    return header


def _undecodable(path: Path) -> DataError | None:
    """The first byte that is not UTF-8, by row, line and offset; None if all are."""
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return DataError(f"{path}: the file is UTF-16", _UTF8.replace("latin1", "utf-16"))
    try:
        raw.decode("utf-8")
        return None
    except UnicodeDecodeError as error:
        start = error.start
    before = raw[:start]
    line = before.count(b"\n") + 1
    place = f"line {line}"
    if path.suffix.lower() in (".csv", ".tsv"):
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader = csv.reader(io.StringIO((before + b"?").decode("latin-1"), newline=""), delimiter=delimiter)
        number = sum(1 for cells in reader if cells) - 1
        place = f"row {number} (line {line})" if number > 0 else "the header"
    return DataError(f"{path}, {place}: byte 0x{raw[start]:02x} at offset {start} is not UTF-8", _UTF8)


# -- JSON Lines -------------------------------------------------------------------------------------------------------


def _read_json(path: Path, wanted: list[str]) -> Table:
    values: dict[str, list[Any]] = {name: [] for name in wanted}
    found: dict[str, None] = {}
    numbers: list[int] = []
    array = _opens_array(path)
    unit = "record" if array else "line"
    for number, record in _json_array(path) if array else _json_lines(path):
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, {unit} {number}: a JSON object is wanted, found {_json_kind(record)}",
                'one object per line: {"text": "…", "label": "…"}',
            )
        found.update(dict.fromkeys(record))
        numbers.append(number)
        for name in wanted:
            values[name].append(record.get(name))
    if numbers:
        _check_columns(path, wanted, list(found))
    rows = np.array(numbers, np.int64)
    columns = {name: _json_column(path, name, values[name], rows, unit) for name in wanted}
    return _table(path, columns, rows, unit=unit)


def _opens_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _undecodable(path) or AssertionError(path) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON: {error.msg}", "correct it, or write one object per line"
        ) from None
    yield from enumerate(records, 1)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise _undecodable(path) or AssertionError(path) from None
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON: {error.msg} (column {error.colno})",
                    "JSON Lines holds one whole object on each line; correct that line",
                ) from None


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
            f"{path}, {unit} {rows[place]}: column `{name}` holds {_json_kind(values[place])} here, other values elsewhere",
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


def _json_kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, wanted: list[str]) -> Table:
    try:
        schema = pq.read_schema(path)
        _check_columns(path, wanted, schema.names)
        table = pq.read_table(path, columns=wanted, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file: {reason}", "copy or write the file again") from None
    names = _class_names(schema.metadata or {})
    columns = {
        name: _parquet_column(path, name, table.column(name).combine_chunks(), names.get(name)) for name in wanted
    }
    return _table(path, columns, classes={name: tuple(names[name]) for name in wanted if name in names})


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
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


def _parquet_column(path: Path, name: str, column: pa.Array, names: list[str] | None) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _parquet_column(path, name, pc.list_flatten(column), names)
        lengths = pc.list_value_length(column)
        offsets = np.concatenate([[0], np.cumsum(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False))])
        marks = pa.array(offsets, pa.int32(), mask=np.append(pc.is_null(column).to_numpy(zero_copy_only=False), False))
        return pa.ListArray.from_arrays(marks, as_text(inner))
    if pa.types.is_dictionary(kind):
        return _parquet_column(path, name, column.dictionary_decode(), names)
    if pa.types.is_integer(kind) and names is not None:
        # -1 is how datasets writes a label that is not there.
        ids = pc.if_else(pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names))), column, None)
        return pa.array(names, pa.large_string()).take(ids)
    if pa.types.is_boolean(kind):
        return column
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        column = column.cast(pa.large_string())
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            raise DataError(f"{path}: column `{name}` holds bytes that are not UTF-8", "write the file again") from None
        return column
    raise DataError(
        f"{path}: column `{name}` is of type {kind}", "text, number, true/false or a list of texts can be read"
    )


_READERS = {"csv": _read_delimited, "tsv": _read_delimited, "jsonl": _read_json, "parquet": _read_parquet}
