"""Packed batches against padded ones, per architecture: logits, loss and every gradient; and what holds the two apart."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tests.unit.conftest import recipe_dict
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForSequenceClassification,
    TrainingArguments,
)

from afina.recipe.schema import Recipe
from afina.run.plan import Geometry
from afina.worker.compute import attention, dropout, packed_model
from afina.worker.compute.attention import attend
from afina.worker.compute.batches import Batching, Collator, PackedCollator, StepBatches
from afina.worker.compute.packing import Packing, group_sequences, pack
from afina.worker.data.prepared import Split

VOCABULARY, PAD = 200, 1
LENGTHS = (37, 36, 36, 20, 20, 7, 3, 2, 1)

_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": 5, "max_position_embeddings": 64}
_BERT = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
MODERN = {**_BERT, "local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_BERT, "model_type": "bert", "type_vocab_size": 2},
    "bert, one layer": {**_BERT, "model_type": "bert", "num_hidden_layers": 1},
    "electra": {**_BERT, "model_type": "electra", "embedding_size": 32},
    "roberta": {**_BERT, "model_type": "roberta"},
    "xlm-roberta": {**_BERT, "model_type": "xlm-roberta"},
    "camembert": {**_BERT, "model_type": "camembert"},
    "distilbert": {"model_type": "distilbert", "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128},
    "mpnet": {**_BERT, "model_type": "mpnet"},
    "modernbert": {**MODERN, "model_type": "modernbert", "classifier_pooling": "cls"},
    "modernbert, mean": {**MODERN, "model_type": "modernbert", "classifier_pooling": "mean"},
}


def split_of(lengths: Sequence[int], seed: int, *, types: bool = False, forbidden: int | None = PAD) -> Split:
    """Random tokens; without padding tokens unless `forbidden` is None."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(2 if forbidden is not None else 0, VOCABULARY, sum(lengths)).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    kinds = draw.integers(0, 2, len(tokens)).astype(np.uint8) if types else None
    return Split(tokens, offsets, draw.integers(0, 5, len(lengths)), kinds)


def model_of(about: dict[str, Any], *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**_SMALL, **about, **changes})
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():  # the usual start is so small that differences could hide
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.3)
    return model.to(dtype)


def still(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.0)
    return model


def step(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, loss and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    batch = dict(batch)
    labels = batch.pop("labels")
    logits = model(**batch)["logits"]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), loss.detach(), {name: g.clone() for name, g in gradients.items()}


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float, what: str) -> None:
    worst = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30)
    assert worst <= tolerance, f"{what}: {worst:.2e} apart, relative to the largest"


