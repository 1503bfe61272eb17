"""Check of the recipe's `train.arguments` in the environment that trains: TrainingArguments, optimizer and schedule are built once.

Names and values that no environment takes are refused when the recipe is read (`afina.recipe.keys.training_arguments`).
Not covered: arguments that need a GPU (`bf16`, `tf32`, `torch_compile`); only their type is checked.
"""

from __future__ import annotations

import math
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from afina.errors import RecipeError, nearest
from afina.recipe.keys.train_keys import Train
from afina.recipe.keys.training_arguments import EFFECTIVE
from afina.text import plural
from afina.worker.model.check_cache import checked_once
from afina.worker.startup import NOT_NEEDED, hide_packages

__all__ = ["check_arguments"]

#: The compute node decides whether these work, not the node that prepares; only their type is checked.
_HARDWARE = {"bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"}
#: Settings of the optimizer and of the schedule, which some of them do not use.
_OF_OPTIMIZER = ("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
_OF_SCHEDULE = ("lr_scheduler_kwargs", "warmup_steps")
_STEPS = 50


def check_arguments(train: Train, pins: Path, steps: int | None = None) -> list[str]:
    """Build TrainingArguments, optimizer and schedule of a recipe; returns warnings.

    Args:
        steps: of the whole training, if they are known: some schedules cannot be as short as their own parts.

    Raises:
        RecipeError: an unknown name, a value of the wrong type, values that do not work together, a package that is missing, a
            setting that the optimizer or the schedule does not use.
    """
    arguments, rate = dict(train.arguments), train.learning_rate
    return checked_once(pins, ["arguments", 4, arguments, rate, steps], lambda: _try_arguments(arguments, rate, steps))


@hide_packages(*NOT_NEEDED)
def _try_arguments(arguments: Mapping[str, Any], learning_rate: float, steps: int | None) -> list[str]:
    """Leaves no folder behind and forms no process group."""
    import dataclasses

    import transformers
    from transformers import TrainingArguments

    installed = f"transformers {transformers.__version__}"
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments)
    for name, value in arguments.items():
        if name not in known:
            near = nearest(name, EFFECTIVE) or "`afina recipe keys train` lists them"
            raise RecipeError(f"train.arguments.{name}: TrainingArguments of {installed} has no such argument", near)
        if not _fits(value, hints[name]):
            wanted = " or ".join(t.__name__ for t in _plain_types(hints[name]))
            raise RecipeError(
                f"train.arguments.{name}: {value!r} is {_a(type(value).__name__)}; it must be {wanted}",
                "correct the value",
            )
    checked = {name: value for name, value in arguments.items() if name not in _HARDWARE}
    checked["learning_rate"] = learning_rate
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = _built(checked, installed)
        if {"optim", "lr_scheduler_type", *_OF_OPTIMIZER, *_OF_SCHEDULE} & checked.keys():
            optimizer = _check_optimizer(given, checked, installed)
            _check_schedule(given, checked, optimizer, installed)
            _check_steps(given, optimizer, steps)
    remarks = [f"train.arguments: {w.message}" for w in caught if issubclass(w.category, FutureWarning)]
    if steps is not None and (warmup := given.get_warmup_steps(steps)) >= steps:
        remarks.append(
            f"train.arguments.warmup_steps: {warmup:,} steps, and the training has {steps:,}: the learning rate never reaches "
            f"{learning_rate:g}"
        )
    return remarks


