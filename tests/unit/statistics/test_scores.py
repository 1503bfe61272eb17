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
from sklearn import metrics
from sklearn.calibration import calibration_curve

from afina.errors import DataError
from afina.recipe.metrics import METRICS
from afina.statistics.calibration import calibrate
from afina.statistics.measures import one_vs_rest, threshold_curves
from afina.statistics.paired import compare_paired, holm
from afina.statistics.predictions import Predictions, align, read_predictions
from afina.statistics.scores import mistakes, score

LABELS = ("one star", 'tw,o "stars"', "three", "four, never right")
Array = Any


def write(path: Path, task: str, truth: Array, logits: Array, texts: list[str] | None = None) -> Path:
    """A file as `afina.worker.training.results.write_predictions` writes it."""
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


def answers(found: Predictions) -> dict[str, float]:
    """Every score of a report, by scikit-learn and SciPy."""
    truth, predicted, scores = found.truth, found.predicted, found.scores
    if scores is None:
        return {
            "mse": metrics.mean_squared_error(truth, predicted),
            "mae": metrics.mean_absolute_error(truth, predicted),
            "rmse": metrics.root_mean_squared_error(truth, predicted),
            "r2": metrics.r2_score(truth, predicted),
            "pearson": stats.pearsonr(truth, predicted)[0],
            "spearman": stats.spearmanr(truth, predicted)[0],
        }
    known: dict[str, float] = {}
    for average, suffix in (("macro", ""), ("micro", "_micro"), ("weighted", "_weighted")):
        seen = np.flatnonzero(truth.any(0) | predicted.any(0)) if truth.ndim > 1 else None
        each = metrics.precision_recall_fscore_support(truth, predicted, average=average, labels=seen, zero_division=0)
        known |= {f"{name}{suffix}": each[i] for i, name in enumerate(("precision", "recall", "f1"))}
    flags = truth if truth.ndim > 1 else np.eye(scores.shape[1], dtype=bool)[truth]
    seen = [k for k in range(flags.shape[1]) if 0 < flags[:, k].sum() < len(flags)]
    known["auroc"] = np.mean([metrics.roc_auc_score(flags[:, k], scores[:, k]) for k in seen])
    known["average_precision"] = np.mean([metrics.average_precision_score(flags[:, k], scores[:, k]) for k in seen])
    if truth.ndim > 1:
        known["subset_accuracy"] = metrics.accuracy_score(truth, predicted)
        known["log_loss"] = np.mean([metrics.log_loss(flags[:, k], scores[:, k]) for k in seen])
        known["brier"] = np.mean([metrics.brier_score_loss(flags[:, k], scores[:, k]) for k in seen])
        return known
    return known | {
        "accuracy": metrics.accuracy_score(truth, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, predicted),
        "mcc": metrics.matthews_corrcoef(truth, predicted),
        "kappa": metrics.cohen_kappa_score(truth, predicted),
        "kappa_quadratic": metrics.cohen_kappa_score(truth, predicted, weights="quadratic", labels=range(4)),
        "log_loss": metrics.log_loss(truth, scores / scores.sum(1, keepdims=True), labels=range(4)),
        "brier": ((scores - np.eye(4)[truth]) ** 2).sum(1).mean(),
    }


def several(path: Path, size: int = 300) -> Predictions:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, (size, 3))
    truth[:5] = 0
    return read_predictions(write(path, "multi-label", truth, rng.normal(size=(size, 3)) + 2 * truth - 1))


def measured(path: Path, noise: float = 1.0) -> Predictions:
    rng = np.random.default_rng(4)
    truth = rng.normal(size=200)
    return read_predictions(write(path, "regression", truth, (truth + noise * rng.normal(size=200))[:, None]))


MADE = {"single-label": classified, "multi-label": several, "regression": measured}


