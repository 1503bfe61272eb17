"""Entities of tagged words, strict IOB2, against cases worked out by hand (they are seqeval's with mode="strict", scheme=IOB2)."""

from __future__ import annotations

import numpy as np
import pytest

from afina.statistics.entities import count_rows, entities, entity_types, iob2_names
from afina.statistics.measures import compute

TYPES = ["LOC", "PER"]
NAMES = iob2_names(TYPES)


def _labels(tags: str) -> np.ndarray:
    return np.array([NAMES.index(tag) for tag in tags.split()], np.int64)


def test_names_and_types_belong_together() -> None:
    assert NAMES == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"] and entity_types(NAMES) == TYPES


@pytest.mark.parametrize(
    ("tags", "offsets", "expected"),
    [
        ("B-PER I-PER O B-LOC", [0, 4], [(0, 0, 2, 1), (0, 3, 4, 0)]),
        ("B-PER B-PER I-PER", [0, 3], [(0, 0, 1, 1), (0, 1, 3, 1)]),
        ("B-PER I-LOC I-LOC", [0, 3], [(0, 0, 1, 1)]),  # another type continues nothing
        ("I-PER I-PER O", [0, 3], []),  # nor does a continuation without a begin
        ("O B-PER I-PER I-PER", [0, 3, 4], [(0, 1, 3, 1)]),  # an entity ends with its row
        ("B-LOC B-LOC", [0, 0, 1, 1, 2], [(1, 0, 1, 0), (3, 1, 2, 0)]),  # rows without words
    ],
)
def test_entities_are_read_strictly(tags: str, offsets: list[int], expected: list[tuple[int, ...]]) -> None:
    assert [tuple(row) for row in entities(_labels(tags), np.array(offsets))] == expected


def test_precision_recall_and_f1_of_entities() -> None:
    """Three true entities, four predicted, of which one is right: boundaries and types must be right both."""
    truth, predicted = _labels("B-PER I-PER O B-LOC O B-PER"), _labels("B-PER O B-LOC B-LOC O B-LOC")
    offsets = np.array([0, 4, 6])
    counts = count_rows(entities(truth, offsets), entities(predicted, offsets), 2, 2)
    values, undefined = compute("token-classification", ["f1", "precision", "recall", "f1_macro"], *counts, None, 2)
    assert values["precision"] == 1 / 4 and values["recall"] == 1 / 3 and values["f1"] == pytest.approx(2 / 7)
    assert values["precision_per_class"] == [1 / 3, 0] and values["recall_per_class"] == [1, 0]
    assert values["f1_macro"] == pytest.approx((0.5 + 0) / 2) and not undefined


def test_no_entity_anywhere_is_a_score_of_zero() -> None:
    nothing = np.zeros((0, 4), np.int64)
    values, _ = compute("token-classification", ["f1"], *count_rows(nothing, nothing, 3, 2), None, 2)
    assert values["f1"] == 0 and values["f1_per_class"] == [None, None]
