"""Data formats, read strictly. Training, prediction and `afina init` share these readers; errors name file and row.

Every cell of a CSV or TSV is text: nothing is guessed, an empty cell is an empty text, `NA` is the two letters. Python's strict
parser reads the rows: others read on to the end of the file after a quote that is never closed, and drop misplaced quotes, both
without a message. Memory is that of one row, whatever the file's size, except for a `.json` file that holds one array, which is
parsed whole.

`read_rows` gives the rows of any format, Parquet too, as dictionaries; `afina.worker.data.readers` gives columns. Not covered:
compressed files, separators other than comma and tab, encodings other than UTF-8.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from afina.errors import DataError, nearest

__all__ = [
    "check_characters",
    "check_columns",
    "class_names",
    "json_kind",
    "json_unit",
    "not_a_text",
    "number_text",
    "read_delimited",
    "read_json",
    "read_rows",
    "readable_parquet",
    "undecodable",
]

_SHOWN_COLUMNS = 30
_SEPARATED = "save .csv with commas, .tsv with tabs"
#: First bytes of files that are not text: what the file is, and the remedy.
_MAGIC = {
    b"\x1f\x8b": ("compressed with gzip", "unpack it: gunzip -c FILE > NEW"),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet (.xlsx)", "unpack it, or save the sheet as `CSV UTF-8`"),
    b"PAR1": ("Parquet", "name it .parquet"),
    b"BZh": ("compressed with bzip2", "unpack it: bzip2 -dc FILE > NEW"),
    b"\xfd7zX": ("compressed with xz", "unpack it: xz -dc FILE > NEW"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it: zstd -dc FILE > NEW"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet (.xls)", "save the sheet as `CSV UTF-8`"),
}


# -- errors of any format ---------------------------------------------------------------------------------------------


def check_columns(path: Path, wanted: Sequence[str], found: Sequence[str], unique: Sequence[str], remedy: str) -> None:
    """Refuse a file that lacks a column.

    Args:
        unique: columns that must not be there twice.
        remedy: used where no column has a similar name.

    Raises:
        DataError: with the nearest name, or the separator that the file seems to use.
    """
    for name in unique:
        if found.count(name) > 1:
            raise DataError(f"{path}: column `{name}` occurs twice", "rename one of them")
    for name in wanted:
        if name not in found:
            listed = ", ".join(f"`{f}`" for f in found[:_SHOWN_COLUMNS]) or "none"
            other = _other_separator(path, found)
            hint = f"the file seems to be separated by {other}: {_SEPARATED}" if other else nearest(name, found)
            raise DataError(
                f"{path}: there is no column `{name}`; columns: {listed}"
                + (", …" if len(found) > _SHOWN_COLUMNS else ""),
                hint or remedy,
            )


def _other_separator(path: Path, header: Sequence[str]) -> str | None:
    if len(header) != 1 or path.suffix.lower() not in (".csv", ".tsv"):
        return None
    other = next((mark for mark in ";\t|," if mark in header[0] and mark != _delimiter(path)), None)
    return "tab" if other == "\t" else other and f"`{other}`"


def not_a_text(path: Path, unit: str, number: int, name: str, found: str) -> DataError:
    """The error for a row that holds `found` (a list, an object) where a text is expected."""
    return DataError(
        f"{path}, {unit} {number}: column `{name}` holds {found}, a text is expected",
        "name a column of texts: `data.text` in a recipe, --text on a command line",
    )


def number_text(value: Any) -> str | None:
    """A number, true or false as a text: as JSON writes it, but 1.0 is "1" and NaN is None."""
    if isinstance(value, float):
        if value != value:
            return None
        if value.is_integer() and abs(value) < 2.0**53:
            value = int(value)
    return json.dumps(value, ensure_ascii=False)


def undecodable(path: Path) -> DataError:
    """The error for a file that is not UTF-8: its real format, or row, line and offset of the first wrong byte."""
    with path.open("rb") as file:
        start = file.read(4)
    for magic, (what, how) in _MAGIC.items():
        if start.startswith(magic):
            return DataError(f"{path}: is {what}, its name says {path.suffix}", how)
    remedy = "save the file as UTF-8 (a spreadsheet calls it `CSV UTF-8`; or: iconv -f latin1 -t utf-8 FILE > NEW)"
    at = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if line == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return DataError(f"{path}: the file is UTF-16", remedy.replace("latin1", "utf-16"))
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                at, byte, place = at + error.start, raw[error.start], f"line {line}"
                if path.suffix.lower() in (".csv", ".tsv"):
                    rows = sum(1 for cells in csv.reader(_lines_before(path, at), delimiter=_delimiter(path)) if cells)
                    place = f"row {rows - 1} ({place})" if rows > 1 else "the header"
                return DataError(f"{path}, {place}: byte 0x{byte:02x} at offset {at} is not UTF-8", remedy)
            at += len(raw)
    return DataError(f"{path}: changed while it was read", "wait until it is complete")


def _lines_before(path: Path, end: int) -> Iterator[str]:
    """Lines up to byte `end`, one character for each byte, and a character in place of the next one."""
    with path.open(encoding="latin-1", newline="") as file:
        for line in file:
            if len(line) > end:
                yield line[:end] + "?"
                return
            end -= len(line)
            yield line


# -- CSV and TSV ------------------------------------------------------------------------------------------------------


def read_delimited(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each row of a `.csv` or `.tsv`; every row has as many cells as the header.

    The header comes first, as number 0. Rows are counted from 1 without it; blank lines are skipped and not counted.

    Raises:
        DataError: the file is empty, a row has too few or too many cells, a quote is not closed or misplaced, bytes are not
            UTF-8.
    """
    csv.field_size_limit(2**31 - 1)
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
        try:
            header = next((cells for cells in reader if cells), None)
            if header is None:
                raise DataError(f"{path}: the file is empty", "the first line names the columns")
            yield 0, header
            width = len(header)
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != width:
                    raise DataError(
                        f"{path}, row {number} (line {reader.line_num}): {len(cells)} cells, the header has {width}",
                        'quote the cell that holds the separator: "like, this"; or correct the row',
                    )
                yield number, cells
        except UnicodeDecodeError:
            raise undecodable(path) from None
        except csv.Error as error:
            if "end of data" in str(error):
                raise DataError(
                    f'{path}, row {number + 1}: a quote (") is opened and never closed',
                    'close it, or double each quote that belongs to the text: ""like this""',
                ) from None
            raise DataError(
                f'{path}, row {number + 1} (line {reader.line_num}): text follows a closing quote (")',
                'double each quote that belongs to the text: "He said ""no""."; or use JSON Lines',
            ) from None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


