"""Tasks as a table: the head and the decision of each. Losses: `afina.worker.model.losses`; metrics: `afina.worker.model.scoring`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["TASKS", "Task", "decisions"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        problem_type: of the model's config in Transformers.
        decide: logits (N, K) -> predictions: class ids (N,), 0/1 (N, K) or values (N,).
    """

    problem_type: str
    decide: Callable[[Array], Array]


TASKS: dict[str, Task] = {
    "single-label": Task("single_label_classification", lambda logits: logits.argmax(-1)),
    "multi-label": Task("multi_label_classification", lambda logits: (logits > 0).astype(np.int64)),
    "regression": Task("regression", lambda logits: logits[:, 0]),
}


def decisions(task: str, logits: Array) -> Array:
    """The predictions of logits (N, K): class ids int32 (N,), 0 or 1 int8 (N, K), or values float64 (N,)."""
    kind = {"single-label": np.int32, "multi-label": np.int8, "regression": np.float64}[task]
    return np.asarray(TASKS[task].decide(logits).astype(kind))
