"""The metrics of each task, in which direction each is better, and metrics of one's own: `module:function`.

The built-in ones are computed in `afina.statistics.measures`, in training and in every report alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "METRICS",
    "NEED_SCORES",
    "SCALARS",
    "OwnMetric",
    "default_metrics",
    "lower_is_better",
    "metric_name",
    "metric_range",
    "metric_texts",
    "own_metric",
    "selection_metric",
]

_AVERAGED = ("precision_micro", "recall_micro", "f1_weighted", "precision_weighted", "recall_weighted")
#: Computed from probabilities, not from decisions.
NEED_SCORES = ("auroc", "average_precision", "log_loss", "brier")
#: The metrics that each task knows; the first is the one by which the best checkpoint is chosen.
METRICS: dict[str, tuple[str, ...]] = {
    "single-label": (
        *("accuracy", "f1", "precision", "recall", "balanced_accuracy", "mcc", "kappa", "kappa_quadratic"),
        *("f1_micro", *_AVERAGED, *NEED_SCORES, "confusion_matrix"),
    ),
    "multi-label": ("f1", "f1_micro", "subset_accuracy", "precision", "recall", *_AVERAGED, *NEED_SCORES),
    "regression": ("mse", "mae", "pearson", "spearman", "rmse", "r2"),
    "token-classification": ("f1", "precision", "recall", "f1_macro", "accuracy"),
}
#: All metrics that are one number.
SCALARS = tuple(dict.fromkeys(name for names in METRICS.values() for name in names if name != "confusion_matrix"))
_LOWER_IS_BETTER = ("loss", "mse", "mae", "rmse", "log_loss", "brier")
_FROM_MINUS_ONE = ("mcc", "kappa", "kappa_quadratic", "pearson", "spearman")
_OWN = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)(?::(?P<better>\w+))?")


@dataclass(frozen=True)
class OwnMetric:
    """A metric of one's own: a function of a module, which is a file beside the recipe or importable where it trains."""

    module: str
    function: str
    lower: bool = False

    @property
    def name(self) -> str:
        """Its name in every record: that of the function."""
        return self.function


def own_metric(text: str) -> OwnMetric | None:
    """`module:function`, with `:lower` or `:higher` behind it; None for a name without a colon.

    Raises:
        ValueError: a colon, but not of that form.
    """
    if ":" not in text:
        return None
    match = _OWN.fullmatch(text)
    if match is None or match["better"] not in (None, "lower", "higher"):
        raise ValueError(f"`{text}` must be `module:function`, or `module:function:lower` where less is better")
    return OwnMetric(match["module"], match["function"], match["better"] == "lower")


def metric_name(text: str) -> str:
    """The name that a metric has in the records: of one's own, that of its function."""
    return text.split(":")[1] if ":" in text else text


def metric_texts(metrics: Sequence[str] | None, *chosen: str | None) -> tuple[str, ...]:
    """All metrics as a recipe writes them, and the `chosen` ones (`best_metric`, that of early stopping), which may name one of
    the user's own by its function, or the loss."""
    known = {metric_name(text) for text in metrics or () if own_metric(text)} | {"loss"}
    return tuple(dict.fromkeys([*(metrics or ()), *(text for text in chosen if text and text not in known)]))


def default_metrics(task: str, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The metrics that an evaluation computes: the recipe's, or the task's first two (of entities three)."""
    return tuple(given or METRICS[task][: 3 if task == "token-classification" else 2])


def _without_split(metric: str) -> str:
    return metric.removeprefix("eval_").removeprefix("test_")


def lower_is_better(metric: str, given: Sequence[str] = ()) -> bool:
    """True if a metric is minimised; its name may have the prefix of a split: `mse`, `eval_mse`, `test_mse`.

    Args:
        given: the metrics of the recipe, `best_metric` included; they say it of the user's own.
    """
    name = _without_split(metric)
    own = [of_user for text in given if (of_user := own_metric(text)) and of_user.name == metric_name(name)]
    return own[0].lower if own else name in _LOWER_IS_BETTER


def metric_range(metric: str) -> tuple[float, float]:
    """The least and the largest value that a metric can have, named as for `lower_is_better`; of one's own it is not known: all numbers."""
    name = _without_split(metric)
    if name in _LOWER_IS_BETTER:
        return 0.0, math.inf
    if name == "r2" or name not in SCALARS:
        return -math.inf, 1.0 if name == "r2" else math.inf
    return -1.0 if name in _FROM_MINUS_ONE else 0.0, 1.0


def selection_metric(task: str, given: str | None = None) -> str:
    """The metric that chooses the best checkpoint: the recipe's `train.best_metric`, or the task's first."""
    return metric_name(given) if given else METRICS[task][0]
