"""Data files a batch of rows at a time, as they are: CSV and TSV, JSON Lines, Parquet. Errors name file and row.

Memory is that of one batch, whatever the file's size, except for a `.json` file that is one array: it is parsed whole.
Every cell of a CSV or TSV is text: nothing is guessed, an empty cell is an empty text, `NA` is the two letters.

Not covered: compressed files, separators other than comma and tab, encodings other than UTF-8.
"""

from __future__ import annotations

import codecs
import csv
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

from afina.errors import DataError, nearest
from afina.plan import DATA_SUFFIXES

__all__ = [
    "Batch",
    "Reader",
    "as_text",
    "class_names",
    "half_a_character",
    "json_refusal",
    "open_reader",
    "other_format",
]

Array = np.ndarray[Any, Any]

#: A batch ends at so many rows or characters, whichever comes first.
_BATCH_ROWS = 2048
_BATCH_CHARACTERS = 1 << 20
_BLOCK_BYTES = 1 << 20
_UTF8 = "save the file as UTF-8 (a spreadsheet calls it `CSV UTF-8`; or: iconv -f latin1 -t utf-8 FILE > NEW)"


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


def _no_lists(path: Path, name: str, unit: str, row: int) -> DataError:
    return DataError(f"{path}, {unit} {row}: column `{name}` holds lists, a text is wanted", "name a column of texts")


# -- CSV and TSV ------------------------------------------------------------------------------------------------------


