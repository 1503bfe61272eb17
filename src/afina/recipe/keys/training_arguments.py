"""Every field of Transformers' `TrainingArguments`: it takes effect through `train.arguments`, or it is refused with the key to use.

    EFFECTIVE   what the argument does in a run
    RESERVED    the recipe's own keys or afina itself set it: what to write instead
    INEFFECTIVE it would change nothing in a run, or make a resumed run differ: the reason
    FORMER      names that other versions of Transformers have, and common mistakes

The documentation's page is made from these tables; a test compares them with the installed Transformers, so a new version's new field
fails there.
Not covered: whether the values work together and with the installed packages; `afina.worker.model.check_arguments` builds them.
"""

from __future__ import annotations

import fnmatch
import math
from typing import Any

__all__ = [
    "EFFECTIVE",
    "FORMER",
    "INEFFECTIVE",
    "NOT_SHARDED",
    "REFUSED_VALUES",
    "RESERVED_ARGUMENTS",
    "SHARDED_OPTIMIZERS",
    "refusal",
]

EFFECTIVE: dict[str, str] = {
    "lr_scheduler_type": "the schedule of the learning rate; `linear` by default",
    "lr_scheduler_kwargs": "settings of that schedule",
    "warmup_steps": "steps of rising learning rate; below 1 a share of all steps",
    "optim": "the optimizer; `adamw_torch_fused` by default",
    "optim_args": "settings of some optimizers, `key=value,key=value`",
    "optim_target_modules": "the modules that GaLore and APOLLO project",
    "weight_decay": "of all weights but biases and norms",
    "adam_beta1": "of Adam and its kin",
    "adam_beta2": "of Adam and its kin",
    "adam_epsilon": "of Adam and its kin",
    "max_grad_norm": "gradients are clipped to this norm; 0 does not clip; 1 by default",
    "bf16": "as `train.precision: bf16`, on a CPU also in evaluations",
    "fp16": "as `train.precision: fp16`",
    "tf32": "as `train.precision: tf32`",
    "activation_checkpointing": "recompute activations in the backward pass: less memory, more time",
    "activation_checkpointing_kwargs": "settings of `activation_checkpointing`",
    "gradient_checkpointing": "another name of `activation_checkpointing`",
    "gradient_checkpointing_kwargs": "settings of `gradient_checkpointing`",
    "torch_compile": "as `train.compile`",
    "torch_compile_backend": "compiles, with this backend",
    "torch_compile_mode": "compiles, in this mode",
    "neftune_noise_alpha": "noise on embeddings (NEFTune); batches are then not packed, because the noise depends on their width",
    "torch_empty_cache_steps": "return unused GPU memory every so many steps",
    "logging_first_step": "log step 1 too",
    "log_level": "of Transformers' own messages in the log",
    "log_level_replica": "of Transformers' own messages on a node's other processes",
    "run_name": "the run's name at Weights & Biases and MLflow",
    "full_determinism": "deterministic GPU algorithms: slower, the same bits each time",
    "dataloader_pin_memory": "of the training's batches, on GPUs alone; there it is the default",
    "ddp_find_unused_parameters": "of DistributedDataParallel, with several processes",
    "ddp_bucket_cap_mb": "of DistributedDataParallel, with several processes",
    "ddp_broadcast_buffers": "of DistributedDataParallel, with several processes",
    "ddp_timeout": "seconds that a process waits for the others, with several processes",
    "debug": "`underflow_overflow` stops at the first activation that is not finite and names the module",
}

_ROWS = "leave it out: batches come from memory-mapped files, without worker processes"
_HUB = "leave it out: jobs have no network; upload `model/` afterwards"
_TRACKIO = "leave it out: afina has no trackio; see `trackers`"
_METRICS = "leave it out: an evaluation keeps all logits and computes the recipe's `metrics`"
_DEVICE = "leave it out: the device follows from the allocation"

