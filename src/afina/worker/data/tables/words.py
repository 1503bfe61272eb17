"""Words of texts and their tags: from lists of words with a tag each, or from texts with character spans; and their tokens.

A row is one of the two:

    words    a list of words and as many tags; the row's text is the words with one space between them
    text     a text and a list of spans, `{start: 3, end: 8, label: PER}` or `[3, 8, "PER"]`, in characters, the end not included

Words of a text are runs of letters and digits, and every other character that is not white space by itself, each with the combining marks
behind it (accents, vowel signs); so is every character of scripts that are written without spaces, or with particles on their words: Chinese,
Japanese, Korean, Thai, Lao, Burmese, Khmer. A span takes the whole words that it touches: one that cuts a word is widened, and counted. Spans that
overlap are refused. For a model of word lists a text is divided at white space, and the marks around its words stand apart, as
in such data; where there are no spaces every character is a word.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from afina.errors import DataError
from afina.text import plural
from afina.worker.data.tables.row_batches import FileReader, RowBatch
from afina.worker.task.word_places import CUT, REMOVED, SHARED

__all__ = [
    "TaggedWords",
    "Units",
    "find_pieces",
    "given_words",
    "join_words",
    "raw_values",
    "read_row",
    "row_texts",
    "spans_of_text",
]

Array = np.ndarray[Any, Any]
#: What words are: pieces of the text between white space, as word lists give them; or by letters and punctuation, as texts do.
Units = Literal["spaces", "letters"]

#: Thai and Lao, Burmese, Khmer, kana, Chinese characters.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_PARTS = re.compile(f"[{_NO_SPACES}]|[^{_NO_SPACES}]+")
#: Marks before a word, the word (U.S. and J. keep their points), marks behind it.
_AROUND = re.compile(r"([(\[{<\"'“‘«¿¡]*)((?:\w\.)+|.*?)([)\]}>\"'”’».,;:!?…]*)", re.DOTALL)
_SPAN = "a span is {start: 3, end: 8, label: PER}, or [3, 8, \"PER\"], in characters of the text, the end not included"  # fmt: skip


@dataclass(frozen=True)
class TaggedWords:
    """The words of N rows, W in all.

    Attributes:
        offsets: words of row i are offsets[i] to offsets[i + 1] - 1, int64 (N + 1,).
        spans: first character of each word in its row's text, and the one behind its last, int32 (W, 2).
        codes: index of each word's tag in `tags`, int64 (W,).
        tags: as the data write them.
        present: rows that have tags, bool (N,).
        widened: rows with spans that cut a word, bool (N,).
        units: what words are; None: no row has any.
    """

    offsets: Array
    spans: Array
    codes: Array
    tags: tuple[str, ...]
    present: Array
    widened: Array
    units: Units | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, rows: Sequence[tuple[Array, list[str] | None, bool]], units: Units | None) -> TaggedWords:
        """From spans (n, 2) and n tags of each row (None: it has none), and whether it was widened."""
        codes: dict[str, int] = {}
        flat = [codes.setdefault(tag, len(codes)) for _, tags, _ in rows for tag in tags or ()]
        spans = [words for words, tags, _ in rows if tags is not None]
        counts = [len(tags or ()) for _, tags, _ in rows]
        return cls(
            np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]),
            np.concatenate([np.empty((0, 2), np.int32), *spans]),
            np.array(flat, np.int64),
            tuple(codes),
            np.array([tags is not None for _, tags, _ in rows], bool),
            np.array([widened for _, _, widened in rows], bool),
            units,
        )

    @classmethod
    def joined(cls, parts: Sequence[TaggedWords]) -> TaggedWords:
        codes: dict[str, int] = {}
        moved = [
            np.array([codes.setdefault(tag, len(codes)) for tag in p.tags], np.int64)[p.codes]
            for p in parts
            if len(p.codes)
        ]
        counts = np.concatenate([np.empty(0, np.int64), *(np.diff(part.offsets) for part in parts)])
        return cls(
            np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
            np.concatenate([np.empty((0, 2), np.int32), *(part.spans for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *moved]),
            tuple(codes),
            np.concatenate([np.empty(0, bool), *(part.present for part in parts)]),
            np.concatenate([np.empty(0, bool), *(part.widened for part in parts)]),
            next((part.units for part in parts if part.units), None),
        )

    def take(self, rows: Array) -> TaggedWords:
        """Some rows, in this order."""
        counts = np.diff(self.offsets)[rows]
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        places = np.arange(ends[-1]) + np.repeat(self.offsets[:-1][rows] - ends[:-1], counts)
        return TaggedWords(
            ends, self.spans[places], self.codes[places], self.tags, self.present[rows], self.widened[rows], self.units
        )


def join_words(value: Any) -> str | None:
    """The text of a row: its words with one space between them, or the text as it is."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def spans_of_text(text: str, units: Units) -> Array:
    """Where the words of a text are, int32 (n, 2); marks around a word of `spaces` are words of their own."""
    if units == "letters":
        marks = "" if text.isascii() else "".join(sorted(_marks().intersection(text)))
        spans = [match.span() for match in _letters(marks).finditer(text)]
    else:
        pieces = re.finditer(r"\S+", text)
        spans = [span for piece in pieces for span in _without_marks(piece[0], piece.start())]
    return np.array(spans, np.int32).reshape(-1, 2)


