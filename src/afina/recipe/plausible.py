"""Values of a recipe that are allowed and hardly meant: a warning for each, with the usual range.

Not covered: what depends on the data or the model; the prepare stage warns about that, or refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from afina.recipe.keys.section import shown

if TYPE_CHECKING:
    from afina.recipe.schema import Recipe

__all__ = ["implausible"]

#: Key, least and largest usual value, what is usual.
_USUAL = (
    ("train.learning_rate", 1e-7, 1e-2, "fine-tuning usually takes 1e-6 to 1e-3"),
    ("train.batch_size", 1, 16_384, "fine-tuning usually takes 8 to 512 examples per step"),
    ("train.epochs", 0, 100, "fine-tuning usually takes 1 to 20 epochs"),
    ("train.max_steps", 1, 10**7, "fine-tuning usually takes up to some 100,000 steps"),
    ("train.save_minutes", 0.1, 24 * 60, "a killed job repeats what was done since its last checkpoint"),
    ("train.keep_checkpoints", 1, 100, "each is as large as three times the model"),
    ("train.label_smoothing", 0, 0.5, "it is usually 0.1 or less"),
    ("train.arguments.weight_decay", 0, 1, "it is usually 0 to 0.1"),
    ("train.arguments.max_grad_norm", 1e-3, 1000, "it is usually 1"),
    ("tokens.max_length", 8, 131_072, "a text usually has more tokens than that"),
    ("data.eval.fraction", 0, 0.5, "the larger part is usually trained on"),
    ("data.test.fraction", 0, 0.5, "the larger part is usually trained on"),
    ("resources.nodes", 1, 256, "a classifier is usually fine-tuned on 1 to 8 nodes"),
    ("resources.gpus_per_node", 0, 16, "a node usually has 1 to 8 GPUs"),
    ("resources.cpus_per_gpu", 1, 256, "a GPU is usually fed by 4 to 16 cores"),
    ("resources.mem_gb", 1, 4096, "a node usually has less memory"),
)


def implausible(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key and problem of each value that is hardly meant."""
    for key, least, largest, usual in _USUAL:
        value = _value(recipe, key)
        if isinstance(value, int | float) and not least <= value <= largest:
            yield key, f"{shown(value)} is hardly meant: {usual}"
    train = recipe.train
    warmup, steps = train.arguments.get("warmup_steps"), train.max_steps
    if steps is not None and isinstance(warmup, int | float) and warmup >= steps:
        yield (
            "train.arguments.warmup_steps",
            f"{shown(warmup)} steps of {steps}: the learning rate never reaches its value",
        )
    for name in recipe.data.unused_files:
        other = f"`data.{name}: {{}}`" if name == "test" else "a part with `split`"
        yield f"data.files.{name}", f"no row of it is read: {other} would"


def _value(recipe: Recipe, key: str) -> object:
    value: object = recipe
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return None if isinstance(value, bool) else value
