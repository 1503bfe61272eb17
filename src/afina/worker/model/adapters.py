"""LoRA adapters through peft: put beside the layers of a model, saved and loaded as a peft folder, merged into the weights.

The layers are injected in place, so that the model stays one of Transformers' own classes, with its configuration, its hooks and its
packing. Trained are the adapter, the head, and every module whose weights the base does not have (a pooler of a masked language model).

    adapter_config.json  adapter_model.safetensors    as peft writes them; `modules_to_save` names head and new modules
    classifier/config.json                            the whole configuration: label names in the order of the outputs. Not in the folder
                                                      itself: Transformers would then look for the base's weights there too
    classifier/base.json                              size and SHA-256 of the base's files

This module alone imports peft, inside its functions: it takes a second. torch too, because the checks of files need none. Not covered: adapters of other kinds, and trained embeddings.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.errors import InputError, RecipeError, nearest
from afina.files import difference, read_json, write_atomic
from afina.recipe.keys.adapter_keys import Adapter
from afina.recipe.local_model import ADAPTER_LABELS, adapter_base
from afina.text import plural
from afina.worker.model.weights import is_token_classifier, model_class
from afina.worker.startup import import_peft

if TYPE_CHECKING:
    import torch

__all__ = [
    "WEIGHTS",
    "add_adapter",
    "checkpoint_weights",
    "find_base",
    "has_adapter",
    "labels_config",
    "load_adapter",
    "load_merged",
    "parameter_counts",
    "save_adapter",
    "save_labels",
    "save_weights",
    "weights_folder",
    "set_base",
    "trained_share",
    "choose_layers",
]

WEIGHTS = "adapter_model.safetensors"
_BASE = "base.json"
_NAME = "default"
#: Architectures that peft's own table leaves out: queries and values, as it has them for their relatives.
_ATTENTION = {
    "camembert": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
}


def has_adapter(model: Any) -> bool:
    """True if `add_adapter` was called on this model."""
    return _NAME in getattr(model, "peft_config", {})


def add_adapter(model: Any, adapter: Adapter, new: Collection[str] = ()) -> str:
    """Freeze `model`, put an adapter into it, and let adapter, head and new modules be trained; returns a line for the log.

    Args:
        new: names of weights that the base does not have.

    Raises:
        RecipeError: a target names no linear layer; with those that exist.
        InputError: the head is not made of modules.
    """
    peft = import_peft()

    whole = _trained_whole(model, new)
    layers, targets, note = choose_layers(model, adapter, whole)
    from transformers.pytorch_utils import Conv1D

    config = peft.LoraConfig(
        task_type="TOKEN_CLS" if is_token_classifier(model) else "SEQ_CLS",
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in layers),
    )
    _inject(model, config, whole)
    ends = sorted({name.rpartition(".")[2] for name in layers})
    return (
        f"adapter: {adapter.variant}, rank {adapter.rank}, alpha {adapter.alpha:g}, on {plural(len(layers), 'layer')} ({', '.join(ends)}{note}); trained whole: "
        f"{', '.join(whole)}; {trained_share(model)}"
    )


def choose_layers(model: Any, adapter: Adapter, whole: Collection[str] = ()) -> tuple[list[str], list[str], str]:
    """The linear layers that get an adapter, by path; the same as peft's `target_modules`; and a note on the choice.

    Args:
        whole: modules that are trained whole.

    Raises:
        RecipeError: a target names no linear layer.
    """
    import_peft()
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    below = f"{model.base_model_prefix}."
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith(below)
        and isinstance(module, (nn.Linear, Conv1D))
        and not any(name == one or name.startswith(f"{one}.") for one in whole)
    ]
    kind, note = model.config.model_type, ""
    named = adapter.targets
    if named == "auto":
        named = _ATTENTION.get(kind) or OF_PEFT.get(kind, "all-linear")
        note = f"; all linear layers, because peft has no choice of its own for {kind}" if named == "all-linear" else ""
    if named == "all-linear":
        chosen = linear
    elif isinstance(named, str):  # a pattern of peft's
        chosen = [name for name in linear if re.fullmatch(named, name)]
    else:
        for target in named:
            if not any(_ends_with(name, target) for name in linear):
                ends = sorted({name.rpartition(".")[2] for name in linear})
                raise RecipeError(
                    f"adapter.targets: the model has no linear layer `{target}`",
                    f"{nearest(target, ends) or ''} its linear layers: {', '.join(ends)}".strip(),
                )
        chosen = [name for name in linear if any(_ends_with(name, target) for target in named)]
    if not chosen:
        raise RecipeError(
            f"adapter: {type(model).__name__} has no linear layer below its head that could get an adapter",
            "leave `adapter` out, which trains all weights",
        )
    ends = sorted({name.rpartition(".")[2] for name in chosen})
    matched = {name for name, _ in model.named_modules() if any(_ends_with(name, end) for end in ends)}
    return chosen, ends if matched == set(chosen) else chosen, note


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _trained_whole(model: Any, new: Collection[str]) -> list[str]:
    """The modules of the head (all outside the body, as Transformers names it), and those of the weights in `new`."""
    below = f"{model.base_model_prefix}."
    of_head = [name for name, _ in model.named_parameters() if not name.startswith(below)]
    if any("." not in name for name in of_head) or not of_head:
        raise InputError(
            f"adapter: the head of {type(model).__name__} is not made of modules, so an adapter cannot hold it",
            "leave `adapter` out, which trains all weights",
        )
    fresh = {name.rpartition(".")[0] for name in new if name.startswith(below)}
    return [*dict.fromkeys(name.partition(".")[0] for name in of_head), *sorted(fresh)]


def _inject(model: Any, config: Any, whole: Collection[str], *, trainable: bool = True) -> None:
    """Inject by `config`, whose `modules_to_save` become `whole` only then: these are trained in place, not as copies."""
    peft = import_peft()

    config.modules_to_save, config.inference_mode = None, not trainable
    peft.inject_adapter_in_model(config, model, _NAME)
    config.modules_to_save = list(whole)
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set, whose order differs between processes
    for name, weight in model.named_parameters():
        if any(name.startswith(f"{one}.") for one in whole):
            weight.requires_grad_(trainable)


def set_base(model: Any, prepared: Mapping[str, Any], name: str) -> None:
    """The base that the saved adapter names: a Hub id with its commit, or a folder.

    Args:
        prepared: the run's `prepared.json`.
        name: the recipe's model.
    """
    folder, commit = prepared["model_folder"], prepared.get("model_commit")
    config = model.peft_config[_NAME]
    config.base_model_name_or_path, config.revision = adapter_base(Path(folder)) or (name if commit else folder, commit)


def parameter_counts(model: Any) -> tuple[int, int]:
    """How many parameters are trained, and how many there are."""
    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def trained_share(model: Any) -> str:
    """A clause for the log: how many of the parameters are trained."""
    trained, total = parameter_counts(model)
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


# -- files ------------------------------------------------------------------------------------------------------------


def checkpoint_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint: all, or of a model with an adapter those that are trained."""
    state = model.state_dict()  # of a sharded model this process's shards, whatever is gathered at the moment
    if not has_adapter(model):
        return dict(state)
    return {name: state[name] for name, weight in model.named_parameters() if weight.requires_grad}


