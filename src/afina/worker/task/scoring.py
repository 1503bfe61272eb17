"""The metrics of an evaluation, as an `evaluate.Metric`: the built-in ones (`afina.statistics.measures`) and the user's own.

`evaluate.load` would fetch a script from the Hub and fail on a node without internet. Importing `evaluate` takes a
second, so a run imports this module at its first evaluation, not at its start. A metric that is not defined, or one of the user's
own that raises, is None with a reason under `undefined`, and stops nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from afina.errors import first_line
from afina.recipe.metrics import METRICS, own_metric
from afina.statistics.measures import compute
from afina.worker.startup import import_evaluate
from afina.worker.task.own_metrics import call, load

__all__ = ["compute_metrics"]

Array = np.ndarray[Any, Any]
evaluate: Any = import_evaluate()


class _Metrics(evaluate.Metric):  # type: ignore[misc]
    """The metrics of a recipe for its task."""

    def __init__(self, task: str, names: Sequence[str], num_labels: int, code: Mapping[str, str]) -> None:
        self._task, self._names, self._num_labels, self._code = task, names, num_labels, code
        super().__init__(keep_in_memory=True)

    def _info(self) -> Any:
        value = datasets.Value("float64" if self._task == "regression" else "int64")
        feature = datasets.Sequence(value) if self._task == "multi-label" else value
        return evaluate.MetricInfo(
            description=f"{', '.join(self._names)} ({self._task})",
            citation="",
            features=datasets.Features({"predictions": feature, "references": feature}),
        )

    def _build_data_dir(self) -> str:
        """No folder: evaluate makes one in its cache, which may be read-only, and with `keep_in_memory` never uses it."""
        return str(self._data_dir_root)

    def _compute(self, predictions: Any, references: Any, scores: Array | None = None) -> dict[str, Any]:
        labels, predicted = np.asarray(references), np.asarray(predictions)
        built_in = [name for name in self._names if name in METRICS[self._task]]
        values, undefined = compute(self._task, built_in, labels, predicted, scores, self._num_labels)
        for text in self._names:
            if (own := own_metric(text)) is None:
                continue
            try:
                value = call(load(own, self._code), labels, predicted, scores)
            except (Exception, SystemExit) as error:
                value, undefined[own.name] = (
                    None,
                    f"{own.module}.{own.function} raised {type(error).__name__}: {first_line(error)}",
                )
            if value is not None and not math.isfinite(value):
                value, undefined[own.name] = None, f"{own.module}.{own.function} returned {value}"
            elif value is None:
                undefined.setdefault(own.name, f"{own.module}.{own.function} returned None")
            values[own.name] = value
        return {**values, **({"undefined": undefined} if undefined else {})}


def compute_metrics(
    task: str,
    names: Sequence[str],
    predictions: Array,
    labels: Array,
    num_labels: int,
    scores: Array | None = None,
    code: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The named metrics of `task`, for `tasks.decisions` against labels.

    Args:
        names: of `afina.recipe.metrics.METRICS`, or `module:function`.
        scores: (N, K) probabilities, or (N,) values of a regression; metrics that need them are left out without.
        code: the text of the modules beside the recipe, by name.

    Returns: name -> number, list or None; `undefined`: why those that are None have no value, if there are any.
    """
    kind = np.float64 if task == "regression" else np.int64
    metric = _Metrics(task, names, num_labels, code or {})
    values: dict[str, Any] = metric.compute(
        predictions=predictions.astype(kind), references=labels.astype(kind), scores=scores
    )
    return values