# -- JSON Lines -------------------------------------------------------------------------------------------------------


def json_unit(path: Path) -> str:
    """The word for a row of a JSON file: `record` if the file is one array, else `line`."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return "record" if start.startswith(b"[") else "line"


def read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each row of a `.jsonl` or `.json`: the line, counted from 1, blank ones included; of a file that
    holds one array, the number of the object.

    Raises:
        DataError: not JSON, not objects, or bytes are not UTF-8.
    """
    unit, number = json_unit(path), 0
    try:
        if unit == "record":
            for number, record in enumerate(json.loads(path.read_bytes().decode("utf-8-sig")), 1):
                yield number, _object(path, unit, number, record)
            return
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.isspace():
                    record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                    yield number, _object(path, unit, number, record)
    except UnicodeDecodeError:
        raise undecodable(path) from None
    except (ValueError, RecursionError) as error:
        raise _not_json(path, number if unit == "line" else None, error) from None


def _object(path: Path, unit: str, number: int, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(
            f"{path}, {unit} {number}: a JSON object is expected, found {json_kind(record)}",
            'one object per line: {"text": "…", "label": "…"}',
        )
    return record


def _not_json(path: Path, line: int | None, error: Exception) -> DataError:
    place = f", line {line}" if line is not None else ""
    remedy = "correct that line" if place else "correct it, or write one object per line"
    if isinstance(error, json.JSONDecodeError):
        if line is None:
            return DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}", remedy)
        return DataError(
            f"{path}{place}: not valid JSON: {error.msg} (column {error.colno})",
            "JSON Lines holds one complete object on each line; correct that line",
        )
    if isinstance(error, RecursionError):
        return DataError(f"{path}{place}: lists or objects are nested too deeply", remedy)
    # JSON that Python does not take: a number of thousands of digits.
    return DataError(f"{path}{place}: cannot be read: {str(error).partition(';')[0]}", remedy)


def check_characters(path: Path, unit: str, number: int, record: Mapping[str, Any]) -> None:
    """Raises DataError: a text holds half of a character, which JSON can express (`\\ud83d` alone) and UTF-8 cannot."""
    for name, value in record.items():
        if not isinstance(value, str | list | dict):
            continue
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise DataError(
                f"{path}, {unit} {number}: column `{name}` holds {half}, half of a character (a surrogate without its other half)",
                "a text was cut in the middle of a character: remove that half",
            ) from None


def json_kind(value: Any) -> str:
    """A value's kind in words: `a text`, `a list`."""
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )


# -- Parquet, and any format ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def readable_parquet(path: Path) -> Iterator[None]:
    """Around code that reads a Parquet file.

    Raises:
        DataError: the file is not Parquet, or damaged, or cannot be opened.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: {os.strerror(error.errno)}", "check the path and its permissions") from None
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file: {reason}", "copy or write the file again") from None


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """ClassLabel names by column, from the schema's metadata that `datasets` writes; those of a list of labels too."""
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


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of any format as dictionaries by column; of Parquet with the names of class labels.

    Raises:
        DataError: as the reader of the format; the one column of a CSV or TSV looks like several.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path)
        elif path.suffix.lower() in (".csv", ".tsv"):
            rows = read_delimited(path)
            _, header = next(rows)
            if other := _other_separator(path, header):
                raise DataError(f"{path}: the file seems to be separated by {other}", _SEPARATED)
            for _, cells in rows:
                yield dict(zip(header, cells, strict=True))
        else:
            yield from (record for _, record in read_json(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "check the path and its permissions") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with readable_parquet(path), pq.ParquetFile(path) as file:
        names = class_names(file.schema_arrow.metadata or {})
        for batch in file.iter_batches(batch_size=1024):
            # Dates, bytes and decimals become text.
            for row in json.loads(json.dumps(batch.to_pylist(), default=str)):
                yield row | {name: _class_name(row[name], classes) for name, classes in names.items() if name in row}


def _class_name(value: Any, classes: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_class_name(v, classes) if isinstance(v, int) and 0 <= v < len(classes) else v for v in value]
    if not isinstance(value, int):
        return value
    return classes[value] if 0 <= value < len(classes) else None
