"""Small random models of each architecture, random splits, and one training step: for the tests of packing, attention and graphs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from afina.worker.compute.batches import scored_logits
from afina.worker.data.prepared import Split
from afina.worker.task.losses import Loss
from afina.worker.task.tasks import auto_class
from afina.worker.task.word_places import CUT, SHARED, WordPlaces

VOCABULARY, PAD = 200, 1
LENGTHS = (37, 36, 36, 20, 20, 7, 3, 2, 1)

SMALL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": 5, "max_position_embeddings": 64}
BERT = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
MODERN = {**BERT, "local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**BERT, "model_type": "bert", "type_vocab_size": 2},
    "bert, one layer": {**BERT, "model_type": "bert", "num_hidden_layers": 1},
    "electra": {**BERT, "model_type": "electra", "embedding_size": 32},
    "roberta": {**BERT, "model_type": "roberta"},
    "xlm-roberta": {**BERT, "model_type": "xlm-roberta"},
    "camembert": {**BERT, "model_type": "camembert"},
    "distilbert": {"model_type": "distilbert", "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128},
    "mpnet": {**BERT, "model_type": "mpnet"},
    "modernbert": {**MODERN, "model_type": "modernbert", "classifier_pooling": "cls"},
    "modernbert, mean": {**MODERN, "model_type": "modernbert", "classifier_pooling": "mean"},
}
GROUPED = {**BERT, "num_key_value_heads": 2}
#: Decoders, and encoders without a line in `PROVEN`: what is special in each does something in texts of these lengths.
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "model_type": "llama"},
    "qwen2": {
        **GROUPED,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {**GROUPED, "model_type": "qwen3", "head_dim": 24},
    "mistral": {**GROUPED, "model_type": "mistral", "sliding_window": 8},
    "gemma": {**BERT, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 24},
    "gemma2": {**GROUPED, "model_type": "gemma2", "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "gemma3": {
        **GROUPED,
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
    "smollm3": {**GROUPED, "model_type": "smollm3", "no_rope_layer_interval": 2},
    "eurobert, late": {**BERT, "model_type": "eurobert", "classifier_pooling": "late", "mask_token_id": 4},
    "eurobert, mean": {**BERT, "model_type": "eurobert", "classifier_pooling": "mean", "mask_token_id": 4},
    "nomic_bert": {**BERT, "model_type": "nomic_bert"},
    "gte": {**BERT, "model_type": "gte"},
    "deberta-v3": {
        **BERT,
        "model_type": "deberta-v2",
        "relative_attention": True,
        "position_buckets": 8,
        "max_relative_positions": 64,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "deberta-v2": {
        **BERT,
        "model_type": "deberta-v2",
        "relative_attention": True,
        "pos_att_type": ["c2p"],
        "max_relative_positions": 16,
        "type_vocab_size": 2,
    },
}


def split_of(lengths: Sequence[int], seed: int, *, types: bool = False, forbidden: int | None = PAD) -> Split:
    """Random tokens; without padding tokens unless `forbidden` is None."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(2 if forbidden is not None else 0, VOCABULARY, sum(lengths)).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    kinds = draw.integers(0, 2, len(tokens)).astype(np.uint8) if types else None
    return Split(tokens, offsets, draw.integers(0, 5, len(lengths)), kinds)


def with_words(split: Split, seed: int = 6) -> Split:
    """Labels of words: every second token begins one; some words share a token or were cut off."""
    draw = np.random.default_rng(seed)
    pieces = [np.append(np.arange(0, length, 2), [SHARED, CUT]) for length in split.lengths]
    offsets = np.cumsum([0, *map(len, pieces)])
    places = WordPlaces(offsets, np.zeros((offsets[-1], 2), np.int32), np.concatenate(pieces).astype(np.int32))
    return replace(split, labels=draw.integers(0, 5, offsets[-1]), words=places)


def model_of(
    about: dict[str, Any], *, dtype: torch.dtype = torch.float32, task: str = "single-label", **changes: Any
) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**SMALL, **about, **changes})
    model = auto_class(task).from_config(config)
    for parameter in model.parameters():  # the usual start is so small that differences could hide
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.3)
    return model.to(dtype)


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("attention_probs_dropout_prob", "attention_dropout"):  # read at each step
        if hasattr(model.config, key):
            setattr(model.config, key, 0.0)
    return model


def step(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (of words, where those have labels), loss and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    batch = dict(batch)
    targets = batch.pop("labels")
    labels, weights = targets[:2]
    logits = scored_logits(model(**batch)["logits"], targets)
    loss = (Loss("single-label")(logits, labels) * weights).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), loss.detach(), {name: g.clone() for name, g in gradients.items()}


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float, what: str) -> None:
    worst = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
    assert worst <= tolerance, f"{what}: {worst:.2e} apart, relative to the largest"


def forward_arguments(model: Any) -> set[str]:
    names = set(inspect.signature(model.forward).parameters)
    return names if getattr(model.config, "type_vocab_size", 0) > 1 else names - {"token_type_ids"}
