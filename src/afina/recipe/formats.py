"""CSV, TSV and JSON Lines as they are read everywhere: strictly, and what is wrong is said with file and row.

For training, prediction and `afina init` alike, so that a file that one of them takes the others take too. Only the standard
library, as `afina init` needs no more; Parquet is in `afina.worker.data.readers`.

Every cell of a CSV or TSV is text: nothing is guessed, an empty cell is an empty text, `NA` is the two letters. Rows are read
by Python's strict parser: others read on to the end of the file after a quote that is never closed, and drop quotes in odd
places, silently. Memory is that of a row, whatever the file's size, except for a `.json` file that is one array: it is
parsed whole.

Not covered: compressed files, separators other than comma and tab, encodings other than UTF-8.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from afina.errors import DataError, nearest

__all__ = [
    "check_characters",
    "check_columns",
    "check_separator",
    "json_kind",
    "json_unit",
    "no_text",
    "number_text",
    "read_delimited",
    "read_json",
    "undecodable",
]

_SHOWN_COLUMNS = 30
_SEPARATED = "save .csv with commas, .tsv with tabs"
#: How files begin that are no text: what they are, and what to do.
_MAGIC = {
    b"\x1f\x8b": ("compressed with gzip", "unpack it: gunzip -c FILE > NEW"),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet (.xlsx)", "unpack it, or save the sheet as `CSV UTF-8`"),
    b"PAR1": ("Parquet", "name it .parquet"),
    b"BZh": ("compressed with bzip2", "unpack it: bzip2 -dc FILE > NEW"),
    b"\xfd7zX": ("compressed with xz", "unpack it: xz -dc FILE > NEW"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it: zstd -dc FILE > NEW"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet (.xls)", "save the sheet as `CSV UTF-8`"),
}


# -- what is wrong in any format --------------------------------------------------------------------------------------


def check_columns(path: Path, wanted: Sequence[str], found: Sequence[str], unique: Sequence[str], remedy: str) -> None:
    """Refuse a file that lacks a column.

    Args:
        unique: columns that must not be there twice.
        remedy: what to do where no column looks like the one that is missing.

    Raises:
        DataError: with the nearest name, or the separator that the file looks to have.
    """
    for name in unique:
        if found.count(name) > 1:
            raise DataError(f"{path}: column `{name}` is there twice", "rename one of them")
    for name in wanted:
        if name not in found:
            listed = ", ".join(f"`{f}`" for f in found[:_SHOWN_COLUMNS]) or "none"
            other = _other_separator(path, found)
            hint = f"the file looks separated by {other}: {_SEPARATED}" if other else nearest(name, found)
            raise DataError(
                f"{path}: there is no column `{name}`; columns: {listed}"
                + (", …" if len(found) > _SHOWN_COLUMNS else ""),
                hint or remedy,
            )


def check_separator(path: Path, header: Sequence[str]) -> None:
    """Raises DataError: the one column of a CSV or TSV looks like several."""
    if other := _other_separator(path, header):
        raise DataError(f"{path}: the file looks separated by {other}", _SEPARATED)


def _other_separator(path: Path, header: Sequence[str]) -> str | None:
    if len(header) != 1 or path.suffix.lower() not in (".csv", ".tsv"):
        return None
    other = next((mark for mark in ";\t|," if mark in header[0] and mark != _delimiter(path)), None)
    return "tab" if other == "\t" else other and f"`{other}`"


def no_text(path: Path, unit: str, number: int, name: str, found: str) -> DataError:
    """What is said of a column of texts that holds `found` in some row."""
    return DataError(
        f"{path}, {unit} {number}: column `{name}` holds {found}, a text is wanted",
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
    """What is said of a file that is not UTF-8: what it is instead, or the first such byte by row, line and offset."""
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
    return DataError(f"{path}: was changed while it was read", "wait until it is whole")


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


def read_delimited(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """All rows of a `.csv` or `.tsv`: number, byte where it ends, and cells, as many as the header has.

    The header comes first, as number 0; a row's number is counted without it and without blank lines, which are left out.

    Raises:
        DataError: the file is empty, a row has too few or too many cells, a quote is not closed or stands in an odd place,
            bytes are not UTF-8.
    """
    csv.field_size_limit(2**31 - 1)
    number = 0
    with path.open("rb") as raw:
        at = len(codecs.BOM_UTF8) if raw.read(3) == codecs.BOM_UTF8 else 0
        raw.seek(at)

        def lines(file: Iterable[str]) -> Iterator[str]:
            nonlocal at
            for line in file:
                at += len(line) if line.isascii() else len(line.encode())
                yield line

        text = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        reader = csv.reader(lines(text), delimiter=_delimiter(path), strict=True)
        try:
            header = next((cells for cells in reader if cells), None)
            if header is None:
                raise DataError(f"{path}: the file is empty", "the first line names the columns")
            yield 0, at, header
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
                yield number, at, cells
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
    """What the rows of a JSON file are called: `record` if it is one array, else `line`."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return "record" if start.startswith(b"[") else "line"


def read_json(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """All rows: number of the line, counted from 1, byte where it ends, and the object on it; blank lines are left out.

    Of a file that is one array: number of the object, twice, and the object.

    Raises:
        DataError: not JSON, not objects, or bytes are not UTF-8.
    """
    unit = json_unit(path)
    at = 0
    try:
        if unit == "record":
            records = json.loads(path.read_bytes().decode("utf-8-sig"))
            for number, record in enumerate(records, 1):
                if not isinstance(record, dict):
                    raise _no_object(path, unit, number, record)
                yield number, number, record
            return
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                at += len(raw)
                if raw.isspace():
                    continue
                record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(record, dict):
                    raise _no_object(path, unit, number, record)
                yield number, at, record
    except UnicodeDecodeError:
        raise undecodable(path) from None
    except json.JSONDecodeError as error:
        if unit == "record":
            raise DataError(
                f"{path}, line {error.lineno}: not valid JSON: {error.msg}", "correct it, or write one object per line"
            ) from None
        raise DataError(
            f"{path}, line {number}: not valid JSON: {error.msg} (column {error.colno})",
            "JSON Lines holds one whole object on each line; correct that line",
        ) from None
    except (ValueError, RecursionError) as error:  # JSON that Python does not take
        deep = "lists or objects are nested too deeply"
        why = deep if isinstance(error, RecursionError) else f"cannot be read: {str(error).partition(';')[0]}"
        place = f", line {number}" if unit == "line" else ""
        raise DataError(
            f"{path}{place}: {why}", "correct that line" if place else "correct it, or write one object per line"
        ) from None


def check_characters(path: Path, unit: str, number: int, record: Mapping[str, Any]) -> None:
    """Raises DataError: a text holds half of a character, which JSON can write (`\\ud83d` alone) and UTF-8 cannot."""
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


def _no_object(path: Path, unit: str, number: int, found: Any) -> DataError:
    return DataError(
        f"{path}, {unit} {number}: a JSON object is wanted, found {json_kind(found)}",
        'one object per line: {"text": "…", "label": "…"}',
    )


def json_kind(value: Any) -> str:
    """What a value is called: `a text`, `a list`."""
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )
