"""`transformers.Trainer` with afina's batches, checkpoints, evaluation and moment to stop.

Trainer keeps what it is good at: optimizer, schedule, mixed precision, gradient clipping, DDP through accelerate. What is
replaced: the order of batches (`afina.worker.compute.batches`), the loss (summed and divided by the examples of the *global* step, so
that uneven last steps are exact on any number of processes), evaluation (`afina.worker.training.evaluation`) and saving (`afina.worker.survival.checkpoint`).
What Trainer counts anew in every step, and the plan knows, is not counted: examples (by a collective) and parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import (
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import EvalLoopOutput

from afina.errors import EnvironmentProblem
from afina.run.directory import RunDir
from afina.run.plan import Geometry, Plan
from afina.version import __version__
from afina.worker.compute import allocator as memory
from afina.worker.compute import cuda_graphs, dropout, packed_model, precision
from afina.worker.compute.batches import TOKENS_PER_ROW, Collator, EvalBatches, PackedCollator, Rows, StepBatches
from afina.worker.compute.flops import Peak, device_peak, forward_flops
from afina.worker.data.prepared import Split
from afina.worker.model.tasks import TASKS
from afina.worker.survival import checkpoint as checkpoints
from afina.worker.survival.lease import Lease
from afina.worker.survival.preflight import state_bytes
from afina.worker.survival.snapshot import (
    PROGRESS,
    RANKS,
    Saver,
    Snapshot,
    copied,
    random_state,
    read_progress,
    set_random_state,
)
from afina.worker.survival.stop import StepTimes, StopRequest, Watchdog
from afina.worker.training.control import Flow, agree, truncate
from afina.worker.training.evaluation import EvaluationAbandoned, logits_of, on_every_rank, scores
from afina.worker.training.meter import Meter, Work, launched, peak_memory_bytes
from afina.worker.training.live_progress import Pace

__all__ = ["RunTrainer"]


class RunTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for one run directory.

    Attributes:
        stopped: why the run was asked to stop (`watch.CAUSES`); it left a checkpoint. Empty: it was not.
        abandoned: the stop fell into an evaluation.
        meter: where the time went, and what was done in it.
        logits, evaluated_step: of the last evaluation, (N, K) float32 in input order; logits on rank 0 only.
        began_at: the step that this attempt began at.
        model_step: the step whose weights `model/` holds.
        batching: how batches are made: the recipe's word, or what the model can take.
        choice: the precision that training computes in; on a CPU evaluations are in float32 whatever they are, so that what
            the run records of its model is what everybody else computes with it.
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
        choice: precision.PrecisionChoice,
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
        self.choice = choice
        rows = {part: len(split) for part, split in splits.items()}
        self.schedule = plan.recipe.train.schedule(rows["train"], rows.get("eval", 0))
        self.stopped = ""
        self.abandoned = False
        self.meter = Meter(launched(run.attempts / attempt))
        self.times = StepTimes()
        self.began_at = self.model_step = 0
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
            memory.tune_malloc()
        dropout.seed(train.seed, self.rank)
        self.batching, notes = packed_model.configure(self.model, plan.recipe, self.args)
        self.recorded = self._recorded(notes)
        for note in notes if self.rank == 0 else ():
            print(f"afina: {note}", flush=True)
        self.watchdog = Watchdog(run, attempt, self.rank, train.stall_minutes, lambda: self.times.usual)
        self.state_bytes = state_bytes(self.model)
        split = splits["train"]
        self.work = Work(
            lengths := split.lengths,
            forward_flops(self.model.config, lengths, self.model.num_parameters(exclude_embeddings=True)),
            self.schedule,
            train.seed,
            self.batching,
        )
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = pad_token_id
        for callback in (DefaultFlowCallback, ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(Flow(self))
        if self.args.process_index == 0:
            self.add_callback(Pace(self))

    @property
    def rank(self) -> int:
        return int(self.args.process_index)

    # Batches and loss

    def _collator(self, split: Split) -> Collator | PackedCollator:
        if self.batching == "packed":
            config = self.model.config
            offset = packed_model.PROVEN[config.model_type].offset
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
        loss: torch.Tensor = each.mean() if num_items_in_batch is None else each.sum() / num_items_in_batch
        return loss

    # Steps

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        with self.meter.within("input"):
            found = super().get_batch_samples(*arguments, **named)
            self.meter.saw(found[0])
        return found

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Examples of the step over all ranks: the plan knows them, Trainer would gather them."""
        return torch.tensor(self.schedule.examples_of(self.state.global_step + 1), device=device)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack: contextlib.ExitStack = super().compute_loss_context_manager()
        if self.choice.bf16_on_cpu:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        return stack

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self.meter.enter("forward_backward")
        if self.recorded is not None:
            return self._replay(self.recorded, *arguments, **named)
        loss: torch.Tensor = super().training_step(*arguments, **named)
        if self.args.device.type == "cpu":
            self.meter.enter("optimizer")
        return loss

    def _recorded(self, notes: list[str]) -> cuda_graphs.GraphedStep | None:
        """The graphed step if the recipe asks for it and it is supported; adds a note for the log, also where it may pay."""
        wanted, arguments = self.plan.recipe.train.cuda_graphs, self.args
        why = cuda_graphs.why_not_graphed(
            self.model,
            self.batching,
            self.geometry.num_processes,
            bf16=arguments.bf16,
            checkpointing=packed_model.checkpoints_activations(arguments),
        )
        if why is not None or not wanted:
            if wanted:
                notes.append(f"steps are not recorded as CUDA graphs: {why}")
            elif why is None:
                notes.append("train.cuda_graphs: true may make steps of small batches several times faster here")
            return None
        notes.append("steps are recorded as CUDA graphs, one for each width of a batch")
        usual = super().training_step
        return cuda_graphs.GraphedStep(
            lambda batch, items: usual(self.model_wrapped, batch, items),
            self.model,
            self.geometry.batch_per_device,
            self.plan.recipe.tokens.max_length,
        )

    def _replay(
        self, recorded: cuda_graphs.GraphedStep, model: Any, batch: dict[str, Any], num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        before, widths, reason = recorded.padding_tokens, len(recorded.seconds), recorded.fallback_reason
        loss = recorded(self._prepare_inputs(batch), num_items_in_batch)
        self.meter.computed += recorded.padding_tokens - before
        if len(recorded.seconds) > widths:
            width, seconds = list(recorded.seconds.items())[-1]
            self.run.event("recorded", attempt=self.attempt, width=width, seconds=round(seconds, 3))
        if recorded.fallback_reason != reason:
            print(f"afina: steps are not recorded as CUDA graphs: {recorded.fallback_reason}", flush=True)
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's estimate walks through all parameters, for a number that is not used; see `afina.worker.compute.flops`

    def find_peak(self) -> None:
        """Measure what the processes' devices could do, all of them at the same moment; the best time counts. Collective."""
        arguments = self.args
        self.barrier()
        mine = device_peak(arguments.device, precision.matmul_dtype(self.choice, arguments))
        ranks = self.geometry.num_processes
        if ranks > 1:
            total = torch.tensor(mine.flops, dtype=torch.float64, device=arguments.device)
            dist.all_reduce(total)
            mine = Peak(float(total), f"{mine.source}; the sum of {ranks} processes")
        if self.meter.peak is None or self.meter.peak.flops < mine.flops:
            self.meter.peak = mine

    def agree_on_memory(self) -> None:
        """The most memory that any rank has used. Collective."""
        self.meter.memory_bytes = agree(self, max(self.meter.memory_bytes, peak_memory_bytes()))[0]

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Logits of every row on rank 0, in input order; the loss and the recipe's metrics on every rank."""
        split: Split = dataloader.dataset.split  # type: ignore[attr-defined]
        labels = np.asarray(split.labels)
        with self.meter.within("evaluation"):
            logits = logits_of(self, dataloader)
            metrics = scores(self.task, self.metric_names, logits, labels) if self.rank == 0 else {}
            metrics = on_every_rank(self, metrics)
        self.meter.evaluations += 1
        self.logits, self.evaluated_step = logits, self.state.global_step
        prefixed = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        return EvalLoopOutput(predictions=logits, label_ids=labels, metrics=prefixed, num_samples=len(split))

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
        with self.meter.within("saving"):
            self._save()

    def _save(self) -> None:
        began, step = time.monotonic(), self.state.global_step
        due = bool(self.stopped) and self.schedule.evaluates_at(step)
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
            "utilisation": self.meter.state(),
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
        self.meter.take_over(progress["utilisation"])
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
