"""Build an attempt from plan and data: TrainingArguments, the model with a head for the task, and data loaders."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from afina.files import read_json
from afina.recipe.metrics import lower_is_better
from afina.run.allocation import Allocation
from afina.run.directory import RunDir
from afina.run.plan import Geometry, Plan
from afina.site.python import check_packages
from afina.text import size_in_words
from afina.worker.compute import cpu, dropout, packed_model, precision, products, ranks
from afina.worker.compute.batches import (
    TOKENS_PER_ROW,
    Batching,
    Collator,
    EvalBatches,
    PackedCollator,
    Rows,
    StepBatches,
    costs,
    pool_windows,
)
from afina.worker.compute.flops import forward_flops
from afina.worker.data.prepared import Split
from afina.worker.model.adapters import has_adapter, labels_config, parameter_counts, set_base
from afina.worker.model.depth import blocks, step_cost
from afina.worker.model.frozen_weights import store_frozen
from afina.worker.model.head import build_model
from afina.worker.model.padding import set_pad_token
from afina.worker.model.training_sizes import sizes_of
from afina.worker.startup import gc_paused
from afina.worker.survival.lease import Lease
from afina.worker.survival.stop import StopRequest
from afina.worker.training.attempt import Attempt, TrainingData
from afina.worker.training.log import say

__all__ = [
    "build_arguments",
    "build_attempt",
    "collator",
    "eval_batch_size",
    "eval_batches",
    "eval_loader",
    "train_loader",
]


def build_arguments(
    plan: Plan, geometry: Geometry, run: RunDir, data: TrainingData, choice: precision.PrecisionChoice
) -> TrainingArguments:
    """TrainingArguments of the plan. Without a usable GPU they select the CPU, with gloo between processes."""
    train, best = plan.recipe.train, data.best_metric
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        **{
            # Defaults that the recipe's `train.arguments` may override.
            "lr_scheduler_type": "linear",
            "log_level_replica": "error",  # rank 0 says what there is to say
            "dataloader_pin_memory": not on_cpu,
            **precision.training_arguments(choice),
            **train.arguments,
            # Set by the recipe's own keys, or by afina.
            "output_dir": str(run.path / "trainer"),
            "per_device_train_batch_size": geometry.batch_per_device,
            "per_device_eval_batch_size": eval_batch_size(plan, geometry),
            "gradient_accumulation_steps": geometry.accumulation,
            "num_train_epochs": train.num_epochs,
            "max_steps": train.max_steps or -1,
            "learning_rate": train.learning_rate,
            "seed": train.seed,
            # `StepControl` decides when to log, evaluate and save; these only have to be consistent with each other.
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "steps",
            "logging_steps": train.log_every,
            "logging_nan_inf_filter": False,
            "metric_for_best_model": best,
            "greater_is_better": not lower_is_better(best, data.metric_texts),
            "load_best_model_at_end": False,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "average_tokens_across_devices": True,
            "use_cpu": on_cpu,
            **({"ddp_backend": "gloo"} if on_cpu and geometry.num_processes > 1 else {}),
        }
    )


def eval_batch_size(plan: Plan, geometry: Geometry) -> int:
    """Rows of a batch of an evaluation on one device."""
    return plan.recipe.train.eval_batch_size or max(32, geometry.batch_per_device)


def _adapt(model: Any, plan: Plan, arguments: TrainingArguments, pad_token_id: int) -> tuple[Batching, list[str]]:
    """Adapt model and process to the recipe's batching and dropout; returns the batching that the model can take, and notes for the log."""
    dropout.seed(plan.recipe.train.seed, arguments.process_index)
    batching, notes = packed_model.configure(model, plan.recipe, arguments)
    if arguments.device.type == "cpu":
        cpu.tune_malloc()
        products.use_onednn(plan.recipe.train.onednn and batching == "packed")
    if plan.recipe.train.base_dtype != "fp32":
        check_packages(plan.recipe, trackers=False)  # a run may be resumed in another image than it was prepared in
        notes.append(store_frozen(model, plan.recipe.train.base_dtype))
    set_pad_token(model, pad_token_id)
    if plan.recipe.tokens.windows is not None:
        pool_windows(model, plan.recipe.tokens.windows.pool)
    return batching, notes


