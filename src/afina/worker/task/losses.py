"""Losses: one per task, with class weights, weights of positives, label smoothing and focal damping.

A loss is computed per row, without the row's own weight; `docs/recipe.md` has the definitions and how rows are averaged. Training and
evaluation use the same object. Filler rows are left out by a weight of 0, never by a value of the label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from afina.recipe.keys.loss_keys import DEFAULT_GAMMA
from afina.recipe.keys.train_keys import Train

__all__ = ["Loss"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Loss:
    """The loss of a run: logits (B, K), labels (B,) or (B, K) -> the loss of each row, float32 (B,).

    Attributes:
        label_weights: of classes (single-label) or of positives (multi-label), float32 (K,), on the device of the logits.
        focal_gamma: None: cross entropy (Lin et al. 2017, "Focal Loss for Dense Object Detection").
    """

    task: str
    label_weights: torch.Tensor | None = None
    smoothing: float = 0.0
    focal_gamma: float | None = None

    @classmethod
    def of(cls, train: Train, task: str, label_weights: Array | None) -> Loss:
        """The loss that a recipe names; weights from `afina.worker.data.labels.loss_weights`."""
        gamma = (DEFAULT_GAMMA if train.focal_gamma is None else train.focal_gamma) if train.loss == "focal" else None
        weights = None if label_weights is None else torch.from_numpy(label_weights.astype(np.float32))
        return cls(task, weights, train.label_smoothing, gamma)

    def to(self, device: torch.device) -> Loss:
        return self if self.label_weights is None else replace(self, label_weights=self.label_weights.to(device))

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        if self.task == "regression":
            return functional.mse_loss(logits.squeeze(-1), labels.float(), reduction="none")
        if self.task == "multi-label":
            return self._multi_label(logits, labels.float())
        if self.focal_gamma is None:
            return functional.cross_entropy(
                logits, labels, self.label_weights, reduction="none", label_smoothing=self.smoothing
            )
        log_p = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        loss = -log_p * _damping(-torch.expm1(log_p), self.focal_gamma)
        return loss if self.label_weights is None else loss * self.label_weights[labels]

    def _multi_label(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = labels * (1 - self.smoothing) + self.smoothing / 2 if self.smoothing else labels
        loss = functional.binary_cross_entropy_with_logits(
            logits, targets, reduction="none", pos_weight=self.label_weights
        )
        if self.focal_gamma is not None:
            loss = loss * _damping(torch.where(labels > 0, -logits, logits).sigmoid(), self.focal_gamma)
        return loss.mean(-1)

    def of_rows(self, logits: Array, labels: Array) -> Array:
        """The loss of each row, float64 (N,), on the CPU."""
        return np.asarray(self(torch.from_numpy(logits), torch.from_numpy(np.array(labels))).double().numpy())

    def divisors(self, labels: Array, weights: Array | None) -> Array | None:
        """Each row's part of the divisor of a mean, float64 (N,); None: 1 each.

        Args:
            weights: of the rows, (N,); None: 1 each.
        """
        if self.task != "single-label" or self.label_weights is None:
            return None if weights is None else weights.astype(np.float64)
        of_labels = self.label_weights.cpu().numpy().astype(np.float64)[labels]
        return np.asarray(of_labels if weights is None else of_labels * weights)

    def mean(self, each: Array, labels: Array, weights: Array | None) -> float:
        """The mean of `of_rows`, weighted; NaN where all weights are 0."""
        divisors = self.divisors(labels, weights)
        if divisors is None:
            return float(each.mean())
        with np.errstate(invalid="ignore"):
            return float((each if weights is None else each * weights).sum() / divisors.sum())


def _damping(wrong: torch.Tensor, gamma: float) -> torch.Tensor:
    """(1 - p)^gamma from 1 - p; not from exactly 0, where the gradient of a power below 1 is infinite."""
    return wrong.clamp(min=1e-12) ** gamma
