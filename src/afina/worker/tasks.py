"""What differs between tasks: the head, the loss, the metrics. A table, not a class tree.

Metrics of classes follow from counts: a confusion matrix, or hits per label. They equal scikit-learn's (tests/unit/test_tasks.py)
without its import, which takes a second and brings 1,400 modules. Not through `evaluate` either:
`evaluate.load` would fetch a script from the Hub and fail on a node without internet. Correlations are SciPy's.
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


@dataclass(frozen=True)
class _Counts:
    """Per class, float64 (K,): examples rightly given it, all that were given it, all that have it."""

    right: Array
    given: Array
    true: Array


def _confusion(references: Array, predictions: Array, num_labels: int) -> Array:
    """Rows are the labels, columns the predictions, int64 (K, K)."""
    joint = references.astype(np.int64) * num_labels + predictions
    return np.bincount(joint, minlength=num_labels**2).reshape(num_labels, num_labels)


def _counts(references: Array, predictions: Array, num_labels: int) -> _Counts:
    if references.ndim == 1:
        table = _confusion(references, predictions, num_labels)
        found = (np.diag(table), table.sum(0), table.sum(1))
    else:
        found = tuple(x.sum(0, dtype=np.int64) for x in (references * predictions, predictions, references))
    return _Counts(*(x.astype(np.float64) for x in found))


def _ratio(above: Array, below: Array) -> Array:
    """0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


def _per_class(name: str, each: Callable[[_Counts], Array]) -> Callable[..., dict[str, Any]]:
    def score(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
        found = each(_counts(references, predictions, num_labels))
        return {name: float(np.mean(found)), f"{name}_per_class": [float(v) for v in found]}

    return score


def _accuracy(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    return {"accuracy": float(np.mean(references == predictions))}


def _mcc(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    """Matthews' correlation for many classes (Gorodkin 2004); 0 where one side is constant."""
    counts, count = _counts(references, predictions, num_labels), float(len(references))
    both = counts.right.sum() * count - counts.true @ counts.given
    spreads = (count**2 - counts.true @ counts.true) * (count**2 - counts.given @ counts.given)
    return {"mcc": float(both / np.sqrt(spreads)) if spreads else 0.0}


def _confusion_matrix(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    return {"confusion_matrix": _confusion(references, predictions, num_labels).tolist()}


def _f1_micro(references: Array, predictions: Array, num_labels: int) -> dict[str, Any]:
    counts = _counts(references, predictions, num_labels)
    below = float((counts.given + counts.true).sum())
    return {"f1_micro": float(2 * counts.right.sum() / below) if below else 0.0}


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
    "precision": _per_class("precision", lambda c: _ratio(c.right, c.given)),
    "recall": _per_class("recall", lambda c: _ratio(c.right, c.true)),
    "f1": _per_class("f1", lambda c: _ratio(2 * c.right, c.given + c.true)),
    "mcc": _mcc,
    "confusion_matrix": _confusion_matrix,
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
        # SciPy warns of constant input; the value says it (NaN).
        warnings.simplefilter("ignore")
        for name in names:
            assert name in METRICS[task], name
            found |= _SCORES[name](references, predictions, num_labels=num_labels)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}
