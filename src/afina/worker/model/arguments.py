"""Check of the recipe's `train.arguments` against the installed TrainingArguments: names, types, and their combination.

Not covered: arguments that need a GPU (`bf16`, `tf32`, `torch_compile`); only their type is checked.
"""

from __future__ import annotations

import types
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import RecipeError, nearest
from afina.worker.model.check_cache import checked_once
from afina.worker.startup import gc_paused

__all__ = ["check_arguments"]

#: Former and mistaken names of TrainingArguments, and their replacements.
_REPLACED = {
    "warmup_ratio": "use `warmup_steps`: a value below 1 is a share of all steps",
    "group_by_length": "set `tokens.batching: grouped`",
    "overwrite_output_dir": "leave it out: nothing that exists is overwritten; give `--run DIR`",
    "logging_dir": "leave it out: metrics are in `metrics.jsonl`",
    "save_safetensors": "leave it out: models are always saved as safetensors",
    "evaluation_strategy": "set `train.evaluate`",
    "no_cuda": "leave it out: the device follows from the allocation",
    "tokenizer": "leave it out: the tokenizer comes with the model",
    "split_batches": "leave it out: afina shards the batches itself",
    "dispatch_batches": "leave it out: afina shards the batches itself",
    "per_gpu_train_batch_size": "set `train.batch_size`, the global batch",
    "per_gpu_eval_batch_size": "set `train.eval_batch_size`",
    "adafactor": "use `optim: adafactor`",
    "fp16_opt_level": "leave it out: `fp16: true` is enough",
    "fp16_backend": "leave it out: `fp16: true` is enough",
    "half_precision_backend": "leave it out: `fp16: true` or `bf16: true` is enough",
    "use_mps_device": "leave it out: the device follows from the allocation",
    "batch_size": "set `train.batch_size`, the global batch",
    "epochs": "set `train.epochs`",
    "dropout": "it belongs to the model's config, not to the training arguments",
}
#: The compute node decides whether these work, not the node that prepares; only their type is checked.
_HARDWARE = {"bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "torch_compile", "torch_compile_backend",
             "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"}  # fmt: skip


def check_arguments(arguments: Mapping[str, Any], pins: Path) -> list[str]:
    """Build the installed TrainingArguments with `train.arguments`; returns warnings.

    Raises:
        RecipeError: an unknown name (with its replacement), a value of the wrong type, a refused value.
    """
    return checked_once(pins, ["arguments", dict(arguments)], lambda: _try_arguments(arguments))


def _try_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Leaves no folder behind and forms no process group."""
    import dataclasses

    with gc_paused():
        import transformers
        from transformers import TrainingArguments

    installed = f"transformers {transformers.__version__}"
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments)
    for name, value in arguments.items():
        if name not in known:
            raise RecipeError(
                f"train.arguments.{name}: TrainingArguments of {installed} has no such argument",
                _REPLACED.get(name)
                or nearest(name, known)
                or "see the documentation of transformers.TrainingArguments",
            )
        if not _fits(value, hints[name]):
            wanted = " or ".join(t.__name__ for t in _plain_types(hints[name]))
            raise RecipeError(
                f"train.arguments.{name}: {value!r} is {_a(type(value).__name__)}; it must be {wanted}",
                "correct the value",
            )
    checked = {name: value for name, value in arguments.items() if name not in _HARDWARE}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # `output_dir` is not created before training begins.
            TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **checked)
        except (ValueError, TypeError, ImportError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            named = next((n for n in checked if n in reason), None) or next(
                (n for n, v in checked.items() if isinstance(v, str) and v in reason), None
            )
            raise RecipeError(
                f"train.arguments{f'.{named}' if named else ''}: {installed} refuses: {reason}", "correct the value"
            ) from None
    return [f"train.arguments: {w.message}" for w in caught if issubclass(w.category, FutureWarning)]


def _a(name: str) -> str:
    return {
        "str": "a text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "NoneType": "empty",
    }.get(name, f"a {name}")


def _plain_types(hint: Any) -> tuple[type, ...]:
    """The types that a hint allows; empty if it allows more than plain values (enums, parsed text, …)."""
    members = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    plain = (int, float, bool, str, type(None))
    return tuple(members) if all(m in plain for m in members) else ()


def _fits(value: Any, hint: Any) -> bool:
    allowed = _plain_types(hint)
    if not allowed:
        return True
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int) and float in allowed:
        return True
    return isinstance(value, allowed)
