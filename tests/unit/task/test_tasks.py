"""The built-in metrics through `evaluate`, against scikit-learn and SciPy; metrics of one's own."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from afina.errors import RecipeError
from afina.recipe.metrics import METRICS, lower_is_better
from afina.statistics.decision_rule import probabilities
from afina.statistics.measures import compute
from afina.worker.task.own_metrics import check_metrics
from afina.worker.task.scoring import compute_metrics
from afina.worker.task.tasks import decisions

Array = np.ndarray[Any, Any]


#: Names of our metrics -> scikit-learn's answer for (labels, predictions, probabilities, classes that occur, all classes).
def _sklearn(task: str, labels: Array, predictions: Array, scores: Array, width: int) -> dict[str, Any]:
    single = task == "single-label"
    chosen = predictions if single else predictions.max(0) * np.arange(1, width + 1) - 1
    truth = labels if single else labels.max(0) * np.arange(1, width + 1) - 1
    seen = sorted((set(chosen.tolist()) | set(truth.tolist())) - {-1})
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for average, suffix in (("macro", ""), ("micro", "_micro"), ("weighted", "_weighted")):
            each = metrics.precision_recall_fscore_support(
                labels, predictions, labels=seen, average=average, zero_division=0
            )
            found |= {f"{name}{suffix}": each[i] for i, name in enumerate(("precision", "recall", "f1"))}
        each = metrics.precision_recall_fscore_support(
            labels, predictions, labels=range(width), average=None, zero_division=np.nan
        )
        found |= {f"{name}_per_class": each[i] for i, name in enumerate(("precision", "recall", "f1"))}
        if single:
            found["accuracy"] = metrics.accuracy_score(labels, predictions)
            found["balanced_accuracy"] = metrics.balanced_accuracy_score(labels, predictions)
            found["mcc"] = metrics.matthews_corrcoef(labels, predictions)
            found["kappa"] = metrics.cohen_kappa_score(labels, predictions, labels=range(width))
            found["kappa_quadratic"] = metrics.cohen_kappa_score(
                labels, predictions, labels=range(width), weights="quadratic"
            )
            found["confusion_matrix"] = metrics.confusion_matrix(labels, predictions, labels=range(width))
            found["log_loss"] = metrics.log_loss(labels, scores, labels=range(width))
            two = (labels, scores[:, 1]) if width == 2 else (np.eye(width)[labels], scores)
            found["brier"] = metrics.brier_score_loss(*two) if width == 2 else ((two[1] - two[0]) ** 2).sum(1).mean()
            columns = [(labels == k, scores[:, k]) for k in ([1] if width == 2 else range(width))]
        else:
            found["subset_accuracy"] = metrics.accuracy_score(labels, predictions)
            found["log_loss"] = np.mean(
                [metrics.log_loss(labels[:, k], scores[:, k], labels=[0, 1]) for k in range(width)]
            )
            found["brier"] = np.mean(
                [metrics.brier_score_loss(labels[:, k], scores[:, k], pos_label=1) for k in range(width)]
            )
            columns = [(labels[:, k] == 1, scores[:, k]) for k in range(width)]
        areas = [metrics.roc_auc_score(*pair) for pair in columns if 0 < pair[0].sum() < len(labels)]
        found["auroc"] = np.mean(areas) if areas else None
        precisions = [metrics.average_precision_score(*pair) for pair in columns if pair[0].any()]
        found["average_precision"] = np.mean(precisions) if precisions else None
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_metrics_equal_those_of_scikit_learn(task: str, seed: int) -> None:
    """Few rows, so that classes are missing; all rows right; a model that always predicts the same."""
    draw = np.random.default_rng(seed)
    count, width = int(draw.integers(1, 300 if seed % 3 else 8)), int(draw.integers(2, 9))
    logits = draw.normal(size=(count, width)).astype(np.float32).round(1)  # ties
    if seed % 4 == 1:
        logits[:, 0] = 9 if task == "single-label" else -9
    predictions = decisions(task, logits).astype(np.int64)
    labels = (
        draw.integers(0, width, count) if task == "single-label" else (draw.random((count, width)) > 0.7).astype(int)
    )
    if seed % 4 == 2:
        labels = predictions.copy()
    scores = probabilities(task, logits.astype(np.float64))
    found = compute_metrics(task, METRICS[task], decisions(task, logits), labels, width, scores)
    expected, undefined = _sklearn(task, labels, predictions, scores, width), found.pop("undefined", {})
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if isinstance(value, list):
            flat = np.array(value, float)
            assert flat == pytest.approx(np.array(expected[name], float), nan_ok=True), name
        elif value is None:
            assert expected[name] is None or np.isnan(expected[name]), name
            assert undefined[name]
        else:
            assert value == pytest.approx(expected[name], abs=1e-12), (seed, name)


def test_regression_metrics_equal_those_of_scikit_learn_and_scipy() -> None:
    draw = np.random.default_rng(3)
    for offset in (0.0, 1e6):
        labels = draw.normal(size=77).round(1) + offset
        values = labels + draw.normal(size=77)
        found = compute_metrics("regression", METRICS["regression"], values, labels, 1)
        assert found == {
            "mse": pytest.approx(metrics.mean_squared_error(labels, values)),
            "mae": pytest.approx(metrics.mean_absolute_error(labels, values)),
            "rmse": pytest.approx(metrics.root_mean_squared_error(labels, values)),
            "r2": pytest.approx(metrics.r2_score(labels, values)),
            "pearson": pytest.approx(stats.pearsonr(labels, values)[0]),
            "spearman": pytest.approx(stats.spearmanr(labels, values)[0]),
        }


@pytest.mark.parametrize(
    ("task", "names", "labels", "predictions", "undefined"),
    [
        ("regression", ["pearson", "spearman", "r2", "mae"], np.full(5, 2.5), np.arange(5.0), {"pearson", "spearman", "r2"}),
        ("regression", ["pearson", "r2"], np.arange(5.0), np.full(5, 0.1), {"pearson"}),
        ("regression", ["pearson", "r2"], np.ones(1), np.ones(1), {"pearson", "r2"}),
        ("single-label", ["auroc", "average_precision", "kappa", "f1"], np.zeros(4, int), np.zeros(4, int), {"auroc", "average_precision", "kappa"}),
        ("multi-label", ["auroc", "average_precision", "f1"], np.zeros((4, 2), int), np.zeros((4, 2), int), {"auroc", "average_precision", "f1"}),
        ("single-label", ["accuracy", "f1"], np.zeros(0, int), np.zeros(0, int), {"accuracy", "f1"}),
    ],
)  # fmt: skip
def test_a_metric_that_is_not_defined_is_none_with_a_reason(
    task: str, names: list[str], labels: Array, predictions: Array, undefined: set[str]
) -> None:
    scores = np.tile([0.8, 0.2], (len(labels), 1))
    values, reasons = compute(task, names, labels, predictions, scores, 2)
    assert {name for name in names if values[name] is None} == undefined == reasons.keys() and all(reasons.values())


def test_a_class_that_occurs_nowhere_is_left_out_of_the_averages() -> None:
    """Perfect predictions are perfect, whatever classes the data lacks."""
    truth = np.array([0, 1, 1, 0])
    values, _ = compute("single-label", ["f1", "precision", "recall", "balanced_accuracy"], truth, truth, None, 3)
    assert [values[name] for name in ("f1", "precision", "recall", "balanced_accuracy")] == [1.0] * 4
    assert values["precision_per_class"] == [1.0, 1.0, None]
    values, _ = compute("single-label", ["precision"], truth, np.zeros(4, int), None, 3)
    assert values["precision"] == 0.25 and values["precision_per_class"] == [0.5, None, None]


def test_large_counts_do_not_overflow() -> None:
    """A hundred thousand rows and more, as int8 and int32: squares of counts are beyond 32 bits."""
    count = 200_000
    labels = np.arange(count) % 2
    logits = np.stack([labels == 0, labels == 1], -1).astype(np.float32)
    found = compute_metrics("single-label", ["mcc", "accuracy"], decisions("single-label", logits), labels, 2)
    assert found == {"mcc": pytest.approx(1.0), "accuracy": 1.0}
    both = np.ones((count, 2), np.float32)
    found = compute_metrics("multi-label", ["f1", "f1_micro"], decisions("multi-label", both), both, 2)
    assert found["f1"] == found["f1_micro"] == 1.0


@pytest.mark.parametrize("task", [task for task in METRICS if task != "token-classification"])
def test_each_metric_is_better_in_the_direction_that_is_named(task: str) -> None:
    labels = np.array(
        {"single-label": [0, 1, 0, 1], "multi-label": [[0, 1], [1, 0]] * 2}.get(task, [0.0, 1.0, 2.0, 4.0])
    )
    wrong = labels[::-1].copy() if task == "regression" else 1 - labels
    names = [name for name in METRICS[task] if name != "confusion_matrix"]
    best, worst = (
        compute_metrics(task, names, decided, labels, 2, np.eye(2)[decided] if task == "single-label" else decided)
        for decided in (labels, wrong)
    )
    for name in names:
        assert (best[name] < worst[name]) == lower_is_better(f"eval_{name}"), name
        assert best[name] != worst[name]


CODE = """
import random

