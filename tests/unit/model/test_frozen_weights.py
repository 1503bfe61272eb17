"""Frozen weights in fewer bits beside an adapter: the same products as with the weights that the bits stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Params4bit
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
from afina.worker.compute import attention, packed_model
from afina.worker.model.adapters import add_adapter
from afina.worker.model.frozen_weights import store_frozen


def adapted(name: str) -> Any:
    """A model whose weights are stored in bfloat16, with an adapter that is not 0."""
    model = without_dropout(model_of({**CONFIGS, **OTHERS}[name], dtype=torch.bfloat16).float()).train()
    add_adapter(model, Adapter(rank=4, dropout=0.0, targets="all-linear", dora=name == "llama"))
    draw = torch.Generator().manual_seed(1)
    for key, weight in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.1, generator=draw)
    return model


def size(model: Any) -> int:
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gemma2"])
def test_stored_weights_train_the_same_beside_an_adapter(name: str, dtype: str, half: bool) -> None:
    """Logits, loss and the gradients of adapter and head, packed, in float32 and under autocast; nf4 beside the weights that its bits stand for."""
    split, rows = split_of(LENGTHS, 5, types=name == "bert"), list(range(len(LENGTHS)))
    stored = adapted(name)
    whole = copy.deepcopy(stored)
    line = store_frozen(stored, dtype)
    if dtype == "bf16" or name == "gpt2":  # whose layers are no linear ones
        assert "nothing is rounded" in line
        assert size(stored) < (0.75 if name != "gemma2" else 0.8) * size(whole)
    else:
        assert "lose digits in training" in line and size(stored) < 0.6 * size(whole)
        for path, weight in whole.named_parameters():
            bits: Any = stored.get_parameter(path)
            if isinstance(bits, Params4bit):
                assert bits.numel() * 2 == weight.numel() and path.endswith(".weight")
                apart = dequantize_4bit(bits.data, bits.quant_state) - weight
                assert 0.05 < float(apart.norm() / weight.norm()) < 0.12
                weight.data += apart
    assert {p.dtype for p in stored.parameters() if p.requires_grad} == {torch.float32}
    found = []
    for model in (whole, stored):
        packed_model.enable_packing(model, attention.FAST)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(step(model, packed_model.collator(model, split, "packed", PAD)(rows)))
    assert_same(found[1][0], found[0][0], 1e-6 if dtype == "bf16" or not half else 2e-2, "logits")
    assert found[1][2].keys() == found[0][2].keys()
    for key, gradient in found[0][2].items():
        assert float((found[1][2][key] - gradient).norm()) <= (3e-2 if half else 1e-5) * float(gradient.norm()), key


def test_a_base_with_more_digits_is_rounded_with_a_warning() -> None:
    model = model_of(CONFIGS["bert"])
    add_adapter(model, Adapter())
    line = store_frozen(model, "bf16")
    assert line.startswith("WARNING: ") and "lose digits in training" in line and "third digit" in line
    with pytest.raises(RecipeError, match=r"train\.base_dtype`: is of frozen weights"):
        Recipe(**{**recipe_dict(), "train": {"base_dtype": "nf4"}})
