"""Paired tests: is one model better than another on the same rows?

Shares of rows that are right (accuracy): McNemar's exact test (1947), a binomial test on the rows that only one model gets right, and the
interval of Bonett and Price (2012). Mean absolute error: Wilcoxon's signed-rank test. Every other score: the paired bootstrap, which weighs
rows anew and takes both models' predictions for them; as in `afina.statistics.limits` its limits know of one more row of each class, that
only the first or only the second model gets right.
Runs that were evaluated on different rows are refused with the reason. Not covered: randomness in training; two seeds of one recipe may
differ as much. NumPy and SciPy are imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from afina.errors import DataError
from afina.recipe.metrics import NEED_SCORES
from afina.statistics.intervals import share_difference
from afina.statistics.limits import DRAWS, MOST_CELLS, distinct, pseudo_rows, resample, score_limits
from afina.statistics.measures import (
    ROW_SHARES,
    auroc,
    average_precision,
    contributions,
    from_sums,
    one_vs_rest,
    ranks,
    row_losses,
)
from afina.statistics.predictions import Predictions, align, predicted_in_labels_of

__all__ = ["Difference", "Paired", "compare_paired", "compare_with_mean", "holm"]

Array = Any


@dataclass(frozen=True)
class Difference:
    """Difference of two models in one score, second minus first.

    Attributes:
        first, second: the scores.
        low, high: 95 % bootstrap interval of the difference.
        p: two-sided p-value of `test`.
        test: McNemar exact, Wilcoxon, paired bootstrap, or from the interval.
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

    def records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The differences of these scores, as far as they were compared, in this order; for JSON."""
        by_name = {difference.metric: difference for difference in self.differences}
        return [asdict(by_name[name]) for name in names if name in by_name]


def compare_paired(first: Predictions, second: Predictions, draws: int = DRAWS, extra: Sequence[str] = ()) -> Paired:
    """Paired tests of `second` against `first`.

    Args:
        extra: metrics of probabilities and ranks that are tested too: `auroc`, `average_precision`, `log_loss`, `brier`, `spearman`.

    Raises:
        DataError: see `align`.
    """
    import numpy as np

    rows = align(first, second)
    task, width = first.task, len(first.labels)
    one, two = first.predicted, predicted_in_labels_of(first, second)[rows]
    if min(len(rows), width**3) * 6 * (width + 1) > MOST_CELLS:
        raise DataError(f"{len(rows):,} rows of {width:,} labels are too many for a bootstrap", "compare fewer rows")
    kinds, counts = distinct(task, width, first.truth, one, two)
    whole = np.split(counts @ kinds, 2)
    drawn = resample(kinds, counts, draws)
    values = [from_sums(task, sums[None, :]) for sums in whole]
    lower, upper = (_differences(task, part, whole) for part in _shifted(task, drawn, whole))
    right = [_right(task, first.truth, predicted) for predicted in (one, two)] if task != "regression" else None
    differences = []
    for name in values[0]:
        a, b = (float(of[name][0]) for of in values)
        low, high = _percentile(lower[name], 2.5), _percentile(upper[name], 97.5)
        p, test = _bootstrap_p(lower[name], upper[name]), "paired bootstrap"
        if right is not None and name in ROW_SHARES.get(task, ()):
            low, high = share_difference(*_only_one(*right), len(first))
            p, test = _mcnemar(*right), "McNemar exact"
        elif name in ("mse", "mae"):
            losses = [np.abs(v - first.truth) ** (2 if name == "mse" else 1) for v in (one, two)]
            low, high = _mean_limits(losses[1] - losses[0])
            p, test = (_wilcoxon(losses[1] - losses[0]), "Wilcoxon") if name == "mae" else (p, test)
        differences.append(Difference(name, a, b, low, high, p, test))
    if first.scores is not None and second.scores is not None and set(extra) & set(NEED_SCORES):
        order = [second.labels.index(name) for name in first.labels]
        both = (first.scores, second.scores[rows][:, order])
        differences += _of_scores(task, first.truth, both, [name for name in extra if name in NEED_SCORES], draws)
    if task == "regression" and "spearman" in extra:
        differences.append(_spearman(first.truth, one, two, draws))
    only_first, only_second = _only_one(*right) if right is not None else (None, None)
    return Paired(len(first), only_first, only_second, tuple(differences))


def compare_with_mean(
    members: Sequence[Predictions], ensemble: Predictions, metrics: Sequence[str], draws: int = DRAWS
) -> list[Difference]:
    """Paired differences of an ensemble from the mean score of its members, all aligned: what is gained over a member drawn by chance.

    Raises:
        DataError: too many rows of too many labels.
    """
    import numpy as np

    task, width, truth = ensemble.task, len(ensemble.labels), ensemble.truth
    if len(truth) * 3 * (width + 1) * (len(members) + 1) > MOST_CELLS:
        raise DataError(f"{len(truth):,} rows of {width:,} labels are too many for a bootstrap", "compare fewer runs")
    predicted = [rows.predicted for rows in (*members, ensemble)]
    kinds, counts = distinct(task, width, truth, *predicted)
    whole = np.split(counts @ kinds, len(predicted))
    drawn = np.split(resample(kinds, counts, draws), len(predicted), axis=1)
    wrong, right = (0, 0) if task == "regression" else pseudo_rows(task, whole[0] + whole[-1], len(drawn[0]))

    def gains(parts: Sequence[Array], of_member: Any, of_ensemble: Any) -> dict[str, Array]:
        each = [from_sums(task, part + of_member, sums) for part, sums in zip(parts[:-1], whole, strict=False)]
        mine = from_sums(task, parts[-1] + of_ensemble, whole[-1])
        return {name: mine[name] - np.mean([one[name] for one in each], axis=0) for name in mine}

    values = [from_sums(task, sums[None, :]) for sums in whole]
    lower, upper = gains(drawn, right, wrong), gains(drawn, wrong, right)
    differences = []
    for name in metrics:
        if name in values[0]:
            a, b = float(np.mean([one[name][0] for one in values[:-1]])), float(values[-1][name][0])
            low, high = _percentile(lower[name], 2.5), _percentile(upper[name], 97.5)
            differences.append(
                Difference(name, a, b, low, high, _bootstrap_p(lower[name], upper[name]), "paired bootstrap")
            )
        elif name in ("log_loss", "brier") and ensemble.scores is not None:
            losses = [row_losses(task, truth, rows.scores)[name] for rows in (*members, ensemble)]
            differences.append(_of_losses(name, np.mean(losses[:-1], axis=0), losses[-1], draws))
    return differences


def _of_losses(name: str, one: Array, two: Array, draws: int) -> Difference:
    """The difference of two mean losses, from those of each row."""
    import numpy as np

    by = two - one
    spread = resample(np.stack([by, np.ones(len(by))], axis=1), np.ones(len(by)), draws)
    drawn = spread[:, 0] / spread[:, 1]
    return Difference(
        name, float(one.mean()), float(two.mean()), *_mean_limits(by), _bootstrap_p(drawn, drawn), "paired bootstrap"
    )


def _shifted(task: str, drawn: Array, whole: Sequence[Array]) -> Iterator[tuple[Array, Array]]:
    """Resamples of both models with one more row of each class that only the first gets right, and that only the second does."""
    import numpy as np

    one, two = np.split(drawn, 2, axis=1)
    if task == "regression":
        yield from ((one, two), (one, two))
        return
    wrong, right = pseudo_rows(task, whole[0] + whole[1], len(drawn))
    yield one + right, two + wrong
    yield one + wrong, two + right


def _differences(task: str, sums: tuple[Array, Array], whole: Sequence[Array]) -> dict[str, Array]:
    one, two = (from_sums(task, part, of) for part, of in zip(sums, whole, strict=True))
    return {name: two[name] - one[name] for name in one}


def _percentile(drawn: Array, at: float) -> float:
    import numpy as np

    return float(np.nanpercentile(drawn, at)) if np.isfinite(drawn).any() else float("nan")


def _mean_limits(differences: Array) -> tuple[float, float]:
    """95 % limits of a mean, Student's t."""
    from scipy.special import stdtrit

    size = len(differences)
    if size < 2:
        return float("nan"), float("nan")
    half = float(stdtrit(size - 1, 0.975)) * float(differences.std(ddof=1)) / size**0.5
    return float(differences.mean()) - half, float(differences.mean()) + half


