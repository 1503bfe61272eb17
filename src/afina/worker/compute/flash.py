"""Flash attention over packed sequences on NVIDIA's GPUs: one call for all of them, by the kernel that torch brings along.

`torch.nn.attention.varlen` offers it without dropout and in newer versions only; the operator below it takes dropout, draws it
from torch's own generator and has its gradient (Dao 2023, FlashAttention-2). Without it a micro-batch is padded for the time
of its attention, which takes a dozen small kernels for each layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from afina.worker.compute.packing import Packing

__all__ = ["attend", "available", "supports"]


def supports(query: torch.Tensor) -> bool:
    """Whether the kernel can compute attention of such queries, (tokens, heads, D): half precision, compute capability 8.0 or newer."""
    return query.dtype in (torch.float16, torch.bfloat16) and available(query.get_device(), query.shape[-1])


@functools.cache
def available(device: int, width: int) -> bool:
    """Whether the kernel is there for heads of this width on a GPU; -1 is the CPU."""
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
    window: int | None,
) -> torch.Tensor:
    """softmax(scale q kᵀ), dropout, times v, each sequence by itself.

    Args:
        query: (T, heads, D), or the first token of each sequence, (B, heads, D).
        key, value: (T, heads, D).
        window: keys at this distance or further away are not seen; None: all are.

    Returns: as `query`.
    """
    longest = packing.lengths[0]
    queries, height = packing.bounds, longest
    if first_only:
        assert window is None, "the kernel would lay the window at the end of the keys"
        queries, height = torch.arange(len(packing.lengths) + 1, dtype=torch.int32, device=query.device), 1
    near = None if window is None else window - 1
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
        False,
        False,
        scale=scale,
        window_size_left=near,
        window_size_right=near,
    )[0]
    return out
