"""What a finished run leaves: `model/`, predictions with the labels' own names, the metrics of that model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afina.worker.batches import Rows
from afina.worker.tasks import TASKS, compute_metrics, per_example_loss

if TYPE_CHECKING:
    from afina.worker.trainer import RunTrainer

__all__ = ["conclude"]

Array = np.ndarray[Any, Any]


def conclude(trainer: RunTrainer) -> dict[str, Any]:
    """Choose the best or last weights, write `model/` and `predictions.parquet`; returns the metrics of that model.

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
        logits, labels = trainer.logits, np.asarray(trainer.splits["eval"].labels)
        scores = {"loss": float(per_example_loss(trainer.task, logits, labels).mean())}
        scores |= compute_metrics(trainer.task, trainer.metric_names, logits, labels, trainer.model.config.num_labels)
        metrics |= {f"eval_{name}": value for name, value in scores.items()}
        if trainer.rank == 0:
            _write_predictions(trainer, "eval", logits, run.predictions)
    if "test" in trainer.splits:
        rows = trainer.get_eval_dataloader(Rows(trainer.splits["test"]))
        output = trainer.evaluation_loop(rows, "Test", metric_key_prefix="test")
        metrics |= output.metrics
        if trainer.rank == 0:
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
    """One row per example in input order: row, file, (id,) text, label, prediction, and a column of scores per label."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(Path(trainer.run.prepared()["prepared"]) / f"{part}.rows.parquet")
    labels = np.asarray(trainer.splits[part].labels)
    decided = TASKS[trainer.task].decide(logits)
    if trainer.task == "regression":
        columns: dict[str, Any] = {"label": labels, "prediction": decided}
    else:
        assert trainer.labels is not None
        names = np.array(trainer.labels, dtype=object)
        if trainer.task == "single-label":
            shifted = np.exp(logits - logits.max(-1, keepdims=True))
            scores = shifted / shifted.sum(-1, keepdims=True)
            columns = {"label": names[labels].tolist(), "prediction": names[decided].tolist()}
        else:
            scores = 1 / (1 + np.exp(-logits))
            columns = {
                "label": [names[row > 0].tolist() for row in labels],
                "prediction": [names[row > 0].tolist() for row in decided],
            }
        columns |= {f"score: {name}": scores[:, i] for i, name in enumerate(trainer.labels)}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, aside)
    os.replace(aside, path)
