"""Packed batches for encoders of Transformers: hooks that any proven architecture takes, with its own head, unchanged.

A packed batch is (1, T): the examples of a micro-batch one behind the other. Positions restart with each example, attention
separates the examples (`afina.worker.compute.attention`), and from the point in the last layer where only first tokens are needed a
hook passes those on, (B, 1, hidden). The rest (most of the last layer, pooler, classifier) processes B tokens, which saves
packed batches up to a layer's work.

An architecture is in `PROVEN` if logits, loss and all gradients of packed and padded batches were shown to be equal
(tests/unit/compute/test_packed_model.py). Only classes of Transformers itself qualify: code from a model's repository may pool otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, TrainingArguments

from afina.errors import InputError
from afina.recipe.schema import Recipe
from afina.worker.compute import attention
from afina.worker.compute.batches import Batching, Collator, PackedCollator
from afina.worker.compute.dropout import use_fast_dropout
from afina.worker.compute.packing import Packing
from afina.worker.data.prepared import Split
from afina.worker.model.padding import padding_side, separate_rows

__all__ = [
    "PROVEN",
    "Architecture",
    "enable_packing",
    "attention_dropout",
    "collator",
    "checkpoints_activations",
    "configure",
    "why_not_packed",
]


@dataclass(frozen=True)
class Architecture:
    """The differences between encoders.

    Attributes:
        last: path of the module from which on only first tokens are needed, below the encoder; its inputs are per token.
        attention: path of the last attention, whose output is then read at first tokens only.
        offset: positions begin at pad_token_id + 1, and a padding token inside a text has position pad_token_id.
        attention_dropout: the configuration's key for the dropout of attention probabilities.
    """

    last: str
    attention: str
    offset: bool = False
    attention_dropout: str = "attention_probs_dropout_prob"


_BERT = ("encoder.layer.-1.attention.output", "encoder.layer.-1.attention.self")
#: By `model_type`. MiniLM models are BERTs.
PROVEN = {
    "bert": Architecture(*_BERT),
    "electra": Architecture(*_BERT),
    "roberta": Architecture(*_BERT, offset=True),
    "xlm-roberta": Architecture(*_BERT, offset=True),
    "camembert": Architecture(*_BERT, offset=True),
    "distilbert": Architecture(
        "transformer.layer.-1.sa_layer_norm", "transformer.layer.-1.attention", attention_dropout="attention_dropout"
    ),
    "mpnet": Architecture("encoder.layer.-1.attention.LayerNorm", "encoder.layer.-1.attention.attn", offset=True),
    "modernbert": Architecture("final_norm", "layers.-1.attn", attention_dropout="attention_dropout"),
}


def why_not_packed(model: Any) -> str | None:
    """The reason why `model` cannot take packed batches; None where it can."""
    kind = model.config.model_type
    if kind not in PROVEN:
        return f"not proven for {kind}"
    if not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is not a class of Transformers itself"
    if getattr(model.config, "is_decoder", False):
        return "the model is configured as a decoder"
    return None


def enable_packing(model: Any, implementation: str) -> None:
    """Let `model` accept `packing=` with `input_ids` and `position_ids` of (1, T); padded batches work as before.

    Args:
        implementation: of attention: `attention.FAST` or `attention.PLAIN`.
    """
    architecture = PROVEN[model.config.model_type]
    attention.register()
    if model.config.model_type != "mpnet":
        model.set_attn_implementation(implementation)
    current: list[Packing | None] = [None]

    def remember(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        packing = named.pop("packing", None)
        if packing is not None:
            packing = named["packing"] = packing.to(named["input_ids"].device)
        current[0] = packing
        return arguments, named

    def first_tokens(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        packing = current[0]
        if packing is None:
            return None
        return tuple(x[0].index_select(0, packing.starts)[:, None] for x in arguments)

    def mean_tokens(_: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        packing = current[0]
        if packing is None:
            return output
        lengths = torch.tensor(packing.lengths, device=output.device)
        return torch.segment_reduce(output[0], "mean", lengths=lengths)[:, None]

    model.register_forward_pre_hook(remember, with_kwargs=True)
    if model.config.model_type == "mpnet":
        _give_mpnet_attention(
            model.base_model.encoder, partial(attention.attend, fast_dropout=implementation == attention.FAST), current
        )
    if getattr(model.config, "classifier_pooling", "cls") == "mean":
        _below(model, architecture.last).register_forward_hook(mean_tokens)
    else:
        _below(model, architecture.last).register_forward_pre_hook(first_tokens)
        setattr(_below(model, architecture.attention), attention.FIRST_ONLY, True)


def _below(model: Any, path: str) -> Any:
    """The module at `path` below the encoder; a number is an index."""
    module = model.base_model
    for name in path.split("."):
        module = module[int(name)] if name.lstrip("-").isdigit() else getattr(module, name)
    return module


def _give_mpnet_attention(encoder: Any, attend: Callable[..., Any], current: list[Packing | None]) -> None:
    """Replace MPNet's attention and position bias for packed batches: MPNet does not use the attention interface."""

    def bias(usual: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        packing = current[0]
        # The bias depends on distances alone: that of the longest sequence contains all others.
        return usual(x if packing is None else x[:, : packing.lengths[0]], *arguments, **named)

    def forward(
        module: Any,
        usual: Callable[..., Any],
        hidden: torch.Tensor,
        mask: Any = None,
        position_bias: torch.Tensor | None = None,
        **named: Any,
    ) -> Any:
        packing = current[0]
        if packing is None:
            return usual(hidden, mask, position_bias, **named)
        shape = (*hidden.shape[:-1], -1, module.attention_head_size)
        q, k, v = (project(hidden).view(shape).transpose(1, 2) for project in (module.q, module.k, module.v))
        p = module.dropout.p if module.training else 0.0
        out, _ = attend(module, q, k, v, None, dropout=p, packing=packing, bias=position_bias)
        return (module.o(out.reshape(*hidden.shape[:-1], -1)),)

    encoder.compute_position_bias = partial(bias, encoder.compute_position_bias)
    for layer in encoder.layer:
        module = layer.attention.attn
        module.forward = partial(forward, module, module.forward)


def collator(
    model: Any,
    split: Split,
    batching: Batching,
    pad_token_id: int,
    *,
    tokenizer_side: str = "right",
    max_length: int | None = None,
    device: str = "cpu",
) -> Collator | PackedCollator:
    """Makes batches of `split` for `model`, by `batching`.

    Args:
        pad_token_id, tokenizer_side: the tokenizer's padding.
        max_length: the width of `padded` batches.
        device: kind of device, for packed batches.
    """
    if batching != "packed":
        pad_to = max_length if batching == "padded" else None
        return Collator(split, pad_token_id, pad_to, padding_side(model, tokenizer_side))
    offset = PROVEN[model.config.model_type].offset
    first = model.base_model.embeddings.padding_idx if offset else pad_token_id
    return PackedCollator(split, first, model.config.num_attention_heads, offset, device)


def attention_dropout(recipe: Recipe, folder: str) -> dict[str, float]:
    """Changes to the configuration of the model in `folder` by `train.attention_dropout`.

    Raises:
        InputError: this kind of configuration has none of the known keys for attention dropout.
    """
    if recipe.train.attention_dropout is None:
        return {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
    for key in dict.fromkeys(architecture.attention_dropout for architecture in PROVEN.values()):
        if hasattr(config, key):
            return {key: float(recipe.train.attention_dropout)}
    raise InputError(
        f"train.attention_dropout: a {config.model_type} configuration has no attention dropout that afina knows",
        "leave it out",
    )


def checkpoints_activations(arguments: TrainingArguments) -> bool:
    """Whether the backward pass recomputes layers (activation checkpointing)."""
    return any(getattr(arguments, f"{kind}_checkpointing", None) for kind in ("activation", "gradient"))


def configure(model: Any, recipe: Recipe, arguments: TrainingArguments) -> tuple[Batching, list[str]]:
    """Prepare `model` for the recipe's batching and dropout; returns the batching that it supports, and notes for the log."""
    requested, notes = recipe.tokens.batching, []
    compiled = bool(arguments.torch_compile)
    fast = recipe.train.fast_dropout and arguments.device.type == "cpu" and not compiled
    # Recomputation restores torch's generator, not ours.
    fast = fast and not checkpoints_activations(arguments)
    if fast:
        use_fast_dropout(model)
    unproven = "not proven under torch_compile" if compiled else why_not_packed(model)
    if arguments.neftune_noise_alpha:
        unproven = "NEFTune scales its noise by the width of a batch"
    batching: Batching = requested
    if requested in ("auto", "packed"):
        batching = "packed" if unproven is None else "grouped"
        if unproven is not None:
            notes.append(f"batches are grouped by length, not packed: {unproven}")
    if unproven is None and (fast or batching == "packed"):
        enable_packing(model, attention.FAST if fast else attention.PLAIN)
    if (apart := separate_rows(model)) is not None:
        notes.append(apart)
    if batching != "padded":
        attention.disable_cudnn_sdpa(arguments.device)
    if recipe.train.attention_dropout is not None:
        notes.append("attention dropout is 0 (the recipe), whatever the model's configuration says")
    return batching, notes