def save_weights(model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write what a checkpoint or `model/` holds of a model: its adapter, or all of it, in files of at most 5 GB.

    Args:
        weights: of `checkpoint_weights`, or a copy of them; by default the model's own.
    """
    if has_adapter(model):
        save_adapter(model, folder, weights)
    else:
        model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")


def save_labels(model: Any, folder: Path, prepared: Mapping[str, Any]) -> None:
    """Write the classifier's configuration and the digests of its base beside the adapter in `folder`.

    Args:
        prepared: the run's `prepared.json`.
    """
    before = Path(prepared["model_folder"])
    base_files = prepared["model_files"] if adapter_base(before) is None else read_json(before / ADAPTER_LABELS / _BASE)
    config = copy.deepcopy(model.config)
    # The classifier's, as `save_pretrained` of the model would name it.
    config.architectures = [model_class(model).__name__]
    config.save_pretrained(folder / ADAPTER_LABELS)
    write_atomic(folder / ADAPTER_LABELS / _BASE, json.dumps(base_files, indent=1))


def save_adapter(model: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write adapter and head as peft does; see `save_weights`."""
    import_peft()
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = dict(checkpoint_weights(model) if weights is None else weights)
    config = copy.deepcopy(model.peft_config[_NAME])
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    head = {name: weight for name, weight in state.items() if _in(name, config.modules_to_save)}
    adapter = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=_NAME, save_embedding_layers=False)
    named = {f"base_model.model.{name}": weight.contiguous() for name, weight in {**adapter, **head}.items()}
    assert len(named) == len(state), "a trained weight has no place in the adapter's file"
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: Any, folder: Path, *, head: bool = True) -> list[str]:
    """Load what `save_adapter` wrote into a model with the same adapter; returns the names of weights that were left out.

    Args:
        head: its weights too.

    Raises:
        InputError: the files hold other weights than the model has places for.
    """
    import_peft()
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    whole = model.peft_config[_NAME].modules_to_save
    prefix = "base_model.model."
    state = {name.removeprefix(prefix): weight for name, weight in load_file(folder / WEIGHTS).items()}
    of_head = {name: weight for name, weight in state.items() if _in(name, whole)}
    places = {name for name, _ in model.named_parameters() if "lora_" in name or _in(name, whole)}
    left_out = [] if head else [name for name in of_head if not name.startswith(f"{model.base_model_prefix}.")]
    try:
        result = set_peft_model_state_dict(model, {n: w for n, w in state.items() if n not in of_head}, _NAME)
        # Not through peft, which knows no head that is trained in place.
        kept = {name: weight for name, weight in of_head.items() if name not in left_out}
        unknown = model.load_state_dict(kept, strict=False).unexpected_keys
    except RuntimeError as error:  # of another shape
        raise InputError(
            f"model: {folder}: {str(error).splitlines()[0]}", "adapter and base do not belong together"
        ) from None
    unknown = [*result.unexpected_keys, *unknown]
    if unknown or len(state) != len(places):
        raise InputError(
            f"model: {folder / WEIGHTS} has {len(state)} weights, the model {len(places)} places for them",
            "adapter and base do not belong together: take both from one run",
        )
    return left_out


