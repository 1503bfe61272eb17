"""Floating-point operations against torch's own count, and the peak of a device against the clock."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from tests.unit.compute.encoders import CONFIGS, OTHERS, model_of
from torch.utils.flop_counter import FlopCounterMode

from afina.worker.compute import flops
from afina.worker.compute.flops import DATASHEET, device_peak, flops_formula, forward_flops


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formulas_count_what_torch_counts(name: str) -> None:
    """The last one also within windows: torch computes, and counts, what a window hides."""
    model = model_of({**CONFIGS[name], "eos_token_id": 3, "bos_token_id": 2}).eval()
    if model.config.model_type != "mpnet":
        model.set_attn_implementation("eager")
    assert "approximation" not in flops_formula(model.config)
    for length in (2, 9, 40):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.full((1, length), 5))
        hidden = 0
        if model.config.model_type == "modernbert":
            position = torch.arange(length)
            apart = int(((position[:, None] - position).abs() > model.config.sliding_window).sum())
            local = sum(kind == "sliding_attention" for kind in model.config.layer_types)
            hidden = 4 * model.config.hidden_size * apart * local
        assert forward_flops(model.config, np.array([length]))[0] == counter.get_total_flops() - hidden


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt2", "smollm3"])
def test_a_decoder_is_counted_without_what_a_token_does_not_see(name: str) -> None:
    model = model_of(OTHERS[name]).eval()
    model.set_attn_implementation("eager")
    config = model.config
    assert "approximation" not in flops_formula(config)
    heads = config.num_attention_heads
    wide = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [window and "sliding_attention"] * config.num_hidden_layers
    for length in (2, 9, 40):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.full((1, length), 5), use_cache=False)
        back = torch.arange(length)[:, None] - torch.arange(length)
        masks = [(back < 0) | (back >= (window if kind == "sliding_attention" else length)) for kind in kinds]
        unseen = 4 * wide * sum(int(mask.sum()) for mask in masks)
        other_rows = 2 * config.hidden_size * config.num_labels * (length - 1)
        wanted = counter.get_total_flops() - unseen - other_rows
        assert forward_flops(config, np.array([length]))[0] == wanted, length


def test_an_unknown_architecture_is_marked_as_an_approximation() -> None:
    from transformers import DebertaV2Config

    config = DebertaV2Config()
    assert "approximation" in flops_formula(config)
    assert forward_flops(config, np.array([3, 10]), 1000).tolist() == [6000.0, 20000.0]


@pytest.mark.parametrize(
    ("device", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2"),
        ("Tesla V100-PCIE-16GB", "V100"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_devices_are_matched_with_the_data_sheet(device: str, known: str | None) -> None:
    assert flops._on_the_sheet(device) == known


def test_the_data_sheet_is_consistent() -> None:
    for name, rates in DATASHEET.items():
        assert set(rates) == {"float32", "tf32", "float16", "bfloat16"}, name
        given = [rate for rate in rates.values() if rate is not None]
        assert given == sorted(given), name


def test_a_peak_in_bfloat16_takes_no_longer_without_instructions_for_it() -> None:
    began = time.process_time()
    assert device_peak(torch.device("cpu"), "bfloat16").flops > 0
    assert time.process_time() - began < 3 * torch.get_num_threads(), "it was twenty seconds on such a CPU"


def test_a_peak_is_measured_in_less_than_a_second_and_draws_no_random_numbers() -> None:
    state, began = torch.random.get_rng_state(), time.perf_counter()
    peak = device_peak(torch.device("cpu"), "float32")
    taken = time.perf_counter() - began
    assert torch.equal(state, torch.random.get_rng_state())
    assert 1e9 < peak.flops < 1e14 and "torch.mm" in peak.source
    assert taken < 3, "0.5 s on an idle core"
    side, rates = 1024, []
    left = torch.full((side, side), 0.5)
    for _ in range(12):
        wall, processor = time.perf_counter(), time.process_time()
        torch.mm(left, left)
        rates.append((2 * side**3 / (time.perf_counter() - wall), 2 * side**3 / (time.process_time() - processor)))
    # Load from elsewhere takes wall time away, from both; processor time it hardly changes.
    assert max(wall for wall, _ in rates) / 5 < peak.flops
    assert peak.flops < 2 * max(processor for _, processor in rates) * torch.get_num_threads()
