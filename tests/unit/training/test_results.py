"""Warnings about models that learnt nothing, and none about others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.compute.encoders import split_of

from afina.errors import AfinaError
from afina.run.outcome import Outcome
from afina.statistics import decision_rule
from afina.statistics.decision_rule import read_rule, revised
from afina.statistics.predictions import read_predictions
from afina.worker.data.prepared import Split
from afina.worker.inference.classifier import Classifier
from afina.worker.inference.simple_models import simple_models as beside
from afina.worker.task.losses import Loss
from afina.worker.training.results import simple_models_beside
from afina.worker.training.results.export_results import export_results
from afina.worker.training.results.result_checks import check_loss_curve, check_predictions
from afina.worker.training.results.simple_models_beside import simple_models

DRAW = np.random.default_rng(3)
NAMES = ["bad", "good", "so-so"]
SKEWED = np.array([0] * 30 + [1] * 2)


def _one_hot(labels: Any, width: int = 3) -> np.ndarray[Any, Any]:
    return np.eye(width, dtype=np.float32)[labels] * 4


def _warnings(task: str, logits: Any, labels: Any, best: str, **metrics: Any) -> list[str]:
    names = None if task == "regression" else NAMES[: logits.shape[1]]
    return check_predictions(task, names, best, np.asarray(logits, np.float32), np.asarray(labels), metrics)


def test_constant_predictions_and_the_majority_class() -> None:
    constant, worse = _warnings("single-label", _one_hot([0] * 32, 2), SKEWED, "accuracy", accuracy=30 / 32)
    assert constant == "the model predicts 'bad' for every row of eval"
    assert (
        worse
        == "the model is not better than always predicting the majority class 'bad': accuracy 0.9375 against 0.9375"
    )
    noisy = SKEWED.copy()
    noisy[:4] = 1
    (worse,) = _warnings("single-label", _one_hot(noisy, 2), SKEWED, "accuracy", accuracy=28 / 32)
    assert "accuracy 0.875 against 0.9375" in worse
    # By the recipe's own measure it is better: a model that weighs the classes.
    assert _warnings("single-label", _one_hot(noisy, 2), SKEWED, "f1", accuracy=28 / 32, f1=0.7) == []
    assert _warnings("single-label", _one_hot(SKEWED, 2), SKEWED, "accuracy", accuracy=1.0) == []


def test_multi_label_and_regression() -> None:
    flags = (DRAW.random((40, 3)) > 0.7).astype(np.float32)
    constant, worse = _warnings("multi-label", np.full((40, 3), -5.0), flags, "f1", f1=0.0)
    assert (
        constant == "the model predicts no label for every row of eval" and "each label's more frequent value" in worse
    )
    assert _warnings("multi-label", flags * 8 - 4, flags, "f1", f1=1.0) == []
    values = DRAW.normal(size=40).astype(np.float32)
    constant, worse = _warnings("regression", np.full((40, 1), 2.0), values, "mse", mse=5.0)
    assert (
        constant == "the model predicts about 2 for every row of eval" and "predicting the mean of eval: mse " in worse
    )
    assert _warnings("regression", values[:, None], values, "mse", mse=0.0) == []
    assert _warnings("regression", values[:, None], values, "pearson", mse=0.0, pearson=1.0) == []


def test_metrics_that_are_undefined_are_named() -> None:
    undefined = {"pearson": "all labels are equal"}
    zeros, ones = np.zeros((5, 1)), np.ones(5, np.float32)
    found = _warnings("regression", zeros, ones, "pearson", pearson=None, mse=1.0, undefined=undefined)
    assert found[0] == "eval_pearson is not defined: all labels are equal"
    assert found[1].startswith("all rows of eval have the same label")


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([1.6, 1.2, 0.9, 0.5, 0.3, 0.2], False),
        ([1.6] * 30, False),
        ([1.65, 1.6, 1.7, 1.6], False),
        ([9.0, 8.0, 5.0, 4.0, 4.5], True),
        ([1.6, 1.0, 0.3, 0.2, 1.6, 1.7, 1.6], True),
        ([1.6, 2.5, 40.0], True),
        ([4.0], False),
        ([], False),
    ],
)
def test_a_loss_that_diverged(losses: list[float], diverged: bool) -> None:
    split = split_of([3] * 100, 1)
    logged = [{"step": i, "loss": value} for i, value in enumerate(losses)]
    found = check_loss_curve(Loss("single-label"), split, [*logged, {"step": 9, "eval_loss": 1.0}])
    assert bool(found) == diverged and all("lower train.learning_rate" in line for line in found)


def test_a_regression_far_from_0_that_still_falls_did_not_diverge() -> None:
    split = split_of([3] * 50, 1)
    split = Split(split.tokens, split.offsets, (100 + DRAW.normal(size=50)).astype(np.float32))
    assert check_loss_curve(Loss("regression"), split, [{"loss": v} for v in (10_000.0, 9_000.0, 8_000.0)]) == []
    assert check_loss_curve(Loss("regression"), split, [{"loss": v} for v in (10_000.0, 1.0, 90_000.0)]) != []


def test_simple_models_stand_beside_a_run_and_change_nothing_of_it(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build({}, "baselines=true")
    attempt, exported = trainer.attempt, export_results(trainer)
    weights = (attempt.run.model / "model.safetensors").read_bytes()
    found = simple_models(attempt, exported)
    most, tfidf, embedded = found.baselines["eval"]
    assert most["name"].startswith("the majority class") and tfidf["rows"] == len(attempt.data.splits["train"])
    assert embedded["name"].startswith("frozen embeddings") and embedded["rows"] == tfidf["rows"]
    for model in (most, tfidf, embedded):
        assert [d["metric"] for d in model["differences"]] == list(model["scores"])
        value, low, high = model["scores"]["accuracy"]
        assert low <= value <= high and model["differences"][0]["first"] == value
        assert model["differences"][0]["second"] == exported.metrics["eval_accuracy"]
    assert (attempt.run.model / "model.safetensors").read_bytes() == weights and found.metrics == exported.metrics
    first, second = sorted(
        (Path(attempt.plan.site.scratch) / "baselines").iterdir(), key=lambda path: path.stat().st_mtime_ns
    )
    places = str(attempt.run.path), str(attempt.data.folder), attempt.data.model_folder
    for kept, kind, expected in ((first, "tfidf", [most, tfidf]), (second, "embeddings", [embedded])):
        before = kept.stat().st_mtime_ns
        assert beside(*places, kind, 10.0)["eval"] == expected and kept.stat().st_mtime_ns == before
        kept.write_bytes(kept.read_bytes()[:100])  # damaged: made again
        assert beside(*places, kind, 10.0)["eval"][-1]["scores"] == expected[-1]["scores"] and kept.stat().st_size > 100
    # What goes wrong, takes too long or is in the way of a stop leaves the results as they are.
    monkeypatch.setattr(simple_models_beside, "_AROUND_S", 120.0)
    less = simple_models(attempt, exported).baselines["eval"]
    why = {"name": "frozen embeddings", "left_out": "too little time is left", "scores": {}, "differences": []}
    assert [m["name"] for m in less[:2]] == [most["name"], tfidf["name"]] and less[2:] == [why]
    assert "WARNING: no frozen embeddings beside this model: too little time is left" in capsys.readouterr().out
    (attempt.run.path / "predictions.parquet").write_bytes(b"no")
    assert simple_models(attempt, exported) is exported and "cannot be read as predictions" in capsys.readouterr().out
    monkeypatch.setattr(simple_models_beside, "_SIMPLE_S", 0.1)
    assert simple_models(attempt, exported) is exported and "not ready after 0 s" in capsys.readouterr().out
    attempt.run.stop_file.write_text("asked")
    monkeypatch.setattr(simple_models_beside, "_SIMPLE_S", 60.0)
    monkeypatch.setattr("afina.worker.survival.stop._CHECK_EVERY_S", 0.0)
    assert simple_models(attempt, exported) is exported and "a stop was requested" in capsys.readouterr().out
    none = replace(
        attempt,
        plan=attempt.plan.model_copy(update={"recipe": attempt.plan.recipe.model_copy(update={"baselines": False})}),
    )
    assert simple_models(none, exported) is exported and capsys.readouterr().out == ""


def test_fitted_decisions_lie_beside_the_model_and_predictions_use_them(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_rule, "_LEAST_ROWS", 10)
    trainer = build({}, "decisions={}")
    attempt, exported = trainer.attempt, export_results(trainer)
    run, record = attempt.run, exported.decisions
    assert (
        record["measured_on"] == "eval"
        and record["cross_fitted"]
        and record["rows"] == len(attempt.data.splits["eval"])
    )
    assert [d["metric"] for d in record["differences"]] == ["log_loss", "brier"] and len(
        record["calibration_error"]
    ) == 2
    assert (
        Outcome.model_validate_json(
            Outcome(outcome="finished", exit_code=0, attempt="a", decisions=record).model_dump_json()
        ).decisions
        == record
    )
    plain = read_predictions(run.predictions)
    rule = read_rule(run.model, "single-label", plain.labels)
    assert rule is not None and rule.temperature == record["temperature"] != 1 and rule.thresholds == ()
    texts, tokens = plain.table.column("text").to_pylist(), attempt.plan.recipe.tokens
    assert Classifier(run.model, tokens=tokens).as_fitted().predict_proba(texts) == pytest.approx(
        revised(plain, rule).scores, abs=1e-5
    )
    assert Classifier(run.model, tokens=tokens).predict_proba(texts) == pytest.approx(plain.scores, abs=1e-5)
    monkeypatch.setattr(decision_rule, "_LEAST_ROWS", 50)  # there are fewer: nothing is fitted
    nothing = export_results(trainer).decisions
    assert nothing["notes"] == ["no temperature: there are 11 rows, 50 are needed"] and nothing.keys() == {
        "temperature",
        "thresholds",
        "notes",
    }
    assert nothing["temperature"] is None and read_rule(run.model, "single-label", plain.labels) is None
    assert exported.metrics == export_results(build({})).metrics, "the run's metrics are of the model without them"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["decisions={thresholds: f1}"],
            "decisions.thresholds: are for two classes or several labels a row, and there are 5 classes",
        ),
        (["decisions={}", "task=regression", "metrics=null"], "decisions.temperature: does not fit a regression task"),
        (["decisions={temperature: false}"], "decisions.temperature: asks for nothing"),
    ],
)
def test_decisions_that_have_no_meaning_are_refused_before_the_queue(
    build: Callable[..., Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(AfinaError) as refused:
        build({}, *overrides, "data.weight=weight", train=False)
    assert message in refused.value.message.replace("  ", " ") and refused.value.remedy
