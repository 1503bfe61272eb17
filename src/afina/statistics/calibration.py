"""Calibration of probabilities: accuracy by confidence, the expected calibration error, the Brier score; accuracy by the share of rows that is answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afina.statistics.intervals import wilson
from afina.statistics.measures import from_sums, row_losses, sums_of
from afina.statistics.predictions import Predictions

__all__ = ["BINS", "Calibration", "Coverage", "calibrate", "confidence", "coverage"]

BINS = 15
#: Shares of the rows of which a table is made, and the most points of a curve.
_SHARES, _POINTS = (0.5, 0.8, 0.9, 0.95, 1.0), 100


@dataclass(frozen=True)
class Calibration:
    """Accuracy by confidence, in bins of equal width; empty bins are left out.

    Attributes:
        bins: (low, high, count, mean confidence, share correct, low and high of its 95 % Wilson interval).
        error: expected calibration error (Guo et al. 2017): the mean over examples of |share correct - confidence| of their bin.
        brier: see `afina.statistics.measures.row_losses`.
        what: which probability the confidence is.
    """

    bins: tuple[tuple[float, float, int, float, float, float, float], ...]
    error: float
    brier: float
    what: str


def calibrate(predictions: Predictions, bins: int = BINS) -> Calibration | None:
    """Calibration of the probabilities; None for regression and token classification.

    Single-label: the probability of the predicted label, against whether it is correct. Multi-label: the probability of each
    label of each example, against whether it applies.
    """
    import numpy as np

    scores = predictions.scores
    if scores is None or not len(predictions):
        return None
    if predictions.task == "single-label":
        confidence, correct = scores.max(axis=1), predictions.predicted == predictions.truth
        what = "probability of the predicted label"
    else:
        confidence, correct = scores.ravel(), predictions.truth.ravel()
        what = "probability of a label, for every label of every example"
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    weights = (np.ones(len(correct)), confidence, correct)
    count, total, hits = (np.bincount(number, weights=w, minlength=bins) for w in weights)
    rows = [
        (b / bins, (b + 1) / bins, int(n), float(total[b] / n), float(hits[b] / n), *wilson(float(hits[b]), float(n)))
        for b, n in enumerate(count)
        if n
    ]
    error = sum(row[2] * abs(row[4] - row[3]) for row in rows) / len(correct)
    brier = float(row_losses(predictions.task, predictions.truth, scores)["brier"].mean())
    return Calibration(tuple(rows), error, brier, what)


def confidence(task: str, scores: Any, predicted: Any) -> Any:
    """How sure a classifier is of each row, (N,): the probability of the predicted class; of several labels that of its least sure answer.

    Args:
        scores: probabilities (N, L).
        predicted: class ids (N,), or whether each label is predicted (N, L).
    """
    import numpy as np

    if task == "single-label":
        return scores[np.arange(len(scores)), predicted]
    return np.where(predicted, scores, 1 - scores).min(axis=1)


@dataclass(frozen=True)
class Coverage:
    """Scores of the rows of which a model is surest, by their share of all rows.

    Attributes:
        metrics: their names, accuracy (of several labels, subset accuracy) first.
        curve: (share, a value for each metric), the smallest share first; NaN where one is not defined.
        table: (share, rows, least confidence, values, low and high of the first one's 95 % Wilson interval), for half, …, all of the rows, and as many more as
            are as sure as the last of them.
        area: the first metric, averaged over the shares: one less the area under the risk-coverage curve (Geifman and El-Yaniv 2017).
    """

    metrics: tuple[str, ...]
    curve: tuple[tuple[float, tuple[float, ...]], ...]
    table: tuple[tuple[float, int, float, tuple[float, ...], float, float], ...]
    area: float


def coverage(predictions: Predictions, metric: str = "") -> Coverage | None:
    """The scores of a classifier that leaves the rows unanswered of which it is least sure; None for regression and without rows.

    Args:
        metric: a further one, if it is a function of decisions.
    """
    import numpy as np

    task, scores = predictions.task, predictions.scores
    if scores is None or not len(predictions):
        return None
    sure = confidence(task, scores, predictions.predicted)
    order = np.argsort(-sure, kind="stable")
    sure, rows = sure[order], len(order)
    hit = predictions.truth == predictions.predicted
    right = (hit if hit.ndim == 1 else hit.all(axis=1))[order]
    ends = (
        np.flatnonzero(np.append(sure[1:] != sure[:-1], True)) + 1
    )  # rows that are equally sure are answered together
    upto = ends[np.searchsorted(ends, np.arange(1, rows + 1))]
    first = "accuracy" if task == "single-label" else "subset_accuracy"
    names = tuple(dict.fromkeys([first, *([metric] if metric in _of_decisions(predictions) else [])]))

    def values(count: int) -> tuple[float, ...]:
        some = order[:count]
        sums = sums_of(task, len(predictions.labels), predictions.truth[some], predictions.predicted[some])
        found = from_sums(task, sums[None, :])
        return tuple(float(found[name][0]) for name in names)

    counts = sorted({int(upto[max(0, round(rows * k / _POINTS) - 1)]) for k in range(1, _POINTS + 1)})
    curve = tuple((count / rows, values(count)) for count in counts)
    table = []
    for share in _SHARES:
        count = int(upto[int(np.ceil(share * rows - 1e-9)) - 1])
        limits = wilson(float(right[:count].sum()), float(count))
        table.append((count / rows, count, float(sure[count - 1]), values(count), *limits))
    area = float((np.cumsum(right)[upto - 1] / upto).mean())
    return Coverage(names, curve, tuple(table), area)


def _of_decisions(predictions: Predictions) -> Sequence[str]:
    width = len(predictions.labels)
    return list(
        from_sums(predictions.task, sums_of(predictions.task, width, predictions.truth, predictions.predicted)[None, :])
    )
