"""Recorded steps, as far as they can be tried without a GPU: widths, the filled batch, and where gradients lie; tests/gpu has the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.unit.compute.test_packed import CONFIGS, LENGTHS, PAD, _inputs, model_of, split_of, step, still

from afina.worker.compute import attention, cuda_graphs, packed_model
from afina.worker.compute.batches import IGNORED, PackedCollator
from afina.worker.compute.packing import Group, Packing

ROWS = list(range(len(LENGTHS)))
ITEMS = torch.tensor(len(LENGTHS))


def test_widths_are_few_and_not_much_too_wide() -> None:
    widths = [cuda_graphs.padded_width(tokens) for tokens in range(1, 16_384)]
    assert widths == sorted(widths) and len(set(widths)) < 45
    for tokens, width in enumerate(widths, 1):
        assert tokens < width <= max(tokens + 256, tokens * 9 / 8), tokens
        assert width - tokens <= cuda_graphs._UNIT


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name]["model_type"] in cuda_graphs._KINDS])
def test_a_batch_that_is_filled_up_teaches_the_same(name: str) -> None:
    """Sequence by sequence, as flash attention takes them; another batch in the same slot leaves nothing behind."""
    model = still(model_of(CONFIGS[name], dtype=torch.float64)).train()
    split = split_of(LENGTHS, 5, types="token_type_ids" in _inputs(model), forbidden=None)
    offset = packed_model.PROVEN[model.config.model_type].offset
    packed_model.enable_packing(model, attention.PLAIN)
    collate = PackedCollator(split, PAD, heads=4, offset=offset)
    rows = [row for row in ROWS if LENGTHS[row] > 1]
    wide, narrow = collate(rows), collate([*rows[1:], len(LENGTHS) - 1])
    slot = cuda_graphs._Slot(wide, ITEMS, cuda_graphs.padded_width(sum(LENGTHS)), cuda_graphs._UNIT)
    slot.fill(narrow, ITEMS)
    bounds = slot.packing.bounds.tolist()
    alone = tuple(Group(1, b - a, b - a) for a, b in itertools.pairwise(bounds))
    filled = slot.batch()
    assert filled["labels"][-1] == IGNORED and filled["input_ids"].shape == (1, 256) and bounds[-1] == 256
    filled["packing"] = Packing(tuple(group.width for group in alone), slot.packing.starts, slot.packing.bounds, alone)
    (_, expected_loss, expected), (_, loss, found) = step(model, narrow), step(model, filled)
    assert found.keys() == expected.keys()
    for key, value in {"loss": expected_loss, **expected}.items():
        assert torch.allclose({"loss": loss, **found}[key], value, rtol=1e-9, atol=1e-12), key


def test_gradients_begin_at_zero_and_go_on_within_a_step() -> None:
    model = torch.nn.Linear(3, 2)
    recorded = cuda_graphs.GraphedStep(lambda batch, items: items, model, 8, 512)
    buffers = [torch.full_like(p, 7.0) for p in model.parameters()]
    recorded._gradients = list(zip(model.parameters(), buffers, strict=True))
    recorded._lay_gradients()
    assert all(p.grad is b and not b.any() for p, b in recorded._gradients)
    buffers[0].fill_(1.0)
    recorded._lay_gradients()
    assert bool((buffers[0] == 1).all()), "accumulation: what the step has is kept"
    model.weight.grad = torch.full_like(model.weight, 3.0)  # of a batch that was computed kernel by kernel
    recorded._lay_gradients()
    assert model.weight.grad is buffers[0] and bool((buffers[0] == 3).all())


class _OnGpu:
    """A model as far as it is asked where it lies and what it is."""

    def __init__(self, kind: str, width: int) -> None:
        self.config = SimpleNamespace(model_type=kind, hidden_size=4 * width, num_attention_heads=4)

    def parameters(self) -> Iterator[Any]:
        yield SimpleNamespace(get_device=lambda: 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"processes": 2}, "several processes"),
        ({"batching": "grouped"}, "grouped"),
        ({"half": False}, "bfloat16"),
        ({"twice": True}, "checkpointing"),
        ({"kind": "mpnet"}, "mpnet"),
        ({"width": 12}, "flash"),
    ],
)
def test_why_steps_are_not_recorded(changes: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs.flash, "available", lambda device, width: width % 8 == 0)
    about = {"kind": "bert", "width": 64, "batching": "packed", "processes": 1, "half": True, "twice": False, **changes}
    why = cuda_graphs.why_not_graphed(
        _OnGpu(about["kind"], about["width"]),
        about["batching"],
        about["processes"],
        half=about["half"],
        twice=about["twice"],
    )
    assert why is None if said is None else said in (why or "")


def test_on_a_cpu_nothing_is_recorded() -> None:
    assert cuda_graphs.why_not_graphed(model_of(CONFIGS["bert"]), "packed", 1, half=True, twice=False) == "no GPU"
