"""Padding for this model: its side, its token, and rows that must run apart.

A row's logits must not depend on the other rows of its batch. Measured on small random models of the sequence classifiers of
transformers 5.23: padded on the right, all but a few give each row the logits that it has alone.

    left      XLNet reads the last position, and its positions are relative
    unpadded  FNet has no attention mask; CANINE, ConvBERT, Funnel, Nystromformer and YOSO convolve, pool or hash padding too;
              BigBird's sparse attention draws its blocks by the width, and one short batch switches it off for all later ones

Heads that read the position of the end-of-text token (BART, T5 and relatives) refuse a batch whose rows hold unequal numbers of
it: such rows run apart too.

Not covered: code from a model's repository; it is padded as its tokenizer pads, and prefetch compares it with single rows.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal

import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from afina.worker.model.weights import model_class

__all__ = ["needs_equal_lengths", "padding_side", "runs_rows_apart", "separate_rows", "set_pad_token"]

_LEFT = frozenset({"xlnet"})
_UNPADDED = frozenset({"canine", "convbert", "fnet", "funnel", "nystromformer", "yoso"})


def padding_side(model: Any, tokenizer_side: str = "right") -> Literal["left", "right"]:
    """The side on which padding does not change a row's logits.

    It is the right one for the classes of Transformers, XLNet apart, whatever their tokenizer says: with padding on the left,
    learned positions move with the width of the batch (GPT-2 saved with `padding_side: left`).
    """
    if model.config.model_type in _LEFT:
        return "left"
    of_transformers = model_class(model).__module__.startswith("transformers.")
    return "left" if tokenizer_side == "left" and not of_transformers else "right"


def set_pad_token(model: Any, pad_token_id: int) -> None:
    """Let the model take `pad_token_id` as padding: decoders read the last position that holds another token.

    A configuration without one gets it; another one is replaced only where the head reads it, because encoders count
    positions from it.
    """
    reads = "pad_token_id" in _names(model)
    for config in (model.config, model.config.get_text_config()):
        if reads or getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = pad_token_id


def needs_equal_lengths(model: Any) -> str | None:
    """The reason why the rows of a batch must have equal lengths; None where padding is fine."""
    kind = model.config.model_type
    if "attention_mask" not in inspect.signature(type(model).forward).parameters:
        return f"{kind}: it has no attention mask"
    return f"{kind}: padding changes its scores" if kind in _UNPADDED or _sparse(model) else None


def runs_rows_apart(model: Any) -> bool:
    """True if `separate_rows` changes this model."""
    return needs_equal_lengths(model) is not None or _reads_end(model)


def separate_rows(model: Any) -> str | None:
    """Let `model` split a batch into parts of rows that it can process together; returns a note for the log if padding is why.

    Only the forward pass changes, so training, evaluation and prediction all do it. Rows that go together are one call, as before.
    """
    if not runs_rows_apart(model):
        return None
    why, sparse = needs_equal_lengths(model), _sparse(model)
    eos = model.config.eos_token_id if _reads_end(model) else None
    usual, parameters = model.forward, inspect.signature(type(model).forward).parameters
    takes_mask = "attention_mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    config = model.config  # up to so many tokens BigBird's attention is full
    short = (5 + 2 * config.num_random_blocks) * config.block_size if sparse else 0

    @functools.wraps(usual)
    def forward(
        input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **named: Any
    ) -> SequenceClassifierOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tensors = {"input_ids": input_ids, **({"attention_mask": mask} if takes_mask else {}), **named}
        # Trainer adds numbers, such as that of the labels in the batch.
        wide = {n: v for n, v in tensors.items() if isinstance(v, torch.Tensor) and v.shape == input_ids.shape}
        longest, lengths = input_ids.shape[1], mask.sum(-1)
        by_length = why is not None and not (sparse and longest <= short)
        ends = torch.zeros_like(lengths) if eos is None else torch.eq(input_ids, int(eos)).sum(-1)
        keys = (lengths if by_length else 0) * (longest + 1) + ends
        logits, order = [], []
        for key in sorted(set(keys.tolist())):
            rows = (keys == key).nonzero()[:, 0]
            width = int(lengths[rows[0]]) if by_length else longest
            for module in sparse[:1] if by_length else ():  # the outermost one sets those below it
                module.set_attention_type("block_sparse")
            logits.append(usual(**{**tensors, **{name: value[rows, :width] for name, value in wide.items()}})["logits"])
            order.append(rows)
        return SequenceClassifierOutput(logits=torch.cat(logits)[torch.cat(order).argsort()])

    model.forward = forward
    return f"rows of unequal length run apart, without padding: {why}" if why else None


def _reads_end(model: Any) -> bool:
    """True if the head reads the position of the end-of-text token."""
    return "eos_token_id" in _names(model) and getattr(model.config, "eos_token_id", None) is not None


def _sparse(model: Any) -> list[Any]:
    """Modules of BigBird with sparse attention, the outermost first."""
    return [module for module in model.modules() if getattr(module, "attention_type", "") == "block_sparse"]


def _names(model: Any) -> tuple[str, ...]:
    """Attributes that the forward pass of the model's class reads itself."""
    names: tuple[str, ...] = inspect.unwrap(type(model).forward).__code__.co_names
    return names
