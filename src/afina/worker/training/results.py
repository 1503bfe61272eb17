"""What a finished run leaves: `model/`, predictions with the labels' own names, the metrics of that model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afina.worker.compute.batches import Rows
from afina.worker.model.outputs import label_lists, prediction_columns
from afina.worker.training.evaluation import scores

if TYPE_CHECKING:
    from afina.worker.training.trainer import RunTrainer

__all__ = ["conclude"]

Array = np.ndarray[Any, Any]

#: Rows of a row group of predictions.
_ROWS = 65_536


def conclude(trainer: RunTrainer) -> dict[str, Any]:
    """Choose the best or last weights, write `model/` and `predictions.parquet`; returns the metrics of that model, on rank 0.

    Collective. May be repeated: a run that was killed here is concluded by its next attempt.
    """
    run, step, best = trainer.run, trainer.state.global_step, trainer.state.best_global_step
    trainer.model_step = best if trainer.plan.recipe.train.keep == "best" and best else step
    if trainer.model_step != step:
        trainer.load_weights(run.checkpoints / f"step-{trainer.model_step}")
    metrics: dict[str, Any] = {}
    if trainer.eval_dataset is not None:
        if trainer.evaluated_step != trainer.model_step:
            trainer.evaluation_loop(trainer.get_eval_dataloader(), "Prediction")
        if trainer.rank == 0:
            logits, labels = trainer.logits, np.asarray(trainer.splits["eval"].labels)
            found = scores(trainer.task, trainer.metric_names, logits, labels)
            metrics |= {f"eval_{name}": value for name, value in found.items()}
            _write_predictions(trainer, "eval", logits, run.predictions)
    if "test" in trainer.splits:
        rows = trainer.get_eval_dataloader(Rows(trainer.splits["test"]))
        output = trainer.evaluation_loop(rows, "Test", metric_key_prefix="test")
        if trainer.rank == 0:
            metrics |= output.metrics
            _write_predictions(trainer, "test", output.predictions, run.path / "predictions_test.parquet")
    if trainer.rank == 0:
        _export(trainer)
        shutil.rmtree(run.path / "trainer", ignore_errors=True)
    trainer.barrier()
    return metrics


def _export(trainer: RunTrainer) -> None:
    final = trainer.run.model
    staging, old = (trainer.run.path / name for name in (".model.staging", ".model.old"))
    for folder in (staging, old):
        shutil.rmtree(folder, ignore_errors=True)
    trainer.model.save_pretrained(staging)
    trainer.processing_class.save_pretrained(staging)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _write_predictions(trainer: RunTrainer, part: str, logits: Array, path: Path) -> None:
    """One row per example in input order: row, file, (id,) text, label, prediction, and a column of scores per label.

    In row groups, each of which is in memory for its time only.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = np.asarray(trainer.splits[part].labels)
    source = pq.ParquetFile(Path(trainer.run.prepared()["prepared"]) / f"{part}.rows.parquet")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    writer: Any = None
    try:
        done = 0
        for batch in source.iter_batches(_ROWS):
            table = pa.Table.from_batches([batch])
            block = slice(done, done := done + len(table))
            for name, values in _columns(trainer.task, trainer.labels, logits[block], labels[block]).items():
                table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
            writer = writer or pq.ParquetWriter(aside, table.schema)
            writer.write_table(table, row_group_size=_ROWS)
        assert done == len(labels), "the rows and the logits do not fit together"
    finally:
        if writer is not None:
            writer.close()
    os.replace(aside, path)


def _columns(task: str, known: list[str] | None, logits: Array, labels: Array) -> dict[str, Any]:
    """What is said of a block of rows, by the name of its column."""
    import pyarrow as pa

    if task == "regression":
        said: Any = labels
    else:
        assert known is not None
        names = pa.array(known, pa.string())
        said = names.take(pa.array(labels)) if task == "single-label" else label_lists(names, labels > 0)
    return {"label": said, **prediction_columns(task, known, logits)}
