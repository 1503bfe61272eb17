"""Metrics of one's own: `module:function` of a recipe, loaded offline and called.

The module is the text that the plan carries (a file beside the recipe, `Plan.metric_code`), or else one that can be imported here. The
function takes `labels` and `predictions` (class ids (N,), flags (N, L) or values (N,)) and, if it has a third parameter without a
default or one named `scores`, the scores: probabilities (N, L), or values (N,) for regression. It returns a number, or None or NaN where
it is not defined. Not covered: a file beside the recipe that imports another one from there.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import linecache
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from afina.errors import RecipeError
from afina.recipe.metrics import METRICS, OwnMetric, own_metric
from afina.statistics.decision_rule import probabilities
from afina.worker.task.tasks import decisions

__all__ = ["call", "check_metrics", "load"]

Array = np.ndarray[Any, Any]
Function = Callable[..., Any]

_loaded: dict[tuple[str, str], ModuleType] = {}


def load(own: OwnMetric, code: Mapping[str, str]) -> Function:
    """The function of a metric.

    Raises:
        Exception: what importing the module raises; AttributeError, TypeError: no such function.
    """
    text = code.get(own.module)
    key = (own.module, text or "")
    if key not in _loaded:
        _loaded[key] = importlib.import_module(own.module) if text is None else _module(own.module, text)
    function = getattr(_loaded[key], own.function)
    if not callable(function):
        raise TypeError(f"{own.module}.{own.function} is not a function")
    return function  # type: ignore[no-any-return]


def _module(name: str, text: str) -> ModuleType:
    module, file = ModuleType(name), f"{name}.py"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # for tracebacks
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def call(function: Function, labels: Array, predictions: Array, scores: Array | None) -> float | None:
    """The value; None where the function says None.

    Raises:
        TypeError: it returned something else than a number.
        Exception: the function's own.
    """
    scores = None if scores is None else scores.copy()
    arguments = [labels.copy(), predictions.copy()]
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named: dict[str, Any] = {}
    if any(p.name == "scores" for p in parameters):
        named = {"scores": scores}
    elif len(positional) > 2 and positional[2].default is inspect.Parameter.empty:
        arguments.append(np.asarray(scores))
    with _random_states_kept():
        value = function(*arguments, **named)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray) or np.ndim(value):
        raise TypeError(f"returned {type(value).__name__}, not a number")
    return float(value)


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Seeds and draws inside do not change the training: its dropout comes from the same generators."""
    import torch

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):  # type: ignore[no-untyped-call]
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def check_metrics(task: str, texts: Sequence[str], num_labels: int, code: Mapping[str, str]) -> None:
    """Check the metrics of a recipe, `texts` as it writes them, for its task, and run the user's own once on made-up scores.

    Raises:
        RecipeError: a metric of another task; one of the user's own that cannot be loaded, raises, or returns no number, with its
            traceback.
    """
    for text in texts:
        if own_metric(text) is None and text not in METRICS[task]:
            known = ", ".join(METRICS[task])
            raise RecipeError(f"metric `{text}` does not fit the task {task}", f"choose from: {known}")
    own = [metric for text in texts if (metric := own_metric(text)) is not None]
    arguments = _made_up(task, num_labels) if own else ()
    for metric in own:
        try:
            call(load(metric, code), *arguments)
        except (Exception, SystemExit) as error:
            trace = "".join(traceback.format_exception(error)).rstrip()
            where = f"{metric.module}.py beside the recipe" if metric.module in code else f"module {metric.module}"
            raise RecipeError(
                f"metrics: {metric.module}:{metric.function} ({where}) fails on made-up rows of a {task} task:\n{trace}",
                "correct it; it is called with labels, predictions and, if it asks for them, scores, and returns a number",
            ) from None


def _made_up(task: str, num_labels: int) -> tuple[Array, Array, Array]:
    """Labels, predictions and scores in which every class occurs."""
    rng = np.random.default_rng(0)
    size = max(64, 4 * num_labels)
    logits = rng.normal(size=(size, num_labels)).astype(np.float32)
    labels = {
        "single-label": np.arange(size) % num_labels,
        "multi-label": (rng.random(logits.shape) > 0.5).astype(np.int64),
        "regression": rng.normal(size=size),
    }[task]
    scores = probabilities(task, logits)
    return labels, decisions(task, logits).astype(labels.dtype), scores[:, 0] if task == "regression" else scores
