"""`transformers.Trainer` with afina's batches, checkpoints, evaluation and moment to stop.

Trainer keeps what it is good at: optimizer, schedule, mixed precision, gradient clipping, DDP through accelerate. What is
replaced: the order of batches (`worker.batches`), the loss (summed and divided by the examples of the *global* step, so
that uneven last steps are exact on any number of processes), evaluation (sorted by length, results in input order,
identical batches on any number of processes) and saving (`worker.checkpoint`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
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
from afina.worker import dropout, memory, packed
from afina.worker.batches import TOKENS_PER_ROW, Collator, EvalBatches, PackedCollator, Rows, StepBatches
from afina.worker.flow import Flow, Progress, agree, evaluates_at, steps_per_epoch, stop_cause, truncate
from afina.worker.lease import Lease
from afina.worker.preflight import state_bytes
from afina.worker.state import (
    PROGRESS,
    RANKS,
    Saver,
    Snapshot,
    copied,
    random_state,
    read_progress,
    set_random_state,
)
from afina.worker.store import Split
from afina.worker.tasks import TASKS, compute_metrics, per_example_loss
from afina.worker.watch import CAUSES, StepTimes, StopRequest, Watchdog

__all__ = ["EvaluationAbandoned", "RunTrainer", "build_arguments", "build_model"]


class EvaluationAbandoned(Exception):
    """A stop was asked for during an evaluation; the next attempt makes it."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


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
        **packed.attention_dropout(plan.recipe, folder),
    )


@dataclass
class Clock:
    """Seconds and examples of training proper, over all attempts: evaluations and saves are left out."""

    seconds: float = 0.0
    examples: int = 0
    _since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def start_if_stopped(self) -> None:
        if self._since is None:
            self.start()

    def stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None


class RunTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for one run directory.

    Attributes:
        stopped: why the run was asked to stop (`watch.CAUSES`); it left a checkpoint. Empty: it was not.
        abandoned: the stop fell into an evaluation.
        clock: training time and examples.
        logits, evaluated_step: of the last evaluation, (N, K) float32 in input order.
        model_step: the step whose weights `model/` holds.
        batching: how batches are made: the recipe's word, or what the model can take.
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
        stop: StopRequest,
        lease: Lease,
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
        self.stop_request, self.lease = stop, lease
        self.stopped = ""
        self.abandoned = False
        self.clock = Clock()
        self.times = StepTimes()
        self.model_step = 0
        self.logits = np.empty((0, 0), np.float32)
        self.evaluated_step: int | None = None
        train = plan.recipe.train
        self.saver = Saver(
            run.checkpoints,
            train.keep_checkpoints,
            run.metrics_file,
            lambda **about: run.event("checkpoint", attempt=attempt, **about),
        )
        super().__init__(
            **trainer,
            train_dataset=Rows(splits["train"]),
            eval_dataset=Rows(splits["eval"]) if "eval" in splits else None,
            data_collator=lambda rows: rows,
            compute_loss_func=self._loss,
            compute_metrics=lambda _: {},
        )
        if self.args.device.type == "cpu":
            memory.keep_freed()
        dropout.seed(train.seed, self.rank)
        self.batching, notes = packed.prepare(self.model, plan.recipe, self.args)
        for note in notes if self.rank == 0 else ():
            print(f"afina: {note}", flush=True)
        self.watchdog = Watchdog(run, attempt, self.rank, train.stall_minutes, lambda: self.times.usual)
        self.state_bytes = state_bytes(self.model)
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

    def _collator(self, split: Split) -> Collator | PackedCollator:
        if self.batching == "packed":
            config = self.model.config
            offset = packed.PROVEN[config.model_type].offset
            return PackedCollator(
                split,
                self.model.base_model.embeddings.padding_idx if offset else self.pad_token_id,
                config.num_attention_heads,
                offset,
                self.args.device.type,
            )
        longest = self.plan.recipe.tokens.max_length
        return Collator(split, self.pad_token_id, longest if self.batching == "padded" else None)

    def get_train_dataloader(self) -> DataLoader[Any]:
        split = self.splits["train"]
        sampler = StepBatches(
            split.lengths,
            self.geometry,
            self.rank,
            self.plan.recipe.train.seed,
            self.batching,
            getattr(self.model.config, "hidden_size", 768),
        )
        return DataLoader(
            Rows(split),
            batch_sampler=sampler,
            collate_fn=self._collator(split),
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        split = (eval_dataset or self.eval_dataset).split
        size = self.args.per_device_eval_batch_size
        max_tokens = size * TOKENS_PER_ROW if self.batching == "packed" else None
        batches = EvalBatches(split.lengths, size, self.rank, self.geometry.num_processes, max_tokens)
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
        batches = iter(dataloader)
        with torch.inference_mode():
            for number in range(dataloader.batch_sampler.most):  # type: ignore[union-attr]
                for rows, inputs in itertools.islice(batches, 1):  # none where the other ranks have one more
                    inputs.pop("labels")
                    logits = self.model(**self._prepare_inputs(inputs))["logits"]
                    mine.append((rows, logits.float().cpu().numpy()))
                    self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                self.watchdog.beat(f"batch {number + 1} of an evaluation")
                if self.is_in_train and (cause := agree(self, stop_cause(self))[0]):
                    raise EvaluationAbandoned(CAUSES[cause])
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
        self.logits, self.evaluated_step = logits_all, self.state.global_step
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

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*arguments, **named)
        except EvaluationAbandoned as stop:
            self.stopped, self.abandoned = stop.cause, True
            self.control.should_training_stop = True
            self._save_checkpoint(None, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy the state; rank 0 writes it beside the training. Waits for the disk only at a stop."""
        began, step = time.monotonic(), self.state.global_step
        due = bool(self.stopped) and evaluates_at(self, step)
        if due and not self.abandoned:
            # The draw that iterating over the evaluation's DataLoader would have made before this checkpoint.
            torch.empty((), dtype=torch.int64).random_()
        mine = {
            "random": random_state(),
            # The part of the logged loss that has been summed up on this rank since the last log line.
            "loss": float(self._tr_loss),
            "logged": self._globalstep_last_logged,
        }
        ranks: list[Any] = [mine]
        if self.geometry.num_processes > 1:
            ranks = [None] * self.geometry.num_processes
            dist.all_gather_object(ranks, mine)
        if self.rank == 0:
            self.saver.finish()
            self.saver.begin(self._snapshot(step, ranks, due), time.monotonic() - began)
        self.watchdog.beat(f"the save of step {step}")
        if self.stopped:
            self.saver.finish()
            self.barrier()

    def _snapshot(self, step: int, ranks: list[Any], evaluation_due: bool) -> Snapshot:
        memory: dict[Any, torch.Tensor] = {}
        scaler = getattr(self.accelerator, "scaler", None)
        log = self.run.metrics_file
        progress = {
            "seconds": self.clock.seconds,
            "examples": self.clock.examples,
            "evaluation_due": evaluation_due,
            "metrics_bytes": log.stat().st_size if log.exists() else 0,
        }
        state = dataclasses.asdict(self.state) | {"log_history": [], "stateful_callbacks": {}}
        model = self.accelerator.unwrap_model(self.model)
        return Snapshot(
            step=step,
            model=lambda folder, weights: model.save_pretrained(folder, state_dict=weights),
            weights=copied(model.state_dict(), memory),
            tensors={
                "optimizer.pt": copied(self.optimizer.state_dict(), memory),
                "scheduler.pt": copied(self.lr_scheduler.state_dict(), memory),
                **({"scaler.pt": copied(scaler.state_dict(), memory)} if scaler is not None else {}),
                RANKS: ranks,
            },
            texts={"trainer_state.json": json.dumps(state), PROGRESS: json.dumps(progress)},
            about={
                "world_size": self.geometry.num_processes,
                "geometry": self.geometry.model_dump(),
                "plan": self.plan.digest,
                "versions": {
                    "afina": __version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            },
            protected=self.state.best_global_step if self.plan.recipe.train.keep == "best" else None,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            for name in ("optimizer.pt", "scheduler.pt", *(["scaler.pt"] if self.accelerator.scaler else [])):
                if not (Path(checkpoint) / name).is_file():
                    raise EnvironmentProblem(
                        f"{checkpoint}: {name} is missing", "resume from another checkpoint: move this folder away"
                    )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        ranks = torch.load(Path(checkpoint) / RANKS, weights_only=True)
        if len(ranks) == self.geometry.num_processes:
            set_random_state(ranks[self.rank]["random"])
        else:
            seed = self.args.seed + 1_000_003 * self.state.global_step
            transformers.set_seed(seed + self.rank)
            dropout.seed(seed, self.rank)

    def restore(self, folder: Path) -> None:
        """Take over a checkpoint of the last step: nothing is left to train, only to conclude."""
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.load_weights(folder)
        self.resumed_from(folder)

    def resumed_from(self, folder: Path) -> None:
        """Take over what Trainer does not restore: loss since the last log line, training time, evaluation due."""
        progress = read_progress(folder)
        self.clock.seconds, self.clock.examples = progress["seconds"], progress["examples"]
        ranks = torch.load(folder / RANKS, weights_only=True)
        same = len(ranks) == self.geometry.num_processes
        share = ranks[self.rank]["loss"] if same else sum(r["loss"] for r in ranks) / len(ranks)
        self._tr_loss = torch.tensor(share, device=self.args.device)
        self._globalstep_last_logged = ranks[0]["logged"]
        if self.rank == 0:
            log, expected = self.run.metrics_file, progress["metrics_bytes"]
            if (size := log.stat().st_size if log.exists() else 0) < expected:
                print(f"afina: WARNING: {log} has {size} bytes, {expected} were written: lines are missing", flush=True)
            truncate(log, expected)
            if not same:
                print(
                    f"afina: {len(ranks)} processes made this checkpoint, {self.geometry.num_processes} resume it: same data, other dropout masks",
                    flush=True,
                )
        self.barrier()
        if progress["evaluation_due"]:
            self.evaluate_now()

    def barrier(self) -> None:
        if self.geometry.num_processes > 1:
            dist.barrier()

    def load_weights(self, folder: Path) -> None:
        wrong = checkpoints.damage(folder)
        if wrong:
            raise EnvironmentProblem(
                f"{folder}: the best checkpoint is damaged: {wrong}",
                "set `--set train.keep=last` in a new run, or restore the folder",
            )
        self._load_from_checkpoint(str(folder))
