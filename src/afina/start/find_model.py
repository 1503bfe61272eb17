"""Facts about the pretrained model for `afina init`: parameters, positions, tokens per word."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from afina.errors import InputError
from afina.files import nearest_path
from afina.recipe.local_model import adapter_base, check_no_adapter, num_parameters
from afina.recipe.positions import longest_input
from afina.start.examine import count_words

__all__ = ["ModelFacts", "find_model"]

_BASE_PARAMETERS = 110_000_000
_BASE_POSITIONS = 512
_MOST_POSITIONS = 8192


@dataclass(frozen=True)
class ModelFacts:
    """A model: its Hub id or absolute folder, and what is known of it.

    Attributes:
        known: read from a folder, not guessed from the name.
        adapter: the folder holds an adapter that afina trained; the other facts are those of its base.
        tokens_per_word: measured with its tokenizer; a punctuation mark counts as a word.
    """

    id: str
    parameters: int = _BASE_PARAMETERS
    positions: int = _BASE_POSITIONS
    known: bool = False
    tokens_per_word: float | None = None
    adapter: bool = False


def find_model(model: str, sample: Sequence[str]) -> ModelFacts:
    """Facts from a model folder; of a Hub id a guess from its name.

    Args:
        sample: texts to count tokens in, where the package `tokenizers` is installed.

    Raises:
        InputError: the folder is missing, or cannot be read.
    """
    folder = Path(os.path.expandvars(model)).expanduser()
    base = adapter_base(folder)
    if base is not None:
        return replace(find_model(base[0], sample), id=str(folder.absolute()), adapter=True)
    check_no_adapter(str(folder), [entry.name for entry in folder.glob("*")])
    if not folder.exists() and (model.startswith((".", "/", "~", "$")) or model.count("/") > 1):
        remedy = nearest_path(folder) or "give a model folder, or a Hub id (owner/name)"
        raise InputError(f"--model {model}: no such folder", remedy)
    if not (folder / "config.json").is_file():
        small, large = re.search("mini|small|tiny", model.lower()), "large" in model.lower()
        return ModelFacts(model, parameters=335_000_000 if large else 33_000_000 if small else _BASE_PARAMETERS)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parameters = num_parameters(folder) or _BASE_PARAMETERS
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--model {model}: cannot be read: {error}", "give a whole model folder, or a Hub id"
        ) from None
    limit = config.get("max_position_embeddings") if config.get("position_biased_input") is not False else None
    positions = longest_input(str(config.get("model_type")), limit, config.get("pad_token_id"))
    return ModelFacts(
        str(folder.absolute()),
        parameters=parameters,
        positions=min(_MOST_POSITIONS, positions) if positions is not None and positions > 0 else _BASE_POSITIONS,
        known=True,
        tokens_per_word=_tokens_per_word(folder / "tokenizer.json", sample),
    )


def _tokens_per_word(tokenizer: Path, sample: Sequence[str]) -> float | None:
    if not sample or not tokenizer.is_file() or importlib.util.find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception:  # the package raises no type of its own
        return None
    loaded.no_truncation()
    loaded.no_padding()
    tokens = sum(len(e.ids) for e in loaded.encode_batch(list(sample), add_special_tokens=False))
    return tokens / max(1, sum(map(count_words, sample)))
