"""The keys and values of a recipe, validated and frozen.

A recipe says nothing about a cluster or an account (that is the site), and nothing is read from disk or the Hub here: the plan and
the prepare stage check whether files and columns exist. Unknown keys are refused with the nearest known one, and so are tokens
and passwords, because a recipe is shared.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from afina.errors import nearest
from afina.formats.read_options import Delimiter, Encoding, Header, Quoting, ReadOptions
from afina.frozen import FrozenModel
from afina.recipe.data_files import NamedSplit
from afina.recipe.explain import KeyedError, KeyedErrors, explain, shown
from afina.recipe.keys.loss_keys import LOSS_KEYS, misfit, parse_label_weights
from afina.recipe.keys.training_arguments import refusal
from afina.recipe.metrics import METRICS, SCALARS, metric_name, metric_texts, own_metric
from afina.recipe.time_limit import parse_seconds
from afina.recipe.trackers import TRACKERS
from afina.redact import looks_secret
from afina.schedule import DEFAULT_EPOCHS, Schedule

__all__ = [
    "AS_RECORDED",
    "Data",
    "Part",
    "Recipe",
    "Resources",
    "Tokens",
    "Train",
]

Task = Literal["auto", "single-label", "multi-label", "regression"]

#: Validation context of a recipe in a run's plan: what later versions refuse to train anew is still read.
AS_RECORDED = {"recorded": True}

_NAME = re.compile(r"[^\x00-\x1f\x7f/]{1,100}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECRET = (
    "holds a token or a password",
    "leave it out and set HF_TOKEN in the environment: a recipe is shared, and copied",
)


class _Section(FrozenModel):
    # hide_input_in_errors: a misplaced value may be a secret.
    model_config = ConfigDict(allow_inf_nan=False, hide_input_in_errors=True)

    #: Keys that were added later. Unset, they are left out of digests, so that older plans and prepared data keep theirs.
    added_later: ClassVar[tuple[str, ...]] = ()

    def digested(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The section as plain values for a digest, without the keys in `exclude` and unset keys of `added_later`."""
        values = self.model_dump(mode="json", exclude=set(exclude))
        for name in list(values):
            value = getattr(self, name)
            if isinstance(value, _Section):
                values[name] = value.digested()
            elif name in self.added_later and value == type(self).model_fields[name].get_default():
                del values[name]
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _no_stray_boolean_and_no_secret(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and not _takes_boolean(field.annotation):
            raise ValueError(f"{str(value).lower()} makes no sense here")
        if not isinstance(value, dict) and looks_secret(value):
            raise KeyedError(_SECRET[0], remedy=_SECRET[1])
        return value


def _takes_boolean(annotation: Any) -> bool:
    return annotation is bool or any(map(_takes_boolean, get_args(annotation)))


def _slurm_time(value: Any) -> Any:
    """Minutes, rounded up."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    seconds = parse_seconds(value) if isinstance(value, str) and "." not in value else None
    if seconds is None:
        raise ValueError(f"{shown(value)} is not a time limit: write minutes (90), `HH:MM:SS` or `D-HH:MM:SS`")
    return math.ceil(seconds / 60)


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be text, or a list of texts, found {shown(value)}")
    return value


def _unknown(name: str, kind: str, known: Iterable[str]) -> str:
    return " ".join(filter(None, [f"`{name}` is not {kind};", nearest(name, known), f"known: {', '.join(known)}"]))


def _epoch_or_steps(value: Any) -> Any:
    if value == "epoch" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"must be `epoch`, or a number of optimizer steps (1 or more), found {shown(value)}")


Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_listed)]


def _by_order_is_none(value: Any) -> Any:
    return None if value == "order" else value


EpochOrSteps = Annotated[Literal["epoch"] | int, BeforeValidator(_epoch_or_steps)]
#: At most Slurm's own limit of about a year.
Minutes = Annotated[int, BeforeValidator(_slurm_time), Field(ge=1, le=600_000)]
LabelWeights = Annotated[Literal["balanced"] | dict[str, float], BeforeValidator(parse_label_weights)]


class Part(_Section):
    """One of train, eval, test: the source and number of its rows.

    `split` names a split of a Hub data set, a key of `data.files` or a value of `data.split_column`; without it the source
    of the same name is used, else `all`, else `train`. A `fraction` divides the source, with the seed of `train`.
    `sample` then takes `shuffle(seed).select(range(sample))`, exactly as datasets does.
    """

    split: str | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    sample: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Data(_Section):
    """A Hub data set (`hub`) or local `files`, and its columns of texts and labels."""

    added_later = ("weight", "split_by", "split_column", "group", *ReadOptions.model_fields)

    hub: Text | None = None
    config: str | None = None
    splits: dict[str, str] | None = None
    revision: Text | None = None
    files: Mapping[NamedSplit, Names] | None = None
    text: Names
    label: Names
    labels: tuple[str, ...] | None = None
    label_separator: Text | None = None
    id: str | None = None
    weight: Text | None = None
    encoding: Encoding | None = None
    delimiter: Delimiter | None = None
    header: Header | None = None
    quoting: Quoting | None = None
    field: Text | None = None
    #: None: by the order of the rows, as afina 0.1 did. `afina.recipe.parse` sets `text` for a recipe that leaves it out.
    split_by: Annotated[Literal["text"] | None, BeforeValidator(_by_order_is_none)] = None
    split_column: Text | None = None
    group: Text | None = None
    train: Part = Part()
    eval: Part = Part()
    test: Part | None = None

    @property
    def reading(self) -> ReadOptions:
        """How the files are read."""
        return ReadOptions(**{key: getattr(self, key) for key in ReadOptions.model_fields})

    @field_validator("files", mode="before")
    @classmethod
    def _one_path_is_all(cls, value: Any) -> Any:
        if isinstance(value, str | list):
            return {"all": value}
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"must be a path, a list of paths, or a mapping such as {{train: a.csv, eval: b.csv}}, found {shown(value)}"
            )
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if not value:
            raise ValueError("is an empty list: name the labels, or leave it out to use those of the data")
        for place, name in enumerate(value):
            if name is None or isinstance(name, list | tuple | Mapping) or not str(name).strip():
                raise KeyedError(f"{shown(name)} is not a label; put it in quotes if it is text", str(place))
        return tuple(str(v).strip() for v in value)

    @field_validator("text")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one text column")
        for name in value:
            if value.count(name) > 1:
                raise ValueError(f"names column `{name}` twice")
        return value

    @field_validator("label")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("at least one label column")
        for name in value:
            if value.count(name) > 1:
                raise ValueError(f"names column `{name}` twice")
        return value

    @model_validator(mode="after")
    def _text_is_no_label(self) -> Data:
        for name in self.label:
            if name in self.text:
                raise KeyedError(
                    f"column `{name}` is the text too: the model would read the label in the text", "label"
                )
        if self.weight in (*self.text, *self.label):
            raise KeyedError(f"column `{self.weight}` is the text or the label too", "weight")
        for key in ("split_column", "group"):
            if getattr(self, key) in (*self.text, *self.label):
                raise KeyedError(f"column `{getattr(self, key)}` is the text or the label too", key)
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.hub is None) == (self.files is None):
            raise ValueError("give either `hub` (a data set's id) or `files` (local paths), and only one of them")
        if self.files is not None:
            for key in ("config", "splits", "revision"):
                if getattr(self, key) is not None:
                    raise KeyedError("belongs to a Hub data set; with `files` leave it out", key)
        for key in self.reading.given() if self.hub is not None else ():
            raise KeyedError("is for local files; with `hub` leave it out", key)
        if self.files is not None:
            if not self.files:
                raise KeyedError("is empty: write `{all: reviews.csv}` or `{train: …, eval: …}`", "files")
            for part, paths in self.files.items():
                if not paths:
                    raise KeyedError("names no file", "files", part)
            if self.split_column is not None and len(self.files) > 1:
                raise KeyedError(
                    f"divides the rows of one source, and `files` has {len(self.files)}",
                    "split_column",
                    remedy="give `files` as one path or one list, or leave `split_column` out",
                )
        return self._enough_to_give()

    def _source(self, name: str) -> str:
        """The source of a split, as far as it can be known without the data."""
        part: Part = getattr(self, name)
        files = self.files or {}
        own = name if self.files is None or name in files else "all" if "all" in files else "train"
        return part.split or own

    @property
    def divides(self) -> bool:
        """Whether rows of one source are divided among splits, as far as it can be known without the data."""
        fractions = any(part is not None and part.fraction is not None for part in (self.train, self.eval, self.test))
        shared = self.files is not None and self.split_column is None and self._source("train") == self._source("eval")
        return fractions or shared

    def _enough_to_give(self) -> Data:
        """Fractions of one source add up to 1 at most, as far as that can be known without the data."""
        if self.split_column is not None:
            return self  # the sources are its values
        cut: dict[str, list[str]] = {}
        for name in ("train", "eval", "test"):
            part: Part | None = getattr(self, name)
            if part is None or part.fraction is None:
                continue
            cut.setdefault(self._source(name), []).append(name)
        for source, names in cut.items():
            total = sum(getattr(self, name).fraction for name in names)
            if total > 1 + 1e-9:
                raise ValueError(
                    f"the fractions of {' and '.join(names)} add up to {total:g}; at most 1 of `{source}` is there to give"
                )
        return self


class Tokens(_Section):
    """How texts become tokens. Lengths in tokens, special tokens included."""

    max_length: Annotated[int, Field(ge=2, le=131072)] = 512
    batching: Literal["auto", "packed", "grouped", "longest", "padded"] = "auto"


class Train(_Section):
    """How the model is trained. `batch_size` is global: examples per optimizer step over all processes."""

    added_later = ("loss", "focal_gamma", "class_weights", "pos_weight", "label_smoothing", "keep_after")

    batch_size: Annotated[int, Field(ge=1, le=10**9)] = 8
    max_batch_per_device: Annotated[int, Field(ge=1, le=10**9)] | None = None
    eval_batch_size: Annotated[int, Field(ge=1, le=10**9)] | None = None
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    max_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = 5e-5
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    evaluate: EpochOrSteps = "epoch"
    save_every: EpochOrSteps = "epoch"
    save_minutes: Annotated[float, Field(gt=0, le=1e7)] | None = 15.0
    stall_minutes: Annotated[float, Field(gt=0, le=1e7)] | None = None
    log_every: Annotated[int, Field(ge=1, le=10**9)] = 10
    keep_checkpoints: Annotated[int, Field(ge=1, le=10**9)] = 2
    keep: Literal["best", "last"] = "best"
    keep_after: Literal["best", "none", "all"] = "best"
    best_metric: str | None = None
    loss: Literal["cross_entropy", "focal"] | None = None
    focal_gamma: Annotated[float, Field(ge=0, le=100)] | None = None
    class_weights: LabelWeights | None = None
    pos_weight: LabelWeights | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fast_dropout: bool = True
    onednn: bool = True
    cuda_graphs: bool = False
    attention_dropout: Literal[0] | None = None
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    compile: bool = False
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments")
    @classmethod
    def _take_effect(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if info.context != AS_RECORDED and (wrong := list(_wrong_arguments(value))):
            raise KeyedErrors(wrong)
        return value

    @model_validator(mode="after")
    def _one_end(self) -> Train:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give `epochs` or `max_steps`, not both")
        return self

    @model_validator(mode="after")
    def _no_repetition(self) -> Train:
        for key in ("bf16", "fp16", "tf32") if self.precision != "auto" else ():
            if key in self.arguments:
                raise KeyedError("repeats `train.precision`", "arguments", key, remedy="leave one of them out")
        if self.compile and "torch_compile" in self.arguments:
            raise KeyedError("repeats `train.compile`", "arguments", "torch_compile", remedy="leave one of them out")
        return self

    @model_validator(mode="after")
    def _one_loss(self) -> Train:
        if self.focal_gamma is not None and self.loss != "focal":
            raise KeyedError(
                "belongs to the focal loss", "focal_gamma", remedy="set `train.loss: focal`, or leave it out"
            )
        if self.loss == "focal" and self.label_smoothing:
            raise KeyedError("has no definition for the focal loss", "label_smoothing", remedy="leave one of them out")
        return self

    @property
    def loss_keys(self) -> tuple[str, ...]:
        """The keys of the loss that the recipe uses."""
        return tuple(key for key in LOSS_KEYS if getattr(self, key) != type(self).model_fields[key].get_default())

    @property
    def num_epochs(self) -> float:
        """The number of epochs; 3 by default."""
        return self.epochs if self.epochs is not None else DEFAULT_EPOCHS

    def schedule(self, rows: int, eval_rows: int) -> Schedule:
        """The steps of a run on so many rows."""
        return Schedule.of(
            rows,
            self.batch_size,
            epochs=self.num_epochs,
            max_steps=self.max_steps,
            evaluate=self.evaluate if eval_rows else None,
            save_every=self.save_every,
        )


class Resources(_Section):
    """The resources of a job. `time` is in minutes once read."""

    nodes: Annotated[int, Field(ge=1, le=100_000)] = 1
    gpus_per_node: Annotated[int, Field(ge=0, le=1000)] = 1
    cpus_per_gpu: Annotated[int, Field(ge=1, le=10_000)] = 4
    mem_gb: Annotated[int, Field(ge=1, le=10**6)] | None = None
    time: Minutes = 60

    @property
    def num_processes(self) -> int:
        """One process per GPU; one per node without GPUs."""
        return self.nodes * max(1, self.gpus_per_node)


def _wrong_arguments(arguments: Mapping[str, Any]) -> Iterator[KeyedError]:
    for key, value in arguments.items():
        if looks_secret(value) and key != "hub_token":
            yield KeyedError(_SECRET[0], key, remedy=_SECRET[1])
            continue
        if refused := refusal(key, value):
            yield KeyedError(refused[0], key, remedy=refused[1])
            continue
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            yield KeyedError(f"{shown(value)} is not a plain value; put it in quotes if it is text", key)


if TYPE_CHECKING:
    _Explained = _Section
else:

    class _Explaining(type(BaseModel)):
        """Calling the class explains what is wrong as loading a file does, not as pydantic does."""

        def __call__(cls, *values: Any, **named: Any) -> Any:
            try:
                return super().__call__(*values, **named)
            except ValidationError as error:
                raise explain(error, Recipe, None, "recipe", []) from None

    class _Explained(_Section, metaclass=_Explaining):
        pass


class Recipe(_Explained):
    """What to train, complete and frozen. `afina.recipe.parse.load_recipe` reads one from a file.

    Raises:
        RecipeError: a key or value is wrong.
    """

    name: str
    model: Text
    revision: Text | None = None
    trust_remote_code: bool = False
    task: Task = "auto"
    data: Data
    tokens: Tokens = Tokens()
    train: Train = Train()
    metrics: tuple[str, ...] | None = None
    trackers: tuple[str, ...] = ()
    resources: Resources = Resources()
    #: The file that it was read from: relative paths start in that file's folder.
    _file: Path | None = PrivateAttr(None)

    @property
    def file(self) -> Path | None:
        return self._file

    def read_from(self, file: Path | None) -> Recipe:
        """This recipe, with the file that it was read from."""
        self._file = file.absolute() if file else None
        return self

    def __eq__(self, other: object) -> bool:
        """The same values; the file does not count."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @field_validator("name")
    @classmethod
    def _a_file_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value) or value.startswith((".", "-")) or len(value.encode()) > 200:
            raise ValueError(
                f"{shown(value)} is not usable as a folder's name: at most 100 characters, no slash or control "
                "character, no leading dot or dash"
            )
        return value

    @field_validator("metrics", mode="before")
    @classmethod
    def _one_metric(cls, value: Any) -> Any:
        return value if value is None else _listed(value)

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return () if value is None else _listed(value)

    @field_validator("trackers")
    @classmethod
    def _trackers_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, name in enumerate(value):
            if name not in TRACKERS:
                raise KeyedError(_unknown(name, "a tracker", TRACKERS), str(number))
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _metrics_are_known(self) -> Recipe:
        known = list(dict.fromkeys(m for task, ms in METRICS.items() if self.task in (task, "auto") for m in ms))
        best, own = self.train.best_metric, {}
        for i, metric in enumerate(self.metrics or ()):
            keys = ("metrics", str(i))
            self._check_metric(metric, known, keys)
            if own_metric(metric):
                name = metric_name(metric)
                if name in SCALARS or name in own:
                    raise KeyedError(f"`{name}` is the name of another metric here; rename the function", *keys)
                own[name] = metric
        if best is not None and best not in own:
            keys = ("train", "best_metric")
            if best == "confusion_matrix":
                raise KeyedError(
                    "`confusion_matrix` is a table: it has no best one; choose a metric that is a number", *keys
                )
            self._check_metric(best, known, keys)
            if own_metric(best) and own.get(metric_name(best), best) != best:
                raise KeyedError(f"`metrics` has it as `{own[metric_name(best)]}`: write both alike", *keys)
        return self

    def _check_metric(self, metric: str, known: list[str], keys: tuple[str, ...]) -> None:
        try:
            if own_metric(metric) or metric in known:
                return
        except ValueError as error:
            raise KeyedError(str(error), *keys) from None
        of = "" if self.task == "auto" else f" of a {self.task} task"
        raise KeyedError(_unknown(metric, f"a metric{of}", known) + "; one of your own: `module:function`", *keys)

    @property
    def metric_texts(self) -> tuple[str, ...]:
        """All metrics as the recipe writes them, `best_metric` included."""
        return metric_texts(self.metrics, self.train.best_metric)

    @model_validator(mode="after")
    def _loss_fits(self) -> Recipe:
        if found := misfit(self.train.loss_keys, self.task):
            raise KeyedError(found[1], "train", found[0], remedy=found[2])
        return self

    @model_validator(mode="after")
    def _foreign_code_is_pinned(self) -> Recipe:
        local = self.model.startswith((".", "/", "~", "$")) or self.model.count("/") > 1
        if self.trust_remote_code and not local and not _COMMIT.fullmatch(self.revision or ""):
            found = f"`{self.revision}` can move" if self.revision else "`revision` is missing"
            raise KeyedError(
                f"runs code from the model's repository, {found}",
                "trust_remote_code",
                remedy="read that code, then pin it: `revision:` with a full commit of 40 hex digits, not a branch or a "
                "tag; write a model folder beside the recipe as `./folder`",
            )
        return self
