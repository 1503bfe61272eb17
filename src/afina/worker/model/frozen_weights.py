"""Frozen weights beside an adapter, in fewer bits: stored so, and multiplied in the precision of their input.

    bf16   half the memory. Where a base is stored in bfloat16, as most decoders are, nothing is rounded and every product stays the same
    nf4    4 bits for each weight of a linear layer, by bitsandbytes (Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs":
           normal float, scales quantized again); everything else as with bf16

Adapter and head stay in float32. What is trained so is used beside the whole base, so its scores there differ a little; a line in the log says so.

Not covered: embeddings that scale their rows (Gemma) stay in float32; GPUs, where none of it was measured.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from afina.text import size_in_words

__all__ = ["store_frozen", "stored_bytes"]

#: Bytes of a weight in 4 bits: a byte of scale for each 64 of them, and four for each 256 scales.
_NF4 = 1 / 2 + (1 + 4 / 256) / 64


def store_frozen(model: nn.Module, dtype: str) -> str:
    """Store the frozen weights of linear layers and embeddings of `model` as bf16 or nf4; returns a line for the log."""
    kinds: dict[type, type] = {nn.Linear: _Linear, Conv1D: _Conv1D, nn.Embedding: _Embedding}
    before, rounded = sum(p.nbytes for p in model.parameters()), 0
    for module in _with_frozen_weight(model):
        weight: Any = module.weight
        if dtype == "nf4" and type(module) is nn.Linear:
            module.weight = _in_four_bits(weight)
            rounded += 1
        else:
            stored = weight.data.bfloat16()
            rounded += not torch.equal(stored.float(), weight.data)
            weight.data = stored
        module.__class__ = kinds[type(module)]
    after = sum(p.nbytes for p in model.parameters())
    size = f"frozen weights in {dtype}: {size_in_words(after)} for the model, not {size_in_words(before)}"
    if not rounded:
        return f"{size}; the base has no more digits, so nothing is rounded"
    digit = "first" if dtype == "nf4" else "third"
    return (
        f"WARNING: {size}; {rounded} matrices of the base lose digits in training, but not where the trained model is used: scores "
        f"will differ in their {digit} digit (train.base_dtype: fp32 trains beside the base as it is)"
    )


def stored_bytes(model: nn.Module, dtype: str) -> int:
    """Bytes of all weights of a model in float32 once `store_frozen` has stored them, with the scales of those in 4 bits."""
    each = {"fp32": 4.0, "bf16": 2.0, "nf4": _NF4}[dtype]
    stored = {
        module.weight: each if type(module) is nn.Linear else max(each, 2.0) for module in _with_frozen_weight(model)
    }
    return round(sum(weight.numel() * stored.get(weight, 4.0) for weight in model.parameters()))


def _with_frozen_weight(model: nn.Module) -> Iterator[Any]:
    """The modules whose weight is stored in fewer bits."""
    return (m for m in model.modules() if type(m) in (nn.Linear, Conv1D, nn.Embedding) and not m.weight.requires_grad)


def _in_four_bits(weight: torch.Tensor) -> Any:
    """A weight (out, in) in 4 bits, quantized on its device, in blocks of 64."""
    # It would fetch a faster kernel from the Hub, which no node reaches.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes.nn.modules import Params4bit

    packed: Any = Params4bit(weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return packed.to(weight.device)


def _whole(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """A stored weight as (out, in) of `dtype`."""
    whole: torch.Tensor = weight
    if (scales := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        whole = dequantize_4bit(weight.data, scales)
    return whole.to(dtype)


class _Stored(torch.autograd.Function):
    """x Wᵀ + b, where W (out, in) and b are stored in fewer bits and not trained. Backward converts W again, so that no copy of it is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight  # `save_for_backward` would lose the scales of one in 4 bits
        return functional.linear(x, _whole(weight, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0] @ _whole(ctx.weight, gradients[0].dtype), None, None


def _stored_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        product: torch.Tensor = _Stored.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return product


class _Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _stored_product(input, self.weight, self.bias)


class _Conv1D(Conv1D):  # type: ignore[misc]
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _stored_product(input, self.weight.t(), self.bias)


class _Embedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).float()
