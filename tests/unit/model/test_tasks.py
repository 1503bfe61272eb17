"""The metrics of classes through `evaluate`, against scikit-learn called directly."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from afina.recipe.metrics import METRICS, lower_is_better
from afina.worker.model.scoring import compute_metrics
from afina.worker.model.tasks import decisions

Array = np.ndarray[Any, Any]


def _sklearn(task: str, labels: Array, predictions: Array, width: int) -> dict[str, Any]:
    classes = list(range(width))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = metrics.precision_recall_fscore_support(
            labels, predictions, labels=classes, average=None, zero_division=0
        )
        found: dict[str, Any] = {}
        for name, values in zip(("precision", "recall", "f1"), each, strict=False):
            found |= {name: float(np.mean(values)), f"{name}_per_class": list(map(float, values))}
        if task == "single-label":
            found["accuracy"] = float(metrics.accuracy_score(labels, predictions))
            found["mcc"] = float(metrics.matthews_corrcoef(labels, predictions))
            found["confusion_matrix"] = metrics.confusion_matrix(labels, predictions, labels=classes).tolist()
        else:
            found["f1_micro"] = float(metrics.f1_score(labels, predictions, average="micro", zero_division=0))
            found["subset_accuracy"] = float(metrics.accuracy_score(labels, predictions))
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_metrics_equal_those_of_scikit_learn(task: str, seed: int) -> None:
    """Few rows, so that classes are missing; all rows right; a model that always predicts the same."""
    draw = np.random.default_rng(seed)
    count, width = int(draw.integers(1, 300 if seed % 3 else 8)), int(draw.integers(2, 9))
    logits = draw.normal(size=(count, width)).astype(np.float32)
    if seed % 4 == 1:
        logits[:, 0] = 9 if task == "single-label" else -9
    predictions = decisions(task, logits).astype(np.int64)
    labels = (
        draw.integers(0, width, count) if task == "single-label" else (draw.random((count, width)) > 0.7).astype(int)
    )
    if seed % 4 == 2:
        labels = predictions.copy()
    found = compute_metrics(task, METRICS[task], decisions(task, logits), labels, width)
    expected = _sklearn(task, labels, predictions, width)
    mcc, theirs = found.pop("mcc", None), expected.pop("mcc", None)
    assert found == expected, f"seed {seed}"
    if mcc is not None:
        assert mcc == pytest.approx(theirs, abs=1e-12)


def test_large_counts_do_not_overflow() -> None:
    """A hundred thousand rows and more, as int8 and int32: squares of counts are beyond 32 bits."""
    count = 200_000
    labels = np.arange(count) % 2
    logits = np.stack([labels == 0, labels == 1], -1).astype(np.float32)
    found = compute_metrics("single-label", ["mcc", "accuracy"], decisions("single-label", logits), labels, 2)
    assert found == {"mcc": pytest.approx(1.0), "accuracy": 1.0}
    both = np.ones((count, 2), np.float32)
    found = compute_metrics("multi-label", ["f1", "f1_micro"], decisions("multi-label", both), both, 2)
    assert found["f1"] == found["f1_micro"] == 1.0


@pytest.mark.parametrize("task", METRICS)
def test_each_metric_is_better_in_the_direction_that_is_named(task: str) -> None:
    labels = np.array(
        {"single-label": [0, 1, 0, 1], "multi-label": [[0, 1], [1, 0]] * 2}.get(task, [0.0, 1.0, 2.0, 4.0])
    )
    wrong = labels[::-1].copy() if task == "regression" else 1 - labels
    names = [name for name in METRICS[task] if name != "confusion_matrix"]
    best, worst = (compute_metrics(task, names, decided, labels, 2) for decided in (labels, wrong))
    for name in names:
        assert (best[name] < worst[name]) == lower_is_better(f"eval_{name}"), name
        assert best[name] != worst[name]
