"""Reasons why a model is of no use: one prediction for all rows, or not better than knowing only how frequent the labels are.

A run records them when it ends, and reports and sweeps find them again from its predictions, in the same words. Not covered:
whether a model without such a reason is good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from afina.recipe.metrics import METRICS, lower_is_better
from afina.statistics.measures import compute
from afina.statistics.predictions import Predictions

__all__ = ["beaten", "constant", "reference", "weaknesses"]

#: Scores by label of the predictions of a regression vary less than this share of the labels' standard deviation: constant.
_SAME = 1e-3


def weaknesses(predictions: Predictions, metric: str = "") -> list[str]:
    """The reasons, each as what "the model" does; empty where there is none, or nothing can be measured (one label in all rows).

    Args:
        metric: by which the model was chosen, without the prefix of a split. It and the task's first are compared; a model that is
            better by one of them is of use. One of the user's own is left out: its code may count on a model's predictions.
    """
    truth, task = predictions.truth, predictions.task
    if len(truth) < 2 or (truth == truth[:1]).all():
        return []
    only = constant(predictions)
    reasons = [f"predicts {only} for every row of eval"] if only is not None else []
    measures = [name for name in dict.fromkeys([metric, METRICS[task][0]]) if name in METRICS[task]]
    other_model, described = reference(predictions)
    model, other = (
        compute(task, measures, truth, p.predicted, p.scores, len(p.labels))[0] for p in (predictions, other_model)
    )
    compared = {
        name: (model[name], other[name])
        for name in measures
        if isinstance(model.get(name), float) and isinstance(other.get(name), float)
    }
    if compared and all(a >= b if lower_is_better(name) else a <= b for name, (a, b) in compared.items()):
        listed = ", ".join(f"{name} {a:.4g} against {b:.4g}" for name, (a, b) in compared.items())
        reasons.append(f"is not better than always predicting {described}: {listed}")
    return reasons


def beaten(baselines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Warnings where the fine-tuned model is not better than a trained simple one, by the metric that chose its checkpoint."""
    lines = []
    for split, models in baselines.items():
        for model in models[1:]:
            first = next(iter(model["differences"]), None)
            lower = first is not None and lower_is_better(first["metric"])
            if first is not None and (
                first["second"] >= first["first"] if lower else first["second"] <= first["first"]
            ):
                values = f"{first['metric']} on {split} {first['second']:.4g} against {first['first']:.4g}"
                lines.append(f"the model is not better than {model['name']}: {values}")
    return lines


def constant(predictions: Predictions) -> str | None:
    """The one prediction of all rows, in words; None where there are several, or fewer than two rows."""
    predicted = predictions.predicted
    if len(predicted) < 2:
        return None
    if predictions.task == "regression":
        same = float(predicted.std()) <= _SAME * float(predictions.truth.std())
        return f"about {predicted.mean():.4g}" if same else None
    if predictions.task == "token-classification":
        return None if predicted.any() else "no entity"
    if (predicted != predicted[:1]).any():
        return None
    if predictions.task == "single-label":
        return repr(predictions.labels[int(predicted[0])])
    chosen = [repr(name) for name, flag in zip(predictions.labels, predicted[0], strict=True) if flag]
    return " and ".join(chosen) or "no label"


def reference(predictions: Predictions) -> tuple[Predictions, str]:
    """The predictions of a model that knows only how frequent the labels are, and those in words."""
    import numpy as np

    truth, task = predictions.truth, predictions.task

    def everywhere(values: Any) -> Any:
        return np.broadcast_to(values, (len(truth), *np.shape(values)))

    if task == "regression":
        return replace(predictions, predicted=everywhere(truth.mean())), "the mean of eval"
    if task == "multi-label":
        shares = np.asarray(truth, float).mean(0)
        decided = replace(predictions, predicted=everywhere(shares > 0.5), scores=everywhere(shares))
        return decided, "each label's more frequent value"
    if task == "token-classification":
        return replace(predictions, predicted=np.zeros_like(truth)), "no entity"
    counts = np.bincount(truth, minlength=len(predictions.labels))
    most = int(counts.argmax())
    decided = replace(predictions, predicted=everywhere(most), scores=everywhere(counts / len(truth)))
    return decided, f"the majority class {predictions.labels[most]!r}"
