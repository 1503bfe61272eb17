"""Intervals of a share, and of a mean over a few seeds or folds with its paired t-test.

Models of several folds are trained on much the same rows, so their scores are not independent, and Student's interval of their mean is too
narrow: the variance of the mean is taken as `(1 / n + n_test / n_train) s²` (Nadeau and Bengio 2003, "Inference for the Generalization
Error"), for repeated cross-validation as Bouckaert and Frank (2004) do. `overlap` is n_test / n_train; 0 for seeds.

Those over seeds assume that the results of the seeds are independent and roughly normal, which 3 to 10 seeds cannot show. Not covered: the
spread that another sample of the data would bring, and the bias of choosing the best setting by these very numbers. Student's t
comes from scipy.special, which imports in 0.3 s beside NumPy (scipy.stats: 1.1 s).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MeanInterval", "PairedTest", "mean_interval", "paired_t_test", "share_difference", "wilson"]

_Z2 = 1.959963984540054**2


@dataclass(frozen=True)
class MeanInterval:
    """A mean with its confidence interval and sample standard deviation; one value alone has neither (None)."""

    mean: float
    low: float | None
    high: float | None
    deviation: float | None
    count: int


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test of the mean difference `first - second` against 0, two-sided.

    `t` and `p` are None where the differences do not vary (one pair, or all the same): then nothing can be tested.
    """

    difference: MeanInterval
    t: float | None
    p: float | None


def mean_interval(
    values: Sequence[float],
    level: float = 0.95,
    overlap: float = 0.0,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> MeanInterval:
    """Mean and two-sided interval `mean ± t(level, n - 1) · s · √(1 / n + overlap)`, s the sample standard deviation.

    Args:
        overlap: rows that one model is tested on / rows that it is trained on, where the models share rows.
        within: the values that are possible; the interval is cut there, which leaves its coverage as it is.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return MeanInterval(mean, None, None, None, 1)
    from scipy.special import stdtrit

    deviation = statistics.stdev(values)
    half = float(stdtrit(len(values) - 1, 0.5 + level / 2)) * deviation * math.sqrt(1 / len(values) + overlap)
    low, high = max(mean - half, within[0]), min(mean + half, within[1])
    return MeanInterval(mean, low, high, deviation, len(values))


def paired_t_test(
    first: Sequence[float], second: Sequence[float], level: float = 0.95, overlap: float = 0.0
) -> PairedTest:
    """Test whether two settings differ, from pairs of results that share a seed, or a fold; see `mean_interval`.

    Raises:
        ValueError: no pairs, or lists of different length.
    """
    from scipy.special import stdtr

    differences = [a - b for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences, level, overlap)
    # Equal differences may still vary by rounding.
    scale = max(map(abs, [*first, *second]))
    if interval.deviation is None or interval.deviation <= 1e-12 * scale:
        return PairedTest(interval, None, None)
    t = interval.mean / (interval.deviation * math.sqrt(1 / interval.count + overlap))
    return PairedTest(interval, t, 2 * float(stdtr(interval.count - 1, -abs(t))))


def wilson(hits: float, rows: float) -> tuple[float, float]:
    """95 % interval of a share with continuity correction (Newcombe 1998, method 4; SciPy's `wilsoncc`).

    Without the correction its coverage is 0.91 at 25 rows and a share of 0.98; with it at least 0.95 from 20 rows on.
    """
    share = hits / rows

    def lower(of: float) -> float:
        root = max(0.0, _Z2 - 2 - 1 / rows + 4 * of * (rows * (1 - of) + 1))
        return (2 * rows * of + _Z2 - 1 - math.sqrt(_Z2 * root)) / (2 * (rows + _Z2))

    low = 0.0 if hits <= 0 else max(0.0, lower(share))
    return low, 1.0 if hits >= rows else min(1.0, 1 - lower(1 - share))


def share_difference(only_first: int, only_second: int, rows: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same rows, second minus first (Bonett and Price 2012), half a row wider.

    Its coverage is at least 0.95 from 20 rows on. The half row keeps it nearer to McNemar's exact test, with which it may disagree where p is 0.04 to 0.07.

    Args:
        only_first, only_second: hits that only one of them has.
    """
    one, two = (only_first + 1) / (rows + 2), (only_second + 1) / (rows + 2)
    half = math.sqrt(_Z2 * (one + two - (two - one) ** 2) / (rows + 2)) + 0.5 / rows
    return max(-1.0, two - one - half), min(1.0, two - one + half)