class _Delimited:
    """Read by Python's strict parser: others read on to the end of the file after a quote that is never closed, and drop
    quotes in odd places, silently."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","

    def classes(self, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        csv.field_size_limit(2**31 - 1)
        path, number = self.path, 0
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=self.delimiter, strict=True)
            try:
                header = next((cells for cells in reader if cells), None)
                if header is None:
                    raise DataError(f"{path}: the file is empty", "the first line names the columns")
                _check_columns(path, wanted, header)
                places, width = [header.index(name) for name in wanted], len(header)
                taken: list[list[str]] = []
                size = 0
                for cells in reader:
                    if not cells:
                        continue
                    number += 1
                    if len(cells) != width:
                        raise DataError(
                            f"{path}, row {number} (line {reader.line_num}): {len(cells)} cells, the header has {width}",
                            'quote the cell that holds the separator: "like, this"; or correct the row',
                        )
                    taken.append(cells)
                    size += sum(map(len, cells))
                    if len(taken) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
                        yield _delimited_batch(wanted, places, taken, number)
                        taken, size = [], 0
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
        if taken:
            yield _delimited_batch(wanted, places, taken, number)

    def column(self, name: str, pieces: Sequence[Any], row: Array) -> pa.Array:
        return pa.concat_arrays([pa.array([], pa.large_string()), *pieces])

    def texts(self, name: str, batch: Batch) -> pa.Array:
        return batch.values[name]


def _delimited_batch(wanted: Sequence[str], places: Sequence[int], rows: list[list[str]], last: int) -> Batch:
    values = {
        name: pa.array([cells[place] for cells in rows], pa.large_string())
        for name, place in zip(wanted, places, strict=True)
    }
    return Batch(values, np.arange(last - len(rows) + 1, last + 1))


def _undecodable(path: Path) -> DataError | None:
    """The first byte that is not UTF-8, by row, line and offset; None if all are."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return DataError(f"{path}: the file is UTF-16", _UTF8.replace("latin1", "utf-16"))
    start = _first_undecodable(path)
    if start is None:
        return None
    if (other := other_format(path)) is not None:
        return other
    line, left = 1, start
    with path.open("rb") as file:
        while block := file.read(min(left, _BLOCK_BYTES)):
            line += block.count(b"\n")
            left -= len(block)
        byte = file.read(1)[0]
    place = f"line {line}"
    if path.suffix.lower() in (".csv", ".tsv"):
        reader = csv.reader(_lines_before(path, start), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        number = sum(1 for cells in reader if cells) - 1
        place = f"row {number} (line {line})" if number > 0 else "the header"
    return DataError(f"{path}, {place}: byte 0x{byte:02x} at offset {start} is not UTF-8", _UTF8)


def other_format(path: Path) -> DataError | None:
    """What a file is, if its first bytes say that it is no text."""
    with path.open("rb") as file:
        start = file.read(4)
    for magic, (what, remedy) in _MAGIC.items():
        if start.startswith(magic):
            return DataError(f"{path}: is {what}, its name says {path.suffix}", remedy)
    return None


_MAGIC = {
    b"\x1f\x8b": ("compressed with gzip", "unpack it: gunzip -c FILE > NEW"),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet (.xlsx)", "unpack it, or save the sheet as `CSV UTF-8`"),
    b"PAR1": ("Parquet", "name it .parquet"),
    b"BZh": ("compressed with bzip2", "unpack it: bzip2 -dc FILE > NEW"),
    b"\xfd7zX": ("compressed with xz", "unpack it: xz -dc FILE > NEW"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it: zstd -dc FILE > NEW"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet (.xls)", "save the sheet as `CSV UTF-8`"),
}


def _first_undecodable(path: Path) -> int | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return done - held + error.start
            if not block:
                return None
            done += len(block)


def _lines_before(path: Path, end: int) -> Iterator[str]:
    """Lines up to byte `end`, one character for each byte, and a character in place of the next one."""
    with path.open(encoding="latin-1", newline="") as file:
        for line in file:
            if len(line) > end:
                yield line[:end] + "?"
                return
            end -= len(line)
            yield line


# -- JSON Lines -------------------------------------------------------------------------------------------------------


class _Json:
    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        self.unit = "record" if self.is_array else "line"

    def classes(self, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {}

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        found: dict[str, None] = {}
        values: dict[str, list[Any]] = {name: [] for name in wanted}
        numbers: list[int] = []
        number = size = 0
        for number, record in _json_array(self.path) if self.is_array else _json_lines(self.path):
            if not isinstance(record, dict):
                raise DataError(
                    f"{self.path}, {self.unit} {number}: a JSON object is wanted, found {_json_kind(record)}",
                    'one object per line: {"text": "…", "label": "…"}',
                )
            found.update(dict.fromkeys(record))
            numbers.append(number)
            for name in wanted:
                value = record.get(name)
                if isinstance(value, str):
                    size += len(value)
                    if len(value) < 64:  # most likely a label: thousands of rows share one
                        value = sys.intern(value)
                values[name].append(value)
            if len(numbers) == _BATCH_ROWS or size > _BATCH_CHARACTERS:
                yield Batch(values, np.array(numbers, np.int64))
                values, numbers, size = {name: [] for name in wanted}, [], 0
        if number:
            _check_columns(self.path, wanted, list(found))
        if numbers:
            yield Batch(values, np.array(numbers, np.int64))

    def column(self, name: str, pieces: Sequence[Any], row: Array) -> pa.Array:
        values = [value for piece in pieces for value in piece]
        try:
            return _json_column(self.path, name, values, row, self.unit)
        except UnicodeEncodeError:
            raise _half_a_character(self.path, name, self.unit, row, values) from None

    def texts(self, name: str, batch: Batch) -> pa.Array:
        values = batch.values[name]
        for number, value in zip(batch.row, values, strict=True):
            if isinstance(value, list):
                raise _no_lists(self.path, name, self.unit, number)
            if isinstance(value, dict):
                raise _not_one_kind(self.path, name, self.unit, number, value)
        texts = [v if isinstance(v, str) or v is None else _number_text(v) for v in values]
        try:
            return pa.array(texts, pa.large_string())
        except UnicodeEncodeError:
            raise _half_a_character(self.path, name, self.unit, batch.row, values) from None


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _undecodable(path) or AssertionError(path) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON: {error.msg}", "correct it, or write one object per line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {json_refusal(error)}", "correct it, or write one object per line") from None
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
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: {json_refusal(error)}", "correct that line") from None


def json_refusal(error: Exception) -> str:
    """Why Python does not read JSON that may be valid."""
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return f"cannot be read: {str(error).partition(';')[0]}"


def _half_a_character(path: Path, name: str, unit: str, rows: Array, values: Sequence[Any]) -> DataError:
    for number, value in zip(rows, values, strict=True):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return half_a_character(f"{path}, {unit} {number}: column `{name}`", half)
    return half_a_character(f"{path}: column `{name}`", "a surrogate")


def half_a_character(where: str, half: str) -> DataError:
    return DataError(
        f"{where} holds {half}, half of a character (a surrogate without its other half)",
        "a text was cut in the middle of a character: remove that half",
    )


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
        f"{path}, {unit} {row}: column `{name}` holds {_json_kind(value)} here, other values elsewhere",
        "give every row a value of one kind: text, number, or list of texts",
    )


def _scalar_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number_text(value: Any) -> str:
    """As `as_text` writes it: 1.0 is 1."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2.0**53:
        value = int(value)
    return json.dumps(value)


def _json_kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )


# -- Parquet ----------------------------------------------------------------------------------------------------------


class _Parquet:
    unit = "row"

    def __init__(self, path: Path) -> None:
        self.path = path

    def classes(self, wanted: Sequence[str]) -> dict[str, tuple[str, ...]]:
        try:
            names = class_names(pq.read_schema(self.path).metadata or {})
        except (pa.ArrowInvalid, OSError) as error:
            raise _unreadable(self.path, error) from None
        return {name: tuple(names[name]) for name in wanted if name in names}

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        done = 0
        try:
            # Not memory-mapped, one column chunk after the other: what was read does not stay in this process's memory.
            with pq.ParquetFile(self.path, buffer_size=_BLOCK_BYTES, pre_buffer=False) as file:
                schema = file.schema_arrow
                _check_columns(self.path, wanted, schema.names)
                names = class_names(schema.metadata or {})
                size = _batch_size(file.metadata, wanted)
                for batch in file.iter_batches(size, columns=list(wanted), use_threads=False):
                    yield self._batch(wanted, batch, names, done)
                    done += len(batch)
                if not done:
                    yield self._batch(wanted, schema.empty_table(), names, 0)
        except (pa.ArrowInvalid, OSError) as error:
            raise _unreadable(self.path, error) from None

    def _batch(self, wanted: Sequence[str], batch: Any, names: Mapping[str, list[str]], done: int) -> Batch:
        values = {name: _parquet_column(self.path, name, batch.column(name), names.get(name)) for name in wanted}
        return Batch(values, np.arange(done + 1, done + len(batch) + 1))

    def column(self, name: str, pieces: Sequence[Any], row: Array) -> pa.Array:
        return pa.concat_arrays(pieces)

    def texts(self, name: str, batch: Batch) -> pa.Array:
        column = batch.values[name]
        if pa.types.is_list(column.type):
            raise _no_lists(self.path, name, self.unit, batch.row[0] if len(batch.row) else 1)
        if pa.types.is_floating(column.type):
            return pa.array(
                [None if v is None or v != v else _number_text(v) for v in column.to_pylist()], pa.large_string()
            )
        return column if pa.types.is_large_string(column.type) else as_text(column)


def _batch_size(metadata: Any, wanted: Sequence[str]) -> int:
    """Rows of a batch, by what they have on average in the row group where they have most."""
    most = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in wanted)
        most = max(most, size // max(1, group.num_rows))
    return max(1, min(_BATCH_ROWS, _BATCH_CHARACTERS // most))


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0]
    return DataError(f"{path}: not a readable Parquet file: {reason}", "copy or write the file again")


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
            raise DataError(f"{path}: column `{name}` holds bytes that are not UTF-8", "write the file again") from None
        return column
    raise DataError(
        f"{path}: column `{name}` is of type {kind}", "text, number, true/false or a list of texts can be read"
    )


_READERS: Mapping[str, type[_Delimited] | type[_Json] | type[_Parquet]] = {
    "csv": _Delimited,
    "tsv": _Delimited,
    "jsonl": _Json,
    "parquet": _Parquet,
}
