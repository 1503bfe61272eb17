"""Decisions of a recipe (temperature, thresholds): fitted on eval when the training has ended, with a record of what they change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from afina.errors import DataError
from afina.recipe.metrics import METRICS, NEED_SCORES
from afina.recipe.schema import Recipe
from afina.statistics.decision_rule import DecisionRule, cross_fitted, effects, fit_rule, probabilities
from afina.statistics.predictions import Predictions
from afina.worker.task.tasks import decisions
from afina.worker.training.attempt import TrainingData

__all__ = ["FittedDecisions", "as_predictions"]

Array = np.ndarray[Any, Any]


def as_predictions(task: str, names: Sequence[str] | None, labels: Array, scaled: Array, shifted: Array) -> Predictions:
    """Predictions without their texts.

    Args:
        scaled, shifted: logits (N, K) of the probabilities and of the decisions, see `DecisionRule`.
    """
    kind: Any = {"single-label": np.int64, "multi-label": bool, "regression": np.float64}[task]
    truth, predicted = labels.astype(kind), decisions(task, shifted).astype(kind)
    known = None if task == "regression" else probabilities(task, scaled)
    return Predictions(task, tuple(names or ()), truth, predicted, known, None)


class FittedDecisions:
    """The rule that the recipe's `decisions` ask for, and its record; neither without them.

    Attributes:
        rule: fitted on eval.
        record: as in `Outcome`.
    """

    def __init__(self, recipe: Recipe, data: TrainingData) -> None:
        self._asked, self._data = recipe.decisions, data
        metrics = [data.best_metric, *METRICS[data.task][:2], *(recipe.metrics or ())]
        known = set(METRICS[data.task]) - set(NEED_SCORES)
        self._metrics = [name for name in dict.fromkeys(metrics) if name in known]
        self.rule: DecisionRule | None = None
        self.record: dict[str, Any] = {}

    def fit(self, logits: Array, labels: Array) -> None:
        """Fit on eval; without a test split measure there too, each fifth of the rows by a rule that was fitted on the others."""
        asked, task, names = self._asked, self._data.task, self._data.labels
        if asked is None or names is None:
            return
        keys: Any = {"temperature": asked.temperature, "thresholds": asked.thresholds != "none"}
        self.rule = rule = fit_rule(task, names, logits, labels, **keys)
        temperature = rule.temperature if rule.temperature != 1 else None
        thresholds = rule.named_thresholds(names)
        self.record = {"temperature": temperature, "thresholds": thresholds, "notes": list(rule.notes)}
        if "test" not in self._data.splits and rule.changes:
            self._effects(logits, labels, *cross_fitted(task, names, logits, labels, **keys), split="eval")

    def measure(self, logits: Array, labels: Array) -> None:
        """Changes by the rule on the rows of test."""
        if self.rule is not None and self.rule.changes:
            self._effects(logits, labels, self.rule.scaled(logits), self.rule.shifted(logits), split="test")

    def _effects(self, logits: Array, labels: Array, scaled: Array, shifted: Array, *, split: str) -> None:
        asked, task, names = self._asked, self._data.task, self._data.labels
        assert asked is not None
        plain, ruled = (as_predictions(task, names, labels, *of) for of in ((logits, logits), (scaled, shifted)))
        self.record |= {"measured_on": split, "cross_fitted": split == "eval"}
        try:
            metrics = self._metrics if asked.thresholds != "none" else []
            self.record |= effects(plain, ruled, metrics, temperature=asked.temperature)
        except DataError as error:  # too many rows of too many labels
            self.record["notes"].append(f"not measured: {error.message}")
