"""Columns of labelled data for `afina init`: which look like text, label, id, split, group and weight; whether the header looks like a row."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from afina.errors import DataError, InputError, nearest
from afina.formats.columns import SPAN
from afina.formats.notes import Notes
from afina.formats.read_options import option
from afina.recipe.data_files import split_named

__all__ = [
    "MOST_CLASSES",
    "Column",
    "Source",
    "are_spans",
    "check_named",
    "columns_of",
    "guess_columns",
    "guess_group",
    "guess_split_column",
    "guess_weight",
    "header_error",
    "number_of",
    "other_labels",
    "span_label",
    "text_of",
]

#: A column with more distinct values than this does not hold classes.
MOST_CLASSES = 200
#: A name of a class seldom has more words.
_WORDS_OF_LABEL = 3
_FIRST_ROWS = 2_000

_LABEL_NAMES = ("label", "labels", "class", "category", "target", "stars", "sentiment", "rating", "score", "topic", "intent", "emotion", "y")  # fmt: skip
_TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "document", "utterance", "question", "title")
_WORD_NAMES, _TAG_NAMES = ("tokens", "words"), ("ner_tags", "tags", "labels", "ner", "entities")
_ID_NAMES = ("id", "ids", "uid", "uuid", "idx", "index", "row_id", "doc_id", "key")
#: Of whoever or whatever several texts come from; also with `_id`, `id` or `_name` behind it.
_GROUP_NAMES = ("group", "author", "writer", "user", "username", "speaker", "reviewer", "patient", "subject", "participant", "respondent", "customer", "document", "doc", "session", "conversation", "thread", "article", "school")  # fmt: skip
_WEIGHT_NAMES = ("weight", "weights", "sample_weight", "instance_weight", "row_weight")
#: A group with more than this share of the rows may be larger than a part.
_LARGEST_GROUP = 0.05

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
        filled: share of rows with a value; distinct: different values; commonest: rows of the most frequent one.
        words: mean number of words.
        numeric, listed: every value is a number, or a list.
        example: the first value, shortened.
        spans: every value is a list of spans with labels.
        is_value: its name occurs among the values.
        names_splits: every value is the name of a split, and train is one of them.
    """

    name: str
    rows: int
    filled: float
    distinct: int
    commonest: int
    words: float
    numeric: bool
    listed: bool
    example: str
    is_value: bool
    names_splits: bool = False
    spans: bool = False


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
    texts = [text_of(v) for v in given]
    first = " ".join(texts[0].split()) if texts else ""
    counts = Counter(texts)
    return Column(
        name=name,
        rows=len(values),
        filled=len(given) / len(values),
        distinct=len(counts),
        commonest=max(counts.values(), default=0),
        words=sum(len(t.split()) for t in texts) / max(1, len(texts)),
        numeric=bool(given) and all(number_of(v) is not None for v in given),
        listed=bool(given) and all(isinstance(v, list) for v in given),
        example=first if len(first) <= 60 else first[:59] + "…",
        is_value=name in counts,
        spans=bool(given) and all(isinstance(v, list) for v in given) and any(map(are_spans, given)),
        names_splits="train" in (splits := {split_named(t) for t in counts}) and None not in splits,
    )


def guess_columns(columns: Sequence[Column]) -> tuple[str | None, str | None, str | None]:
    """The columns that look like text, label and id; None where none does."""

    lists = [c for c in columns if c.listed]
    words, tags = _named(_WORD_NAMES, lists), _named(_TAG_NAMES, lists)
    texts = [c for c in columns if not c.numeric and not c.listed and c.words >= 1.5]
    longest = max(texts, key=lambda c: c.words, default=None)
    text = _named(_TEXT_NAMES, texts) or (longest.name if longest else None)
    rest = [c for c in columns if c.name != text and c.filled > 0]
    spans = next((c.name for c in rest if c.spans), None)
    if (words and tags) or (text and spans):
        pair = (words, tags) if words and tags else (text, spans)
        others = [c for c in rest if c.name not in pair and c.distinct == c.rows > 1 and c.words <= 1]
        return *pair, _named(_ID_NAMES, others)
    classes = [c for c in rest if _holds_classes(c)]
    simplest = min(classes, key=lambda c: (c.words > _WORDS_OF_LABEL, c.distinct), default=None)
    label = _named(_LABEL_NAMES, classes) or _named(_LABEL_NAMES, rest) or (simplest.name if simplest else None)
    ids = [c for c in rest if c.name != label and c.distinct == c.rows and c.rows > 1 and c.words <= 1]
    return text, label, _named(_ID_NAMES, ids)