@pytest.mark.parametrize("task", MADE)  # those of entities: test_entities.py
def test_every_score_is_that_of_scikit_learn_or_scipy(task: str, tmp_path: Path) -> None:
    found = MADE[task](tmp_path / "p.parquet")
    scores, known = score(found, 200), answers(found)
    assert scores.overall.keys() == known.keys() == set(METRICS[task]) - {"confusion_matrix"}
    for name, interval in scores.overall.items():
        assert interval.value == pytest.approx(known[name], rel=1e-5), name
        assert interval.low < interval.value < interval.high, name


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_scores_of_each_class_and_their_intervals(task: str, tmp_path: Path) -> None:
    found = MADE[task](tmp_path / "p.parquet")
    width = len(found.labels)
    scores = score(found, 200)
    args = {"labels": range(width), "average": None}
    each = metrics.precision_recall_fscore_support(found.truth, found.predicted, zero_division=np.nan, **args)
    truth, predicted = (np.eye(width)[v] if v.ndim == 1 else v.astype(float) for v in (found.truth, found.predicted))
    hits, chosen, actual = (truth * predicted).sum(0), predicted.sum(0), truth.sum(0)
    assert scores.support == actual.tolist()
    for name, values, rows in zip(("precision", "recall"), each, (chosen, actual), strict=False):
        for k, interval in enumerate(scores.per_class[name]):
            if not rows[k]:
                assert interval is None and np.isnan(values[k]), "not defined, not 0"
                continue
            assert interval is not None and interval.value == pytest.approx(values[k])
            share = stats.binomtest(int(hits[k]), int(rows[k])).proportion_ci(method="wilsoncc")
            assert (interval.low, interval.high) == (pytest.approx(share.low), pytest.approx(share.high))
    f1 = [np.nan if one is None else one.value for one in scores.per_class["f1"]]
    assert f1 == pytest.approx(each[2], nan_ok=True)
    assert scores.absent == ([LABELS[3]] if task == "single-label" else [])


@pytest.mark.parametrize(("rows", "right"), [(80, 80), (4, 4), (30, 0), (25, 0), (2, 1)])
def test_no_interval_collapses_where_every_row_is_right_or_wrong(rows: int, right: int) -> None:
    truth = np.arange(rows) % 2
    predicted = np.where(np.arange(rows) < right, truth, 1 - truth)
    found = score(Predictions("single-label", LABELS[:3], truth, predicted, None, None), 400)
    share = stats.binomtest(right, rows).proportion_ci(method="wilsoncc")
    accuracy = found.overall["accuracy"]
    assert (accuracy.low, accuracy.high) == (pytest.approx(share.low), pytest.approx(share.high))
    for name in ("f1", "precision", "recall", "balanced_accuracy", "mcc", "kappa", "f1_weighted", "kappa_quadratic"):
        interval = found.overall[name]
        assert interval.high - interval.low > 0.02 and interval.low <= interval.value <= interval.high, name
    assert found.overall["f1"].value == right / rows or rows == 2
    assert found.absent == ["three"], "the absent class is named, not counted as 0"


@pytest.mark.parametrize(
    ("positive", "negative", "right"), [(1, 1, 1), (4, 30, 1), (50, 50, 1), (4, 30, 0), (9, 9, 0.5)]
)
def test_the_interval_of_an_area_ends_where_the_area_is_196_standard_errors_away(
    positive: int, negative: int, right: float
) -> None:
    """Also of a perfect one. The standard error is Hanley and McNeil's with Newcombe's mean of both numbers of rows."""
    truth = np.repeat([1, 0], [positive, negative])
    value = {1: truth * 1.0, 0: 1.0 - truth, 0.5: np.full(len(truth), 0.5)}[right]
    scores = np.stack([1 - value, value], axis=1)
    interval = score(Predictions("single-label", LABELS[:2], truth, scores.argmax(1), scores, None), 100).overall[
        "auroc"
    ]
    assert interval.value == right
    half = (positive + negative) / 2 - 1
    for limit, end in ((interval.low, 0), (interval.high, 1)):
        if right == end:
            assert limit == end
            continue
        q1, q2 = limit / (2 - limit), 2 * limit**2 / (1 + limit)
        variance = (limit * (1 - limit) + half * (q1 - limit**2) + half * (q2 - limit**2)) / (positive * negative)
        assert abs(limit - right) / variance**0.5 == pytest.approx(stats.norm.ppf(0.975), rel=1e-6)


