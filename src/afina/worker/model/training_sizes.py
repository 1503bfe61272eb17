"""Sizes of a training, from its model; and before one is loaded, from the same model built without memory.

Not covered: what a checkpoint holds beside weights and optimizer (tens of kB); the optimizers that project gradients (GaLore, APOLLO), which count
as AdamW.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from afina.errors import AfinaError
from afina.files import sha256
from afina.recipe.schema import Recipe
from afina.sizes import Sizes
from afina.worker.model.adapters import has_adapter, labels_config, weights_folder
from afina.worker.model.check_cache import kept_once
from afina.worker.model.weights import headers_digest
from afina.worker.startup import NOT_NEEDED, gc_paused, hide_packages

__all__ = ["expected_sizes", "sizes_of"]

#: Bytes that AdamW keeps of a trained weight: two moments in float32.
_ADAMW = 8.0
#: The side of a matrix on which the state of another optimizer is measured.
_SIDE = 256
_OF_OPTIMIZER = ("optim", "optim_args")


def sizes_of(model: Any, recipe: Recipe) -> Sizes:
    """The sizes of training `model`, which is whole and in float32."""
    from afina.worker.model.frozen_weights import stored_bytes

    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    trained = sum(number for number, is_trained in counts if is_trained)
    weights, moments = 4 * sum(number for number, _ in counts), round(trained * _state_of_a_weight(recipe))
    exported = 4 * trained if has_adapter(model) else weights
    return Sizes(
        weights=weights,
        state=stored_bytes(model, recipe.train.base_dtype) + 4 * trained + moments,
        checkpoint=exported + moments,
        exported=exported,
    )


def expected_sizes(folder: Path, recipe: Recipe, task: str, num_labels: int, pins: Path) -> dict[str, int] | None:
    """The fields of `Sizes` for the model in `folder`; None where only a training can tell (pickled weights, other people's code)."""
    about = [
        "sizes",
        1,
        *(headers_digest(each) for each in (folder, weights_folder(folder))),
        sha256(labels_config(folder) / "config.json"),
        [task, num_labels, recipe.trust_remote_code],
        recipe.adapter and recipe.adapter.model_dump(mode="json"),
        [recipe.train.freeze, recipe.train.base_dtype],
        [recipe.train.arguments.get(name) for name in _OF_OPTIMIZER],
    ]
    sizes: dict[str, int] | None = kept_once(pins, about, lambda: _without_memory(folder, recipe, task, num_labels))
    return sizes


def _without_memory(folder: Path, recipe: Recipe, task: str, num_labels: int) -> dict[str, int] | None:
    with hide_packages(*NOT_NEEDED), gc_paused():
        import transformers

        from afina.worker.model.head import build_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, _ = build_model(recipe, folder, task, None, num_labels, {"device_map": "meta"})
        return dataclasses.asdict(sizes_of(model, recipe))
    except AfinaError:
        raise
    except Exception:  # a training may load what `meta` cannot
        return None


def _state_of_a_weight(recipe: Recipe) -> float:
    """Bytes of the optimizer's state for each trained weight: of another one than AdamW after a step on a matrix. Draws no random numbers."""
    given = {name: value for name in _OF_OPTIMIZER if (value := recipe.train.arguments.get(name)) is not None}
    if not given:
        return _ADAMW
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    holder = torch.nn.Module()
    holder.weight = weight = torch.nn.Parameter(torch.ones(_SIDE, _SIDE))
    weight.grad = torch.ones_like(weight)
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    try:
        optim = OptimizerNames(given.get("optim", TrainingArguments.default_optim))
        # Not the class itself: it would set up accelerate's state in this process.
        arguments: Any = SimpleNamespace(**{**defaults, **given, "optim": optim})
        kind, named = Trainer.get_optimizer_cls_and_kwargs(arguments, holder)
        optimizer = kind([weight], **named)
        optimizer.step()
    except Exception:  # any: some need a GPU, or the modules of the real model
        return _ADAMW
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor)) / weight.numel()
