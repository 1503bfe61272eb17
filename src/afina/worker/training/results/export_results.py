"""Results of a finished training: the best or last weights as `model/`, its predictions and their metrics."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from afina.files import name_aside, sync_file, sync_folder, sync_tree
from afina.run.directory import RunDir
from afina.statistics.decision_rule import FILE, DecisionRule
from afina.version import __version__
from afina.worker.compute import ranks
from afina.worker.compute.batches import Rows
from afina.worker.data.prepared import Split
from afina.worker.data.splits.duplicates import TRAINED_ROWS, trained_rows
from afina.worker.model.adapters import checkpoint_weights, has_adapter, save_labels, save_weights
from afina.worker.model.padding import padding_side
from afina.worker.survival import sharded_state
from afina.worker.training.evaluation import scores
from afina.worker.training.results.fitted_decisions import FittedDecisions
from afina.worker.training.results.result_checks import check_loss_curve, check_predictions
from afina.worker.training.results.write_predictions import write_predictions
from afina.worker.training.trainer import RunTrainer

__all__ = ["Results", "export_results"]


@dataclass(frozen=True)
class Results:
    """The results of a run; metrics and warnings are on rank 0 only.

    Attributes:
        model_step: whose weights are in `model/`; 0: there is no model.
        metrics: of that model.
        warnings: see `afina.worker.training.results.result_checks`.
        baselines, decisions: as in `Outcome`.
    """

    model_step: int
    metrics: dict[str, Any]
    warnings: list[str]
    baselines: dict[str, Any] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)


def export_results(trainer: RunTrainer) -> Results:
    """Choose the best or last weights; write `model/` and the predictions. Collective.

    May be repeated: if an attempt is killed here, the next one does it again.
    """
    attempt, data, step, best = (
        trainer.attempt,
        trainer.attempt.data,
        trainer.state.global_step,
        trainer.state.best_global_step,
    )
    run, model_step = attempt.run, best if attempt.keeps_best and best else step
    if model_step != step:
        trainer.load_weights(run.checkpoints / f"step-{model_step}")
    metrics: dict[str, Any] = {}
    warnings: list[str] = []
    fitted = FittedDecisions(attempt.plan.recipe, data)
    if attempt.rank == 0:
        warnings += check_loss_curve(data.loss, data.splits["train"], run.metrics())
    if "eval" in data.splits:
        if trainer.evaluated_step != model_step:
            trainer.evaluation_loop(trainer.get_eval_dataloader(), "Prediction")
        if attempt.rank == 0:
            split = data.splits["eval"]
            values = scores(data.loss, data.metric_texts, trainer.logits, split, data.labels, data.metric_code)
            metrics |= {f"eval_{name}": value for name, value in values.items()}
            labels = np.asarray(split.labels)
            warnings += check_predictions(data.task, data.labels, data.best_metric, trainer.logits, labels, values)
            if attempt.keeps_best and best is None:
                warnings.append(f"eval_{data.best_metric} was never defined: `model/` has the weights of the last step")
            if (early := attempt.early_stop) is not None and early.best is None:
                warnings.append(
                    f"eval_{early.metric} was never defined: train.early_stopping could not end the training"
                )
            write_predictions(data, "eval", trainer.logits, run.predictions)
            fitted.fit(trainer.logits, labels)
    if "test" in data.splits:
        rows = trainer.get_eval_dataloader(Rows(data.splits["test"]))
        output = trainer.evaluation_loop(rows, "Test", metric_key_prefix="test")
        if attempt.rank == 0:
            metrics |= output.metrics
            write_predictions(data, "test", output.predictions, run.predictions_of("test"))
            fitted.measure(output.predictions, np.asarray(data.splits["test"].labels))
    gathered = (
        sharded_state.whole(checkpoint_weights(trainer.model), run.path / "trainer", keep=attempt.rank == 0)
        if attempt.is_sharded
        else None
    )
    if attempt.rank == 0:
        _export_model(trainer, gathered, fitted.rule)
        _write_trained_rows(data.splits["train"], run)
        shutil.rmtree(run.path / "trainer", ignore_errors=True)
    ranks.barrier()
    return Results(model_step, metrics, warnings, decisions=fitted.record)


def _export_model(trainer: RunTrainer, weights: Mapping[str, Any] | None, rule: DecisionRule | None) -> None:
    """Write `model/`; `weights` are those of `trainer.model` where it has only shards of them, `rule` is kept beside them."""
    run = trainer.attempt.run
    staging, old = (run.path / name for name in (".model.staging", ".model.old"))
    for folder in (staging, old):
        shutil.rmtree(folder, ignore_errors=True)
    save_weights(trainer.model, staging, weights)
    if has_adapter(trainer.model):
        save_labels(trainer.model, staging, run.prepared())
    tokenizer = trainer.processing_class
    # Others who pad batches with it get the scores of single texts too.
    tokenizer.padding_side = padding_side(trainer.model, tokenizer.padding_side)
    tokenizer.save_pretrained(staging)
    if rule is not None and rule.changes:
        data = trainer.attempt.data
        (staging / FILE).write_text(rule.to_json(data.task, data.labels or (), __version__), encoding="utf-8")
    sync_tree(staging)
    if run.model.exists():
        run.model.rename(old)
    staging.rename(run.model)
    sync_folder(run.path)
    shutil.rmtree(old, ignore_errors=True)


def _write_trained_rows(train: Split, run: RunDir) -> None:
    """Keys of all rows that the model has been trained on: training on from it checks its eval and test rows against them."""
    path = run.path / TRAINED_ROWS
    aside = name_aside(path)
    with aside.open("wb") as file:
        np.save(file, trained_rows(train, Path(run.prepared()["model_folder"])))
    sync_file(aside)
    os.replace(aside, path)