def test_what_is_not_defined_has_a_reason_and_no_interval(tmp_path: Path) -> None:
    flat = score(read_predictions(write(tmp_path / "f.parquet", "regression", np.ones(5), np.ones((5, 1)))))
    assert all(math.isnan(getattr(flat.overall["pearson"], key)) for key in ("value", "low", "high"))
    assert flat.undefined.keys() == {"pearson", "spearman", "r2"} and "all the same" in flat.undefined["pearson"]
    one = classified(tmp_path / "p.parquet", 30)
    same = Predictions("single-label", one.labels, np.zeros(30, int), np.zeros(30, int), one.scores, one.table)
    assert score(same, 200).undefined.keys() == {"auroc", "kappa", "kappa_quadratic"}


def test_an_interval_has_the_width_of_theory_and_is_reproducible(tmp_path: Path) -> None:
    found = classified(tmp_path / "p.parquet", 1000)
    first, again = score(found), score(found)
    assert first == again
    accuracy = first.overall["accuracy"]
    deviation = math.sqrt(accuracy.value * (1 - accuracy.value) / 1000)
    assert accuracy.high - accuracy.low == pytest.approx(2 * 1.96 * deviation + 1 / 1000, rel=0.02)
    assert accuracy.low < accuracy.value < accuracy.high


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_curves_over_thresholds_are_those_of_scikit_learn(task: str, tmp_path: Path) -> None:
    found = MADE[task](tmp_path / "p.parquet")
    for flags, column in one_vs_rest(task, found.truth, np.round(found.scores, 2)):  # with ties
        if 0 < flags.sum() < len(flags):
            wrong, right, precision = threshold_curves(flags, column)
            known = metrics.roc_curve(flags, column, drop_intermediate=False)
            assert wrong == pytest.approx(known[0][1:]) and right == pytest.approx(known[1][1:])
            known = metrics.precision_recall_curve(flags, column)
            assert precision[::-1] == pytest.approx(known[0][:-1]) and right[::-1] == pytest.approx(known[1][:-1])


@pytest.mark.parametrize("task", MADE)
def test_the_simplest_model_has_the_scores_of_a_dummy(task: str, tmp_path: Path) -> None:
    """Of scikit-learn's dummies, and of the shares of the labels."""
    found = MADE[task](tmp_path / "p.parquet")
    truth, always = found.truth, score(found, 200).always
    if task == "regression":
        dummy = np.full(len(truth), truth.mean())
        assert always["mse"] == pytest.approx(metrics.mean_squared_error(truth, dummy)) and always[
            "r2"
        ] == pytest.approx(0)
    elif task == "single-label":
        dummy = np.full(len(truth), np.bincount(truth).argmax())
        assert always["accuracy"] == pytest.approx(metrics.accuracy_score(truth, dummy))
        assert always["f1"] == pytest.approx(metrics.f1_score(truth, dummy, average="macro", zero_division=0))
        assert always["auroc"] == pytest.approx(0.5)
    else:
        dummy = np.tile(truth.mean(0) > 0.5, (len(truth), 1))
        assert always["f1_micro"] == pytest.approx(metrics.f1_score(truth, dummy, average="micro", zero_division=0))


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_calibration_is_that_of_scikit_learns_curve(task: str, tmp_path: Path) -> None:
    """Bins, shares, counts and the expected calibration error, from `calibration_curve` and NumPy's histogram."""
    found = MADE[task](tmp_path / "p.parquet")
    assert found.scores is not None
    sure, right = found.scores.ravel(), found.truth.ravel()
    if task == "single-label":
        sure, right = found.scores.max(axis=1), found.truth == found.predicted
    shares, means = calibration_curve(right, sure, n_bins=15, strategy="uniform")
    counts = np.histogram(sure, 15, (0, 1))[0]
    how = calibrate(found)
    assert how is not None and [row[2] for row in how.bins] == counts[counts > 0].tolist()
    assert [row[3:5] for row in how.bins] == [pytest.approx(pair) for pair in zip(means, shares, strict=True)]
    assert how.error == pytest.approx((counts[counts > 0] * abs(shares - means)).sum() / len(sure))
    assert how.brier == pytest.approx(answers(found)["brier"], rel=1e-6)
    for _, _, count, _, share, low, high in how.bins:
        ends = stats.binomtest(round(share * count), count).proportion_ci(method="wilsoncc")
        assert (low, high) == (pytest.approx(ends.low), pytest.approx(ends.high))


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
    assert boasting.brier == pytest.approx(truth.mean())


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
    assert all(d.p == 1.0 and d.low <= 0 <= d.high and d.first == d.second for d in same.differences)


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


