"""Coverage of every interval, by simulation: models of known scores, evaluated on samples of rows; at least 93 of 100 hold the truth.

The target of an average over classes is that of the classes that occur in the sample, which is what the score says it is.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binom
from tests.common import some_of

from afina.statistics.intervals import wilson
from afina.statistics.measures import auroc, average_precision
from afina.statistics.paired import compare_paired
from afina.statistics.predictions import Predictions
from afina.statistics.scores import score

Array = Any

#: (classes, rows, share right, imbalance: class k has a share in proportion to 1 / k to this power).
_FAST = [(2, 20, 0.9, 1), (2, 100, 0.02, 0), (5, 20, 0.98, 1), (24, 20, 0.5, 0), (24, 100, 0.9, 1)]
_ALL = list(itertools.product((2, 3, 5, 24), (20, 100, 500, 2000), (0.02, 0.1, 0.5, 0.9, 0.98), (0, 1)))


@pytest.mark.parametrize("rows", [20, 25, 30, 50, 100, 300, 1000, 2000])
def test_intervals_of_shares_cover_at_every_share(rows: int) -> None:
    """Exactly, not by simulation: the sum over all outcomes."""
    limits = np.array([wilson(hits, rows) for hits in range(rows + 1)])
    for share in np.arange(0.02, 0.985, 0.01):
        held = (limits[:, 0] <= share) & (share <= limits[:, 1])
        assert binom.pmf(np.arange(rows + 1), rows, share)[held].sum() >= 0.93, share


def _population(classes: int, right: float, imbalance: int) -> Array:
    """Probability of each pair of label and prediction, (L, L)."""
    share = 1 / np.arange(1, classes + 1) ** imbalance
    joint = np.full((classes, classes), (1 - right) / (classes - 1))
    np.fill_diagonal(joint, right)
    return joint * (share / share.sum())[:, None]


def _true_scores(joint: Array, rows: Array) -> dict[str, float]:
    """The scores of the whole population, for the classes that occur in `rows` (L, L)."""
    hits, actual, chosen = np.diag(joint), joint.sum(1), joint.sum(0)
    there, labelled = rows.sum(0) + rows.sum(1) > 0, rows.sum(1) > 0
    f1, chance, right = 2 * hits / (actual + chosen), actual @ chosen, hits.sum()
    return {
        "accuracy": right,
        "f1": f1[there].mean(),
        "precision": (hits / chosen)[there].mean(),
        "recall": (hits / actual)[there].mean(),
        "balanced_accuracy": (hits / actual)[labelled].mean(),
        "f1_weighted": f1 @ actual,
        "kappa": (right - chance) / (1 - chance),
        "mcc": (right - chance) / np.sqrt((1 - chosen @ chosen) * (1 - actual @ actual)),
        "kappa_quadratic": _quadratic(joint),
    }


def _quadratic(joint: Array) -> float:
    places = np.arange(len(joint))
    cost = (places[:, None] - places[None, :]) ** 2
    return float(1 - (joint * cost).sum() / (np.outer(joint.sum(1), joint.sum(0)) * cost).sum())


def _coverage(classes: int, rows: int, right: float, imbalance: int, samples: int, draws: int) -> dict[str, float]:
    rng = np.random.default_rng(classes * 1000 + rows)
    joint = _population(classes, right, imbalance)
    held: dict[str, list[bool]] = {}
    for _ in range(samples):
        counts = rng.multinomial(rows, joint.ravel())
        truth, predicted = np.divmod(np.repeat(np.arange(classes**2), counts), classes)
        labels = tuple(map(str, range(classes)))
        found = score(Predictions("single-label", labels, truth, predicted, None, None), draws)
        true = _true_scores(joint, counts.reshape(classes, classes))
        for name, value in true.items():
            interval = found.overall[name]
            if interval.low == interval.low:
                held.setdefault(name, []).append(interval.low - 1e-9 <= value <= interval.high + 1e-9)
    return {name: float(np.mean(of)) for name, of in held.items()}


@pytest.mark.parametrize("case", _FAST, ids=str)
def test_intervals_of_averages_cover(case: tuple[int, int, float, int]) -> None:
    """Of 120 samples: 0.93 less two standard errors."""
    found = _coverage(*case, 120, 300)
    assert all(coverage >= 0.93 - 2 * 0.023 for coverage in found.values()), found


@pytest.mark.series
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("classes", [2, 3, 5, 24])
def test_intervals_of_averages_cover_everywhere(classes: int) -> None:
    """Shares from .02 to .98, 20 to 2,000 rows, balanced and not: 0.93 less two standard errors of 400 samples."""
    low = {}
    for case in some_of((case for case in _ALL if case[0] == classes), 4):
        found = _coverage(*case, 400 if classes < 24 or case[1] < 2000 else 150, 400)
        low |= {(*case, name): coverage for name, coverage in found.items() if coverage < 0.93 - 2 * 0.0128}
    assert not low, low


def _scored(size: int, apart: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Labels and normal scores; the AUROC is Φ(apart / √2)."""
    truth = (rng.random(size) < 0.3).astype(int)
    truth[:2] = 0, 1
    return truth, rng.normal(size=size) + apart * truth


