"""Examine labelled data for `afina init`: columns, lengths, labels, empty and duplicate texts.

It accepts all that `afina prefetch` accepts, and reports what that would refuse. At most `MOST_ROWS` rows of a split are read;
of a larger one the number of rows is estimated.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from afina.errors import DataError, InputError, nearest
from afina.formats.notes import Notes
from afina.formats.read_options import option
from afina.formats.text_files import note_damaged
from afina.recipe.data_files import split_named

__all__ = [
    "MOST_ROWS",
    "Column",
    "Examined",
    "Source",
    "check_header",
    "check_named",
    "columns_of",
    "count_words",
    "examine",
    "guess_columns",
    "guess_split_column",
    "quantile",
]

MOST_ROWS = 300_000
_FIRST_ROWS = 2_000
_SAMPLE = 2_000
#: A column with more distinct values than this does not hold classes.
_MOST_CLASSES = 200
_SEPARATORS = ("|", ";")

_LABEL_NAMES = ("label", "labels", "class", "category", "target", "stars", "sentiment", "rating", "score", "topic", "intent", "emotion", "y")  # fmt: skip
_TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "document", "utterance", "question", "title")
_ID_NAMES = ("id", "ids", "uid", "uuid", "idx", "index", "row_id", "doc_id", "key")
#: Words; punctuation marks, and characters of Chinese, Japanese and Korean, which a tokenizer takes one by one.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """The rows of one split: `rows()` yields them from the beginning each time. `total_rows`: known or estimated, or None.
    `notes`: what was odd in the rows that were read."""

    name: str
    rows: Callable[[], Iterator[Row]]
    total_rows: int | None = None
    notes: Notes = field(default_factory=Notes)


@dataclass(frozen=True)
class Column:
    """A column by the first rows.

    Attributes:
        filled: share of rows with a value; distinct: different values.
        words: mean number of words.
        numeric, listed: every value is a number, or a list.
        example: the first value, shortened.
        is_value: its name occurs among the values.
        names_splits: every value is the name of a split, and train is one of them.
    """

    name: str
    rows: int
    filled: float
    distinct: int
    words: float
    numeric: bool
    listed: bool
    example: str
    is_value: bool
    names_splits: bool = False


@dataclass(frozen=True)
class Examined:
    """Text and label of one split.

    Attributes:
        rows: counted, or estimated where not all were read (`complete` is false).
        words: of each text that was read, ascending; a punctuation mark counts as a word.
        characters: mean per text.
        labels: rows by label; empty for a regression.
        empty, missing: the first rows without text, and without label; num_empty, num_missing: all of them.
        duplicates: texts that occurred before.
        numeric, whole_numbers: every label is a number, a whole number.
        multiple: several labels per row, as a list or as 0/1 columns.
        separator: splits one label into several, if it looks like that.
        non_ascii: share of letters beyond ASCII.
        split_rows: rows by split, where a column names them; `None` counts rows that it names no split for.
        digests: of the texts, to find the same ones in another split.
        sample: some texts.
        odd: what was odd in the rows.
    """

    rows: int
    complete: bool
    words: tuple[int, ...]
    characters: float
    labels: Mapping[str, int]
    empty: tuple[int, ...]
    num_empty: int
    missing: tuple[int, ...]
    num_missing: int
    duplicates: int
    numeric: bool
    whole_numbers: bool
    multiple: bool
    separator: str | None
    non_ascii: float
    split_rows: Mapping[str | None, int]
    digests: frozenset[bytes]
    sample: tuple[str, ...]
    odd: tuple[str, ...] = ()


# -- columns -----------------------------------------------------------------------------------------------------------


def columns_of(source: Source) -> tuple[Column, ...]:
    """The columns of the first rows.

    Raises:
        DataError: there are no rows.
    """
    rows = list(itertools.islice(source.rows(), _FIRST_ROWS))
    if not rows:
        raise DataError(f"{source.name}: no rows", "the first line names the columns, each further one is an example")
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str) and name))
    return tuple(_column(name, [row.get(name) for row in rows]) for name in names)


def _column(name: str, values: list[Any]) -> Column:
    given = [v for v in values if v is not None and v != ""]
    texts = [_text(v) for v in given]
    first = " ".join(texts[0].split()) if texts else ""
    return Column(
        name=name,
        rows=len(values),
        filled=len(given) / len(values),
        distinct=len(set(texts)),
        words=sum(len(t.split()) for t in texts) / max(1, len(texts)),
        numeric=bool(given) and all(_number(v) is not None for v in given),
        listed=bool(given) and all(isinstance(v, list) for v in given),
        example=first if len(first) <= 60 else first[:59] + "…",
        is_value=name in texts,
        names_splits="train" in (splits := {split_named(t) for t in texts}) and None not in splits,
    )


def guess_columns(columns: Sequence[Column]) -> tuple[str | None, str | None, str | None]:
    """The columns that look like text, label and id; None where none does."""

    def named(names: Sequence[str], among: Sequence[Column]) -> str | None:
        folded = {c.name.strip().casefold(): c.name for c in among}
        return next((folded[n] for n in names if n in folded), None)

    texts = [c for c in columns if not c.numeric and not c.listed and c.words >= 1.5]
    longest = max(texts, key=lambda c: c.words, default=None)
    text = named(_TEXT_NAMES, texts) or (longest.name if longest else None)
    rest = [c for c in columns if c.name != text and c.filled > 0]
    classes = [c for c in rest if 2 <= c.distinct <= min(_MOST_CLASSES, max(2, c.rows // 2)) or c.listed]
    simplest = min(classes, key=lambda c: (c.words, c.distinct), default=None)
    label = named(_LABEL_NAMES, classes) or named(_LABEL_NAMES, rest) or (simplest.name if simplest else None)
    ids = [c for c in rest if c.name != label and c.distinct == c.rows and c.rows > 1 and c.words <= 1]
    return text, label, named(_ID_NAMES, ids)


def check_header(columns: Sequence[Column], source: str) -> None:
    """Refuse a CSV or TSV whose header looks like a row: it names no usual column, and holds a value, a number or a sentence.

    Raises:
        InputError: with the option for a file without a header.
    """
    usual = {*_LABEL_NAMES, *_TEXT_NAMES, *_ID_NAMES}
    if any(c.name.casefold() in usual for c in columns):
        return
    if any(c.is_value or (c.numeric and _number(c.name) is not None) or len(c.name.split()) > 5 for c in columns):
        shown = ", ".join(_short(c.name) for c in columns[:5]) + (", …" if len(columns) > 5 else "")
        raise InputError(
            f"{source}: the first line looks like a row, not like the names of columns: {shown}",
            f"{option('header', 'false')}, or --header NAME,NAME; if it is the header, name the columns with --text and --label",
        )


def guess_split_column(columns: Sequence[Column], taken: Collection[str]) -> str | None:
    """The column whose values name the split of each row, or None."""
    found = [c for c in columns if c.names_splits and c.name not in taken and c.filled == 1]
    return found[0].name if len(found) == 1 else None


def check_named(columns: Sequence[Column], wanted: Sequence[str], option: str, source: str) -> None:
    """Raises InputError: there is no such column; with the nearest."""
    known = [c.name for c in columns]
    for name in wanted:
        if name not in known:
            hint = nearest(name, known)
            raise InputError(
                f"{option} {name}: {source} has no such column",
                f"{hint + ' ' if hint else ''}columns: {', '.join(known)}",
            )


# -- text and label ----------------------------------------------------------------------------------------------------


def examine(
    source: Source,
    text: Sequence[str],
    label: Sequence[str],
    tick: Callable[[int], None] | None = None,
    split_column: str | None = None,
) -> Examined:
    """Read a split.

    Args:
        text: one column, or two for pairs.
        label: one column, or several of 0 and 1.
        tick: called with the number of rows now and then.
    """
    source.notes.clear()
    texts, labels = _Texts(), _Labels(label)
    splits: Counter[str | None] = Counter()
    number = 0
    rows = source.rows()
    for number, row in enumerate(itertools.islice(rows, MOST_ROWS), 1):
        parts = [_text(row.get(name)) for name in text]
        texts.add(number, parts)
        note_damaged(source.notes, parts, [number] * len(parts))
        labels.add(number, [row.get(name) for name in label])
        if split_column is not None:
            splits[split_named(_text(row.get(split_column)))] += 1
        if tick is not None and number % 5000 == 0:
            tick(number)
    more = number == MOST_ROWS and next(rows, None) is not None
    regression = labels.numeric and not labels.whole
    separated = labels.separated > number * 0.02 and not labels.listed
    return Examined(
        rows=(source.total_rows or number) if more else number,
        complete=not more,
        words=tuple(sorted(texts.words)),
        characters=texts.characters / max(1, number),
        labels={} if regression else dict(labels.counts.most_common()),
        empty=tuple(texts.empty.first),
        num_empty=texts.empty.count,
        missing=tuple(labels.missing.first),
        num_missing=labels.missing.count,
        duplicates=texts.duplicates,
        numeric=labels.numeric and bool(labels.counts),
        whole_numbers=labels.whole,
        multiple=labels.listed or len(label) > 1,
        separator=_separator(labels.counts) if separated else None,
        non_ascii=texts.non_ascii / texts.letters if texts.letters else 0.0,
        split_rows=splits,
        digests=frozenset(texts.digests),
        sample=tuple(texts.sample),
        odd=tuple(source.notes.warnings(source.name, "row")),
    )


class _Rows:
    """Counts rows, and remembers the numbers of the first five."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < 5:
            self.first.append(number)


