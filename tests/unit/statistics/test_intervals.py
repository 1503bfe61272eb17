"""The statistics of sweeps against scipy, against numbers worked out by hand, and against what they promise."""

from __future__ import annotations

import math
import random

import pytest

from afina.statistics.intervals import mean_interval, paired_t_test, t_cdf, t_quantile

FREEDOM = (1, 2, 3, 4, 5, 9, 14, 29, 100, 1000)


@pytest.mark.parametrize("df", FREEDOM)
def test_students_t_is_scipys(df: int) -> None:
    from scipy import stats

    for p in (0.6, 0.9, 0.95, 0.975, 0.99, 0.995, 0.9999, 0.25, 0.025, 1e-6):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-9), p
    for t in (-50.0, -8.0, -2.0, -0.5, -0.3, 0.0, 1e-9, 0.49, 0.5, 2.0, 7.0, 100.0):
        assert t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), rel=1e-9, abs=1e-9), t


def test_quantile_and_distribution_are_inverse_and_symmetric() -> None:
    rng = random.Random(4)
    for _ in range(200):
        p, df = rng.uniform(1e-4, 1 - 1e-4), rng.randint(1, 60)
        assert t_cdf(t_quantile(p, df), df) == pytest.approx(p, rel=1e-9)
        assert t_quantile(1 - p, df) == pytest.approx(-t_quantile(p, df), rel=1e-6, abs=1e-12)
    assert t_quantile(0.5, 7) == 0.0
    assert (t_cdf(-math.inf, 3), t_cdf(math.inf, 3)) == (0.0, 1.0)


def test_an_interval_is_the_textbooks() -> None:
    """Five values, t(0.975, 4) = 2.7764: by hand."""
    found = mean_interval([0.61, 0.63, 0.62, 0.66, 0.58])
    assert found.count == 5 and found.mean == pytest.approx(0.62)
    assert found.deviation == pytest.approx(math.sqrt(0.0034 / 4))
    half = 2.7764451 * math.sqrt(0.0034 / 4) / math.sqrt(5)
    assert (found.low, found.high) == (pytest.approx(0.62 - half), pytest.approx(0.62 + half))


def test_one_value_has_no_interval_and_no_value_no_mean() -> None:
    found = mean_interval([0.5])
    assert (found.mean, found.low, found.high, found.deviation, found.count) == (0.5, None, None, None, 1)
    for values in ([], [0.1, math.nan], [math.inf]):
        with pytest.raises(ValueError):
            mean_interval(values)


def test_the_intervals_hold_what_they_promise() -> None:
    """Of 4,000 samples of five, 95 % cover the mean: between 94 and 96 (three standard errors)."""
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
