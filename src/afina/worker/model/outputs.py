"""The columns of a table of predictions, from logits.

single-label   the most probable label; softmax
multi-label    every label with a probability above one half; a sigmoid each
regression     the value itself; no probabilities
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from afina.worker.model.tasks import decisions

__all__ = ["prediction_columns", "label_lists", "probabilities"]

Array = np.ndarray[Any, Any]


def probabilities(task: str, logits: Array) -> Array:
    """Logits (N, K) -> probabilities (N, K) of the same dtype; for regression the values as they are. NaN stays NaN."""
    if task == "single-label":
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(-1, keepdims=True))
    if task == "multi-label":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-logits)))
    return logits


def prediction_columns(task: str, labels: Sequence[str] | None, logits: Array) -> dict[str, pa.Array]:
    """`prediction`, and `score: NAME` for each label; null where the logits are NaN.

    Args:
        labels: names in the order of the logits; unused for regression.
        logits: (N, K).

    Returns: arrays of length N. A prediction is a label's name, a list of names, or a number.
    """
    empty = np.isnan(logits[:, 0])
    decided = decisions(task, np.nan_to_num(logits))
    if task == "regression":
        return {"prediction": pa.array(decided, mask=empty)}
    assert labels is not None
    names = pa.array(labels, pa.string())
    scores = probabilities(task, logits)
    single = task == "single-label"
    chosen = names.take(pa.array(decided, mask=empty)) if single else label_lists(names, decided > 0, empty)
    return {
        "prediction": chosen,
        **{f"score: {name}": pa.array(scores[:, i], mask=empty) for i, name in enumerate(labels)},
    }


def label_lists(names: pa.Array, chosen: Array, empty: Array | None = None) -> pa.ListArray:
    """The names that each row of a (N, K) mask selects; null where `empty`."""
    ends = np.concatenate([[0], np.cumsum(chosen.sum(-1))]).astype(np.int32)
    values = names.take(pa.array(np.nonzero(chosen)[1]))
    return pa.ListArray.from_arrays(pa.array(ends), values, mask=None if empty is None else pa.array(empty))