def build_attempt(
    run: RunDir, allocation: Allocation, geometry: Geometry, data: TrainingData, stop: StopRequest, lease: Lease
) -> tuple[Attempt, Any, TrainingArguments]:
    """The attempt, its model and its arguments. With several processes this forms the process group.

    Args:
        geometry: of the processes that really run.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    plan = run.plan()
    config_folder = labels_config(Path(data.model_folder))
    model_type = read_json(config_folder / "config.json").get("model_type", "")
    choice = precision.choose_for_run(run, plan.recipe.train, model_type)
    arguments = build_arguments(plan, geometry, run, data, choice)
    transformers.set_seed(plan.recipe.train.seed)
    with gc_paused():
        changes = packed_model.attention_dropout(plan.recipe, str(config_folder))
        model, head = build_model(plan.recipe, data.model_folder, data.task, data.labels, data.num_labels, changes)
    if data.word_units is not None:
        model.config.word_units = data.word_units  # prediction finds words as training did
    if has_adapter(model):
        # Not the folder of this attempt, which may be a copy on the node.
        set_base(model, run.prepared(), plan.recipe.model)
    gc.freeze()  # what has been imported and built stays: later collections skip it
    # Before its frozen weights are stored in fewer bits, two of them in one number.
    parameters = model.num_parameters(exclude_embeddings=True)
    counts, cost, sizes = parameter_counts(model), step_cost(model), sizes_of(model, plan.recipe)
    batching, notes = _adapt(model, plan, arguments, data.pad_token_id)
    if arguments.process_index == 0:
        say(head, *notes)
    attempt = Attempt(
        run=run,
        allocation=allocation,
        rank=arguments.process_index,
        plan=plan,
        geometry=geometry,
        device=arguments.device,
        data=data,
        precision=choice,
        batching=batching,
        flops=cost
        * data.splits["train"].sum_over_sequences(lambda lengths: forward_flops(model.config, lengths, parameters)),
        parameters=counts,
        sizes=sizes,
        host_mesh=ranks.host_mesh(arguments.ddp_timeout_delta) if plan.recipe.train.sharding != "none" else None,
        stop=stop,
        lease=lease,
    )
    if attempt.is_sharded:
        # On a CPU `bf16_on_cpu` computes in bfloat16 with float32 weights, so that evaluations are in float32.
        ranks.shard(model, blocks(model), attempt.device, bf16=arguments.bf16 and attempt.device.type == "cuda")
    if attempt.in_shards and attempt.rank == 0:
        say(_shares(attempt))
    if plan.recipe.tokens.windows is not None and attempt.rank == 0:
        say(_windows(attempt))
    return attempt, model, arguments


def _windows(attempt: Attempt) -> str:
    """A line about `tokens.windows`."""
    split, size = attempt.data.splits["train"], attempt.geometry.batch_per_device
    counts, most = split.windows_of_rows, int(np.sort(split.lengths)[-size:].sum())
    assert counts is not None
    return (
        f"texts have {counts.mean():.1f} windows on average, {int(counts.max())} at most; {size} texts at once have up to {most:,} tokens: "
        "`train.max_batch_per_device` lowers that where memory is short, with the same result"
    )


def _shares(attempt: Attempt) -> str:
    """A line about `train.sharding`."""
    if not attempt.is_sharded:
        return "train.sharding: fsdp shards nothing here: there is one process, which holds all of the model"
    count = attempt.geometry.num_processes
    share = size_in_words(attempt.sizes.state // count)
    return f"sharded over {count} processes (FSDP2): {share} of weights, gradients and optimizer state in each"


def collator(attempt: Attempt, model: Any, split: Split, fill: bool = False) -> Collator | PackedCollator:
    """Makes batches of `split` for `model`; `fill`: see `PackedCollator`."""
    return packed_model.collator(
        model,
        split,
        attempt.batching,
        attempt.data.pad_token_id,
        tokenizer_side=attempt.data.padding_side,
        max_length=attempt.plan.recipe.tokens.max_length,
        device=attempt.device.type,
        fill=fill,
    )


def train_loader(
    attempt: Attempt, model: Any, *, batches: StepBatches | None = None, pin_memory: bool = False
) -> DataLoader[Any]:
    """The micro-batches of this rank; `batches` replaces those of the whole epoch."""
    split = attempt.data.splits["train"]
    hidden = getattr(model.config, "hidden_size", 768)
    batches = batches or StepBatches(
        split.lengths,
        attempt.geometry,
        attempt.rank,
        attempt.plan.recipe.train.seed,
        attempt.batching,
        each=split.sum_over_sequences(lambda lengths: costs(lengths, hidden)),
    )
    by_onednn = attempt.precision.bf16_on_cpu or products.library() == "oneDNN"
    collate = collator(attempt, model, split, fill=by_onednn)
    return DataLoader(Rows(split), batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory)


def eval_batches(attempt: Attempt, split: Split, size: int) -> EvalBatches:
    """This rank's batches of an evaluation of `split`; `size` is `per_device_eval_batch_size`."""
    max_tokens = size * TOKENS_PER_ROW if attempt.batching == "packed" else None
    count = attempt.geometry.num_processes
    return EvalBatches(split.lengths, size, attempt.rank, count, max_tokens, split.windows_of_rows)


def eval_loader(attempt: Attempt, model: Any, split: Split, size: int) -> DataLoader[Any]:
    """Pairs of row numbers and their batch."""
    collate = collator(attempt, model, split)
    return DataLoader(
        Rows(split), batch_sampler=eval_batches(attempt, split, size), collate_fn=lambda rows: (rows, collate(rows))
    )
