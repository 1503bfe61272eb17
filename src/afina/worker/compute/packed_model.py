"""Packed batches for models of Transformers: hooks around its own classes, whose code stays as it is.

A packed batch is (1, T): the examples of a micro-batch one behind the other. Positions restart with each example, and attention
separates the examples (`afina.worker.compute.attention`). There are two ways to the head.

Encoders in `PROVEN` (tests/unit/compute/test_packed_model.py): from the point in the last layer where only first tokens are needed a hook
passes those on, (B, 1, hidden). The rest (most of the last layer, pooler, classifier) processes B tokens, which saves packed
batches up to a layer's work.

All others, decoders above all: the model's own forward gets the padded batch, its body the packed one, and between body and head (or
pooler) the hidden states are padded again. So the head pools as it always does: the last token that is not padding, the first one or
a mean. That suits every architecture whose layers work token by token but for attention, and whose attention is Transformers' interface.
Whether one is of that kind is not looked up but tried, by `_prove`: a small model of the same class and configuration must give the same
logits and the same gradients packed as row by row in plain Transformers; else its batches are grouped.

Token classifiers pool nothing: of both kinds the head reads every token of the packed batch, and gives (1, T, K).

Only classes of Transformers itself qualify: code from a model's repository may pool otherwise.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, TrainingArguments

from afina.errors import InputError, first_line
from afina.recipe.schema import Recipe
from afina.worker.compute import attention
from afina.worker.compute.batches import Batching, Collator, PackedCollator
from afina.worker.compute.dropout import use_fast_dropout
from afina.worker.compute.packing import Packing
from afina.worker.data.prepared import Split
from afina.worker.model.padding import padding_side, separate_rows
from afina.worker.model.weights import is_token_classifier

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


def _architecture(model: Any) -> Architecture | None:
    """The line of `PROVEN` for an encoder that pools first tokens."""
    config = model.config
    pools = getattr(config, "classifier_pooling", "cls") == "mean" and not is_token_classifier(model)
    return None if pools else PROVEN.get(config.model_type)


def why_not_packed(model: Any) -> str | None:
    """The reason why `model` cannot take packed batches; None where it can. For an architecture that is not in `PROVEN` it is tried."""
    if not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is not a class of Transformers itself"
    if _architecture(model) is None:
        family: Any = type(model)
        return _prove(family, json.dumps(model.config.to_dict(), sort_keys=True, default=str))
    if getattr(model.config, "is_decoder", False):
        return "the model is configured as a decoder"
    return None


def enable_packing(model: Any, implementation: str) -> None:
    """Let `model` accept `packing=` with `input_ids` and `position_ids` of (1, T); padded batches work as before.

    Args:
        implementation: of attention: `attention.FAST` or `attention.PLAIN`.
    """
    architecture = _architecture(model)
    if architecture is None:
        _pack_body(model, implementation)
        return
    attention.register()
    if model.config.model_type != "mpnet":
        model.set_attn_implementation(implementation)
    current: list[Packing | None] = [None]

    def remember(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        packing = named.pop("packing", None)
        if packing is not None:
            packing = named["packing"] = packing.to(named["input_ids"].device)
            if model.config.model_type != "mpnet":
                named["attention_mask"] = _no_mask(named["input_ids"].device)
        current[0] = packing
        return arguments, named

    def first_tokens(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        packing = current[0]
        if packing is None:
            return None
        return tuple(x[0].index_select(0, packing.starts)[:, None] for x in arguments)

    model.register_forward_pre_hook(remember, with_kwargs=True)
    if model.config.model_type == "mpnet":
        _give_mpnet_attention(
            model.base_model.encoder, partial(attention.attend, fast_dropout=implementation == attention.FAST), current
        )
    if not is_token_classifier(model):
        _below(model, architecture.last).register_forward_pre_hook(first_tokens)
        setattr(_below(model, architecture.attention), attention.FIRST_ONLY, True)


def _no_mask(device: torch.device) -> torch.Tensor:
    """A mask for packed batches. Transformers passes one with four dimensions on as it is, and attention ignores it: one over all tokens
    of a batch would be large, and finding out that it is packed waits for the GPU.
    """
    # Not a boolean, of which `debug` takes no absolute values; and DeBERTa multiplies its embeddings by it.
    return torch.ones(1, 1, 1, 1, device=device)


def _pack_body(model: Any, implementation: str) -> None:
    """Hooks that pack the body of `model` alone; see `enable_packing`."""
    attention.register()
    body, current = model.base_model, dict[str, Any]()
    if model.config.model_type == "deberta-v2":  # its attention is not on Transformers' interface
        attention.give_deberta_attention(body.encoder, current)
    else:
        model.set_attn_implementation(implementation)
    takes = list(inspect.signature(type(body).forward).parameters)

    def padded(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        packing = named.pop("packing", None)
        current.clear()
        if packing is not None:
            tokens = named.pop("input_ids")
            packing = packing.to(tokens.device)
            whole, pad = packing.whole, model.config.pad_token_id
            current.update(input_ids=tokens, position_ids=named.pop("position_ids"), packing=packing)
            mask = tokens.new_ones(whole.count, whole.width) if whole.mask is None else whole.mask[:, 0, 0].long()
            named |= {"input_ids": whole.pad(tokens[0], pad or 0), "attention_mask": mask}
        return arguments, named

    def packed(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        named = {**dict(zip(takes[1:], arguments, strict=False)), **named}
        if "use_cache" in takes:  # keys and values of a classifier are not used again
            named["use_cache"] = False
        if current:
            named |= {**current, "attention_mask": _no_mask(current["input_ids"].device)}
        return (), named

    def unpacked(hidden: torch.Tensor) -> torch.Tensor:
        padded: torch.Tensor = current["packing"].whole.pad(hidden[0])
        return padded

    def before_pooler(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (unpacked(arguments[0]), *arguments[1:]) if current else None

    def after_body(_: nn.Module, arguments: Any, output: Any) -> Any:
        if current and not is_token_classifier(model):
            output.last_hidden_state = unpacked(output.last_hidden_state)
        return output

    model.register_forward_pre_hook(padded, with_kwargs=True)
    body.register_forward_pre_hook(packed, with_kwargs=True)
    body.register_forward_hook(after_body)
    if isinstance(pooler := getattr(body, "pooler", None), nn.Module):
        pooler.register_forward_pre_hook(before_pooler)


#: The most that the model of `_prove` has of each, by the names of configurations.
_AT_MOST = {
    4: "sliding_window attention_chunk_size num_local_experts num_experts n_routed_experts",
    2: "num_experts_per_tok",
    64: "vocab_size intermediate_size n_inner ffn_dim moe_intermediate_size shared_expert_intermediate_size",
}
_LENGTHS, _TOLERANCE = (11, 9, 9, 6, 2, 1), 1e-4


def _shrunk(config: Any) -> Any:
    """A copy of `config` for a small model that differs in sizes alone: two layers, or one of each kind; heads as wide as they are."""
    small = copy.deepcopy(config)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    width, groups = (
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        getattr(config, "num_key_value_heads", None),
    )
    few = 2 if groups in (None, heads) else 4
    sizes = {
        "num_attention_heads": few,
        "num_key_value_heads": {None: None, heads: few, 1: 1}.get(groups, 2),
        "hidden_size": few * width if config.hidden_size == heads * width else 32,
        "num_labels": 3,
    }
    sizes["pooler_hidden_size"] = sizes["hidden_size"]
    for most, names in _AT_MOST.items():
        sizes |= {name: min(getattr(config, name, None) or most, most) for name in names.split()}
    by_layer = {n: v for n, v in config.to_dict().items() if isinstance(v, (list, tuple)) and len(v) == layers}
    kinds = list(zip(*by_layer.values(), strict=True)) or [()] * layers
    chosen = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, layers))))
    sizes["num_hidden_layers"] = len(chosen)
    sizes |= {name: [value[i] for i in chosen] for name, value in by_layer.items()}
    sizes |= {name: i for i, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id"))}
    for name, size in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(small, name, size)
    return small


@functools.cache
def _prove(family: Any, config: str) -> str | None:
    """Compare a small model packed with the same in plain Transformers, each row alone: logits and all gradients; None where they are equal.

    Args:
        family: class of the model.
        config: its configuration, as JSON.
    """
    kind, draw = json.loads(config).get("model_type"), np.random.default_rng(0)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            small = _shrunk(family.config_class.from_dict(json.loads(config)))
            model = family._from_config(small, dtype=torch.float32).train()
            for weight in model.parameters():
                nn.init.normal_(weight, std=2 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            tokens = draw.integers(3, model.config.vocab_size, sum(_LENGTHS)).astype(np.uint16)
            ends = np.cumsum(_LENGTHS)
            tokens[ends[1] - 1] = 0  # a text that ends with the padding token
            split = Split(tokens, np.concatenate([[0], ends]), np.zeros(len(_LENGTHS), np.int64), None)
            alone = [_logits_and_gradients(model, Collator(split, 0)([row])) for row in range(len(_LENGTHS))]
            enable_packing(model, attention.PLAIN)
            found = _logits_and_gradients(
                model, collator(model, split, "packed", 0, fill=True)(list(range(len(_LENGTHS))))
            )
    except Exception as error:  # whatever a model's code raises of inputs that it does not know
        return f"{kind} does not take packed batches: {type(error).__name__}: {first_line(error)}"
    wanted = [torch.cat([a[0] for a in alone]), *(sum(g) for g in zip(*(a[1:] for a in alone), strict=True))]
    largest = max(float(x.abs().max()) for x in wanted[1:])
    for i, (mine, true) in enumerate(zip(found, wanted, strict=True)):
        scale = max(float(true.abs().max()), 1e-3 * largest if i else 0)
        if mine.shape != true.shape or not float((mine - true).abs().max()) <= _TOLERANCE * scale:
            return f"a packed batch of {kind} has other {'gradients' if i else 'logits'} than its rows alone"
    return None


def _logits_and_gradients(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Logits (B, K), of tokens (T, K), and the gradients of all parameters for a sum of them."""
    model.zero_grad(set_to_none=True)
    batch.pop("labels")
    tokens = batch["packing"].tokens if "packing" in batch else None  # padding may lie behind them
    logits = model(**batch)["logits"].flatten(0, -2)[:tokens]
    (logits * torch.tensor([1.0, -0.5, 0.25])).sum().backward()
    return [logits.detach(), *(torch.zeros_like(w) if w.grad is None else w.grad for w in model.parameters())]


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
    fill: bool = False,
) -> Collator | PackedCollator:
    """Makes batches of `split` for `model`, by `batching`.

    Args:
        pad_token_id, tokenizer_side: the tokenizer's padding.
        max_length: the width of `padded` batches.
        device, fill: of packed batches, see `PackedCollator`.
    """
    if batching != "packed":
        pad_to = max_length if batching == "padded" else None
        return Collator(split, pad_token_id, pad_to, padding_side(model, tokenizer_side))
    architecture = _architecture(model)
    offset = architecture is not None and architecture.offset
    first = model.base_model.embeddings.padding_idx if offset else pad_token_id
    return PackedCollator(split, first, model.config.num_attention_heads, offset, device, fill)


def attention_dropout(recipe: Recipe, folder: str) -> dict[str, float]:
    """Changes to the configuration of the model in `folder` by `train.attention_dropout`.

    Raises:
        InputError: this kind of configuration has none of the known keys for attention dropout.
    """
    if recipe.train.attention_dropout is None:
        return {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
    for key in dict.fromkeys([*(architecture.attention_dropout for architecture in PROVEN.values()), "attn_pdrop"]):
        if hasattr(config, key):
            return {key: float(recipe.train.attention_dropout)}
    raise InputError(
        f"train.attention_dropout: a {config.model_type} configuration has no attention dropout that afina knows",
        "leave it out",
    )


def checkpoints_activations(arguments: TrainingArguments) -> bool:
    """True if the backward pass recomputes layers (activation checkpointing)."""
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
