"""Checks that transformers can train a pretrained model as the recipe asks: architecture, weights, positions, layers, code of its own.

These checks need transformers (seconds to import) and run once, see `afina.worker.model.check_cache`.

Not covered: the quality of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import InputError, RecipeError, first_line
from afina.files import read_json, sha256
from afina.recipe.local_model import adapter_base
from afina.recipe.positions import longest_input
from afina.recipe.schema import Recipe
from afina.worker.model.adapters import choose_layers, labels_config, weights_folder
from afina.worker.model.check_cache import checked_once
from afina.worker.model.tokenizer import READ_CODE
from afina.worker.model.weights import check_weights, headers_digest, tensor_types
from afina.worker.startup import NOT_NEEDED, hide_packages

__all__ = ["check_model", "max_positions"]

#: Data types of weights, as safetensors names them, that become float32 without a loss that counts.
_TRAINABLE = frozenset({"F64", "F32", "F16", "BF16"})


def check_model(folder: Path, recipe: Recipe, pins: Path) -> list[str]:
    """Check that transformers can train this folder; returns warnings.

    Raises:
        InputError: no sequence classification for this architecture, a config that transformers refuses, weights of another
            model, unpinned third-party code.
        RecipeError: `tokens.max_length` beyond the model's positions, `adapter.targets` that are no layers of it, more frozen layers than it has.
    """
    if recipe.trust_remote_code:
        _check_code(folder)
    adapted = adapter_base(folder) is not None
    about = [
        "model",
        2,
        recipe.model,
        sha256(labels_config(folder) / "config.json"),
        recipe.trust_remote_code,
        recipe.tokens.max_length,
        headers_digest(folder),
        *([headers_digest(weights_folder(folder))] if adapted else []),
        *([recipe.task] if recipe.task == "token-classification" else []),
        *([recipe.adapter.model_dump(mode="json")] if recipe.adapter else []),
        *([recipe.train.freeze] if recipe.train.freeze is not None else []),
        *([recipe.train.sharding] if recipe.train.sharding != "none" else []),
    ]
    warnings = checked_once(pins, about, lambda: _check_architecture(folder, recipe))
    if "afina" in read_json(folder / "afina.json"):
        unknown = (
            f"model: {folder} was exported by afina, without the rows that it was trained on: eval and test are not checked "
            "against them; with `model: RUN_DIR/model` they are"
        )
        return [*warnings, unknown]
    return warnings


def _check_code(folder: Path) -> None:
    """Refuse `auto_map` entries of the form `owner/name--module.Class`: no revision pins that code."""
    for path in sorted(folder.glob("*.json")):
        mapped = read_json(path).get("auto_map")
        if mapped and "--" in json.dumps(mapped):
            raise InputError(
                f"model: {path} takes code from another repository, whose revision nothing pins",
                "copy that code into the model folder and name it in `auto_map` without `owner/name--`",
            )


def _check_architecture(folder: Path, recipe: Recipe) -> list[str]:
    with hide_packages(*NOT_NEEDED):
        return _check_model_type(folder, recipe)


def _check_model_type(folder: Path, recipe: Recipe) -> list[str]:
    import transformers
    from transformers.models.auto import modeling_auto

    own, weights = labels_config(folder), weights_folder(folder)
    raw = json.loads((own / "config.json").read_text(encoding="utf-8"))
    own_code = raw.get("auto_map") or {}
    _check_not_quantized(weights, raw)
    try:
        config = transformers.AutoConfig.from_pretrained(str(own), trust_remote_code=recipe.trust_remote_code)
    except Exception as error:
        if own_code and not recipe.trust_remote_code:
            raise InputError(
                f"model: {recipe.model} needs Python code from its own repository",
                READ_CODE,
            ) from None
        raise InputError(
            f"model: transformers {transformers.__version__} refuses {own / 'config.json'}: {first_line(error)}",
            "use a model of a type that this version knows, or another version of transformers",
        ) from None
    words = recipe.task == "token-classification"
    kind = "token" if words else "sequence"
    heads = getattr(modeling_auto, f"MODEL_FOR_{kind.upper()}_CLASSIFICATION_MAPPING_NAMES")
    if config.model_type not in heads and f"AutoModelFor{kind.capitalize()}Classification" not in own_code:
        raise InputError(
            f"model: transformers has no {kind} classification for architecture `{config.model_type}`",
            "use a text encoder or a causal language model: bert, roberta, deberta-v2, modernbert, llama, …",
        )
    limit = max_positions(config)
    if limit is not None and recipe.tokens.max_length > limit:
        raise RecipeError(
            f"tokens.max_length: {recipe.tokens.max_length} is more than the {limit} positions of {recipe.model}",
            f"set tokens.max_length to {limit} or less",
        )
    runs_own_code, sharded = own_code and recipe.trust_remote_code, recipe.train.sharding != "none"
    if runs_own_code and sharded:
        raise RecipeError(
            f"train.sharding: {recipe.model} has code of its own, which was not proven on shards",
            "set train.sharding: none",
        )
    if recipe.adapter is not None or recipe.train.freeze is not None or sharded or words:
        _check_layers(config, recipe)
    if runs_own_code:
        return []
    unused = (
        [f"trust_remote_code: {recipe.model} has no code of its own; leave it out"] if recipe.trust_remote_code else []
    )
    return [*unused, *check_weights(weights, config, recipe.task)]


def _check_layers(config: Any, recipe: Recipe) -> None:
    """Refuse an adapter on layers, or more frozen layers, than the classifier of this configuration has, or one that cannot be sharded.

    It is built without memory.
    """
    import torch

    from afina.worker.model.depth import check_freeze, check_sharding
    from afina.worker.model.padding import needs_equal_lengths
    from afina.worker.task.tasks import auto_class

    with torch.device("meta"):
        model = auto_class(recipe.task).from_config(config, trust_remote_code=recipe.trust_remote_code)
    if recipe.task == "token-classification" and (why := needs_equal_lengths(model)) is not None:
        raise InputError(
            f"model: {recipe.model} classifies no tokens here: {why}",
            "use another architecture: bert, roberta, deberta-v2, modernbert, …",
        )
    if recipe.adapter is not None:
        choose_layers(model, recipe.adapter)
    check_freeze(recipe.train.freeze, model)
    if recipe.train.sharding != "none":
        check_sharding(model)


def _check_not_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    settings = config.get("quantization_config")
    kinds = {tensor_type for path in folder.glob("*.safetensors") for tensor_type in tensor_types(path)}
    method = settings.get("quant_method", "unknown method") if isinstance(settings, Mapping) else None
    if method is None and (odd := sorted(kind for kind in kinds if kind not in _TRAINABLE)):
        method = f"its weights are {', '.join(odd)}"
    if method is not None:
        raise InputError(
            f"model: {folder} is quantized ({method}): all of its weights are to be trained, in float32",
            "take the model that it was made from; its page names it as the base model",
        )


def max_positions(config: Any) -> int | None:
    """Longest input in tokens; None where positions are relative or not stated."""
    if getattr(config, "position_biased_input", True) is False:
        return None
    limit, pad = (getattr(config, name, None) for name in ("max_position_embeddings", "pad_token_id"))
    return longest_input(config.model_type, limit, pad)