def _built(arguments: Mapping[str, Any], installed: str) -> Any:
    """The TrainingArguments, on the CPU. Their `output_dir` is not created before training begins."""
    from transformers import TrainingArguments

    try:
        return TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **arguments)
    except (ValueError, TypeError, ImportError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        named = next((n for n in arguments if n in reason), None) or next(
            (n for n, v in arguments.items() if isinstance(v, str) and v in reason), None
        )
        raise RecipeError(
            f"train.arguments{f'.{named}' if named else ''}: {installed} refuses: {reason}", "correct the value"
        ) from None


def _check_optimizer(given: Any, arguments: Mapping[str, Any], installed: str) -> Any:
    """Build the optimizer on a small layer; returns it, or one in its place where it needs the modules of the real model."""
    import torch

    name = getattr(given.optim, "value", given.optim)
    try:
        built = _optimizer(given)
    except ImportError as error:
        raise RecipeError(
            f"train.arguments.optim: {name} needs a package that is not installed here: {_line(error)}",
            "build an image that has it (container/lock.sh), or use `adamw_torch`, `adafactor` or `sgd`",
        ) from None
    except Exception as error:  # any: constructors of other people's optimizers
        if "target modules" in str(error):  # of the real model
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        remedy = "correct the value, or use `adamw_torch`, `adafactor` or `sgd`"
        raise RecipeError(f"train.arguments.optim: {name} cannot be built: {_line(error)}", remedy) from None
    for key in _OF_OPTIMIZER:
        if key in arguments and arguments[key] != (default := _default(key)):
            other = _built({**arguments, key: default}, installed)
            if _settings(_optimizer(other)) == _settings(built):
                raise RecipeError(
                    f"train.arguments.{key}: the optimizer {name} does not use it",
                    "leave it out, or set another `optim`",
                )
    return built


def _optimizer(given: Any) -> Any:
    """As `Trainer.create_optimizer`, for one layer."""
    import torch
    from transformers import Trainer

    layer = torch.nn.Linear(2, 2)
    kind, named = Trainer.get_optimizer_cls_and_kwargs(given, layer)
    return kind([{"params": list(layer.parameters()), "weight_decay": given.weight_decay}], **named)


def _settings(optimizer: Any) -> str:
    """The settings of its first group, without the parameters; weight decay only where the optimizer itself knows it."""
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    if "weight_decay" not in optimizer.defaults:
        group.pop("weight_decay", None)
    return repr(sorted(group.items(), key=lambda item: item[0]))


def _check_schedule(given: Any, arguments: Mapping[str, Any], optimizer: Any, installed: str) -> None:
    name = getattr(given.lr_scheduler_type, "value", given.lr_scheduler_type)
    try:
        rates = _rates(given, optimizer)
    except Exception as error:  # any: missing or unknown settings come as TypeError, ValueError, …
        raise RecipeError(
            f"train.arguments.lr_scheduler_type: {name} cannot be built: {_line(error)}",
            "set what it needs in `lr_scheduler_kwargs`, or use `linear` or `cosine`",
        ) from None
    for key in _OF_SCHEDULE:
        if arguments.get(key) and arguments[key] != _default(key):
            try:
                other = _rates(_built({**arguments, key: _default(key)}, installed), optimizer)
            except Exception:  # it cannot do without
                continue
            if other == rates:
                with_warmup = (
                    "use `constant_with_warmup`" if (name, key) == ("constant", "warmup_steps") else "leave it out"
                )
                raise RecipeError(f"train.arguments.{key}: the schedule {name} does not use it", with_warmup)


def _check_steps(given: Any, optimizer: Any, steps: int | None) -> None:
    """Refuse a schedule that fails at a step of this training: its warmup, say, takes all of it."""
    if steps is None:
        return
    warmup = given.get_warmup_steps(steps)
    at = sorted({step for near in (0, warmup, steps) for step in range(max(0, near - 1), min(steps, near + 1) + 1)})
    try:
        rates = _rates(given, optimizer, steps, at)
    except Exception as error:  # any: a division by the steps that are left
        rates, why = [], _line(error)
    else:
        why = "a rate is not finite"
    if not rates or not all(map(math.isfinite, rates)):
        name = getattr(given.lr_scheduler_type, "value", given.lr_scheduler_type)
        raise RecipeError(
            f"train.arguments.lr_scheduler_type: {name} fails in a training of {plural(steps, 'step')} with {warmup:,} of warmup: {why}",
            "train for more steps, or lower `warmup_steps`",
        )


def _rates(given: Any, optimizer: Any, steps: int = 0, at: Iterable[int] = ()) -> list[float]:
    """The learning rates of a short run; or of one of `steps` steps, at some of them."""
    from transformers import get_scheduler

    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
        group["lr"] = given.learning_rate
    steps = steps or max(_STEPS, 2 * int(given.warmup_steps) if given.warmup_steps < 10_000 else _STEPS)
    schedule = get_scheduler(
        given.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=given.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=given.lr_scheduler_kwargs,
    )
    return [float(each) for step in at or range(steps) for each in [schedule.lr_lambdas[0](step)]]


def _default(name: str) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments.__dataclass_fields__[name].default


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())


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
