"""Float32 products with oneDNN: chosen where faster, as exact as float32, never within attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.unit.compute.encoders import (
    CONFIGS,
    LENGTHS,
    OTHERS,
    PAD,
    assert_same,
    model_of,
    split_of,
    step,
    without_dropout,
)
from tests.unit.conftest import recipe_dict

from afina.errors import RecipeError
from afina.recipe.keys.adapter_keys import Adapter
from afina.recipe.schema import Recipe
from afina.worker.compute import attention, dropout, packed_model, products
from afina.worker.compute.attention import attend
from afina.worker.compute.cpu import Processor, processor
from afina.worker.compute.packing import pack
from afina.worker.model.adapters import add_adapter

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


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gemma2"])
def test_frozen_weights_in_bfloat16_train_the_same_beside_an_adapter(name: str, half: bool) -> None:
    """A base that is stored in bfloat16: logits, loss and the gradients of adapter and head, packed, in float32 and under autocast."""
    split, rows = split_of(LENGTHS, 5, types=name == "bert"), list(range(len(LENGTHS)))
    found = []
    for stored in (False, True):
        model = without_dropout(model_of({**CONFIGS, **OTHERS}[name], dtype=torch.bfloat16).float()).train()
        add_adapter(model, Adapter(rank=4, dropout=0.0, targets="all-linear", dora=name == "llama"))
        draw = torch.Generator().manual_seed(1)
        for key, weight in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.1, generator=draw)
        packed_model.enable_packing(model, attention.FAST)
        if stored:
            size = sum(p.nbytes for p in model.parameters())
            assert "nothing is rounded" in products.store_frozen_in_bf16(model)
            assert sum(p.nbytes for p in model.parameters()) < (0.75 if name != "gemma2" else 0.8) * size
            kinds = {p.dtype for p in model.parameters() if p.requires_grad}
            assert kinds == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(step(model, packed_model.collator(model, split, "packed", PAD)(rows)))
    assert_same(found[1][0], found[0][0], 1e-6, "logits")
    assert found[1][2].keys() == found[0][2].keys()
    for key, gradient in found[0][2].items():
        assert float((found[1][2][key] - gradient).norm()) <= (2e-2 if half else 1e-5) * float(gradient.norm()), key


def test_a_base_with_more_digits_is_rounded_with_a_warning() -> None:
    model = model_of(CONFIGS["bert"])
    add_adapter(model, Adapter())
    line = products.store_frozen_in_bf16(model)
    assert line.startswith("WARNING: ") and "lose digits in training" in line
    with pytest.raises(RecipeError, match=r"train\.base_dtype`: is of frozen weights"):
        Recipe(**{**recipe_dict(), "train": {"base_dtype": "bf16"}})
