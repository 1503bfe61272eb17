"""Results of a finished run: `model/`, predictions with the label names, the metrics of that model, and warnings.

Warnings: a metric that is undefined, a model of no use (`afina.statistics.weakness`), a training loss that diverged.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afina.errors import AfinaError, DataError, Stopped
from afina.files import name_aside, sync_file, sync_folder, sync_tree
from afina.recipe.metrics import METRICS, NEED_SCORES
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir
from afina.run.workers import ask_worker
from afina.schedule import embedding_seconds
from afina.statistics.decision_rule import FILE, DecisionRule, cross_fitted, effects, fit_rule, probabilities
from afina.statistics.predictions import Predictions
from afina.statistics.weakness import beaten, weaknesses
from afina.version import __version__
from afina.worker.compute import ranks
from afina.worker.compute.batches import Rows
from afina.worker.data.prepared import Split
from afina.worker.data.splits.duplicates import TRAINED_ROWS, trained_rows
from afina.worker.data.splits.folds import open_rows
from afina.worker.model.adapters import checkpoint_weights, has_adapter, save_labels, save_weights
from afina.worker.model.padding import padding_side
from afina.worker.survival import sharded_state
from afina.worker.task.losses import Loss
from afina.worker.task.tasks import decisions, label_lists, prediction_columns
from afina.worker.training.attempt import Attempt, TrainingData
from afina.worker.training.evaluation import scores
from afina.worker.training.log import say
from afina.worker.training.trainer import RunTrainer

__all__ = ["Results", "check_loss_curve", "check_predictions", "export_results", "simple_models"]

Array = np.ndarray[Any, Any]

#: Rows of a row group of predictions, and of train from which reference losses are computed.
_ROWS = 65_536
#: Of the process that trains simple models; and left before the end of a job's time, to record how the run ended.
_SIMPLE_S, _LEFT_S = 120.0, 60.0
#: To start the process, load the model, and train on the embeddings.
_AROUND_S = 30.0


@dataclass(frozen=True)
class Results:
    """The results of a run; metrics and warnings are on rank 0 only.

    Attributes:
        model_step: whose weights are in `model/`; 0: there is no model.
        metrics: of that model.
        warnings: see the top of this module.
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
    fitted = _FittedDecisions(attempt.plan.recipe, data)
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
            _write_predictions(data, "eval", trainer.logits, run.predictions)
            fitted.fit(trainer.logits, labels)
    if "test" in data.splits:
        rows = trainer.get_eval_dataloader(Rows(data.splits["test"]))
        output = trainer.evaluation_loop(rows, "Test", metric_key_prefix="test")
        if attempt.rank == 0:
            metrics |= output.metrics
            _write_predictions(data, "test", output.predictions, run.predictions_of("test"))
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


def simple_models(attempt: Attempt, results: Results) -> Results:
    """The results beside those of simple models (`afina.worker.inference.simple_models`), which processes of their own train. A failure, a stop or too
    little time leaves one out, and the log says so: the run finishes as it is."""
    if attempt.data.task == "token-classification":
        say("no simple models beside this one: they label texts, not words")
        return results
    if not attempt.plan.recipe.baselines or not {"eval", "test"} & attempt.data.splits.keys():
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


def check_predictions(
    task: str, names: Sequence[str] | None, best_metric: str, logits: Array, labels: Array, metrics: Mapping[str, Any]
) -> list[str]:
    """Warnings about the predictions of eval.

    Args:
        names: of the labels; None for regression.
        logits, labels: of all rows, (N, K), and (N,) or (N, K).
        metrics: of the model, by name without prefix.
    """
    reasons = metrics.get("undefined", {})
    undefined = [name for name, value in metrics.items() if value is None]
    warnings = [f"eval_{name} is not defined: {reasons.get(name, 'it has no value')}" for name in undefined]
    if task == "token-classification":
        if labels.any() and not decisions(task, logits).any():
            warnings.append("the model finds no entity in eval: train longer, or with a higher train.learning_rate")
        return warnings
    if len(labels) < 2 or not np.ptp(labels, axis=0).any():
        return [*warnings, "all rows of eval have the same label: nothing can be measured on them"]
    predictions = _as_predictions(task, names, labels, logits, logits)
    return [*warnings, *(f"the model {reason}" for reason in weaknesses(predictions, best_metric))]


