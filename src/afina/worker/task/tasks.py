"""Tasks as a table: the head and the decision of each, the columns of its predictions; the task of a classifier by its configuration.

single-label   the most probable label; softmax
multi-label    every label with a probability above one half; a sigmoid each
regression     the value itself; no probabilities
token-classification   the most probable label of each word; softmax

Losses: `afina.worker.task.losses`; metrics: `afina.worker.task.scoring`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import InputError
from afina.statistics.calibration import confidence
from afina.statistics.decision_rule import NO_RULE, DecisionRule, probabilities

__all__ = [
    "TASKS",
    "Task",
    "abstained",
    "auto_class",
    "class_of_config",
    "decisions",
    "label_lists",
    "labels_words",
    "prediction_columns",
    "task_of_config",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        problem_type: of the model's config in Transformers; None where its class says it.
        decide: logits (N, K) -> predictions: class ids (N,), 0/1 (N, K) or values (N,).
    """

    problem_type: str | None
    decide: Callable[[Array], Array]


TASKS: dict[str, Task] = {
    "single-label": Task("single_label_classification", lambda logits: logits.argmax(-1)),
    "multi-label": Task("multi_label_classification", lambda logits: (logits > 0).astype(np.int64)),
    "regression": Task("regression", lambda logits: logits[:, 0]),
    "token-classification": Task(None, lambda logits: logits.argmax(-1)),
}


def auto_class(task: str) -> Any:
    """The class of Transformers that has the head of a task."""
    import transformers

    if task == "token-classification":
        return transformers.AutoModelForTokenClassification
    return transformers.AutoModelForSequenceClassification


def labels_words(architectures: Sequence[str] | None) -> bool:
    """True if a configuration's `architectures` are those of a token classifier."""
    return any("TokenClassification" in str(name) for name in architectures or ())


def class_of_config(config: Any) -> Any:
    """The class of Transformers that has the head which a configuration names."""
    return auto_class("token-classification" if labels_words(config.architectures) else "auto")


def decisions(task: str, logits: Array) -> Array:
    """The predictions of logits (N, K): class ids int32 (N,), 0 or 1 int8 (N, K), or values float64 (N,)."""
    kind = {"single-label": np.int32, "multi-label": np.int8, "regression": np.float64}.get(task, np.int32)
    return np.asarray(TASKS[task].decide(logits).astype(kind))


def prediction_columns(
    task: str, labels: Sequence[str] | None, logits: Array, rule: DecisionRule = NO_RULE
) -> dict[str, pa.Array]:
    """`prediction`, and `score: NAME` for each label; null where the logits are NaN.

    Args:
        labels: names in the order of the logits; unused for regression.
        logits: (N, K).
        rule: of a classifier.

    Returns: arrays of length N. A prediction is a label's name, a list of names, or a number.
    """
    empty = np.isnan(logits[:, 0])
    decided = decisions(task, rule.shifted(np.nan_to_num(logits)))
    if task == "regression":
        return {"prediction": pa.array(decided, mask=empty)}
    assert labels is not None
    names = pa.array(labels, pa.string())
    scores = probabilities(task, rule.scaled(logits))
    single = task == "single-label"
    chosen = names.take(pa.array(decided, mask=empty)) if single else label_lists(names, decided > 0, empty)
    return {
        "prediction": chosen,
        **{f"score: {name}": pa.array(scores[:, i], mask=empty) for i, name in enumerate(labels)},
    }


def abstained(task: str, columns: Mapping[str, pa.Array], least: float) -> tuple[dict[str, pa.Array], int]:
    """The columns of predictions with `confidence`, and null for those of which the model is less sure than `least`; and the number of these."""
    scores = np.stack(
        [values.to_numpy(zero_copy_only=False) for name, values in columns.items() if name != "prediction"], 1
    )
    names = pa.array([name.removeprefix("score: ") for name in columns if name != "prediction"], pa.string())
    decided = columns["prediction"]
    empty = np.isnan(scores[:, 0])
    if task == "single-label":
        chosen = pc.fill_null(pc.index_in(decided, value_set=names), 0).to_numpy()
    else:
        chosen = np.zeros(scores.shape, bool)
        lengths = pc.fill_null(pc.list_value_length(decided), 0).to_numpy()
        chosen[
            np.repeat(np.arange(len(scores)), lengths), pc.index_in(decided.flatten(), value_set=names).to_numpy()
        ] = True
    sure = confidence(task, scores, chosen)
    unsure = ~empty & (sure < least)
    prediction = pc.if_else(pa.array(unsure), pa.scalar(None, decided.type), decided)
    rest = {name: values for name, values in columns.items() if name != "prediction"}
    return {"prediction": prediction, "confidence": pa.array(sure, pa.float32(), mask=empty), **rest}, int(unsure.sum())


def label_lists(names: pa.Array, chosen: Array, empty: Array | None = None) -> pa.ListArray:
    """The names that each row of a (N, K) mask selects; null where `empty`."""
    ends = np.concatenate([[0], np.cumsum(chosen.sum(-1))]).astype(np.int32)
    values = names.take(pa.array(np.nonzero(chosen)[1]))
    return pa.ListArray.from_arrays(pa.array(ends), values, mask=None if empty is None else pa.array(empty))


def task_of_config(config: Any, folder: Path) -> tuple[str, list[str] | None]:
    """The task of a classifier, and its label names in the order of the outputs (None for regression).

    Args:
        config: of Transformers. Without a `problem_type` one output is a regression, several are classes.

    Raises:
        InputError: another `problem_type`, a regression of several outputs, an output without a name, two of one name.
    """

    def refused(what: str, remedy: str) -> InputError:
        return InputError(f"model: {folder / 'config.json'}: {what}", remedy)

    count = config.num_labels
    if labels_words(config.architectures):
        return "token-classification", _named(config, refused)
    kind = config.problem_type or ("regression" if count == 1 else "single_label_classification")
    task = next((name for name, row in TASKS.items() if row.problem_type == kind), None)
    if task is None:
        known = ", ".join(row.problem_type for row in TASKS.values() if row.problem_type)
        raise refused(f"problem_type is {kind!r}", f"correct it: {known}, or leave it out")
    if task == "regression":
        if count != 1:
            raise refused(
                f"a regression with {count} outputs", "a regression has one: correct problem_type or num_labels"
            )
        return task, None
    return task, _named(config, refused)


def _named(config: Any, refused: Callable[[str, str], InputError]) -> list[str]:
    count, names = config.num_labels, config.id2label or {}
    unnamed = [str(number) for number in range(count) if number not in names]
    if unnamed:
        raise refused(f"id2label has no name for output {', '.join(unnamed[:5])} of {count}", "number its names from 0")
    labels = [str(names[number]) for number in range(count)]
    if repeated := [name for name, times in Counter(labels).items() if times > 1]:
        raise refused(f"id2label names several outputs `{repeated[0]}`", "give each output a name of its own")
    return labels
