"""CoNLL files: a word and its tags a line, sentences with an empty line between them.

Columns are separated by spaces, or by tabs where a file has any. The first is `tokens`, the last is `ner_tags`, those between are
`column2`, `column3`, … A `-DOCSTART-` line and comments (`# …` on lines of their own, as CoNLL-U has them; `# O` is a word) are left out. Not covered: tags
of several words of one line (CoNLL-U's 1-2), columns that are sentences of spans (CoNLL-2005).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from afina.errors import DataError
from afina.formats.read_options import ReadOptions
from afina.formats.text_files import open_text
from afina.text import plural

__all__ = ["column_names", "read_conll"]

_TOKENS, _TAGS = "tokens", "ner_tags"
_SPACES = re.compile("[ \t]+")
_TAG = re.compile(r"O|[A-Z][-_]\S+")


def column_names(count: int) -> list[str]:
    """Names of a file's columns."""
    return [_TOKENS, *(f"column{number}" for number in range(2, count)), _TAGS]


def read_conll(path: Path, reading: ReadOptions) -> Iterator[tuple[int, list[list[str]]]]:
    """Sentences: the number of the first line, and each column's values.

    Raises:
        DataError: a line with another number of columns, or with one alone; with its number.
    """
    sentence: list[list[str]] = []
    first = width = 0
    with open_text(path, reading, newline=None) as file:  # a return alone ends lines too
        for number, line in enumerate(file, 1):
            text = line.rstrip("\n")
            if not text.strip() or text.startswith("-DOCSTART-"):
                if sentence:
                    yield first, [list(column) for column in zip(*sentence, strict=True)]
                sentence = []
                continue
            cells = text.split("\t") if "\t" in text else _SPACES.split(text.strip(" "))
            is_word = _TAG.fullmatch(cells[-1]) and len(cells) == (width or len(cells))
            if text.startswith("# ") and not sentence and not is_word:
                continue
            width = width or len(cells)
            if len(cells) != width or width < 2:
                raise DataError(
                    f"{path}, line {number}: {plural(len(cells), 'column')}, {max(width, 2)} are expected",
                    "write one word and its tags a line, and an empty line between sentences",
                )
            if not sentence:
                first = number
            sentence.append([cell.strip() for cell in cells])
    if sentence:
        yield first, [list(column) for column in zip(*sentence, strict=True)]
