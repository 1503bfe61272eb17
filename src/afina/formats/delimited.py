"""CSV and TSV, read strictly by Python's parser; errors name file, row and line.

Every cell is text: nothing is guessed, an empty cell is an empty text, `NA` is the two letters. Other parsers read on to the end of
the file after a quote that is never closed, and drop misplaced quotes, both without a message. Memory is that of one row.

Not covered: separators of several characters, comment lines, escapes with a backslash.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from afina.errors import DataError
from afina.formats.columns import SEPARATORS, other_separator, partitions, separator_words
from afina.formats.notes import Notes
from afina.formats.read_options import PLAIN, ReadOptions, format_of, option
from afina.formats.text_files import foreign, open_text, utf_16_hint
from afina.text import plural

__all__ = ["likely_delimiter", "read_delimited"]

_QUOTES_AS_TEXT = "if quotes belong to the texts: " + option("quoting", "none")
_SPANS = f"spans lines, because of a quote; {_QUOTES_AS_TEXT}"
_SWALLOWS = f"holds a quote that swallows the rows up to the next one; {_QUOTES_AS_TEXT}"
_HEADER_AGAIN = "repeats the header: were files joined that have one each?"
_LABEL_HEADER = "the header's cells occur as values: does the file lack a header? " + option("header", "false")
#: Rows in which cells of the header are looked up.
_FIRST_ROWS = 1000


def read_delimited(
    path: Path, reading: ReadOptions = PLAIN, notes: Notes | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each row of a `.csv` or `.tsv`; every row has as many cells as the header.

    The header comes first, as number 0. Rows are counted from 1 without it; blank lines are skipped and not counted. Columns of a
    partitioned folder (`label=good/`) come last.

    Raises:
        DataError: the file is empty, a row has too few or too many cells, a quote is not closed or misplaced, bytes are not
            in the encoding.
    """
    csv.field_size_limit(2**31 - 1)
    number, delimiter = 0, reading.delimiter_for(path)
    notes = notes or Notes()
    with open_text(path, reading) as file:
        rows = csv.reader(
            _without_nul(path, file, reading),
            delimiter=delimiter,
            strict=True,
            quoting=csv.QUOTE_NONE if reading.quoting == "none" else csv.QUOTE_MINIMAL,
        )
        try:
            first = next((cells for cells in rows if cells), None)
            if first is None:
                raise DataError(f"{path}: the file is empty", "the first line names the columns")
            header, waiting = _header(path, first, reading)
            added = {key: value or "" for key, value in partitions(path).items() if key not in header}
            more = list(added.values())
            yield 0, [*header, *added]
            width, line = len(header), rows.line_num
            for cells in waiting:
                number += 1
                yield number, cells + more
            seen = [False] * width
            for cells in rows:
                if not cells:
                    line = rows.line_num
                    continue
                number += 1
                if len(cells) != width:
                    raise _ragged(path, number, rows.line_num, cells, header, reading)
                if rows.line_num - line > 1:
                    if delimiter == "\t":
                        notes.add(_SPANS, number)
                    elif any(_swallows(cell, place, width, delimiter) for place, cell in enumerate(cells)):
                        notes.add(_SWALLOWS, number)
                line = rows.line_num
                if cells == header:
                    notes.add(_HEADER_AGAIN, number)
                elif number <= _FIRST_ROWS and not waiting:
                    seen = [was or (cell == name != "") for was, cell, name in zip(seen, cells, header, strict=True)]
                yield number, cells + more
            if any(seen) and reading.header is None:
                notes.add(_LABEL_HEADER)
        except csv.Error as error:
            if number == 0 and rows.line_num <= 1 and (mark := _other_delimiter(path, reading)):
                words, remedy = separator_words(mark)
                raise DataError(f"{path}: the file seems to be separated by {words}", remedy) from None
            raise _misquoted(path, number + 1, rows.line_num, str(error)) from None