def _of_scores(
    task: str, truth: Array, scores: tuple[Array, Array], names: Sequence[str], draws: int
) -> list[Difference]:
    """Metrics of probabilities; limits and p of areas come from the limits of both models and their correlation (Zou and Donner 2008)."""

    found = []
    losses = [row_losses(task, truth, part) for part in scores]
    areas = {"auroc": auroc, "average_precision": average_precision}
    singles = [score_limits(task, truth, part, draws) for part in scores]
    for name in names:
        if name in losses[0]:
            found.append(_of_losses(name, losses[0][name], losses[1][name], draws))
            continue
        a, b = (_mean_area(areas[name], task, truth, part, None) for part in scores)
        limits = [single.get(name, (float("nan"), float("nan"))) for single in singles]
        low, high = _difference_limits(a, b, limits, _area_correlation(areas[name], task, truth, scores, draws))
        found.append(Difference(name, a, b, low, high, _p_of_limits(b - a, low, high), "from the interval"))
    return found


def _mean_area(area: Any, task: str, truth: Array, scores: Array, weights: Array | None) -> Any:
    import numpy as np

    with np.errstate(invalid="ignore"):
        each = [area(flags, column, weights) for flags, column in one_vs_rest(task, truth, scores) if flags.any()]
    return np.nanmean(each, axis=0) if each else np.nan


