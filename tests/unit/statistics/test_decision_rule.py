"""Temperature and thresholds: known ones are recovered, chance is not fitted, and what is stored decides as what was fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afina.errors import InputError
from afina.statistics.calibration import calibrate, confidence, coverage
from afina.statistics.decision_rule import (
    FILE,
    NO_RULE,
    DecisionRule,
    cross_fitted,
    described,
    effects,
    fit_rule,
    probabilities,
    read_rule,
    revised,
)
from afina.statistics.predictions import Predictions
from afina.version import __version__

Array = np.ndarray[Any, Any]
LABELS = ("a", "b", "c", "d")


def _rows(task: str, count: int, times: float, seed: int, width: int = 4) -> tuple[Array, Array]:
    """Logits that are `times` the calibrated ones, float32, and labels drawn from the calibrated probabilities."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(count, width)) * 2 - (1.0 if task == "multi-label" else 0.0)
    likely, chance = probabilities(task, logits), draw.random((count, width))
    truth = (likely > chance) if task == "multi-label" else (likely.cumsum(1) > chance[:, :1]).argmax(1)
    return (logits * times).astype(np.float32), truth.astype(np.int64)


def _predictions(task: str, logits: Array, truth: Array, rule: DecisionRule = NO_RULE) -> Predictions:
    several = task == "multi-label"
    shifted = rule.shifted(logits)
    decided = shifted > 0 if several else shifted.argmax(-1)
    labels = LABELS[: logits.shape[1]]
    scores = probabilities(task, rule.scaled(logits)).astype(np.float64)
    return Predictions(task, labels, truth > 0 if several else truth, decided, scores, None)


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
@pytest.mark.parametrize("times", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_recovered_and_repairs_other_rows(task: str, times: float) -> None:
    rule = fit_rule(task, LABELS, *_rows(task, 4000, times, 1), temperature=True, thresholds=False)
    assert rule.temperature == pytest.approx(times, rel=0.07) and rule.thresholds == () and rule.notes == ()
    logits, truth = _rows(task, 4000, times, 2)
    plain, ruled = _predictions(task, logits, truth), _predictions(task, logits, truth, rule)
    assert (plain.predicted == ruled.predicted).all(), "a temperature decides nothing"
    record = effects(plain, ruled, [], temperature=True)
    before, after = record["calibration_error"]
    assert after < 0.03 and (times == 1 or before > 0.05)
    loss, brier = record["differences"]
    assert (loss["metric"], brier["metric"]) == ("log_loss", "brier")
    assert loss["high"] < 0 if times != 1 else abs(loss["second"] - loss["first"]) < 0.002
    json.dumps(record, allow_nan=False)


def test_rows_that_are_all_right_or_few_have_no_absurd_temperature() -> None:
    truth = np.arange(100) % 4
    right = np.eye(4, dtype=np.float32)[truth] * 4
    rule = fit_rule("single-label", LABELS, right, truth, temperature=True, thresholds=False)
    sure = probabilities("single-label", rule.scaled(right)).max(1)
    assert sure == pytest.approx(1 - 1 / 102, abs=1e-3), "as if one row of 102 were wrong"
    few = fit_rule("single-label", LABELS, right[:49], truth[:49], temperature=True, thresholds=False)
    assert few.temperature == 1 and few.notes == ("no temperature: there are 49 rows, 50 are needed",)


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_known_thresholds_are_recovered_and_are_better_on_other_rows(task: str) -> None:
    """The label applies where its logit is above 1, with a fifth of the rows mixed up at random: by symmetry that is the best threshold."""

    def rows(seed: int) -> tuple[Array, Array]:
        draw = np.random.default_rng(seed)
        margin = draw.uniform(-3, 5, 4000).astype(np.float32)
        has = (margin > 1) ^ (draw.random(4000) < 0.1)
        if task == "multi-label":
            return np.stack([margin, -margin], 1), np.stack([has, margin < 0], 1).astype(np.int64)
        return np.stack([np.zeros(4000, np.float32), margin], 1), has.astype(np.int64)

    logits, truth = rows(1)
    rule = fit_rule(task, LABELS[:2], logits, truth, temperature=False, thresholds=True)
    named = rule.named_thresholds(LABELS[:2])
    label = "a" if task == "multi-label" else "b"
    assert named[label] == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.02)
    if task == "multi-label":
        assert named["b"] == 0.5 and rule.notes == (
            "b: the threshold is 0.5: no other is better on rows that it was not chosen on",
        )
    logits, truth = rows(2)
    plain, ruled = _predictions(task, logits, truth), _predictions(task, logits, truth, rule)
    (f1,) = effects(plain, ruled, ["f1"], temperature=False)["differences"]
    assert f1["low"] > 0
    text = described({"temperature": None, "thresholds": named, "measured_on": "test", "differences": [f1]})
    assert len(text) == 1 and text[0].startswith("Thresholds that maximise F1, fitted on eval; on test: f1 0.")


