"""A first look into labelled data, for `afina init`: columns, lengths, classes, what is empty and what is there twice.

All formats are read by `afina.recipe.formats`; a Hub data set is fetched first, by `afina.worker.data.peek`. Nothing is refused that
`afina prefetch` would take, and what it would refuse is said. At most `MOST_ROWS` rows of a part are read; the rest is
extrapolated by size, and said to be.

Not covered: compressed files, other separators than comma and tab, other encodings than UTF-8: as in the prepare stage.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.errors import DataError, InputError, nearest

__all__ = [
    "MOST_ROWS",
    "Column",
    "Examined",
    "Source",
    "check_named",
    "columns_of",
    "count_pieces",
    "examine",
    "guess_columns",
    "quantile",
]

MOST_ROWS = 300_000
_FIRST_ROWS = 2_000
#: More different values than this are no classes.
_MOST_CLASSES = 200
_SEPARATORS = ("|", ";", ",")

_LABEL_NAMES = ("label", "labels", "class", "category", "target", "stars", "sentiment", "rating", "score", "topic", "intent", "emotion", "y")  # fmt: skip
_TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "document", "utterance", "question", "title")
_ID_NAMES = ("id", "ids", "uid", "uuid", "idx", "index", "row_id", "doc_id", "key")
#: Marks and the characters of Chinese, Japanese and Korean, which a tokenizer takes one by one; and words.
_PIECES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")

Row = Mapping[str, Any]
Rows = Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Source:
    """Where the rows of one part come from: `rows()` yields them from the beginning, as often as it is called.

    Attributes:
        total_rows: how many there are, where that is known or can be told from the size without reading all.
    """

    name: str
    rows: Rows
    total_rows: int | None = None


@dataclass(frozen=True)
class Column:
    """What the first rows say of a column.

    Attributes:
        filled: share of rows with a value; distinct: different values among them.
        words: mean number of words of a text.
        numeric, whole: every value is a number, and a whole one.
        listed: values are lists.
        example: the first value, shortened.
    """

    name: str
    rows: int
    filled: float
    distinct: int
    words: float
    numeric: bool
    whole: bool
    listed: bool
    example: str


@dataclass(frozen=True)
class Examined:
    """What text and label of one part are.

    Attributes:
        rows: all of them; counted, or estimated where `whole` is false.
        pieces: words and marks of each text that was read, ascending.
        characters: mean per text.
        labels: occurrences by value as text; empty for numbers that are to be predicted.
        empty, missing, duplicates: row numbers of texts without a word and of rows without a label (the first few), and how
            many texts are there more than once.
        numeric, whole: every label is a number, and a whole one.
        separator: splits one label into several, if it looks like that.
        foreign: share of letters beyond ASCII.
        digests: of the texts, to find the same ones in another part.
        sample: some texts, for a tokenizer.
    """

    rows: int
    whole: bool
    pieces: tuple[int, ...]
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
    foreign: float
    digests: frozenset[bytes]
    sample: tuple[str, ...]


# -- columns ----------------------------------------------------------------------------------------------------------


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
    numbers = [_number(v) for v in given]
    first = " ".join(texts[0].split()) if texts else ""
    return Column(
        name=name,
        rows=len(values),
        filled=len(given) / len(values),
        distinct=len(set(texts)),
        words=sum(len(t.split()) for t in texts) / max(1, len(texts)),
        numeric=bool(given) and all(n is not None for n in numbers),
        whole=bool(given) and all(n is not None and n == int(n) for n in numbers),
        listed=bool(given) and all(isinstance(v, list) for v in given),
        example=first if len(first) <= 60 else first[:59] + "…",
    )


def guess_columns(columns: Sequence[Column]) -> tuple[str | None, str | None, str | None]:
    """The columns that look like text, label and id; None where none does."""

    def named(names: Sequence[str], among: Sequence[Column]) -> str | None:
        folded = {c.name.casefold(): c.name for c in among}
        return next((folded[n] for n in names if n in folded), None)

    texts = [c for c in columns if not c.numeric and not c.listed and c.words >= 1.5]
    text = named(_TEXT_NAMES, texts) or max(texts, key=lambda c: c.words, default=_NOTHING).name or None
    rest = [c for c in columns if c.name != text and c.filled > 0]
    classes = [c for c in rest if 2 <= c.distinct <= min(_MOST_CLASSES, max(2, c.rows // 2)) or c.listed]
    label = named(_LABEL_NAMES, classes) or named(_LABEL_NAMES, rest)
    if label is None:
        label = min(classes, key=lambda c: (c.words, c.distinct), default=_NOTHING).name or None
    ids = [c for c in rest if c.name != label and c.distinct == c.rows and c.rows > 1 and c.words <= 1]
    return text, label, named(_ID_NAMES, ids)


_NOTHING = Column("", 0, 0.0, 0, 0.0, False, False, False, "")


def check_named(columns: Sequence[Column], wanted: Sequence[str], option: str, source: str) -> None:
    """Raises InputError: a column that is not there, with the nearest."""
    known = [c.name for c in columns]
    for name in wanted:
        if name not in known:
            hint = nearest(name, known)
            raise InputError(
                f"{option} {name}: {source} has no such column",
                f"{hint + ' ' if hint else ''}columns: {', '.join(known)}",
            )


# -- text and label ---------------------------------------------------------------------------------------------------


def examine(
    source: Source, text: Sequence[str], label: Sequence[str], tick: Callable[[int], None] | None = None
) -> Examined:
    """Read the part and say what text and label are.

    Args:
        text: one column, or two for pairs.
        label: one column, or several of 0 and 1.
        tick: called with the number of rows now and then.
    """
    pieces: list[int] = []
    labels: Counter[str] = Counter()
    seen: set[bytes] = set()
    empty: list[int] = []
    missing: list[int] = []
    sample: list[str] = []
    num_empty = num_missing = duplicates = characters = letters = foreign = separated = 0
    numeric = whole = True
    listed = False
    number = 0
    rows = source.rows()
    for number, row in enumerate(itertools.islice(rows, MOST_ROWS), 1):
        parts = [_text(row.get(name)) for name in text]
        joined = "\n".join(parts)
        if not all(part.strip() for part in parts):
            num_empty += 1
            empty += [number] if len(empty) < 5 else []
        pieces.append(sum(map(count_pieces, parts)))
        characters += len(joined)
        digest = hashlib.blake2b(joined.encode(errors="replace"), digest_size=8).digest()
        duplicates += digest in seen
        seen.add(digest)
        if len(sample) < 2000 and number % 7 == 1:
            sample.append(joined)
            letters += sum(map(str.isalpha, joined))
            foreign += sum(c.isalpha() and not c.isascii() for c in joined)
        value = [row.get(name) for name in label] if len(label) > 1 else row.get(label[0])
        if value is None or (isinstance(value, str) and not value.strip()) or (len(label) > 1 and None in value):
            num_missing += 1
            missing += [number] if len(missing) < 5 else []
        elif isinstance(value, list):
            listed = True
            named = (
                [n for n, v in zip(label, value, strict=True) if _number(v)] if len(label) > 1 else map(_label, value)
            )
            labels.update(named)
            numeric = False
        else:
            as_number = _number(value)
            numeric = numeric and as_number is not None
            whole = whole and (as_number is None or as_number == int(as_number))
            separated += isinstance(value, str) and any(s in value for s in _SEPARATORS[:2])
            if len(labels) <= 10 * _MOST_CLASSES:
                labels[_label(value)] += 1
        if tick is not None and number % 5000 == 0:
            tick(number)
    more = number == MOST_ROWS and next(rows, None) is not None
    return Examined(
        rows=(source.total_rows or number) if more else number,
        whole=not more,
        pieces=tuple(sorted(pieces)),
        characters=characters / max(1, number),
        labels={} if numeric and not whole else dict(labels.most_common()),
        empty=tuple(empty),
        num_empty=num_empty,
        missing=tuple(missing),
        num_missing=num_missing,
        duplicates=duplicates,
        numeric=numeric and bool(labels),
        whole_numbers=whole,
        multiple=listed or len(label) > 1,
        separator=_separator(labels) if separated > number * 0.02 and not listed else None,
        foreign=foreign / letters if letters else 0.0,
        digests=frozenset(seen),
        sample=tuple(sample),
    )


def _separator(labels: Mapping[str, int]) -> str | None:
    """The mark that makes few names of many different labels."""
    for mark in _SEPARATORS[:2]:
        parts = {part.strip() for value in labels for part in value.split(mark)}
        if any(mark in value for value in labels) and len(parts) < len(labels):
            return mark
    return None


def count_pieces(text: str) -> int:
    """Words and marks: what a tokenizer takes at least one token for."""
    return len(_PIECES.findall(text))


def quantile(ascending: Sequence[int], q: float) -> int:
    """The smallest value that at least a share `q` of the values does not exceed."""
    return ascending[min(len(ascending) - 1, max(0, math.ceil(q * len(ascending)) - 1))] if ascending else 0


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
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
