"""Doubtful labels: small cases whose answers cleanlab 2.9.0 gave, and planted wrong ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from afina.statistics.label_quality import label_quality
from afina.statistics.predictions import Predictions


def _quality(truth: Any, scores: Any, task: str = "single-label") -> tuple[list[float], list[bool], list[int]]:
    truth, scores = np.asarray(truth), np.asarray(scores, float)
    found = label_quality(Predictions(task, tuple("abc"[: scores.shape[1]]), truth, truth, scores, None))
    quality, issue, other = (values.tolist() for values in found)
    return quality, issue, other


def test_issues_are_those_of_cleanlab() -> None:
    # Thresholds 0.55, 0.5, 0.45: row 2 is over that of b; row 5 over none; row 6 over those of b and c, which are as probable.
    scores = [
        [0.9, 0.05, 0.05],
        [0.55, 0.3, 0.15],
        [0.2, 0.7, 0.1],
        [0.1, 0.6, 0.3],
        [0.3, 0.4, 0.3],
        [0.5, 0.1, 0.4],
        [0, 0.5, 0.5],
    ]
    quality, issue, other = _quality([0, 0, 0, 1, 1, 2, 2], scores)
    assert quality == [0.9, 0.55, 0.2, 0.6, 0.4, 0.4, 0.5] and other == [1, 1, 1, 2, 0, 0, 1]
    assert issue == [False, False, True, False, False, False, False]
    # No row has c: nothing is suggested with confidence to be one.
    assert _quality([0, 1], [[0.1, 0, 0.9], [0, 0.2, 0.8]])[1] == [False, False]


def test_of_several_labels_the_doubtful_one_is_named() -> None:
    truth = np.array([[1, 0], [1, 1], [0, 0], [0, 1]], bool)
    quality, issue, other = _quality(truth, [[0.9, 0.1], [0.8, 0.1], [0.2, 0.2], [0.1, 0.9]], "multi-label")
    assert quality == pytest.approx([0.9, 0.1, 0.8, 0.9]) and issue == [False, True, False, False] and other[1] == 1


def test_planted_wrong_labels_are_first() -> None:
    draw = np.random.default_rng(5)
    right = draw.integers(0, 3, 2000)
    scores = draw.dirichlet(np.ones(3), 2000) * 0.5 + np.eye(3)[right] * 0.5
    wrong = draw.random(2000) < 0.05
    quality, issue, other = map(np.array, _quality(np.where(wrong, (right + 1) % 3, right), scores))
    first = np.lexsort((quality, ~issue))[: wrong.sum()]
    assert wrong[first].mean() > 0.95 and (other[wrong] == right[wrong]).mean() > 0.95