def _named(names: Sequence[str], among: Sequence[Column]) -> str | None:
    folded = {c.name.strip().casefold(): c.name for c in among}
    return next((folded[n] for n in names if n in folded), None)


def _holds_classes(column: Column) -> bool:
    return 2 <= column.distinct <= min(MOST_CLASSES, max(2, column.rows // 2)) or column.listed


def other_labels(columns: Sequence[Column], text: Sequence[str], label: str) -> tuple[str, ...]:
    """Columns that might as well be the label; none where its name says that it is, or its form."""
    chosen = next(c for c in columns if c.name == label)
    if _named(_LABEL_NAMES, [chosen]) or chosen.spans or chosen.listed:
        return ()
    others = (c for c in columns if c.name not in (*text, label) and _holds_classes(c) and not c.names_splits)
    return tuple(
        c.name for c in others if _named((*_ID_NAMES, *_WEIGHT_NAMES), [c]) is None and not _means_group(c.name)
    )


def header_error(columns: Sequence[Column], source: str) -> InputError | None:
    """The error for a CSV or TSV whose header looks like a row: it names no usual column, and holds a value, a number or a sentence."""
    usual = {*_LABEL_NAMES, *_TEXT_NAMES, *_ID_NAMES}
    if any(c.name.casefold() in usual for c in columns):
        return None
    if any(c.is_value or (c.numeric and number_of(c.name) is not None) or len(c.name.split()) > 5 for c in columns):
        shown = ", ".join(_short(c.name) for c in columns[:5]) + (", …" if len(columns) > 5 else "")
        return InputError(
            f"{source}: the first line looks like a row, not like the names of columns: {shown}",
            f"{option('header', 'false')}, or --header NAME,NAME; if it is the header, name the columns with --text and --label",
        )
    return None


def guess_split_column(columns: Sequence[Column], taken: Collection[str]) -> str | None:
    """The column whose values name the split of each row, or None."""
    candidates = [c for c in columns if c.names_splits and c.name not in taken and c.filled == 1]
    return candidates[0].name if len(candidates) == 1 else None


def guess_group(columns: Sequence[Column], taken: Collection[str]) -> str | None:
    """The column that names what several texts come from, as an author; None where there is none, where two could be meant, or where a
    group may be larger than a part."""

    candidates = [
        c.name
        for c in columns
        if _means_group(c.name)
        and c.name not in taken
        and c.filled == 1
        and not c.listed
        and c.words <= 4
        and c.distinct < c.rows
        and c.commonest <= _LARGEST_GROUP * c.rows
    ]
    return candidates[0] if len(candidates) == 1 else None


def _means_group(name: str) -> bool:
    folded = name.strip().casefold()
    return any(folded.removesuffix(end).rstrip("_ -") in _GROUP_NAMES for end in ("", "id", "name"))


def guess_weight(columns: Sequence[Column], taken: Collection[str]) -> str | None:
    """The column that looks like sample weights, or None."""
    names = (c.name for c in columns if c.numeric and c.filled == 1 and c.name not in taken)
    return next((name for name in names if name.strip().casefold() in _WEIGHT_NAMES), None)


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


def _short(text: str) -> str:
    return repr(text if len(text) <= 24 else text[:23] + "…")


def are_spans(value: Any) -> bool:
    """True if a value is a list of spans of a text, each with its label."""
    return isinstance(value, list) and any(span_label(each) is not None for each in value)


def span_label(value: Any) -> str | None:
    """The label of a span, `{start, end, label}` or `[start, end, label]`; None of anything else."""
    if isinstance(value, Mapping):
        return str(value["label"]) if value.keys() >= SPAN else None
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[2], str):
        return None
    return value[2] if all(type(place) is int for place in value[:2]) else None


def text_of(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number_of(value: Any) -> float | None:
    """The number that a value is or represents, or None; it may be infinite or NaN."""
    if isinstance(value, str) and "_" in value:  # 1_000 is Python's alone
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
