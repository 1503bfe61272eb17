"""Predictions of a split as a Parquet file, one row per example in input order, with the label names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afina.files import sync_file
from afina.worker.data.prepared import Split
from afina.worker.data.splits.folds import open_rows
from afina.worker.task.tasks import label_lists, prediction_columns
from afina.worker.training.attempt import TrainingData

__all__ = ["write_predictions"]

Array = np.ndarray[Any, Any]

#: Rows of a row group.
_ROWS = 65_536


def write_predictions(data: TrainingData, part: str, logits: Array, path: Path) -> None:
    """One row per example in input order: row, file, (id,) text, label, prediction, and a column of scores per label; or, of a token
    classification, lists of entities as label and prediction.

    Written in row groups; only one of them is in memory at a time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    split = data.splits[part]
    labels = np.asarray(split.labels)
    if part in data.rows:
        batches: Any = open_rows(data.folder, part, data.rows).to_batches(_ROWS)
    else:
        batches = pq.ParquetFile(data.folder / f"{part}.rows.parquet").iter_batches(_ROWS)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    writer: Any = None
    try:
        done = 0
        for batch in batches:
            table = pa.Table.from_batches([batch])
            block = slice(done, done := done + len(table))
            columns = (
                _columns(data.task, data.labels, logits[block], labels[block])
                if split.words is None
                else _entity_columns(split, data.labels or [], logits, block, table.column("text"))
            )
            for name, values in columns.items():
                table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
            writer = writer or pq.ParquetWriter(aside, table.schema)
            writer.write_table(table, row_group_size=_ROWS)
        assert done == len(split), "the rows and the logits do not fit together"
    finally:
        if writer is not None:
            writer.close()
    sync_file(aside)
    os.replace(aside, path)


def _entity_columns(split: Split, names: Sequence[str], logits: Array, rows: slice, texts: Any) -> dict[str, Any]:
    """True and predicted entities of a block of rows, by column name."""
    from afina.worker.task.entity_columns import entity_column, predicted_entities

    assert split.words is not None
    words, some = split.words.take(np.arange(rows.start, rows.stop)), texts.to_pylist()
    these = slice(int(split.words.offsets[rows.start]), int(split.words.offsets[rows.stop]))
    return {
        "label": entity_column(some, np.asarray(split.labels[these]), words, names),
        "prediction": predicted_entities(some, logits[these], words, names),
    }


def _columns(task: str, names: list[str] | None, logits: Array, labels: Array) -> dict[str, Any]:
    """Label, prediction and scores of a block of rows, by column name."""
    import pyarrow as pa

    if task == "regression":
        true: Any = labels
    else:
        assert names is not None
        known = pa.array(names, pa.string())
        true = known.take(pa.array(labels)) if task == "single-label" else label_lists(known, labels > 0)
    return {"label": true, **prediction_columns(task, names, logits)}
