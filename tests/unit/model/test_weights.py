"""Weights that do not fit the architecture are found before training; in process, on tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model

from afina.errors import InputError
from afina.recipe.parse import parse_recipe
from afina.worker.model.head import build_model
from afina.worker.model.weights import check_weights, headers_digest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), num_labels=3)


def check(folder: Path) -> list[str]:
    return check_weights(folder, transformers.AutoConfig.from_pretrained(str(folder)))


def renamed(model: Path, folder: Path, name: Callable[[str], str | None]) -> Path:
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {new: w for old, w in weights.items() if (new := name(old))}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("arch", ["bert", "roberta", "distilbert"])
def test_an_encoder_without_a_head_passes(arch: str, tmp_path: Path) -> None:
    assert check(tiny_model(tmp_path / arch, arch)) == []


def test_a_head_for_other_labels_and_a_missing_pooler_pass(model: Path, tmp_path: Path) -> None:
    assert check(model) == []
    bare = renamed(model, tmp_path / "bare", lambda name: None if "pooler" in name or "classifier" in name else name)
    assert check(bare) == []
    assert headers_digest(bare) != headers_digest(model)


def test_a_wrapped_model_is_refused(model: Path, tmp_path: Path) -> None:
    wrapped = renamed(model, tmp_path / "wrapped", lambda name: f"encoder_q.{name}")
    with pytest.raises(InputError, match=r"would start as random numbers; .* encoder_q\.bert") as caught:
        check(wrapped)
    assert str(wrapped) in caught.value.message and "save_pretrained" in caught.value.remedy


def test_a_missing_layer_is_a_warning(model: Path, tmp_path: Path) -> None:
    cut = renamed(model, tmp_path / "cut", lambda name: None if "layer.1.output" in name else name)
    (warning,) = check(cut)
    assert "4 of 37 weights" in warning and "bert.encoder.layer.1.output.LayerNorm.bias" in warning


def test_another_shape_is_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(InputError, match=r"word_embeddings.weight has shape .* in the weights of"):
        check(folder)


def test_a_weight_that_is_nan_is_named(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("attention.self.query.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    recipe = parse_recipe(
        f"name: x\nmodel: '{folder}'\ndata: {{files: {{all: a.csv}}, text: text, label: stars}}\ntokens: {{max_length: 32}}\n"
    )
    build_model(recipe, model, "single-label", None, 3)
    with pytest.raises(InputError, match=rf"{name} of .*broken holds NaN"):
        build_model(recipe, folder, "single-label", None, 3)
