"""Recorded steps without a GPU: widths, padding of a batch, and gradients; tests/gpu covers the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.unit.compute.encoders import (
    CONFIGS,
    LENGTHS,
    PAD,
    forward_arguments,
    model_of,
    split_of,
    step,
    without_dropout,
)

from afina.worker.compute import attention, cuda_graphs, packed_model
from afina.worker.compute.batches import PackedCollator
from afina.worker.compute.packing import Group, Packing

ROWS = list(range(len(LENGTHS)))
ITEMS = torch.tensor(len(LENGTHS))


def test_there_are_few_widths_and_little_padding() -> None:
    widths = [cuda_graphs.padded_width(tokens) for tokens in range(1, 16_384)]
    assert widths == sorted(widths) and len(set(widths)) < 45
    for tokens, width in enumerate(widths, 1):
        assert tokens < width <= max(tokens + 256, tokens * 9 / 8), tokens
        assert width - tokens <= cuda_graphs._UNIT


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name]["model_type"] in cuda_graphs._SUPPORTED])
def test_padding_a_batch_does_not_change_its_gradients(name: str) -> None:
    """Sequence by sequence, as flash attention computes; an earlier batch in the same buffers leaves no trace."""
    model = without_dropout(model_of(CONFIGS[name], dtype=torch.float64)).train()
    split = split_of(LENGTHS, 5, types="token_type_ids" in forward_arguments(model), forbidden=None)
    offset = packed_model.PROVEN[model.config.model_type].offset
    packed_model.enable_packing(model, attention.PLAIN)
    collate = PackedCollator(split, PAD, heads=4, offset=offset)
    rows = [row for row in ROWS if LENGTHS[row] > 1]
    wide, narrow = collate(rows), collate([*rows[1:], len(LENGTHS) - 1])
    slot = cuda_graphs._StaticBatch(wide, ITEMS, cuda_graphs.padded_width(sum(LENGTHS)), cuda_graphs._UNIT)
    slot.fill(narrow, ITEMS)
    bounds = slot.packing.bounds.tolist()
    alone = tuple(Group(1, b - a, b - a) for a, b in itertools.pairwise(bounds))
    filled = slot.batch()
    assert (
        filled["labels"][1].tolist() == [1.0] * len(rows) + [0.0]
        and filled["input_ids"].shape == (1, 256)
        and bounds[-1] == 256
    )
    filled["packing"] = Packing(tuple(group.width for group in alone), slot.packing.starts, slot.packing.bounds, alone)
    (_, expected_loss, expected), (_, loss, found) = step(model, narrow), step(model, filled)
    assert found.keys() == expected.keys()
    for key, value in {"loss": expected_loss, **expected}.items():
        assert torch.allclose({"loss": loss, **found}[key], value, rtol=1e-9, atol=1e-12), key


def test_gradients_start_at_zero_and_accumulate_within_a_step() -> None:
    model = torch.nn.Linear(3, 2)
    recorded = cuda_graphs.GraphedStep(lambda batch, items: items, model, 8, 512)
    buffers = [torch.full_like(p, 7.0) for p in model.parameters()]
    recorded._gradients = list(zip(model.parameters(), buffers, strict=True))
    recorded._bind_gradients()
    assert all(p.grad is b and not b.any() for p, b in recorded._gradients)
    buffers[0].fill_(1.0)
    recorded._bind_gradients()
    assert bool((buffers[0] == 1).all()), "accumulation: the gradients of the step so far stay"
    model.weight.grad = torch.full_like(model.weight, 3.0)  # of a batch computed kernel by kernel
    recorded._bind_gradients()
    assert model.weight.grad is buffers[0] and bool((buffers[0] == 3).all())


class _OnGpu:
    """The device and the configuration of a model."""

    def __init__(self, kind: str, width: int) -> None:
        self.config = SimpleNamespace(model_type=kind, hidden_size=4 * width, num_attention_heads=4)

    def parameters(self) -> Iterator[Any]:
        yield SimpleNamespace(get_device=lambda: 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"processes": 2}, "several processes"),
        ({"batching": "grouped"}, "grouped"),
        ({"bf16": False}, "bfloat16"),
        ({"checkpointing": True}, "checkpointing"),
        ({"kind": "mpnet"}, "mpnet"),
        ({"width": 12}, "flash"),
    ],
)
def test_the_reason_why_steps_are_not_recorded(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs.flash, "available", lambda device, width: width % 8 == 0)
    about = {
        "kind": "bert", "width": 64, "batching": "packed", "processes": 1, "bf16": True, "checkpointing": False,
        **changes,
    }  # fmt: skip
    why = cuda_graphs.why_not_graphed(
        _OnGpu(about["kind"], about["width"]),
        about["batching"],
        about["processes"],
        bf16=about["bf16"],
        checkpointing=about["checkpointing"],
    )
    assert why is None if reason is None else reason in (why or "")


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert (
        cuda_graphs.why_not_graphed(model_of(CONFIGS["bert"]), "packed", 1, bf16=True, checkpointing=False) == "no GPU"
    )