def _header(path: Path, first: list[str], reading: ReadOptions) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the rows that were read for them."""
    if first[0][:1] in "{[<v" and (error := foreign(path)):
        raise error
    if len(first) <= 2 and first[0].startswith("sep=") and format_of(path) == "csv":
        raise DataError(
            f"{path}: the first line, `{first[0]}`, is one that only Excel knows", "remove it, and set the separator: "
            + option("delimiter", "';'"),
        )  # fmt: skip
    if reading.header is False:
        return [f"column{number}" for number in range(1, len(first) + 1)], [first]
    if isinstance(reading.header, tuple):
        if len(reading.header) != len(first):
            raise DataError(
                f"{path}, row 1: {plural(len(first), 'cell')}, the option `header` names {plural(len(reading.header), 'column')}",
                "name as many columns as the file has",
            )
        return list(reading.header), [first]
    return first, []


def _without_nul(path: Path, lines: Iterable[str], reading: ReadOptions) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            utf_16 = number == 1 and reading.encoding is None
            what = utf_16_hint(line) if utf_16 else "remove it: tr -d '\\000'"
            raise DataError(f"{path}, line {number}: holds a NUL byte, which no text has", what)
        # A second byte order mark, or that of a file that was joined to another.
        yield line.lstrip("\ufeff") if line[0] == "\ufeff" else line


def _ragged(
    path: Path, number: int, line: int, cells: Sequence[str], header: Sequence[str], reading: ReadOptions
) -> DataError:
    width = len(header)
    if isinstance(reading.header, tuple):
        what = f"the option `header` names {width}"
    else:
        what = f"the {'first row' if reading.header is False else 'header'} has {width}"
    return DataError(
        f"{path}, row {number} (line {line}): {plural(len(cells), 'cell')}, {what}",
        (_layout_remedy(path, cells, header, reading) if number == 1 else "") or _cell_remedy(cells, reading),
    )


def _layout_remedy(path: Path, cells: Sequence[str], header: Sequence[str], reading: ReadOptions) -> str:
    """The remedy where the first row shows that the whole file is another thing: another separator, a title, an end of a row."""
    used, width = reading.delimiter_for(path), len(header)
    for mark in SEPARATORS:
        both = used.join(header).count(mark), used.join(cells).count(mark)
        if mark != used and both[0] == both[1] > 0:
            return "is the file separated by {}? {}".format(*separator_words(mark))
    if width == 1 and reading.header is None:
        return "is the first line a title or a comment? remove it: the first line names the columns"
    if len(cells) > width and not any(cells[width:]):
        return f"the rows end with a separator: end the header with one too (`{used.join([*header, ''])}`)"
    return ""


def _cell_remedy(cells: Sequence[str], reading: ReadOptions) -> str:
    remedy = 'quote the cell that holds the separator: "like, this"; or correct the row'
    if any('"' in cell for cell in cells) and reading.quoting is None:
        remedy += f". I{_QUOTES_AS_TEXT[1:]}"
    return remedy


def likely_delimiter(path: Path, reading: ReadOptions) -> str | None:
    """The separator of a CSV or TSV whose first line holds another one than `reading` says; None where that is right, or none is."""
    with contextlib.suppress(DataError):
        try:
            _, header = next(read_delimited(path, reading))
        except DataError:
            return _other_delimiter(path, reading)
        return other_separator(path, header, reading.delimiter)
    return None


def _other_delimiter(path: Path, reading: ReadOptions) -> str | None:
    """The separator with which the first line is a row of quoted cells."""
    with open_text(path, reading) as file:
        line = file.readline()
    for mark in SEPARATORS:
        with contextlib.suppress(csv.Error, StopIteration):
            if mark != reading.delimiter_for(path) and len(next(csv.reader([line], delimiter=mark, strict=True))) > 1:
                return mark
    return None


def _misquoted(path: Path, number: int, line: int, reason: str) -> DataError:
    if "end of data" in reason:
        return DataError(
            f'{path}, row {number}: a quote (") is opened and never closed',
            f'close it, or double each quote that belongs to the text: ""like this""; {_QUOTES_AS_TEXT}',
        )
    return DataError(
        f'{path}, row {number} (line {line}): text follows a closing quote (")',
        f'double each quote that belongs to the text: "He said ""no""."; {_QUOTES_AS_TEXT}',
    )


def _swallows(cell: str, place: int, width: int, delimiter: str) -> bool:
    """True if a cell holds the ends and beginnings of other rows: each of its lines has the separators of a row, and none of prose."""
    lines = cell.split("\n")
    if len(lines) < 2 or width < 2 or re.search(rf"{re.escape(delimiter)}\s", cell):
        return False
    counts = [line.count(delimiter) for line in lines]
    return counts == [width - 1 - place, *[width - 1] * (len(lines) - 2), place]