def _in(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def labels_config(folder: Path) -> Path:
    """The folder of config.json of the classifier in `folder`: its own, or beside an adapter's weights."""
    return folder / ADAPTER_LABELS if (folder / "adapter_config.json").is_file() else folder


def weights_folder(folder: Path) -> Path:
    """The folder whose weights the classifier in `folder` starts with: its own, or that of an adapter's base.

    Raises:
        InputError: the base is not on this machine, or its files have another size.
    """
    return folder if adapter_base(folder) is None else find_base(folder, digests=False)


def find_base(folder: Path, *, digests: bool = True) -> Path:
    """The folder of the base model of the adapter in `folder`; without network.

    Args:
        digests: compare all bytes with those that the adapter was trained beside.

    Raises:
        InputError: it is not on this machine, or another one.
    """
    named = adapter_base(folder)
    assert named is not None, "the folder holds no adapter"
    name, revision = named
    base = Path(name)
    if not base.is_dir():
        import huggingface_hub

        try:
            base = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        except Exception as error:  # many kinds, all of them "not here"
            raise InputError(
                f"model: the base {name}{f' at {revision[:12]}' if revision else ''} of the adapter {folder} is not on this machine",
                "fetch it, or correct base_model_name_or_path in adapter_config.json; `afina export RUN --merge` writes a model "
                "that needs no base",
            ) from error
    if wrong := difference(base, read_json(folder / ADAPTER_LABELS / _BASE), digests=digests):
        raise InputError(
            f"model: the base of the adapter {folder} is not the one that it was trained beside: {wrong}",
            "put the file back: an adapter means nothing beside other weights",
        )
    return base


def load_merged(folder: Path, trust_remote_code: bool = False) -> Any:
    """The classifier of an adapter's folder with the adapter merged into the base, in float32: a plain model of Transformers.

    Raises:
        InputError: base and adapter do not belong together, or the base is not here.
    """
    peft = import_peft()
    import torch
    from transformers import AutoConfig

    from afina.worker.task.tasks import class_of_config

    base = find_base(folder)
    config_of_labels = AutoConfig.from_pretrained(str(labels_config(folder)), trust_remote_code=trust_remote_code)
    model = class_of_config(config_of_labels).from_pretrained(
        str(base),
        config=config_of_labels,
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,  # the base's head, which the adapter's replaces
    )
    config = peft.LoraConfig.from_pretrained(str(folder))
    _inject(model, config, config.modules_to_save or (), trainable=False)
    load_adapter(model, folder)
    return merge(model)


def merge(model: Any) -> Any:
    """Add the adapter to the weights of its layers, and take it out of the model; in place."""
    import_peft()
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, layer.get_base_layer())
    del model.peft_config
    return model
