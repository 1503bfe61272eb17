"""Entities of tagged words, and which predicted ones are right; `afina.statistics.measures` has precision, recall and F1 of them.

Labels of words are numbers: 0 is outside, 1 + 2t begins an entity of type t, 2 + 2t continues it (IOB2). They are read strictly, as
seqeval's `mode="strict", scheme=IOB2` reads them: an entity is a begin and the continuations of the same type right behind it; a
continuation without a begin belongs to none. A predicted entity is right where row, first and last word and type are those of a true
one (the CoNLL-2003 shared task). NumPy is imported inside the functions: `afina --help` does not need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["count_rows", "entities", "entity_types", "iob2_names"]


def iob2_names(types: Sequence[str]) -> list[str]:
    """The label names of types, in the order of their numbers: O, B-LOC, I-LOC, …"""
    return ["O", *(f"{prefix}-{name}" for name in types for prefix in "BI")]


def entity_types(names: Sequence[str]) -> list[str]:
    """The types of label names as `iob2_names` makes them."""
    return [name[2:] for name in names[1::2]]


def entities(labels: Array, offsets: Array) -> Array:
    """The entities of tagged words, int64 (E, 4): row, first word, the one behind the last, type; words are numbered through.

    Args:
        labels: of the words, (W,).
        offsets: words of row i are offsets[i] to offsets[i + 1] - 1, (N + 1,).
    """
    import numpy as np

    labels, offsets = np.asarray(labels, np.int64), np.asarray(offsets, np.int64)
    types = (labels - 1) // 2
    begins = labels % 2 == 1
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    joined = np.zeros(len(labels), bool)  # goes on what the word before it is labelled
    joined[1:] = (labels[1:] > 0) & ~begins[1:] & (types[1:] == types[:-1]) & (labels[:-1] > 0) & (row[1:] == row[:-1])
    stops = np.append(np.flatnonzero(~joined), len(labels))
    first = np.flatnonzero(begins)
    last = stops[np.searchsorted(stops, first, side="right")]
    return np.stack([row[first], first, last, types[first]], axis=1)


def count_rows(true: Array, predicted: Array, rows: int, types: int) -> tuple[Array, Array]:
    """Entities of each row by type, as `afina.statistics.measures` counts them: those that are right beside all of them.

    Args:
        true, predicted: entities, int64 (E, 4): row, two numbers that tell where, type; the row first, each once.

    Returns: for true and predicted entities int64 (rows, 2 types); of true ones all are right.
    """
    import numpy as np

    def counted(some: Array) -> Array:
        cells = np.bincount(some[:, 0] * types + some[:, 3], minlength=rows * types)
        return cells.reshape(rows, types)

    known = {tuple(entity) for entity in np.asarray(true).tolist()}
    right = np.array([tuple(entity) in known for entity in np.asarray(predicted).tolist()], bool)
    of_true = counted(true)
    return np.hstack([of_true, of_true]), np.hstack([counted(predicted[right]), counted(predicted)])
