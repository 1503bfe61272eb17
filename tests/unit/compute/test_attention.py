"""Attention over packed and padded sequences against the formula, sequence by sequence."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
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

from afina.worker.compute import attention, dropout, packed_model
from afina.worker.compute.attention import attend
from afina.worker.compute.batches import Collator
from afina.worker.compute.packing import Packing, pack


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, p: float, sizes: list[int], way: str
) -> torch.Tensor:
    """Textbook attention, sequence by sequence, with the masks that the generator draws in this order."""
    first_only = way == "first only"
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outs, first, heads = [], 0, q.shape[1]
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        group = LENGTHS[start : start + size]
        rows = 1 if first_only else group[0]
        masks = dropout.keep_mask(dropout.random_bits(size * heads, rows, group[0]), p, q.dtype).view(
            size, heads, rows, group[0]
        )
        for length, mask in zip(group, masks, strict=True):
            a, b, c = (x[0, :, first : first + length] for x in (q, k, v))
            scores = (a @ b.transpose(1, 2)) * q.shape[-1] ** -0.5 + bias[0, :, :length, :length]
            if way.startswith("causal"):
                back = torch.arange(length)[:, None] - torch.arange(length)
                scores = scores.masked_fill((back < 0) | ((back >= 5) & way.endswith("window")), -torch.inf)
            weights = scores.softmax(-1)[:, : min(rows, length)]
            out = (weights * mask[:, :length, :length] / (1 - p)) @ c
            outs.append(torch.nn.functional.pad(out, (0, 0, 0, length - out.shape[1])))
            first += length
    return torch.cat(outs, 1).transpose(0, 1)[None]


@pytest.mark.parametrize("way", ["whole", "first only", "causal", "causal, window"])
@pytest.mark.parametrize("call", [1e-9, 40_000, 1e12])
def test_attention_with_dropout_matches_the_formula_and_its_gradient(
    call: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afina.worker.compute.packing.CALL_SCORES", {"cpu": call})
    torch.manual_seed(0)
    packing = pack(LENGTHS, heads=4)
    module = torch.nn.Identity()
    setattr(module, attention.FIRST_ONLY, way == "first only")
    module.is_causal = way.startswith("causal")
    window, key_heads = 5 if way.endswith("window") else None, 2 if module.is_causal else 4
    shapes = [(1, heads, sum(LENGTHS), 8) for heads in (4, key_heads, key_heads, 4)]
    shapes += [(1, 4, max(LENGTHS), max(LENGTHS))]
    draw = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for results in (found, expected):
        q, k, v, bias = (x.clone().requires_grad_() for x in (*draw[:3], draw[4]))
        dropout.seed(11, 0)
        if results is found:
            options: dict[str, Any] = {"bias": bias, "fast_dropout": True, "sliding_window": window}
            out, _ = attend(module, q, k, v, None, dropout=0.3, packing=packing, **options)
        else:
            out = reference(q, k, v, bias, 0.3, [group.count for group in packing.groups], way)
        out.backward(draw[3].transpose(1, 2))
        results += [out.detach(), q.grad, k.grad, v.grad, bias.grad]
    for a, b, what in zip(found, expected, ("out", "query", "key", "value", "bias"), strict=True):
        assert_same(a, b, 1e-12, what)


def test_padding_does_not_change_attention_with_dropout() -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(3, 4, 10, 8) for _ in range(3))
    seen = torch.arange(10)[None] < torch.tensor([10, 6, 1])[:, None]
    mask = seen[:, None, None, :].expand(3, 1, 10, 10)
    outs = []
    for change in (0.0, 5.0):
        dropout.seed(1, 0)
        keys, values = (x + change * ~seen[:, None, :, None] for x in (k, v))
        outs.append(attend(torch.nn.Identity(), q, keys, values, mask, dropout=0.5, fast_dropout=True)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], attend(torch.nn.Identity(), q, k, v, mask, dropout=0.5, fast_dropout=True)[0])


def test_attention_with_dropout_stays_float32_under_autocast() -> None:
    torch.manual_seed(2)
    packing = pack(LENGTHS, heads=4)
    draw = [torch.randn(1, 4, sum(LENGTHS), 8).bfloat16() for _ in range(3)]
    found = []
    for half in (True, False):
        q, k, v = ((x if half else x.float()).clone().requires_grad_() for x in draw)
        dropout.seed(11, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out, _ = attend(torch.nn.Identity(), q, k, v, None, dropout=0.3, packing=packing, fast_dropout=True)
        assert out.dtype == torch.float32
        out.sum().backward()
        assert q.grad is not None and q.grad.dtype == q.dtype
        found.append([out, q.grad.float(), k.grad.float(), v.grad.float()])
    assert torch.equal(found[0][0], found[1][0])
    for mine, true in zip(*found, strict=True):
        assert torch.allclose(mine, true, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "modernbert", "modernbert, mean", "distilbert", "llama", "mistral"]
)
def test_flash_attention_gets_the_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of the GPU kernel, computed by a plain loop instead."""
    calls: list[bool] = []

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packing: Packing,
        first_only: bool,
        scale: float,
        dropout: float,
        reach: tuple[int | None, int | None],
    ) -> torch.Tensor:
        calls.append(first_only)
        assert dropout == 0 and not (first_only and reach != (None, None))
        assert packing.bounds.dtype == torch.int32 and packing.lengths[0] == max(LENGTHS)
        assert len(q) == (len(LENGTHS) if first_only else sum(LENGTHS)) and len(k) == len(v) == sum(LENGTHS)
        parts = []
        for number, (a, b) in enumerate(itertools.pairwise(packing.bounds.tolist())):
            mine = q[number : number + 1] if first_only else q[a:b]
            heads = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
            scores = torch.einsum("qhd,khd->hqk", mine, heads[0][a:b]) * scale
            back = torch.arange(b - a)[:, None] - torch.arange(b - a)
            for limit, distance in zip(reach, (back, -back), strict=True):
                if limit is not None and not first_only:
                    scores.masked_fill_(distance > limit, -torch.inf)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), heads[1][a:b]))
        return torch.cat(parts)

    monkeypatch.setattr(attention.flash, "supports", lambda query: True)
    monkeypatch.setattr(attention.flash, "attend", attend)
    model = without_dropout(model_of({**CONFIGS, **OTHERS}[name])).train()
    split, rows = split_of(LENGTHS, 6), list(range(len(LENGTHS)))
    expected = step(model, Collator(split, PAD)(rows))
    packed_model.enable_packing(model, attention.PLAIN)
    found = step(model, packed_model.collator(model, split, "packed", PAD)(rows))
    assert calls == [False, False, name in CONFIGS and not name.endswith("mean")]
    for number, what in enumerate(("logits", "loss")):
        assert_same(found[number], expected[number], 2e-5, what)


def test_cudnn_is_disabled_for_attention_on_gpus_only() -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()
    attention.disable_cudnn_sdpa(torch.device("cpu"))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    try:
        attention.disable_cudnn_sdpa(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
