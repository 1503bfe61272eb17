"""Means over seeds and their paired test: against scipy.stats, and of folds by simulation."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from afina.recipe.metrics import SCALARS, metric_range
from afina.statistics.intervals import mean_interval, paired_t_test, share_difference


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    found = mean_interval([0.5])
    assert (found.mean, found.low, found.high, found.deviation, found.count) == (0.5, None, None, None, 1)
    for values in ([], [0.1, math.nan], [math.inf]):
        with pytest.raises(ValueError):
            mean_interval(values)


def test_intervals_are_scipys() -> None:
    rng = random.Random(3)
    for count in (2, 3, 5, 10, 30, 101):
        values = [rng.gauss(0.6, 0.02) for _ in range(count)]
        found = mean_interval(values)
        assert (
            found == mean_interval(values, 0.95)
            and found.count == count
            and found.mean == pytest.approx(np.mean(values))
        )
        assert found.deviation == pytest.approx(np.std(values, ddof=1))
        for level in (0.5, 0.9, 0.95, 0.99):
            found = mean_interval(values, level)
            low, high = stats.t.interval(level, count - 1, loc=found.mean, scale=stats.sem(values))
            assert (found.low, found.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9))


def test_the_paired_test_is_scipys() -> None:
    rng = random.Random(5)
    for count in (2, 3, 5, 20):
        first = [rng.gauss(0.6, 0.02) for _ in range(count)]
        second = [value + rng.gauss(0.005, 0.01) for value in first]
        found, expected = paired_t_test(first, second), stats.ttest_rel(first, second)
        assert (found.t, found.p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
        low, high = expected.confidence_interval(0.95)
        assert (found.difference.low, found.difference.high) == (pytest.approx(low), pytest.approx(high))


def test_differences_that_do_not_vary_are_not_tested() -> None:
    for first, second in (([0.5], [0.4]), ([0.5, 0.6], [0.5, 0.6]), ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])):
        found = paired_t_test(first, second)
        assert found.p is None and found.t is None
    with pytest.raises(ValueError):
        paired_t_test([1.0], [1.0, 2.0])


def test_the_interval_of_folds_is_that_of_nadeau_and_bengio() -> None:
    scores = [0.81, 0.84, 0.79, 0.86, 0.80]
    plain, folds = mean_interval(scores), mean_interval(scores, overlap=1 / 4)
    assert folds.low is not None and plain.low is not None
    assert (folds.mean - folds.low) / (plain.mean - plain.low) == pytest.approx(math.sqrt((1 / 5 + 1 / 4) / (1 / 5)))
    others = [0.80, 0.82, 0.78, 0.83, 0.80]
    test = paired_t_test(scores, others, overlap=1 / 4)
    differences = [a - b for a, b in zip(scores, others, strict=True)]
    expected = statistics.fmean(differences) / (statistics.stdev(differences) * math.sqrt(1 / 5 + 1 / 4))
    assert test.t == pytest.approx(expected) and test.p is not None
    plain_test = paired_t_test(scores, others)
    assert plain_test.p is not None and test.p > plain_test.p
    # With two folds s has one degree of freedom, and t is that of the table.
    two = mean_interval([0.0, 1.0], overlap=1.0)
    assert two.high == pytest.approx(0.5 + 12.706204736 * math.sqrt(0.5) * math.sqrt(1.5))


def test_the_interval_of_repeated_folds_covers_where_students_does_not() -> None:
    """Ten times ten folds of 200 rows, a nearest-mean classifier on one number. What is covered is the expected score of a training
    on nine tenths of such rows, over data sets: Student's interval, which takes the hundred scores for independent, misses it most
    of the time; the corrected one, if anything, too rarely."""
    rng = np.random.default_rng(5)
    rows, folds, repeats = 200, 10, 10

    def accuracies() -> list[float]:
        truth = rng.integers(0, 2, rows)
        values = rng.normal(truth * 1.5, 1.0)
        scores = []
        for _ in range(repeats):
            for part in np.array_split(rng.permutation(rows), folds):
                train = np.ones(rows, bool)
                train[part] = False
                border = (values[train & (truth == 0)].mean() + values[train & (truth == 1)].mean()) / 2
                scores.append(float(((values[part] > border) == truth[part]).mean()))
        return scores

    drawn = [accuracies() for _ in range(120)]
    expected = statistics.fmean(map(statistics.fmean, drawn))

    def coverage(overlap: float) -> float:
        hits = 0
        for scores in drawn:
            interval = mean_interval(scores, overlap=overlap)
            assert interval.low is not None and interval.high is not None
            hits += interval.low <= expected <= interval.high
        return hits / len(drawn)

    naive, corrected = coverage(0.0), coverage(1 / (folds - 1))
    print(f"coverage of a 95 % interval: {naive:.3f} naive, {corrected:.3f} corrected")
    assert naive < 0.65 < 0.9 < corrected


def test_an_interval_ends_where_the_metric_does() -> None:
    for metric, (low, high) in {"accuracy": (0.0, 1.0), "eval_mcc": (-1.0, 1.0), "test_mse": (0.0, math.inf)}.items():
        wide = mean_interval([low, 0.9], within=metric_range(metric))
        assert (wide.low, wide.high) == (low, 1.0 if high == 1 else mean_interval([low, 0.9]).high)
    assert metric_range("r2") == (-math.inf, 1.0)
    assert metric_range("cost") == (-math.inf, math.inf)
    assert all(metric_range(name)[1] in (1.0, math.inf) for name in SCALARS)


@pytest.mark.parametrize("rows", [20, 30, 100])
def test_intervals_of_the_difference_of_two_shares_cover(rows: int) -> None:
    """Exactly, not by simulation; and they agree with McNemar's test, except near 0.05."""
    first, second = np.meshgrid(np.arange(rows + 1), np.arange(rows + 1), indexing="ij")
    first, second = (part[first + second <= rows] for part in (first, second))
    limits = np.array([share_difference(one, two, rows) for one, two in zip(first, second, strict=True)])
    for one, two in itertools.product((0.002, 0.01, 0.05, 0.2, 0.4), (0.002, 0.01, 0.05, 0.2, 0.5)):
        chances = stats.multinomial.pmf(
            np.stack([first, second, rows - first - second], axis=-1), rows, [one, two, 1 - one - two]
        )
        held = (limits[:, 0] <= two - one) & (two - one <= limits[:, 1])
        assert chances[held].sum() >= 0.95, (one, two)
    for one, two, (low, high) in zip(first, second, limits, strict=True):
        p = stats.binomtest(one, one + two).pvalue if one + two else 1.0
        assert 0.035 < p < 0.07 or (p < 0.05) == (not low <= 0 <= high), (one, two, p)
