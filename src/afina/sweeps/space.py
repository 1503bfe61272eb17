"""The space of a search: a range or a list of choices for each key of the recipe. Pure; Optuna is not imported here.

    train.learning_rate=1e-6..1e-4:log     a number between, evenly in its logarithm
    train.epochs=1..5                      bounds written as whole numbers: only whole numbers between
    tokens.batching=packed,grouped         one of these

Keys that decide what is prepared (the data, the model, `tokens.max_length`) are not searched: all trials share the prepared
data, and compute nodes have no network to fetch another. A grid varies them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from afina.errors import InputError
from afina.frozen import FrozenModel
from afina.recipe.keys.train_keys import Tokens
from afina.sweeps.grid import key_values, refuse_keys, split_values, texts_of

__all__ = ["ChoiceList", "Range", "Space", "corners", "parse_search", "space_of", "value_text"]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*(?::\s*(\w+)\s*)?")
#: Sections and keys of a recipe that decide what is prepared.
_PREPARED = (
    "data",
    "model",
    "revision",
    "task",
    "trust_remote_code",
    *(f"tokens.{name}" for name in Tokens.model_fields if name not in Tokens.batching_keys),
)
_EXAMPLE = "for example train.learning_rate=1e-6..1e-4:log, train.epochs=1..5 or tokens.batching=packed,grouped"


class Range(FrozenModel):
    """Numbers from `low` to `high`, both included; `whole` numbers only, or evenly in the logarithm (`log`)."""

    kind: Literal["range"] = "range"
    low: float
    high: float
    log: bool = False
    whole: bool = False


class ChoiceList(FrozenModel):
    """One of these values, as YAML text."""

    kind: Literal["choices"] = "choices"
    values: tuple[str, ...]


Space = dict[str, Annotated[Range | ChoiceList, Field(discriminator="kind")]]


def parse_search(given: Sequence[str], overrides: Sequence[str] = ()) -> Space:
    """`--search key=…` each.

    Raises:
        InputError: not of that form, a range that is empty, a key that is not searched.
    """
    pairs = key_values("--search", given, "key.sub=LOW..HIGH or key.sub=A,B", _EXAMPLE)
    return _checked({key: _domain(key, text) for key, text in pairs.items()}, overrides)


def space_of(given: Mapping[str, str | Sequence[Any]], overrides: Sequence[str] = ()) -> Space:
    """The space of the Python API: `{"train.learning_rate": "1e-6..1e-4:log", "tokens.batching": ["packed", "grouped"]}`."""
    space = {
        key: _domain(key, domain) if isinstance(domain, str) else _choices(key, texts_of(f"search[{key!r}]", domain))
        for key, domain in given.items()
    }
    return _checked(space, overrides)


def corners(space: Space) -> list[tuple[str, ...]]:
    """Overrides that use each end of every range and every choice once, to refuse a wrong one before anything is queued."""
    ends = {
        key: domain.values
        if isinstance(domain, ChoiceList)
        else (value_text(domain, domain.low), value_text(domain, domain.high))
        for key, domain in space.items()
    }
    most = max(len(values) for values in ends.values())
    return [
        tuple(f"{key}={values[min(number, len(values) - 1)]}" for key, values in ends.items()) for number in range(most)
    ]


def value_text(domain: Range | ChoiceList, value: Any) -> str:
    """A chosen value, as `--set` takes it."""
    if isinstance(domain, ChoiceList):
        return str(value)
    return str(int(value)) if domain.whole else json.dumps(float(value))


def _domain(key: str, text: str) -> Range | ChoiceList:
    match = _RANGE.fullmatch(text)
    if match is None:
        if re.fullmatch(r"[^,'\"\[{]*\.\.[^,]*", text):
            raise InputError(
                f"--search {key}: {text.strip()!r} is not a range: LOW..HIGH or LOW..HIGH:log with numbers", _EXAMPLE
            )
        return _choices(key, split_values(text))
    low, high, how = match.groups()
    if how not in (None, "log", "linear"):
        raise InputError(f"--search {key}: `:{how}` is not known", "`:log`, `:linear` (as without)")
    whole = all(re.fullmatch(r"[+-]?\d+", end) for end in (low, high))
    if not (math.isfinite(float(low)) and math.isfinite(float(high)) and float(low) < float(high)):
        raise InputError(f"--search {key}: {low}..{high} is not a range", "the lower bound stands first: LOW..HIGH")
    if how == "log" and float(low) <= 0:
        raise InputError(f"--search {key}: {low} has no logarithm", "begin a `:log` range above 0")
    return Range(low=float(low), high=float(high), log=how == "log", whole=whole)


def _choices(key: str, values: Sequence[str]) -> ChoiceList:
    if not all(values):
        raise InputError(f"--search {key}: a choice is empty", _EXAMPLE)
    if len(values) < 2:
        raise InputError(f"--search {key}: with {len(values)} choice there is nothing to search", _EXAMPLE)
    for value in values:
        if list(values).count(value) > 1:
            raise InputError(f"--search {key}: {value} is given twice", "keep one of the two")
    return ChoiceList(values=tuple(values))


def _checked(space: Space, overrides: Sequence[str]) -> Space:
    if not space:
        raise InputError("--search: no key is given", _EXAMPLE)
    refuse_keys("--search", list(space), overrides)
    for key in space:
        if not all(key.split(".")):
            raise InputError(f"--search {key}: is not a key", _EXAMPLE)
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _PREPARED):
            raise InputError(
                f"--search {key}: decides what is prepared, and all trials share the prepared data",
                f"vary it with a grid: --grid {key}=A,B",
            )
        if key == "train.seed":
            raise InputError(
                "--search train.seed: a seed is not better than another", "--grid … --seeds 5 shows the spread"
            )
    return space
