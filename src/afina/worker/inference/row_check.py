"""Rows of a batch against each alone: the logits must agree, or one row's prediction would depend on others.

Prefetch compares a training's batches with plain Transformers (`afina.worker.checks.model_check`), and a prediction compares its own for
a model folder that no run of afina made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from afina.errors import InputError
from afina.worker.data.prepared import Split

if TYPE_CHECKING:  # a caller checks data before it needs torch, whose import takes seconds
    import torch

__all__ = ["REMEDY", "choose_rows", "count_special", "logits_alone", "logits_of_batch", "require_equal"]

#: Largest difference of a logit, as a share of the largest logit; and what float32 may differ by where all are tiny.
_TOLERANCE = 1e-4
_LEAST = 1e-6
_ROWS = 8
#: A larger model is checked on fewer rows, two at least: so many tokens times parameters take seconds on a core.
_WORK = 4e10
#: Tokens among which rows with unusual special tokens are searched.
_COUNTED = 20_000_000
REMEDY = "do not use it with this afina: its scores would not be those of the model; please report its architecture"

Array = np.ndarray[Any, Any]


def count_special(split: Split, special: list[int]) -> Array:
    """How often each special token occurs in each of the first rows, int64 (N, S)."""
    rows = max(1, int(np.searchsorted(split.offsets, _COUNTED, side="right")) - 1)
    tokens, starts = np.asarray(split.tokens[: split.offsets[rows]]), split.offsets[:rows]
    counts = [np.add.reduceat((tokens == token).astype(np.int32), starts) for token in special]
    return np.stack(counts, -1) if counts else np.zeros((rows, 0), np.int32)


def choose_rows(split: Split, special: list[int], parameters: int) -> list[int]:
    """At most eight rows, longest first: rows with unusual special tokens, the longest and shortest, and some between."""
    lengths, counts = split.lengths, count_special(split, special)
    order = np.argsort(-lengths, kind="stable")
    spread = [int(order[i * (len(order) - 1) // (_ROWS - 1)]) for i in range(_ROWS)]
    odd = [int(column.argmax()) for column in counts.T if column.min() < column.max()]
    rows = list(dict.fromkeys([spread[0], *odd[:2], spread[-1], *odd, *spread]))[:_ROWS]
    while len(rows) > 2 and float(lengths[rows].sum()) * parameters > _WORK:
        rows.pop()
    return sorted(rows, key=lambda row: -int(lengths[row]))


def logits_alone(model: Any, split: Split, rows: list[int]) -> Array:
    """Logits of each row by itself, without padding, as the class of Transformers computes them."""
    import torch

    logits = []
    for row in rows:
        place = slice(int(split.offsets[row]), int(split.offsets[row + 1]))
        ids = torch.from_numpy(np.array(split.tokens[place], np.int64))[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if split.types is not None:
            inputs["token_type_ids"] = torch.from_numpy(np.array(split.types[place], np.int64))[None]
        logits.append(logits_of_batch(model, inputs))
    return np.concatenate(logits)


def logits_of_batch(model: Any, inputs: Mapping[str, torch.Tensor]) -> Array:
    """Logits of a batch, float32 (B, K); of a token classifier those of all its tokens, (T, K), without padding."""
    logits: Array = model(**{k: v.to(model.device) for k, v in inputs.items()})["logits"].float().cpu().numpy()
    if logits.ndim == 3:
        mask = inputs.get("attention_mask")
        return logits[0] if mask is None else logits[mask.cpu().numpy() > 0]
    return logits


def require_equal(difference: float, logits: Array, what: str, remedy: str = REMEDY) -> None:
    """Refuse a difference that is more than rounding.

    Args:
        logits: those that are right, whose size decides what is rounding.

    Raises:
        InputError: `what`, and by how much.
    """
    allowed = max(_LEAST, _TOLERANCE * float(np.abs(logits).max()))
    if not difference <= allowed:
        raise InputError(f"model: {what}: they differ by {difference:.1e}, {allowed:.1e} is rounding", remedy)