def test_the_threshold_is_the_best_of_all() -> None:
    """Against every threshold there is, with ties, for one F1 and for the mean of both."""
    from sklearn.metrics import f1_score

    from afina.statistics.decision_rule import _cut, _f1

    for seed in range(10):
        draw = np.random.default_rng(seed)
        margin, has = draw.normal(size=60).round(1), draw.random(60) < 0.3
        margin = margin + has
        for both in (False, True):
            cut = _cut(margin, has, np.argsort(-margin, kind="stable"), both)
            scores = [_f1(margin > at, has, both) for at in [-99.0, *np.unique(margin)]]
            assert _f1(margin > cut, has, both) == pytest.approx(max(scores))
            wanted = f1_score(has, margin > cut, average="macro" if both else "binary") * (2 if both else 1)
            assert _f1(margin > cut, has, both) == pytest.approx(wanted)


def test_chance_is_not_fitted() -> None:
    """Labels without any relation to the logits, and labels of few rows: thresholds stay, or cost little."""
    gained: list[float] = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        logits = draw.normal(size=(300, 2)).astype(np.float32)
        truth = np.stack([draw.random(300) < 0.5, np.arange(300) % 40 == 0], 1).astype(np.int64)
        rule = fit_rule("multi-label", LABELS[:2], logits, truth, temperature=False, thresholds=True)
        assert rule.named_thresholds(LABELS[:2]).get("b", 0.5) == 0.5
        assert "b: the threshold is 0.5: 8 rows have it, 10 are needed" in rule.notes
        _, shifted = cross_fitted("multi-label", LABELS[:2], logits, truth, temperature=False, thresholds=True)
        decided = Predictions("multi-label", LABELS[:2], truth > 0, shifted > 0, None, None)
        assert (shifted[:, 1] == logits[:, 1]).all()
        gained.append(float((decided.predicted[:, 0] == decided.truth[:, 0]).mean()))
    assert 0.45 < np.mean(gained) < 0.55, "half right: nothing of a row's own label is in what decides it"


def test_what_barely_is_enough_for_a_rule_is_enough_for_its_parts() -> None:
    """With the least rows, and the least rows of a label, what is measured is not the model without a rule."""
    draw = np.random.default_rng(0)
    logits, truth = _rows("single-label", 50, 4.0, 1, 4)
    rule = fit_rule("single-label", LABELS[:4], logits, truth, temperature=True, thresholds=False)
    scaled, _ = cross_fitted("single-label", LABELS[:4], logits, truth, temperature=True, thresholds=False)
    ratio = logits[:, 0] / scaled[:, 0]
    assert rule.temperature > 1.5 and rule.changes and (ratio > 1.5).all()
    few = fit_rule("single-label", LABELS[:4], logits[:49], truth[:49], temperature=True, thresholds=False)
    assert not few.changes and few.notes == ("no temperature: there are 49 rows, 50 are needed",)
    same = fit_rule("single-label", LABELS[:4], logits, np.zeros(50, np.int64), temperature=True, thresholds=False)
    assert not same.changes and same.notes == ("no temperature: all rows have the same label",)
    truth = np.repeat([0, 1], [190, 10])
    margin = draw.normal(size=200) * 0.1 + 4 * truth - 6
    logits = np.stack([np.zeros(200), margin], 1)
    _, shifted = cross_fitted("single-label", LABELS[:2], logits, truth, temperature=False, thresholds=True)
    assert ((shifted[:, 1] - shifted[:, 0] > 0) == truth).all(), "each fifth by a threshold from the others"


