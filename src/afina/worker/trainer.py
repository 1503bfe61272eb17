"""`transformers.Trainer` with afina's batches, checkpoints, evaluation and moment to stop.

Trainer keeps what it is good at: optimizer, schedule, mixed precision, gradient clipping, DDP through accelerate. What is
replaced: the order of batches (`worker.batches`), the loss (summed and divided by the examples of the *global* step, so
that uneven last steps are exact on any number of processes), evaluation (sorted by length, results in input order,
identical batches on any number of processes) and saving (`worker.checkpoint`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_callback import (
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import EvalLoopOutput

from afina import __version__
from afina.errors import EnvironmentProblem
from afina.plan import Geometry, Plan
from afina.rundir import RunDir
from afina.worker import checkpoint as checkpoints
from afina.worker.batches import Collator, EvalBatches, Rows, StepBatches
from afina.worker.flow import Flow, Progress, evaluates_at, steps_per_epoch, truncate_lines
from afina.worker.store import Split
from afina.worker.tasks import TASKS, compute_metrics, per_example_loss

__all__ = ["RunTrainer", "build_arguments", "build_model"]

_PROGRESS = "progress.json"


def build_arguments(plan: Plan, geometry: Geometry, run: RunDir, best: str, task: str) -> TrainingArguments:
    """TrainingArguments of the plan. Where no GPU can be used the CPU is taken, with gloo between processes."""
    train = plan.recipe.train
    cpu = not torch.cuda.is_available()
    return TrainingArguments(
        **{
            # What the recipe may overrule.
            "lr_scheduler_type": "linear",
            "dataloader_pin_memory": not cpu,
            "logging_first_step": False,
            **train.arguments,
            # What the recipe's own keys, or afina, decide.
            "output_dir": str(run.path / "trainer"),
            "per_device_train_batch_size": geometry.batch_per_device,
            "per_device_eval_batch_size": _eval_batch(plan, geometry),
            "gradient_accumulation_steps": geometry.accumulation,
            "num_train_epochs": train.num_epochs,
            "max_steps": train.max_steps or -1,
            "learning_rate": train.learning_rate,
            "seed": train.seed,
            # The flow is decided by `worker.flow`; these only have to be consistent with each other.
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "steps",
            "logging_steps": train.log_every,
            "logging_nan_inf_filter": False,
            "metric_for_best_model": best,
            "greater_is_better": best not in TASKS[task].lower_is_better,
            "load_best_model_at_end": False,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "average_tokens_across_devices": True,
            "use_cpu": cpu,
            **({"ddp_backend": "gloo"} if cpu and geometry.num_processes > 1 else {}),
        }
    )


def _eval_batch(plan: Plan, geometry: Geometry) -> int:
    return plan.recipe.train.eval_batch_size or max(32, geometry.batch_per_device)


def build_model(plan: Plan, folder: str, task: str, labels: list[str] | None, num_labels: int) -> Any:
    """The pretrained model with a head for the task, in float32, the label names in its config."""
    names = labels or [f"LABEL_{i}" for i in range(num_labels)]
    return AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=num_labels,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=TASKS[task].problem_type,
        dtype=torch.float32,  # the default takes the checkpoint's dtype: a bf16 one would train in pure bf16
        ignore_mismatched_sizes=True,  # a head for other labels is replaced
        trust_remote_code=plan.recipe.trust_remote_code,
    )


@dataclass
class Clock:
    """Seconds and examples of training proper, over all attempts: evaluations and saves are left out."""

    seconds: float = 0.0
    examples: int = 0
    _since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None


class RunTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for one run directory.

    Attributes:
        stopped: the run was asked to stop and left a checkpoint.
        clock: training time and examples.
        model_step: the step whose weights `model/` holds.
    """

    control: TrainerControl

    def __init__(
        self,
        *,
        run: RunDir,
        attempt: str,
        plan: Plan,
        geometry: Geometry,
        task: str,
        labels: list[str] | None,
        metric_names: list[str],
        pad_token_id: int,
        splits: dict[str, Split],
        stop: Any,
        **trainer: Any,
    ) -> None:
        self.run, self.attempt, self.plan, self.geometry, self.task, self.labels = (
            run,
            attempt,
            plan,
            geometry,
            task,
            labels,
        )
        self.metric_names, self.pad_token_id, self.splits = metric_names, pad_token_id, splits
        self.stop_request = stop
        self.stopped = False
        self.clock = Clock()
        self.model_step = 0
        self._logits: dict[int, np.ndarray[Any, Any]] = {}
        self._checkpoint: Path | None = None
        super().__init__(
            **trainer,
            train_dataset=Rows(splits["train"]),
            eval_dataset=Rows(splits["eval"]) if "eval" in splits else None,
            data_collator=lambda rows: rows,
            compute_loss_func=self._loss,
            compute_metrics=lambda _: {},
        )
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = pad_token_id
        for callback in (DefaultFlowCallback, ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(Flow(self))
        if self.args.process_index == 0:
            self.add_callback(Progress())

    @property
    def rank(self) -> int:
        return int(self.args.process_index)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        train = self.plan.recipe.train
        return train.max_steps or math.ceil(train.num_epochs * steps_per_epoch(self))

    # Batches and loss

    def _collator(self, split: Split) -> Collator:
        tokens = self.plan.recipe.tokens
        return Collator(split, self.pad_token_id, tokens.max_length if tokens.batching == "padded" else None)

    def get_train_dataloader(self) -> DataLoader[Any]:
        split = self.splits["train"]
        sampler = StepBatches(
            split.lengths, self.geometry, self.rank, self.plan.recipe.train.seed, self.plan.recipe.tokens.batching
        )
        return DataLoader(
            Rows(split),
            batch_sampler=sampler,
            collate_fn=self._collator(split),
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        split = (eval_dataset or self.eval_dataset).split
        batches = EvalBatches(
            split.lengths, self.args.per_device_eval_batch_size, self.rank, self.geometry.num_processes
        )
        collate = self._collator(split)
        return DataLoader(Rows(split), batch_sampler=batches, collate_fn=lambda rows: (rows, collate(rows)))

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.geometry.global_batch

    def _loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Sum over this rank's examples / examples of the global step (Trainer multiplies by the ranks that DDP averages over)."""
        each = TASKS[self.task].loss(outputs["logits"], labels)
        width = labels.shape[-1] if labels.ndim > 1 else 1
        loss: torch.Tensor = each.mean() if num_items_in_batch is None else each.sum() / (num_items_in_batch / width)
        return loss

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Logits of every row on every rank, in input order; loss in float64 over rows; the recipe's metrics."""
        split: Split = dataloader.dataset.split  # type: ignore[attr-defined]
        self.model.eval()
        mine: list[tuple[list[int], np.ndarray[Any, Any]]] = []
        self.callback_handler.eval_dataloader = dataloader
        with torch.inference_mode():
            for rows, inputs in dataloader:
                inputs.pop("labels")
                logits = self.model(**self._prepare_inputs(inputs))["logits"]
                mine.append((rows, logits.float().cpu().numpy()))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        everyone: list[Any] = [mine]
        if self.geometry.num_processes > 1:
            everyone = [None] * self.geometry.num_processes
            dist.all_gather_object(everyone, mine)
        logits_all = np.empty((len(split), self.model.config.num_labels), np.float32)
        for shares in everyone:
            for rows, logits in shares:
                logits_all[rows] = logits
        labels = np.asarray(split.labels)
        metrics = {"loss": float(per_example_loss(self.task, logits_all, labels).mean())}
        metrics |= compute_metrics(self.task, self.metric_names, logits_all, labels, self.model.config.num_labels)
        self._logits = {self.state.global_step: logits_all}
        prefixed = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        return EvalLoopOutput(predictions=logits_all, label_ids=labels, metrics=prefixed, num_samples=len(split))

    def evaluate_now(self) -> None:
        """Evaluate, remember the best step."""
        metrics = self._evaluate(None, None)
        self._determine_best_metric(metrics=metrics, trial=None)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = bool(super()._determine_best_metric(metrics=metrics, trial=trial))
        if better and self.plan.recipe.train.keep == "best":
            self.control.should_save = True  # an evaluation need not fall on a step that is saved anyway
        return better

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.perf_counter()
        step = self.state.global_step
        staging = self.run.checkpoints / f".staging-{step}"
        if self.rank == 0:
            checkpoints.stage(self.run.checkpoints, step)
        self._barrier()
        self.save_model(str(staging), _internal_call=True)
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        if self._evaluation_due():
            # The draw that iterating over the evaluation's DataLoader would have made before this checkpoint.
            torch.empty((), dtype=torch.int64).random_()
        self._save_rng_state(str(staging))
        # The part of the logged loss that has been summed up on this rank since the last log line.
        torch.save(
            {"tr_loss": self._tr_loss.detach().cpu(), "last_logged": self._globalstep_last_logged},
            staging / f"loss_{self.rank}.pt",
        )
        if self.rank == 0:
            self.state.stateful_callbacks = {}
            self.state.save_to_json(str(staging / "trainer_state.json"))
            progress = {
                "seconds": self.clock.seconds,
                "examples": self.clock.examples,
                "evaluation_due": self._evaluation_due(),
                "metrics_lines": self._metrics_lines(),
            }
            (staging / _PROGRESS).write_text(json.dumps(progress))
        self._barrier()
        if self.rank == 0:
            about = {
                "world_size": self.geometry.num_processes,
                "geometry": self.geometry.model_dump(),
                "plan": self.plan.digest,
                "versions": {
                    "afina": __version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
            self._checkpoint = checkpoints.commit(staging, step, about)
            keep_best = self.state.best_global_step if self.plan.recipe.train.keep == "best" else None
            checkpoints.rotate(self.run.checkpoints, self.plan.recipe.train.keep_checkpoints, keep_best)
            size = sum(f["size"] for f in checkpoints.manifest(self._checkpoint)["files"].values())
            self.run.event(
                "checkpoint", attempt=self.attempt, step=step, seconds=round(time.perf_counter() - began, 3), bytes=size
            )
        self._barrier()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            for name in ("optimizer.pt", "scheduler.pt"):
                if not (Path(checkpoint) / name).is_file():
                    raise EnvironmentProblem(
                        f"{checkpoint}: {name} is missing", "resume from another checkpoint: move this folder away"
                    )
        super()._load_optimizer_and_scheduler(checkpoint)

    def restore(self, folder: Path) -> None:
        """Take over a checkpoint of the last step: nothing is left to train, only to conclude."""
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self._load_weights(folder)
        self.resumed_from(folder)

    def resumed_from(self, folder: Path) -> None:
        """Take over what Trainer does not restore: loss since the last log line, training time, evaluation due."""
        progress = json.loads((folder / _PROGRESS).read_text())
        self.clock.seconds, self.clock.examples = progress["seconds"], progress["examples"]
        world = checkpoints.manifest(folder)["world_size"]
        parts = [torch.load(folder / f"loss_{r}.pt", weights_only=True) for r in range(world)]
        same = world == self.geometry.num_processes
        share = parts[self.rank]["tr_loss"] if same else sum(p["tr_loss"] for p in parts) / world
        self._tr_loss = share.to(self.args.device)
        self._globalstep_last_logged = parts[0]["last_logged"]
        if self.rank == 0:
            truncate_lines(self.run.metrics_file, progress["metrics_lines"])
            if not same:
                print(
                    f"afina: {world} processes made this checkpoint, {self.geometry.num_processes} resume it: same data, other dropout masks",
                    flush=True,
                )
        self._barrier()
        if progress["evaluation_due"]:
            self.evaluate_now()

    def _metrics_lines(self) -> int:
        return sum(1 for _ in self.run.lines("metrics.jsonl"))

    def _evaluation_due(self) -> bool:
        """A stop fell on the last step of an epoch (or of an interval) and its evaluation was left to the resumed run."""
        return self.stopped and evaluates_at(self, self.state.global_step)

    def _barrier(self) -> None:
        if self.geometry.num_processes > 1:
            dist.barrier()

    # The end

    def conclude(self) -> dict[str, Any]:
        """Choose the best or last weights, write `model/` and `predictions.parquet`; returns the metrics of that model."""
        step = self.state.global_step
        best = self.state.best_global_step
        self.model_step = best if self.plan.recipe.train.keep == "best" and best else step
        if self.model_step != step:
            self._load_weights(self.run.checkpoints / f"step-{self.model_step}")
        metrics: dict[str, Any] = {}
        if self.eval_dataset is not None:
            if self.model_step not in self._logits:
                self.evaluation_loop(self.get_eval_dataloader(), "Prediction")
                self._logits = {self.model_step: next(iter(self._logits.values()))}
            logits = self._logits[self.model_step]
            labels = np.asarray(self.splits["eval"].labels)
            metrics["eval_loss"] = float(per_example_loss(self.task, logits, labels).mean())
            metrics |= {
                f"eval_{k}": v
                for k, v in compute_metrics(
                    self.task, self.metric_names, logits, labels, self.model.config.num_labels
                ).items()
            }
            if self.rank == 0:
                self._write_predictions("eval", logits, self.run.predictions)
        if "test" in self.splits:
            output = self.evaluation_loop(
                self.get_eval_dataloader(Rows(self.splits["test"])), "Test", metric_key_prefix="test"
            )
            metrics |= output.metrics
            if self.rank == 0:
                self._write_predictions("test", output.predictions, self.run.path / "predictions_test.parquet")
        if self.rank == 0:
            self._export()
            shutil.rmtree(self.run.path / "trainer", ignore_errors=True)
        self._barrier()
        return metrics

    def _load_weights(self, folder: Path) -> None:
        wrong = checkpoints.damage(folder)
        if wrong:
            raise EnvironmentProblem(
                f"{folder}: the best checkpoint is damaged: {wrong}",
                "set `--set train.keep=last` in a new run, or restore the folder",
            )
        self._load_from_checkpoint(str(folder))

    def _export(self) -> None:
        staging = self.run.path / ".model.staging"
        shutil.rmtree(staging, ignore_errors=True)
        self.model.save_pretrained(staging)
        self.processing_class.save_pretrained(staging)
        if self.run.model.exists():
            shutil.rmtree(self.run.model)
        staging.rename(self.run.model)

    def _write_predictions(self, part: str, logits: np.ndarray[Any, Any], path: Path) -> None:
        """One row per example in input order: row, file, (id,) text, label, prediction, and a column of scores per label."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(Path(self.run.prepared()["prepared"]) / f"{part}.rows.parquet")
        labels = np.asarray(self.splits[part].labels)
        decided = TASKS[self.task].decide(logits)
        if self.task == "regression":
            columns: dict[str, Any] = {"label": labels, "prediction": decided}
        else:
            assert self.labels is not None
            names = np.array(self.labels, dtype=object)
            if self.task == "single-label":
                shifted = np.exp(logits - logits.max(-1, keepdims=True))
                scores = shifted / shifted.sum(-1, keepdims=True)
                columns = {"label": names[labels].tolist(), "prediction": names[decided].tolist()}
            else:
                scores = 1 / (1 + np.exp(-logits))
                columns = {
                    "label": [names[row > 0].tolist() for row in labels],
                    "prediction": [names[row > 0].tolist() for row in decided],
                }
            columns |= {f"score: {name}": scores[:, i] for i, name in enumerate(self.labels)}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values))
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(table, aside)
        os.replace(aside, path)