@pytest.mark.parametrize("cuts", ["by cost", "each alone", "all together"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_is_padded(name: str, precision: torch.dtype, cuts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"by cost": None, "each alone": 1e-9, "all together": 1e12}[cuts]
    if call is not None:
        monkeypatch.setattr("afina.worker.compute.packing.CALL_SCORES", {"cpu": call})
    model = still(model_of(CONFIGS[name], dtype=precision)).train()
    assert packed_model.why_not_packed(model) is None
    # A text may spell out the padding token; where positions are counted from the tokens that must not shift them.
    split = split_of(LENGTHS, 5, types="token_type_ids" in _inputs(model), forbidden=None)
    rows = list(range(len(LENGTHS)))
    about = packed_model.PROVEN[model.config.model_type]
    expected = step(model, Collator(split, PAD)(rows))
    packed_model.enable_packing(model, attention.FAST)
    batch = PackedCollator(split, PAD, heads=4, offset=about.offset)(rows)
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    found = step(model, batch)
    tolerance = 2e-5 if precision == torch.float32 else 1e-12
    assert_same(found[0], expected[0], tolerance, "logits")
    assert_same(found[1], expected[1], tolerance, "loss")
    # The padding token's own gradient comes from padding too, but no loss reaches it.
    assert found[2].keys() == expected[2].keys()
    largest = max(float(g.abs().max()) for g in expected[2].values())
    for key, gradient in expected[2].items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((found[2][key] - gradient).abs().max()) / scale <= tolerance, key
    again = step(model, Collator(split, PAD)(rows))
    assert_same(again[0], expected[0], tolerance, "padded batches after packed ones")


def _inputs(model: Any) -> set[str]:
    import inspect

    names = set(inspect.signature(model.forward).parameters)
    return names if getattr(model.config, "type_vocab_size", 0) > 1 else names - {"token_type_ids"}


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, p: float, sizes: list[int], first_only: bool
) -> torch.Tensor:
    """Attention as it is written in books, sequence by sequence, with the masks that the generator gives in this order."""
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
            weights = scores.softmax(-1)[:, : min(rows, length)]
            out = (weights * mask[:, :length, :length] / (1 - p)) @ c
            outs.append(torch.nn.functional.pad(out, (0, 0, 0, length - out.shape[1])))
            first += length
    return torch.cat(outs, 1).transpose(0, 1)[None]


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("call", [1e-9, 40_000, 1e12])
def test_attention_with_dropout_is_the_formula_and_its_gradient(
    call: float, first_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afina.worker.compute.packing.CALL_SCORES", {"cpu": call})
    torch.manual_seed(0)
    packing = pack(LENGTHS, heads=4)
    module = torch.nn.Identity()
    setattr(module, attention.FIRST_ONLY, first_only)
    shapes = [(1, 4, sum(LENGTHS), 8)] * 4 + [(1, 4, max(LENGTHS), max(LENGTHS))]
    draw = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for results in (found, expected):
        q, k, v, bias = (x.clone().requires_grad_() for x in (*draw[:3], draw[4]))
        dropout.seed(11, 0)
        if results is found:
            out, _ = attend(module, q, k, v, None, dropout=0.3, packing=packing, bias=bias, fast_dropout=True)
        else:
            out = reference(q, k, v, bias, 0.3, [group.count for group in packing.groups], first_only)
        out.backward(draw[3].transpose(1, 2))
        results += [out.detach(), q.grad, k.grad, v.grad, bias.grad]
    for a, b, what in zip(found, expected, ("out", "query", "key", "value", "bias"), strict=True):
        assert_same(a, b, 1e-12, what)


def test_padded_attention_with_dropout_draws_the_same_and_sees_no_padding() -> None:
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


def test_under_autocast_attention_with_dropout_is_float32s() -> None:
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


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "modernbert, mean", "distilbert"])
def test_flash_attention_is_told_the_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel of GPUs gets; computed here by a plain loop."""
    told: list[bool] = []

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packing: Packing,
        first_only: bool,
        scale: float,
        dropout: float,
        window: int | None,
    ) -> torch.Tensor:
        told.append(first_only)
        assert dropout == 0 and not (first_only and window)
        assert packing.bounds.dtype == torch.int32 and packing.lengths[0] == max(LENGTHS)
        assert len(q) == (len(LENGTHS) if first_only else sum(LENGTHS)) and len(k) == len(v) == sum(LENGTHS)
        parts = []
        for number, (a, b) in enumerate(itertools.pairwise(packing.bounds.tolist())):
            mine = q[number : number + 1] if first_only else q[a:b]
            scores = torch.einsum("qhd,khd->hqk", mine, k[a:b]) * scale
            if window is not None:
                at = torch.arange(b - a)
                scores.masked_fill_((at[:, None] - at).abs() >= window, -torch.inf)
            parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b]))
        return torch.cat(parts)

    monkeypatch.setattr(attention.flash, "supports", lambda query: True)
    monkeypatch.setattr(attention.flash, "attend", attend)
    model = still(model_of(CONFIGS[name])).train()
    split, rows = split_of(LENGTHS, 6), list(range(len(LENGTHS)))
    expected = step(model, Collator(split, PAD)(rows))
    packed_model.enable_packing(model, attention.PLAIN)
    found = step(model, PackedCollator(split, PAD, 4, packed_model.PROVEN[model.config.model_type].offset)(rows))
    assert told == [False, False, not name.endswith("mean")]
    for number, what in enumerate(("logits", "loss")):
        assert_same(found[number], expected[number], 2e-5, what)


def test_cudnn_is_kept_from_attention_on_gpus_only() -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled()
    attention.disable_cudnn_sdpa(torch.device("cpu"))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    try:
        attention.disable_cudnn_sdpa(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_activation_checkpointing_packs_too() -> None:
    split, rows = split_of(LENGTHS, 6), list(range(len(LENGTHS)))
    steps = []
    for checkpointing in (False, True):
        model = still(model_of(CONFIGS["bert"])).train()
        packed_model.enable_packing(model, attention.FAST)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        steps.append(step(model, PackedCollator(split, PAD, 4)(rows)))
    assert_same(steps[1][0], steps[0][0], 1e-6, "logits")
    for name, gradient in steps[0][2].items():
        assert float((steps[1][2][name] - gradient).abs().max()) <= 1e-4 * max(float(gradient.abs().max()), 1e-2), name


def test_with_dropout_packed_and_padded_differ_by_chance_only() -> None:
    """The mean gradient of many draws: packed (fast dropout) and padded (torch's) estimate the same expectation."""
    lengths = (12, 9, 9, 5)
    split, rows = split_of(lengths, 2), [0, 1, 2, 3]
    torch.manual_seed(0)
    dropout.seed(0, 0)
    means = []
    for way in ("padded", "packed"):
        model = model_of({**CONFIGS["bert"], "num_hidden_layers": 2}).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        if way == "packed":
            dropout.use_fast_dropout(model)
            packed_model.enable_packing(model, attention.FAST)
        batch = (PackedCollator(split, PAD, 4) if way == "packed" else Collator(split, PAD))(rows)
        weights = []
        for _ in range(300):
            gradients = step(model, batch)[2]
            weights.append(gradients["bert.encoder.layer.0.attention.self.value.weight"].flatten())
        drawn = torch.stack(weights)
        means.append((drawn.mean(0), drawn.var(0) / len(drawn)))
    (a, noise_a), (b, noise_b) = means
    # Squared differences over their variance average 1 if only chance sets them apart.
    ratio = float(((a - b) ** 2).sum() / (noise_a + noise_b).sum())
    assert 0.5 < ratio < 1.7, ratio


def test_only_what_is_proven_packs() -> None:
    assert packed_model.why_not_packed(model_of({**_BERT, "model_type": "bert"})) is None
    other = model_of({"model_type": "albert", "hidden_size": 64, "num_attention_heads": 4, "embedding_size": 16})
    assert packed_model.why_not_packed(other) == "not proven for albert"
    decoder = model_of({**_BERT, "model_type": "bert", "is_decoder": True})
    assert packed_model.why_not_packed(decoder) == "the model is configured as a decoder"

    class Pooled(type(model_of({**_BERT, "model_type": "bert"}))):  # type: ignore[misc]
        pass

    assert "not a class of Transformers" in str(packed_model.why_not_packed(Pooled(decoder.config)))


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_the_cheapest_of_all(seed: int) -> None:
    draw = random.Random(seed)
    lengths = sorted((draw.randint(1, 60) for _ in range(9)), reverse=True)
    call = draw.choice([0.0, 50.0, 500.0, 1e9])

    def price(sizes: Sequence[int]) -> float:
        ends = list(itertools.accumulate(sizes, initial=0))
        return sum(call + n * lengths[first] ** 2 for first, n in zip(ends, sizes, strict=False))

    ways = [
        [b - a for a, b in itertools.pairwise((0, *bars, len(lengths)))]
        for count in range(len(lengths))
        for bars in itertools.combinations(range(1, len(lengths)), count)
    ]
    assert price(group_sequences(lengths, call)) == pytest.approx(min(map(price, ways))), (seed, lengths, call)


def test_fast_dropout_keeps_the_right_share_and_its_mean() -> None:
    dropout.seed(5, 0)
    for p in (0.1, 0.5, 1 / 3):
        layer = dropout.FastDropout(p).train()
        x = torch.ones(2_000_000, requires_grad=True)
        y = layer(x)
        share = float((y == 0).float().mean())
        assert abs(share - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5, (p, share)
        assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
        y.backward(torch.ones_like(y))
        assert torch.equal(x.grad, y.detach()), "the gradient goes through the same mask"
        assert torch.equal(layer.eval()(x), x)
    exact = dropout.keep_mask(torch.arange(-32768, 32768).to(torch.int16), 0.1, torch.float32)
    assert int((exact == 0).sum()) == round(65536 * 0.1)


def test_fast_dropout_is_at_home_in_every_place_of_dropout() -> None:
    model = model_of(CONFIGS["bert"])
    places = sum(isinstance(m, torch.nn.Dropout) for m in model.modules())
    assert dropout.use_fast_dropout(model) == places > 5
    assert all(isinstance(m, dropout.FastDropout) for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert dropout.use_fast_dropout(model) == 0


def test_the_generators_state_is_all_there_is(tmp_path: Any) -> None:
    from afina.worker.survival.snapshot import random_state, set_random_state

    dropout.seed(1, 0)
    dropout.random_bits(3)  # a draw that does not fill a word
    torch.save([{"random": random_state()}], tmp_path / "ranks.pt")
    following = [dropout.random_bits(1001), dropout.random_bits(2, 3)]
    dropout.seed(9, 9)
    set_random_state(torch.load(tmp_path / "ranks.pt", weights_only=True)[0]["random"])
    again = [dropout.random_bits(1001), dropout.random_bits(2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(following, again, strict=True))
    dropout.seed(1, 1)
    other = dropout.random_bits(1003)[3:]
    dropout.seed(1, 0)
    assert not torch.equal(dropout.random_bits(1003)[3:], other), "ranks draw from streams of their own"


@pytest.mark.parametrize(
    ("kind", "asked", "arguments", "expected", "said"),
    [
        ("bert", "auto", {}, "packed", None),
        ("bert", "longest", {}, "longest", None),
        ("albert", "auto", {}, "grouped", "not proven for albert"),
        ("albert", "packed", {}, "grouped", "not proven for albert"),
        ("albert", "padded", {}, "padded", None),
        ("bert", "auto", {"torch_compile": True}, "grouped", "not proven under torch_compile"),
    ],
)
def test_what_cannot_be_packed_is_grouped_and_said(
    kind: str, asked: str, arguments: dict[str, Any], expected: str, said: str | None, tmp_path: Any
) -> None:
    about = {"albert": {"embedding_size": 16}}.get(kind, {})
    model = model_of({**_BERT, "model_type": kind, **about})
    recipe = Recipe.model_validate({**recipe_dict(), "tokens": {"batching": asked}})
    settings = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", **arguments)
    batching, notes = packed_model.configure(model, recipe, settings)
    assert batching == expected
    assert notes == ([f"batches are grouped by length, not packed: {said}"] if said else [])
    fast = any(isinstance(module, dropout.FastDropout) for module in model.modules())
    assert fast == ("torch_compile" not in arguments)


def test_no_fast_dropout_where_a_layer_is_computed_twice(tmp_path: Any) -> None:
    """The masks of the second time would be others."""
    model = model_of({**_BERT, "model_type": "bert"})
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", activation_checkpointing=True
    )
    assert packed_model.configure(model, Recipe.model_validate(recipe_dict()), settings)[0] == "packed"
    assert not any(isinstance(module, dropout.FastDropout) for module in model.modules())
    assert model.config._attn_implementation == attention.PLAIN


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_attention_dropout_0_reaches_the_model(kind: str, tmp_path: Any) -> None:
    AutoConfig.for_model(**{**_SMALL, **CONFIGS[kind]}).save_pretrained(tmp_path)
    recipe = recipe_dict()
    assert packed_model.attention_dropout(Recipe.model_validate(recipe), str(tmp_path)) == {}
    recipe["train"]["attention_dropout"] = 0
    changes = packed_model.attention_dropout(Recipe.model_validate(recipe), str(tmp_path))
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path, **changes)).train()
    seen: list[float] = []

    def watch(module: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float = 0.0, **named: Any) -> Any:
        seen.append(dropout)
        return attend(module, q, k, v, mask, dropout=dropout, **named)

    AttentionInterface.register("afina_test_watch", watch)
    AttentionMaskInterface.register("afina_test_watch", lambda *_, **__: None)
    model.set_attn_implementation("afina_test_watch")
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert seen == [0.0, 0.0, 0.0]


def test_the_loss_curve_is_that_of_the_other_batchings() -> None:
    """Two epochs without dropout, the same rows and order: packed, longest and padded lose the same, step by step."""
    draw = np.random.default_rng(4)
    split = split_of([int(n) for n in draw.integers(2, 40, 70)], 4)
    layout = Geometry(
        nodes=1,
        processes_per_node=1,
        gpus_per_node=0,
        cpus_per_process=1,
        global_batch=8,
        batch_per_device=4,
        accumulation=2,
    )
    curves: dict[str, list[float]] = {}
    for batching in get_args(Batching):
        if batching in ("auto", "grouped"):
            continue
        model = still(model_of(CONFIGS["roberta"])).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        collate: Any = Collator(split, PAD, 64 if batching == "padded" else None)
        if batching == "packed":
            packed_model.enable_packing(model, attention.FAST)
            collate = PackedCollator(split, PAD, 4, offset=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        steps, losses = StepBatches(split.lengths, layout, 0, 2, batching), []
        for epoch in (0, 1):
            steps.set_epoch(epoch)
            for first, second in zip(*[iter(steps)] * 2, strict=True):
                optimizer.zero_grad()
                total = 0.0
                for rows in (first, second):
                    batch = collate(rows)
                    labels = batch.pop("labels")
                    loss = torch.nn.functional.cross_entropy(model(**batch)["logits"], labels, reduction="sum") / 8
                    loss.backward()
                    total += float(loss.detach())
                optimizer.step()
                losses.append(total)
        curves[batching] = losses
    assert len(curves["packed"]) == 18
    assert curves["packed"] == pytest.approx(curves["longest"], rel=1e-4)
    assert curves["packed"] == pytest.approx(curves["padded"], rel=1e-4)
    assert curves["packed"][-1] != pytest.approx(curves["packed"][0], rel=1e-2), "something was learnt"


def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Page faults of 20 blocks of 48 MB, taken and freed in turn; `MALLOC_…` in the environment has precedence."""
    code = (
        "import resource, sys\nfrom afina.worker.compute.allocator import tune_malloc\n"
        "kept = sys.argv[1] == 'keep' and tune_malloc()\nimport torch\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.zeros(12_000_000)\n"  # until there is enough to keep
        "before = faults()\n"
        "for _ in range(20): torch.zeros(12_000_000)\n"
        "print(int(kept), faults() - before)\n"
    )

    def run(word: str, **more: str) -> tuple[int, int]:
        argv = [sys.executable, "-c", code, word]
        done = subprocess.run(argv, env={**os.environ, **more}, capture_output=True, text=True, check=True)
        kept, faults = done.stdout.split()
        return int(kept), int(faults)

    before, (kept, after) = run("leave")[1], run("keep")
    if not kept:
        pytest.skip("not glibc, or MALLOC_… is set")
    assert after < 2000 < before / 10, (before, after)
    assert run("keep", MALLOC_ARENA_MAX="2")[0] == 0
