"""Is this model folder one that the recipe can train? Files, weights, tokenizer, head, positions, arguments.

What needs transformers (seconds to import) is checked once: a pass is recorded under `<scratch>/pins/` and holds as long
as the model's files, the recipe's arguments and the installed version stay the same.

Not covered: whether the weights are any good, and what only a GPU can tell (`bf16`, `tf32`, `torch_compile`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from afina.errors import InputError, RecipeError, nearest
from afina.recipe import Recipe
from afina.rundir import write_atomic

__all__ = ["check_arguments", "check_files", "check_model", "load_tokenizer", "tokenizer_identity"]

#: Files of which at least one makes a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "spm.model",
)
#: Files beside them that change what a tokenizer does.
_TOKENIZER_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
)

#: Position tables of these models begin at pad_token_id + 1.
_SHIFTED_POSITIONS = {
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}

#: Names that TrainingArguments once had, and what to write instead.
_GONE = {
    "warmup_ratio": "use `warmup_steps`: a value below 1 is a share of all steps",
    "group_by_length": "set `tokens.batching: grouped`",
    "overwrite_output_dir": "leave it out: nothing that exists is overwritten; give `--run DIR`",
    "logging_dir": "leave it out: metrics are in `metrics.jsonl`",
    "save_safetensors": "leave it out: models are always saved as safetensors",
    "evaluation_strategy": "set `train.evaluate`",
    "no_cuda": "leave it out: the device follows from the allocation",
    "tokenizer": "leave it out: the tokenizer comes with the model",
    "split_batches": "leave it out: afina shards the batches itself",
    "dispatch_batches": "leave it out: afina shards the batches itself",
    "per_gpu_train_batch_size": "set `train.batch_size`, the global batch",
    "per_gpu_eval_batch_size": "set `train.eval_batch_size`",
    "adafactor": "use `optim: adafactor`",
    "fp16_opt_level": "leave it out: `fp16: true` is enough",
    "fp16_backend": "leave it out: `fp16: true` is enough",
    "half_precision_backend": "leave it out: `fp16: true` or `bf16: true` is enough",
    "use_mps_device": "leave it out: the device follows from the allocation",
    "batch_size": "set `train.batch_size`, the global batch",
    "epochs": "set `train.epochs`",
    "dropout": "it belongs to the model's config, not to the training arguments",
}
#: Whether these work is for the compute node to say, not for the node that prepares; only their type is checked.
_HARDWARE = {"bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "torch_compile", "torch_compile_backend",
             "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"}  # fmt: skip


def check_files(
    folder: Path, remedy: str = "download the model again, or save it with `save_pretrained`"
) -> dict[str, Any]:
    """Cheap checks of a model folder: config, tokenizer files, and that the weights are whole. Returns config.json.

    Raises:
        InputError: names the file.
    """
    config = _read_config(folder, remedy)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            f"model: {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES[:3])}, …)",
            "save the tokenizer into the same folder: tokenizer.save_pretrained(FOLDER)",
        )
    for path in _weights(folder, remedy):
        _check_weights(path, remedy)
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


def _check_weights(path: Path, remedy: str) -> None:
    if path.suffix != ".safetensors":
        if not path.stat().st_size:
            raise InputError(f"model: {path} is empty", remedy)
        return
    from safetensors import SafetensorError, safe_open

    try:
        # The header states where each tensor ends: a truncated file is refused here.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"model: {path} ({path.stat().st_size:,} bytes) is not a whole safetensors file: {error}", remedy
        ) from None


def tokenizer_identity(folder: Path) -> str:
    """SHA-256 of everything in `folder` that decides how text becomes tokens."""
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: config.get(key) for key in ("model_type", "tokenizer_class", "auto_map")}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    code = [p.name for p in folder.glob("*.py")]
    for name in sorted({*_TOKENIZER_FILES, *_TOKENIZER_SETTINGS, *code}):
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def check_model(folder: Path, recipe: Recipe, pins: Path) -> None:
    """Whether transformers can train this folder.

    Raises:
        InputError: no sequence classification for this architecture, a config that transformers refuses.
        RecipeError: `tokens.max_length` beyond the model's positions.
    """
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    about = ["model", recipe.model, config, recipe.trust_remote_code, recipe.tokens.max_length]

    def check() -> list[str]:
        _check_architecture(folder, recipe)
        return []

    _recorded(pins, about, check)


def check_arguments(arguments: Mapping[str, Any], pins: Path) -> list[str]:
    """Try `train.arguments` on the installed TrainingArguments; returns its warnings.

    Raises:
        RecipeError: an unknown name (with what replaces it), a value of the wrong type or that is refused.
    """
    return _recorded(pins, ["arguments", dict(arguments)], lambda: _try_arguments(arguments))


def _recorded(pins: Path, about: list[Any], check: Callable[[], list[str]]) -> list[str]:
    """Run `check` unless it passed before with the same versions; returns its warnings."""
    versions = [importlib.metadata.version(name) for name in ("transformers", "torch")]
    key = json.dumps([*versions, *about], sort_keys=True)
    record = pins / f"checked-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        return [str(w) for w in json.loads(record.read_text(encoding="utf-8"))["warnings"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    said = check()
    pins.mkdir(exist_ok=True)
    write_atomic(record, json.dumps({"warnings": said, "about": [*versions, *about]}, indent=1) + "\n")
    return said


def _check_architecture(folder: Path, recipe: Recipe) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as HEADS

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own_code = raw.get("auto_map") or {}
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=recipe.trust_remote_code)
    except Exception as error:
        if own_code and not recipe.trust_remote_code:
            raise InputError(
                f"model: {recipe.model} needs Python code from its own repository",
                "read that code, then set `trust_remote_code: true` and pin it with `revision: <commit>`",
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model: transformers {transformers.__version__} refuses {folder / 'config.json'}: {reason}",
            "use a model of a type that this version knows, or another version of transformers",
        ) from None
    if config.model_type not in HEADS and "AutoModelForSequenceClassification" not in own_code:
        raise InputError(
            f"model: transformers has no sequence classification for architecture `{config.model_type}`",
            "use a text encoder or a causal language model: bert, roberta, deberta-v2, modernbert, llama, …",
        )
    limit = _positions(config)
    if limit is not None and recipe.tokens.max_length > limit:
        raise RecipeError(
            f"tokens.max_length: {recipe.tokens.max_length} is more than the {limit} positions of {recipe.model}",
            f"set tokens.max_length to {limit} or less",
        )


def _positions(config: Any) -> int | None:
    """Longest input in tokens; None where positions are relative or not stated."""
    if getattr(config, "position_biased_input", True) is False:
        return None
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.model_type in _SHIFTED_POSITIONS:
        limit -= (config.pad_token_id if config.pad_token_id is not None else 1) + 1
    return limit


def _try_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Leaves no folder behind and forms no process group."""
    import dataclasses

    import transformers
    from transformers import TrainingArguments

    installed = f"transformers {transformers.__version__}"
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments)
    for name, value in arguments.items():
        if name not in known:
            raise RecipeError(
                f"train.arguments.{name}: TrainingArguments of {installed} has no such argument",
                _GONE.get(name) or nearest(name, known) or "see the documentation of transformers.TrainingArguments",
            )
        if not _fits(value, hints[name]):
            wanted = " or ".join(t.__name__ for t in _plain_types(hints[name]))
            raise RecipeError(
                f"train.arguments.{name}: {value!r} is {_a(type(value).__name__)}, {wanted} is wanted",
                "correct the value",
            )
    tried = {name: value for name, value in arguments.items() if name not in _HARDWARE}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # `output_dir` is not created before training begins.
            TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **tried)
        except (ValueError, TypeError, ImportError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            named = next((n for n in tried if n in reason), None) or next(
                (n for n, v in tried.items() if isinstance(v, str) and v in reason), None
            )
            raise RecipeError(
                f"train.arguments{f'.{named}' if named else ''}: {installed} refuses: {reason}", "correct the value"
            ) from None
    return [f"train.arguments: {w.message}" for w in caught if issubclass(w.category, FutureWarning)]


def _a(name: str) -> str:
    return {
        "str": "a text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "NoneType": "empty",
    }.get(name, f"a {name}")


def _plain_types(hint: Any) -> tuple[type, ...]:
    """The types that a hint allows; empty if it allows more than plain values (enums, parsers of text, …)."""
    members = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    plain = (int, float, bool, str, type(None))
    return tuple(members) if all(m in plain for m in members) else ()


def _fits(value: Any, hint: Any) -> bool:
    allowed = _plain_types(hint)
    if not allowed:
        return True
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int) and float in allowed:
        return True
    return isinstance(value, allowed)


def load_tokenizer(folder: Path, recipe: Recipe) -> Any:
    """The folder's tokenizer, with a padding token.

    Raises:
        InputError: transformers cannot load it.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=recipe.trust_remote_code)
    except Exception as error:  # whatever a broken file or foreign code makes it raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model: the tokenizer in {folder} cannot be loaded: {reason}",
            "save it again with tokenizer.save_pretrained(FOLDER)",
        ) from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
