"""The pretrained model with a head for the recipe's labels, with the recipe's adapter or frozen layers, in float32.

The base may be a classifier already. Its head is kept where its label names are those of the recipe, each row under its own name,
in whatever order either lists them; where names differ, the rows mean something else and the head is new. `LABEL_0`, `LABEL_1`, … are
Transformers' placeholders, not names: such a head is kept only for labels that are numbers too (0, 1, … in that order).

Not covered: the quality of the weights, see `afina.worker.model.weights` for missing ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from afina.errors import InputError
from afina.recipe.schema import Recipe
from afina.text import plural
from afina.worker.model.adapters import add_adapter, labels_config, load_adapter, weights_folder
from afina.worker.model.depth import freeze
from afina.worker.model.weights import is_token_classifier
from afina.worker.task.tasks import TASKS, auto_class

__all__ = ["base_labels", "build_model", "placeholders"]


def build_model(
    recipe: Recipe,
    folder: str | Path,
    task: str,
    labels: Sequence[str] | None,
    num_labels: int,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Any, str]:
    """The model, with the label names in its config; and what became of head, adapter and frozen layers, for the log.

    Args:
        labels: names in the order of the outputs; None for regression.
        changes: to the model's configuration; with `device_map: meta` it is built without memory.

    Raises:
        InputError: a stored weight is not finite.
        RecipeError: the model has no layers of the adapter's targets; more layers are to be frozen than there are.
    """
    names = list(labels or placeholders(num_labels))
    folder = Path(folder)
    weights = weights_folder(folder)
    base = AutoConfig.from_pretrained(str(labels_config(folder)), trust_remote_code=recipe.trust_remote_code)
    model, report = auto_class(task).from_pretrained(
        str(weights),
        num_labels=num_labels,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=TASKS[task].problem_type,
        dtype=torch.float32,  # the default takes the checkpoint's dtype: a bf16 one would train in pure bf16
        ignore_mismatched_sizes=True,  # a head for another number of labels is replaced
        trust_remote_code=recipe.trust_remote_code,
        output_loading_info=True,
        **(changes or {}),
    )
    for name, weight in model.named_parameters():
        if not weight.is_meta and not torch.isfinite(weight.detach().sum()):
            raise InputError(
                f"model: {name} of {recipe.model} holds NaN or infinity: its first loss would not be finite either",
                "take the model from before it broke, or download it again",
            )
    # The output of a regression has no name.
    base_names = base_labels(base) if labels else placeholders(base.num_labels)
    fitting = (base_names, names, recipe.trust_remote_code)
    if recipe.adapter is None:
        head = _fit_head(model, report, *fitting)
        if recipe.train.freeze is None:
            return model, head
        return model, f"{head}; {freeze(model, recipe.train, report['missing_keys'])}"
    if weights == folder:
        head = _fit_head(model, report, *fitting)
        return model, f"{head}; {add_adapter(model, recipe.adapter, report['missing_keys'])}"
    adapter = add_adapter(model, recipe.adapter, report["missing_keys"])
    changed = load_adapter(model, folder, head=base.num_labels == num_labels)
    head = _fit_head(model, {"missing_keys": [], "mismatched_keys": [(name,) for name in changed]}, *fitting)
    return model, f"{head}; trained on from {folder}: {adapter}"


def base_labels(config: Any) -> list[str]:
    """The label names of a model's outputs, in their order."""
    named = config.id2label or {}
    return [str(named.get(i, f"LABEL_{i}")).strip() for i in range(config.num_labels)]


def placeholders(count: int) -> list[str]:
    """The names that Transformers gives labels without a name."""
    return [f"LABEL_{i}" for i in range(count)]


def _fit_head(model: Any, report: Mapping[str, Any], base_names: list[str], names: list[str], trusted: bool) -> str:
    """Reorder or replace the rows of the head by label name; returns what was done."""
    changed = [entry[0] for entry in report["mismatched_keys"]]
    prefix = f"{model.base_model_prefix}."
    if any(not name.startswith(prefix) for name in changed):
        return f"head: new, for {plural(len(names), 'label')} (the model's was for {len(base_names)})"
    if any(not name.startswith(prefix) for name in report["missing_keys"]):
        return "head: new (the model comes without one)"
    if base_names == names or (
        base_names == placeholders(len(base_names)) and names == [str(i) for i in range(len(names))]
    ):
        return "head: the model's own"
    if sorted(base_names) == sorted(names) and len(set(base_names)) == len(base_names):
        order = [base_names.index(name) for name in names]
        for module, name in _outputs(model, trusted):
            weight = getattr(module, name)
            weight.data = weight.data[order].clone()
        return f"head: the model's own, its rows in the recipe's order of labels ({_listed(names)}; it had {_listed(base_names)})"
    for module, name in _outputs(model, trusted):
        old = getattr(module, name)
        setattr(module, name, torch.nn.Parameter(torch.zeros_like(old), requires_grad=old.requires_grad))
        module._is_hf_initialized = False
        if name == "weight":
            model._init_weights(module)
    unnamed = base_names == placeholders(len(base_names))
    why = (
        "its labels have no names"
        if unnamed
        else f"its labels are {_listed(base_names)}, the recipe's {_listed(names)}"
    )
    return f"head: new; the model's own is not used: {why}"


def _outputs(model: Any, trusted: bool) -> list[tuple[Any, str]]:
    """The parameters with a row for each label, as module and attribute, weights first: those that grow with the labels."""
    config = type(model.config).from_dict({**model.config.to_dict(), "num_labels": model.config.num_labels + 1})
    kind = "token-classification" if is_token_classifier(model) else "auto"
    with torch.device("meta"):
        larger = auto_class(kind).from_config(config, trust_remote_code=trusted)
    shapes = {name: weight.shape for name, weight in larger.named_parameters()}
    changed = [name for name, weight in model.named_parameters() if weight.shape != shapes.get(name, weight.shape)]
    parts = [name.rpartition(".") for name in sorted(changed, key=lambda name: name.endswith("bias"))]
    return [(model.get_submodule(path), name) for path, _, name in parts]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