@functools.cache
def _marks() -> frozenset[str]:
    """All combining marks: accents, vowel signs, variation selectors."""
    return frozenset(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "M")


@functools.lru_cache(4096)
def _letters(marks: str) -> re.Pattern[str]:
    """Words of a text that has these combining marks; a class of all two thousand takes ten times the time."""
    letter = rf"[^\W{_NO_SPACES}\uac00-\ud7af]"
    return re.compile(rf"{letter}+(?:[{marks}]+{letter}*)*|\S[{marks}]*" if marks else rf"{letter}+|\S")


def _without_marks(piece: str, start: int) -> list[tuple[int, int]]:
    """The words of a piece between white space that begins at `start`; one without letters and digits, as `:)`, is one word."""
    if (piece.isalnum() and piece.isascii()) or not re.search(r"\w", piece):
        return [(start, start + len(piece))]
    match = _AROUND.fullmatch(piece)
    assert match is not None
    first, last = (start + at for at in match.span(2))
    ends = [*range(start, first), *range(last, start + len(piece))]
    core = [match.span() for match in _PARTS.finditer(piece, first - start, last - start)]
    return sorted([*((start + a, start + b) for a, b in core), *((at, at + 1) for at in ends)])


def given_words(values: Sequence[Any], where: Callable[[int], str]) -> Array:
    """Of each value that is a list of words where they are in its text, int32 (n, 2), else None; (N,).

    Args:
        where: file and row of a value's number, for messages.

    Raises:
        DataError: a word is not a text, or is blank.
    """
    given = np.full(len(values), None, object)
    for number, value in enumerate(values):
        if isinstance(value, (list, tuple)):
            given[number] = read_row(where(number), value, None)[0]
    return given


def read_row(where: str, text: Any, tags: Any) -> tuple[Array, list[str] | None, bool]:
    """Words, tags and whether a span was widened, of one row; the tags are None where the row has none.

    Args:
        where: file and row, for messages.
        text: a list of words, or a text.
        tags: as many tags, or a list of spans.

    Raises:
        DataError: the row is neither of the two kinds, or its spans overlap or lie outside the text.
    """
    if isinstance(text, (list, tuple)):
        return _of_words(where, text, tags)
    if tags is None or text is None:
        return np.empty((0, 2), np.int32), None, False
    if isinstance(tags, (list, tuple)):
        return _of_spans(where, str(text), tags)
    raise DataError(
        f"{where}: a text with the label {tags!r}: token classification has a tag for each word, or spans",
        f"give lists of words and tags, or spans (JSON Lines and Parquet have lists, CSV has none): {_SPAN}",
    )


def _of_words(where: str, words: Sequence[Any], tags: Any) -> tuple[Array, list[str] | None, bool]:
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{where}, word {number}: {word!r} is not a word", "remove it and its tag")
    lengths = np.array([len(word) for word in words], np.int32)
    ends = np.cumsum(lengths + 1, dtype=np.int32) - 1
    spans = np.stack([ends - lengths, ends], axis=1)
    if tags is None:
        return spans, None, False
    if not isinstance(tags, (list, tuple)) or len(tags) != len(words):
        of_them = plural(len(tags), "tag") if isinstance(tags, (list, tuple)) else "no tags"
        raise DataError(
            f"{where}: {plural(len(words), 'word')} and {of_them}",
            "give each word one tag, O outside entities",
        )
    for number, tag in enumerate(tags, 1):
        if not isinstance(tag, str) or not tag.strip():
            raise DataError(
                f"{where}, word {number}: {tag!r} is not a tag",
                "write names: O, B-PER, I-PER; numbers need the names of a `ClassLabel` (Parquet, Hub)",
            )
    return spans, [tag.strip() for tag in tags], False


