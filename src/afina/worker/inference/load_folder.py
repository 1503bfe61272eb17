"""Load a model folder for use: the tokenizer, and the model with all of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from afina.errors import InputError, first_line
from afina.worker.model.adapters import labels_config, load_merged
from afina.worker.model.padding import set_pad_token
from afina.worker.model.tokenizer import check_pad_token, give_pad_token, vocabulary_size
from afina.worker.model.weights import check_shapes
from afina.worker.startup import gc_paused
from afina.worker.task.tasks import class_of_config

__all__ = ["load_folder"]


def load_folder(folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> tuple[Any, Any]:
    """Tokenizer and model of a folder, in evaluation mode; an adapter is merged.

    Raises:
        InputError: weights are missing or of another shape, or transformers refuses it.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with gc_paused():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            if labels_config(folder) != folder:
                # Merged in float32: an adapter that is rounded first loses its last digits.
                model = load_merged(folder, trust_remote_code).to(dtype)
            else:
                model = _load_plain(folder, dtype, trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # whatever a broken file or foreign code makes it raise
        reason = first_line(error)
        raise InputError(
            f"model: transformers {transformers.__version__} cannot load {folder}: {reason}",
            "give a run directory of afina, or a folder with a sequence classifier and its tokenizer",
        ) from None
    give_pad_token(tokenizer)
    check_pad_token(tokenizer, vocabulary_size(folder))
    set_pad_token(model, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
    return tokenizer, model.to(device).eval()


def _load_plain(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    model, report = class_of_config(config).from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, with their names
    )
    check_shapes(folder, report["mismatched_keys"])
    if missing := sorted(report["missing_keys"]):
        below = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
        why = "its files are incomplete" if below else "it was not trained to classify"
        raise InputError(
            f"model: {folder} has no weights for {', '.join((below or missing)[:3])}: {why}",
            "save it again with save_pretrained, or download it again"
            if below
            else "train it first (`afina train RECIPE`), and give the run directory",
        )
    return model
