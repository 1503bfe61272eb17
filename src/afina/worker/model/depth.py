"""The layers of a model by depth: which are frozen (`train.freeze`), at what rate each is trained (`train.layer_decay`); and which are sharded.

    0       the embeddings: all tables, and what stands before the layers
    1 … L   the layers, in the order of the model's modules; a decoder's come after its encoder's
    L + 1   the rest of the body (a last norm, a pooler), and the head

A layer at depth d is trained at learning_rate · layer_decay^(L + 1 - d) (Clark et al. 2020, "ELECTRA"). Not covered: layers that share their weights
(ALBERT) are one layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any, Literal

from torch import nn

from afina.errors import RecipeError
from afina.recipe.keys.train_keys import Train
from afina.worker.model.adapters import trained_share
from afina.worker.model.padding import runs_rows_apart
from afina.worker.model.weights import input_embeddings

__all__ = ["blocks", "check_freeze", "check_sharding", "depths", "freeze", "learning_rates", "step_cost"]

#: Shares of layers that are skipped at random, by configuration.
_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def depths(model: nn.Module) -> dict[str, int]:
    """Name of each parameter -> its depth."""
    stacks = _stacks(model)
    embeddings = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.Embedding))
    top, seen, found = sum(stacks.values()) + 1, 0, {}
    starts = dict(zip(stacks, itertools.accumulate(stacks.values(), initial=0), strict=False))
    for name, _ in model.named_parameters():
        stack = next((path for path in stacks if name.startswith(f"{path}.")), None)
        if stack is not None:
            seen = found[name] = starts[stack] + int(name.removeprefix(f"{stack}.").partition(".")[0]) + 1
        elif not _in_body(model, name):
            found[name] = top
        elif seen == 0 or name.startswith(embeddings):
            found[name] = 0
        else:
            found[name] = top if seen + 1 == top else seen  # after all layers, or between an encoder's and a decoder's
    return found


def _stacks(model: Any) -> dict[str, int]:
    """The lists of layers below the head that are in no other one, and their lengths."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not _in_body(model, path):
            continue
        inner = any(path.startswith(f"{other}.") for other in found)
        of_layers = len(module) > 0 and all(any(True for _ in layer.children()) for layer in module)
        if of_layers and not inner:  # not a list of embeddings
            found[path] = len(module)
    return found


def _in_body(model: Any, name: str) -> bool:
    return name.startswith(f"{model.base_model_prefix}.")


def check_freeze(wanted: Literal["embeddings", "body"] | int | None, model: Any) -> None:
    """Refuse more layers than there are.

    Raises:
        RecipeError: with the number of layers.
    """
    count = sum(_stacks(model).values())
    if isinstance(wanted, int) and wanted > count:
        raise RecipeError(
            f"train.freeze: {wanted} layers, and the model has {count}",
            f"write {count} or fewer, or `body`, which freezes everything below the head",
        )


def freeze(model: Any, train: Train, new: Collection[str] = ()) -> str:
    """Freeze the embeddings and the first layers, in place; returns a line for the log.

    Args:
        train: with `freeze`.
        new: names of weights that the base does not have; they are trained.

    Raises:
        RecipeError: the model has fewer layers.
    """
    wanted = train.freeze
    check_freeze(wanted, model)
    limit = 0 if wanted == "embeddings" else wanted
    for name, depth in depths(model).items():
        if name not in new and (depth <= limit if isinstance(limit, int) else _in_body(model, name)):
            model.get_parameter(name).requires_grad_(False)
    return f"frozen: {train.frozen}; {trained_share(model)}"


def step_cost(model: nn.Module) -> float:
    """FLOPs of forward and backward over those of forward: 3 where all is trained.

    Backward computes the gradients of inputs down to the lowest trained layer, and those of the trained weights.
    """
    of = depths(model)
    # Embeddings are looked up: they cost nothing, in neither direction.
    weights = [
        (of[name], weight.numel(), weight.requires_grad) for name, weight in model.named_parameters() if of[name]
    ]
    layers = max((depth for depth, _, _ in weights), default=1) - 1
    lowest = min((depth for depth, _, trained in weights if trained), default=layers + 1)
    reach = (layers + 1 - lowest) / layers if layers else 1.0
    return 1 + reach + sum(n for _, n, trained in weights if trained) / max(1, sum(n for _, n, _ in weights))


def learning_rates(model: nn.Module, train: Train) -> dict[nn.Parameter, float]:
    """The learning rate of each trained parameter."""
    of = depths(model)
    top = max(of.values())
    head = train.head_learning_rate or train.learning_rate
    return {
        weight: train.learning_rate * train.layer_decay ** (top - of[name]) if _in_body(model, name) else head
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def blocks(model: Any) -> list[Any]:
    """The transformer blocks of a model that is not sharded: the layers that Transformers keeps whole or recomputes, without embeddings."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    kept_whole = set(getattr(model, "_no_split_modules", None) or ())
    embeddings = input_embeddings(model)
    found, pending = [], [model]
    while pending:
        for child in pending.pop().children():
            block = isinstance(child, GradientCheckpointingLayer) or type(child).__name__ in kept_whole
            if block and embeddings not in child.modules():
                found.append(child)
            else:
                pending.append(child)
    return found


def check_sharding(model: Any) -> None:
    """Refuse a classifier whose weights `afina.worker.compute.ranks.shard` cannot shard.

    Raises:
        RecipeError: with the reason.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    shared = sorted(set(names) - {name for name, _ in model.named_parameters()})
    single = [name for name, weight in model.named_parameters() if not weight.ndim]
    reason = ""
    if not blocks(model):
        reason = "Transformers names no blocks of it"
    elif shared:
        reason = f"its weights are shared between modules ({shared[0]})"
    elif single:
        reason = f"{single[0]} is a single number"
    elif runs_rows_apart(model) or any(getattr(model.config, name, 0) for name in _LAYERDROP):
        reason = "processes would call its blocks unequally often"
    if reason:
        raise RecipeError(
            f"train.sharding: {type(model).__name__} cannot be sharded: {reason}", "set train.sharding: none"
        )
