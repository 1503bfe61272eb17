"""The cells of a sweep: which values with which seeds, in which order and under which names. Pure: text in, recipes out.

A cell is one run: a point of the grid (one value for each key) with one seed. Its values are kept as `--set` takes them, so
that every cell can be run by hand. The order is that of the command line, the last key turning fastest, the seeds within a
point: a grid that grows at its end keeps the order of its earlier cells.

Not covered: the disk is not read; the prepare stage decides whether two spellings prepare the same data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afina.errors import InputError, RecipeError
from afina.recipe.parse import parse_recipes
from afina.recipe.schema import Recipe

__all__ = [
    "Cell",
    "expand_folds",
    "expand_sweep",
    "grid_of",
    "key_values",
    "parse_grid",
    "parse_seeds",
    "point_name",
    "refuse_keys",
    "split_values",
    "texts_of",
]

#: More runs than this are taken for a typing error.
_MOST = 10_000
_SEED_LIMIT = 2**32

#: What a sweep does not vary, and where to set it instead.
_NOT_VARIED: dict[str, str] = {
    "name": "leave it out: a cell is named by its values",
    "resources": "it changes nothing that is trained: give it to the whole sweep with --nodes, --gpus-per-node, --time or --set",
    **dict.fromkeys(
        ("baselines", "decisions", "trackers"),
        "it changes nothing that is trained, and no score in the table: give it to the whole sweep with --set",
    ),
    "data.fold": "folds are no settings to choose from: --folds",
}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder: the point, a comma, `seed=<n>`.
        point: the values without the seed; the cells of one point differ in nothing else.
        seed: `train.seed`.
        overrides: `key=value` each, as `--set` takes them; the seed last.
        recipe: what is trained.
        fold: its number, counted over all repeats.
    """

    name: str
    point: str
    seed: int
    overrides: tuple[str, ...]
    recipe: Recipe
    fold: int | None = None


def split_values(text: str) -> list[str]:
    """Split at commas that stand in no quotes and no brackets: `a,"b,c",[1,2]` are three values."""
    values, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not text[start:at].strip(" [{,"):
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            values.append(text[start:at])
            start = at + 1
    return [value.strip() for value in [*values, text[start:]]]


def parse_grid(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`--grid key=value,value` each, to the values of each key as text.

    Raises:
        InputError: not of that form, a key twice, an empty value.
    """
    pairs = key_values("--grid", given, "key.sub=value,value", "for example --grid train.learning_rate=1e-5,3e-5,5e-5")
    return _checked({key: tuple(split_values(text)) for key, text in pairs.items()})


def key_values(option: str, words: Sequence[str], form: str, example: str) -> dict[str, str]:
    """`key=text` each, of an option that is given once for each key.

    Raises:
        InputError: not of that form, or a key twice.
    """
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"{option} {word}: not of the form {form}", example)
        if key in pairs:
            raise InputError(f"{option} {key}: is given twice", f"give all its values at once: {option} {key}=A,B,C")
        pairs[key] = text
    return pairs


def grid_of(values: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, ...]]:
    """The grid of the Python API, `{"train.learning_rate": [1e-5, 3e-5]}`, as text.

    Raises:
        InputError: as `parse_grid`, and for values that are not plain.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for key, listed in values.items():
        grid[key] = texts_of(f"grid[{key!r}]", listed)
    return _checked(grid)


def texts_of(name: str, values: Any) -> tuple[str, ...]:
    """Values of Python, numpy's scalars among them (`numpy.logspace`), as `--set` takes them.

    Raises:
        InputError: no list, or values that are not plain; `name` is the argument's.
    """
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise InputError(f"{name}: must be a list of values, found {values!r}", "for example [1e-5, 3e-5]")
    plain = [value.item() if hasattr(value, "item") and not isinstance(value, str) else value for value in values]
    try:
        return tuple(json.dumps(value, allow_nan=False, ensure_ascii=False) for value in plain)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}", "values are numbers, text, lists or true and false") from None


def parse_seeds(given: str | int | Sequence[int], first: int) -> tuple[int, ...]:
    """`5` is five seeds from the recipe's own (`first`) on; `1,2,7` are these.

    Raises:
        InputError: none, one twice, or not a seed.
    """
    remedy = "for example --seeds 5 (the recipe's seed and the next four) or --seeds 1,2,7"
    if isinstance(given, str):
        words = given.split(",")
        if words[-1].strip() == "" and len(words) > 1:  # `7,` is the one seed 7
            words.pop()
        if not all(re.fullmatch(r"\s*[0-9]{1,10}\s*", word) for word in words):
            raise InputError(f"--seeds {given}: must be a number of seeds, or a list of seeds", remedy)
        listed = tuple(int(word) for word in words) if "," in given else int(given)
    else:
        listed = given if isinstance(given, int) else tuple(given)
    if isinstance(listed, int) and not isinstance(listed, bool):
        seeds: tuple[int, ...] = tuple(range(first, first + max(0, min(listed, _MOST + 1))))
    else:
        seeds = tuple(listed) if not isinstance(listed, bool) else ()
    if not seeds:
        raise InputError(f"--seeds {given}: at least one seed is needed", remedy)
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEED_LIMIT:
            raise InputError(f"--seeds {given}: {seed!r} is not a seed: 0 to {_SEED_LIMIT - 1}", remedy)
        if seeds.count(seed) > 1:
            raise InputError(f"--seeds {given}: {seed} is given twice", "the same seed is the same run: keep one")
    return seeds


