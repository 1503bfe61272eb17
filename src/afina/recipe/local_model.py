"""The folder of a local pretrained model, checked for the files that it needs before anything is loaded.

Not covered: what these files hold; the worker examines that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from afina.errors import InputError, RecipeError
from afina.files import nearest_path
from afina.recipe.data_files import check_utf8, find_paths
from afina.recipe.keys.adapter_keys import Adapter

__all__ = [
    "ADAPTER_LABELS",
    "adapter_base",
    "check_no_adapter",
    "find_model_folder",
    "num_parameters",
    "with_stored_adapter",
]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

#: Folder beside an adapter's weights that afina wrote: the classifier's configuration, and the digests of its base.
ADAPTER_LABELS = "classifier"

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def find_model_folder(model: str, base: Path) -> Path | None:
    """The absolute folder of a local model, or None if `model` is a Hub id.

    Args:
        base: the recipe's folder; a relative path starts here, then in the working directory.

    Raises:
        InputError: no such folder, a file, or no config.json or weights in it.
    """
    path = find_paths(model, base)[0]
    check_utf8(path)
    if not path.is_dir():
        local = model.startswith((".", "/", "~", "$")) or model.count("/") > 1
        if path.exists():
            raise InputError(f"model: {path} is a file", "give the folder that holds config.json and model.safetensors")
        if local:
            raise InputError(
                f"model: {path}: no such folder",
                nearest_path(path) or "give a Hub id (owner/name) or a model folder",
            )
        return None
    if adapter_base(path) is not None:
        return path
    check_no_adapter(str(path), [entry.name for entry in path.iterdir()])
    if not (path / "config.json").is_file():
        raise InputError(
            f"model: {path} has no config.json: it is not a Transformers model folder",
            "give the folder that `save_pretrained` wrote",
        )
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise InputError(
            f"model: {path} has no weights ({', '.join(_WEIGHTS[:2])})",
            "download the model again, or save it with `save_pretrained`",
        )
    return path


def check_no_adapter(model: str, names: Iterable[str]) -> None:
    """Refuse a LoRA or another PEFT adapter among the files `names` of a model: it would be left out without a word.

    Raises:
        InputError: with the way to merge it.
    """
    if any(name in _ADAPTER for name in names):
        raise InputError(
            f"model: {model} holds an adapter (adapter_config.json), whose weights would not be read",
            "merge it into its base, and give the new folder: of a run with `afina export RUN --merge`, else with peft: "
            "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER), and save the tokenizer there "
            "too; or take the adapter's files out of the folder to train the base alone",
        )


def adapter_base(folder: Path) -> tuple[str, str | None] | None:
    """The base model of the adapter in `folder` that afina wrote, a Hub id or a folder, and its revision; None for anything else.

    Raises:
        InputError: its files cannot be read.
    """
    config = _read_adapter(folder)
    return None if config is None else (str(config["base_model_name_or_path"]), config.get("revision"))


def with_stored_adapter(given: Adapter | None, folder: Path) -> Adapter | None:
    """The section `adapter` of a recipe whose model is `folder`: of an adapter that afina wrote as it was trained, so that it is
    trained on; only its dropout may be another. For any other folder as given.

    Raises:
        InputError: the folder holds an adapter, and the recipe has no such section.
        RecipeError: the section asks for an adapter of another kind.
    """
    config = _read_adapter(folder)
    if config is None:
        return given
    merge = "merge it into its base (`afina export RUN --merge`) and give the new folder"
    if given is None:
        raise InputError(
            f"model: {folder} holds an adapter, and the recipe trains all weights",
            f"write `adapter: {{}}` to train it on; to train all weights, {merge}",
        )
    stored = Adapter(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        targets=tuple(sorted(config["target_modules"])),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
    )
    for key in sorted(given.model_fields_set - {"dropout"}):
        wanted, there = getattr(given, key), getattr(stored, key)
        if key == "targets" and (wanted == "auto" or sorted(wanted) == sorted(there)):
            continue
        if wanted != there:
            shown = f"[{', '.join(there)}]" if isinstance(there, tuple) else f"{there:g}" if key == "alpha" else there
            raise RecipeError(
                f"adapter.{key}: the adapter in {folder} has {shown}, which training on does not change",
                f"leave `{key}` out; for an adapter of another kind, {merge}",
            )
    return stored.model_copy(update={"dropout": given.dropout} if "dropout" in given.model_fields_set else {})


def _read_adapter(folder: Path) -> dict[str, Any] | None:
    """adapter_config.json of an adapter that afina wrote; None: the folder holds none.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / "adapter_config.json"
    if not (folder / ADAPTER_LABELS / "config.json").is_file() or not path.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = {"base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"} - config.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"model: {path} cannot be read: {error}", "copy the adapter's folder again") from None
    if missing:
        raise InputError(f"model: {path} names no {min(missing)}", "copy the adapter's folder again")
    return config


def num_parameters(model: Path) -> int | None:
    """Number of parameters in the model's safetensors files, from their headers; None: the model has no such files.

    Raises:
        SafetensorError: a file is damaged.
    """
    from safetensors import safe_open

    total = 0
    for path in sorted(model.glob("model*.safetensors")):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total or None
