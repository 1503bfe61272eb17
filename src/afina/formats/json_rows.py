"""Rows of JSON: one object a line, one array of objects, and the shapes that pandas and other programs write.

    {"text": "a"}\\n{"text": "b"}            JSON Lines; objects over several lines too
    [{"text": "a"}, {"text": "b"}]          one array
    {"text": ["a", "b"]}                    columns
    {"text": {"0": "a", "1": "b"}}          `DataFrame.to_json()`; with orient="index" and "split" too
    {"data": [{"text": "a"}]}               records under a key: the option `field: data`

JSON Lines are read line by line; any other shape is parsed whole. `a.b` names a nested column (see `afina.formats.columns`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from afina.errors import DataError
from afina.formats.columns import partitions, value_at
from afina.formats.read_options import PLAIN, ReadOptions, option
from afina.formats.text_files import foreign, open_text, utf_16_hint

__all__ = ["check_characters", "json_kind", "json_unit", "number_text", "read_json", "records_below"]

#: Lines whose objects are checked for a key that occurs twice.
_CHECKED_LINES = 1000
#: Characters that are read to see how the file begins.
_FIRST = 4096
_RECORDS = "write records: DataFrame.to_json(NEW, orient='records', lines=True)"


def json_unit(path: Path, reading: ReadOptions = PLAIN) -> str:
    """The word for a row of a JSON file: `line` of JSON Lines, else `record`."""
    with open_text(path, reading, newline="\n") as file:
        return "line" if _is_lines(file, reading) else "record"


def read_json(path: Path, reading: ReadOptions = PLAIN) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each row of a `.jsonl` or `.json`: of JSON Lines the line, counted from 1, blank ones included; of
    other shapes the number of the object. Columns of a partitioned folder are added.

    Raises:
        DataError: not JSON, no rows that are objects, or bytes are not in the encoding.
    """
    added = partitions(path)
    for number, record in _lines(path, reading) if json_unit(path, reading) == "line" else _whole(path, reading):
        yield number, {**added, **record} if added else record


def records_below(path: Path, record: Mapping[str, Any]) -> DataError | None:
    """The error for a file whose one object holds the records under a key; None of any other object."""
    deeper = [f"{key}.{b}" for key, v in record.items() if isinstance(v, dict) for b in _lists_of_objects(v)]
    if keys := _lists_of_objects(record) or deeper:
        listed = " and ".join(f"`{name}`" for name in keys)
        longest = max(keys, key=lambda name: len(value_at(record, name)))
        return DataError(f"{path}: one object, with records under {listed}", option("field", longest))
    return None


def _is_lines(file: IO[str], reading: ReadOptions) -> bool:
    """True if the first line that is not blank is a row of its own: a whole object, and not one of all rows."""
    line = next((part for part in iter(lambda: file.readline(_FIRST), "") if not part.isspace()), "")
    if line.lstrip().startswith("["):
        return False
    line += "" if line.endswith("\n") else file.readline()
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        # An object that ends on a later line.
        return not (line.lstrip().startswith("{") and error.pos >= len(line.rstrip()))
    except (ValueError, RecursionError):
        return True
    alone = isinstance(record, dict) and all(rest.isspace() for rest in file)
    return not alone or (reading.field is None and _table(record) is None)


