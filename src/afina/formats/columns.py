"""Names of columns: what is there, what is missing, nested columns (`a.b`) and the columns of partitioned folders (`label=good`)."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afina.errors import DataError, nearest
from afina.formats.read_options import format_of, option

__all__ = [
    "SEPARATORS",
    "SPAN",
    "check_columns",
    "distinct",
    "flatten",
    "other_separator",
    "partitions",
    "separator_words",
    "value_at",
]

#: Usual separators of CSV and TSV.
SEPARATORS = ";\t|,"
#: Keys of a span of a text with its label.
SPAN = frozenset({"start", "end", "label"})
_SHOWN_COLUMNS = 30
#: How Hive names a missing value.
_MISSING = "__HIVE_DEFAULT_PARTITION__"


def check_columns(path: Path, wanted: Sequence[str], known: Sequence[str], remedy: str) -> None:
    """Refuse a file that lacks a column, or has it twice.

    Args:
        remedy: used where no column has a similar name.

    Raises:
        DataError: with the nearest name, or the option that would help.
    """
    for name in wanted:
        if known.count(name) > 1:
            raise DataError(f"{path}: column `{name}` occurs twice", "rename one of them")
        if name not in known:
            listed = ", ".join(f"`{f}`" for f in known[:_SHOWN_COLUMNS]) or "none"
            more = ", …" if len(known) > _SHOWN_COLUMNS else ""
            hint = (
                _separator_remedy(path, known, name) or nearest(name, known) or _other_hint(path, name, known) or remedy
            )
            raise DataError(f"{path}: there is no column `{name}`; columns: {listed}{more}", hint)


def _other_hint(path: Path, name: str, known: Sequence[str]) -> str:
    below = [f for f in known if f.rpartition(".")[2] == name]
    if below:
        return f"did you mean `{below[0]}`?"
    if format_of(path) not in ("csv", "tsv"):
        return ""
    if known and known[0].startswith("#"):
        return "is the first line a comment? remove it: the first line names the columns"
    if any(len(cell) > 60 or len(cell.split()) > 3 or cell.replace(".", "", 1).isdigit() for cell in known):
        return f"is the first line a row, not a header? {option('header', 'false')}"
    return ""


def _separator_remedy(path: Path, header: Sequence[str], name: str) -> str:
    mark = other_separator(path, header, name=name)
    return "the file seems to be separated by {}: {}".format(*separator_words(mark)) if mark else ""


def other_separator(
    path: Path, header: Sequence[str], delimiter: str | None = None, name: str | None = None
) -> str | None:
    """The separator that the one column of a CSV or TSV seems to hold, or None.

    Args:
        name: of a column that must be there; then the header may have several cells.
    """
    if format_of(path) not in ("csv", "tsv") or (len(header) != 1 and name is None):
        return None
    used = delimiter or ("\t" if format_of(path) == "tsv" else ",")
    whole = used.join(header)
    for mark in SEPARATORS:
        if mark != used and mark in whole and (len(header) == 1 or name in whole.split(mark)):
            return mark
    return None


def separator_words(mark: str) -> tuple[str, str]:
    """A separator in words, and the option for it."""
    return ("tab", option("delimiter", "tab")) if mark == "\t" else (f"`{mark}`", option("delimiter", repr(mark)))


def distinct(names: Sequence[str]) -> list[str]:
    """The names, a second `a` as `a.1`."""
    taken: dict[str, int] = {}
    for name in names:
        number, new = 0, name
        while new in taken or (number and new in names):
            number += 1
            new = f"{name}.{number}"
        taken[new] = number
    return list(taken)


def partitions(path: Path) -> dict[str, str | None]:
    """Columns and their value in the names of the folders around a file, as Hive and Spark write them: `label=good/part-0.parquet`."""
    values: dict[str, str | None] = {}
    for folder in path.parents:
        key, equals, value = folder.name.partition("=")
        if not (key and equals):
            break
        values[urllib.parse.unquote(key)] = None if value == _MISSING else urllib.parse.unquote(value)
    return dict(reversed(values.items()))


def value_at(record: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a nested one: `a.b` in objects, `a.0` in lists; None where there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for key in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def flatten(record: Mapping[str, Any], prefix: str = "", *, lists: bool = False) -> dict[str, Any]:
    """A record with its nested objects as columns `a.b`.

    Args:
        lists: of a list of objects take the first as `a.0.b`; spans of a text stay a list.
    """
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}.", lists=lists))
        elif lists and isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            if value[0].keys() >= SPAN:
                flat[f"{prefix}{key}"] = value
                continue
            flat.update(flatten(value[0], f"{prefix}{key}.0.", lists=lists))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
