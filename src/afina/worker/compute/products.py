"""Products of float32 matrices on the CPU by oneDNN instead of MKL, where that is faster and as exact.

On AMD's processors with AVX-512 oneDNN multiplies 5 to 10 % faster than MKL (Zen 4; sides of 384 to 3,072), and training
steps are 3 to 8 % faster (tests/bench/batching.py). torch hands it float32 only where products
may be rounded to bfloat16 on the way. oneDNN makes use of that where the processor has tiles for it (AMX, which AMD's have
not); elsewhere it computes in float32 and sums in another order than MKL. That it does so here is tried, against float64.

The products within attention stay with MKL: they are many, small, and of new shapes in every step, for each of which oneDNN
would make a kernel of its own. That is so in `worker.attention` only, so that models with another attention keep MKL.

Not covered: processors of other makers keep MKL; which of the two is faster there was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from afina.worker.compute.cpu import Processor, processor

__all__ = ["by_mkl", "by_mkl_backward_too", "library", "use_onednn"]

#: A relative error that float32 is far below, and bfloat16 with its 8 bits far above.
_EXACT = 1e-5

_in_use = False


def use_onednn(wanted: bool = True, here: Processor | None = None) -> bool:
    """Let oneDNN multiply float32 matrices in this process, if it is faster and as exact there; returns whether it does."""
    global _in_use
    here = here or processor()
    _in_use = wanted and here.vendor == "AuthenticAMD" and "avx512f" in here.flags and _exact()
    _permit(_in_use)
    return _in_use


def library() -> str:
    """Whose products of float32 matrices this process computes on the CPU: oneDNN's, or those that torch chooses (on x86 MKL's)."""
    return "oneDNN" if _in_use else "torch's choice"


@contextmanager
def by_mkl() -> Iterator[None]:
    """Within it products are MKL's, whatever `use_onednn` chose."""
    if _in_use:
        _permit(False)
    try:
        yield
    finally:
        if _in_use:
            _permit(True)


def by_mkl_backward_too(compute: Callable[..., torch.Tensor], *inputs: torch.Tensor, **named: Any) -> torch.Tensor:
    """`compute(*inputs, **named)` by MKL, and its gradients too."""
    if not _in_use:
        return compute(*inputs, **named)
    with by_mkl():
        computed: torch.Tensor = _Begin.apply(compute(*_End.apply(*inputs), **named))  # type: ignore[no-untyped-call]
        return computed


class _Begin(torch.autograd.Function):
    """What its output is used for comes before it in the backward pass, what its input was made by after it."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        _permit(False)
        return gradients[0]


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        _permit(_in_use)
        return gradients


def _permit(permitted: bool) -> None:
    torch.set_float32_matmul_precision("medium" if permitted else "highest")


def _exact() -> bool:
    draw = torch.Generator().manual_seed(0)  # training's random numbers stay as they are
    left, right = (torch.randn(256, 256, generator=draw) for _ in range(2))
    true = left.double() @ right.double()
    _permit(True)
    return bool((left @ right - true).norm() < _EXACT * true.norm())
