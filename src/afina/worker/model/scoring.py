"""The metrics of a recipe: `evaluate.Metric` classes of our own, computed by scikit-learn and SciPy.

`evaluate.load` would fetch a script from the Hub and fail on a node without internet. Importing these libraries takes one to two
seconds, so a run imports this module at its first evaluation, not at its start.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from afina.recipe.metrics import METRICS

__all__ = ["compute_metrics"]

Array = np.ndarray[Any, Any]
Value = float | list[float] | list[list[int]]
Score = Callable[[Array, Array, int], Value | dict[str, Value]]


class _NamedMetric(evaluate.Metric):  # type: ignore[misc]
    """One metric of `_SCORES` for a task."""

    def __init__(self, name: str, task: str, num_labels: int) -> None:
        self._name, self._task, self._num_labels = name, task, num_labels
        super().__init__(keep_in_memory=True)

    def _info(self) -> Any:
        value = datasets.Value("float64" if self._task == "regression" else "int64")
        feature = datasets.Sequence(value) if self._task == "multi-label" else value
        return evaluate.MetricInfo(
            description=f"{self._name} ({self._task})",
            citation="",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _build_data_dir(self) -> str:
        """No folder: evaluate makes one in its cache, which may be read-only, and with `keep_in_memory` never uses it."""
        return str(self._data_dir_root)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Value]:
        with warnings.catch_warnings():
            # scikit-learn and SciPy warn of classes without examples and of constant input; the value shows it (0 or NaN).
            warnings.simplefilter("ignore")
            score = _SCORES[self._name](np.asarray(references), np.asarray(predictions), self._num_labels)
        return score if isinstance(score, dict) else {self._name: score}


def _class_score(name: str) -> Score:
    """Precision, recall or F1: the mean over all classes, and the value of each."""

    def score(labels: Array, predictions: Array, num_labels: int) -> dict[str, Value]:
        from sklearn.metrics import precision_recall_fscore_support

        classes = list(range(num_labels))
        scores = precision_recall_fscore_support(labels, predictions, labels=classes, average=None, zero_division=0)
        each = scores[("precision", "recall", "f1").index(name)]
        return {name: float(np.mean(each)), f"{name}_per_class": [float(v) for v in each]}

    return score


def _accuracy(labels: Array, predictions: Array, num_labels: int) -> Value:
    return float(np.mean(labels == predictions))


def _mcc(labels: Array, predictions: Array, num_labels: int) -> Value:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _confusion_matrix(labels: Array, predictions: Array, num_labels: int) -> Value:
    from sklearn.metrics import confusion_matrix

    matrix: list[list[int]] = confusion_matrix(labels, predictions, labels=list(range(num_labels))).tolist()
    return matrix


def _f1_micro(labels: Array, predictions: Array, num_labels: int) -> Value:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="micro", zero_division=0))


def _subset_accuracy(labels: Array, predictions: Array, num_labels: int) -> Value:
    return float(np.mean(np.all(labels == predictions, axis=-1)))


def _mse(labels: Array, predictions: Array, num_labels: int) -> Value:
    return float(np.mean((labels - predictions) ** 2))


def _mae(labels: Array, predictions: Array, num_labels: int) -> Value:
    return float(np.mean(np.abs(labels - predictions)))


def _pearson(labels: Array, predictions: Array, num_labels: int) -> Value:
    from scipy.stats import pearsonr

    return math.nan if len(labels) < 2 else float(pearsonr(labels, predictions)[0])


def _spearman(labels: Array, predictions: Array, num_labels: int) -> Value:
    from scipy.stats import spearmanr

    return math.nan if len(labels) < 2 else float(spearmanr(labels, predictions)[0])


#: (labels, predictions, number of classes) -> a value, or several by name. A new metric takes a line here and one in
#: `afina.recipe.metrics`.
_SCORES: dict[str, Score] = {
    "accuracy": _accuracy,
    "precision": _class_score("precision"),
    "recall": _class_score("recall"),
    "f1": _class_score("f1"),
    "mcc": _mcc,
    "confusion_matrix": _confusion_matrix,
    "f1_micro": _f1_micro,
    "subset_accuracy": _subset_accuracy,
    "mse": _mse,
    "mae": _mae,
    "pearson": _pearson,
    "spearman": _spearman,
}


def compute_metrics(
    task: str, names: Sequence[str], predictions: Array, labels: Array, num_labels: int
) -> dict[str, Value | None]:
    """The named metrics of `task` (`afina.recipe.metrics.METRICS`) for `tasks.decisions` against labels; NaN becomes None."""
    kind = np.float64 if task == "regression" else np.int64
    references, predictions = labels.astype(kind), predictions.astype(kind)
    values: dict[str, Any] = {}
    for name in names:
        assert name in METRICS[task], name
        values |= _NamedMetric(name, task, num_labels).compute(predictions=predictions, references=references)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
