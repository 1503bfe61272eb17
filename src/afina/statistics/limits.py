"""95 % limits of every metric of predictions: bootstrap, closed forms.

The intervals cover the sampling of rows. None collapses where every row is right or wrong:

- shares (accuracy, precision and recall of a class): Wilson's with continuity correction (Newcombe 1998). F1 of a class is a function
  of such a share, of the rows where label or prediction is the class.
- averages over classes, MCC, kappa: Bayesian bootstrap of the rows, with one more row of each class: wrong for the lower limit, right for
  the upper (Walley's imprecise Dirichlet model, 1996; for a single share that is Clopper and Pearson's interval).
- AUROC: Newcombe's method 5 (2006); average precision: Wilson's over the rows with the class (after Boyd 2013). The limits of
  an average over classes are the averages of the limits, which is cautious.
- losses and errors: studentised bootstrap of the logarithm. Correlations: Fisher's z.

Coverage by simulation: tests/unit/statistics/test_coverage.py. Not covered: randomness in training.
"""

from __future__ import annotations

from typing import Any

from afina.statistics.intervals import wilson
from afina.statistics.measures import (
    auroc,
    average_precision,
    contributions,
    from_sums,
    one_vs_rest,
    parts,
    ranks,
    row_losses,
)

__all__ = [
    "DRAWS",
    "MOST_CELLS",
    "NO_LIMITS",
    "bootstrap",
    "distinct",
    "error_limits",
    "pseudo_rows",
    "resample",
    "score_limits",
]

#: Resamples of a bootstrap; fewer for very many kinds of rows (see `resample`).
DRAWS = 2000
_SEED = 20170706
#: Cells (8 bytes each) of one block of resamples, and of all blocks together.
_BLOCK, _WORK = 4_000_000, 400_000_000
#: With more cells (kinds of rows x sums) than this no bootstrap is made: 100,000 rows of 1,000 labels.
MOST_CELLS = 100_000_000
#: More rows than this, and the bootstrap of a mean is the normal distribution.
_MANY = 2000
_Z = 1.959963984540054
#: As near to 0 or 1 as an area of other than 0 or 1 may be.
_NEAR = 1e-12

Array = Any
Limits = tuple[float, float]
NO_LIMITS: Limits = (float("nan"), float("nan"))


# -- averages over classes ---------------------------------------------------------------------------------------------


def distinct(task: str, width: int, truth: Array, *predicted: Array) -> tuple[Array, Array]:
    """Distinct rows by truth and predictions: their contributions for each of `predicted`, side by side (U, P D), and counts (U,)."""
    import numpy as np

    columns = [part[:, None] if part.ndim == 1 else part for part in (truth, *predicted)]
    counts = np.ones(len(truth), np.int64)
    if task != "regression":
        unique, counts = np.unique(np.concatenate(columns, axis=1), axis=0, return_counts=True)
        columns = np.split(unique, len(columns), axis=1)
    first, *others = (
        columns if task in ("multi-label", "token-classification") else [column[:, 0] for column in columns]
    )
    return np.concatenate([contributions(task, width, first, other) for other in others], axis=1), counts


