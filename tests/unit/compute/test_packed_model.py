"""Packed batches against padded ones, per architecture: logits, loss and every gradient; and the batching that a model gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.smollm2 import smollm2_folder
from tests.unit.compute.encoders import (
    BERT,
    CONFIGS,
    LENGTHS,
    OTHERS,
    PAD,
    SMALL,
    assert_same,
    forward_arguments,
    model_of,
    split_of,
    step,
    with_words,
    without_dropout,
)
from tests.unit.conftest import recipe_dict
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForSequenceClassification,
    TrainingArguments,
)

from afina.recipe.schema import Recipe
from afina.worker.compute import attention, dropout, packed_model
from afina.worker.compute.attention import attend
from afina.worker.compute.batches import Collator, PackedCollator
from afina.worker.compute.packing import pack
from afina.worker.data.prepared import Split
from afina.worker.model.padding import padding_side


@pytest.mark.parametrize("cuts", ["by cost", "each alone", "all together"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_padded(name: str, precision: torch.dtype, cuts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"by cost": None, "each alone": 1e-9, "all together": 1e12}[cuts]
    if call is not None:
        monkeypatch.setattr("afina.worker.compute.packing.CALL_SCORES", {"cpu": call})
    model = without_dropout(model_of(CONFIGS[name], dtype=precision)).train()
    assert packed_model.why_not_packed(model) is None
    # A text may contain the padding token, which must not shift positions that are counted from tokens.
    split = split_of(LENGTHS, 5, types="token_type_ids" in forward_arguments(model), forbidden=None)
    rows = list(range(len(LENGTHS)))
    about = packed_model.PROVEN[model.config.model_type]
    expected = step(model, Collator(split, PAD)(rows))
    packed_model.enable_packing(model, attention.FAST)
    fills = cuts == "by cost"
    batch = PackedCollator(split, PAD, heads=4, offset=about.offset, fill=fills)(rows)
    assert batch["input_ids"].shape == (1, 176 if fills else sum(LENGTHS))
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


@pytest.mark.parametrize(
    "name", [*CONFIGS, "llama", "qwen3", "gemma2", "gpt2", "deberta-v2", "deberta-v3", "nomic_bert", "gte"]
)
def test_a_packed_token_classifier_equals_each_row_alone_and_padded(name: str) -> None:
    """The logits of all words, the loss and every gradient; nothing is pooled."""
    about = {**CONFIGS, **OTHERS}[name]
    model = without_dropout(model_of(about, dtype=torch.float64, task="token-classification")).train()
    assert packed_model.why_not_packed(model) is None
    split = with_words(split_of(LENGTHS, 5, types="token_type_ids" in forward_arguments(model), forbidden=None))
    assert split.words is not None
    rows = list(range(len(LENGTHS)))
    side = padding_side(model)
    padded = step(model, Collator(split, PAD, None, side)(rows))
    alone = [step(model, Collator(split, PAD)([row])) for row in rows]
    logits = torch.cat([each[0] for each in alone])
    assert len(logits) == (split.words.pieces >= 0).sum()
    packed_model.enable_packing(model, attention.FAST)
    batch = packed_model.collator(model, split, "packed", PAD, fill=True)(rows)
    assert model(**{k: v for k, v in batch.items() if k != "labels"})["logits"].shape == (1, 176, 5)
    found = step(model, batch)
    assert_same(found[0], logits, 1e-6, "logits, each row alone")
    assert_same(found[1], sum(each[1] for each in alone), 1e-6, "loss, each row alone")
    if name in CONFIGS:  # Gemma 2 of Transformers itself gives NaN at padding
        assert_same(found[0], padded[0], 1e-6, "logits, padded")
        assert_same(found[1], padded[1], 1e-6, "loss, padded")
    wanted = {key: sum(each[2][key] for each in alone) for key in alone[0][2]}
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for key, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((found[2][key] - gradient).abs().max()) / scale <= 1e-5, key
    filler = packed_model.collator(model, split, "packed", PAD)([0, ~1])["labels"]
    assert filler[1].sum() == (split.words.pieces[split.words.of_rows(np.array([0]))[0]] >= 0).sum()


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_a_packed_body_equals_each_row_alone(name: str, precision: torch.dtype) -> None:
    """Decoders and today's encoders: logits, loss and every gradient; the head pools as in Transformers, padding tokens in texts included."""
    model = without_dropout(model_of(OTHERS[name], dtype=precision)).train()
    assert packed_model.why_not_packed(model) is None
    split = split_of(LENGTHS, 5, types="token_type_ids" in forward_arguments(model), forbidden=None)
    ends = split.offsets[1:] - 1
    split.tokens[ends[:2]] = PAD  # what a model whose padding token is that of the end of a text meets
    rows = list(range(len(LENGTHS)))
    alone = [step(model, Collator(split, PAD)([row])) for row in rows]
    wanted = {key: sum(each[2][key].double() for each in alone) for key in alone[0][2]}
    packed_model.enable_packing(model, attention.FAST)
    fills = precision == torch.float32
    found = step(model, packed_model.collator(model, split, "packed", PAD, fill=fills)(rows))
    # float64: norms and rotations of Transformers stay in float32; DeBERTa has neither.
    exact = 1e-12 if name.startswith("deberta") else 1e-6
    tolerance = {torch.float64: exact, torch.float32: 2e-5, torch.bfloat16: 2e-2}[precision]
    assert_same(found[0], torch.cat([each[0] for each in alone]), tolerance, "logits")
    assert_same(found[1], sum(each[1] for each in alone), tolerance, "loss")
    assert found[2].keys() == wanted.keys()
    order = 2 if precision == torch.bfloat16 else torch.inf  # single sums of bfloat16 are rounded by more
    largest = max(float(g.norm(order)) for g in wanted.values())
    for key, gradient in wanted.items():
        scale = max(float(gradient.norm(order)), 1e-3 * largest)
        assert float((found[2][key] - gradient).norm(order)) / scale <= 4 * tolerance, key
    again = step(model, Collator(split, PAD)(rows))
    assert_same(again[0], found[0], tolerance, "padded batches after packed ones")
    with torch.inference_mode():
        kinds = {} if split.types is None else {"token_type_ids": Collator(split, PAD)([0])["token_type_ids"]}
        first = model(input_ids=Collator(split, PAD)([0])["input_ids"], **kinds)["logits"]
    assert_same(first, found[0][:1], tolerance, "a row without a mask")


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("llama", lambda: {"packing": pack([38], 2)}),
        ("llama", lambda: {"is_causal": False}),
        ("mistral", lambda: {"sliding_window": None}),
        ("mistral", lambda: {"sliding_window": 5}),
        ("gemma2", lambda: {"softcap": None}),
        ("eurobert, mean", lambda: {"is_causal": True}),
    ],
)
def test_the_comparison_notices_attention_that_is_wrong(
    name: str, broken: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What unnamed architectures are tried with finds each thing that attention may do wrong, and what the collator may."""
    packed_model._prove.cache_clear()
    model = model_of(OTHERS[name])

    def wrong(*arguments: Any, **named: Any) -> Any:
        return attend(*arguments, **{**named, **(broken() if named.get("packing") else {})})

    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend", wrong)
        assert "has other logits than its rows alone" in str(packed_model.why_not_packed(model))
    packed_model._prove.cache_clear()
    monkeypatch.setattr(packed_model, "_LENGTHS", (11, 9, 9, 6, 2, 1))
    assert packed_model.why_not_packed(model) is None


def test_the_comparison_notices_positions_and_code_that_stops_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = PackedCollator.__call__
    for change, what in (("position_ids", "logits"), ("gradient", "gradients")):
        packed_model._prove.cache_clear()

        def collate(self: Any, rows: Any, change: str = change) -> Any:
            batch = usual(self, rows)
            if change == "position_ids":
                batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
            return batch

        def detached(*arguments: Any, **named: Any) -> Any:
            out, nothing = attend(*arguments, **named)
            return (out.detach() if named.get("packing") else out), nothing

        with monkeypatch.context() as patch:
            patch.setattr(PackedCollator, "__call__", collate)
            if change == "gradient":
                patch.setattr(attention, "attend", detached)
            assert f"other {what} than its rows" in str(packed_model.why_not_packed(model_of(OTHERS["gpt2"])))
    packed_model._prove.cache_clear()


@pytest.mark.series
def test_a_real_decoder_packed_equals_each_row_alone() -> None:
    """SmolLM2-135M, all 30 layers, in float32: logits, and the gradient of every weight."""
    folder = smollm2_folder()
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5, dtype=torch.float32).train()
    assert packed_model.why_not_packed(model) is None
    lengths = (60, 41, 22, 9, 3)
    draw = np.random.default_rng(4)
    tokens = draw.integers(3, 49_152, sum(lengths)).astype(np.uint16)
    split = Split(tokens, np.concatenate([[0], np.cumsum(lengths)]), draw.integers(0, 5, 5), None)
    rows = list(range(len(lengths)))
    alone = [step(model, Collator(split, 2)([row])) for row in rows]
    packed_model.enable_packing(model, attention.FAST)
    found = step(model, packed_model.collator(model, split, "packed", 2)(rows))
    assert_same(found[0], torch.cat([each[0] for each in alone]), 1e-4, "logits")
    for key, gradient in found[2].items():
        wanted = sum(each[2][key] for each in alone)
        assert float((gradient - wanted).norm()) <= 1e-3 * float(wanted.norm()), key


@pytest.mark.parametrize("name", ["bert", "llama", "deberta-v3"])
def test_activation_checkpointing_with_packed_batches(name: str) -> None:
    split, rows = split_of(LENGTHS, 6), list(range(len(LENGTHS)))
    steps = []
    for checkpointing in (False, True):
        model = without_dropout(model_of({**CONFIGS, **OTHERS}[name])).train()
        packed_model.enable_packing(model, attention.FAST)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        steps.append(step(model, PackedCollator(split, PAD, 4)(rows)))
    assert_same(steps[1][0], steps[0][0], 1e-6, "logits")
    for name, gradient in steps[0][2].items():
        assert float((steps[1][2][name] - gradient).abs().max()) <= 1e-4 * max(float(gradient.abs().max()), 1e-2), name


@pytest.mark.parametrize(
    ("name", "weight"), [("bert", "value"), pytest.param("deberta-v3", "value_proj", marks=pytest.mark.series)]
)
def test_with_dropout_packed_and_padded_differ_by_chance_only(name: str, weight: str) -> None:
    """The mean gradient of many draws: packed (fast dropout) and padded (torch's) estimate the same expectation."""
    lengths = (12, 9, 9, 5)
    split, rows = split_of(lengths, 2), [0, 1, 2, 3]
    torch.manual_seed(0)
    dropout.seed(0, 0)
    means = []
    for way in ("padded", "packed"):
        model = model_of({**CONFIGS, **OTHERS}[name] | {"num_hidden_layers": 2}).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        if way == "packed":
            dropout.use_fast_dropout(model)
            packed_model.enable_packing(model, attention.FAST)
        batch = (PackedCollator(split, PAD, 4) if way == "packed" else Collator(split, PAD))(rows)
        weights = []
        for _ in range(300):
            gradients = step(model, batch)[2]
            weights.append(
                gradients[f"{model.base_model_prefix}.encoder.layer.0.attention.self.{weight}.weight"].flatten()
            )
        drawn = torch.stack(weights)
        means.append((drawn.mean(0), drawn.var(0) / len(drawn)))
    (a, noise_a), (b, noise_b) = means
    # Squared differences over their variance average 1 if only chance sets them apart.
    ratio = float(((a - b) ** 2).sum() / (noise_a + noise_b).sum())
    assert 0.5 < ratio < 1.7, ratio


def test_only_proven_architectures_pack() -> None:
    assert packed_model.why_not_packed(model_of({**BERT, "model_type": "bert"})) is None
    other = model_of({"model_type": "albert", "hidden_size": 64, "num_attention_heads": 4, "embedding_size": 16})
    assert str(packed_model.why_not_packed(other)).startswith("albert does not take packed batches: IndexError")
    decoder = model_of({**BERT, "model_type": "bert", "is_decoder": True})
    assert packed_model.why_not_packed(decoder) == "the model is configured as a decoder"

    class Pooled(type(model_of({**BERT, "model_type": "bert"}))):  # type: ignore[misc]
        pass

    assert "not a class of Transformers" in str(packed_model.why_not_packed(Pooled(decoder.config)))


@pytest.mark.parametrize(
    ("kind", "asked", "arguments", "expected", "reason"),
    [
        ("bert", "auto", {}, "packed", None),
        ("bert", "longest", {}, "longest", None),
        ("albert", "auto", {}, "grouped", "albert does not take packed batches"),
        ("albert", "packed", {}, "grouped", "albert does not take packed batches"),
        ("llama", "auto", {}, "packed", None),
        ("albert", "padded", {}, "padded", None),
        ("bert", "auto", {"torch_compile": True}, "grouped", "not proven under torch_compile"),
    ],
)
def test_what_cannot_be_packed_is_grouped_with_a_note(
    kind: str, asked: str, arguments: dict[str, Any], expected: str, reason: str | None, tmp_path: Any
) -> None:
    about = {"albert": {"embedding_size": 16}}.get(kind, {})
    model = model_of({**BERT, "model_type": kind, **about})
    recipe = Recipe.model_validate({**recipe_dict(), "tokens": {"batching": asked}})
    settings = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", **arguments)
    batching, notes = packed_model.configure(model, recipe, settings)
    assert batching == expected
    assert len(notes) == bool(reason)
    assert not reason or notes[0].startswith(f"batches are grouped by length, not packed: {reason}")
    fast = any(isinstance(module, dropout.FastDropout) for module in model.modules())
    assert fast == ("torch_compile" not in arguments and kind != "llama"), "Llama has no dropout"
    assert torch.get_float32_matmul_precision() == "highest", "torch's default"


def test_no_fast_dropout_with_activation_checkpointing(tmp_path: Any) -> None:
    """Recomputation would draw other masks."""
    model = model_of({**BERT, "model_type": "bert"})
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", activation_checkpointing=True
    )
    assert packed_model.configure(model, Recipe.model_validate(recipe_dict()), settings)[0] == "packed"
    assert not any(isinstance(module, dropout.FastDropout) for module in model.modules())
    assert model.config._attn_implementation == attention.PLAIN


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert"])
def test_attention_dropout_0_reaches_the_model(kind: str, tmp_path: Any) -> None:
    AutoConfig.for_model(**{**SMALL, **CONFIGS[kind]}).save_pretrained(tmp_path)
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