@pytest.mark.parametrize("task", MADE)
def test_both_scores_of_a_comparison_are_those_of_the_reports(task: str, tmp_path: Path) -> None:
    """And the differences are tested as the tables say: by SciPy's tests where there is one."""
    changes: Any = {"single-label": {"noise": 1}, "multi-label": {}, "regression": {"noise": 0.2}}[task]
    first, second = MADE[task](tmp_path / "a.parquet"), MADE[task](tmp_path / "b.parquet", **changes)
    known = [answers(found) for found in (first, second)]
    found = {d.metric: d for d in compare_paired(first, second, 300, METRICS[task]).differences}
    assert found.keys() == set(METRICS[task]) - {"confusion_matrix"}
    for name, d in found.items():
        assert (d.first, d.second) == (
            pytest.approx(known[0][name], rel=1e-5),
            pytest.approx(known[1][name], rel=1e-5),
        ), name
        assert d.low <= d.second - d.first <= d.high and 0 < d.p <= 1
    if task == "regression":
        by = abs(second.predicted - second.truth) - abs(first.predicted - first.truth)
        assert found["mae"].test == "Wilcoxon" and found["mae"].p == pytest.approx(stats.wilcoxon(by).pvalue)
        squares = (second.predicted - second.truth) ** 2 - (first.predicted - first.truth) ** 2
        limits = stats.ttest_1samp(squares, 0).confidence_interval()
        assert (found["mse"].low, found["mse"].high) == (pytest.approx(limits.low), pytest.approx(limits.high))
        assert found["mse"].high < 0 and found["pearson"].low > 0 and found["spearman"].low > 0


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


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_lists_of_either_kind_are_read_as_a_run_wrote_them(tmp_path: Path, kind: Any) -> None:
    first = several(tmp_path / "a.parquet")
    written = pq.read_table(tmp_path / "a.parquet")
    labels, spans = kind(pa.string()), kind(pa.struct({"start": pa.int32(), "end": pa.int32(), "label": pa.string()}))
    changed = pa.table(
        {
            name: written[name].cast(labels) if name in ("label", "prediction") else written[name]
            for name in written.column_names
        }
    )
    pq.write_table(changed, tmp_path / "b.parquet")
    first, second = (read_predictions(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert (
        second.task == "multi-label"
        and (first.truth == second.truth).all()
        and (first.predicted == second.predicted).all()
    )
    entity = {"start": 0, "end": 3, "label": "PER"}
    columns = {"label": pa.array([[entity], []], spans), "prediction": pa.array([[entity], [entity]], spans)}
    pq.write_table(pa.table({"row": [1, 2], **columns}), tmp_path / "c.parquet")
    found = read_predictions(tmp_path / "c.parquet")
    assert found.task == "token-classification" and found.truth.sum() == 2 and found.predicted.sum() == 3


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
