"""Scores, intervals, calibration and paired tests: against scikit-learn and SciPy, against known answers, and by simulation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from afina.errors import DataError
from afina.statistics.paired import align, compare_paired, holm
from afina.statistics.predictions import Predictions, read_predictions
from afina.statistics.scores import calibrate, mistakes, score

LABELS = ("one star", 'tw,o "stars"', "three", "four, never right")
Array = Any


def write(path: Path, task: str, truth: Array, logits: Array, texts: list[str] | None = None) -> Path:
    """A file as `afina.worker.training.results` writes it."""
    size = len(truth)
    table: dict[str, Any] = {
        "row": list(range(size)),
        "file": pa.DictionaryArray.from_arrays(pa.array([0] * size, pa.int32()), pa.array(["a b.csv"])),
        "text": texts or [f"text {i}" for i in range(size)],
    }
    if task == "regression":
        table |= {"label": truth.astype(np.float32), "prediction": logits[:, 0].astype(np.float32)}
    else:
        names = np.array(LABELS[: logits.shape[1]], dtype=object)
        if task == "single-label":
            scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            table |= {"label": names[truth].tolist(), "prediction": names[logits.argmax(-1)].tolist()}
        else:
            scores = 1 / (1 + np.exp(-logits))
            table["label"] = pa.array([names[row > 0].tolist() for row in truth], pa.list_(pa.string()))
            table["prediction"] = pa.array([names[row > 0].tolist() for row in logits], pa.list_(pa.string()))
        table |= {f"score: {name}": scores[:, i].astype(np.float32) for i, name in enumerate(names)}
    pq.write_table(pa.table(table), path)
    return path


def classified(path: Path, size: int = 400, help: float = 1.0, seed: int = 0, noise: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, size)
    logits = rng.normal(size=(size, 4))
    logits[np.arange(size), truth] += help
    logits[:, 3] -= 9
    return read_predictions(
        write(path, "single-label", truth, logits + noise * np.random.default_rng(noise).normal(size=logits.shape))
    )


def test_single_label_scores_are_those_of_scikit_learn(tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    found = classified(tmp_path / "p.parquet")
    scores = score(found)
    each = metrics.precision_recall_fscore_support(found.truth, found.predicted, labels=range(4), zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), each, strict=False):
        assert scores.overall[name].value == pytest.approx(values.mean())
        seen = [None if interval is None else interval.value for interval in scores.per_class[name]]
        assert seen[:3] == pytest.approx(list(values[:3])) and seen[3] is None, "no example and not predicted"
    assert scores.overall["mcc"].value == pytest.approx(metrics.matthews_corrcoef(found.truth, found.predicted))
    assert scores.overall["accuracy"].value == pytest.approx((found.truth == found.predicted).mean())
    assert scores.support == [*np.bincount(found.truth, minlength=4)]


def test_multi_label_scores_are_those_of_scikit_learn(tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, (300, 3))
    truth[:5] = 0
    found = read_predictions(
        write(tmp_path / "p.parquet", "multi-label", truth, rng.normal(size=(300, 3)) + 2 * truth - 1)
    )
    assert found.task == "multi-label" and (found.truth == truth.astype(bool)).all()
    scores = score(found)
    for average, name in (("macro", "f1"), ("micro", "f1_micro")):
        assert scores.overall[name].value == pytest.approx(
            metrics.f1_score(found.truth, found.predicted, average=average)
        )
    assert scores.overall["subset_accuracy"].value == pytest.approx(
        metrics.accuracy_score(found.truth, found.predicted)
    )


def test_regression_scores_are_those_of_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(size=200)
    found = read_predictions(
        write(tmp_path / "p.parquet", "regression", truth, (truth + rng.normal(size=200))[:, None])
    )
    scores = score(found).overall
    error = found.predicted - found.truth
    assert scores["mse"].value == pytest.approx((error**2).mean()) and scores["mae"].value == pytest.approx(
        abs(error).mean()
    )
    assert scores["pearson"].value == pytest.approx(np.corrcoef(found.truth, found.predicted)[0, 1])
    flat = read_predictions(write(tmp_path / "f.parquet", "regression", np.ones(5), np.ones((5, 1))))
    assert math.isnan(score(flat).overall["pearson"].value) and math.isnan(score(flat).overall["pearson"].low)


def test_an_interval_has_the_width_of_theory_and_is_reproducible(tmp_path: Path) -> None:
    found = classified(tmp_path / "p.parquet", 1000)
    first, again = score(found), score(found)
    assert first == again
    accuracy = first.overall["accuracy"]
    deviation = math.sqrt(accuracy.value * (1 - accuracy.value) / 1000)
    assert accuracy.high - accuracy.low == pytest.approx(2 * 1.96 * deviation, rel=0.08)
    assert accuracy.low < accuracy.value < accuracy.high


def test_95_percent_of_the_intervals_hold_the_truth(tmp_path: Path) -> None:
    """Models of known accuracy, evaluated on 300 rows each."""
    rng = np.random.default_rng(20)
    held = 0
    for _ in range(200):
        truth = rng.integers(0, 3, 300)
        predicted = np.where(rng.random(300) < 0.8, truth, (truth + 1) % 3)
        accuracy = score(Predictions("single-label", LABELS[:3], truth, predicted, None, None), 400).overall["accuracy"]
        held += accuracy.low <= 0.8 <= accuracy.high
    assert 180 <= held <= 199


def test_calibration_of_an_honest_and_an_overconfident_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    sure = rng.uniform(0.5, 1, 20000)
    truth = (rng.random(20000) > sure).astype(int)
    scores = np.stack([sure, 1 - sure], axis=1)
    honest = calibrate(Predictions("single-label", LABELS[:2], truth, np.zeros(20000, int), scores, None))
    assert honest is not None and honest.error < 0.02
    assert sum(row[2] for row in honest.bins) == 20000
    assert all(low <= share <= high for *_, share, low, high in honest.bins)
    boasting = calibrate(
        Predictions("single-label", LABELS[:2], truth, np.zeros(20000, int), np.array([[1.0, 0.0]] * 20000), None)
    )
    assert boasting is not None and boasting.error == pytest.approx(truth.mean()) and len(boasting.bins) == 1
    assert boasting.brier == pytest.approx(2 * truth.mean())


def test_the_worst_mistakes_come_first(tmp_path: Path) -> None:
    found = classified(tmp_path / "p.parquet")
    listed = mistakes(found, 10)
    assert len(listed) == 10 and [bad for _, bad in listed] == sorted((bad for _, bad in listed), reverse=True)
    assert all(found.truth[i] != found.predicted[i] for i, _ in listed)
    assert listed[0][1] == max(
        s[p] for s, p, t in zip(found.scores, found.predicted, found.truth, strict=True) if p != t
    )
    assert found.about(listed[0][0]) == {"row": listed[0][0], "file": "a b.csv", "text": f"text {listed[0][0]}"}


def test_mcnemar_is_the_binomial_test_of_the_rows_on_which_models_differ(tmp_path: Path) -> None:
    truth = np.zeros(20, int)
    one = np.array([0] * 15 + [1] * 5)
    two = np.array([1] * 1 + [0] * 19)  # right on 5 where the first is wrong, wrong on 1 where it is right
    table = pa.table({"text": [str(i) for i in range(20)], "label": ["one star"] * 20})
    made = [Predictions("single-label", LABELS[:2], truth, values, np.ones((20, 2)), table) for values in (one, two)]
    found = compare_paired(*made)
    assert (found.rows, found.only_first, found.only_second) == (20, 1, 5)
    accuracy = found.differences[0]
    assert accuracy.metric == "accuracy" and accuracy.second - accuracy.first == pytest.approx(0.2)
    assert accuracy.p == pytest.approx(2 * (1 + 6) / 2**6), "two-sided, by hand"
    same = compare_paired(made[0], made[0])
    assert all(d.p == 1.0 and d.low == d.high == 0.0 for d in same.differences)


def test_false_alarms_are_rare_and_better_models_are_recognised(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    table = pa.table({"text": [str(i) for i in range(300)], "label": ["one star"] * 300})

    def model(truth: Array, right: float) -> Predictions:
        predicted = np.where(rng.random(300) < right, truth, (truth + 1) % 3)
        return Predictions("single-label", LABELS[:3], truth, predicted, np.ones((300, 3)), table)

    alarms: dict[str, int] = {}
    for _ in range(150):
        truth = rng.integers(0, 3, 300)
        for d in compare_paired(model(truth, 0.8), model(truth, 0.8), 300).differences:
            alarms[d.metric] = alarms.get(d.metric, 0) + (d.p < 0.05)
    assert all(count <= 16 for count in alarms.values()), f"expected 7.5 each: {alarms}"
    better = compare_paired(model(truth, 0.7), model(truth, 0.9))
    assert all(d.p < 0.001 and d.low > 0 for d in better.differences)


def test_regression_is_tested_on_its_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    truth = rng.normal(size=250)
    close, far = (truth + rng.normal(size=250) * width for width in (0.2, 1.0))
    first, second = (
        read_predictions(write(tmp_path / f"{i}.parquet", "regression", truth, v[:, None]))
        for i, v in enumerate((far, close))
    )
    found = {d.metric: d for d in compare_paired(first, second).differences}
    by = abs(second.predicted - second.truth) - abs(first.predicted - first.truth)
    assert found["mae"].test == "Wilcoxon" and found["mae"].p == pytest.approx(stats.wilcoxon(by).pvalue)
    assert found["mse"].high < 0 and found["pearson"].low > 0


def test_rows_in_another_order_and_labels_in_another_order_are_matched(tmp_path: Path) -> None:
    first = classified(tmp_path / "a.parquet", 60)
    order = np.random.default_rng(1).permutation(60)
    turned = [3, 1, 0, 2]
    back = np.argsort(turned)
    second = Predictions(
        "single-label",
        tuple(first.labels[i] for i in turned),
        back[first.truth[order]],
        back[first.predicted[order]],
        None,
        first.table.take(order),
    )
    assert (align(first, second) == np.argsort(order)).all()
    found = compare_paired(first, second)
    assert (found.only_first, found.only_second) == (0, 0) and all(d.first == d.second for d in found.differences)


def test_a_text_that_comes_twice_is_matched_once_each(tmp_path: Path) -> None:
    truth, logits = np.array([0, 0, 1]), np.eye(3)
    first = read_predictions(write(tmp_path / "a.parquet", "single-label", truth, logits, ["same", "same", "other"]))
    assert align(first, first).tolist() == [0, 1, 2]
    second = read_predictions(write(tmp_path / "b.parquet", "single-label", truth, logits, ["same", "same", "same"]))
    with pytest.raises(DataError, match="eval rows differ: 3 and 3, 2 of them in both"):
        align(first, second)


def test_models_that_cannot_be_compared_are_refused_with_the_reason(tmp_path: Path) -> None:
    first = classified(tmp_path / "a.parquet", 50)
    with pytest.raises(DataError, match=r"eval rows differ: 50 and 40, \d+ of them in both"):
        compare_paired(first, classified(tmp_path / "b.parquet", 40, seed=1))
    number = read_predictions(write(tmp_path / "c.parquet", "regression", np.ones(3), np.ones((3, 1))))
    with pytest.raises(DataError, match="one run is single-label, the other regression"):
        compare_paired(first, number)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "columns", "label"])
def test_damaged_predictions_are_one_message(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "p.parquet", "single-label", np.array([0, 1]), np.eye(2))
    table = pq.read_table(path)
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "columns":
        pq.write_table(table.drop_columns(["label"]), path)
    else:
        pq.write_table(table.drop_columns(["score: one star"]), path)
    with pytest.raises(DataError, match=r"p\.parquet: "):
        read_predictions(path)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9]) == [0.9] and holm([]) == [] and holm([0.6, 0.7]) == [1.0, 1.0]
