"""A recipe, validated and frozen: its own keys, and the sections in `afina.recipe.keys`.

A recipe says nothing about a cluster or an account (that is the site), and nothing is read from disk or the Hub here: the plan and
the prepare stage check whether files and columns exist. Unknown keys are refused with the nearest known one, and so are tokens
and passwords, because a recipe is shared.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, PrivateAttr, ValidationError, ValidationInfo, field_validator

from afina.recipe.explain import combined, explain
from afina.recipe.keys.adapter_keys import Adapter
from afina.recipe.keys.data_keys import Data
from afina.recipe.keys.decision_keys import Decisions
from afina.recipe.keys.loss_keys import misfit
from afina.recipe.keys.resource_keys import Resources
from afina.recipe.keys.section import KeyedError, Section, Text, listed, shown, unknown
from afina.recipe.keys.train_keys import Tokens, Train
from afina.recipe.metrics import METRICS, SCALARS, metric_name, metric_texts, own_metric
from afina.recipe.trackers import TRACKERS

__all__ = ["Recipe"]

Task = Literal["auto", "single-label", "multi-label", "regression", "token-classification"]

_NAME = re.compile(r"[^\x00-\x1f\x7f/]{1,100}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


if TYPE_CHECKING:
    _Explained = Section
else:

    class _Explaining(type(BaseModel)):
        """Calling the class explains what is wrong as loading a file does, not as pydantic does."""

        def __call__(cls, *values: Any, **named: Any) -> Any:
            try:
                return super().__call__(*values, **named)
            except ValidationError as error:
                raise combined(explain(error, Recipe, None, "recipe", [], named), "recipe") from None

    class _Explained(Section, metaclass=_Explaining):
        pass


class Recipe(_Explained):
    """A recipe, complete and frozen. `afina.recipe.parse.load_recipe` reads one from a file.

    Raises:
        RecipeError: a key or value is wrong.
    """

    added_later = ("adapter", "baselines", "decisions")

    name: str
    model: Text
    revision: Text | None = None
    trust_remote_code: bool = False
    task: Task = "auto"
    data: Data
    tokens: Tokens = Tokens()
    train: Train = Train()
    adapter: Adapter | None = None
    metrics: tuple[str, ...] | None = None
    decisions: Decisions | None = None
    baselines: bool = True
    trackers: tuple[str, ...] = ()
    resources: Resources = Resources()
    #: The file that it was read from: relative paths start in that file's folder.
    _file: Path | None = PrivateAttr(None)
    #: Values that are hardly meant, each with its place; set where a recipe is read.
    _warnings: tuple[str, ...] = PrivateAttr(())

    @property
    def file(self) -> Path | None:
        return self._file

    @property
    def warnings(self) -> tuple[str, ...]:
        """Values that are allowed and hardly meant, each with its file and line."""
        return self._warnings

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

    @field_validator("metrics", "trackers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any, info: ValidationInfo) -> Any:
        none = None if info.field_name == "metrics" else ()
        return none if value is None else listed(value)

    @field_validator("trackers")
    @classmethod
    def _trackers_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, name in enumerate(value):
            if name not in TRACKERS:
                raise KeyedError(unknown(name, "a tracker", TRACKERS), str(number))
        return tuple(dict.fromkeys(value))

    def problems(self) -> Iterator[KeyedError]:
        yield from self._problems_of_metrics()
        if self.task == "token-classification":
            yield from self._problems_of_words()
        if self.tokens.truncation != "head" and len(self.data.text) == 2:
            remedy = "leave it out: of a pair the longer text is cut at its end"
            yield KeyedError("is of single texts, and `data.text` names two", "tokens", "truncation", remedy=remedy)
        if self.tokens.windows is not None:
            yield from self._problems_of_windows()
        if misfitting := misfit(self.train.loss_keys, self.task):
            key, problem, remedy = misfitting
            yield KeyedError(problem, "train", key, remedy=remedy)
        if self.decisions is not None and (misfitting := self.decisions.misfit(self.task)):
            key, problem, remedy = misfitting
            yield KeyedError(problem, "decisions", key, remedy=remedy)
        if self.adapter is not None and self.train.freeze is not None:
            remedy = "leave `train.freeze` out: with an adapter all weights but adapter and head are frozen"
            yield KeyedError("has no meaning beside `adapter`", "train", "freeze", remedy=remedy)
        if self.adapter is None and self.train.base_dtype != "fp32":
            remedy = "leave it out, or set `adapter: {kind: lora}`: weights that are trained stay in float32"
            yield KeyedError("is of frozen weights, and all are trained", "train", "base_dtype", remedy=remedy)
        local = self.model.startswith((".", "/", "~", "$")) or self.model.count("/") > 1
        if self.trust_remote_code and not local and not _COMMIT.fullmatch(self.revision or ""):
            problem = f"`{self.revision}` can move" if self.revision else "`revision` is missing"
            yield KeyedError(
                f"runs code from the model's repository, {problem}",
                "trust_remote_code",
                remedy="read that code, then pin it: `revision:` with a full commit of 40 hex digits, not a branch or a "
                "tag; write a model folder beside the recipe as `./folder`",
            )

    def _problems_of_windows(self) -> Iterator[KeyedError]:
        if len(self.data.text) == 2:
            remedy = "leave it out, or join the two texts in the data"
            yield KeyedError("are of single texts, and `data.text` names two", "tokens", "windows", remedy=remedy)
        for key, on in {"compile": self.train.compile, "cuda_graphs": self.train.cuda_graphs}.items():
            if on:
                yield KeyedError(
                    "does not know the windows of texts", "train", key, remedy="leave it out, or `tokens.windows`"
                )

    def _problems_of_words(self) -> Iterator[KeyedError]:
        """Keys that a token classification cannot use."""
        data = self.data
        unused = {
            "labels": (data.labels, "the labels are those of the data"),
            "label_separator": (data.label_separator, "each word has one tag"),
            "fold": (data.fold, "folds are stratified by the label of a row, and rows of words have none"),
        }
        for key, (value, why) in unused.items():
            if value is not None:
                yield KeyedError(f"does not fit token classification: {why}", "data", key, remedy="leave it out")
        for key, columns in (("text", data.text), ("label", data.label)):
            if len(columns) > 1:
                yield KeyedError("token classification reads one column", "data", key, remedy="name one column")
        if self.tokens.windows is not None:
            problem = "do not fit token classification: a word in two windows would have two labels"
            yield KeyedError(problem, "tokens", "windows", remedy="leave it out, and split long texts into paragraphs")
        if self.tokens.truncation != "head":
            remedy = "leave it out, and split long texts into sentences or paragraphs"
            yield KeyedError(
                "does not fit token classification: words would be missing in between",
                "tokens",
                "truncation",
                remedy=remedy,
            )
        for i, metric in enumerate(self.metrics or ()):
            if ":" in metric:
                remedy = "choose from: " + ", ".join(METRICS[self.task])
                yield KeyedError(
                    "a metric of your own does not fit token classification yet", "metrics", str(i), remedy=remedy
                )

    def _problems_of_metrics(self) -> Iterator[KeyedError]:
        best, own = self.train.best_metric, {}
        for i, metric in enumerate(self.metrics or ()):
            keys = ("metrics", str(i))
            yield from self._problem_of_metric(metric, keys)
            if metric_name(metric) != metric:
                name = metric_name(metric)
                if name in SCALARS or name in own:
                    yield KeyedError(f"`{name}` is the name of another metric here; rename the function", *keys)
                own[name] = metric
        early = self.train.early_stopping
        chosen = {
            ("train", "best_metric"): best,
            ("train", "early_stopping", "metric"): early.metric if early else None,
        }
        for place, text in chosen.items():
            if text is None or text in own or (text == "loss" and text != best):
                continue
            if text == "confusion_matrix":
                yield KeyedError(
                    "`confusion_matrix` is a table: it has no best one; choose a metric that is a number", *place
                )
                continue
            yield from self._problem_of_metric(text, place)
            if metric_name(text) != text and own.get(metric_name(text), text) != text:
                yield KeyedError(f"`metrics` has it as `{own[metric_name(text)]}`: write both alike", *place)

    def _problem_of_metric(self, metric: str, keys: tuple[str, ...]) -> Iterator[KeyedError]:
        known = list(dict.fromkeys(m for task, ms in METRICS.items() if self.task in (task, "auto") for m in ms))
        try:
            if own_metric(metric) or metric in known:
                return
        except ValueError as error:
            yield KeyedError(str(error), *keys)
            return
        of = "" if self.task == "auto" else f" of a {self.task} task"
        yield KeyedError(unknown(metric, f"a metric{of}", known) + "; one of your own: `module:function`", *keys)

    def has_simple_models(self, task: str, splits: Collection[str]) -> bool:
        """True if simple models are trained beside a run with these splits; they label texts, not words."""
        return self.baselines and task != "token-classification" and not {"eval", "test"}.isdisjoint(splits)

    @property
    def trained(self) -> str:
        """The trained part of the model in words; empty: all of it."""
        if adapter := self.adapter:
            return f"{adapter.variant}, rank {adapter.rank}, alpha {adapter.alpha:g}, on {adapter.layers}, and the head"
        return "" if self.train.freeze is None else f"all but {self.train.frozen}"

    @property
    def metric_texts(self) -> tuple[str, ...]:
        """All metrics as the recipe writes them, with `best_metric` and that of early stopping."""
        early = self.train.early_stopping
        return metric_texts(self.metrics, self.train.best_metric, early.metric if early else None)