import numpy as np
import torch

def cost(labels, predictions):
    return np.mean(labels != predictions) * 10

def sure(labels, predictions, scores):
    return scores.max(axis=1).mean()

def none(labels, predictions):
    return None

def wrong(labels, predictions):
    raise ValueError("no such thing")

def text(labels, predictions, *, scores=None):
    return "good"

def rude(labels, predictions, scores):
    np.random.seed(0), random.seed(0), torch.manual_seed(0)
    for array in (labels, predictions, scores):
        array[:] = 0
    return 0.5

def gone(labels, predictions):
    raise SystemExit(3)

def picky(labels, predictions):
    return 1 / (labels == 2).sum().item()
"""


def test_a_metric_of_ones_own_is_computed_and_one_that_fails_stops_nothing() -> None:
    names = [
        "accuracy", "mine:cost:lower", "mine:sure", "mine:none", "mine:picky", "sklearn.metrics:hamming_loss:lower",
    ]  # fmt: skip
    labels, predictions = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    found = compute_metrics("single-label", names, predictions, labels, 2, scores, {"mine": CODE})
    undefined = found.pop("undefined")
    assert found == {"accuracy": 0.75, "cost": 2.5, "sure": 0.75, "none": None, "picky": None, "hamming_loss": 0.25}
    assert undefined.keys() == {"none", "picky"} and "ZeroDivisionError" in undefined["picky"]
    assert lower_is_better("eval_cost", names) and not lower_is_better("eval_sure", names)


def test_a_metric_of_ones_own_changes_neither_what_others_see_nor_the_training() -> None:
    """It may write into its arrays and seed every generator; it may even end the process."""
    import random

    import torch

    labels, scores = np.array([0.5, 1.5, 2.5]), np.array([0.4, 1.4, 2.9])
    states = repr(random.getstate()), repr(np.random.get_state()), torch.random.get_rng_state().tolist()
    names = ["mine:rude", "mine:gone", "mae", "mine:cost:lower"]
    found = compute_metrics("regression", names, scores, labels, 1, scores, {"mine": CODE})
    assert found["rude"] == 0.5 and found["cost"] == 10 and found["mae"] == pytest.approx(0.2)
    assert found["gone"] is None and "SystemExit" in found["undefined"]["gone"]
    assert scores.tolist() == [0.4, 1.4, 2.9] and labels.tolist() == [0.5, 1.5, 2.5]
    assert states == (repr(random.getstate()), repr(np.random.get_state()), torch.random.get_rng_state().tolist())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["mine:wrong"], "no such thing"),
        (["mine:text"], "returned str, not a number"),
        (["mine:gone"], "SystemExit: 3"),
        (["mine:absent"], "has no attribute 'absent'"),
        (["mine:np"], "is not a function"),
        (["broken:cost"], "SyntaxError"),
        (["not_installed_anywhere:cost"], "No module named 'not_installed_anywhere'"),
        (["mse"], "does not fit the task single-label"),
    ],
)
def test_a_metric_that_cannot_work_is_refused_with_its_traceback(metrics: list[str], message: str) -> None:
    code = {"mine": CODE, "broken": "def cost(:"}
    with pytest.raises(RecipeError) as caught:
        check_metrics("single-label", metrics, 3, code)
    assert message in caught.value.message and caught.value.remedy
    if metrics == ["mine:wrong"]:
        assert 'File "mine.py", line 17, in wrong' in caught.value.message
        assert 'raise ValueError("no such thing")' in caught.value.message
    for task, width in (("single-label", 3), ("multi-label", 3), ("regression", 1)):
        check_metrics(task, ["mine:cost:lower"], width, code)