def _of_spans(where: str, text: str, spans: Sequence[Any]) -> tuple[Array, list[str], bool]:
    words = spans_of_text(text, "letters")
    tags, widened, taken, before = ["O"] * len(words), False, -1, 0
    for start, end, label in sorted(_span(where, text, span) for span in spans):
        first = int(np.searchsorted(words[:, 1], start, "right"))
        last = int(np.searchsorted(words[:, 0], end, "left"))
        if first >= last:
            raise DataError(
                f"{where}: span {start} to {end} ({text[start:end]!r}) holds no word", f"correct it; {_SPAN}"
            )
        if first <= taken:
            how = (
                "overlaps the one before it"
                if start < before
                else f"is in one word ({text[slice(*words[first])]!r}) with the one before it"
            )
            raise DataError(
                f"{where}: span {start} to {end} ({text[start:end]!r}) {how}",
                "keep one of them: a word has one label; for nested entities train a model for each level",
            )
        inner = text[start:end].strip()
        whole = text[words[first, 0] : words[last - 1, 1]]
        widened |= inner != whole
        tags[first:last] = [f"B-{label}"] + [f"I-{label}"] * (last - first - 1)
        taken, before = last - 1, end
    return words, tags, widened


def _span(where: str, text: str, span: Any) -> tuple[int, int, str]:
    if isinstance(span, Mapping):
        span = [span.get("start"), span.get("end"), span.get("label")]
    if not isinstance(span, (list, tuple)) or len(span) != 3:
        raise DataError(f"{where}: {span!r} is not a span", _SPAN)
    start, end, label = span
    numbers = all(isinstance(value, int) and not isinstance(value, bool) for value in (start, end))
    if not numbers or not isinstance(label, str) or not label.strip():
        raise DataError(f"{where}: {span!r} is not a span", _SPAN)
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"{where}: span {start} to {end} is not inside the text of {len(text)} characters",
            "count characters, not bytes or tokens, from 0; the end is not included",
        )
    return start, end, label.strip()


def find_pieces(offsets: Array, spans: Array, token_offsets: Array, places: Array, cut: Array) -> Array:
    """The first token of each word, as an index in its row, int32 (W,); SHARED where that token begins in the word before it, CUT where the row was
    cut before it, REMOVED where the tokenizer made none of it.

    Args:
        offsets, spans: of the words, as in `TaggedWords`.
        token_offsets: tokens of each row, (N + 1,).
        places: first character of each token in its row's text, and the one behind its last, (T, 2); -1 of special tokens. One without
            a character of its own (the space before a word) is part of the word that begins there.
        cut: rows whose text was longer than allowed, bool (N,).
    """
    starts, ends = places[:, 0], places[:, 1]
    pieces = np.repeat(np.where(cut, CUT, REMOVED), np.diff(offsets)).astype(np.int32)
    for row in range(len(offsets) - 1):
        words = spans[offsets[row] : offsets[row + 1]]
        tokens = slice(int(token_offsets[row]), int(token_offsets[row + 1]))
        real = np.flatnonzero(starts[tokens] >= 0)
        if not len(words) or not len(real):
            continue
        first = starts[tokens][real].astype(np.int64)
        last = np.maximum(ends[tokens][real], first + 1)
        # The first token that ends behind the word's first character.
        place = np.searchsorted(np.maximum.accumulate(last), words[:, 0], side="right")
        inside = place < len(real)
        here = np.where(inside, place, 0)
        own = np.where(inside, real[here], CUT if cut[row] else REMOVED)
        own[inside & (first[here] >= words[:, 1])] = REMOVED  # the token behind it
        repeated = np.zeros(len(words), bool)
        repeated[1:] = (own[1:] == own[:-1]) & (own[1:] >= 0)
        pieces[offsets[row] : offsets[row + 1]] = np.where(repeated, SHARED, own)
    return pieces


def raw_values(reader: FileReader, name: str, batch: RowBatch) -> list[Any]:
    """The values of a column as Python has them; numbers of a `ClassLabel` as names."""
    values, classes = batch.values[name], reader.classes([name]).get(name)
    rows = values.to_pylist() if isinstance(values, pa.Array) else values
    if classes is None:
        return list(rows)
    return [
        [classes[tag] if isinstance(tag, int) and 0 <= tag < len(classes) else tag for tag in row]
        if isinstance(row, list)
        else row
        for row in rows
    ]


def row_texts(reader: FileReader, name: str, batch: RowBatch, *, words: bool) -> pa.Array:
    """A column as texts, large_string.

    Args:
        words: lists of words are texts; else they are refused.
    """
    if not words:
        return reader.texts(name, batch)
    return pa.array([join_words(value) for value in raw_values(reader, name, batch)], pa.large_string())
