"""RunTrainer: a ResumableTrainer with afina's batches, loss, evaluation and steps.

Trainer keeps optimizer, schedule, mixed precision, gradient clipping, and DDP through accelerate. Replaced are the order of
batches (`compute.batches`), the loss (summed and divided by the examples of the *global* step, so that uneven last steps are
exact on any number of processes), evaluation (`training.evaluation`) and the decisions at the
end of a step (`training.control`). What Trainer computes anew in every step, and the plan knows, is not computed: examples
(a collective) and parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import (
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
)
from transformers.trainer_utils import EvalLoopOutput

from afina.worker.compute import cuda_graphs, packed_model, precision, ranks
from afina.worker.compute.batches import Rows, Targets, scored_logits
from afina.worker.data.prepared import Split
from afina.worker.model.depth import learning_rates
from afina.worker.training.attempt import Attempt
from afina.worker.training.build import eval_loader, train_loader
from afina.worker.training.control import StepControl
from afina.worker.training.evaluation import logits_of, scores
from afina.worker.training.live_progress import LiveProgress
from afina.worker.training.log import say
from afina.worker.training.resumable import ResumableTrainer

__all__ = ["RunTrainer"]


class RunTrainer(ResumableTrainer):
    """A Trainer for one attempt at a run.

    Attributes:
        logits, evaluated_step: of the last evaluation, (N, K) float32 in input order; logits on rank 0 only.
    """

    def __init__(
        self, attempt: Attempt, model: Any, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
    ) -> None:
        self._loss = attempt.data.loss.to(arguments.device)
        self.logits = np.empty((0, 0), np.float32)
        self.evaluated_step: int | None = None
        self._of_step: torch.Tensor | None = None
        splits = attempt.data.splits
        super().__init__(
            attempt,
            model=model,
            args=arguments,
            processing_class=AutoTokenizer.from_pretrained(attempt.data.folder / "tokenizer"),
            callbacks=list(callbacks),
            train_dataset=Rows(splits["train"]),
            eval_dataset=Rows(splits["eval"]) if "eval" in splits else None,
            data_collator=lambda rows: rows,
            compute_loss_func=self._step_loss,
            compute_metrics=lambda _: {},
        )
        for callback in (DefaultFlowCallback, ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if attempt.is_sharded:  # Trainer then wraps nothing, and lets accelerate shard nothing
            self.is_distributed_loading_by_transformers = True
        self.add_callback(StepControl(attempt, self.resume, lambda: self._tr_loss, self._count_loss))
        if attempt.rank == 0:
            self.add_callback(LiveProgress(attempt))
        self._recorded = self._record_steps()

    @property
    def matmul_dtype(self) -> str:
        """The number format of matrix products in training, as `compute.flops` names it."""
        return precision.matmul_dtype(self.attempt.precision, self.args)

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's, with a group for each learning rate; that of the recipe first, which is the one in the log."""
        optimizer, train = super().create_optimizer(model), self.attempt.plan.recipe.train
        if train.rates_differ:
            rates = learning_rates(self.model if model is None else model, train)
            groups: list[dict[str, Any]] = []
            for group in optimizer.param_groups:
                of_rate: dict[float, list[Any]] = {}
                for weight in group["params"]:
                    of_rate.setdefault(rates[weight], []).append(weight)
                groups += [{**group, "params": weights, "lr": rate} for rate, weights in of_rate.items()]
            optimizer.param_groups = sorted(groups, key=lambda group: group["lr"] != train.learning_rate)
        return optimizer

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self.attempt.is_sharded:  # shards are where they belong
            super()._move_model_to_device(model, device)

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        # Gradients that wait for the step's last micro-batch would be whole in each process.
        return contextlib.nullcontext()

    # Batches and loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        return train_loader(self.attempt, self.model, pin_memory=self.args.dataloader_pin_memory)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        split = (eval_dataset or self.eval_dataset).split
        return eval_loader(self.attempt, self.model, split, self.args.per_device_eval_batch_size)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self.attempt.geometry.global_batch

    def _step_loss(self, outputs: Any, targets: Targets, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        """Sum over this rank's rows / divisor of the global step (Trainer multiplies by the ranks that DDP averages over)."""
        labels, weights = targets[:2]
        return (self._loss(scored_logits(outputs["logits"], targets), labels) * weights).sum() / num_items_in_batch

    # Steps

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        meter = self.attempt.meter
        with meter.within("input"):
            samples = super().get_batch_samples(*arguments, **named)
            meter.count_batches(samples[0])
        return samples

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """The divisor of the step's loss over all ranks: the plan of the epoch has it, Trainer would gather it."""
        return torch.tensor(self.attempt.work.divisor(self.state.global_step + 1), device=device)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack: contextlib.ExitStack = super().compute_loss_context_manager()
        if self.attempt.precision.bf16_on_cpu:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        return stack

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        meter = self.attempt.meter
        meter.enter("forward_backward")
        loss: torch.Tensor
        if self._recorded is not None:
            loss = self._replay(self._recorded, *arguments, **named)
        else:
            loss = super().training_step(*arguments, **named)
            if self.args.device.type == "cpu":
                meter.enter("optimizer")
        self._of_step = loss if self._of_step is None else self._of_step + loss
        return loss

    def _count_loss(self, step: int) -> None:
        """Count the loss of a step that has just ended."""
        if self._of_step is not None:
            divisor = self.attempt.work.divisor(step)
            self._summed += float(self._of_step) * divisor
            self._divided += divisor
            self._of_step = None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's estimate walks through all parameters, for a number that is not used; see `compute.flops`

    def _record_steps(self) -> cuda_graphs.GraphedStep | None:
        """The training step as CUDA graphs, where the recipe asks for them and they are possible; logs the reason or a hint."""
        attempt, arguments = self.attempt, self.args
        wanted = attempt.plan.recipe.train.cuda_graphs
        obstacle = cuda_graphs.why_not_graphed(
            self.model,
            attempt.batching,
            attempt.geometry.num_processes,
            bf16=arguments.bf16,
            checkpointing=packed_model.checkpoints_activations(arguments),
        )
        note = ""
        if wanted:
            note = f"steps are not recorded as CUDA graphs: {obstacle}"
            if obstacle is None:
                note = "steps are recorded as CUDA graphs, one for each width of a batch"
        elif obstacle is None:
            note = "train.cuda_graphs: true may make steps of small batches several times faster here"
        if note and attempt.rank == 0:
            say(note)
        if obstacle is not None or not wanted:
            return None
        step = super().training_step
        return cuda_graphs.GraphedStep(
            lambda batch, items: step(self.model_wrapped, batch, items),
            self.model,
            attempt.geometry.batch_per_device,
            attempt.plan.recipe.tokens.max_length,
        )

    def _replay(
        self, recorded: cuda_graphs.GraphedStep, model: Any, batch: dict[str, Any], num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        before, widths, reason = recorded.padding_tokens, len(recorded.seconds), recorded.fallback_reason
        loss = recorded(self._prepare_inputs(batch), num_items_in_batch)
        self.attempt.meter.computed += recorded.padding_tokens - before
        if len(recorded.seconds) > widths:
            width, seconds = list(recorded.seconds.items())[-1]
            self.attempt.event("recorded", width=width, seconds=round(seconds, 3))
        if recorded.fallback_reason != reason:
            say(f"steps are not recorded as CUDA graphs: {recorded.fallback_reason}")
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
        """Logits of every row (or word) on rank 0, in input order; the loss and the recipe's metrics on every rank.

        Where steps have been made since the last evaluation, also their `training_loss`: the mean over their examples, each with its weight in the loss.
        """
        attempt, data = self.attempt, self.attempt.data
        split: Split = dataloader.dataset.split  # type: ignore[attr-defined]
        labels = np.asarray(split.labels)
        with attempt.meter.within("evaluation"):
            self.model.eval()
            logits = logits_of(attempt, dataloader, self._forward, may_stop=self.is_in_train)
            metrics = {}
            if attempt.rank == 0:
                metrics = scores(data.loss, data.metric_texts, logits, split, data.labels, data.metric_code)
            metrics = ranks.from_rank_zero(metrics)
        for name, why in metrics.get("undefined", {}).items() if attempt.rank == 0 else ():
            if name != data.best_metric:
                say(f"{metric_key_prefix}_{name} is not defined: {why}")
        attempt.meter.evaluations += 1
        self.logits, self.evaluated_step = logits, self.state.global_step
        prefixed = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        if self._divided:
            mean = ranks.total(attempt.device, self._summed) / ranks.count() / self._divided
            prefixed["training_loss"] = mean
            self._summed = self._divided = 0.0
        return EvalLoopOutput(predictions=logits, label_ids=labels, metrics=prefixed, num_samples=len(split))

    def _forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**self._prepare_inputs(inputs))["logits"]
        return logits

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        self._end_early(metrics)
        name = f"eval_{self.attempt.data.best_metric}"
        if metrics.get(name) is None:
            why = metrics.get("eval_undefined", {}).get(self.attempt.data.best_metric, "it has no value")
            if self.attempt.rank == 0:
                say(
                    f"WARNING: {name} is not defined ({why}): "
                    f"the evaluation of step {self.state.global_step} cannot be the best"
                )
            return False
        better = bool(super()._determine_best_metric(metrics=metrics, trial=trial))
        if better and self.attempt.keeps_best:
            self.control.should_save = True  # the step of an evaluation need not be one that is saved anyway
        return better

    def _end_early(self, metrics: dict[str, Any]) -> None:
        """End the training where early stopping or the search's pruning says so; the checkpoint of this step records it."""
        attempt, step = self.attempt, self.state.global_step
        early, median, before_the_end = attempt.early_stop, attempt.median_stop, step < self.state.max_steps
        if early is not None and early.count(metrics.get(f"eval_{early.metric}")):
            early.stopped = before_the_end
        if early is not None and early.best is None and attempt.rank == 0:
            say(f"WARNING: train.early_stopping: eval_{early.metric} has had no value so far, so it ends nothing")
        # One that ends by itself is not pruned.
        if median is not None and before_the_end and attempt.ended_early is None:
            median.reason = ranks.from_rank_zero(
                median.judge(attempt.run, self.state.epoch) if attempt.rank == 0 else None
            )
        if attempt.ended_early is None:
            return
        self.control.should_training_stop = self.control.should_save = True
        if attempt.rank == 0:
            attempt.event("stopped_early", step=step, max_steps=self.state.max_steps, why=attempt.ended_early)
            say(f"stopped early at step {step} of {self.state.max_steps}: {attempt.ended_early}")
