"""Simple models beside the fine-tuned one, on the same splits: the majority class, and linear models on TF-IDF and on frozen embeddings.

    python -m afina.worker baselines        reads the arguments of `simple_models`, prints scores and paired differences (`Outcome.baselines`)

Processes of their own, started by rank 0 when the predictions of the run are written: their time is bounded, and they change nothing of the run. Logits are
kept in `<scratch>/baselines`, by the digest of the prepared data, the fold and, of embeddings, the model: other runs on the same data read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from afina.errors import AfinaError, DataError
from afina.files import name_aside
from afina.recipe.metrics import METRICS, metric_name, selection_metric
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.statistics.decision_rule import probabilities
from afina.statistics.paired import compare_paired
from afina.statistics.predictions import Predictions, read_predictions
from afina.statistics.scores import score
from afina.statistics.weakness import reference
from afina.text import finite
from afina.worker.data.linear_model import SimpleModel
from afina.worker.data.prepared import load_manifest
from afina.worker.data.splits.folds import open_splits
from afina.worker.data.tfidf import fit_tfidf, without_repeated
from afina.worker.reply import read_question
from afina.worker.startup import NOT_NEEDED, hide_packages
from afina.worker.task.tasks import decisions

__all__ = ["answer", "simple_models"]

Array = np.ndarray[Any, Any]

#: Part of the name of what is kept: one more with every change of the models.
_FORMAT = 2
#: Before the name of a split: its rows.
_ROWS = "rows of "


def answer(arguments: list[str]) -> dict[str, Any]:
    """`simple_models` of the question on standard input."""
    with contextlib.suppress(OSError):  # where memory ends, this process does and not the training
        Path("/proc/self/oom_score_adj").write_text("1000")
    return simple_models(**read_question("a request for simple models"))


def simple_models(
    run: str,
    folder: str,
    model_folder: str,
    kind: str,
    limit_s: float = 0.0,
    device: str = "cpu",
    end: float = math.inf,
) -> dict[str, Any]:
    """Split -> simple models of a kind, each with its scores and the paired differences of the fine-tuned model from it.

    Args:
        folder, model_folder: prepared data and pretrained model, as this node reads them.
        kind: `tfidf`, after the majority class; or `embeddings`, on `device`, within `limit_s` seconds once the model is loaded, and until `end` (`time.time`).
    """
    finished = RunDir(run)
    plan, prepared, manifest = finished.plan(), finished.prepared(), load_manifest(folder)
    task, width = manifest["task"], manifest["num_labels"]
    splits, _ = open_splits(Path(folder), list(manifest["splits"]), task, plan.recipe.data)
    fold = plan.recipe.data.fold
    content = [_FORMAT, kind, str(prepared["digest"]), fold.model_dump() if fold else None]

    if kind == "tfidf":
        once = (
            {name: without_repeated(split, *manifest["repeated"]) for name, split in splits.items()}
            if "repeated" in manifest
            else splits
        )
        model = _kept(plan, content, lambda: fit_tfidf(task, once, width))
    else:

        def fit() -> SimpleModel:
            with hide_packages(*NOT_NEEDED):
                from afina.worker.inference.embeddings import Embedder, fit_embeddings

            embedder = Embedder(plan.recipe, Path(model_folder), manifest, device)
            return fit_embeddings(embedder, task, splits, width, min(limit_s, end - time.time()))

        model = _kept(plan, [*content, prepared["model_files"]], fit, limit_s)
    metrics = [metric_name(plan.recipe.train.best_metric or selection_metric(task)), *(plan.recipe.metrics or ())]
    names = [name for name in dict.fromkeys([*metrics, *METRICS[task][:2]]) if name in METRICS[task]]
    found = {}
    for split in ("eval", "test"):
        if split in splits and (file := finished.predictions_of(split)).is_file():
            mine = read_predictions(file, texts=False)
            most = [_compared(mine, *reference(mine), names)] if kind == "tfidf" else []
            found[split] = [*most, _beside(mine, model, split, names)]
    plain: dict[str, Any] = finite(found)
    return plain


def _beside(mine: Predictions, model: SimpleModel, split: str, names: Sequence[str]) -> dict[str, Any]:
    """The record of a model on a split, or on the sample of its rows that it predicted."""
    of, task, logits = len(mine), mine.task, model.logits[split]
    if (rows := model.samples.get(split)) is not None:
        scores = None if mine.scores is None else mine.scores[rows]
        table = mine.table.take(rows)
        mine = replace(mine, truth=mine.truth[rows], predicted=mine.predicted[rows], scores=scores, table=table)
    scores = None if task == "regression" else probabilities(task, logits.astype(np.float64))
    other = replace(mine, predicted=decisions(task, logits).astype(mine.truth.dtype), scores=scores)
    return {**model.about, "compared": [len(mine), of], **_compared(mine, other, model.name, names)}


def _compared(mine: Predictions, other: Predictions, name: str, names: Sequence[str]) -> dict[str, Any]:
    scores = {metric: [i.value, i.low, i.high] for metric, i in score(other, names=names).overall.items()}
    return {"name": name, "scores": scores, "differences": _differences(mine, other, names)}


def _differences(mine: Predictions, other: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    try:
        return compare_paired(other, mine, extra=names).records(names)
    except DataError as error:
        print(f"simple models: {error.message}", file=sys.stderr)
        return []


def _kept(plan: Plan, content: Any, fit: Callable[[], SimpleModel], limit_s: float = 0.0) -> SimpleModel:
    """The model as it was kept, or a new one, which is published by rename.

    Args:
        content: what it depends on, for JSON.
        limit_s: one that had less than half of this time, and needed more, is made again.
    """
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    path = plan.site.scratch / "baselines" / f"{key}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        about = json.loads(str(arrays.pop("about")))
        samples = {name.removeprefix(_ROWS): arrays.pop(name) for name in list(arrays) if name.startswith(_ROWS)}
        before = SimpleModel(**about, logits=arrays, samples=samples)
        if before.cut_after_s is None or limit_s <= 2 * before.cut_after_s:
            return before
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # not there, or damaged
        pass
    model = fit()
    try:
        path.parent.mkdir(exist_ok=True)
        aside = name_aside(path)
        samples = {_ROWS + name: rows for name, rows in model.samples.items()}
        with aside.open("wb") as new:
            np.savez(new, about=np.array(json.dumps(model.about)), **model.logits, **samples)  # type: ignore[arg-type]
        os.replace(aside, path)
    except (OSError, AfinaError) as error:
        print(f"simple models: not kept for other runs: {error}", file=sys.stderr)
    return model
