"""The prepare stage with a check of the model: `python -m afina.worker prepare`, see `afina.worker.data.prepare`.

A few rows of the user's data go through the model twice, in float32 and without dropout: each alone through plain Transformers,
and together as a run batches them (packed, grouped or padded). The logits must agree, and those of a classifier whose labels are
the recipe's must be what it gives for the same label. What differs here would train on, or predict, something else without a
word. One line says the result; it is kept under `<scratch>/pins/` and holds for the same model, batching and kind of rows.

Not covered: GPUs, half precision, and models whose float32 weights do not fit into the free memory (the line says so).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from afina.errors import AfinaError, InputError, first_line, is_out_of_memory
from afina.files import read_json
from afina.recipe.schema import Recipe
from afina.run.plan import Plan
from afina.text import plural, size_in_words
from afina.worker.compute.cpu import free_memory
from afina.worker.data import prepare
from afina.worker.data.prepared import Split, digest_of, load_manifest, open_split
from afina.worker.inference.row_check import (
    REMEDY,
    choose_rows,
    count_special,
    logits_alone,
    logits_of_batch,
    require_equal,
)
from afina.worker.model.adapters import labels_config, load_merged
from afina.worker.model.check_cache import checked_once
from afina.worker.model.tokenizer import check_tokens
from afina.worker.model.weights import input_embeddings
from afina.worker.startup import NOT_NEEDED, gc_paused, hide_packages

__all__ = ["answer", "check_model_on_rows"]

#: For code that is not of Transformers, whose padding only its tokenizer tells.
_OTHER_SIDE = (
    'its code may read the last token: set "padding_side" in its tokenizer_config.json to the other side (left or right), and '
    "prefetch again; see docs/models.md"
)

Array = np.ndarray[Any, Any]


def answer(arguments: list[str]) -> dict[str, Any]:
    """As `afina.worker.data.prepare.answer`; raises InputError for a model that does not agree too."""
    return prepare.answer(arguments, check_model_on_rows)


def check_model_on_rows(plan: Plan, result: Mapping[str, Any], say: Callable[[str], None]) -> list[str]:
    """Print the line of the check, made now or before.

    Raises:
        InputError: the logits differ, or the model refuses the rows; with rows and reason.
    """
    folder = Path(result["prepared"])
    manifest = load_manifest(folder)
    split = open_split(folder, "train").sequences  # windows are pooled after the model
    special = _special_tokens(folder)
    about = [
        digest_of(result["model_files"]),
        plan.recipe.tokens.batching,
        [plan.recipe.train.compile, plan.recipe.train.precision],
        [plan.recipe.train.arguments.get(name) for name in ("torch_compile", "neftune_noise_alpha", "bf16", "fp16")],
        plan.recipe.trust_remote_code,
        *([plan.recipe.adapter.model_dump(mode="json")] if plan.recipe.adapter else []),
        [manifest[key] for key in ("task", "labels", "num_labels", "pad_token_id")],
        _kind_of_rows(split, special),
    ]

    def compare() -> list[str]:
        with hide_packages(*NOT_NEEDED), gc_paused():
            return [_compare(plan, result, manifest, split, special)]

    try:
        lines = checked_once(plan.site.scratch / "pins", ["rows", *about], compare)
    except _NoMemory as error:  # not recorded: the next prefetch, perhaps on a larger machine, tries again
        lines = [f"model check: left out: {error}; a job's first steps try it: `afina submit --rehearse`"]
    for line in lines:
        say(line)
    return []


class _NoMemory(Exception):
    """This machine has not the memory that the check takes."""


# -- rows -------------------------------------------------------------------------------------------------------------


def _special_tokens(folder: Path) -> list[int]:
    """Numbers of the tokenizer's special tokens, which texts may hold too; from its files, because importing it takes seconds."""
    added = read_json(folder / "tokenizer/tokenizer.json").get("added_tokens") or []
    decoder = read_json(folder / "tokenizer/tokenizer_config.json").get("added_tokens_decoder") or {}
    listed = [*added, *({"id": int(number), **token} for number, token in decoder.items())]
    return sorted({token["id"] for token in listed if token.get("special")})


def _kind_of_rows(split: Split, special: list[int]) -> list[Any]:
    """Properties of rows that may matter to a model: the power of two above the longest, special tokens in texts, token types."""
    counts = count_special(split, special)
    varying = [token for token, column in zip(special, counts.T, strict=True) if column.min() < column.max()]
    return [1 << int(split.lengths.max() - 1).bit_length(), varying, split.types is not None]


# -- the comparison ---------------------------------------------------------------------------------------------------


def _compare(
    plan: Plan, result: Mapping[str, Any], manifest: Mapping[str, Any], split: Split, special: list[int]
) -> str:
    """The line; see `check_model_on_rows`."""
    import torch

    began = time.monotonic()
    needed = 2 * sum(
        record["size"] for name, record in result["model_files"].items() if name.endswith((".safetensors", ".bin"))
    )
    free = free_memory()
    if needed > free:
        raise _NoMemory(f"it may take {size_in_words(needed)} of memory, {size_in_words(free)} are free here")
    recipe, folder = plan.recipe, result["model_folder"]
    model, head = _load(recipe, folder, manifest)
    try:
        with torch.inference_mode():
            model.eval()
            rows = choose_rows(split, special, model.num_parameters())
            _check_embeddings(model, split, manifest["pad_token_id"])
            alone = logits_alone(model, split, rows)
            by_name = _of_the_base(recipe, folder, manifest["labels"], head, split, rows[-1:])
            way, together = _as_in_a_run(model, plan, manifest, split, rows)
            _check_half_precision(model, recipe, split, rows[-1:])
    except AfinaError:
        raise
    except Exception as error:  # whatever a model's code raises
        raise _refusal(
            error,
            f"model: {recipe.model} refuses a batch of rows of train: {type(error).__name__}: {first_line(error)}",
            "check that config.json, weights and tokenizer are those of one model, and that the tokenizer adds the special "
            "tokens that it needs",
        ) from None
    largest = float(np.abs(together - alone).max())
    own_code = not type(model).__module__.startswith("transformers.")
    what = f"{plural(len(rows), 'row')} of train, {way}, have other logits than each alone in transformers"
    require_equal(largest, alone, what, _OTHER_SIDE if own_code else REMEDY)
    if by_name is not None:
        require_equal(
            float(np.abs(by_name - alone[-len(by_name) :]).max()),
            alone,
            "the head's rows are not those of the labels' names",
        )
    seconds = time.monotonic() - began
    return (
        f"model check: {plural(len(rows), 'row')} {way} and each alone in transformers: largest difference of a logit {largest:.1e} "
        f"({seconds:.1f} s); {head}"
    )


