"""Float32 matrix products on the CPU with oneDNN instead of MKL, where it is faster and as exact.

On AMD processors with AVX-512, oneDNN made training steps 3 to 8 % faster than MKL (Zen 4) and a whole `afina predict` of 4,000
short texts 1.36 times as fast (Zen 5). torch uses it for float32 only at float32 precision "medium", which allows rounding to
bfloat16. oneDNN rounds only with AMX, which AMD processors do not have; elsewhere it computes in float32, in another summation order
than MKL. A product is compared with float64 before oneDNN is used.

Attention keeps MKL: its products are many and small, with new shapes at every step, and oneDNN would build a kernel for each.
Only `afina.worker.compute.attention` does so; models with another attention use MKL for all products.

Not covered: other vendors' processors keep MKL; oneDNN was not measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from afina.worker.compute.cpu import Processor, processor

__all__ = ["by_mkl", "by_mkl_backward_too", "library", "use_onednn"]

#: Relative error: float32 is far below it, bfloat16 (8 bits) far above.
_EXACT = 1e-5

_in_use = False


def use_onednn(wanted: bool = True, here: Processor | None = None) -> bool:
    """Use oneDNN for float32 matrix products in this process if it is faster and as exact; returns whether it is used."""
    global _in_use
    here = here or processor()
    _in_use = wanted and here.vendor == "AuthenticAMD" and "avx512f" in here.flags and _exact()
    _permit(_in_use)
    return _in_use


def library() -> str:
    """The library that multiplies float32 matrices in this process: oneDNN, or torch's choice (on x86 MKL)."""
    return "oneDNN" if _in_use else "torch's choice"


@contextmanager
def by_mkl() -> Iterator[None]:
    """Within this context MKL multiplies, also where `use_onednn` chose oneDNN."""
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
        computed: torch.Tensor = _ToMkl.apply(compute(*_FromMkl.apply(*inputs), **named))  # type: ignore[no-untyped-call]
        return computed


class _ToMkl(torch.autograd.Function):
    """Identity; its backward runs first, and switches to MKL for the gradients of what was computed before it."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        _permit(False)
        return gradients[0]


class _FromMkl(torch.autograd.Function):
    """Identity; its backward runs last, and switches back."""

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
