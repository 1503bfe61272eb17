"""The files of a pretrained model's folder: whether they are whole, which of them training reads, and that they have not changed since."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from afina.errors import InputError, SiteError
from afina.files import FileRecord, describe, difference
from afina.recipe.local_model import adapter_base, check_no_adapter
from afina.recipe.schema import Recipe
from afina.worker.model.adapters import WEIGHTS, find_base, labels_config
from afina.worker.model.tokenizer import TOKENIZER_FILES, works_without_files

__all__ = ["check_files", "record_model", "training_files", "verify_model"]

_SAVE_AGAIN = "download the model again, or save it with `save_pretrained`"
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PICKLES = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_SMALL = (".json", ".txt", ".model", ".jinja", ".codes")


def check_files(folder: Path, remedy: str = _SAVE_AGAIN) -> dict[str, Any]:
    """Check config, tokenizer files and the completeness of the weights, without transformers. Returns config.json.

    Of an adapter that afina wrote, its base too.

    Raises:
        InputError: with the name of the bad file.
    """
    if with_adapter := adapter_base(folder) is not None:
        check_files(find_base(folder, digests=False), remedy)
    else:
        check_no_adapter(str(folder), [entry.name for entry in folder.glob("*")])
    config = _read_config(labels_config(folder), remedy)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not works_without_files(folder, config):
        raise InputError(
            f"model: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, …)",
            "save the tokenizer into the same folder: tokenizer.save_pretrained(FOLDER)",
        )
    for path in [folder / WEIGHTS] if with_adapter else _weights(folder, remedy):
        _check_weight_file(path, remedy)
    return config


def _read_config(folder: Path, remedy: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"model: {folder} has no config.json", remedy) from None
    except (OSError, ValueError) as error:
        raise InputError(f"model: {path} cannot be read: {error}", remedy) from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise InputError(f"model: {path} names no `model_type`", remedy)
    return config


def _weights(folder: Path, remedy: str) -> list[Path]:
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                names = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise InputError(f"model: {folder / index} cannot be read: {error}", remedy) from None
            missing = sorted(name for name in names if not (folder / name).is_file())
            if missing:
                raise InputError(f"model: {folder / missing[0]} is missing, {index} names it", remedy)
            return [folder / name for name in sorted(names)]
    raise InputError(f"model: {folder} has no weights (model.safetensors)", remedy)


def _check_weight_file(path: Path, remedy: str) -> None:
    if path.suffix != ".safetensors":
        _check_pickle(path, remedy)
        return
    from safetensors import SafetensorError, safe_open

    try:
        # The header states where each tensor ends, so this refuses a truncated file.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"model: {path} ({path.stat().st_size:,} bytes) is not a whole safetensors file: {error}", remedy
        ) from None


def _check_pickle(path: Path, remedy: str) -> None:
    """Refuse a file that torch.save has not written, or only a part of it: a zip archive (its directory is at the end), or a
    pickle of torch before 1.6, whose end nothing tells.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if not size:
        raise InputError(f"model: {path} is empty", remedy)
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"model: {path} is a pointer of Git LFS, not the weights", "git lfs pull, in its repository")
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise InputError(f"model: {path} ({size:,} bytes) is not a whole PyTorch file: its end is missing", remedy)
    if not head.startswith((b"PK", b"\x80")):
        raise InputError(f"model: {path} ({size:,} bytes) is not a file of PyTorch weights", remedy)


def training_files(files: Iterable[str], recipe: Recipe) -> list[str]:
    """The files that training reads: config, tokenizer, weights, and code if the recipe trusts it.

    Pickled weights only where there are no safetensors. Empty if there are no weights.
    """
    files = list(files)
    top = [name for name in files if "/" not in name]
    weights = [n for n in top if _SAFETENSORS.fullmatch(n)] or [n for n in top if _PICKLES.fullmatch(n)]
    if not weights:
        return []
    pickled = not _SAFETENSORS.fullmatch(weights[0])
    small = [
        name
        for name in top
        if name.endswith(_SMALL) and not (name.endswith(".index.json") and pickled != name.startswith("pytorch_model"))
    ]
    code = [name for name in files if name.endswith(".py")] if recipe.trust_remote_code else []
    return sorted({*small, *weights, *code})


def record_model(folder: Path, recipe: Recipe) -> dict[str, FileRecord]:
    """Size and SHA-256 of the files of a local model folder that training reads, for `verify_model`. Reads all files."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if adapter_base(folder) is not None:
        # The digests of its base are in one of its files.
        return describe(folder, sorted(name for name in names if not name.startswith("onnx/")))
    weights = [path.relative_to(folder).as_posix() for path in _weights(folder, _SAVE_AGAIN)]
    return describe(folder, sorted({*training_files(names, recipe), *weights}))


def verify_model(prepared: Mapping[str, Any], *, digests: bool = True) -> None:
    """Check that the folder still holds the model that the run was claimed with.

    Args:
        prepared: the run's `prepared.json`.
        digests: compare SHA-256 too (reads everything), not only presence and size.

    Raises:
        SiteError: a file is missing or altered; with the remedy.
        InputError: so is one of an adapter's base.
    """
    folder = Path(prepared["model_folder"])
    wrong = difference(folder, prepared.get("model_files", {}), digests=digests)
    if wrong is None and adapter_base(folder) is not None:
        find_base(folder, digests=digests)
    if wrong is None:
        return
    if prepared.get("model_commit"):
        raise SiteError(f"model {wrong}", "fetch it again with `afina prefetch RECIPE` (scratch may have been purged)")
    raise SiteError(
        f"model {wrong}",
        "put the file back; `afina prefetch RECIPE` checks the folder, and a changed model needs a new run",
    )
