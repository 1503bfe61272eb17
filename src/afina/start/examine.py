"""Examine labelled data for `afina init`: columns, lengths, labels, empty and duplicate texts.

It accepts all that `afina prefetch` accepts, and reports what that would refuse. At most `MOST_ROWS` rows of a split are read;
of a larger one the number of rows is estimated.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.formats.json_rows import number_text
from afina.formats.text_files import note_damaged, note_missing
from afina.recipe.data_files import split_named
from afina.start.guess_columns import MOST_CLASSES, Source, are_spans, number_of, span_label, text_of

__all__ = [
    "MOST_ROWS",
    "Examined",
    "RowNumbers",
    "count_words",
    "examine",
    "quantile",
]

MOST_ROWS = 300_000
_SAMPLE = 2_000
_SEPARATORS = ("|", ";")

#: Words; punctuation marks, and characters of Chinese, Japanese and Korean, which a tokenizer takes one by one.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")


class RowNumbers:
    """Counts rows, and remembers the numbers of the first five."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[int] = []

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < 5:
            self.first.append(number)


@dataclass(frozen=True)
class Examined:
    """Text and label of one split.

    Attributes:
        rows: counted, or estimated where not all were read (`complete` is false).
        words: of each text that was read, ascending; a punctuation mark counts as a word.
        characters: mean per text.
        labels: rows by label; empty for a regression.
        refused: rows that `afina prefetch` refuses, by what they have: an empty text, no label, ….
        duplicates: texts that occurred before.
        numeric, whole_numbers: every label is a number, a whole number.
        multiple: several labels per row, as a list or as 0/1 columns.
        separator: splits one label into several, if it looks like that.
        non_ascii: share of letters beyond ASCII.
        split_rows: rows by split, where a column names them; `None` counts rows that it names no split for.
        digests: of the texts, to find the same ones in another split.
        sample: some texts.
        odd: what was odd in the rows.
        tagged: entities are labelled: texts are lists of words with a tag each, or labels are spans; `labels` counts entities by type.
        flags: where one label column holds 0 and 1: the columns that do so too.
    """

    rows: int
    complete: bool
    words: tuple[int, ...]
    characters: float
    labels: Mapping[str, int]
    refused: Mapping[str, RowNumbers]
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
    flags: tuple[str, ...] = ()
    tagged: bool = False


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
    flags: dict[str, None] = {}
    rows = source.rows()
    for number, row in enumerate(itertools.islice(rows, MOST_ROWS), 1):
        words = isinstance(row.get(text[0]), list)
        parts = [" ".join(map(str, row[text[0]]))] if words else [text_of(row.get(name)) for name in text]
        texts.add(number, parts)
        note_damaged(source.notes, parts, [number] * len(parts))
        note_missing(source.notes, parts, [number] * len(parts))
        labels.add(number, [row.get(name) for name in label], of_words=words)
        if number <= _SAMPLE:
            flags = {name: None for name in (row if number == 1 else flags) if number_of(row.get(name)) in (0, 1)}
        if split_column is not None:
            splits[split_named(text_of(row.get(split_column)))] += 1
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
        refused={what: rows for what, rows in {**texts.refused, **labels.refused()}.items() if rows.count},
        duplicates=texts.duplicates,
        numeric=labels.numeric and bool(labels.counts),
        whole_numbers=labels.whole,
        multiple=(labels.listed or len(label) > 1) and not labels.tagged,
        separator=_separator(labels.counts) if separated else None,
        non_ascii=texts.non_ascii / texts.letters if texts.letters else 0.0,
        split_rows=splits,
        digests=frozenset(texts.digests),
        sample=tuple(texts.sample),
        odd=tuple(source.notes.warnings(source.name, "row")),
        flags=tuple(name for name in flags if name not in (*text, *label))
        if flags.keys() & {label[0]} == set(label)
        else (),
        tagged=labels.tagged,
    )


