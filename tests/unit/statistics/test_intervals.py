"""Means over seeds and their paired test: against scipy.stats, against numbers worked out by hand, and by simulation."""

from __future__ import annotations

import math
import random

import pytest

from afina.statistics.intervals import mean_interval, paired_t_test


def test_an_interval_by_hand() -> None:
    """Five values, t(0.975, 4) = 2.7764."""
    found = mean_interval([0.61, 0.63, 0.62, 0.66, 0.58])
    assert found.count == 5 and found.mean == pytest.approx(0.62)
    assert found.deviation == pytest.approx(math.sqrt(0.0034 / 4))
    half = 2.7764451 * math.sqrt(0.0034 / 4) / math.sqrt(5)
    assert (found.low, found.high) == (pytest.approx(0.62 - half), pytest.approx(0.62 + half))


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    found = mean_interval([0.5])
    assert (found.mean, found.low, found.high, found.deviation, found.count) == (0.5, None, None, None, 1)
    for values in ([], [0.1, math.nan], [math.inf]):
        with pytest.raises(ValueError):
            mean_interval(values)


def test_intervals_are_scipys() -> None:
    from scipy import stats

    rng = random.Random(3)
    for count in (2, 3, 5, 10, 30, 101):
        values = [rng.gauss(0.6, 0.02) for _ in range(count)]
        for level in (0.5, 0.9, 0.95, 0.99):
            found = mean_interval(values, level)
            low, high = stats.t.interval(level, count - 1, loc=found.mean, scale=stats.sem(values))
            assert (found.low, found.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9))


def test_95_percent_of_the_intervals_cover_the_mean() -> None:
    """Of 4,000 samples of five: between 94 and 96 % (three standard errors)."""
    rng = random.Random(11)
    hits = 0
    for _ in range(4000):
        found = mean_interval([rng.gauss(3, 2) for _ in range(5)])
        hits += bool(found.low is not None and found.high is not None and found.low <= 3 <= found.high)
    assert 0.94 < hits / 4000 < 0.96


def test_the_paired_test_is_scipys() -> None:
    from scipy import stats

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
