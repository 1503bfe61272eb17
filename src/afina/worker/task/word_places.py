"""The words of texts among their tokens: where each begins, and its label from the logits of its first token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CUT", "REMOVED", "SHARED", "WordPlaces", "word_labels"]

Array = np.ndarray[Any, Any]

#: In place of a word's first token: it lies in the token of the word before it; it was cut off; the tokenizer removes its characters, as BERT's does
#: with variation selectors (U+FE0F behind an emoji) and U+200B.
SHARED, CUT, REMOVED = -1, -2, -3


@dataclass(frozen=True)
class WordPlaces:
    """The words of a split, W in all, in the order of its rows.

    Attributes:
        offsets: words of row i are offsets[i] to offsets[i + 1] - 1, int64 (N + 1,).
        spans: first character and end of each word in its row's text, int32 (W, 2).
        pieces: first token of each word, as an index in its row, int32 (W,); SHARED, CUT or REMOVED where it has none of its own.
    """

    offsets: Array
    spans: Array
    pieces: Array

    def of_rows(self, rows: Array) -> tuple[Array, Array]:
        """The words of `rows`, one row after the other, int64 (n,); and to which of `rows` each belongs, int64 (n,)."""
        starts = np.asarray(self.offsets)[rows]
        counts = np.asarray(self.offsets)[np.asarray(rows) + 1] - starts
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        owner = np.repeat(np.arange(len(rows)), counts)
        return np.arange(ends[-1]) + np.repeat(starts - ends[:-1], counts), owner

    def scored(self, rows: Array) -> tuple[Array, Array]:
        """As `of_rows`, of the words that have a token of their own."""
        words, owner = self.of_rows(rows)
        own = np.asarray(self.pieces)[words] >= 0
        return words[own], owner[own]

    def take(self, rows: Array) -> WordPlaces:
        words, owner = self.of_rows(rows)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(rows)))]).astype(np.int64)
        return WordPlaces(offsets, np.asarray(self.spans)[words], np.asarray(self.pieces)[words])


def word_labels(decided: Array, words: WordPlaces) -> Array:
    """The labels of all words, int64 (W,), from those of the words with a token of their own; see `afina.statistics.entities` for the numbers.

    A word that shares the token of the one before it continues its entity. One that was cut off is outside (0), and so is one that the tokenizer
    removes, except between two words of one entity.
    """
    pieces = np.asarray(words.pieces)
    labels = np.where(pieces < SHARED, 0, decided).astype(np.int64)
    kept = np.flatnonzero(pieces != REMOVED)
    for word in np.flatnonzero((pieces == SHARED) | (pieces == REMOVED)).tolist():
        before = labels[word - 1] if word else 0
        inside = before + before % 2  # a begin (odd) is continued, and so is a continuation
        if pieces[word] == REMOVED:
            end = words.offsets[np.searchsorted(words.offsets, word, side="right")]
            after = kept[np.searchsorted(kept, word) :][:1]
            inside *= bool(len(after) and after[0] < end and labels[after[0]] == inside)
        labels[word] = inside
    return labels
