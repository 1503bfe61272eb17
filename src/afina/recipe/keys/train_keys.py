"""The sections `tokens` and `train`: how texts become tokens, and how the model is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from afina.recipe.keys.loss_keys import LOSS_KEYS, parse_label_weights
from afina.recipe.keys.section import SECRET, KeyedError, KeyedErrors, Section, shown
from afina.recipe.keys.training_arguments import NOT_SHARDED, SHARDED_OPTIMIZERS, refusal
from afina.redact import looks_secret
from afina.schedule import DEFAULT_EPOCHS, Schedule
from afina.text import plural

__all__ = ["AS_RECORDED", "EarlyStopping", "Tokens", "Train", "Windows"]

#: Validation context of a recipe in a run's plan: what later versions refuse to train anew is still read.
AS_RECORDED = {"recorded": True}


def _epoch_or_steps(value: Any) -> Any:
    if value == "epoch" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"must be `epoch`, or a number of optimizer steps (1 or more), found {shown(value)}")


def _part_or_layers(value: Any) -> Any:
    if value in (None, "embeddings", "body") or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"must be `embeddings`, `body`, or a number of layers (1 or more), found {shown(value)}")


EpochOrSteps = Annotated[Literal["epoch"] | int, BeforeValidator(_epoch_or_steps)]
PartOrLayers = Annotated[Literal["embeddings", "body"] | int, BeforeValidator(_part_or_layers)]
LabelWeights = Annotated[Literal["balanced"] | dict[str, float], BeforeValidator(parse_label_weights)]


class Windows(Section):
    """A text as windows of `max_length` tokens, each with `stride` tokens of the one before; `pool` makes one row of logits of theirs.

    Not the first window's logits alone: that is `tokens.truncation: head`.
    """

    stride: Annotated[int, Field(ge=0, le=65536)] = 128
    pool: Literal["mean", "max"] = "mean"
    max_windows: Annotated[int, Field(ge=1, le=4096)] = 8


class Tokens(Section):
    """How texts become tokens. Lengths in tokens, special tokens included."""

    added_later = ("truncation", "windows")
    #: Keys that decide how batches are made, and not which tokens a text becomes.
    batching_keys: ClassVar[tuple[str, ...]] = ("batching",)

    max_length: Annotated[int, Field(ge=2, le=131072)] = 512
    truncation: Literal["head", "head+tail"] = "head"
    windows: Windows | None = None
    batching: Literal["auto", "packed", "grouped", "longest", "padded"] = "auto"

    def problems(self) -> Iterator[KeyedError]:
        if self.truncation != "head" and self.max_length < 8:
            yield KeyedError("leaves no room for both ends of a text", "max_length", remedy="set it to 8 or more")
        if self.windows is None:
            return
        if self.truncation != "head":
            remedy = "leave `tokens.truncation` out: windows read all of a text"
            yield KeyedError("has no meaning beside `tokens.windows`", "truncation", remedy=remedy)
        if self.max_length < 16 or self.windows.stride > self.max_length // 2:
            most, short = self.max_length // 2, self.max_length < 16
            problem = f"windows of {self.max_length} tokens share {self.windows.stride}: at most half of them, {most}"
            problem = f"windows of {self.max_length} tokens: they have 16 or more" if short else problem
            remedy = "raise `tokens.max_length`" if short else f"set it to {most} or less, or raise `tokens.max_length`"
            yield KeyedError(problem, "windows", "stride", remedy=remedy)

    @property
    def encoding(self) -> dict[str, Any]:
        """The keys that decide which tokens a text becomes, for digests and records."""
        return self.digested(exclude=self.batching_keys)

    @property
    def head_and_tail(self) -> tuple[int, int]:
        """Tokens kept from the beginning and from the end of a text that is too long, special tokens included.

        A quarter and three quarters: about the 128 and 382 of 510 that did best in Sun et al. 2019, "How to Fine-Tune BERT for Text
        Classification?".
        """
        head = self.max_length if self.truncation == "head" else self.max_length // 4
        return head, self.max_length - head

    @property
    def cut(self) -> str:
        """The part of a long text that is kept, in words."""
        if self.windows is not None:
            w, what = self.windows, f"{self.windows.max_windows} windows of {self.max_length} tokens"
            return f"after {what} ({w.stride} shared, {w.pool} of the logits)"
        head, tail = self.head_and_tail
        return f"to their first {head} and last {tail} tokens" if tail else f"after {head} tokens"


class EarlyStopping(Section):
    """The training ends after `patience` evaluations in a row of which none was better, by more than `min_delta`, than the best before.

    `metric` is by default the one that chooses the best checkpoint; `loss` is that of eval.
    """

    patience: Annotated[int, Field(ge=1, le=10**6)] = 2
    min_delta: Annotated[float, Field(ge=0, le=1e30)] = 0.0
    metric: str | None = None


class Train(Section):
    """How the model is trained. `batch_size` is global: examples per optimizer step over all processes."""

    added_later = (
        "loss",
        "focal_gamma",
        "class_weights",
        "pos_weight",
        "label_smoothing",
        "keep_after",
        "freeze",
        "layer_decay",
        "head_learning_rate",
        "early_stopping",
        "base_dtype",
        "sharding",
    )

    batch_size: Annotated[int, Field(ge=1, le=10**9)] = 8
    max_batch_per_device: Annotated[int, Field(ge=1, le=10**9)] | None = None
    eval_batch_size: Annotated[int, Field(ge=1, le=10**9)] | None = None
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    max_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = 5e-5
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    head_learning_rate: Annotated[float, Field(gt=0, le=1e30)] | None = None
    freeze: PartOrLayers | None = None
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
    early_stopping: EarlyStopping | None = None
    loss: Literal["cross_entropy", "focal"] | None = None
    focal_gamma: Annotated[float, Field(ge=0, le=100)] | None = None
    class_weights: LabelWeights | None = None
    pos_weight: LabelWeights | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    fast_dropout: bool = True
    onednn: bool = True
    cuda_graphs: bool = False
    sharding: Literal["none", "fsdp"] = "none"
    attention_dropout: Literal[0] | None = None
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    base_dtype: Literal["fp32", "bf16", "nf4"] = "fp32"
    compile: bool = False
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments")
    @classmethod
    def _take_effect(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if info.context != AS_RECORDED and (wrong := list(_wrong_arguments(value))):
            raise KeyedErrors(wrong)
        return value

    def problems(self) -> Iterator[KeyedError]:
        if self.epochs is not None and self.max_steps is not None:
            yield KeyedError(
                "give `epochs` or `max_steps`, not both",
                remedy="remove one of them; with --set, `train.epochs=null` beside `train.max_steps=N`",
            )
        one_of_them = "leave one of them out"
        for key in ("bf16", "fp16", "tf32") if self.precision != "auto" else ():
            if key in self.arguments:
                yield KeyedError("repeats `train.precision`", "arguments", key, remedy=one_of_them)
        if self.compile and "torch_compile" in self.arguments:
            yield KeyedError("repeats `train.compile`", "arguments", "torch_compile", remedy=one_of_them)
        if self.sharding != "none":
            yield from self._problems_of_sharding()
        if self.focal_gamma is not None and self.loss != "focal":
            yield KeyedError(
                "belongs to the focal loss", "focal_gamma", remedy="set `train.loss: focal`, or leave it out"
            )
        if self.freeze == "body" and self.layer_decay != 1:
            yield KeyedError("has no layers to act on with `freeze: body`", "layer_decay", remedy=one_of_them)
        if self.loss == "focal" and self.label_smoothing:
            yield KeyedError("has no definition for the focal loss", "label_smoothing", remedy=one_of_them)

    def _problems_of_sharding(self) -> Iterator[KeyedError]:
        off = "leave it out, or set `train.sharding: none`"
        refused: dict[str, list[Any]] = {
            "compile": [True],
            "cuda_graphs": [True],
            "precision": ["fp16"],
            "base_dtype": ["bf16", "nf4"],
        }
        for key in (key for key, values in refused.items() if getattr(self, key) in values):
            yield KeyedError(f"{shown(getattr(self, key))} was not proven with `train.sharding`", key, remedy=off)
        for key in (key for key in self.arguments if key in NOT_SHARDED):
            yield KeyedError(f"{NOT_SHARDED[key]} (`train.sharding`)", "arguments", key, remedy=off)
        if (optim := self.arguments.get("optim", SHARDED_OPTIMIZERS[0])) not in SHARDED_OPTIMIZERS:
            problem = f"{shown(optim)} was not proven with `train.sharding`"
            yield KeyedError(problem, "arguments", "optim", remedy=f"use {', '.join(SHARDED_OPTIMIZERS)}")

    @property
    def loss_keys(self) -> tuple[str, ...]:
        """The keys of the loss that the recipe uses."""
        return tuple(key for key in LOSS_KEYS if getattr(self, key) != type(self).model_fields[key].get_default())

    @property
    def frozen(self) -> str:
        """The frozen part of the model, in words."""
        return {"embeddings": "the embeddings", "body": "all weights below the head"}.get(
            str(self.freeze), f"the embeddings and the first {'layer' if self.freeze == 1 else f'{self.freeze} layers'}"
        )

    @property
    def rates_differ(self) -> bool:
        """True if some weights have a learning rate of their own."""
        return self.layer_decay != 1 or self.head_learning_rate is not None

    @property
    def num_epochs(self) -> float:
        """The number of epochs; 3 by default."""
        return self.epochs if self.epochs is not None else DEFAULT_EPOCHS

    @property
    def length(self) -> str:
        """The length of the training in words."""
        epochs = f"{self.num_epochs:g} epoch{'s' * (self.num_epochs != 1)}"
        most = epochs if self.max_steps is None else f"at most {self.max_steps:,} steps"
        if self.early_stopping is None:
            return most
        waits = plural(self.early_stopping.patience, "evaluation")
        return f"{'' if self.max_steps else 'at most '}{most}, fewer after {waits} without improvement"

    def schedule(self, rows: int, eval_rows: int) -> Schedule:
        """The steps of a run on so many rows; with early stopping the most that there may be."""
        return Schedule.of(
            rows,
            self.batch_size,
            epochs=self.num_epochs,
            max_steps=self.max_steps,
            evaluate=self.evaluate if eval_rows else None,
            save_every=self.save_every,
        )


def _wrong_arguments(arguments: Mapping[str, Any]) -> Iterator[KeyedError]:
    for key, value in arguments.items():
        if looks_secret(value) and key != "hub_token":
            yield KeyedError(SECRET[0], key, remedy=SECRET[1])
            continue
        if refused := refusal(key, value):
            yield KeyedError(refused[0], key, remedy=refused[1])
            continue
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            yield KeyedError(f"{shown(value)} is not a plain value; put it in quotes if it is text", key)
