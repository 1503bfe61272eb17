"""What Transformers is given for a plan: its arguments, and the pretrained model with a head for the task."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, TrainingArguments

from afina.errors import InputError
from afina.recipe.metrics import lower_is_better
from afina.run.directory import RunDir
from afina.run.plan import Geometry, Plan
from afina.worker.compute import packed_model, precision
from afina.worker.model.tasks import TASKS

__all__ = ["build_arguments", "build_model"]


def build_arguments(
    plan: Plan, geometry: Geometry, run: RunDir, best: str, task: str, choice: precision.PrecisionChoice
) -> TrainingArguments:
    """TrainingArguments of the plan. Where no GPU can be used the CPU is taken, with gloo between processes."""
    train = plan.recipe.train
    cpu = not torch.cuda.is_available()
    return TrainingArguments(
        **{
            # What the recipe may overrule.
            "lr_scheduler_type": "linear",
            "dataloader_pin_memory": not cpu,
            "logging_first_step": False,
            **precision.training_arguments(choice),
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
            # The flow is decided by `afina.worker.training.control`; these only have to be consistent with each other.
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "steps",
            "logging_steps": train.log_every,
            "logging_nan_inf_filter": False,
            "metric_for_best_model": best,
            "greater_is_better": not lower_is_better(best),
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
    """The pretrained model with a head for the task, in float32, the label names in its config.

    Raises:
        InputError: a stored weight is not finite.
    """
    names = labels or [f"LABEL_{i}" for i in range(num_labels)]
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=num_labels,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=TASKS[task].problem_type,
        dtype=torch.float32,  # the default takes the checkpoint's dtype: a bf16 one would train in pure bf16
        ignore_mismatched_sizes=True,  # a head for other labels is replaced
        trust_remote_code=plan.recipe.trust_remote_code,
        **packed_model.attention_dropout(plan.recipe, folder),
    )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.detach().sum()):
            raise InputError(
                f"model: {name} of {plan.recipe.model} holds NaN or infinity: its first loss would not be finite either",
                "take the model from before it broke, or download it again",
            )
    return model
