"""How good predictions are, and how sure that is: scores with bootstrap intervals, calibration, the worst mistakes.

Every score here is a function of sums over examples (examples right of each class, squared errors, …), so that a resample needs only
how often each kind of example was drawn, not the examples: its cost does not grow with their number for a classifier. Agrees with
scikit-learn's figures (tested); a class that nobody predicted has precision 0, as there. Spearman's correlation is not such a function
and is left out. NumPy is imported inside the functions.
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

#: Resamples of a bootstrap; fewer where there are very many kinds of examples (see `resample`).
DRAWS = 2000
BINS = 15
_SEED = 20170706
#: Cells of one block of resamples, 8 bytes each, and of all of them together.
_BLOCK, _WORK = 4_000_000, 400_000_000

Array = Any


@dataclass(frozen=True)
class Interval:
    """A figure and the interval in which 95 % of the resamples lie."""

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
        draws: resamples behind the intervals.
    """

    overall: dict[str, Interval]
    per_class: dict[str, list[Interval | None]]
    support: list[int]
    draws: int


@dataclass(frozen=True)
class Calibration:
    """Confidence against truth in equal bins of confidence; empty bins are left out.

    Attributes:
        bins: (low, high, count, mean confidence, share that was right, low and high of its 95 % interval after Wilson).
        error: expected calibration error (Guo et al. 2017): the mean over examples of |share right - confidence| of their bin.
        brier: mean squared difference between the probabilities and what was true (Brier 1950), summed over labels.
        what: of what the confidence is.
    """

    bins: tuple[tuple[float, float, int, float, float, float, float], ...]
    error: float
    brier: float
    what: str


