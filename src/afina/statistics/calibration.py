"""Calibration of probabilities: accuracy by confidence, the expected calibration error, the Brier score."""

from __future__ import annotations

from dataclasses import dataclass

from afina.statistics.intervals import wilson
from afina.statistics.measures import row_losses
from afina.statistics.predictions import Predictions

__all__ = ["BINS", "Calibration", "calibrate"]

BINS = 15


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
    """Calibration of the probabilities; None for regression.

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
