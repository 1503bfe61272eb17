"""Checks of a pretrained model's folder: files, weights, tokenizer, head, positions; and that it has not changed since.

Checks that need transformers (seconds to import) run once, see `afina.worker.model.check_cache`.

Not covered: the quality of the weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from afina.errors import InputError, RecipeError, SiteError, first_line
from afina.files import FileRecord, describe, difference, read_json, sha256
from afina.recipe.local_model import adapter_base, check_no_adapter
from afina.recipe.positions import longest_input
from afina.recipe.schema import Recipe
from afina.worker.model.adapters import WEIGHTS, choose_layers, find_base, labels_config, weights_folder
from afina.worker.model.check_cache import checked_once
from afina.worker.model.weights import check_weights, headers_digest, tensor_types
from afina.worker.startup import NOT_NEEDED, gc_paused, hide_packages

__all__ = [
    "check_files",
    "check_model",
    "check_pad_token",
    "check_tokens",
    "give_pad_token",
    "load_tokenizer",
    "max_positions",
    "record_model",
    "tokenizer_identity",
    "verify_model",
    "training_files",
    "vocabulary_size",
]

#: Tokenizer files; a folder needs at least one, unless its tokenizer works without.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "tokenizer.model",
    "spm.model",
)
#: Tokenizers of bytes and characters have no files; AutoTokenizer finds them by these model types, or by their names.
_WITHOUT_FILES = {"canine", "perceiver", "CanineTokenizer", "ByT5Tokenizer", "PerceiverTokenizer"}
#: Other files that change a tokenizer's output.
_TOKENIZER_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
)

#: Data types of weights, as safetensors names them, that become float32 without a loss that counts.
_TRAINABLE = frozenset({"F64", "F32", "F16", "BF16"})
_SAVE_AGAIN = "download the model again, or save it with `save_pretrained`"
_READ_CODE = (
    "read that code, then set `trust_remote_code: true`, and for a model from the Hub `revision:` to its full commit"
)
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
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES) and not _works_without_files(folder, config):
        raise InputError(
            f"model: {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}, …)",
            "save the tokenizer into the same folder: tokenizer.save_pretrained(FOLDER)",
        )
    for path in [folder / WEIGHTS] if with_adapter else _weights(folder, remedy):
        _check_weight_file(path, remedy)
    return config


def _works_without_files(folder: Path, config: Mapping[str, Any]) -> bool:
    settings = read_json(folder / "tokenizer_config.json")
    kinds = {config.get("model_type"), config.get("tokenizer_class"), settings.get("tokenizer_class")}
    return bool(kinds & _WITHOUT_FILES) or "auto_map" in settings


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


def tokenizer_identity(folder: Path) -> str:
    """SHA-256 of everything in `folder` that affects tokenisation."""
    digest = hashlib.sha256()
    config = json.loads((labels_config(folder) / "config.json").read_text(encoding="utf-8"))
    kept = {key: config.get(key) for key in ("model_type", "tokenizer_class", "auto_map")}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    code = [p.name for p in folder.glob("*.py")]
    for name in sorted({*_TOKENIZER_FILES, *_TOKENIZER_SETTINGS, *code}):
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0{sha256(path)}\0".encode())
    return digest.hexdigest()


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
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as HEADS

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
                _READ_CODE,
            ) from None
        raise InputError(
            f"model: transformers {transformers.__version__} refuses {own / 'config.json'}: {first_line(error)}",
            "use a model of a type that this version knows, or another version of transformers",
        ) from None
    if config.model_type not in HEADS and "AutoModelForSequenceClassification" not in own_code:
        raise InputError(
            f"model: transformers has no sequence classification for architecture `{config.model_type}`",
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
    if recipe.adapter is not None or recipe.train.freeze is not None or sharded:
        _check_layers(config, recipe)
    if runs_own_code:
        return []
    unused = (
        [f"trust_remote_code: {recipe.model} has no code of its own; leave it out"] if recipe.trust_remote_code else []
    )
    return [*unused, *check_weights(weights, config)]


def _check_layers(config: Any, recipe: Recipe) -> None:
    """Refuse an adapter on layers, or more frozen layers, than the classifier of this configuration has, or one that cannot be sharded.

    It is built without memory.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from afina.worker.model.depth import check_freeze, check_sharding

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=recipe.trust_remote_code)
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


def load_tokenizer(folder: Path, recipe: Recipe) -> Any:
    """The folder's tokenizer, with a padding token.

    Raises:
        InputError: transformers cannot load it.
    """
    try:
        with gc_paused():
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=recipe.trust_remote_code
            )
    except Exception as error:  # a broken file or third-party code may raise anything
        if not recipe.trust_remote_code and "auto_map" in read_json(folder / "tokenizer_config.json"):
            raise InputError(
                f"model: the tokenizer of {recipe.model} needs Python code from its own repository", _READ_CODE
            ) from None
        raise InputError(
            f"model: the tokenizer in {folder} cannot be loaded: {first_line(error)}",
            "save it again with tokenizer.save_pretrained(FOLDER)",
        ) from None
    give_pad_token(tokenizer)
    return tokenizer


def vocabulary_size(folder: Path) -> int | None:
    """The rows of the model's embeddings by its configuration; None where that has no vocabulary (CANINE)."""
    config = read_json(labels_config(folder) / "config.json")
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def check_pad_token(tokenizer: Any, size: int | None) -> None:
    """Refuse a padding token beyond the embeddings: no text holds it, so only a batch in the job would meet it.

    Raises:
        InputError: with the way to resize.
    """
    pad = tokenizer.pad_token_id
    if size is not None and pad is not None and pad >= size:
        raise InputError(
            f"model: the padding token {tokenizer.pad_token} is number {pad}, its config has vocab_size {size}: the tokenizer got "
            "tokens that the model did not",
            "model.resize_token_embeddings(len(tokenizer)) and save both again, or set tokenizer.pad_token to a token that "
            "the model has, such as tokenizer.eos_token",
        )


def check_tokens(largest: int, size: int | None) -> None:
    """Refuse tokens beyond the embeddings.

    Args:
        largest: the largest token number of some texts.
        size: rows of the embeddings; None where the model has no vocabulary.

    Raises:
        InputError: tokenizer and model do not belong together.
    """
    if size is not None and largest >= size:
        raise InputError(
            f"model: its tokenizer gives token {largest}, its embeddings have {size} rows (vocab_size)",
            "tokenizer and weights do not belong together: take both from one model, or call "
            "model.resize_token_embeddings(len(tokenizer)) and save both again",
        )


def give_pad_token(tokenizer: Any) -> None:
    """Pad with the end-of-text token where the tokenizer has no padding token."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
