"""Reads a recipe: a YAML file, overridden with `--set`, validated and frozen."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml.nodes import Node

from afina.errors import InputError, RecipeError, check_argument, check_overrides, nearest
from afina.formats.read_options import format_of
from afina.recipe.explain import combined, explain
from afina.recipe.keys.data_keys import Data
from afina.recipe.keys.section import shown
from afina.recipe.plausible import implausible
from afina.recipe.schema import Recipe
from afina.recipe.yaml_source import apply_override, read_yaml, where

__all__ = ["any_recipe", "load_recipe", "parse_recipe", "parse_recipes", "read_recipe"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: a YAML file.
        overrides: `key.sub=value` each, the value read as YAML.

    Raises:
        RecipeError: with the file, the line, the value found and those allowed.
    """
    check_argument("path", path, (str, Path), "a path", required=True)
    check_overrides(overrides)
    return parse_recipe(read_recipe(path), overrides, source=str(Path(path))).read_from(Path(path))


def any_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, in a mapping of its keys, or one that was made before; with overrides.

    Raises:
        RecipeError: as `load_recipe`.
        InputError: nothing of the three.
    """
    if isinstance(recipe, Recipe):
        # Checked again, with unknown keys: `model_copy(update=…)` takes anything.
        values = {**vars(recipe), **recipe.model_dump(mode="json", warnings=False)}
        if isinstance(recipe.data, Data) and not recipe.data.chooses_rows:  # an override may make it do so
            del values["data"]["split_by"]
        checked = _validated(values, overrides, None, "recipe").read_from(recipe.file)
        return recipe if not overrides and dict(checked) == dict(recipe) else checked
    if isinstance(recipe, Mapping):
        return _validated(recipe, overrides, None, "recipe")
    if not isinstance(recipe, str | Path):
        raise InputError(f"recipe: must be a path, a mapping or a Recipe, found {shown(recipe)}", "give one of them")
    return load_recipe(recipe, overrides)


def read_recipe(path: str | Path) -> str:
    """The text of a recipe's file.

    Raises:
        RecipeError: it cannot be read, or is a file of data; with the nearest name where it does not exist.
    """
    file = Path(path)
    try:
        if file.is_file() and format_of(file) not in (None, "json", "txt"):
            remedy = (
                f"give the path of a YAML recipe; one for these data: afina init FOLDER --data {shlex.quote(str(file))}"
            )
            raise RecipeError(f"recipe {file}: is a file of data", remedy)
        return file.read_text(encoding="utf-8")
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


def parse_recipe(text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """As `load_recipe`, from text; `source` names it in messages."""
    return next(parse_recipes(text, [overrides], source=source))


def parse_recipes(text: str, many: Iterable[Sequence[str]], *, source: str = "recipe") -> Iterator[Recipe]:
    """As `parse_recipe`, once for each of several lists of overrides; the text is read once."""
    node, tree = read_yaml(text, source)
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{source}: {'is empty' if tree is None else f'a recipe is a mapping of keys, found {shown(tree)}'}",
            "start from slurm/recipes/yelp.yaml",
        )
    for overrides in many:
        yield _validated(tree, overrides, node, source)


def _validated(tree: Mapping[Any, Any], overrides: Sequence[str], node: Node | None, source: str) -> Recipe:
    changed = dict(tree)  # an override copies the mappings that it changes below this one
    errors: list[RecipeError] = []
    overridden: list[str] = []
    for override in overrides:
        try:
            apply_override(changed, override)
            overridden.append(override.partition("=")[0].strip())
        except RecipeError as error:
            errors.append(error)
    try:
        recipe = _divided_by_text(Recipe.model_validate(changed))
        recipe._warnings = tuple(
            f"{where(node, source, key.split('.'), overridden)}: `{key}`: {problem}"
            for key, problem in implausible(recipe)
        )
    except ValidationError as error:
        errors += explain(error, Recipe, node, source, overridden, changed)
    except RecursionError:
        raise RecipeError(f"{source}: a YAML alias (*) contains itself", "write the value out") from None
    if errors:
        raise combined(errors, source)
    return recipe


def _divided_by_text(recipe: Recipe) -> Recipe:
    """The default of `data.split_by` for recipes; plans that were made before the key existed keep theirs."""
    data = recipe.data
    if "split_by" in data.model_fields_set or not data.chooses_rows:
        return recipe
    return recipe.model_copy(update={"data": data.model_copy(update={"split_by": "text"})})
