"""Variable-length flash attention over packed sequences on NVIDIA GPUs: one call of the kernel that torch ships.

`torch.nn.attention.varlen` offers the kernel without dropout and in newer versions only. The operator below it supports dropout,
drawn from torch's own generator, and has a gradient (Dao 2023, FlashAttention-2). Without the kernel, attention pads the
micro-batch, which takes a dozen small kernels a layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from afina.worker.compute.packing import Packing

__all__ = ["attend", "available", "supports"]


def supports(query: torch.Tensor) -> bool:
    """True if the kernel takes such queries, (tokens, heads, D): half precision, compute capability 8.0 or newer."""
    return query.dtype in (torch.float16, torch.bfloat16) and available(query.get_device(), query.shape[-1])


@functools.cache
def available(device: int, width: int) -> bool:
    """True if the kernel exists for heads of this width on GPU number `device`; -1 is the CPU."""
    return (
        device >= 0
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and width % 8 == 0
        and width <= 256
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    first_only: bool,
    scale: float,
    dropout: float,
    reach: tuple[int | None, int | None],
) -> torch.Tensor:
    """softmax(scale q kᵀ), dropout, times v, within each sequence.

    Args:
        query: (T, heads, D), or the first token of each sequence, (B, heads, D).
        key, value: (T, heads, D); of grouped-query attention fewer heads.
        reach: how many keys before and behind its own a query sees; None: all. With none behind, attention is causal.

    Returns: as `query`.
    """
    longest = packing.lengths[0]
    queries, height = packing.bounds, longest
    before, behind = reach
    if first_only:
        assert reach == (None, None), "the kernel would align the window with the last keys"
        queries, height = torch.arange(len(packing.lengths) + 1, dtype=torch.int32, device=query.device), 1
    forward: Any = torch.ops.aten._flash_attention_forward
    out: torch.Tensor = forward(
        query,
        key,
        value,
        queries,
        packing.bounds,
        height,
        longest,
        dropout,
        behind == 0,
        False,
        scale=scale,
        window_size_left=before,
        window_size_right=behind,
    )[0]
    return out
