"""The errors in a recipe, all of them, as one message: file and line (or `--set`), key, the value found, the values allowed.

Translates pydantic's errors for the user; it knows the keys from the model alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml.nodes import Node

from afina.errors import RecipeError, nearest, nearest_name
from afina.recipe.keys.section import KeyedError, KeyedErrors, shown
from afina.recipe.keys.training_arguments import FORMER, RESERVED_ARGUMENTS
from afina.recipe.yaml_source import where

__all__ = ["combined", "explain", "model_of"]

_MOST_ROUNDS = 8
_CORRECT = "correct the value; docs/recipe.md lists the keys"


def explain(
    error: ValidationError,
    model: type[BaseModel],
    root: Node | None,
    source: str,
    overridden: list[str],
    tree: Mapping[Any, Any],
) -> list[RecipeError]:
    """All errors of a recipe; the unknown keys first.

    Args:
        model: the model that was validated.
        root: the parsed YAML, for line numbers; None where there is none.
        source: the name of the file in the message.
        overridden: keys that `--set` changed.
        tree: the values that were validated, for the errors behind these.
    """
    every = sorted([*_errors(error), *_errors_behind(error, model, tree)], key=lambda e: not e.unknown)
    unknown = {e.keys for e in every if e.unknown}
    meant = {(*keys[:-1], nearest_name(keys[-1], _known_keys(model, keys[:-1]))) for keys in unknown}
    kept: dict[tuple[Any, ...], _Error] = {}
    for e in every:
        # One error a key; nothing about what an unknown key holds, nor that the key is missing that it was meant to be.
        below_unknown = not e.unknown and any(e.keys[: len(keys)] == keys for keys in unknown)
        if not below_unknown and not (e.missing and e.keys in meant):
            kept.setdefault((e.keys, str(e.cause) if isinstance(e.cause, KeyedError) else ""), e)
    return [_explain_one(e, model, root, source, overridden) for e in kept.values()]


def combined(errors: Sequence[RecipeError], source: str) -> RecipeError:
    """Several errors as one, which names each."""
    if len(errors) == 1:
        return errors[0]
    lines = [f"  {one.message}" + f"\n    {one.remedy}" * (one.remedy != _CORRECT) for one in errors]
    return RecipeError(
        "\n".join([f"{source}: {len(lines)} errors", *lines]),
        "correct them; `afina recipe keys` and docs/recipe.md list the keys",
    )


@dataclass(frozen=True)
class _Error:
    """One of pydantic's errors, with the path of its key."""

    keys: tuple[str, ...]
    details: ErrorDetails
    cause: Exception | None
    unknown: bool

    @property
    def words(self) -> str:
        """The message and remedy of an error of our own."""
        return f"{self.cause} {getattr(self.cause, 'remedy', '')}"

    @property
    def missing(self) -> bool:
        return self.details["type"] == "missing"


def _errors(error: ValidationError) -> Iterator[_Error]:
    for details in error.errors():
        keys, unknown = tuple(map(str, details["loc"])), details["type"] == "extra_forbidden"
        if keys and keys[-1] == "[key]":  # a key of a mapping whose keys are a choice
            keys, unknown = keys[:-1], True
        cause = details.get("ctx", {}).get("error")
        for each in cause.errors if isinstance(cause, KeyedErrors) else [cause]:
            below = each.keys if isinstance(each, KeyedError) else ()
            yield _Error((*keys, *below), details, each, unknown)


#: Values in place of wrong ones, so that what stands behind them is checked too.
_STAND_INS: dict[str, Any] = {
    "name": "x",
    "model": "x/x",
    "data.hub": "x/x",
    "data.text": "text",
    "data.label": "label",
}