RESERVED_ARGUMENTS: dict[str, str] = {
    "output_dir": "give `--run DIR`",
    "per_device_train_batch_size": "set `train.batch_size`, the global batch",
    "per_device_eval_batch_size": "set `train.eval_batch_size`",
    "gradient_accumulation_steps": "set `train.max_batch_per_device`; accumulation follows from the global batch",
    "average_tokens_across_devices": "leave it out: the loss is the mean over the examples of the global step",
    "auto_find_batch_size": "set `train.batch_size`: the global batch is part of the recipe",
    "num_train_epochs": "set `train.epochs`",
    "max_steps": "set `train.max_steps`",
    "learning_rate": "set `train.learning_rate`",
    "label_smoothing_factor": "set `train.label_smoothing`",
    "seed": "set `train.seed`",
    "data_seed": "set `train.seed`",
    "train_sampling_strategy": "set `tokens.batching`",
    "length_column_name": "set `tokens.batching`",
    "eval_strategy": "set `train.evaluate`",
    "eval_steps": "set `train.evaluate`",
    "save_strategy": "set `train.save_every`",
    "save_steps": "set `train.save_every`",
    "save_total_limit": "set `train.keep_checkpoints`",
    "save_only_model": "leave it out: a checkpoint without optimizer state cannot be resumed",
    "load_best_model_at_end": "set `train.keep: best` or `train.keep: last`",
    "metric_for_best_model": "set `train.best_metric`",
    "greater_is_better": "set `train.best_metric`; its direction is known",
    "resume_from_checkpoint": "run `afina resume DIR`",
    "enable_jit_checkpoint": "leave it out: afina stops and saves by itself",
    "logging_strategy": "set `train.log_every`",
    "logging_steps": "set `train.log_every`",
    "logging_nan_inf_filter": "leave it out: a loss that is not finite is never hidden",
    "use_cpu": _DEVICE,
    "hub_token": "set HF_TOKEN in the environment",
    "push_to_hub": _HUB,
    "accelerator_config": "leave it out: afina shards the batches itself",
    "dataloader_drop_last": "leave it out: every example is trained on",
    "remove_unused_columns": "leave it out",
    "label_names": "leave it out",
    "disable_tqdm": "leave it out: a bar is drawn where there is a terminal",
    "do_train": "leave it out",
    "do_eval": "leave it out",
    "do_predict": "leave it out",
    "report_to": "set `trackers`; metrics are in `metrics.jsonl` anyway",
    "ddp_backend": "leave it out: it follows from the device",
    "local_rank": "leave it out: it follows from the launch",
    "deepspeed": "set `train.sharding: fsdp`",
    "fsdp": "set `train.sharding: fsdp`",
    "fsdp_config": "set `train.sharding: fsdp`",
    "parallelism_config": "set `train.sharding: fsdp`",
    "ignore_data_skip": "leave it out: a resumed run sees the batches of the uninterrupted one",
}

INEFFECTIVE: dict[str, str] = {
    "eval_delay": "set `train.evaluate`: each evaluation may choose the best checkpoint",
    "eval_on_start": "leave it out: a resumed run would evaluate again where it resumes",
    "prediction_loss_only": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "bf16_full_eval": "set `train.precision`: evaluations follow it",
    "fp16_full_eval": "set `train.precision`: evaluations follow it",
    "use_liger_kernel": "leave it out: its kernels are for language models, and not proven on afina's batches",
    "liger_kernel_config": "leave it out: its kernels are for language models, and not proven on afina's batches",
    "use_cache": "leave it out: a classifier generates nothing",
    "log_on_each_node": "leave it out: each node has its own log",
    "include_num_input_tokens_seen": "leave it out: tokens are counted in the outcome and in `afina status`",
    "skip_memory_metrics": "leave it out: memory is measured, and in the outcome",
    "project": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "save_on_each_node": "leave it out: nodes share the run directory",
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "restore_callback_states_from_checkpoint": "leave it out: a resumed run is the uninterrupted one",
    "dataloader_num_workers": _ROWS,
    "dataloader_persistent_workers": _ROWS,
    "dataloader_prefetch_factor": _ROWS,
    "dataloader_multiprocessing_context": _ROWS,
    "dataloader_in_order": _ROWS,
    "ddp_static_graph": "leave it out: micro-batches of a step differ, and the graph with them",
}

