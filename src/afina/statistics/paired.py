"""Paired tests: is one model better than another on the same rows?

Accuracy of classifiers: McNemar's exact test (1947), a binomial test on the rows that only one model gets right. Mean absolute error:
Wilcoxon's signed-rank test. Every other score: the paired bootstrap, which resamples rows and takes both models' predictions for them.
Runs that were evaluated on different rows are refused with the reason. Not covered: randomness in training; two seeds of one recipe may
differ as much. NumPy and SciPy are imported inside the functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from afina.errors import DataError
from afina.statistics.predictions import Predictions
from afina.statistics.scores import DRAWS, contributions, limits, resample, sums_of

__all__ = ["Difference", "Paired", "align", "compare_paired", "holm"]

Array = Any


@dataclass(frozen=True)
class Difference:
    """Difference of two models in one score, second minus first.

    Attributes:
        first, second: the scores.
        low, high: 95 % bootstrap interval of the difference.
        p: two-sided p-value of `test`.
        test: McNemar exact, Wilcoxon or paired bootstrap.
    """

    metric: str
    first: float
    second: float
    low: float
    high: float
    p: float
    test: str


@dataclass(frozen=True)
class Paired:
    """Comparison of two models on the same rows.

    Attributes:
        rows: number of rows.
        only_first, only_second: rows that only one model gets right; None for regression.
        differences: one per score.
    """

    rows: int
    only_first: int | None
    only_second: int | None
    differences: tuple[Difference, ...]


def align(first: Predictions, second: Predictions) -> Array:
    """Indices in `second` of the rows of `first`, int64 (N,).

    Rows are the same if texts and labels are. Rows in another order are matched by text, label and the number of earlier
    occurrences of both.

    Raises:
        DataError: the rows, the labels or the tasks differ; the message says how.
    """
    import numpy as np

    remedy = "compare runs whose recipes choose the same eval rows (data.eval, its seed, the same files)"
    if first.task != second.task:
        raise DataError(f"one run is {first.task}, the other {second.task}", remedy)
    if set(first.labels) != set(second.labels):
        raise DataError(
            f"the labels differ: {', '.join(sorted(set(first.labels) ^ set(second.labels)))} are not in both", remedy
        )
    left, right = _identity(first), _identity(second)
    if left == right:
        return np.arange(len(left))
    index = {key: number for number, key in enumerate(right)}
    common = sum(key in index for key in left)
    if common != len(left) or len(left) != len(right):
        raise DataError(f"the eval rows differ: {len(left)} and {len(right)}, {common} of them in both", remedy)
    return np.array([index[key] for key in left], np.int64)


def _identity(predictions: Predictions) -> list[tuple[Any, ...]]:
    """A key per example that is the same in another run: texts, label, number of the occurrence."""
    table = predictions.table
    names = [name for name in ("text", "text_pair") if name in table.column_names] or ["file", "row"]
    labels = table.column("label").to_pylist()
    columns = [table.column(name).to_pylist() for name in names]
    seen: dict[tuple[Any, ...], int] = {}
    keys = []
    for label, *texts in zip(labels, *columns, strict=True):
        key = (*texts, tuple(sorted(label)) if isinstance(label, list) else label)
        seen[key] = seen.get(key, 0) + 1
        keys.append((*key, seen[key]))
    return keys


def compare_paired(first: Predictions, second: Predictions, draws: int = DRAWS) -> Paired:
    """Paired tests of `second` against `first`.

    Raises:
        DataError: see `align`.
    """
    import numpy as np

    rows = align(first, second)
    task, width, size = first.task, len(first.labels), len(first)
    one, two = first.predicted, _in_labels_of(first, second)[rows]
    kinds, counts = _joint_kinds(task, width, first.truth, one, two)
    depth = kinds.shape[1] // 2
    drawn = resample(kinds, counts, draws)
    sums = (counts @ kinds)[None, :]
    points = [sums_of(task, width, part, size) for part in (sums[:, :depth], sums[:, depth:])]
    spread = [sums_of(task, width, part, size) for part in (drawn[:, :depth], drawn[:, depth:])]
    right = [_right(task, first.truth, predicted) for predicted in (one, two)] if task != "regression" else None
    differences = []
    for name, value in points[0].items():
        if value.ndim > 1:
            continue
        a, b = float(value[0]), float(points[1][name][0])
        resampled = spread[1][name] - spread[0][name]
        low, high = (float(v) for v in limits(resampled))
        p, test = _bootstrap_p(resampled), "paired bootstrap"
        if name in ("accuracy", "subset_accuracy") and right is not None:
            p, test = _mcnemar(*right), "McNemar exact"
        elif name == "mae":
            p, test = _wilcoxon(np.abs(two - first.truth) - np.abs(one - first.truth)), "Wilcoxon"
        differences.append(Difference(name, a, b, low, high, p, test))
    only = [int((a & ~b).sum()) for a, b in (right, right[::-1])] if right is not None else [None, None]
    return Paired(size, only[0], only[1], tuple(differences))


def _in_labels_of(first: Predictions, second: Predictions) -> Array:
    """`second.predicted` with the label indices of `first`."""
    import numpy as np

    if not first.labels or first.labels == second.labels:
        return second.predicted
    if second.task == "single-label":
        return np.array([first.labels.index(name) for name in second.labels])[second.predicted]
    return second.predicted[:, [second.labels.index(name) for name in first.labels]]


def _joint_kinds(task: str, width: int, truth: Array, one: Array, two: Array) -> tuple[Array, Array]:
    """Distinct rows by truth and both predictions: their contributions to both models' sums, (U, 2 D), and counts (U,)."""
    import numpy as np

    counts = np.ones(len(truth), np.int64)
    if task != "regression":
        parts = [part[:, None] if part.ndim == 1 else part for part in (truth, one, two)]
        unique, counts = np.unique(np.concatenate(parts, axis=1), axis=0, return_counts=True)
        step = unique.shape[1] // 3
        cut = [unique[:, k * step : (k + 1) * step] for k in range(3)]
        truth, one, two = (c[:, 0] for c in cut) if task == "single-label" else cut
    both = [contributions(task, width, truth, predicted) for predicted in (one, two)]
    return np.concatenate(both, axis=1), counts


def _right(task: str, truth: Array, predicted: Array) -> Array:
    return truth == predicted if task == "single-label" else (truth == predicted).all(axis=1)


def _mcnemar(one: Array, two: Array) -> float:
    from scipy.stats import binomtest

    first, second = int((one & ~two).sum()), int((two & ~one).sum())
    return float(binomtest(first, first + second, 0.5).pvalue) if first + second else 1.0


def _wilcoxon(differences: Array) -> float:
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if (differences != 0).any() else 1.0


def _bootstrap_p(differences: Array) -> float:
    """Twice the share of resamples on the wrong side of 0; never 0, which a finite number of resamples cannot show."""
    import numpy as np

    known = differences[np.isfinite(differences)]
    if not len(known):
        return float("nan")
    side = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (side + 1) / (len(known) + 1)))


def holm(values: list[float]) -> list[float]:
    """p-values of several tests, corrected by Holm's method (1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, most = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = most
    return corrected
