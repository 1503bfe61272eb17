"""Simple models beside the fine-tuned one: the majority class, and logistic regression on TF-IDF (ridge for regressions), on the same splits.

    python -m afina.worker baselines RUN FOLDER        prints scores and paired differences as JSON (`Outcome.baselines`)

A process of its own, started by rank 0 when the predictions of the run are written: its time is bounded, and it changes nothing of the run. Its
logits are kept in `<scratch>/baselines`, by the digest of the prepared data and the fold: other runs on the same data read them.

TF-IDF is over the token ids of the prepared data, single ones and pairs, so it reads the texts as the model does, cut alike; of windows what they
share counts once.
Logistic regression and ridge have scikit-learn's defaults (C = 1, alpha = 1), which are not tuned; a label of several has a regression of its own. Rows are
weighed as in the loss of the run, labels are not. Above `_MOST_CELLS` a sample of the train rows is drawn with a fixed seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from afina.worker.data.prepared import Split, load_manifest
from afina.worker.data.splits.folds import open_splits
from afina.worker.task.tasks import decisions

__all__ = ["SimpleModel", "answer", "fit_tfidf", "without_repeated"]

Array = np.ndarray[Any, Any]

#: Part of the name of what is kept: one more with every change of the models.
_FORMAT = 1
#: Token ids and pairs of the train rows, times labels: about a minute on two cores.
_MOST_CELLS = 25_000_000
#: The most features: the single ids and pairs that most rows have.
_MOST_FEATURES = 200_000
#: Rows that are made into features at a time.
_ROWS = 65_536
#: Logits of a label that no row of train has.
_NEVER = -20.0


@dataclass(frozen=True)
class SimpleModel:
    """Logits of a simple model.

    Attributes:
        name: what it is.
        rows, of: the rows that it was trained on, and those of train.
        seconds: to train it and to predict.
        logits: split -> float32 (N, K), as those of the fine-tuned model.
    """

    name: str
    rows: int
    of: int
    seconds: float
    logits: dict[str, Array]

    @property
    def about(self) -> dict[str, Any]:
        """All but the logits."""
        return {key: value for key, value in vars(self).items() if key != "logits"}


def answer(arguments: list[str]) -> dict[str, Any]:
    """Split -> simple models, each with its scores and the paired differences of the fine-tuned model from it."""
    run, folder = RunDir(arguments[0]), Path(arguments[1])
    plan, manifest = run.plan(), load_manifest(folder)
    task, digest = manifest["task"], str(run.prepared()["digest"])
    splits, _ = open_splits(folder, list(manifest["splits"]), task, plan.recipe.data)
    if "repeated" in manifest:
        splits = {name: without_repeated(split, *manifest["repeated"]) for name, split in splits.items()}
    model = _kept(plan, task, digest, splits, manifest["num_labels"])
    metrics = [metric_name(plan.recipe.train.best_metric or selection_metric(task)), *(plan.recipe.metrics or ())]
    names = [name for name in dict.fromkeys([*metrics, *METRICS[task][:2]]) if name in METRICS[task]]
    found = {}
    for split in ("eval", "test"):
        if split in splits and (file := run.predictions_of(split)).is_file():
            found[split] = _compared(read_predictions(file, texts=False), model, split, names)
    plain: dict[str, Any] = finite(found)
    return plain


def _compared(mine: Predictions, model: SimpleModel, split: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The simple models of a split; the majority class first."""
    task, logits = mine.task, model.logits[split]
    scores = None if task == "regression" else probabilities(task, logits.astype(np.float64))
    tfidf = replace(mine, predicted=decisions(task, logits).astype(mine.truth.dtype), scores=scores)
    most, described = reference(mine)
    others = [({"name": described}, most), (model.about, tfidf)]
    return [
        {
            **about,
            "scores": {name: [i.value, i.low, i.high] for name, i in score(other, names=names).overall.items()},
            "differences": _differences(mine, other, names),
        }
        for about, other in others
    ]