FORMER: dict[str, str] = {
    "warmup_ratio": "use `warmup_steps`: a value below 1 is a share of all steps",
    "group_by_length": "set `tokens.batching: grouped`",
    "overwrite_output_dir": "leave it out: nothing that exists is overwritten; give `--run DIR`",
    "logging_dir": "leave it out: metrics are in `metrics.jsonl`",
    "save_safetensors": "leave it out: models are always saved as safetensors",
    "evaluation_strategy": "set `train.evaluate`",
    "no_cuda": _DEVICE,
    "use_mps_device": _DEVICE,
    "tokenizer": "leave it out: the tokenizer comes with the model",
    "split_batches": "leave it out: afina shards the batches itself",
    "dispatch_batches": "leave it out: afina shards the batches itself",
    "per_gpu_train_batch_size": "set `train.batch_size`, the global batch",
    "per_gpu_eval_batch_size": "set `train.eval_batch_size`",
    "adafactor": "use `optim: adafactor`",
    "fp16_opt_level": "set `train.precision: fp16`",
    "fp16_backend": "set `train.precision: fp16`",
    "half_precision_backend": "set `train.precision`",
    "push_to_hub_token": "set HF_TOKEN in the environment",
    "batch_size": "set `train.batch_size`, the global batch",
    "epochs": "set `train.epochs`",
    "dropout": "it belongs to the model's config, not to the training arguments",
    "label_smoothing": "set `train.label_smoothing`",
}

_OF_DDP = "has no effect: there is no DistributedDataParallel"
_UNPROVEN = "was not proven on shards"
#: Refused with `train.sharding: fsdp`, and why.
NOT_SHARDED: dict[str, str] = {
    "ddp_find_unused_parameters": _OF_DDP,
    "ddp_bucket_cap_mb": _OF_DDP,
    "ddp_broadcast_buffers": _OF_DDP,
    "torch_compile": _UNPROVEN,
    "torch_compile_backend": _UNPROVEN,
    "torch_compile_mode": _UNPROVEN,
    "fp16": _UNPROVEN,
    "neftune_noise_alpha": _UNPROVEN,
    "debug": "looks at whole weights, which no process has",
}
#: Optimizers that treat each number of a weight by itself, so that a shard is stepped like a whole; the default first.
SHARDED_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "rmsprop")

_PLATEAU = (
    "use `linear`, `cosine` or `cosine_with_restarts`: a schedule of the evaluations is not that of a resumed run"
)
_OPTIM = "use `adamw_torch`, `adafactor` or `sgd`"
#: Values that cannot work: the argument, a pattern of its value, the reason, what to use.
REFUSED_VALUES: tuple[tuple[str, str, str, str], ...] = (
    ("lr_scheduler_type", "reduce_lr_on_plateau", "follows evaluations, in which direction the schedule does not know", _PLATEAU),
    ("lr_scheduler_type", "greedy", "follows the loss of single steps", _PLATEAU),
    ("optim", "schedule_free_*", "trains and evaluates on different weights, which afina does not exchange", _OPTIM),
    ("optim", "*_layerwise", "steps inside the backward pass: its state is in no checkpoint", _OPTIM),
    ("optim", "*lomo", "steps inside the backward pass: its state is in no checkpoint", _OPTIM),
    ("debug", "*tpu*", "is for TPUs", "use `underflow_overflow`, or leave it out"),
)  # fmt: skip
#: The least and the largest value, and whether the largest itself is allowed.
_LIMITS: dict[str, tuple[float, float, bool]] = {
    "weight_decay": (0, 1e3, True),
    "adam_beta1": (0, 1, False),
    "adam_beta2": (0, 1, False),
    "adam_epsilon": (0, 1, True),
    "max_grad_norm": (0, math.inf, True),
    "warmup_steps": (0, 1e9, True),
    "neftune_noise_alpha": (0, 1e3, True),
    "torch_empty_cache_steps": (1, 1e9, True),
    "ddp_bucket_cap_mb": (1, 1e6, True),
    "ddp_timeout": (1, 1e7, True),
}


def refusal(name: str, value: Any) -> tuple[str, str] | None:
    """Why `train.arguments` cannot hold `name: value`, and what to do; None where it can, or where only the worker can tell."""
    if name in RESERVED_ARGUMENTS:
        return "is set by afina itself", RESERVED_ARGUMENTS[name]
    if name in INEFFECTIVE:
        return "has no effect in a run of afina", INEFFECTIVE[name]
    if name in FORMER:
        return "is not an argument of this version of Transformers", FORMER[name]
    for argument, pattern, why, remedy in REFUSED_VALUES:
        if name == argument and fnmatch.fnmatchcase(str(value).lower(), pattern):
            return f"{value} {why}", remedy
    if name in _LIMITS and isinstance(value, int | float) and not isinstance(value, bool):
        low, high, closed = _LIMITS[name]
        if not (low <= value < high or (closed and value == high)):
            allowed = (
                f"{low:g} or more"
                if math.isinf(high)
                else f"from {low:g} to {high:g}{'' if closed else ' (less than it)'}"
            )
            return f"must be {allowed}, found {value:g}", "correct the value"
    return None