def test_what_is_stored_decides_as_what_was_fitted(tmp_path: Path) -> None:
    for task, width in (("single-label", 2), ("multi-label", 4), ("single-label", 4)):
        logits, truth = _rows(task, 600, 2.0, 3, width)
        labels = LABELS[:width]
        rule = fit_rule(task, labels, logits, truth, temperature=True, thresholds=width == 2 or task == "multi-label")
        (tmp_path / FILE).write_text(rule.to_json(task, labels, __version__))
        again = read_rule(tmp_path, task, labels)
        assert again == DecisionRule(rule.temperature, rule.thresholds) and (again.thresholds or task == "single-label")
        wanted = _predictions(task, logits, truth, again)
        stored = _predictions(task, logits, truth)
        found = revised(stored, again)
        assert (found.predicted == wanted.predicted).all()
        assert found.scores == pytest.approx(wanted.scores, abs=1e-4)
        before, after = calibrate(stored), calibrate(found)
        assert before is not None and after is not None and after.brier < before.brier


def test_a_file_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert read_rule(tmp_path, "single-label", LABELS) is None
    (tmp_path / FILE).write_text(DecisionRule(2.0).to_json("single-label", LABELS, __version__))
    with pytest.raises(InputError, match="with other labels") as caught:
        read_rule(tmp_path, "single-label", LABELS[::-1])
    assert "--plain" in caught.value.remedy
    whole = (tmp_path / FILE).read_text()
    for damaged in (whole[:40], whole.replace("2.0", "0"), whole.replace('"thresholds": {}', '"thresholds": {"d": 1}')):
        (tmp_path / FILE).write_text(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            read_rule(tmp_path, "single-label", LABELS)


def test_accuracy_by_the_share_that_is_answered() -> None:
    """Half of the rows sure and right, half unsure and half of them right: known by hand."""
    sure = np.array([0.9] * 50 + [0.6] * 50)
    scores = np.stack([1 - sure, sure], 1)
    truth = np.array([1] * 75 + [0] * 25)
    how = coverage(Predictions("single-label", ("a", "b"), truth, np.ones(100, np.int64), scores, None), "f1")
    assert how is not None and how.metrics == ("accuracy", "f1")
    shares = [(share, rows, least, values[0]) for share, rows, least, values, *_ in how.table]
    assert shares == [(0.5, 50, 0.9, 1.0), *[(1.0, 100, 0.6, 0.75)] * 4], (
        "rows that are equally sure are answered together"
    )
    assert how.curve[0][1] == (1.0, 1.0), "a class that no answered row has does not count against F1"
    assert how.area == pytest.approx((50 * 1 + 50 * 0.75) / 100)


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_coverage_against_scikit_learn_on_the_surest_rows(task: str) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    logits, truth = _rows(task, 300, 1.5, 5)
    rows = _predictions(task, logits, truth)
    sure = rows.scores.max(1) if task == "single-label" else np.maximum(rows.scores, 1 - rows.scores).min(1)
    assert confidence(task, rows.scores, rows.predicted) == pytest.approx(sure)
    order, how = np.argsort(-sure), coverage(rows, "f1")
    assert how is not None and [entry[1] for entry in how.table] == [150, 240, 270, 285, 300]
    for _, count, least, (first, f1), low, high in how.table:
        best = order[:count]
        assert least == pytest.approx(sure[best].min()) and low <= first <= high
        assert first == pytest.approx(accuracy_score(rows.truth[best], rows.predicted[best]))
        assert f1 == pytest.approx(f1_score(rows.truth[best], rows.predicted[best], average="macro"))
    assert how.area > how.table[-1][3][0], "the surest rows are more often right"
