"""The keys of a recipe that decide the loss, and the tasks that each fits. The losses: `afina.worker.task.losses`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from afina.recipe.keys.section import KeyedError, shown

__all__ = ["DEFAULT_GAMMA", "LOSS_KEYS", "misfit", "parse_label_weights"]

#: Of Lin et al. 2017, "Focal Loss for Dense Object Detection".
DEFAULT_GAMMA = 2.0

#: Sums of larger weights could overflow float32.
_LARGEST_WEIGHT = 1e9

#: Keys of `train`.
LOSS_KEYS = ("loss", "focal_gamma", "class_weights", "pos_weight", "label_smoothing")


def parse_label_weights(value: Any) -> Any:
    """`balanced`, or weights by label name, checked.

    Raises:
        ValueError: neither, or a weight that is negative or not finite.
    """
    if value is None or value == "balanced":
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"must be `balanced`, or a weight for each label such as {{good: 1, bad: 3}}, found {shown(value)}"
        )
    weights: dict[str, float] = {}
    for key, weight in value.items():
        name = str(key).strip()
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or not 0 <= weight <= _LARGEST_WEIGHT:
            raise KeyedError(f"{shown(weight)} is not a weight: a number from 0 to {_LARGEST_WEIGHT:.0e}", str(key))
        if name in weights:
            raise KeyedError("names a label twice", str(key))
        weights[name] = float(weight)
    return weights


def misfit(used: Collection[str], task: str) -> tuple[str, str, str] | None:
    """The first key of the loss that does not fit `task`: key, problem, remedy; None where all fit.

    Args:
        used: the keys that a recipe sets to something else than their default.
    """
    if task == "regression" and used:
        problem = "does not fit a regression: its loss is the squared error"
        return next(iter(used)), problem, "leave it out, or set another task"
    if task == "token-classification" and (
        key := next((k for k in used if k in ("class_weights", "pos_weight")), None)
    ):
        return key, "does not fit token classification: labels are of words, and measured by entities", "leave it out"
    if task == "multi-label" and "class_weights" in used:
        return "class_weights", "does not fit a multi-label task", "set `train.pos_weight`, a weight for each label"
    if task == "single-label" and "pos_weight" in used:
        return "pos_weight", "does not fit a single-label task", "set `train.class_weights`, a weight for each class"
    return None
