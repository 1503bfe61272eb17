"""LoRA adapters: the layers that get one, what is trained, and the same logits from the saved folder, merged and unmerged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.unit.compute.encoders import (
    BERT,
    CONFIGS,
    LENGTHS,
    OTHERS,
    PAD,
    assert_same,
    forward_arguments,
    model_of,
    split_of,
    step,
    without_dropout,
)
from tests.unit.conftest import recipe_dict

from afina.errors import InputError, RecipeError
from afina.files import describe
from afina.recipe.keys.adapter_keys import Adapter
from afina.recipe.schema import Recipe
from afina.worker.compute import attention, packed_model
from afina.worker.compute.batches import Collator
from afina.worker.model import adapters

DECODERS = {name: OTHERS[name] for name in ("llama", "qwen2", "gpt2")}
UNPACKED = {
    "albert": {**BERT, "model_type": "albert", "embedding_size": 16},
    "deberta-v2": {**BERT, "model_type": "deberta-v2"},
}


def adapted(about: dict[str, Any], adapter: Adapter, **named: Any) -> Any:
    """A model with an adapter whose weights are not zero."""
    model = model_of(about, **named)
    adapters.add_adapter(model, adapter)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.to(named.get("dtype", torch.float32))


def logits(model: Any) -> torch.Tensor:
    split = split_of(LENGTHS[:4], 3)
    batch = Collator(split, PAD)([0, 1, 2, 3])
    batch.pop("labels")
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(**batch)["logits"]
    return found


@pytest.mark.parametrize("variant", [{}, {"rslora": True, "targets": "all-linear"}, {"dora": True}], ids=str)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "mpnet", "modernbert", *DECODERS, *UNPACKED])
def test_the_saved_folder_has_the_same_logits_again_and_merged(
    name: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    about = {**CONFIGS, **DECODERS, **UNPACKED}[name]
    base = tmp_path / "ba se"
    plain = model_of(about)
    plain.save_pretrained(base)
    model = adapted(about, Adapter(rank=4, **variant))
    prepared = {"model_folder": str(base), "model_files": describe(base, ["config.json", "model.safetensors"])}
    adapters.set_base(model, prepared, "")
    adapters.save_weights(model, tmp_path / "adapter")
    adapters.save_labels(model, tmp_path / "adapter", prepared)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3), "the adapter does something"
    again = model_of(about)
    adapters.add_adapter(again, Adapter(rank=4, **variant))
    adapters.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    merged = adapters.load_merged(tmp_path / "adapter")
    assert type(merged) is type(plain) and merged.state_dict().keys() == plain.state_dict().keys()
    assert float((logits(merged) - logits(model)).abs().max()) <= 1e-5
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with pytest.raises(InputError, match="is not the one that it was trained beside"):
        adapters.load_merged(tmp_path / "adapter")


@pytest.mark.parametrize("name", [*CONFIGS, *DECODERS, *UNPACKED])
def test_the_adapter_and_the_whole_head_are_trained_and_nothing_else(name: str) -> None:
    model = model_of({**CONFIGS, **DECODERS, **UNPACKED}[name])
    below = f"{model.base_model_prefix}."
    head = {name for name, _ in model.named_parameters() if not name.startswith(below)}
    adapters.add_adapter(model, Adapter(targets="all-linear"))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == head | {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(name.startswith(below) for name in trained - head), "no adapter in the head"


def test_new_modules_of_the_body_are_trained_whole() -> None:
    model = model_of(CONFIGS["bert"])
    line = adapters.add_adapter(model, Adapter(targets="all-linear"), ["classifier.weight", "bert.pooler.dense.weight"])
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name]
    assert trained == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert "trained whole: classifier, bert.pooler.dense" in line
    count, total = adapters.parameter_counts(model)
    assert f"{count:,} of {total:,} parameters" in line


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("bert", "auto", {"query", "value"}),
        ("distilbert", "auto", {"q_lin", "v_lin"}),
        ("modernbert", "auto", {"Wqkv"}),
        ("llama", "auto", {"q_proj", "v_proj"}),
        ("gpt2", "auto", {"c_attn"}),
        (
            "albert",
            "auto",
            {"embedding_hidden_mapping_in", "query", "key", "value", "dense", "ffn", "ffn_output", "pooler"},
        ),
        ("bert", ("output.dense", "key"), {"dense", "key"}),
    ],
)
def test_the_layers_of_a_choice(name: str, targets: Any, expected: set[str]) -> None:
    layers, _, note = adapters.choose_layers(
        model_of({**CONFIGS, **DECODERS, **UNPACKED}[name]), Adapter(targets=targets)
    )
    assert {layer.rpartition(".")[2] for layer in layers} == expected
    assert ("no choice of its own" in note) == (name == "albert")


def test_a_target_that_is_no_layer_is_refused_with_the_layers_there_are() -> None:
    model = model_of(CONFIGS["bert"])
    for wrong, near in (("qery", "query"), ("classifier", None), ("LayerNorm", None)):
        with pytest.raises(RecipeError, match=f"no linear layer `{wrong}`") as refused:
            adapters.choose_layers(model, Adapter(targets=("value", wrong)))
        assert "dense, key, query, value" in str(refused.value)
        assert near is None or f"did you mean `{near}`" in str(refused.value)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*CONFIGS, "llama", "qwen3", "gemma", "gpt2", "eurobert, mean"])
def test_packed_equals_padded_with_an_adapter(name: str, precision: torch.dtype) -> None:
    adapter = Adapter(rank=4, dropout=0.0, targets="all-linear")
    model = without_dropout(adapted({**CONFIGS, **OTHERS}[name], adapter, dtype=precision)).train()
    assert packed_model.why_not_packed(model) is None
    split = split_of(LENGTHS, 5, types="token_type_ids" in forward_arguments(model), forbidden=None)
    rows = list(range(len(LENGTHS)))
    expected = step(model, Collator(split, PAD)(rows))
    packed_model.enable_packing(model, attention.FAST)
    found = step(model, packed_model.collator(model, split, "packed", PAD)(rows))
    # alpha / rank = 8 multiplies the rounding of float32 too; float64 tells whether the sums are the same, but for decoders' norms.
    tolerance = 1e-4 if precision == torch.float32 else 1e-12 if name in CONFIGS else 1e-6
    assert_same(found[0], expected[0], tolerance, "logits")
    assert_same(found[1], expected[1], tolerance, "loss")
    trained = {key for key, weight in model.named_parameters() if weight.requires_grad}
    assert found[2].keys() == expected[2].keys() == trained
    largest = max(float(g.abs().max()) for g in expected[2].values())
    for key, gradient in expected[2].items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((found[2][key] - gradient).abs().max()) / scale <= tolerance, key


def test_a_checkpoint_is_at_most_three_hundredths_of_a_minilm(tmp_path: Path) -> None:
    """Adapter, head and AdamW's state of one step, as files, beside the weights of a model of MiniLM's size."""
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = model_of({"model_type": "bert", **shape}, vocab_size=30522, max_position_embeddings=512)
    base = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    adapters.add_adapter(model, Adapter())
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    step(model, Collator(split_of(LENGTHS, 5), PAD)([0, 1]))
    optimizer.step()
    adapters.save_weights(model, tmp_path, adapters.checkpoint_weights(model))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    print(f"{size:,} of {base:,} bytes: {size / base:.2%}")
    assert base > 90_000_000 and size <= 0.03 * base


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    adapters.save_weights(adapted(CONFIGS["bert"], Adapter(rank=4)), tmp_path)
    for about, adapter in ((CONFIGS["bert, one layer"], Adapter(rank=4)), (CONFIGS["bert"], Adapter(rank=8))):
        other = model_of(about)
        adapters.add_adapter(other, adapter)
        with pytest.raises(InputError, match="do not belong together"):
            adapters.load_adapter(other, tmp_path)


def test_the_section_is_checked_and_digested() -> None:
    plain = Recipe.model_validate(recipe_dict())
    assert plain.adapter is None and "adapter" not in plain.digested(), "older plans keep their digest"
    recipe = Recipe.model_validate(recipe_dict(adapter={"targets": "query"}))
    assert recipe.adapter == Adapter(targets=("query",)) and recipe.adapter.variant == "LoRA"
    assert json.dumps(recipe.digested()) != json.dumps(plain.digested())
    for wrong, reason in (
        ({"kind": "qlora"}, "train.base_dtype: nf4"),
        ({"targets": []}, "empty list"),
        ({"rank": 0}, "rank"),
    ):
        with pytest.raises(ValidationError, match=reason):
            Adapter.model_validate(wrong)
