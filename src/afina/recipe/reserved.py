"""Arguments of `TrainingArguments` that `train.arguments` may not hold, because the recipe or afina itself sets them.

Names that transformers once had are in `afina.worker.model.arguments`.
"""

from __future__ import annotations

__all__ = ["RESERVED_ARGUMENTS"]

#: Each argument, and what to do instead.
RESERVED_ARGUMENTS: dict[str, str] = {
    "output_dir": "give `--run DIR`",
    "per_device_train_batch_size": "set `train.batch_size`, the global batch",
    "per_device_eval_batch_size": "set `train.eval_batch_size`",
    "gradient_accumulation_steps": "set `train.max_batch_per_device`; accumulation follows from the global batch",
    "auto_find_batch_size": "set `train.batch_size`: the global batch is part of the recipe",
    "num_train_epochs": "set `train.epochs`",
    "max_steps": "set `train.max_steps`",
    "learning_rate": "set `train.learning_rate`",
    "seed": "set `train.seed`",
    "data_seed": "set `train.seed`",
    "train_sampling_strategy": "set `tokens.batching`",
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
    "use_cpu": "leave it out: the device follows from the allocation",
    "hub_token": "set HF_TOKEN in the environment",
    "push_to_hub_token": "set HF_TOKEN in the environment",
    "push_to_hub": "leave it out: jobs have no network; upload `model/` afterwards",
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
    "deepspeed": "leave it out: sharded training is not supported",
    "fsdp": "leave it out: sharded training is not supported",
    "ignore_data_skip": "leave it out: a resumed run sees the batches of the uninterrupted one",
}