def score(predictions: Predictions, draws: int = DRAWS) -> Scores:
    """Scores with intervals; the same predictions give the same intervals on every machine of one NumPy."""
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
    """Sums over `draws` bootstrap samples, float64 (draws, D).

    Args:
        kinds: (U, D) what one example of each kind adds to the sums.
        counts: (U,) how many examples of each kind there are.
        draws: at most; at least 200. Between them it is as many as `_WORK` cells allow.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    share, size = counts / counts.sum(), int(counts.sum())
    draws = min(draws, max(200, _WORK // len(counts)))
    block = max(1, _BLOCK // len(counts))
    parts = [rng.multinomial(size, share, size=min(block, draws - start)) @ kinds for start in range(0, draws, block)]
    return np.concatenate(parts)


def limits(drawn: Array) -> Array:
    """Where the middle 95 % of resamples (B, …) lie: (2, …). NaN where no resample has a value."""
    import numpy as np

    if not np.isfinite(drawn).any():
        return np.full((2, *drawn.shape[1:]), np.nan)
    return np.nanpercentile(drawn, [2.5, 97.5], axis=0)


def _kinds(task: str, width: int, truth: Array, predicted: Array) -> tuple[Array, Array]:
    """Kinds of examples: what each adds to the sums, float64 (U, D), and how many there are, int64 (U,)."""
    import numpy as np

    if task == "regression":
        return contributions(task, width, truth, predicted), np.ones(len(truth), np.int64)
    both = np.stack([truth, predicted], axis=1) if truth.ndim == 1 else np.concatenate([truth, predicted], axis=1)
    unique, counts = np.unique(both, axis=0, return_counts=True)
    half = unique.shape[1] // 2
    left, right = (unique[:, 0], unique[:, 1]) if truth.ndim == 1 else (unique[:, :half], unique[:, half:])
    return contributions(task, width, left, right), counts


def contributions(task: str, width: int, truth: Array, predicted: Array) -> Array:
    """What each example adds to the sums, float64 (N, D).

    D is 3 L + 1 for classifiers (right, true and predicted of each label, all right) and 7 for regression.
    """
    import numpy as np

    if task == "regression":
        error = predicted - truth
        columns = [error**2, np.abs(error), truth, predicted, truth**2, predicted**2, truth * predicted]
        return np.stack(columns, axis=1)
    if task == "single-label":
        eye = np.eye(width)
        true, said = eye[truth], eye[predicted]
        exact = truth == predicted
    else:
        true, said = truth.astype(float), predicted.astype(float)
        exact = (truth == predicted).all(axis=1)
    return np.concatenate([true * said, said, true, exact[:, None].astype(float)], axis=1)


def _support(sums: Array, width: int) -> Array:
    return sums[:, 2 * width : 3 * width]


def sums_of(task: str, width: int, sums: Array, size: int) -> dict[str, Array]:
    """Scores from sums (B, D) over `size` examples: one per row (B,), and `*_per_class` (B, L). 0 / 0 is 0, for correlations NaN."""
    import numpy as np

    if task == "regression":
        squared, absolute, x, y, xx, yy, xy = sums.T / size
        spread = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"mse": squared, "mae": absolute, "pearson": np.where(spread > 1e-12, (xy - x * y) / spread, np.nan)}
    right, said, true = sums[:, :width], sums[:, width : 2 * width], _support(sums, width)
    precision, recall = _ratio(right, said), _ratio(right, true)
    f1 = _ratio(2 * right, said + true)
    each = {"precision": precision, "recall": recall, "f1": f1}
    found = {name: values.mean(axis=1) for name, values in each.items()}
    found |= {f"{name}_per_class": values for name, values in each.items()}
    if task == "multi-label":
        micro = _ratio(2 * right.sum(axis=1), (said + true).sum(axis=1))
        return {"f1_micro": micro, "subset_accuracy": sums[:, -1] / size, **found}
    # Matthews' coefficient for K classes (Gorodkin 2004), of the counts alone.
    hits = right.sum(axis=1)
    spread = np.sqrt((size**2 - (said**2).sum(axis=1)) * (size**2 - (true**2).sum(axis=1)))
    mcc = _ratio(hits * size - (said * true).sum(axis=1), spread)
    return {"accuracy": sums[:, -1] / size, "mcc": mcc, **found}


def _ratio(above: Array, below: Array) -> Array:
    import numpy as np

    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


def calibrate(predictions: Predictions, bins: int = BINS) -> Calibration | None:
    """Calibration of the probabilities; None for regression.

    Single-label: the probability of the label that was chosen, against whether it was right. Multi-label: the probability of each
    label of each example, against whether it applies.
    """
    import numpy as np

    scores = predictions.scores
    if scores is None or not len(predictions):
        return None
    if predictions.task == "single-label":
        confidence, right = scores.max(axis=1), predictions.predicted == predictions.truth
        true = np.eye(len(predictions.labels))[predictions.truth]
        what = "probability of the label that was chosen"
    else:
        confidence, right = scores.ravel(), predictions.truth.ravel()
        true = predictions.truth.astype(float)
        what = "probability of a label, for every label of every example"
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    count, sure, hits = (
        np.bincount(number, weights=w, minlength=bins) for w in (np.ones(len(right)), confidence, right)
    )
    rows = [
        (
            b / bins,
            (b + 1) / bins,
            int(count[b]),
            float(sure[b] / count[b]),
            float(hits[b] / count[b]),
            *_wilson(hits[b], count[b]),
        )
        for b in range(bins)
        if count[b]
    ]
    error = sum(row[2] * abs(row[4] - row[3]) for row in rows) / len(right)
    return Calibration(tuple(rows), error, float(((scores - true) ** 2).sum(axis=1).mean()), what)


def _wilson(hits: float, count: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z2 = 1.959963984540054**2
    middle = (hits + z2 / 2) / (count + z2)
    half = (z2 * (hits * (count - hits) / count + z2 / 4)) ** 0.5 / (count + z2)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def mistakes(predictions: Predictions, most: int) -> list[tuple[int, float]]:
    """The worst mistakes as (example, how bad), the worst first.

    How bad: single-label, the probability of the wrong label that was chosen; multi-label, the largest difference between a label's
    probability and the truth, where the set of labels is wrong; regression, the absolute error.
    """
    import numpy as np

    truth, predicted, scores = predictions.truth, predictions.predicted, predictions.scores
    if predictions.task == "regression":
        bad, wrong = np.abs(predicted - truth), predicted != truth
    elif predictions.task == "single-label":
        assert scores is not None
        bad, wrong = scores[np.arange(len(predicted)), predicted], predicted != truth
    else:
        assert scores is not None
        bad, wrong = np.abs(scores - truth).max(axis=1), (truth != predicted).any(axis=1)
    places = np.flatnonzero(wrong)
    order = places[np.argsort(-bad[places], kind="stable")][:most]
    return [(int(i), float(bad[i])) for i in order]
