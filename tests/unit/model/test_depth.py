"""Frozen layers and learning rates by depth, on real architectures."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.compute.encoders import BERT, CONFIGS, model_of

from afina.errors import RecipeError
from afina.recipe.keys.train_keys import Train
from afina.worker.model.depth import depths, freeze, learning_rates, step_cost

MORE: dict[str, dict[str, Any]] = {
    "llama": {**BERT, "model_type": "llama"},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "deberta-v2": {**BERT, "model_type": "deberta-v2", "relative_attention": True, "position_buckets": 8},
    "bart": {
        "model_type": "bart",
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "eos_token_id": 2,
        **{f"{part}_{key}": 4 for part in ("encoder", "decoder") for key in ("attention_heads", "ffn_dim")},
    },
    "albert": {**BERT, "model_type": "albert", "embedding_size": 16},
}
LAYERS = {"bert, one layer": 1, "albert": 1, "bart": 4}


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_depth_rises_from_the_embeddings_to_the_head(name: str) -> None:
    model = model_of({**CONFIGS, **MORE}[name])
    of, layers = depths(model), LAYERS.get(name, 3)
    assert set(of.values()) == set(range(layers + 2))
    for path, depth in of.items():
        body = path.startswith(f"{model.base_model_prefix}.")
        assert depth == layers + 1 or body, "all of the head is at the top"
        if "embed" in path or ".wte" in path or ".wpe" in path:
            assert depth == 0 or "rel_embeddings" in path or "layernorm_embedding" in path or "mapping" in path, path
    rates = learning_rates(model, Train(layer_decay=0.5, learning_rate=0.1, head_learning_rate=3.0))
    for path, weight in model.named_parameters():
        body = path.startswith(f"{model.base_model_prefix}.")
        assert rates[weight] == (0.1 * 0.5 ** (layers + 1 - of[path]) if body else 3.0), path


@pytest.mark.parametrize(("wanted", "frozen"), [("embeddings", {0}), (2, {0, 1, 2}), (3, {0, 1, 2, 3}), ("body", None)])
@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert", "gpt2"])
def test_what_is_frozen(name: str, wanted: Any, frozen: set[int] | None) -> None:
    model = model_of({**CONFIGS, **MORE}[name])
    line = freeze(model, Train(freeze=wanted), new=["bert.pooler.dense.weight"])
    of = depths(model)
    for path, weight in model.named_parameters():
        body = path.startswith(f"{model.base_model_prefix}.") and path != "bert.pooler.dense.weight"
        assert weight.requires_grad == (of[path] not in frozen if frozen else not body), path
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert f"; {trained:,} of " in line
    assert step_cost(model) < 3 if wanted != "embeddings" else step_cost(model) == 3


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(RecipeError, match="freeze: 4 layers, and the model has 3"):
        freeze(model_of(CONFIGS["bert"]), Train(freeze=4))
