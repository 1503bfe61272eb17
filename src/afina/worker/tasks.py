"""What differs between tasks: the head, the loss, the metrics. A table, not a class tree.

Metrics compute through scikit-learn and SciPy, which are imported with the first evaluation. Not through `evaluate`:
`evaluate.load` would fetch a script from the Hub and fail on a node without internet, and its import brings pipelines of all kinds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from afina.recipe import METRICS

__all__ = ["TASKS", "Task", "compute_metrics", "decisions", "per_example_loss"]

Array = np.ndarray[Any, Any]


def _single_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)


def _multi_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    known = labels != -100
    loss = functional.binary_cross_entropy_with_logits(logits.float(), labels.float().clamp(min=0), reduction="none")
    return (loss * known).mean(-1)


def _regression_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    known = labels != -100
    return functional.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="none") * known


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        problem_type: what Transformers writes into the model's config.
        loss: logits (B, K), labels (B,) or (B, K) -> loss per example (B,); 0 where the label is -100.
        decide: logits (N, K) -> predictions: class ids (N,), 0/1 (N, K) or values (N,).
        lower_is_better: metrics of which the least is best.
    """

    problem_type: str
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    decide: Callable[[Array], Array]
    lower_is_better: frozenset[str] = frozenset()


TASKS: dict[str, Task] = {
    "single-label": Task("single_label_classification", _single_label_loss, lambda logits: logits.argmax(-1)),
    "multi-label": Task("multi_label_classification", _multi_label_loss, lambda logits: (logits > 0).astype(np.int64)),
    "regression": Task("regression", _regression_loss, lambda logits: logits[:, 0], frozenset({"mse", "mae"})),
}


def per_example_loss(task: str, logits: Array, labels: Array) -> Array:
    """Loss of each example, float64 (N,), from logits (N, K) and labels."""
    loss = TASKS[task].loss(torch.from_numpy(logits), torch.from_numpy(np.array(labels)))
    return np.asarray(loss.double().numpy())


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


def decisions(task: str, logits: Array) -> Array:
    """What logits (N, K) say: class ids int32 (N,), 0 or 1 int8 (N, K), or values float64 (N,)."""
    kind = {"single-label": np.int32, "multi-label": np.int8, "regression": np.float64}[task]
    return np.asarray(TASKS[task].decide(logits).astype(kind))


def compute_metrics(
    task: str, names: Sequence[str], predictions: Array, labels: Array, num_labels: int
) -> dict[str, Any]:
    """The named metrics of `task` (see `afina.recipe.METRICS`) for `decisions` against labels; NaN becomes None.

    Values are floats, or lists with one entry per class.
    """
    references = labels.astype(np.float64) if task == "regression" else labels.astype(predictions.dtype)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        # scikit-learn and SciPy warn of classes without examples and of constant input; the value says it (0 or NaN).
        warnings.simplefilter("ignore")
        for name in names:
            assert name in METRICS[task], name
            found |= _SCORES[name](references, predictions, num_labels=num_labels)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}