@pytest.mark.parametrize(("size", "apart"), [(20, 0.5), (40, 2.0), (200, 1.0), (200, 3.0)])
def test_intervals_of_areas_cover(size: int, apart: float) -> None:
    rng = np.random.default_rng(size)
    big = _scored(400_000, apart, np.random.default_rng(1))
    true = {"auroc": auroc(*big), "average_precision": average_precision(*big)}
    held: dict[str, list[bool]] = {name: [] for name in true}
    for _ in range(300):
        truth, value = _scored(size, apart, rng)
        scores = np.stack([1 - _logistic(value), _logistic(value)], axis=1)
        found = score(Predictions("single-label", ("a", "b"), truth, scores.argmax(1), scores, None), 100, list(true))
        for name, interval in found.overall.items():
            held[name].append(interval.low <= true[name] <= interval.high)
    assert all(np.mean(of) >= 0.93 - 2 * 0.0147 for of in held.values()), {k: np.mean(v) for k, v in held.items()}


def _logistic(value: Array) -> Array:
    return 1 / (1 + np.exp(-value))


@pytest.mark.parametrize(("size", "noise"), [(20, 0.3), (20, 1.0), (60, 0.5), (150, 2.0)])
def test_intervals_of_regression_cover(size: int, noise: float) -> None:
    """Normal labels and errors, whose scores are known."""
    rng = np.random.default_rng(size)
    r = 1 / np.sqrt(1 + noise**2)
    true = {
        "mse": noise**2,
        "rmse": noise,
        "mae": noise * np.sqrt(2 / np.pi),
        "r2": 1 - noise**2,
        "pearson": r,
        "spearman": 6 / np.pi * np.arcsin(r / 2),
    }
    held: dict[str, list[bool]] = {name: [] for name in true}
    for _ in range(300):
        truth = rng.normal(size=size)
        predicted = truth + noise * rng.normal(size=size)
        found = score(Predictions("regression", (), truth, predicted, None, None), 400).overall
        for name, value in true.items():
            held[name].append(found[name].low <= value <= found[name].high)
    assert all(np.mean(of) >= 0.93 - 2 * 0.0147 for of in held.values()), {k: np.mean(v) for k, v in held.items()}


