"""What to train: a recipe is read from YAML, overridden with `--set`, validated and frozen.

A recipe says nothing about a cluster or an account (that is the site) and nothing is looked up on disk or on the Hub
here: whether a file or a column exists is the business of the plan and of the prepare stage. Keys that are not known are
refused with the nearest known one and the line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from afina.errors import RecipeError, nearest

__all__ = ["METRICS", "Data", "Part", "Recipe", "Resources", "Tokens", "Train", "load_recipe", "parse_recipe"]

Task = Literal["auto", "single-label", "multi-label", "regression"]

#: The metrics that each task knows; the first is the one by which the best checkpoint is chosen.
METRICS: dict[str, tuple[str, ...]] = {
    "single-label": ("accuracy", "f1", "precision", "recall", "mcc", "confusion_matrix"),
    "multi-label": ("f1", "f1_micro", "subset_accuracy", "precision", "recall"),
    "regression": ("mse", "mae", "pearson", "spearman"),
}

#: Arguments of TrainingArguments that the recipe or afina itself sets: where to say it instead.
_RESERVED_ARGUMENTS: dict[str, str] = {
    "output_dir": "give `--run DIR`",
    "per_device_train_batch_size": "set `train.batch_size`, the global batch",
    "per_device_eval_batch_size": "set `train.eval_batch_size`",
    "gradient_accumulation_steps": "set `train.max_batch_per_device`; accumulation follows from the global batch",
    "auto_find_batch_size": "set `train.batch_size`: the global batch is part of the recipe",
    "num_train_epochs": "set `train.epochs`",
    "max_steps": "set `train.max_steps`",
    "learning_rate": "set `train.learning_rate`",
    "seed": "set `train.seed`",
    "data_seed": "set `train.seed`",
    "train_sampling_strategy": "set `tokens.batching`",
    "eval_strategy": "set `train.evaluate`",
    "eval_steps": "set `train.evaluate`",
    "save_strategy": "set `train.save_every`",
    "save_steps": "set `train.save_every`",
    "save_total_limit": "set `train.keep_checkpoints`",
    "save_only_model": "leave it out: a checkpoint without optimizer state cannot be resumed",
    "load_best_model_at_end": "set `train.keep: best` or `train.keep: last`",
    "metric_for_best_model": "set `train.best_metric`",
    "greater_is_better": "set `train.best_metric`; its direction is known",
    "resume_from_checkpoint": "run `afina resume DIR`",
    "enable_jit_checkpoint": "leave it out: afina stops and saves by itself",
    "logging_strategy": "set `train.log_every`",
    "logging_steps": "set `train.log_every`",
    "logging_nan_inf_filter": "leave it out: a loss that is not finite is never hidden",
    "use_cpu": "leave it out: the device follows from the allocation",
    "push_to_hub": "leave it out: jobs have no network; upload `model/` afterwards",
    "accelerator_config": "leave it out: afina shards the batches itself",
    "dataloader_drop_last": "leave it out: every example is trained on",
    "remove_unused_columns": "leave it out",
    "label_names": "leave it out",
    "disable_tqdm": "leave it out: a bar is drawn where there is a terminal",
    "do_train": "leave it out",
    "do_eval": "leave it out",
    "do_predict": "leave it out",
    "report_to": "leave it out: metrics are in `metrics.jsonl`",
    "ddp_backend": "leave it out: it follows from the device",
    "local_rank": "leave it out: it follows from the launch",
    "deepspeed": "leave it out: sharded training is not supported",
    "fsdp": "leave it out: sharded training is not supported",
    "ignore_data_skip": "leave it out: a resumed run sees the batches of the uninterrupted one",
}

_NAME = re.compile(r"[^\x00-\x1f\x7f/]{1,100}")
_DIGITS = re.compile(r"[0-9]{1,9}")


class _At(ValueError):
    """A value error of the key `keys` below the one that is being validated."""

    def __init__(self, message: str, *keys: str, remedy: str = "") -> None:
        super().__init__(message)
        self.keys, self.remedy = keys, remedy


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and field.annotation is not bool:
            raise ValueError(f"{str(value).lower()} makes no sense here")
        return value


def _slurm_time(value: Any) -> Any:
    """Slurm's time formats to minutes, rounded up: `90`, `90:00`, `1:30:00`, `1-0`, `1-2:30`, `1-2:30:00`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    days, dash, rest = value.strip().rpartition("-") if isinstance(value, str) else ("", "", "")
    fields = rest.split(":")
    if not all(_DIGITS.fullmatch(f) for f in fields) or len(fields) > 3 or (dash and not _DIGITS.fullmatch(days)):
        raise ValueError(f"{_shown(value)} is not a time limit: write minutes (90), `HH:MM:SS` or `D-HH:MM:SS`")
    numbers = [int(f) for f in fields]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        total = int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    elif len(numbers) == 3:
        total = numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
    elif len(numbers) == 2:
        total = numbers[0] * 60 + numbers[1]
    else:
        total = numbers[0] * 60
    return math.ceil(total / 60)


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be text, or a list of texts, found {_shown(value)}")
    return value


