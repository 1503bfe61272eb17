"""Checks of a model without its memory: stored weights fit the architecture (Transformers silently fills gaps with random numbers).

Only the headers of safetensors files are read, and the whole of pickled ones. Not covered: models with their own code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from afina.errors import InputError

__all__ = [
    "check_shapes",
    "check_weights",
    "headers_digest",
    "input_embeddings",
    "is_token_classifier",
    "model_class",
    "tensor_types",
]

_LARGEST_HEADER = 100_000_000
#: With more of the weights below the head missing, the files are not those of a model.
_SHARE = 0.2
_SHOWN = 3


def headers_digest(folder: Path) -> str:
    """SHA-256 of the names, types and shapes of all weights in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name}\0{size}\0".encode() + file.read(min(size, _LARGEST_HEADER)))
    return digest.hexdigest()


def tensor_types(path: Path) -> set[str]:
    """The data types of the weights in a safetensors file, as it names them: F32, BF16, F8_E4M3, I8, … Masks and other buffers do not count."""
    with path.open("rb") as file:
        header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LARGEST_HEADER)))
    return {tensor["dtype"] for name, tensor in header.items() if name.endswith("weight")}


def check_weights(folder: Path, config: Any, task: str = "auto") -> list[str]:
    """Build the model on the meta device and check which weights have no stored value; returns warnings.

    A missing head is normal, and so is a missing pooler: masked language models have none.

    Raises:
        InputError: more than a fifth of the weights below the head are missing, or one has another shape.
    """
    from transformers.utils import logging

    from afina.worker.task.tasks import auto_class

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = auto_class(task).from_pretrained(
            str(folder), config=config, output_loading_info=True, ignore_mismatched_sizes=True, device_map="meta"
        )
    except Exception:  # training may load what `meta` cannot
        return []
    finally:
        if bars:
            logging.enable_progress_bar()
    prefix = f"{model.base_model_prefix}."
    body = [name for name, _ in model.named_parameters() if _below_head(name, prefix)]
    check_shapes(folder, [entry for entry in report["mismatched_keys"] if _below_head(entry[0], prefix)])
    parts = {name.removeprefix(prefix).partition(".")[0] for name in body}  # a body's own file has no prefix
    unused = sorted(
        name
        for name in report["unexpected_keys"]
        if name.endswith(".weight") and name.removeprefix(prefix).partition(".")[0] in parts and "pooler" not in name
    )
    warnings = []
    if unused:
        some = f"{', '.join(unused[:_SHOWN])}{', …' if len(unused) > _SHOWN else ''}"
        warnings = [f"model: {len(unused):,} weights in the files of {folder} have no place by its config.json: {some}"]
    missing = sorted(name for name in report["missing_keys"] if _below_head(name, prefix))
    if not missing:
        return warnings
    gap = f"{len(missing):,} of {len(body):,} weights of {folder} ({', '.join(missing[:_SHOWN])}{', …' if len(missing) > _SHOWN else ''})"
    if len(missing) > _SHARE * len(body):
        unknown = sorted(report["unexpected_keys"])
        raise InputError(
            f"model: {gap} are not in its files and would start as random numbers"
            + (
                f"; the files hold weights that the model does not have: {', '.join(unknown[:_SHOWN])}, …"
                if unknown
                else ""
            ),
            "save the model itself with save_pretrained: not one that wraps it (prefixes such as `module.` and `_orig_mod.`)",
        )
    return [*warnings, f"model: {gap} are not in its files and start as random numbers"]


def check_shapes(folder: Path, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Refuse the first weight of another shape.

    Args:
        mismatched: name, stored shape and the configuration's, as Transformers reports them.

    Raises:
        InputError: there is one.
    """
    for name, stored, wanted in sorted(mismatched):
        raise InputError(
            f"model: {name} has shape {tuple(stored)} in the weights of {folder}, {tuple(wanted)} by its config.json",
            "weights and config.json do not belong together: take both from one model",
        )


def _below_head(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and "pooler" not in name


def input_embeddings(model: Any) -> Any:
    """The module of a model's token embeddings; None: it has none (CANINE hashes characters)."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def model_class(model: Any) -> type:
    """The class of a model in its library's code; sharding replaces it by one of torch's."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))


def is_token_classifier(model: Any) -> bool:
    """True if a model gives logits of each token, (B, L, K), and pools nothing."""
    return "TokenClassification" in model_class(model).__name__
