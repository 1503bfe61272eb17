"""What a few seeds can tell: mean and interval, and a paired test. Standard library only.

Student's t is computed here because a login node has no scipy: the distribution function through the regularised
incomplete beta function (its continued fraction, DLMF 8.17.22, by the modified Lentz method), the quantile by bisection.
Both agree with scipy to 1e-9 (tests/unit/test_intervals.py).

What these numbers assume: the results of the seeds are independent and roughly normal. With 3 to 10 seeds that cannot be
checked. Not covered: the spread that another sample of the data would bring, and the choice of the best by these very numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Interval", "PairedTest", "mean_interval", "paired_t_test", "t_cdf", "t_quantile"]


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; `low` and `high` are None where one value says nothing about the spread."""

    mean: float
    low: float | None
    high: float | None
    deviation: float | None
    count: int


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test of the mean difference `first - second` against 0, two-sided.

    `p` and `t` are None where the differences do not vary (one pair, or all the same): then there is nothing to test with.
    """

    difference: Interval
    t: float | None
    p: float | None


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and two-sided interval `mean ± t(level, n - 1) · s / √n`, s the sample standard deviation.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, None, None, 1)
    deviation = statistics.stdev(values)
    half = t_quantile(0.5 + level / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, deviation, len(values))


def paired_t_test(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> PairedTest:
    """Whether two settings differ, from pairs of results that share a seed.

    Raises:
        ValueError: no pairs, or lists of different length.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences, level)
    # What rounding leaves of equal differences is not a spread.
    scale = max(map(abs, [*first, *second]))
    if interval.deviation is None or interval.deviation <= 1e-12 * scale:
        return PairedTest(interval, None, None)
    t = interval.mean / (interval.deviation / math.sqrt(interval.count))
    return PairedTest(interval, t, 2 * t_cdf(-abs(t), interval.count - 1))


def t_cdf(t: float, df: float) -> float:
    """P(T ≤ t) of Student's t with `df` degrees of freedom."""
    if df <= 0:
        raise ValueError(f"degrees of freedom must be positive, got {df}")
    if abs(t) < 0.5:  # near the middle df / (df + t²) is 1 as far as a float can tell
        return 0.5 + math.copysign(0.5 * _beta(t * t / (df + t * t), 0.5, df / 2), t)
    tail = 0.5 * _beta(df / (df + t * t), df / 2, 0.5) if math.isfinite(t) else 0.0
    return tail if t < 0 else 1 - tail


def t_quantile(p: float, df: float) -> float:
    """The t with P(T ≤ t) = `p`."""
    if not 0 < p < 1:
        raise ValueError(f"a quantile needs 0 < p < 1, got {p}")
    # In the lower tail, where the distribution function has digits left.
    tail = min(p, 1 - p)
    low, high = 0.0, 1.0
    while t_cdf(-high, df) > tail:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if t_cdf(-middle, df) > tail else (low, middle)
    return math.copysign((low + high) / 2, p - 0.5)


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    # The continued fraction converges quickly below the mean only (DLMF 8.17.4 is the other side).
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 1000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d or tiny)
            c = 1 + numerator / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * fraction
