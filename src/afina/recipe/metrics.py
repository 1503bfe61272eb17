"""The metrics of each task, and in which direction each is better. They are computed in `afina.worker.model.scoring`."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["METRICS", "default_metrics", "lower_is_better", "selection_metric"]

#: The metrics that each task knows; the first is the one by which the best checkpoint is chosen.
METRICS: dict[str, tuple[str, ...]] = {
    "single-label": ("accuracy", "f1", "precision", "recall", "mcc", "confusion_matrix"),
    "multi-label": ("f1", "f1_micro", "subset_accuracy", "precision", "recall"),
    "regression": ("mse", "mae", "pearson", "spearman"),
}
_LOWER_IS_BETTER = ("loss", "mse", "mae")


def default_metrics(task: str, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The metrics that an evaluation computes: the recipe's, or the task's first two."""
    return tuple(given or METRICS[task][:2])


def lower_is_better(metric: str) -> bool:
    """Whether a metric is minimised; its name may have the prefix of a split: `mse`, `eval_mse`, `test_mse`."""
    return metric.removeprefix("eval_").removeprefix("test_") in _LOWER_IS_BETTER


def selection_metric(task: str, given: str | None = None) -> str:
    """The metric that chooses the best checkpoint: the recipe's `train.best_metric`, or the task's first."""
    return given or METRICS[task][0]