class _Texts:
    """Lengths, duplicates and a sample of the texts."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.refused = {"an empty text": RowNumbers()}
        self.digests: set[bytes] = set()
        self.sample: list[str] = []
        self.characters = self.duplicates = self.letters = self.non_ascii = 0

    def add(self, number: int, parts: list[str]) -> None:
        joined = "\n".join(parts)
        # Of more than two, which are joined, some may be empty.
        if not (any if len(parts) > 2 else all)(part.strip() for part in parts):
            self.refused["an empty text"].add(number)
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
        self.missing, self.nested, self.infinite, self.lists, self.single = (RowNumbers() for _ in range(5))
        self.separated = 0
        self.numeric = self.whole = True
        self.listed = self.tagged = False

    def add(self, number: int, values: list[Any], *, of_words: bool) -> None:
        value = values[0]
        if of_words or are_spans(value) or (self.tagged and value == []):
            self._add_entities(number, value)
        elif any(map(_is_missing, values)):
            self.missing.add(number)
        elif len(values) > 1:
            self._add_list(name for name, v in zip(self.columns, values, strict=True) if (number_of(v) or 0) > 0)
        elif isinstance(value, dict) or (isinstance(value, list) and any(_is_nested(each) for each in value)):
            self.nested.add(number)
        elif isinstance(value, list):
            self.lists.add(number)
            # Where all lists have one label they are single labels.
            if len(value) == 1:
                self._add_one(number, value[0])
            else:
                self._add_list(map(_label, value))
        else:
            self.single.add(number)
            self._add_one(number, value)

    def _add_entities(self, number: int, value: Any) -> None:
        """Count the entities of a row, by type: of tags, or of spans."""
        self.tagged, self.numeric = True, False
        if not isinstance(value, list):
            self.missing.add(number)
            return
        before = ""
        for each in value:
            label = span_label(each)
            tag = str(each) if label is None else f"B-{label}"
            prefix, kind = (tag[0], tag[2:]) if tag[1:2] in ("-", "_") else ("", tag)
            if tag != "O" and (prefix in ("B", "S", "U", "W") or kind != before):
                self.counts[kind] += 1
            before = kind if tag != "O" else ""

    def _add_one(self, number: int, value: Any) -> None:
        as_number = number_of(value)
        if as_number is not None and not math.isfinite(as_number):
            self.infinite.add(number)
        else:
            self.numeric = self.numeric and as_number is not None
            self.whole = self.whole and (as_number is None or as_number == int(as_number))
        self.separated += isinstance(value, str) and any(mark in value for mark in _SEPARATORS)
        if len(self.counts) <= 10 * MOST_CLASSES:
            self.counts[_label(value)] += 1

    def _add_list(self, labels: Iterator[str]) -> None:
        self.listed, self.numeric = True, False
        self.counts.update(labels)

    def refused(self) -> dict[str, RowNumbers]:
        rows = {"no label": self.missing, "a label that is an object or holds one": self.nested}
        if self.numeric:
            rows["a label that is no finite number, among numbers"] = self.infinite
        if self.lists.count and self.single.count:
            few, *_ = sorted((self.lists, self.single), key=lambda each: each.count)
            kinds = ("a list", "a single value") if few is self.lists else ("a single value", "a list")
            rows[f"{kinds[0]} as label, where others have {kinds[1]}"] = few
        return rows


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


def quantile(ascending: Sequence[int], q: float) -> int:
    """The smallest value that at least a share `q` of the values does not exceed."""
    return ascending[min(len(ascending) - 1, max(0, math.ceil(q * len(ascending)) - 1))] if ascending else 0


def _is_missing(value: Any) -> bool:
    """As the prepare stage sees a missing label: null, blank, NaN."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _is_nested(value: Any) -> bool:
    return value is None or isinstance(value, list | dict)


def _label(value: Any) -> str:
    """As the prepare stage compares labels: trimmed texts, and numbers as `number_text` writes them."""
    return value.strip() if isinstance(value, str) else str(number_text(value))
