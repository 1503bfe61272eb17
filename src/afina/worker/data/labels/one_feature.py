"""Checks whether one feature of the text predicts the label: the label's own name, up to three tokens, or the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from afina.worker.data.labels.find_labels import Labels
from afina.worker.data.prepared import Split

__all__ = ["check_one_feature"]

Array = np.ndarray[Any, Any]

_SHOWN = 5
#: One feature: rows examined, labels, rows of a label, and the shares from which it tells the label.
_EXAMINED = 5_000
_MOST_LABELS = 200
_FEW = 10
_TOLD = 0.98
#: The label's own name: the share of its rows in which it stands, and of the rows in which it stands that are its own.
_NAMED = 0.5
_ONLY_THERE = 0.95
_TOLD_BY_LENGTH = 0.95
_MOST_TOLD_BY_CHANCE = 0.8


def check_one_feature(
    labels: Labels, train: Split, word: Callable[[int], str], tokens_of: Callable[[str], list[int]]
) -> list[str]:
    """Warn where the label's name, up to three tokens, or the number of tokens tells the label of nearly every row of train.

    At most 5,000 rows are examined. Not covered: multi-label and regression, and more than 200 labels.

    Args:
        word: the text of a token.
        tokens_of: the tokens of a text, without special ones.
    """
    rows = np.unique(np.linspace(0, len(train) - 1, min(len(train), _EXAMINED)).astype(np.int64))
    if labels.names is None or labels.task != "single-label" or len(labels.names) > _MOST_LABELS or len(rows) < 40:
        return []
    classes, lengths = np.asarray(train.labels)[rows], train.lengths[rows]
    tokens = np.concatenate([train.tokens[train.offsets[row] : train.offsets[row + 1]] for row in rows]).astype(
        np.int64
    )
    owners = np.repeat(np.arange(len(rows)), lengths)
    warnings = []
    shown = _told_by_name(labels.names, classes, tokens, owners, tokens_of) or _told_by_tokens(
        labels.names, classes, tokens, owners, word
    )
    if shown:
        warnings.append(
            f"the text tells the label in train: {'; '.join(shown)}: does the text contain the label, or an id made of it?"
        )
    share = np.bincount(classes).max() / len(rows)
    by_length = _told_by_length(classes, lengths)
    if by_length >= _TOLD_BY_LENGTH and share <= _MOST_TOLD_BY_CHANCE:
        warnings.append(
            f"the number of tokens tells the label of {by_length:.1%} of the rows of train: is the label made from the text's "
            "length, or is the text shaped by it?"
        )
    return warnings


def _told_by_name(
    names: Sequence[str], classes: Array, tokens: Array, owners: Array, tokens_of: Callable[[str], list[int]]
) -> list[str]:
    """Labels whose own name stands in most of their rows, and hardly in others."""
    features = []
    for label, name in enumerate(names):
        rows: set[int] = set()
        for written in (name, f" {name}"):
            if wanted := tokens_of(written):
                starts = np.ones(len(tokens), bool)
                for place, token in enumerate(wanted):
                    starts &= np.append(tokens[place:], [-1] * place) == token
                first, last = owners, np.append(owners[len(wanted) - 1 :], [-1] * (len(wanted) - 1))
                rows.update(owners[starts & (first == last)].tolist())
        mine, count = sum(classes[row] == label for row in rows), int((classes == label).sum())
        if count >= _FEW and mine >= _NAMED * count and mine >= _ONLY_THERE * len(rows):
            features.append(
                f"{name!r} is in {mine:,} of {count:,} rows with that label and in {len(rows) - mine:,} others"
            )
    return features[:_SHOWN]


def _told_by_tokens(
    names: Sequence[str], classes: Array, tokens: Array, owners: Array, word: Callable[[int], str]
) -> list[str]:
    """One to three tokens in a row that stand in nearly all rows of a label, and hardly in others."""
    counts = np.bincount(classes, minlength=len(names))
    features: dict[int, str] = {}
    for length in (1, 2, 3):
        if len(tokens) < length:
            break
        whole = owners[length - 1 :] == owners[: len(owners) - length + 1]
        at = np.flatnonzero(whole)
        codes = np.zeros(len(at), np.uint64)
        for place in range(length):
            codes = codes * np.uint64(0x9E3779B97F4A7C15) + tokens[at + place].astype(np.uint64) + np.uint64(1)
        order = np.lexsort((owners[at], codes))
        at, codes = at[order], codes[order]
        new = np.ones(len(at), bool)  # a run of tokens counts once in a row
        new[1:] = (codes[1:] != codes[:-1]) | (owners[at[1:]] != owners[at[:-1]])
        at, codes = at[new], codes[new]
        ends = np.append(np.flatnonzero(codes[1:] != codes[:-1]) + 1, len(codes))
        having = np.diff(ends, prepend=0)
        for end, rows in zip(ends[having >= _FEW], having[having >= _FEW], strict=True):
            mine = np.bincount(classes[owners[at[end - rows : end]]], minlength=len(names))
            label = int(mine.argmax())
            if label not in features and counts[label] >= _FEW and mine[label] >= _TOLD * max(rows, counts[label]):
                text = " ".join(word(int(token)) for token in tokens[at[end - 1] : at[end - 1] + length])
                features[label] = (
                    f"{text!r} is in {mine[label]:,} of {counts[label]:,} rows with {names[label]!r} and in "
                    f"{rows - mine[label]:,} others"
                )
    return [features[label] for label in sorted(features)][:_SHOWN]


def _told_by_length(classes: Array, lengths: Array) -> float:
    """The share of every second row whose label is the most frequent one of the other rows of that length."""
    table = np.zeros((int(lengths.max()) + 1, int(classes.max()) + 1), np.int64)
    np.add.at(table, (lengths[::2], classes[::2]), 1)
    known = table.sum(1)[lengths[1::2]] > 0
    return float((known & (table.argmax(1)[lengths[1::2]] == classes[1::2])).mean())
