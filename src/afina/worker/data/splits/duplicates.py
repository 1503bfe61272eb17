"""Rows that the model cannot tell apart: between two splits, within eval or test, and with what the model was trained on before.

Rows are compared by their token ids, so after the tokenizer's own normalisation and cut: texts that differ in case or spaces only
are one row to an uncased model. Not covered: paraphrases and other near-duplicates.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from afina.errors import SiteError
from afina.files import read_json
from afina.text import plural
from afina.worker.data.labels.find_labels import Labels
from afina.worker.data.prepared import Split, open_split
from afina.worker.data.tables.data_table import DataTable, Examples, list_places

__all__ = ["TRAINED_ROWS", "check_conflicts", "check_duplicates", "check_trained_before", "row_keys", "trained_rows"]

Array = np.ndarray[Any, Any]

#: In a run directory: keys of all rows that its model was trained on, those of the runs before it included.
TRAINED_ROWS = "trained_rows.npy"
_SHOWN = 5
_KEY_BYTES = 16


def row_keys(tokens: Array, lengths: Array) -> Array:
    """BLAKE2b of the token ids of each row, uint64 (N, 2).

    Args:
        tokens: of all rows, one after the other, (T,).
        lengths: tokens of each row, int64 (N,).
    """
    raw = np.ascontiguousarray(tokens, np.uint32).tobytes()
    ends = (np.cumsum(lengths) * 4).tolist()
    digests = [
        hashlib.blake2b(raw[start:stop], digest_size=_KEY_BYTES).digest()
        for start, stop in zip([0, *ends], ends, strict=False)
    ]
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def _first_alike(keys: Array) -> Array:
    """For each row the first one with the same key, int64 (N,).

    Args:
        keys: uint64 (N, 2).
    """
    order = np.lexsort(keys.T)  # stable: rows that are alike stay in their order
    new = np.ones(len(keys), bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def _pair(table: DataTable, index: int, other: DataTable, twin: int) -> str:
    there = other.where(twin)
    if table.sources[table.source[index]] == other.sources[other.source[twin]]:
        there = f"{other.unit} {other.row[twin]}"
    return f"{table.where(index)} = {there}"


def check_duplicates(splits: Mapping[str, Examples], keys: Mapping[str, Array]) -> dict[str, list[str]]:
    """Warnings about rows of two splits, and about repeated rows of eval and test, by the split whose numbers they spoil.

    Args:
        keys: of the rows of each split, from `row_keys`.
    """
    warnings: dict[str, list[str]] = {}
    for name, other in itertools.combinations(splits, 2):
        first, second = splits[name], splits[other]
        if first.source == second.source and np.array_equal(first.rows, second.rows):
            continue  # asked for: `choose_sources` has said so
        twins = _first_alike(np.concatenate([keys[name], keys[other]]))[len(first) :]
        both = np.flatnonzero(twins < len(first))
        if len(both):
            shown = "; ".join(_pair(second.table, int(i), first.table, int(twins[i])) for i in both[:_SHOWN])
            warnings.setdefault(other, []).append(
                f"{len(both):,} of {len(second):,} rows of {other} are in {name} too, as the model reads them: {shown}"
            )
    for name, examples in splits.items():
        if name == "train":
            continue
        twins = _first_alike(keys[name])
        again = np.flatnonzero(twins < np.arange(len(twins)))
        if len(again):
            shown = "; ".join(_pair(examples.table, int(i), examples.table, int(twins[i])) for i in again[:_SHOWN])
            warnings.setdefault(name, []).append(
                f"{len(again):,} of {len(examples):,} rows of {name} repeat an earlier one, as the model reads them, so that "
                f"intervals are too narrow: {shown}"
            )
    return warnings


def check_conflicts(labels: Labels, train: Examples, keys: Array) -> list[str]:
    """A warning about rows of train that are alike and have different labels."""
    if labels.task == "regression":
        return []
    codes = _first_alike(keys)
    values = train.labels
    if train.words is not None:
        offsets = train.words.offsets
        each = [values[a:b].tobytes() for a, b in itertools.pairwise(offsets.tolist())]
        values = np.unique(np.array(each, object), return_inverse=True)[1].reshape(-1)
    elif values.ndim == 2:
        values = np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)
    pairs = np.unique(codes * (int(values.max()) + 1) + values)
    texts, times = np.unique(pairs // (int(values.max()) + 1), return_counts=True)
    conflicting = texts[times > 1]
    if not len(conflicting):
        return []
    groups = " | ".join(list_places(train.table, np.flatnonzero(codes == code)) for code in conflicting[:_SHOWN])
    return [
        f"{plural(len(conflicting), 'text of train occurs', 'texts of train occur')} more than once with different labels: {groups}"
    ]


# -- training on from a run -------------------------------------------------------------------------------------------


def trained_rows(train: Split, model_folder: Path) -> Array:
    """Keys of the rows of train, and of those that the model in `model_folder` was trained on before; uint64 (N, 2)."""
    keys, before = row_keys(train.tokens, train.lengths), _known_rows(model_folder)
    return np.unique(keys if before is None else np.concatenate([keys, before]), axis=0)


def _known_rows(model_folder: Path) -> Array | None:
    """The training data of a model of one of our runs; None for other models, and where its record is gone."""
    run = model_folder.resolve().parent
    if (run / TRAINED_ROWS).is_file():
        try:
            return np.asarray(np.load(run / TRAINED_ROWS, allow_pickle=False), np.uint64).reshape(-1, 2)
        except (OSError, ValueError):
            return None
    if not (run / "plan.json").is_file():
        return None
    about = read_json(run / "prepared.json")
    try:  # a run that an older afina made, as long as its prepared data exist
        return trained_rows(open_split(str(about["prepared"]), "train"), Path(str(about["model_folder"])))
    except (KeyError, OSError, SiteError):
        return None


def check_trained_before(prepared: Path, model_folder: Path, splits: Mapping[str, str]) -> dict[str, list[str]]:
    """Warnings about rows of eval and test that the model's own run was trained on, by split.

    Args:
        prepared: the folder of the prepared data.
        model_folder: the model's; `model/` of a run directory, to find anything.
        splits: eval and test, and which of the splits on disk each is.
    """
    before = _known_rows(model_folder)
    if before is None:
        return {}
    warnings: dict[str, list[str]] = {}
    for split, stored in splits.items():
        opened = open_split(prepared, stored)
        keys = row_keys(opened.tokens, opened.lengths)
        known = np.isin(_packed(keys), _packed(before))
        if known.any():
            warnings[split] = [
                f"{int(known.sum()):,} of {len(keys):,} rows of {split} were trained on by the run that made the model "
                f"({model_folder.resolve().parent.name}), as the model reads them"
            ]
    return warnings


def _packed(keys: Array) -> Array:
    """One value for each key, (N,): comparable with `np.isin`."""
    return np.ascontiguousarray(keys).view([("high", np.uint64), ("low", np.uint64)]).reshape(-1)
