"""Guess how a text file is to be read: its encoding, and the separator of its cells.

`afina init` writes both into the recipe. The commands that read by a recipe guess nothing, and refuse such files with the option.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from afina.formats.columns import separator_words
from afina.formats.delimited import likely_delimiter
from afina.formats.read_options import ReadOptions, format_of
from afina.formats.text_files import likely_encoding

__all__ = ["Guess", "guess_reading"]


@dataclass(frozen=True)
class Guess:
    """An option of reading.

    Attributes:
        value: as a user writes it; option: as `ReadOptions` keeps it.
        reason: why, in words.
        certain: nothing else is likely.
    """

    key: Literal["encoding", "delimiter"]
    value: str
    option: str
    reason: str
    certain: bool


def guess_reading(path: Path, reading: ReadOptions) -> list[Guess]:
    """The options with which a file can be read that cannot be read with `reading`; of those that are given none is guessed."""
    guesses, kind = [], format_of(path)
    if kind in (None, "parquet", "arrow"):
        return []
    if reading.encoding is None and (encoding := likely_encoding(path)):
        certain = encoding != "cp1252"
        what = "starts as such files do" if certain else "is not UTF-8; its bytes are as in Windows-1252"
        guesses.append(Guess("encoding", encoding, encoding, f"the file {what}", certain))
        reading = reading.model_copy(update={"encoding": encoding})
    if kind in ("csv", "tsv") and reading.delimiter is None and (mark := likely_delimiter(path, reading)):
        reason = f"the first line seems to be separated by {separator_words(mark)[0]}"
        guesses.append(Guess("delimiter", "tab" if mark == "\t" else repr(mark), mark, reason, certain=True))
    return guesses
