"""Starts the processes that train simple models beside a finished run (`afina.worker.inference.simple_models`), within a bounded time."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import torch

from afina.errors import AfinaError, Stopped
from afina.run.workers import ask_worker
from afina.schedule import embedding_seconds
from afina.statistics.weakness import beaten
from afina.worker.training.attempt import Attempt
from afina.worker.training.log import say
from afina.worker.training.results.export_results import Results

__all__ = ["simple_models"]

#: Of the process that trains simple models; and left before the end of a job's time, to record how the run ended.
_SIMPLE_S, _LEFT_S = 120.0, 60.0
#: To start the process, load the model, and train on the embeddings.
_AROUND_S = 30.0


def simple_models(attempt: Attempt, results: Results) -> Results:
    """The results beside those of simple models (`afina.worker.inference.simple_models`), which processes of their own train. A failure, a stop or too
    little time leaves one out, and the log says so: the run finishes as it is."""
    if not attempt.plan.recipe.has_simple_models(attempt.data.task, attempt.data.splits):
        return results
    # Half the watchdog's limit: the other processes wait for this one, without a sign of progress.
    end = time.monotonic() + min(_SIMPLE_S, attempt.watchdog.limit_s / 2)
    if attempt.stop.deadline is not None:
        end = min(end, time.monotonic() + attempt.stop.deadline - time.time() - _LEFT_S)
    try:
        baselines = _simple(attempt, {"kind": "tfidf"}, end)
    except AfinaError as error:
        say(f"WARNING: no simple models beside this one: {error.message}")
        return results
    limit_s = min(embedding_seconds(attempt.meter.training_s), end - time.monotonic() - _AROUND_S)
    try:
        embedded = time.time() + end - time.monotonic() - _AROUND_S / 2  # however long the process takes to start
        question = {"kind": "embeddings", "limit_s": limit_s, "end": embedded, "device": str(attempt.device)}
        more = _simple(attempt, question, end if limit_s > 0 else 0)
    except AfinaError as error:
        say(f"WARNING: no frozen embeddings beside this model: {error.message}")
        record = {"name": "frozen embeddings", "left_out": error.message, "scores": {}, "differences": []}
        more = {split: [record] for split in baselines}
    baselines = {split: [*models, *more[split]] for split, models in baselines.items()}
    return replace(results, baselines=baselines, warnings=[*results.warnings, *beaten(baselines)])


def _simple(attempt: Attempt, question: dict[str, Any], end: float) -> dict[str, Any]:
    """The answer of `python -m afina.worker baselines`.

    Args:
        end: when it is ended, as `time.monotonic` gives it.

    Raises:
        AfinaError: there is none.
    """
    limit_s = end - time.monotonic()

    def check() -> None:
        attempt.watchdog.beat("simple models")
        if attempt.stop.check(_LEFT_S):
            raise Stopped("a stop was requested")
        if time.monotonic() > end:
            raise Stopped(f"not ready after {limit_s:.0f} s")

    if limit_s <= 0:
        raise Stopped("too little time is left")
    if attempt.device.type == "cuda":
        torch.cuda.empty_cache()
    argv = [sys.executable, "-m", "afina.worker", "baselines"]
    places = {"run": attempt.run.path, "folder": attempt.data.folder, "model_folder": attempt.data.model_folder}
    question |= {name: str(path) for name, path in places.items()}
    return ask_worker(argv, None, question, name="its process", check=check)
