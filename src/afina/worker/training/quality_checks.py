"""Checks of a finished training against the least that a model should do: warnings for the log and the outcome.

A constant prediction, a model that is not better than one that knows only how frequent the labels are, a loss that diverged, a
metric that is undefined. Not covered: whether a model that passes is good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afina.recipe.metrics import METRICS, lower_is_better
from afina.worker.data.prepared import Split
from afina.worker.model.losses import Loss
from afina.worker.model.tasks import decisions
from afina.worker.training.evaluation import scores

__all__ = ["check_loss_curve", "check_predictions"]

Array = np.ndarray[Any, Any]

#: Rows of train from which reference losses are computed.
_ROWS = 65_536


def check_predictions(
    loss: Loss, names: Sequence[str] | None, best_metric: str, logits: Array, labels: Array, metrics: Mapping[str, Any]
) -> list[str]:
    """Warnings about the predictions of the eval part.

    Args:
        names: of the labels; None for regression.
        logits, labels: of all rows, (N, K), and (N,) or (N, K).
        metrics: of the model, by name without prefix.
    """
    reasons = metrics.get("undefined", {})
    undefined = [name for name, value in metrics.items() if value is None]
    warnings = [f"eval_{name} is not defined: {reasons.get(name, 'it has no value')}" for name in undefined]
    if len(labels) < 2 or not np.ptp(labels, axis=0).any():
        return [*warnings, "all rows of eval have the same label: nothing can be measured on them"]
    if constant := _constant(loss.task, names, logits, labels):
        warnings.append(f"the model predicts {constant} for all {len(labels):,} rows of eval")
    # Not the user's own: its code may count on a model's predictions.
    measures = [name for name in dict.fromkeys([best_metric, METRICS[loss.task][0]]) if name in METRICS[loss.task]]
    reference_logits, described = _reference(loss.task, names, labels, logits.shape[1])
    reference = scores(loss, measures, np.repeat(reference_logits[None], len(labels), 0), labels)
    missing = [name for name in measures if name not in metrics]
    values = {**metrics, **(scores(loss, missing, logits, labels) if missing else {})}
    compared = {
        name: (values[name], reference[name])
        for name in measures
        if isinstance(values[name], float) and isinstance(reference[name], float)
    }
    if compared and all(a >= b if lower_is_better(name) else a <= b for name, (a, b) in compared.items()):
        listed = ", ".join(f"{name} {a:.4g} against {b:.4g}" for name, (a, b) in compared.items())
        warnings.append(f"the model is not better than always predicting {described}: {listed}")
    return warnings


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
    every = slice(None, None, max(1, len(train) // _ROWS))
    labels, weights = (
        np.asarray(train.labels[every]),
        None if train.weights is None else np.asarray(train.weights[every]),
    )
    outputs = 1 if labels.ndim == 1 and loss.task == "regression" else _outputs(loss, labels)
    untrained, knowing = (
        loss.mean(loss.of_rows(np.repeat(logits[None], len(labels), 0), labels), labels, weights)
        for logits in (np.zeros(outputs, np.float32), _reference(loss.task, None, labels, outputs)[0])
    )
    if last > 1.2 * untrained or (last > 2 * lowest and last > 0.95 * knowing):
        return [
            f"the training loss diverged: {last:.4g} at the end, {lowest:.4g} at its lowest, {untrained:.4g} for a model "
            "that knows nothing; lower train.learning_rate"
        ]
    return []


def _outputs(loss: Loss, labels: Array) -> int:
    if loss.label_weights is not None:
        return len(loss.label_weights)
    return int(labels.shape[1]) if labels.ndim > 1 else int(labels.max()) + 1


def _constant(task: str, names: Sequence[str] | None, logits: Array, labels: Array) -> str | None:
    """The one prediction of all rows, in words; None where there are several."""
    predictions = decisions(task, logits)
    if task == "regression":
        spread = float(np.std(predictions))
        return f"about {predictions.mean():.4g}" if spread <= 1e-3 * float(np.std(labels)) else None
    if (predictions != predictions[0]).any():
        return None
    assert names is not None
    if task == "single-label":
        return repr(names[int(predictions[0])])
    chosen = [repr(name) for name, flag in zip(names, predictions[0], strict=True) if flag]
    return " and ".join(chosen) or "no label"


def _reference(task: str, names: Sequence[str] | None, labels: Array, outputs: int) -> tuple[Array, str]:
    """Logits (K,) of a model that knows only how frequent the labels are, and its prediction in words."""
    if task == "regression":
        return np.array([labels.mean()], np.float32), "the mean of eval"
    if task == "multi-label":
        share = np.clip((labels > 0).mean(0), 1e-6, 1 - 1e-6)
        return np.log(share / (1 - share)).astype(np.float32), "each label's more frequent value"
    counts = np.bincount(labels, minlength=outputs)
    most = int(counts.argmax())
    named = repr(names[most]) if names else "the majority class"
    return np.log(np.maximum(counts, 1e-3)).astype(np.float32), f"the majority class {named}"
