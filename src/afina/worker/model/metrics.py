"""The metrics of a recipe: `evaluate.Metric`s of our own, which compute through scikit-learn and SciPy.

`evaluate.load` would fetch a script from the Hub and fail on a node without internet. Importing these libraries takes one to two
seconds, so this module is imported with a run's first evaluation, not at its start.
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


class _Score(evaluate.Metric):  # type: ignore[misc]
    """One named metric. `_compute` returns a dict whose values are floats, or lists with one entry per class."""

    def __init__(self, name: str, kind: str, score: Callable[..., dict[str, Any]], **settings: Any) -> None:
        self._name, self._kind, self._score, self._settings = name, kind, score, settings
        super().__init__(keep_in_memory=True)

    def _info(self) -> Any:
        value = datasets.Value("float64" if self._kind == "regression" else "int64")
        feature = datasets.Sequence(value) if self._kind == "multi-label" else value
        return evaluate.MetricInfo(
            description=f"{self._name} ({self._kind})",
            citation="",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _build_data_dir(self) -> str:
        """No folder: evaluate makes one in its cache, which may be read-only, and with `keep_in_memory` never uses it."""
        return str(self._data_dir_root)

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        with warnings.catch_warnings():
            # scikit-learn and SciPy warn of classes without examples and of constant input; the value says it (0 or NaN).
            warnings.simplefilter("ignore")
            return self._score(np.asarray(references), np.asarray(predictions), **self._settings)


def _prf(name: str) -> Callable[..., dict[str, Any]]:
    def score(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
        from sklearn.metrics import precision_recall_fscore_support

        labels = list(range(num_labels))
        index = ("precision", "recall", "f1").index(name)
        each = precision_recall_fscore_support(references, predictions, labels=labels, average=None, zero_division=0)[
            index
        ]
        return {name: float(np.mean(each)), f"{name}_per_class": [float(v) for v in each]}

    return score


def _accuracy(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    return {"accuracy": float(np.mean(references == predictions))}


def _mcc(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    from sklearn.metrics import matthews_corrcoef

    return {"mcc": float(matthews_corrcoef(references, predictions))}


def _confusion(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    from sklearn.metrics import confusion_matrix

    return {"confusion_matrix": confusion_matrix(references, predictions, labels=list(range(num_labels))).tolist()}


def _f1_micro(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    from sklearn.metrics import f1_score

    return {"f1_micro": float(f1_score(references, predictions, average="micro", zero_division=0))}


def _subset(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    return {"subset_accuracy": float(np.mean(np.all(references == predictions, axis=-1)))}


def _mse(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    return {"mse": float(np.mean((references - predictions) ** 2))}


def _mae(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    return {"mae": float(np.mean(np.abs(references - predictions)))}


def _correlation(name: str) -> Callable[..., dict[str, Any]]:
    def score(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
        from scipy import stats

        if len(references) < 2:
            return {name: math.nan}
        function = stats.pearsonr if name == "pearson" else stats.spearmanr
        return {name: float(function(references, predictions)[0])}

    return score


_SCORES: dict[str, Callable[..., dict[str, Any]]] = {
    "accuracy": _accuracy,
    "precision": _prf("precision"),
    "recall": _prf("recall"),
    "f1": _prf("f1"),
    "mcc": _mcc,
    "confusion_matrix": _confusion,
    "f1_micro": _f1_micro,
    "subset_accuracy": _subset,
    "mse": _mse,
    "mae": _mae,
    "pearson": _correlation("pearson"),
    "spearman": _correlation("spearman"),
}


def compute_metrics(
    task: str, names: Sequence[str], predictions: Array, labels: Array, num_labels: int
) -> dict[str, Any]:
    """The named metrics of `task` (see `afina.recipe.schema.METRICS`) for `tasks.decisions` against labels; NaN becomes None.

    Values are floats, or lists with one entry per class.
    """
    kind = np.float64 if task == "regression" else np.int64
    references, predictions = labels.astype(kind), predictions.astype(kind)
    found: dict[str, Any] = {}
    for name in names:
        assert name in METRICS[task], name
        metric = _Score(name, task, _SCORES[name], num_labels=num_labels)
        found |= metric.compute(predictions=predictions, references=references)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}