def expand_sweep(
    text: str,
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    *,
    source: str = "recipe",
) -> list[Cell]:
    """Every point of the grid with every seed, in order, each as a whole recipe.

    Args:
        text: the recipe as its file has it.
        overrides: `--set` of the whole sweep.
        grid: the values of each key, as text.
        source: what messages call the recipe.

    Raises:
        RecipeError: a key that is unknown, a value that does not fit (with the cell's name), two equal cells.
        InputError: too many cells, or a key that is not varied.
    """
    refuse_keys("--grid", list(grid), overrides)
    count = len(seeds) * math.prod(len(values) for values in grid.values())
    if count > _MOST:
        raise InputError(f"this sweep would be {count} runs; at most {_MOST}", "fewer values or seeds; or --search")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = _unique([point_name(point) for point in points], points)
    drafts = [
        (
            f"{name},seed={seed}" if name else f"seed={seed}",
            name,
            seed,
            (*(f"{k}={v}" for k, v in point.items()), f"train.seed={seed}"),
        )
        for name, point in zip(names, points, strict=True)
        for seed in seeds
    ]
    recipes = parse_recipes(text, ([*overrides, *words] for *_, words in drafts), source=source)
    cells: list[Cell] = []
    cell_of: dict[str, str] = {}
    for name, point, seed, words in drafts:
        try:
            recipe = next(recipes)
        except RecipeError as error:
            message = error.message.replace("--set ", "--grid ") if grid else error.message
            raise RecipeError(f"cell {name}: {message}" if grid else message, error.remedy) from None
        same = json.dumps(recipe.model_dump(mode="json", exclude={"name", "resources"}), sort_keys=True)
        if same in cell_of:
            raise RecipeError(
                f"--grid: the cells {cell_of[same]} and {name} are the same run", "keep one of the two values"
            )
        cell_of[same] = name
        cells.append(Cell(name, point, seed, words, recipe))
    return cells


def expand_folds(
    text: str, overrides: Sequence[str], folds: int, repeats: int, *, source: str = "recipe"
) -> list[Cell]:
    """Every fold of every repeat, in order, each as a whole recipe with `data.fold`.

    Raises:
        RecipeError: the recipe is wrong, or is of one fold already.
        InputError: fewer than two folds, or too many runs.
    """
    if folds < 2 or repeats < 1:
        raise InputError(
            f"--folds {folds} --repeats {repeats}: at least 2 folds, once", "for example --folds 5 --repeats 2"
        )
    if folds * repeats > _MOST:
        raise InputError(f"this sweep would be {folds * repeats} runs; at most {_MOST}", "fewer folds or repeats")
    _refuse_given_twice("--folds", ["data.fold"], overrides)
    numbered = [(repeat, number) for repeat in range(1, repeats + 1) for number in range(1, folds + 1)]
    words = [
        (f"data.fold.of={folds}", f"data.fold.number={number}", f"data.fold.repeat={repeat}")
        for repeat, number in numbered
    ]
    recipes = parse_recipes(text, ([*overrides, *some] for some in words), source=source)
    return [
        Cell(f"repeat={repeat},fold={number}", f"{folds} folds", recipe.train.seed, some, recipe, at)
        for at, ((repeat, number), some, recipe) in enumerate(zip(numbered, words, recipes, strict=True), start=1)
    ]


def point_name(values: Mapping[str, str]) -> str:
    """`learning_rate=3e-5,batch_size=16`: the last part of each key, or as many parts as make it unique.

    The name is a folder's: characters that trouble a shell or a file system become underscores.
    """
    keys = list(values)

    def label(key: str) -> str:
        parts = key.split(".")
        for depth in range(1, len(parts)):
            short = ".".join(parts[-depth:])
            if not any(other != key and f".{other}".endswith(f".{short}") for other in keys):
                return short
        return key

    return ",".join(f"{_slug(label(key))}={_slug(_unquoted(value))}" for key, value in values.items())


def refuse_keys(option: str, keys: Sequence[str], overrides: Sequence[str]) -> None:
    """Refuse keys that cannot be varied, or are set twice.

    Raises:
        InputError: with where to set it instead.
    """
    for key in keys:
        fixed = next((name for name in _NOT_VARIED if f"{key}.".startswith(f"{name}.")), None)
        if fixed is not None:
            raise InputError(f"{option} {key}: is not part of a sweep", _NOT_VARIED[fixed])
    _refuse_given_twice(option, keys, overrides)


def _refuse_given_twice(option: str, keys: Sequence[str], overrides: Sequence[str]) -> None:
    given = {word.partition("=")[0].strip() for word in overrides}
    for key in keys:
        for other in [k for k in keys if k != key] + sorted(given):
            if key == other or other.startswith(f"{key}.") or (key.startswith(f"{other}.") and other not in given):
                how = "--set" if other in given else option
                raise InputError(f"{option} {key}: is also given by {how} {other}", "keep one of the two")


def _checked(grid: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    for key, values in grid.items():
        if not all(key.split(".")) or not key.strip():
            raise InputError(f"--grid {key}: is not a key", "for example train.learning_rate")
        if not values or not all(values):
            raise InputError(
                f"--grid {key}: {'a value is empty' if any(values) else 'no value is given'}",
                f"for example --grid {key}=A,B,C; an empty text is written '\"\"'",
            )
    return grid


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _slug(text: str, most: int = 40) -> str:
    plain = re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_") or "_"
    return plain[:most]


def _unique(names: list[str], points: Sequence[Mapping[str, str]]) -> list[str]:
    """Names that differ and are short enough for a file system; a digest is added where needed."""
    shortened = [name[:120] for name in names]
    return [
        f"{short}-{hashlib.sha256(json.dumps(point).encode()).hexdigest()[:6]}"
        if short != name or shortened.count(short) > 1
        else name
        for short, name, point in zip(shortened, names, points, strict=True)
    ]
