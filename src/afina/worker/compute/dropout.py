"""Fast dropout on the CPU: torch's distribution from another generator.

torch draws one Bernoulli number per element, which costs about as much as the matrix product next to it. Here each element
takes 16 bits of SFC64 (Chris Doty-Humphrey's generator, as NumPy ships it) and is kept where they reach a threshold: the
probability is exact to 2^-17. Each process has one generator, seeded by seed and rank; checkpoints hold its state.

Not covered: GPUs, where torch's dropout is fast; activation checkpointing, which repeats the forward pass and restores torch's
generator for it, but not this one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["FastDropout", "random_bits", "keep_mask", "seed", "set_state", "state", "use_fast_dropout"]

_generator = np.random.SFC64(0)


def seed(value: int, rank: int) -> None:
    """Restart the stream of `rank`; the streams of different ranks are independent."""
    global _generator
    _generator = np.random.SFC64(np.random.SeedSequence([value, rank]))


def state() -> torch.Tensor:
    """The generator's state, int64 (4,), which `torch.load(weights_only=True)` can read."""
    return torch.from_numpy(_generator.state["state"]["state"].view(np.int64).copy())


def set_state(words: torch.Tensor) -> None:
    """Restore what `state` returned."""
    current = _generator.state
    current["state"]["state"] = words.numpy().view(np.uint64)
    _generator.state = current


def random_bits(*shape: int) -> torch.Tensor:
    """Uniform random int16 of `shape`."""
    count = int(np.prod(shape))
    words = _generator.random_raw(-(-count // 4))
    return torch.from_numpy(words.view(np.int16))[:count].view(shape)


def keep_mask(drawn: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    """0 with probability `p`, else 1, from uniform int16."""
    # In floating point: comparing integers gives bool, whose conversion alone takes twice as long. In float32, because half
    # precision would round the random numbers.
    return drawn.float().ge_(-32768 + round(65536 * p)).to(dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        mask = keep_mask(random_bits(*x.shape), p, x.dtype).mul_(1 / (1 - p))
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask, None


class FastDropout(nn.Dropout):
    """`nn.Dropout` whose masks on the CPU come from this module's generator."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        dropped: torch.Tensor = _Dropout.apply(input, self.p)  # type: ignore[no-untyped-call]
        return dropped


def use_fast_dropout(model: nn.Module) -> int:
    """Replace every `nn.Dropout` by `FastDropout`; returns how many."""
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout
    ]
    for parent, name, child in layers:
        setattr(parent, name, FastDropout(child.p).train(child.training))
    return len(layers)