def _epoch_or_steps(value: Any) -> Any:
    if value == "epoch" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"must be `epoch`, or a number of optimizer steps (1 or more), found {_shown(value)}")


def _shown(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    if value is None:
        return "nothing (null)"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_listed)]
EpochOrSteps = Annotated[Literal["epoch"] | int, BeforeValidator(_epoch_or_steps)]
Minutes = Annotated[int, BeforeValidator(_slurm_time), Field(ge=1)]


class Part(_Frozen):
    """One of train, eval, test: where its rows come from and how many of them.

    `split` names a split of a Hub data set or a key of `data.files`; without it the part of the same name is taken, else
    `all`, else `train`. A `fraction` cuts the split (stratified, disjoint from its sisters, with the seed of `train`).
    `sample` then takes `shuffle(seed).select(range(sample))`, exactly as datasets does.
    """

    split: str | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    sample: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Data(_Frozen):
    """A Hub data set (`hub`) or local `files`, and which of its columns are text and label."""

    hub: Text | None = None
    config: str | None = None
    splits: dict[str, str] | None = None
    revision: Text | None = None
    files: Mapping[Literal["all", "train", "eval", "test"], Names] | None = None
    text: Names
    label: Names
    labels: tuple[str, ...] | None = None
    label_separator: str | None = None
    id: str | None = None
    train: Part = Part()
    eval: Part = Part()
    test: Part | None = None

    @field_validator("files", mode="before")
    @classmethod
    def _one_path_is_all(cls, value: Any) -> Any:
        if isinstance(value, str | list):
            return {"all": value}
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"must be a path, a list of paths, or a mapping such as {{train: a.csv, eval: b.csv}}, found {_shown(value)}"
            )
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        return tuple(str(v) for v in value) if isinstance(value, list | tuple) else value

    @field_validator("text")
    @classmethod
    def _one_or_two(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not 1 <= len(value) <= 2:
            raise ValueError(f"one column, or two for pairs; found {len(value)}")
        return value

    @field_validator("label")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one label column")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.hub is None) == (self.files is None):
            raise ValueError("give either `hub` (a data set's id) or `files` (local paths), and only one of them")
        if self.files is not None:
            for key in ("config", "splits", "revision"):
                if getattr(self, key) is not None:
                    raise _At("belongs to a Hub data set; with `files` leave it out", key)
            if not self.files:
                raise _At("is empty: write `{all: reviews.csv}` or `{train: …, eval: …}`", "files")
            for part, paths in self.files.items():
                if not paths:
                    raise _At("names no file", "files", part)
        return self._enough_to_give()

    def _enough_to_give(self) -> Data:
        """Fractions of one source add up to 1 at most, as far as that can be known without the data."""
        cut: dict[str, list[str]] = {}
        for name in ("train", "eval", "test"):
            part: Part | None = getattr(self, name)
            if part is None or part.fraction is None:
                continue
            files = self.files or {}
            own = name if self.files is None or name in files else "all" if "all" in files else "train"
            cut.setdefault(part.split or own, []).append(name)
        for source, names in cut.items():
            total = sum(getattr(self, name).fraction for name in names)
            if total > 1 + 1e-9:
                raise ValueError(
                    f"the fractions of {' and '.join(names)} add up to {total:g}; at most 1 of `{source}` is there to give"
                )
        return self


class Tokens(_Frozen):
    """How texts become tokens. Lengths in tokens, special tokens included."""

    max_length: Annotated[int, Field(ge=2, le=131072)] = 512
    batching: Literal["auto", "grouped", "longest", "padded"] = "auto"


class Train(_Frozen):
    """How the model is trained. `batch_size` is global: examples per optimizer step over all processes."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    max_batch_per_device: Annotated[int, Field(ge=1)] | None = None
    eval_batch_size: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    evaluate: EpochOrSteps = "epoch"
    save_every: EpochOrSteps = "epoch"
    log_every: Annotated[int, Field(ge=1)] = 10
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    keep: Literal["best", "last"] = "best"
    best_metric: str | None = None
    arguments: dict[str, Any] = {}

    @field_validator("arguments")
    @classmethod
    def _reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in _RESERVED_ARGUMENTS:
                raise _At("is set by afina itself", key, remedy=_RESERVED_ARGUMENTS[key])
            try:
                json.dumps(value[key], allow_nan=False)
            except (TypeError, ValueError):
                raise _At(f"{_shown(value[key])} is not a plain value; put it in quotes if it is text", key) from None
        return value

    @model_validator(mode="after")
    def _one_end(self) -> Train:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give `epochs` or `max_steps`, not both")
        return self

    @property
    def num_epochs(self) -> float:
        """Epochs asked for; 3 where the recipe says nothing."""
        return self.epochs if self.epochs is not None else 3.0


class Resources(_Frozen):
    """What to ask Slurm for. `time` in minutes once read."""

    nodes: Annotated[int, Field(ge=1)] = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    cpus_per_gpu: Annotated[int, Field(ge=1)] = 4
    mem_gb: Annotated[int, Field(ge=1)] | None = None
    time: Minutes = 60

    @property
    def num_processes(self) -> int:
        """One process per GPU; one per node where no GPU is asked for."""
        return self.nodes * max(1, self.gpus_per_node)


class Recipe(_Frozen):
    """What to train, complete and frozen. Made by `load_recipe`."""

    name: str
    model: Text
    revision: Text | None = None
    trust_remote_code: bool = False
    task: Task = "auto"
    data: Data
    tokens: Tokens = Tokens()
    train: Train = Train()
    metrics: tuple[str, ...] | None = None
    resources: Resources = Resources()

    @field_validator("name")
    @classmethod
    def _a_file_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value) or value.startswith((".", "-")) or len(value.encode()) > 200:
            raise ValueError(
                f"{_shown(value)} is not usable as a folder's name: at most 100 characters, no slash or control "
                "character, no dot or dash in front"
            )
        return value

    @field_validator("metrics", mode="before")
    @classmethod
    def _one_metric(cls, value: Any) -> Any:
        return value if value is None else _listed(value)

    @model_validator(mode="after")
    def _metrics_are_known(self) -> Recipe:
        known = list(dict.fromkeys(m for task, ms in METRICS.items() if self.task in (task, "auto") for m in ms))
        named = [(metric, ("metrics", str(i))) for i, metric in enumerate(self.metrics or ())]
        if self.train.best_metric is not None:
            named.append((self.train.best_metric, ("train", "best_metric")))
        for metric, keys in named:
            if metric not in known:
                hint = nearest(metric, known)
                of = "" if self.task == "auto" else f" of a {self.task} task"
                raise _At(
                    f"`{metric}` is not a metric{of}; {hint + ' ' if hint else ''}known: {', '.join(known)}", *keys
                )
        if self.trust_remote_code and self.revision is None:
            raise _At("runs code from the model's repository: pin it with `revision: <commit>`", "trust_remote_code")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: a YAML file.
        overrides: `key.sub=value` each, the value read as YAML.

    Raises:
        RecipeError: with the file, the line, what was found and what is allowed.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(p) for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise RecipeError(
            f"recipe {file}: no such file", nearest(str(file), siblings) or "give the path of a YAML recipe"
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {file}: is a folder", "give the path of a YAML recipe") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {file}: byte {error.start} is not UTF-8", "save the file as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"recipe {file}: {error.strerror}", "check the path and its permissions") from None
    return parse_recipe(text, overrides, source=str(file))


def parse_recipe(text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """As `load_recipe`, from text; `source` is what messages call it."""
    node, tree = _read_yaml(text, source)
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{source}: {'is empty' if tree is None else f'a recipe is a mapping of keys, found {_shown(tree)}'}",
            "start from slurm/recipes/yelp.yaml",
        )
    for override in overrides:
        _apply(tree, override)
    overridden = [o.partition("=")[0].strip() for o in overrides]
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, node, source, overridden) from None


def _read_yaml(text: str, source: str) -> tuple[Node | None, Any]:
    yaml = YAML(typ="safe", pure=True)
    try:
        return yaml.compose(StringIO(text)), yaml.load(StringIO(text))
    except DuplicateKeyError as error:
        # ruamel prints values of both, which for a section is only "{}".
        key = re.search(r'duplicate key "(.*?)" with value', str(error.problem))
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(
            f"{source}{line}: the key{f' `{key[1]}`' if key else ''} is there already", "keep one of the two"
        ) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context).split("\n")[0].split())
        remedy = (
            "indent with spaces; YAML allows no tabs"
            if "'\\t'" in problem
            else "check the indentation and quotes around that line"
        )
        raise RecipeError(f"{source}{line}: not valid YAML: {problem}", remedy) from None
    except (YAMLError, ValueError) as error:
        position = getattr(error, "position", None)
        line = f":{text.count(chr(10), 0, position) + 1}" if isinstance(position, int) else ""
        raise RecipeError(
            f"{source}{line}: not valid YAML: {str(error).splitlines()[0]}", "remove that character"
        ) from None
    except RecursionError:
        raise RecipeError(f"{source}: not a recipe: nested too deeply", "start from slurm/recipes/yelp.yaml") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = [k.strip() for k in path.split(".")]
    if not equals or not all(keys):
        raise RecipeError(
            f"--set {override}: not of the form key.sub=value", "for example --set train.learning_rate=3e-5"
        )
    try:
        value = YAML(typ="safe", pure=True).load(text) if text.strip() else None
    except (YAMLError, ValueError, RecursionError):
        value = text
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)
    here: dict[str, Any] = tree
    for depth, key in enumerate(keys[:-1], start=1):
        below = here.get(key)
        if below is not None and not isinstance(below, dict):
            raise RecipeError(
                f"--set {override}: `{key}` is a value, it has no keys", f"set `{'.'.join(keys[:depth])}` itself"
            )
        # A copy: what a YAML alias repeats is one object, and only this occurrence is overruled.
        here[key] = dict(below or {})
        here = here[key]
    here[keys[-1]] = value


def _explain(error: ValidationError, root: Node | None, source: str, overridden: list[str]) -> RecipeError:
    """One message for the first thing that is wrong: file, line, key, what was found, what is allowed."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    cause = first.get("ctx", {}).get("error")
    keys = [str(k) for k in first["loc"]] + list(cause.keys if isinstance(cause, _At) else ())
    unknown = first["type"] == "extra_forbidden"
    if keys and keys[-1] == "[key]":  # a key of a mapping whose keys are a choice
        keys, unknown = keys[:-1], True
    dotted = ".".join(keys)
    where = _where(root, source, keys, overridden)
    if unknown or first["type"] == "missing":
        known = sorted(_known_keys(keys[:-1]))
        here = f"known here: {', '.join(known)}"
        if not unknown:
            return RecipeError(f"{where}: `{dotted}` is missing", f"add `{keys[-1]}:`; {here}")
        hint = nearest(keys[-1], known)
        return RecipeError(f"{where}: unknown key `{dotted}`", f"{hint + ' ' if hint else ''}{here}")
    named = "" if where == f"--set {dotted}" or not dotted else f"`{dotted}`: "
    message, remedy = _said(first)
    return RecipeError(f"{where}: {named}{message}", remedy)


def _said(error: ErrorDetails) -> tuple[str, str]:
    """What pydantic found, in the words of a recipe, and what to do."""
    kind, context, found = error["type"], error.get("ctx", {}), _shown(error["input"])
    remedy = "correct the value; docs/recipe.md lists the keys"
    if kind == "value_error":
        cause = context.get("error")
        return str(cause), (cause.remedy if isinstance(cause, _At) else "") or remedy
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"must be one of {', '.join(choices)}, found {found}", nearest(str(error["input"]), choices) or remedy
    if kind == "string_type" and isinstance(error["input"], int | float):
        return f"must be text, found the number {found}", f"put it in quotes, also for --set: \"'{error['input']}'\""
    limit = next((context[k] for k in ("gt", "ge", "lt", "le") if k in context), None)
    for kinds, message in _KINDS.items():
        if kind in kinds:
            return f"{message.format(f'{limit:g}' if isinstance(limit, float) else limit)}, found {found}", remedy
    return f"is not usable: {error['msg']}, found {found}", remedy


_KINDS: dict[tuple[str, ...], str] = {
    ("int_type", "int_parsing", "int_from_float", "int_parsing_size"): "must be a whole number",
    ("float_type", "float_parsing", "finite_number"): "must be a number",
    ("bool_type", "bool_parsing"): "must be true or false",
    ("string_type", "string_unicode"): "must be text",
    ("string_too_short",): "must not be empty",
    ("model_type", "model_attributes_type", "dict_type", "mapping_type"): "must be a mapping of keys",
    ("tuple_type", "list_type"): "must be a list",
    ("invalid_key",): "is a key that is not text",
    ("greater_than",): "must be more than {}",
    ("greater_than_equal",): "must be {} or more",
    ("less_than",): "must be less than {}",
    ("less_than_equal",): "must be {} or less",
}


def _where(root: Node | None, source: str, keys: list[str], overridden: list[str]) -> str:
    """`--set KEY` where an override gave the value, `FILE:LINE` where the file did, both where they disagree."""
    dotted = ".".join(keys)
    for given in reversed(overridden):
        if dotted == given or dotted.startswith(given + "."):
            return f"--set {dotted}"
    line, found = _line(root, keys)
    below = [given for given in overridden if not dotted or given.startswith(dotted + ".")]
    if below and not found:
        return f"--set {below[-1]}"
    return f"{source}{line}" + (f" with --set {below[-1]}" if below and dotted else "")


def _line(root: Node | None, keys: Sequence[str]) -> tuple[str, bool]:
    """`:LINE` of the deepest key that is in the file, and whether that is the last of `keys`."""
    node, line, found = root, None, True
    for key in keys:
        if isinstance(node, MappingNode):
            for k, v in node.value:
                if isinstance(k, ScalarNode) and k.value == key:
                    node, line = v, k.start_mark.line + 1
                    break
            else:
                found = False
                break
        elif isinstance(node, SequenceNode) and key.isdigit() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
        else:
            found = isinstance(node, ScalarNode) and key == "0"  # one text stands for a list of one
            break
    return f":{line}" if line else "", found


def _known_keys(keys: Sequence[str]) -> Iterator[str]:
    if list(keys) == ["data", "files"]:
        return iter(("all", "train", "eval", "test"))
    model: type[BaseModel] = Recipe
    for key in keys:
        field = model.model_fields.get(key)
        below = _model_of(field.annotation) if field else None
        if below is None:
            break
        model = below
    return iter(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _model_of(inner)
        if found:
            return found
    return None
