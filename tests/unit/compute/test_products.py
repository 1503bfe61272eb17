"""Float32 products with oneDNN: chosen where faster, as exact as float32, never within attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from afina.worker.compute import dropout, products
from afina.worker.compute.attention import attend
from afina.worker.compute.cpu import Processor, processor
from afina.worker.compute.packing import pack

AMD = Processor("", "AuthenticAMD", frozenset({"avx512f"}))


@pytest.fixture(autouse=True)
def only_mkl_before_and_after() -> Iterator[None]:
    products.use_onednn(False)  # a training earlier in this process may have chosen oneDNN
    yield
    products.use_onednn(False)


@pytest.mark.parametrize(
    ("vendor", "flags", "faster"),
    [
        ("AuthenticAMD", ("avx2", "avx512f"), True),
        ("AuthenticAMD", ("avx2",), False),
        ("GenuineIntel", ("avx2", "avx512f"), False),
        ("", (), False),
    ],
)
def test_onednn_is_chosen_where_it_is_faster_and_computes_in_float32(
    vendor: str, flags: tuple[str, ...], faster: bool
) -> None:
    random_state = torch.get_rng_state()
    left, right = (torch.randn(700, 384, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    exact, with_mkl = left.double() @ right.T.double(), left @ right.T
    chosen = products.use_onednn(True, Processor("a processor", vendor, frozenset(flags)))
    # A processor with AMX would round to bfloat16: oneDNN is not used on it, whatever its vendor.
    assert chosen == (faster and "amx_bf16" not in processor().flags)
    assert products.library() == ("oneDNN" if chosen else "torch's choice")
    assert float((left @ right.T - exact).norm() / exact.norm()) < 1e-6
    with products.by_mkl():
        assert torch.equal(left @ right.T, with_mkl) and torch.get_float32_matmul_precision() == "highest"
    assert not products.use_onednn(False) and torch.equal(left @ right.T, with_mkl)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_onednn_is_not_used_where_it_rounds_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_permit", lambda permitted: None)
    rounded = lambda x: x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.mm(rounded(a), rounded(b)))
    assert not products.use_onednn(True, AMD)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_multiplies_with_mkl_in_both_directions(p: float) -> None:
    lengths = (200, 120, 3)
    packing, draw = pack(lengths, heads=4), torch.Generator().manual_seed(3)
    inputs = [torch.randn(1, 4, sum(lengths), 32, generator=draw) for _ in range(3)]
    results = []
    for wanted in (False, True):
        chosen = products.use_onednn(wanted, AMD)
        before = torch.get_float32_matmul_precision()
        assert (before == "medium") == chosen
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        dropout.seed(1, 0)
        out, _ = attend(torch.nn.Identity(), q, k, v, None, dropout=p, packing=packing, fast_dropout=True)
        assert torch.get_float32_matmul_precision() == before
        out.square().sum().backward()
        assert torch.get_float32_matmul_precision() == before
        results.append([out, q.grad, k.grad, v.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