@pytest.mark.parametrize("imbalance", [0, 1])
def test_intervals_of_losses_and_of_several_labels_cover(imbalance: int) -> None:
    """Probabilities that are right: log loss and Brier score from a large sample; F1 of several labels likewise."""

    def sample(size: int, rng: np.random.Generator) -> Predictions:
        scores = _logistic(rng.normal(size=(size, 4)) * 2 - imbalance * np.arange(4))
        truth = rng.random((size, 4)) < scores
        return Predictions("multi-label", ("a", "b", "c", "d"), truth, scores > 0.5, scores, None)

    names = [
        "f1", "f1_micro", "precision", "recall", "f1_weighted", "subset_accuracy", "log_loss", "brier", "auroc",
        "average_precision",
    ]  # fmt: skip
    whole = score(sample(300_000, np.random.default_rng(1)), 200, names).overall
    rng, held = np.random.default_rng(2), {name: [] for name in names}  # type: ignore[var-annotated]
    for _ in range(200):
        for name, interval in score(sample(60, rng), 300, names).overall.items():
            held[name].append(interval.low <= whole[name].value <= interval.high)
    assert all(np.mean(of) >= 0.93 - 2 * 0.018 for of in held.values()), {k: np.mean(v) for k, v in held.items()}


@pytest.mark.parametrize(
    ("rows", "classes", "first", "second"), [(30, 2, 0.9, 0.9), (100, 5, 0.6, 0.8), (300, 3, 0.98, 0.98)]
)
def test_intervals_of_differences_cover(rows: int, classes: int, first: float, second: float) -> None:
    rng = np.random.default_rng(rows)
    labels = tuple(map(str, range(classes)))
    held: dict[str, list[bool]] = {}
    for _ in range(150):
        truth = rng.integers(0, classes, rows)
        table = pa.table({"text": [str(i) for i in range(rows)], "label": [labels[t] for t in truth]})
        pair = [
            Predictions(
                "single-label",
                labels,
                truth,
                np.where(rng.random(rows) < right, truth, (truth + rng.integers(1, classes, rows)) % classes),
                None,
                table,
            )
            for right in (first, second)
        ]
        for d in compare_paired(*pair, 300).differences:
            if d.metric in ("accuracy", "f1", "recall", "balanced_accuracy"):
                held.setdefault(d.metric, []).append(d.low <= second - first <= d.high)
    assert all(np.mean(of) >= 0.93 - 2 * 0.021 for of in held.values()), {k: np.mean(v) for k, v in held.items()}


@pytest.mark.parametrize(
    ("size", "first", "second", "shared"), [(40, 1.0, 1.0, 0.9), (40, 2.5, 2.5, 0.0), (150, 1.0, 2.0, 0.7)]
)
def test_intervals_of_differences_of_areas_cover_and_agree_with_p(
    size: int, first: float, second: float, shared: float
) -> None:
    """Two models whose errors have a part in common."""
    rng = np.random.default_rng(size)

    def both(rows: int) -> tuple[Array, list[Array]]:
        truth = (rng.random(rows) < 0.3).astype(int)
        truth[:2] = 0, 1
        same = rng.normal(size=rows) * shared**0.5
        return truth, [a * truth + same + rng.normal(size=rows) * (1 - shared) ** 0.5 for a in (first, second)]

    truth, values = both(400_000)
    true = {of.__name__: of(truth, values[1]) - of(truth, values[0]) for of in (auroc, average_precision)}
    held: dict[str, list[bool]] = {name: [] for name in true}
    for _ in range(150):
        truth, values = both(size)
        table = pa.table({"text": [str(i) for i in range(size)], "label": [str(t) for t in truth]})
        scores = [np.stack([1 - _logistic(v), _logistic(v)], axis=1) for v in values]
        pair = [Predictions("single-label", ("0", "1"), truth, s.argmax(1), s, table) for s in scores]
        for d in compare_paired(*pair, 200, list(true)).differences:
            if d.metric in true:
                held[d.metric].append(d.low <= true[d.metric] <= d.high)
                assert (d.p < 0.05) == (not d.low <= 0 <= d.high), d
    assert all(np.mean(of) >= 0.93 - 2 * 0.021 for of in held.values()), {k: np.mean(v) for k, v in held.items()}
