"""Scores of predictions with 95 % intervals (`afina.statistics.limits`), and the worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from afina.recipe.metrics import METRICS, NEED_SCORES
from afina.statistics.intervals import wilson
from afina.statistics.limits import (
    DRAWS,
    MOST_CELLS,
    NO_LIMITS,
    Limits,
    bootstrap,
    distinct,
    error_limits,
    score_limits,
)
from afina.statistics.measures import ROW_SHARES, compute, from_sums, parts, sums_of
from afina.statistics.predictions import Predictions
from afina.statistics.weakness import reference

__all__ = ["Interval", "Scores", "mistakes", "score"]

Array = Any


@dataclass(frozen=True)
class Interval:
    """A score and its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Scores of predictions.

    Attributes:
        overall: metric -> interval.
        per_class: metric -> one interval per label; None where it is not defined: precision of a label that is never predicted.
        support: rows of each label.
        draws: number of resamples.
        absent: labels that occur neither in the labels nor in the predictions; averages leave them out.
        undefined: metric -> why it has no value.
        always: metric -> its value for a model that knows only how frequent the labels are.
        simplest: what that predicts, in words.
    """

    overall: dict[str, Interval]
    per_class: dict[str, list[Interval | None]]
    support: list[int]
    draws: int
    absent: list[str] = field(default_factory=list)
    undefined: dict[str, str] = field(default_factory=dict)
    always: dict[str, float] = field(default_factory=dict)
    simplest: str = ""


def score(predictions: Predictions, draws: int = DRAWS, names: Sequence[str] | None = None) -> Scores:
    """Scores with intervals. With one version of NumPy, the same predictions give the same intervals on every machine.

    Args:
        names: metrics; by default all of the task that are one number.
    """
    task, labels, truth, predicted = predictions.task, predictions.labels, predictions.truth, predictions.predicted
    width = len(labels)
    names = [name for name in names or METRICS[task] if name in METRICS[task] and name != "confusion_matrix"]
    values, undefined = compute(task, names, truth, predicted, predictions.scores, width)
    if task == "regression":
        found = error_limits(truth, predicted, draws)
        overall = {name: _around(values[name], found[name]) for name in names if name in values}
        return Scores(overall, {}, [], draws, undefined=undefined, **_simplest(predictions))
    whole = sums_of(task, width, truth, predicted)
    if min(len(truth), width**2 if task == "single-label" else len(truth)) * len(whole) > MOST_CELLS:
        found, draws = dict.fromkeys(from_sums(task, whole[None, :]), NO_LIMITS), 0
    else:
        found, draws = bootstrap(task, *distinct(task, width, truth, predicted), draws)
    found |= dict.fromkeys(found.keys() & set(ROW_SHARES.get(task, ())), wilson(float(whole[-3]), float(whole[-1])))
    if predictions.scores is not None and set(names) & set(NEED_SCORES):
        found |= score_limits(task, truth, predictions.scores, draws)
    overall = {name: _around(values[name], found.get(name, NO_LIMITS)) for name in names if name in values}
    correct, chosen, actual = parts(whole)
    seen = chosen + actual > 0
    return Scores(
        overall,
        _each(correct, chosen, actual),
        actual.astype(int).tolist(),
        draws,
        absent=[name for name, there in zip(labels, seen, strict=True) if not there],
        undefined=undefined,
        **_simplest(predictions),
    )


def _simplest(predictions: Predictions) -> dict[str, Any]:
    """`always` and `simplest` of `Scores`."""
    if not len(predictions):
        return {}
    model, described = reference(predictions)
    names = [name for name in METRICS[model.task] if name != "confusion_matrix"]
    values, _ = compute(model.task, names, model.truth, model.predicted, model.scores, len(model.labels))
    return {"always": {k: v for k, v in values.items() if isinstance(v, float)}, "simplest": described}


def _around(value: float | None, limits: Limits) -> Interval:
    """The limits never exclude the value itself: a bootstrap of few rows of many classes is biased."""
    if value is None:
        return Interval(float("nan"), *NO_LIMITS)
    return (
        Interval(value, min(limits[0], value), max(limits[1], value))
        if limits[0] == limits[0]
        else Interval(value, *NO_LIMITS)
    )


def _each(correct: Array, chosen: Array, actual: Array) -> dict[str, list[Interval | None]]:
    """Precision, recall and F1 of each label with Wilson intervals."""

    def of(hits: float, rows: float) -> Interval | None:
        return Interval(hits / rows, *wilson(hits, rows)) if rows else None

    def f1(share: Interval | None) -> Interval | None:
        return share and Interval(*(2 * v / (1 + v) for v in (share.value, share.low, share.high)))

    rows = [tuple(map(float, row)) for row in zip(correct, chosen, actual, strict=True)]
    return {
        "precision": [of(hits, chosen) for hits, chosen, _ in rows],
        "recall": [of(hits, actual) for hits, _, actual in rows],
        "f1": [f1(of(hits, chosen + actual - hits)) for hits, chosen, actual in rows],
    }


def mistakes(predictions: Predictions, most: int) -> list[tuple[int, float]]:
    """The worst mistakes as (example, size), the worst first.

    Size: single-label, the probability of the wrong label; multi-label, the largest difference between a label's probability and the
    truth, if the set of labels is wrong; regression, the absolute error; token classification, entities missed and made up.
    """
    import numpy as np

    truth, predicted, scores = predictions.truth, predictions.predicted, predictions.scores
    if predictions.task == "regression":
        size, wrong = np.abs(predicted - truth), predicted != truth
    elif predictions.task == "single-label":
        assert scores is not None
        size, wrong = scores[np.arange(len(predicted)), predicted], predicted != truth
    elif predictions.task == "token-classification":
        (right, chosen), (_, actual) = np.split(predicted, 2, axis=1), np.split(truth, 2, axis=1)
        size = (chosen - right + actual - right).sum(axis=1)
        wrong = size > 0
    else:
        assert scores is not None
        size, wrong = np.abs(scores - truth).max(axis=1), (truth != predicted).any(axis=1)
    examples = np.flatnonzero(wrong)
    order = examples[np.argsort(-size[examples], kind="stable")][:most]
    return [(int(i), float(size[i])) for i in order]