def _area_correlation(area: Any, task: str, truth: Array, scores: tuple[Array, Array], draws: int) -> float:
    """Correlation of the areas of both models over Bayesian bootstrap samples of the rows; 0 where one does not vary."""
    import numpy as np

    rng, size = np.random.default_rng(8), len(truth)
    block = max(1, 2_000_000 // size)
    draws = min(draws, max(200, 200_000_000 // (size * scores[0].shape[1])))
    parts = []
    for start in range(0, draws, block):
        weights = rng.standard_exponential((min(block, draws - start), size))
        parts.append([_mean_area(area, task, truth, part, weights) for part in scores])
    one, two = np.concatenate(parts, axis=1)
    known = np.isfinite(one) & np.isfinite(two)
    if known.sum() < 2 or min(one[known].std(), two[known].std()) < 1e-12:
        return 0.0
    return float(np.corrcoef(one[known], two[known])[0, 1])


def _difference_limits(
    a: float, b: float, limits: Sequence[tuple[float, float]], correlation: float
) -> tuple[float, float]:
    """Limits of b - a from those of both."""
    (low_a, high_a), (low_b, high_b) = limits

    def away(first: float, second: float) -> float:
        return float(max(0.0, first**2 + second**2 - 2 * correlation * first * second) ** 0.5)

    return b - a - away(b - low_b, high_a - a), b - a + away(high_b - b, a - low_a)


def _p_of_limits(difference: float, low: float, high: float) -> float:
    """Two-sided p-value of a normal test whose 95 % interval on the side of 0 is this one: below 0.05 where it leaves 0 out."""
    from scipy.special import ndtr, ndtri

    half = difference - low if difference > 0 else high - difference
    if half == 0:
        return 1.0
    return float(2 * ndtr(-abs(difference) / half * ndtri(0.975)))


def _spearman(truth: Array, one: Array, two: Array, draws: int) -> Difference:
    """The resamples keep the ranks of all rows."""
    import numpy as np

    actual = ranks(truth)
    columns = [contributions("regression", 0, actual, ranks(values)) for values in (one, two)]
    a, b = (float(from_sums("regression", part.sum(axis=0)[None, :])["pearson"][0]) for part in columns)
    drawn = resample(np.concatenate(columns, axis=1), np.ones(len(truth)), draws)
    parts = [from_sums("regression", part)["pearson"] for part in np.split(drawn, 2, axis=1)]
    by = parts[1] - parts[0]
    low, high = _percentile(by, 2.5), _percentile(by, 97.5)
    return Difference("spearman", a, b, low, high, _bootstrap_p(by, by), "paired bootstrap")


def _right(task: str, truth: Array, predicted: Array) -> Array:
    return truth == predicted if task == "single-label" else (truth == predicted).all(axis=1)


def _only_one(one: Array, two: Array) -> tuple[int, int]:
    """Rows that only the first gets right, and that only the second does."""
    return int((one & ~two).sum()), int((two & ~one).sum())


def _mcnemar(one: Array, two: Array) -> float:
    from scipy.stats import binomtest

    first, second = _only_one(one, two)
    return float(binomtest(first, first + second, 0.5).pvalue) if first + second else 1.0


def _wilcoxon(differences: Array) -> float:
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if (differences != 0).any() else 1.0


def _bootstrap_p(lower: Array, upper: Array) -> float:
    """Twice the share of resamples on the wrong side of 0; never 0, which a finite number of resamples cannot show."""
    import numpy as np

    lower, upper = lower[np.isfinite(lower)], upper[np.isfinite(upper)]
    if not len(lower) or not len(upper):
        return float("nan")
    side = min((lower <= 0).sum(), (upper >= 0).sum())
    return float(min(1.0, 2 * (side + 1) / (len(lower) + 1)))


def holm(values: list[float]) -> list[float]:
    """p-values of several tests, corrected by Holm's method (1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, most = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = most
    return corrected