class _Texts:
    """Lengths, duplicates and a sample of the texts."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.empty = _Rows()
        self.digests: set[bytes] = set()
        self.sample: list[str] = []
        self.characters = self.duplicates = self.letters = self.non_ascii = 0

    def add(self, number: int, parts: list[str]) -> None:
        joined = "\n".join(parts)
        # Of more than two, which are joined, some may be empty.
        if not (any if len(parts) > 2 else all)(part.strip() for part in parts):
            self.empty.add(number)
        self.words.append(sum(map(count_words, parts)))
        self.characters += len(joined)
        digest = hashlib.blake2b(joined.encode(errors="replace"), digest_size=8).digest()
        self.duplicates += digest in self.digests
        self.digests.add(digest)
        if len(self.sample) < _SAMPLE and number % 7 == 1:
            self.sample.append(joined)
            self.letters += sum(map(str.isalpha, joined))
            self.non_ascii += sum(c.isalpha() and not c.isascii() for c in joined)


class _Labels:
    """Rows by label, and what kind of labels they are."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns
        self.counts: Counter[str] = Counter()
        self.missing = _Rows()
        self.separated = 0
        self.numeric = self.whole = True
        self.listed = False

    def add(self, number: int, values: list[Any]) -> None:
        value = values[0]
        if any(map(_is_missing, values)):
            self.missing.add(number)
        elif len(values) > 1:
            self._add_list(name for name, v in zip(self.columns, values, strict=True) if _number(v))
        elif isinstance(value, list) and len(value) != 1:
            self._add_list(map(_label, value))
        else:
            # Where all lists have one label they are single labels.
            value = value[0] if isinstance(value, list) else value
            as_number = _number(value)
            self.numeric = self.numeric and as_number is not None
            self.whole = self.whole and (as_number is None or as_number == int(as_number))
            self.separated += isinstance(value, str) and any(mark in value for mark in _SEPARATORS)
            if len(self.counts) <= 10 * _MOST_CLASSES:
                self.counts[_label(value)] += 1

    def _add_list(self, labels: Iterator[str]) -> None:
        self.listed, self.numeric = True, False
        self.counts.update(labels)


def _separator(labels: Mapping[str, int]) -> str | None:
    """The mark that splits many different labels into few names."""
    for mark in _SEPARATORS:
        names = {name.strip() for value in labels for name in value.split(mark)}
        if any(mark in value for value in labels) and len(names) < len(labels):
            return mark
    return None


def count_words(text: str) -> int:
    """Words and punctuation marks: a tokenizer makes at least one token of each."""
    return len(_WORDS.findall(text))


def _short(text: str) -> str:
    return repr(text if len(text) <= 24 else text[:23] + "…")


def quantile(ascending: Sequence[int], q: float) -> int:
    """The smallest value that at least a share `q` of the values does not exceed."""
    return ascending[min(len(ascending) - 1, max(0, math.ceil(q * len(ascending)) - 1))] if ascending else 0


def _is_missing(value: Any) -> bool:
    """As the prepare stage sees a missing label: null, blank, NaN."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _label(value: Any) -> str:
    """As the prepare stage compares labels: trimmed, and 1, 1.0 and "1" are one."""
    number = _number(value) if not isinstance(value, bool) else None
    if number is not None and number == int(number):
        return str(int(number))
    return _text(value).strip()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
