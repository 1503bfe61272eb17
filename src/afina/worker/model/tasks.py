"""Tasks as a table: the head, the loss and the decision of each. Metrics: `afina.worker.model.scoring`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

__all__ = ["TASKS", "Task", "decisions", "per_example_loss"]

Array = np.ndarray[Any, Any]


def _single_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)


def _multi_label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    known = labels != -100
    loss = functional.binary_cross_entropy_with_logits(logits.float(), labels.float().clamp(min=0), reduction="none")
    return (loss * known).mean(-1)


def _regression_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    known = labels != -100
    return functional.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="none") * known


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        problem_type: of the model's config in Transformers.
        loss: logits (B, K), labels (B,) or (B, K) -> loss per example (B,); 0 where the label is -100.
        decide: logits (N, K) -> predictions: class ids (N,), 0/1 (N, K) or values (N,).
    """

    problem_type: str
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    decide: Callable[[Array], Array]


TASKS: dict[str, Task] = {
    "single-label": Task("single_label_classification", _single_label_loss, lambda logits: logits.argmax(-1)),
    "multi-label": Task("multi_label_classification", _multi_label_loss, lambda logits: (logits > 0).astype(np.int64)),
    "regression": Task("regression", _regression_loss, lambda logits: logits[:, 0]),
}


def per_example_loss(task: str, logits: Array, labels: Array) -> Array:
    """Loss of each example, float64 (N,), from logits (N, K) and labels."""
    loss = TASKS[task].loss(torch.from_numpy(logits), torch.from_numpy(np.array(labels)))
    return np.asarray(loss.double().numpy())


def decisions(task: str, logits: Array) -> Array:
    """The predictions of logits (N, K): class ids int32 (N,), 0 or 1 int8 (N, K), or values float64 (N,)."""
    kind = {"single-label": np.int32, "multi-label": np.int8, "regression": np.float64}[task]
    return np.asarray(TASKS[task].decide(logits).astype(kind))