def _lines(path: Path, reading: ReadOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    number, line = 0, ""
    try:
        with open_text(path, reading, newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    value = json.loads(line, object_pairs_hook=_each_once if number <= _CHECKED_LINES else None)
                    record = _under(path, value, reading, "line", number)
                    yield number, _object(path, "line", number, record)
    except (RecursionError, ValueError) as error:
        raise _not_json(path, error, number, line) from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without a second value of a key, which Python would take silently."""
    record = dict(pairs)
    if len(record) < len(pairs):
        key = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise _TwiceError(f"`{key}` occurs twice in one object")
    return record


def _whole(path: Path, reading: ReadOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_text(path, reading) as file:
        text = file.read()
    try:
        values = list(_values(text))
    except (RecursionError, ValueError) as error:
        raise _not_json(path, error) from None
    rows: Any = values[0] if len(values) == 1 else values
    if isinstance(rows, list):
        rows = [_under(path, record, reading, "record", number) for number, record in enumerate(rows, 1)]
    else:
        rows = _under(path, rows, reading)
    if isinstance(rows, dict):
        table = _table(rows)
        rows = table if table is not None else [rows]
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {json_kind(rows)}, no rows", _RECORDS)
    for number, record in enumerate(rows, 1):
        yield number, _object(path, "record", number, record)


def _values(text: str) -> Iterator[Any]:
    """The JSON values of a text, one after the other."""
    decoder, at = json.JSONDecoder(), 0
    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if at == len(text):
            return
        value, at = decoder.raw_decode(text, at)
        yield value


def _under(path: Path, value: Any, reading: ReadOptions, unit: str = "", number: int = 0) -> Any:
    """The value under the option `field`."""
    for key in reading.field.split(".") if reading.field is not None else ():
        if not isinstance(value, dict) or key not in value:
            place = f"{path}, {unit} {number}" if unit else str(path)
            keys = (
                ", ".join(f"`{k}`" for k in itertools.islice(value, 20))
                if isinstance(value, dict)
                else json_kind(value)
            )
            raise DataError(
                f"{place}: there is no field `{reading.field}`: `{key}` is not among {keys}",
                "correct the option `field`",
            )
        value = value[key]
    return value


def _table(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of an object that holds all columns, or all rows; None of any other object."""
    kinds = {type(v) for v in value.values()}
    if {"columns", "data"} <= value.keys() <= {"columns", "data", "index"} and kinds == {list}:  # orient="split"
        return [
            dict(zip(map(str, value["columns"]), row, strict=False)) for row in value["data"] if isinstance(row, list)
        ]
    if kinds == {list} and len({len(v) for v in value.values()}) == 1 and not _lists_of_objects(value):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if kinds == {dict} and all(value.values()):
        keys = [list(each) for each in value.values()]
        alike = all(k == keys[0] for k in keys)
        # orient="index": of rows there are more than of columns.
        if all(map(_is_number, value)) or (alike and len(keys) > len(keys[0])):
            return list(value.values())
        if alike and (all(map(_is_number, keys[0])) or len(keys[0]) > len(keys)):
            return [{name: column[key] for name, column in value.items()} for key in keys[0]]
    return None


def _is_number(key: str) -> bool:
    return key.removeprefix("-").isdigit()


def _lists_of_objects(record: Mapping[str, Any]) -> list[str]:
    return [k for k, v in record.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]


def _object(path: Path, unit: str, number: int, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        remedy = 'one object per line: {"text": "…", "label": "…"}'
        if isinstance(record, list):
            remedy = f"{remedy}. If it holds the records of a table, {_RECORDS}"
        raise DataError(f"{path}, {unit} {number}: a JSON object is expected, found {json_kind(record)}", remedy)
    return record


class _TwiceError(ValueError):
    """A key occurs twice in an object."""


def _not_json(path: Path, error: Exception, line: int | None = None, text: str = "") -> DataError:
    place = f", line {line}" if line is not None else ""
    remedy = "correct that line" if place else "correct it, or write one object per line"
    if isinstance(error, json.JSONDecodeError):
        start = (text or error.doc)[:4096]
        if line in (None, 1) and (other := foreign(path)):
            return other
        if "\0" in start and line in (None, 1):
            return DataError(f"{path}{place}: holds a NUL byte", utf_16_hint(start))
        if line is None:
            return DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}", remedy)
        return DataError(
            f"{path}{place}: not valid JSON: {error.msg} (column {error.colno})",
            "JSON Lines holds one complete object on each line; correct that line",
        )
    if isinstance(error, _TwiceError):
        return DataError(f"{path}{place}: {error}", "write each key once, or give a list of values")
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


def number_text(value: Any) -> str | None:
    """A number, true or false as a text: as JSON writes it, but 1.0 is "1" and NaN is None."""
    if isinstance(value, float):
        if value != value:
            return None
        if value.is_integer() and abs(value) < 2.0**53:
            value = int(value)
    return json.dumps(value, ensure_ascii=False)
