"""Entities as columns of a table: lists of start, end, label and text, in characters of the row's text; predicted ones with a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from afina.statistics.decision_rule import probabilities
from afina.statistics.entities import entities, entity_types
from afina.worker.task.tasks import decisions
from afina.worker.task.word_places import WordPlaces, word_labels

__all__ = ["entity_column", "predicted_entities"]

Array = np.ndarray[Any, Any]


def entity_column(
    texts: Sequence[str | None], labels: Array, words: WordPlaces, names: Sequence[str], scores: Array | None = None
) -> pa.ListArray:
    """The entities of N rows; null where there is no text.

    Args:
        texts: of the rows, which the words' spans are of.
        labels: of the words, (W,), see `afina.statistics.entities`.
        names: of the labels.
        scores: probability of each word's label, (W,); an entity's is their mean.
    """
    found, types = entities(labels, words.offsets), entity_types(names)
    spans = np.asarray(words.spans)
    rows, starts, ends = found[:, 0], spans[found[:, 1], 0], spans[found[:, 2] - 1, 1]
    fields = {
        "start": pa.array(starts, pa.int32()),
        "end": pa.array(ends, pa.int32()),
        "label": pa.array([types[kind] for kind in found[:, 3]], pa.string()),
        "text": pa.array([str(texts[row])[a:b] for row, a, b in zip(rows, starts, ends, strict=True)], pa.string()),
    }
    if scores is not None:
        sums = np.concatenate([[0.0], np.cumsum(scores, dtype=np.float64)])
        mean = (sums[found[:, 2]] - sums[found[:, 1]]) / (found[:, 2] - found[:, 1])
        fields["score"] = pa.array(mean.round(6), pa.float64())  # as JSON and CSV show them, too
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(texts)))]).astype(np.int32)
    values = pa.StructArray.from_arrays(list(fields.values()), list(fields))
    empty = pa.array([text is None for text in texts], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=empty)


def predicted_entities(
    texts: Sequence[str | None], logits: Array, words: WordPlaces, names: Sequence[str]
) -> pa.ListArray:
    """The entities that logits of words, (W, K), predict, with their scores; as `entity_column`."""
    labels = word_labels(decisions("token-classification", logits), words)
    own = np.take_along_axis(probabilities("token-classification", logits), labels[:, None], axis=1)[:, 0]
    shared = np.flatnonzero(np.asarray(words.pieces) < 0)
    own[shared] = own[np.maximum(shared - 1, 0)]  # a shared token has one score
    return entity_column(texts, labels, words, names, own)
