"""Weights in the loss: of labels, from the recipe and the rows of train; of rows, from the column `data.weight`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from afina.errors import DataError, RecipeError, nearest
from afina.recipe.keys.loss_keys import misfit
from afina.recipe.keys.train_keys import Train
from afina.text import plural
from afina.worker.data.labels.find_labels import as_numbers
from afina.worker.data.tables.data_table import DataTable, list_places

__all__ = ["label_weights", "row_weights"]

Array = np.ndarray[Any, Any]

_LARGEST = 1e9


def row_weights(split: str, table: DataTable, name: str, rows: Array) -> Array:
    """The weights of `rows`, float32 (N,).

    Raises:
        DataError: one is missing, negative or not finite, with file and row; or all are 0.
    """
    column = table.columns[name]
    if pa.types.is_list(column.type):
        raise DataError(
            f"{table.sources[0]}: column `{name}` holds lists, a weight is one number", "name another `data.weight`"
        )
    values = as_numbers(column)[rows]
    wrong = rows[~((values >= 0) & (values <= _LARGEST))]
    if len(wrong):
        raise DataError(
            f"{split}: `{name}` is not a weight (a number from 0 to {_LARGEST:.0e}) in {plural(len(wrong), 'row')}: "
            f"{list_places(table, np.sort(wrong))}; the first holds {column[int(np.sort(wrong)[0])].as_py()!r}",
            "correct these rows; 1 is the usual weight, and 0 leaves a row out of the loss",
        )
    if not values.any():
        raise DataError(f"{split}: all weights in `{name}` are 0: no row would count", "name another `data.weight`")
    return values.astype(np.float32)


def label_weights(train: Train, task: str, names: Sequence[str] | None, labels: Array) -> Array | None:
    """The weights of classes (single-label) or of positives (multi-label), float64 (K,); None where the recipe has none.

    Args:
        labels: of the rows of train, as prepared data hold them.

    Raises:
        RecipeError: the recipe's loss does not fit the task, a label is unknown, or `balanced` has no value for a label.
    """
    if wrong := misfit(train.loss_keys, task):
        raise RecipeError(f"train.{wrong[0]}: {wrong[1]}", wrong[2])
    key, given = ("class_weights", train.class_weights) if task == "single-label" else ("pos_weight", train.pos_weight)
    if given is None or names is None:
        return None
    count = len(labels)
    rows = np.bincount(labels, minlength=len(names)) if task == "single-label" else (np.asarray(labels) > 0).sum(0)
    if isinstance(given, dict):
        for name in given:
            if name not in names:
                raise RecipeError(
                    f"train.{key}: {name!r} is not a label", nearest(name, names) or f"labels: {', '.join(names[:20])}"
                )
        weights = np.array([given.get(name, 1.0) for name in names])
        if task == "single-label" and not weights[rows > 0].any():
            raise RecipeError(f"train.{key}: all rows of train would have weight 0", "give a label a weight above 0")
        return weights
    for name, positive in zip(names, rows.tolist(), strict=True):
        if positive == 0 or (task == "multi-label" and positive == count):
            kind = "no" if positive == 0 else "only rows with"
            raise RecipeError(
                f"train.{key}: `balanced` has no weight for {name!r}: train has {kind} {'rows of it' if positive == 0 else 'it'}",
                f"give the weights: `train.{key}: {{{name}: 1, …}}`, or leave that label out of `data.labels`",
            )
    return count / (len(names) * rows) if task == "single-label" else (count - rows) / rows
