"""TF-IDF over token ids: a simple model beside the fine-tuned one.

Features are the token ids of the prepared data, single ones and pairs, so it reads the texts as the model does, cut alike; of windows what they
share counts once. Above `_MOST_CELLS` a sample of the train rows is drawn with a fixed seed.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from afina.worker.data.linear_model import SimpleModel, fit_linear, kind_of, stratified_order
from afina.worker.data.prepared import Split

__all__ = ["fit_tfidf", "without_repeated"]

Array = np.ndarray[Any, Any]

#: Token ids and pairs of the train rows, times labels: about a minute on two cores.
_MOST_CELLS = 25_000_000
#: The most features: the single ids and pairs that most rows have.
_MOST_FEATURES = 200_000
_FEATURES = "over tokens and pairs of them"
#: Rows that are made into features at a time.
_ROWS = 65_536


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
        train = whole.take(np.sort(stratified_order(task, np.asarray(whole.labels), seed)[:count]))
    keys, places = _terms(train)
    known, weights = _vocabulary(keys, places, len(train))
    model = fit_linear(task, _matrix(keys, places, len(train), known, weights), train, width)
    logits = {name: _predict(model, split, known, weights) for name, split in splits.items() if name != "train"}
    seconds = round(time.monotonic() - began, 2)
    return SimpleModel(f"TF-IDF and {kind_of(task)}", _FEATURES, len(train), len(whole), seconds, logits)


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


def _predict(model: Any, split: Split, known: Array, weights: Array) -> Array:
    parts = []
    for start in range(0, len(split), _ROWS):
        some = split.take(np.arange(start, min(start + _ROWS, len(split))))
        parts.append(model(_matrix(*_terms(some), len(some), known, weights)))
    return np.concatenate(parts)