def resample(kinds: Array, counts: Array, draws: int = DRAWS, seed: int = _SEED) -> Array:
    """Sums over Bayesian bootstrap samples (Rubin 1981), float64 (B, D): each row weighs as much as an exponential variate.

    Args:
        kinds: (U, D) contribution of one row of each kind.
        counts: (U,) number of rows of each kind.
        draws: the largest B. At least 200 samples are drawn; in between, as many as `_WORK` cells allow.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    draws = min(draws, max(200, _WORK // len(counts)))
    block = max(1, _BLOCK // len(counts))
    shape = counts.astype(float)
    parts = [
        rng.standard_gamma(shape, size=(min(block, draws - start), len(shape))) @ kinds
        for start in range(0, draws, block)
    ]
    return np.concatenate(parts)


def pseudo_rows(task: str, whole: Array, draws: int, seed: int = _SEED + 1) -> tuple[Array, Array]:
    """Sums (B, D) of one more row of each class that occurs, with an exponential weight: all wrong, and all right."""
    import numpy as np

    _, chosen, actual = parts(whole)
    there = chosen + actual > 0
    weight = np.random.default_rng(seed).standard_exponential((draws, len(there))) * there
    total, many = weight.sum(axis=1, keepdims=True), int(there.sum())
    zero, none = np.zeros_like(weight), np.zeros_like(total)
    right = np.concatenate([weight, weight, weight, total, none, total], axis=1)
    if task in ("multi-label", "token-classification"):
        return np.concatenate([zero, weight / 2, weight / 2, none, none, none], axis=1), right
    elsewhere = (total - weight) * there / max(1, many - 1)
    places = np.arange(len(there), dtype=float)
    # The mean squared distance of each class from the others.
    far = [((places[there] - place) ** 2).sum() / max(1, many - 1) for place in places]
    cost = (weight @ np.array(far))[:, None]
    return np.concatenate([zero, elsewhere, weight, none, cost, total], axis=1), right


def bootstrap(task: str, kinds: Array, counts: Array, draws: int) -> tuple[dict[str, Limits], int]:
    """Limits of every metric that is a function of the sums, and the number of resamples."""
    import numpy as np

    whole = counts @ kinds
    drawn = resample(kinds, counts, draws)
    wrong, right = pseudo_rows(task, whole, len(drawn))
    lower, upper = (from_sums(task, drawn + more, whole) for more in (wrong, right))
    # The chance level in kappa varies too: with all of 20 rows wrong, its 95 % limits cover 0.90.
    tail = {"kappa": 1.0, "kappa_quadratic": 1.0}
    return {
        name: (
            float(np.nanpercentile(lower[name], tail.get(name, 2.5))),
            float(np.nanpercentile(upper[name], 100 - tail.get(name, 2.5))),
        )
        for name in lower
        if np.isfinite(lower[name]).any() and np.isfinite(upper[name]).any()
    }, len(drawn)


# -- scores, losses and errors -----------------------------------------------------------------------------------------


def score_limits(task: str, truth: Array, scores: Array, draws: int) -> dict[str, Limits]:
    """Limits of the metrics of probabilities."""
    import numpy as np

    areas, precisions = [], []
    for flags, column in one_vs_rest(task, truth, scores):
        positive = int(flags.sum())
        if 0 < positive < len(flags):
            areas.append(_newcombe(auroc(flags, column), positive, len(flags) - positive))
        if positive:
            precisions.append(wilson(average_precision(flags, column) * positive, positive))
    found = {
        name: (float(np.mean([low for low, _ in each])), float(np.mean([high for _, high in each])))
        for name, each in (("auroc", areas), ("average_precision", precisions))
        if each
    }
    return found | {name: _log_mean(values, draws) for name, values in row_losses(task, truth, scores).items()}


def _newcombe(area: float, positive: int, negative: int) -> Limits:
    """Interval of an AUROC: where it is z standard errors of that value away from the one that was found."""
    from scipy.optimize import brentq

    middle = (positive + negative) / 2 - 1

    def off(theta: float) -> float:
        shape = 1 + middle * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (area - theta) ** 2 - _Z**2 * theta * (1 - theta) * shape / (positive * negative)

    # Of an area of 1 (0), 1 (0) itself is a solution too.
    low = float(brentq(off, 0, min(area, 1 - _NEAR))) if area > _NEAR else 0.0
    high = float(brentq(off, max(area, _NEAR), 1)) if area < 1 - _NEAR else 1.0
    return low, high


def _log_mean(values: Array, draws: int) -> Limits:
    """Limits of the mean of values that are not negative."""
    import numpy as np

    if len(values) < 3 or not values.mean() > 0 or not values.std() > 0:
        return NO_LIMITS
    mean, spread = values.mean(), values.std(ddof=1)
    return _studentised(
        len(values),
        float(np.log(mean)),
        float(spread / mean),
        draws,
        lambda w: (
            (w @ values) / len(values),
            np.sqrt(np.maximum((w @ values**2) / len(values) - ((w @ values) / len(values)) ** 2, 0)),
        ),
    )


def _studentised(size: int, log: float, spread: float, draws: int, again: Any) -> Limits:
    """Limits exp(log - t · se): t from a bootstrap of few rows, normal for many.

    Args:
        spread: standard deviation of the influence of a row on the logarithm.
        again: weights (B, N) -> the statistic and the standard deviation of a row's influence on it, (B,) each.
    """
    import numpy as np

    error = spread / size**0.5
    low, high = -_Z, _Z
    if size <= _MANY:
        draws = min(draws, max(200, _BLOCK // size))
        weights = np.random.default_rng(_SEED).multinomial(size, np.full(size, 1 / size), size=draws).astype(float)
        mean, deviation = again(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            t = (np.log(mean) - log) / (deviation / mean / size**0.5)
        t = t[np.isfinite(t)]
        if len(t) < draws / 2:
            return NO_LIMITS
        low, high = np.percentile(t, [2.5, 97.5])
    with np.errstate(over="ignore"):  # of few rows the upper one may be infinite
        return float(np.exp(log - max(high, _Z) * error)), float(np.exp(log - min(low, -_Z) * error))


def error_limits(truth: Array, predicted: Array, draws: int) -> dict[str, Limits]:
    """Limits of the metrics of regression."""
    import numpy as np

    error = predicted - truth
    mse = _log_mean(error**2, draws)
    found = {"mse": mse, "rmse": (mse[0] ** 0.5, mse[1] ** 0.5), "mae": _log_mean(np.abs(error), draws)}
    found["r2"] = _r2(truth, error, draws)
    for name, columns in (("pearson", (truth, predicted)), ("spearman", (ranks(truth), ranks(predicted)))):
        found[name] = _fisher(*columns, spearman=name == "spearman")
    return found


def _r2(truth: Array, error: Array, draws: int) -> Limits:
    """R² is 1 less a ratio of two means: limits from the logarithm of that ratio."""
    import numpy as np

    squares, away = error**2, (truth - truth.mean()) ** 2
    if len(truth) < 3 or not squares.mean() > 0 or not away.mean() > 0:
        return NO_LIMITS
    size = len(truth)
    spread = (squares / squares.mean() - away / away.mean()).std(ddof=1)

    def again(weights: Array) -> tuple[Array, Array]:
        share = weights / size
        middle, top = share @ truth, share @ squares
        below = share @ truth**2 - middle**2
        # Of influence²: E[(a/A - b/B)²], with b about the resample's own mean.
        shifted = (truth[None, :] - middle[:, None]) ** 2
        influence = squares[None, :] / top[:, None] - shifted / below[:, None]
        return top / below, np.sqrt((share * influence**2).sum(axis=1)) * (top / below)

    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = _studentised(
            size, float(np.log(squares.mean() / away.mean())), float(spread), min(draws, 1000), again
        )
    return 1 - high, 1 - low


def _fisher(first: Array, second: Array, *, spearman: bool) -> Limits:
    """Limits of a correlation on Fisher's scale; the standard error is Bonett and Wright's (2000), or a row's influence if larger."""
    import numpy as np

    size = len(first)
    if size < 4 or not first.std() > 0 or not second.std() > 0:
        return NO_LIMITS
    left, right = ((v - v.mean()) / v.std() for v in (first, second))
    r = float((left * right).mean())
    if abs(r) > 1 - 1e-12:
        return NO_LIMITS
    influence = (left * right - r * (left**2 + right**2) / 2).std(ddof=1) / (1 - r * r)
    error = max(influence, (1 + r * r / 2) ** 0.5 if spearman else 1.0) / (size - 3) ** 0.5
    return float(np.tanh(np.arctanh(r) - _Z * error)), float(np.tanh(np.arctanh(r) + _Z * error))
