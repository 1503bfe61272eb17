"""Linear models on features of texts: logistic regression, of numbers ridge regression.

Both have scikit-learn's defaults (C = 1, alpha = 1), which are not tuned; a label of several has a regression of its own. Rows are weighed as in the loss
of the run, labels are not.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from afina.worker.data.prepared import Split

__all__ = ["SimpleModel", "fit_linear", "kind_of", "stratified_order"]

Array = np.ndarray[Any, Any]

#: Logits of a label that no row of train has.
_NEVER = -20.0


@dataclass(frozen=True)
class SimpleModel:
    """Logits of a simple model.

    Attributes:
        name: what it is.
        features: what it is trained on, in words that follow its name.
        rows, of: the rows that it was trained on, and those of train.
        seconds: to train it and to predict.
        logits: split -> float32 (N, K), as those of the fine-tuned model.
        cut_after_s: the time after which rows were left out, where it was too short.
        samples: split -> the rows whose logits these are, int64 (N,); of splits that were not predicted as a whole.
    """

    name: str
    features: str
    rows: int
    of: int
    seconds: float
    logits: dict[str, Array]
    cut_after_s: float | None = None
    samples: dict[str, Array] = field(default_factory=dict)

    @property
    def about(self) -> dict[str, Any]:
        """All but the arrays."""
        return {key: value for key, value in vars(self).items() if key not in ("logits", "samples")}


def kind_of(task: str) -> str:
    """The model's name."""
    return "ridge regression" if task == "regression" else "logistic regression"


def stratified_order(task: str, labels: Array, seed: int = 0) -> Array:
    """All rows in an order of which every beginning is a stratified sample, int64 (N,).

    Args:
        labels: (N,), or of several labels (N, K): there a row counts for the rarest label that it has.
    """
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(labels))
    if task == "regression" or not len(labels):
        return order
    strata = labels
    if task == "multi-label":
        rarest = np.argsort((labels > 0).sum(0), kind="stable")
        held = labels[:, rarest] > 0
        strata = np.where(held.any(1), held.argmax(1), len(rarest))
    by_stratum = order[np.argsort(strata[order], kind="stable")]
    counts = np.unique(strata, return_counts=True)[1]
    firsts = np.cumsum(counts) - counts
    within = (np.arange(len(order)) - np.repeat(firsts, counts) + draw.random(len(order))) / np.repeat(counts, counts)
    ordered: Array = by_stratum[np.argsort(within, kind="stable")]
    return ordered


def fit_linear(task: str, features: Any, train: Split, width: int) -> Any:
    """A function: features -> logits float32 (N, K).

    Args:
        features: (N, F), dense or sparse.
        train: whose labels and weights belong to them.
        width: the number of labels, 1 for a regression.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    labels = np.asarray(train.labels)
    weights = None if train.weights is None else np.asarray(train.weights)
    if task == "regression":
        ridge = Ridge(solver="lsqr").fit(features, labels, weights)
        return lambda rows: ridge.predict(rows).reshape(-1, 1).astype(np.float32)

    def logistic(targets: Array) -> tuple[Array, Any]:
        """The classes of `targets`, and what gives their logits (N, classes), (N,) of two."""
        classes = np.unique(targets)
        if len(classes) < 2:
            return classes, lambda rows: np.zeros((rows.shape[0], 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a hundred iterations are enough for a baseline
            return classes, LogisticRegression().fit(features, targets, weights).decision_function

    if task == "multi-label":
        each = [logistic(labels[:, k] > 0) for k in range(width)]
        return lambda rows: np.stack(
            [
                margin(rows) if len(known) == 2 else np.full(rows.shape[0], -_NEVER if known[0] else _NEVER)
                for known, margin in each
            ],
            axis=1,
        ).astype(np.float32)
    known, margin = logistic(labels)

    def of_classes(rows: Any) -> Array:
        logits, values = np.full((rows.shape[0], width), _NEVER, np.float32), margin(rows)
        logits[:, known] = np.stack([np.zeros(len(values)), values], axis=1) if values.ndim == 1 else values
        return logits

    return of_classes
