"""The tokenizer of a pretrained model: its files and their identity, its padding token, its numbers against the embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import InputError, first_line
from afina.files import read_json, sha256
from afina.recipe.schema import Recipe
from afina.worker.model.adapters import labels_config
from afina.worker.startup import gc_paused

__all__ = [
    "READ_CODE",
    "TOKENIZER_FILES",
    "check_pad_token",
    "check_tokens",
    "give_pad_token",
    "load_tokenizer",
    "tokenizer_identity",
    "vocabulary_size",
    "works_without_files",
]

READ_CODE = (
    "read that code, then set `trust_remote_code: true`, and for a model from the Hub `revision:` to its full commit"
)
#: Tokenizer files; a folder needs at least one, unless its tokenizer works without.
TOKENIZER_FILES = (
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


def works_without_files(folder: Path, config: Mapping[str, Any]) -> bool:
    settings = read_json(folder / "tokenizer_config.json")
    kinds = {config.get("model_type"), config.get("tokenizer_class"), settings.get("tokenizer_class")}
    return bool(kinds & _WITHOUT_FILES) or "auto_map" in settings


def tokenizer_identity(folder: Path) -> str:
    """SHA-256 of everything in `folder` that affects tokenisation."""
    digest = hashlib.sha256()
    config = json.loads((labels_config(folder) / "config.json").read_text(encoding="utf-8"))
    kept = {key: config.get(key) for key in ("model_type", "tokenizer_class", "auto_map")}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    code = [p.name for p in folder.glob("*.py")]
    for name in sorted({*TOKENIZER_FILES, *_TOKENIZER_SETTINGS, *code}):
        path = folder / name
        if path.is_file():
            digest.update(f"{name}\0{sha256(path)}\0".encode())
    return digest.hexdigest()


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
                f"model: the tokenizer of {recipe.model} needs Python code from its own repository", READ_CODE
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
