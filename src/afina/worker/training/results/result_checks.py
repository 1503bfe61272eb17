"""Warnings about a finished run: a metric that is undefined, a model of no use (`afina.statistics.weakness`), a training loss that diverged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afina.statistics.weakness import weaknesses
from afina.worker.data.prepared import Split
from afina.worker.task.losses import Loss
from afina.worker.task.tasks import decisions
from afina.worker.training.results.fitted_decisions import as_predictions

__all__ = ["check_loss_curve", "check_predictions"]

Array = np.ndarray[Any, Any]

#: Rows of train from which reference losses are computed.
_ROWS = 65_536


def check_predictions(
    task: str, names: Sequence[str] | None, best_metric: str, logits: Array, labels: Array, metrics: Mapping[str, Any]
) -> list[str]:
    """Warnings about the predictions of eval.

    Args:
        names: of the labels; None for regression.
        logits, labels: of all rows, (N, K), and (N,) or (N, K).
        metrics: of the model, by name without prefix.
    """
    reasons = metrics.get("undefined", {})
    undefined = [name for name, value in metrics.items() if value is None]
    warnings = [f"eval_{name} is not defined: {reasons.get(name, 'it has no value')}" for name in undefined]
    if task == "token-classification":
        if labels.any() and not decisions(task, logits).any():
            warnings.append("the model finds no entity in eval: train longer, or with a higher train.learning_rate")
        return warnings
    if len(labels) < 2 or not np.ptp(labels, axis=0).any():
        return [*warnings, "all rows of eval have the same label: nothing can be measured on them"]
    predictions = as_predictions(task, names, labels, logits, logits)
    return [*warnings, *(f"the model {reason}" for reason in weaknesses(predictions, best_metric))]


def check_loss_curve(loss: Loss, train: Split, logged: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning where the training loss diverged.

    Args:
        logged: the lines of the metrics log.
    """
    losses = np.array([line["loss"] for line in logged if "loss" in line])
    if len(losses) < 2:
        return []
    tenths = np.array([part.mean() for part in np.array_split(losses, min(10, len(losses)))])
    last, lowest = float(tenths[-1]), float(tenths.min())
    every = slice(None, None, max(1, len(train.labels) // _ROWS))
    labels = np.asarray(train.labels[every])
    weights = None if train.loss_weights is None else np.asarray(train.loss_weights[every])
    informed = _informed_logits(loss, labels)
    untrained, knowing = (
        loss.mean(loss.of_rows(np.repeat(logits[None], len(labels), 0), labels), labels, weights)
        for logits in (np.zeros_like(informed), informed)
    )
    if last > 1.2 * untrained or (last > 2 * lowest and last > 0.95 * knowing):
        return [
            f"the training loss diverged: {last:.4g} at the end, {lowest:.4g} at its lowest, {untrained:.4g} for a model "
            "that knows nothing; lower train.learning_rate"
        ]
    return []


def _informed_logits(loss: Loss, labels: Array) -> Array:
    """Logits (K,) of a model that knows only how frequent the labels are."""
    if loss.task == "regression":
        return np.array([labels.mean()], np.float32)
    if loss.task == "multi-label":
        share = np.clip((labels > 0).mean(0), 1e-6, 1 - 1e-6)
        return np.asarray(np.log(share / (1 - share)), np.float32)
    classes = 0 if loss.label_weights is None else len(loss.label_weights)
    return np.asarray(np.log(np.maximum(np.bincount(labels, minlength=classes), 1e-3)), np.float32)