def _differences(mine: Predictions, other: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    try:
        return compare_paired(other, mine, extra=names).records(names)
    except DataError as error:
        print(f"simple models: {error.message}", file=sys.stderr)
        return []


def without_repeated(split: Split, before: int, after: int) -> Split:
    """Rows of windows as sequences that hold each token once.

    Args:
        before: tokens at the beginning of each later window that its row has already.
        after: special tokens at the end of each window but the last.
    """
    assert split.windows is not None
    first = np.searchsorted(split.windows, split.offsets)
    bounds = np.stack([split.windows[:-1] + before, split.windows[1:] - after], 1)
    bounds[first[:-1], 0] -= before
    bounds[first[1:] - 1, 1] += after
    pieces = Split(split.tokens, bounds.ravel(), np.zeros(2 * len(bounds) - 1)).take(np.arange(0, 2 * len(bounds), 2))
    return Split(pieces.tokens, pieces.offsets[first], split.labels, None, split.weights)


# -- kept beside the prepared data -------------------------------------------------------------------------------------


def _kept(plan: Plan, task: str, digest: str, splits: dict[str, Split], width: int) -> SimpleModel:
    """The model as it was kept, or a new one, which is published by rename."""
    fold = plan.recipe.data.fold
    content = [_FORMAT, digest, fold.model_dump() if fold else None]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    path = plan.site.scratch / "baselines" / f"{key}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            return SimpleModel(**about, logits={name: kept[name] for name in splits if name != "train"})
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # not there, or damaged
        model = fit_tfidf(task, splits, width)
    try:
        path.parent.mkdir(exist_ok=True)
        aside = name_aside(path)
        about = json.dumps(model.about)
        with aside.open("wb") as new:
            np.savez(new, about=np.array(about), **model.logits)  # type: ignore[arg-type]
        os.replace(aside, path)
    except (OSError, AfinaError) as error:
        print(f"simple models: not kept for other runs: {error}", file=sys.stderr)
    return model


# -- TF-IDF ------------------------------------------------------------------------------------------------------------


def fit_tfidf(task: str, splits: dict[str, Split], width: int, seed: int = 0) -> SimpleModel:
    """Train on `train`, predict the other splits.

    Args:
        width: the number of labels, 1 for a regression.
        seed: of the sample of train rows, where they are too many.
    """
    began, whole = time.monotonic(), splits["train"]
    cells = 2 * len(whole.tokens) * (width if width > 2 else 1)
    train = whole
    if cells > _MOST_CELLS:
        count = max(1, int(len(whole) * _MOST_CELLS / cells))
        train = whole.take(np.sort(np.random.default_rng(seed).choice(len(whole), count, replace=False)))
    keys, places = _terms(train)
    known, weights = _vocabulary(keys, places, len(train))
    model = _fit(task, _matrix(keys, places, len(train), known, weights), train, width)
    logits = {name: _predict(model, split, known, weights) for name, split in splits.items() if name != "train"}
    kind = "ridge regression" if task == "regression" else "logistic regression"
    seconds = round(time.monotonic() - began, 2)
    return SimpleModel(f"TF-IDF and {kind}", len(train), len(whole), seconds, logits)


def _terms(split: Split) -> tuple[Array, Array]:
    """Every token id, and every pair of neighbours within a row: keys int64, and the row of each."""
    tokens = np.asarray(split.tokens).astype(np.int64)
    rows = np.repeat(np.arange(len(split)), split.lengths)
    same = rows[1:] == rows[:-1]
    pairs = ((tokens[:-1] + 1) << 32 | tokens[1:])[same]
    return np.concatenate([tokens, pairs]), np.concatenate([rows, rows[1:][same]])


def _vocabulary(keys: Array, places: Array, rows: int) -> tuple[Array, Array]:
    """The terms that are features, sorted, with their inverse document frequency; what is in one row or in all says nothing."""
    order = np.lexsort((places, keys))
    ordered, where = keys[order], places[order]
    first = np.ones(len(ordered), bool)
    first[1:] = (ordered[1:] != ordered[:-1]) | (where[1:] != where[:-1])
    known, frequency = np.unique(ordered[first], return_counts=True)
    useful = np.flatnonzero((frequency > 1) & (frequency < rows))
    if len(useful) > _MOST_FEATURES:
        useful = np.sort(useful[np.argsort(-frequency[useful], kind="stable")[:_MOST_FEATURES]])
    return known[useful], np.log((1 + rows) / (1 + frequency[useful])) + 1


def _matrix(keys: Array, places: Array, rows: int, known: Array, weights: Array) -> Any:
    """TF-IDF of rows, sparse float32 (rows, terms), each of Euclidean length 1 (scikit-learn's TfidfTransformer)."""
    from scipy.sparse import csr_matrix
    from sklearn.preprocessing import normalize

    columns = np.searchsorted(known, keys)
    there = columns < len(known)
    there[there] = known[columns[there]] == keys[there]
    cells = (places[there], columns[there])
    counts = csr_matrix((weights[cells[1]].astype(np.float32), cells), shape=(rows, max(1, len(known))))
    return normalize(counts, copy=False)


def _fit(task: str, features: Any, train: Split, width: int) -> Any:
    """A function: features -> logits float32 (N, K)."""
    from sklearn.linear_model import LogisticRegression, Ridge

    labels = np.asarray(train.labels)
    weights = None if train.weights is None else np.asarray(train.weights)
    if task == "regression":
        ridge = Ridge(solver="lsqr").fit(features, labels, weights)
        return lambda rows: ridge.predict(rows).reshape(-1, 1).astype(np.float32)

    def logistic(targets: Array) -> tuple[Array, Any]:
        """The classes of `targets`, and what gives their logits (N, classes), (N,) of two."""
        classes = np.unique(targets)
        if len(classes) < 2:
            return classes, lambda rows: np.zeros((rows.shape[0], 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a hundred iterations are enough for a baseline
            return classes, LogisticRegression().fit(features, targets, weights).decision_function

    if task == "multi-label":
        each = [logistic(labels[:, k] > 0) for k in range(width)]
        return lambda rows: np.stack(
            [
                margin(rows) if len(known) == 2 else np.full(rows.shape[0], -_NEVER if known[0] else _NEVER)
                for known, margin in each
            ],
            axis=1,
        ).astype(np.float32)
    known, margin = logistic(labels)

    def of_classes(rows: Any) -> Array:
        logits, values = np.full((rows.shape[0], width), _NEVER, np.float32), margin(rows)
        logits[:, known] = np.stack([np.zeros(len(values)), values], axis=1) if values.ndim == 1 else values
        return logits

    return of_classes


def _predict(model: Any, split: Split, known: Array, weights: Array) -> Array:
    parts = []
    for start in range(0, len(split), _ROWS):
        some = split.take(np.arange(start, min(start + _ROWS, len(split))))
        parts.append(model(_matrix(*_terms(some), len(some), known, weights)))
    return np.concatenate(parts)