def _load(recipe: Recipe, folder: str, manifest: Mapping[str, Any]) -> tuple[Any, str]:
    """The model as a run builds it, and the sentence about its head."""
    import torch
    import transformers

    from afina.worker.model.head import build_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            return build_model(recipe, folder, manifest["task"], manifest["labels"], manifest["num_labels"])
    except AfinaError:
        raise
    except Exception as error:  # whatever a broken file or a model's code raises
        raise _refusal(
            error,
            f"model: transformers {transformers.__version__} cannot load {folder}: {first_line(error)}",
            "download the model again, or save it with `save_pretrained`",
        ) from None


def _refusal(error: Exception, message: str, remedy: str) -> Exception:
    """The refusal of a model by what it raised; of an error of memory, which says nothing about the model, that of the check."""
    return _NoMemory(first_line(error)) if is_out_of_memory(error) else InputError(message, remedy)


def _check_embeddings(model: Any, split: Split, pad: int) -> None:
    embeddings = input_embeddings(model)
    if embeddings is None:
        return
    size = getattr(embeddings, "num_embeddings", None)
    check_tokens(max(pad, int(np.asarray(split.tokens).max())), size)


def _as_in_a_run(
    model: Any, plan: Plan, manifest: Mapping[str, Any], split: Split, rows: list[int]
) -> tuple[str, Array]:
    """The logits of the rows in one batch, as `afina.worker.training.build` makes it on a CPU; and how it was made."""
    import torch
    from transformers import TrainingArguments

    from afina.worker.compute import packed_model
    from afina.worker.model.padding import set_pad_token

    train = plan.recipe.train
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    settings = {"torch_compile": train.compile, **train.arguments, "device": torch.device("cpu")}
    # Not the class itself: it would set up accelerate's state in this process.
    arguments: Any = SimpleNamespace(**{**defaults, **settings})
    batching, notes = packed_model.configure(model, plan.recipe, arguments)
    set_pad_token(model, manifest["pad_token_id"])
    collate = packed_model.collator(
        model,
        split,
        batching,
        manifest["pad_token_id"],
        tokenizer_side=manifest.get("padding_side", "right"),
        max_length=plan.recipe.tokens.max_length,
    )
    inputs = collate(rows)
    inputs.pop("labels")
    way = {"packed": "packed", "padded": "padded"}.get(batching, "padded to the longest")
    if any("run apart" in note for note in notes):
        way = "of equal length together"
    return way, logits_of_batch(model, inputs)


def _check_half_precision(model: Any, recipe: Recipe, split: Split, rows: list[int]) -> None:
    """Refuse half precision where the model's code fails in it: the job's device chooses it, which may be after hours in a queue."""
    import torch

    from afina.worker.compute.precision import FLOAT32_ONLY

    train = recipe.train
    half = {name for name in ("bf16", "fp16") if train.arguments.get(name) or train.precision == name}
    by_device = train.precision == "auto" and model.config.model_type not in FLOAT32_ONLY
    if not half and not by_device:
        return
    kind = torch.float16 if "fp16" in half else torch.bfloat16
    try:
        with torch.autocast("cpu", kind):
            logits_alone(model, split, rows)
    except Exception as error:  # whatever a model's code raises
        raise _refusal(
            error,
            f"train.precision: {recipe.model} fails in {'fp16' if kind == torch.float16 else 'bf16'}: {first_line(error)}",
            "set train.precision: fp32, and leave bf16 and fp16 out of train.arguments",
        ) from None


def _of_the_base(
    recipe: Recipe, folder: str, labels: list[str] | None, head: str, split: Split, rows: list[int]
) -> Array | None:
    """The base's own predictions for `rows`, in the recipe's order of labels; None where it does not know these labels."""
    import torch
    from transformers import AutoConfig

    from afina.worker.model.head import base_labels, placeholders
    from afina.worker.task.tasks import auto_class

    own, trusted = labels_config(Path(folder)), recipe.trust_remote_code
    base_names = base_labels(AutoConfig.from_pretrained(str(own), trust_remote_code=trusted))
    if labels is None or head.startswith("head: new") or base_names == placeholders(len(base_names)):
        return None
    if set(base_names) != set(labels):
        raise InputError(f"model: its head is for the labels {', '.join(base_names)}, not for the recipe's", REMEDY)
    base = (
        auto_class(recipe.task).from_pretrained(folder, dtype=torch.float32, trust_remote_code=trusted)
        if own == Path(folder)
        else load_merged(Path(folder), trusted)
    )
    return logits_alone(base.eval(), split, rows)[:, [base_names.index(name) for name in labels]]
