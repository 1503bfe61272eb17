"""Scores of predictions with bootstrap intervals, their calibration, and the worst mistakes.

Every score here is a function of sums over examples (correct examples of each class, squared errors, …). A resample therefore needs only
the count of each kind of example, and for a classifier its cost does not grow with the number of examples. The scores agree with
scikit-learn (tested); a class that is never predicted has precision 0, as there. Not covered: Spearman's correlation, which is no such
function. NumPy is imported inside the functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from afina.statistics.predictions import Predictions

__all__ = [
    "BINS",
    "DRAWS",
    "Calibration",
    "Interval",
    "Scores",
    "calibrate",
    "contributions",
    "limits",
    "mistakes",
    "resample",
    "score",
    "sums_of",
]

#: Resamples of a bootstrap; fewer for very many kinds of examples (see `resample`).
DRAWS = 2000
BINS = 15
_SEED = 20170706
#: Cells (8 bytes each) of one block of resamples, and of all blocks together.
_BLOCK, _WORK = 4_000_000, 400_000_000

Array = Any


@dataclass(frozen=True)
class Interval:
    """A score and the interval that holds 95 % of its resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Scores of predictions.

    Attributes:
        overall: metric -> interval.
        per_class: metric -> one interval per label; None where the label has no example and was not predicted.
        support: examples of each label.
        draws: number of resamples.
    """

    overall: dict[str, Interval]
    per_class: dict[str, list[Interval | None]]
    support: list[int]
    draws: int


@dataclass(frozen=True)
class Calibration:
    """Accuracy by confidence, in bins of equal width; empty bins are left out.

    Attributes:
        bins: (low, high, count, mean confidence, share correct, low and high of its 95 % Wilson interval).
        error: expected calibration error (Guo et al. 2017): the mean over examples of |share correct - confidence| of their bin.
        brier: mean squared difference between the probabilities and the truth (Brier 1950), summed over labels.
        what: which probability the confidence is.
    """

    bins: tuple[tuple[float, float, int, float, float, float, float], ...]
    error: float
    brier: float
    what: str


def score(predictions: Predictions, draws: int = DRAWS) -> Scores:
    """Scores with intervals. With one version of NumPy, the same predictions give the same intervals on every machine."""
    kinds, counts = _kinds(predictions.task, len(predictions.labels), predictions.truth, predictions.predicted)
    drawn = resample(kinds, counts, draws)
    sums = (counts @ kinds)[None, :]
    width, size = len(predictions.labels), len(predictions)
    values, resampled = (sums_of(predictions.task, width, s, size) for s in (sums, drawn))
    overall: dict[str, Interval] = {}
    per_class: dict[str, list[Interval | None]] = {}
    support = _support(sums, width)[0].astype(int).tolist() if width else []
    seen = (sums[0, :width] + sums[0, width : 2 * width] + support) > 0 if width else []
    for name, value in values.items():
        low, high = limits(resampled[name])
        if value.ndim == 1:
            overall[name] = Interval(float(value[0]), float(low), float(high))
        else:
            per_class[name.removesuffix("_per_class")] = [
                Interval(float(value[0, k]), float(low[k]), float(high[k])) if seen[k] else None for k in range(width)
            ]
    return Scores(overall, per_class, support, len(drawn))


def resample(kinds: Array, counts: Array, draws: int = DRAWS, seed: int = _SEED) -> Array:
    """Sums over bootstrap samples, float64 (B, D).

    Args:
        kinds: (U, D) contribution of one example of each kind.
        counts: (U,) number of examples of each kind.
        draws: the largest B. At least 200 samples are drawn; in between, as many as `_WORK` cells allow.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    share, size = counts / counts.sum(), int(counts.sum())
    draws = min(draws, max(200, _WORK // len(counts)))
    block = max(1, _BLOCK // len(counts))
    parts = [rng.multinomial(size, share, size=min(block, draws - start)) @ kinds for start in range(0, draws, block)]
    return np.concatenate(parts)


def limits(drawn: Array) -> Array:
    """Limits of the middle 95 % of resamples (B, …), as (2, …); NaN if no resample has a value."""
    import numpy as np

    if not np.isfinite(drawn).any():
        return np.full((2, *drawn.shape[1:]), np.nan)
    return np.nanpercentile(drawn, [2.5, 97.5], axis=0)


def _kinds(task: str, width: int, truth: Array, predicted: Array) -> tuple[Array, Array]:
    """Distinct examples by truth and prediction: their contributions, float64 (U, D), and counts, int64 (U,)."""
    import numpy as np

    if task == "regression":
        return contributions(task, width, truth, predicted), np.ones(len(truth), np.int64)
    both = np.stack([truth, predicted], axis=1) if truth.ndim == 1 else np.concatenate([truth, predicted], axis=1)
    unique, counts = np.unique(both, axis=0, return_counts=True)
    half = unique.shape[1] // 2
    left, right = (unique[:, 0], unique[:, 1]) if truth.ndim == 1 else (unique[:, :half], unique[:, half:])
    return contributions(task, width, left, right), counts


def contributions(task: str, width: int, truth: Array, predicted: Array) -> Array:
    """Contribution of each example to the sums, float64 (N, D).

    D is 3 L + 1 for classifiers (correct, predicted and true of each label, all labels correct) and 7 for regression.
    """
    import numpy as np

    if task == "regression":
        error = predicted - truth
        columns = [error**2, np.abs(error), truth, predicted, truth**2, predicted**2, truth * predicted]
        return np.stack(columns, axis=1)
    if task == "single-label":
        eye = np.eye(width)
        actual, chosen = eye[truth], eye[predicted]
        exact = truth == predicted
    else:
        actual, chosen = truth.astype(float), predicted.astype(float)
        exact = (truth == predicted).all(axis=1)
    return np.concatenate([actual * chosen, chosen, actual, exact[:, None].astype(float)], axis=1)


def _support(sums: Array, width: int) -> Array:
    return sums[:, 2 * width : 3 * width]


def sums_of(task: str, width: int, sums: Array, size: int) -> dict[str, Array]:
    """Scores from sums (B, D) over `size` examples: (B,) each, `*_per_class` (B, L). 0 / 0 is 0, in a correlation NaN."""
    import numpy as np

    if task == "regression":
        squared, absolute, x, y, xx, yy, xy = sums.T / size
        spread = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"mse": squared, "mae": absolute, "pearson": np.where(spread > 1e-12, (xy - x * y) / spread, np.nan)}
    correct, chosen, actual = sums[:, :width], sums[:, width : 2 * width], _support(sums, width)
    precision, recall = _ratio(correct, chosen), _ratio(correct, actual)
    f1 = _ratio(2 * correct, chosen + actual)
    each = {"precision": precision, "recall": recall, "f1": f1}
    scores = {name: values.mean(axis=1) for name, values in each.items()}
    scores |= {f"{name}_per_class": values for name, values in each.items()}
    if task == "multi-label":
        micro = _ratio(2 * correct.sum(axis=1), (chosen + actual).sum(axis=1))
        return {"f1_micro": micro, "subset_accuracy": sums[:, -1] / size, **scores}
    # Matthews' coefficient for K classes (Gorodkin 2004), from the counts.
    hits = correct.sum(axis=1)
    spread = np.sqrt((size**2 - (chosen**2).sum(axis=1)) * (size**2 - (actual**2).sum(axis=1)))
    mcc = _ratio(hits * size - (chosen * actual).sum(axis=1), spread)
    return {"accuracy": sums[:, -1] / size, "mcc": mcc, **scores}


def _ratio(above: Array, below: Array) -> Array:
    import numpy as np

    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


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
        actual = np.eye(len(predictions.labels))[predictions.truth]
        what = "probability of the predicted label"
    else:
        confidence, correct = scores.ravel(), predictions.truth.ravel()
        actual = predictions.truth.astype(float)
        what = "probability of a label, for every label of every example"
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    weights = (np.ones(len(correct)), confidence, correct)
    count, total, hits = (np.bincount(number, weights=w, minlength=bins) for w in weights)
    rows = [
        (
            b / bins,
            (b + 1) / bins,
            int(count[b]),
            float(total[b] / count[b]),
            float(hits[b] / count[b]),
            *_wilson(hits[b], count[b]),
        )
        for b in range(bins)
        if count[b]
    ]
    error = sum(row[2] * abs(row[4] - row[3]) for row in rows) / len(correct)
    return Calibration(tuple(rows), error, float(((scores - actual) ** 2).sum(axis=1).mean()), what)


def _wilson(hits: float, count: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z2 = 1.959963984540054**2
    middle = (hits + z2 / 2) / (count + z2)
    half = (z2 * (hits * (count - hits) / count + z2 / 4)) ** 0.5 / (count + z2)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def mistakes(predictions: Predictions, most: int) -> list[tuple[int, float]]:
    """The worst mistakes as (example, size), the worst first.

    Size: single-label, the probability of the wrong label; multi-label, the largest difference between a label's probability and the
    truth, if the set of labels is wrong; regression, the absolute error.
    """
    import numpy as np

    truth, predicted, scores = predictions.truth, predictions.predicted, predictions.scores
    if predictions.task == "regression":
        size, wrong = np.abs(predicted - truth), predicted != truth
    elif predictions.task == "single-label":
        assert scores is not None
        size, wrong = scores[np.arange(len(predicted)), predicted], predicted != truth
    else:
        assert scores is not None
        size, wrong = np.abs(scores - truth).max(axis=1), (truth != predicted).any(axis=1)
    examples = np.flatnonzero(wrong)
    order = examples[np.argsort(-size[examples], kind="stable")][:most]
    return [(int(i), float(size[i])) for i in order]