def _as_predictions(
    task: str, names: Sequence[str] | None, labels: Array, scaled: Array, shifted: Array
) -> Predictions:
    """Predictions without their texts.

    Args:
        scaled, shifted: logits (N, K) of the probabilities and of the decisions, see `DecisionRule`.
    """
    kind: Any = {"single-label": np.int64, "multi-label": bool, "regression": np.float64}[task]
    truth, predicted = labels.astype(kind), decisions(task, shifted).astype(kind)
    known = None if task == "regression" else probabilities(task, scaled)
    return Predictions(task, tuple(names or ()), truth, predicted, known, None)


class _FittedDecisions:
    """The rule that the recipe's `decisions` ask for, and its record; neither without them.

    Attributes:
        rule: fitted on eval.
        record: as in `Outcome`.
    """

    def __init__(self, recipe: Recipe, data: TrainingData) -> None:
        self._asked, self._data = recipe.decisions, data
        metrics = [data.best_metric, *METRICS[data.task][:2], *(recipe.metrics or ())]
        known = set(METRICS[data.task]) - set(NEED_SCORES)
        self._metrics = [name for name in dict.fromkeys(metrics) if name in known]
        self.rule: DecisionRule | None = None
        self.record: dict[str, Any] = {}

    def fit(self, logits: Array, labels: Array) -> None:
        """Fit on eval; without a test split measure there too, each fifth of the rows by a rule that was fitted on the others."""
        asked, task, names = self._asked, self._data.task, self._data.labels
        if asked is None or names is None:
            return
        keys: Any = {"temperature": asked.temperature, "thresholds": asked.thresholds != "none"}
        self.rule = rule = fit_rule(task, names, logits, labels, **keys)
        temperature = rule.temperature if rule.temperature != 1 else None
        thresholds = rule.named_thresholds(names)
        self.record = {"temperature": temperature, "thresholds": thresholds, "notes": list(rule.notes)}
        if "test" not in self._data.splits and rule.changes:
            self._effects(logits, labels, *cross_fitted(task, names, logits, labels, **keys), split="eval")

    def measure(self, logits: Array, labels: Array) -> None:
        """Changes by the rule on the rows of test."""
        if self.rule is not None and self.rule.changes:
            self._effects(logits, labels, self.rule.scaled(logits), self.rule.shifted(logits), split="test")

    def _effects(self, logits: Array, labels: Array, scaled: Array, shifted: Array, *, split: str) -> None:
        asked, task, names = self._asked, self._data.task, self._data.labels
        assert asked is not None
        plain, ruled = (_as_predictions(task, names, labels, *of) for of in ((logits, logits), (scaled, shifted)))
        self.record |= {"measured_on": split, "cross_fitted": split == "eval"}
        try:
            metrics = self._metrics if asked.thresholds != "none" else []
            self.record |= effects(plain, ruled, metrics, temperature=asked.temperature)
        except DataError as error:  # too many rows of too many labels
            self.record["notes"].append(f"not measured: {error.message}")


def check_loss_curve(loss: Loss, train: Split, logged: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning where the training loss diverged.

    Args:
        logged: the lines of the metrics log.
    """
    losses = np.array([line["loss"] for line in logged if "loss" in line])
    if len(losses) < 2:
        return []
    tenths = np.array([part.mean() for part in np.array_split(losses, min(10, len(losses)))])
    last, lowest = float(tenths[-1]), float(tenths.min())
    every = slice(None, None, max(1, len(train.labels) // _ROWS))
    labels = np.asarray(train.labels[every])
    weights = None if train.loss_weights is None else np.asarray(train.loss_weights[every])
    informed = _informed_logits(loss, labels)
    untrained, knowing = (
        loss.mean(loss.of_rows(np.repeat(logits[None], len(labels), 0), labels), labels, weights)
        for logits in (np.zeros_like(informed), informed)
    )
    if last > 1.2 * untrained or (last > 2 * lowest and last > 0.95 * knowing):
        return [
            f"the training loss diverged: {last:.4g} at the end, {lowest:.4g} at its lowest, {untrained:.4g} for a model "
            "that knows nothing; lower train.learning_rate"
        ]
    return []


def _informed_logits(loss: Loss, labels: Array) -> Array:
    """Logits (K,) of a model that knows only how frequent the labels are."""
    if loss.task == "regression":
        return np.array([labels.mean()], np.float32)
    if loss.task == "multi-label":
        share = np.clip((labels > 0).mean(0), 1e-6, 1 - 1e-6)
        return np.asarray(np.log(share / (1 - share)), np.float32)
    classes = 0 if loss.label_weights is None else len(loss.label_weights)
    return np.asarray(np.log(np.maximum(np.bincount(labels, minlength=classes), 1e-3)), np.float32)


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


def _write_predictions(data: TrainingData, part: str, logits: Array, path: Path) -> None:
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