def _errors_behind(error: ValidationError, model: type[BaseModel], tree: Mapping[Any, Any]) -> Iterator[_Error]:
    """Errors that pydantic does not reach: what does not fit together is checked only where every single value is right."""
    repaired: dict[str, Any] = copy.deepcopy(dict(tree))
    removed: set[str] = set()
    errors = list(_errors(error))
    for _ in range(_MOST_ROUNDS):
        before = len(removed)
        for e in errors:
            dotted = _remove(repaired, e.keys)
            removed |= {dotted, e.keys[-1] if e.keys else ""}
        for dotted, value in _STAND_INS.items():
            _fill(repaired, dotted.split("."), value)
        try:
            model.model_validate(repaired)
            return
        except ValidationError as behind:
            errors = [e for e in _errors(behind) if ".".join(e.keys) not in removed]
        yield from (e for e in errors if not _follows(e, removed))
        if len(removed) == before:
            return


def _follows(error: _Error, removed: Collection[str]) -> bool:
    """True if an error may only follow from a value that was removed: it names it, or is about what held it."""
    below = len(error.keys) > 1 and any(name.startswith(".".join(error.keys) + ".") for name in removed)
    return below or any(f"`{name}" in error.words for name in removed if name)


def _remove(tree: dict[str, Any], keys: Sequence[str]) -> str:
    """Remove the deepest of `keys` that is a key of a mapping; returns its path."""
    here: Any = tree
    for depth, key in enumerate(keys):
        below = here.get(key) if isinstance(here, dict) else None
        if depth + 1 == len(keys) or not isinstance(below, dict):
            if isinstance(here, dict):
                here.pop(key, None)
            return ".".join(keys[: depth + 1])
        here = below
    return ""


def _fill(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a required key that is missing."""
    here: Any = tree
    for key in keys[:-1]:
        here = here.setdefault(key, {})
        if not isinstance(here, dict):
            return
    if keys[-1] != "hub" or "files" not in here:
        here.setdefault(keys[-1], value)


def _explain_one(
    error: _Error, model: type[BaseModel], root: Node | None, source: str, overridden: list[str]
) -> RecipeError:
    keys, dotted = list(error.keys), ".".join(error.keys)
    place = where(root, source, keys, overridden)
    if error.unknown or error.missing:
        known = sorted(_known_keys(model, keys[:-1]))
        here = f"known here: {', '.join(known)}"
        if not error.unknown:
            return RecipeError(f"{place}: `{dotted}` is missing", f"add `{keys[-1]}:`; {here}")
        elsewhere = RESERVED_ARGUMENTS.get(keys[-1]) or FORMER.get(keys[-1], "") if keys[:-1] == ["train"] else ""
        hint = f"{elsewhere};" if elsewhere else nearest(keys[-1], known)
        return RecipeError(f"{place}: unknown key `{dotted}`", f"{hint + ' ' if hint else ''}{here}")
    named = "" if place == f"--set {dotted}" or not dotted else f"`{dotted}`: "
    message, remedy = _describe(error)
    return RecipeError(f"{place}: {named}{message}", remedy)


def _describe(of: _Error) -> tuple[str, str]:
    """pydantic's error as a message and a remedy."""
    error = of.details
    kind, context, given = error["type"], error.get("ctx", {}), shown(error["input"])
    remedy = _CORRECT
    if kind == "value_error":
        return str(of.cause), (of.cause.remedy if isinstance(of.cause, KeyedError) else "") or remedy
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"must be one of {', '.join(choices)}, found {given}", nearest(str(error["input"]), choices) or remedy
    if kind == "string_type" and isinstance(error["input"], int | float):
        return f"must be text, found the number {given}", f"put it in quotes, also for --set: \"'{error['input']}'\""
    limit = next((context[k] for k in ("gt", "ge", "lt", "le") if k in context), None)
    for kinds, message in _KINDS.items():
        if kind in kinds:
            return f"{message.format(f'{limit:g}' if isinstance(limit, float) else limit)}, found {given}", remedy
    return f"is not usable: {error['msg']}, found {given}", remedy


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


def _known_keys(model: type[BaseModel], keys: Sequence[str]) -> Iterator[str]:
    if list(keys) == ["data", "files"]:
        return iter(("all", "train", "eval", "test"))
    for key in keys:
        field = model.model_fields.get(key)
        below = model_of(field.annotation) if field else None
        if below is None:
            break
        model = below
    return iter(model.model_fields)


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model inside a field's annotation, if it holds one."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if (model := model_of(inner)) is not None:
            return model
    return None
