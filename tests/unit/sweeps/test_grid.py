"""From words on the command line to cells: order, names, seeds, spaces of a search, and what is refused with which words."""

from __future__ import annotations

import json
import re

import pytest
from tests.unit.conftest import recipe_dict

from afina.errors import InputError, RecipeError
from afina.recipe.keys.train_keys import Tokens, Windows
from afina.sweeps.grid import Cell, expand_sweep, grid_of, parse_grid, parse_seeds, point_name, split_values
from afina.sweeps.space import ChoiceList, Range, corners, parse_search, space_of, value_text

TEXT = json.dumps(recipe_dict())
#: Keys of `tokens` that decide which tokens a text becomes.
ENCODED = Tokens(truncation="head+tail").encoding | Tokens(windows=Windows()).encoding


def cells(*grid: str, seeds: tuple[int, ...] = (1,), overrides: tuple[str, ...] = ()) -> list[Cell]:
    return expand_sweep(TEXT, overrides, parse_grid(grid), seeds, source="recipe.yaml")


def test_every_value_meets_every_seed_in_the_order_of_the_command_line() -> None:
    found = cells("train.learning_rate=5e-5,1e-5", "tokens.batching=packed,padded", seeds=(1, 2))
    assert [cell.name for cell in found] == [
        f"learning_rate={rate},batching={batching},seed={seed}"
        for rate in ("5e-5", "1e-5")
        for batching in ("packed", "padded")
        for seed in (1, 2)
    ]
    cell = found[-1]
    assert cell.overrides == ("train.learning_rate=1e-5", "tokens.batching=padded", "train.seed=2")
    assert (cell.point, cell.seed) == ("learning_rate=1e-5,batching=padded", 2)
    assert (cell.recipe.train.learning_rate, cell.recipe.tokens.batching, cell.recipe.train.seed) == (1e-5, "padded", 2)
    # What is not in the grid stays as the recipe has it, in every cell.
    assert {cell.recipe.train.arguments["weight_decay"] for cell in found} == {0.01}


def test_overrides_of_the_whole_sweep_are_in_every_cell() -> None:
    found = cells("train.arguments.weight_decay=0,0.1", overrides=("train.arguments.warmup_steps=10",))
    assert [cell.recipe.train.arguments for cell in found] == [
        {"weight_decay": 0, "warmup_steps": 10},
        {"weight_decay": 0.1, "warmup_steps": 10},
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-5,3e-5", ["1e-5", "3e-5"]),
        ("a", ["a"]),
        ("'a,b',\"c,d\" , e", ["'a,b'", '"c,d"', "e"]),
        ("[1,2],[3],{a: 1, b: 2}", ["[1,2]", "[3]", "{a: 1, b: 2}"]),
        ("it's,that's", ["it's", "that's"]),
        ("a,,b", ["a", "", "b"]),
        ("", [""]),
    ],
)
def test_values_are_split_at_commas_outside_quotes_and_brackets(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_names_are_safe_short_and_different(nasty: str) -> None:
    long = "x" * 300
    grid = {"data.text": [json.dumps(nasty), json.dumps(nasty + "!"), json.dumps(long + "a"), json.dumps(long + "b")]}
    found = expand_sweep(TEXT, (), grid, (7,), source="r")
    names = [cell.name for cell in found]
    assert len(set(names)) == 4 and len({cell.point for cell in found}) == 4
    assert all(re.fullmatch(r"text=[A-Za-z0-9.+_-]+,seed=7", name) and len(name) < 150 for name in names), names
    assert [cell.recipe.data.text[0] for cell in found] == [nasty, nasty + "!", long + "a", long + "b"]


def test_a_name_takes_as_much_of_the_key_as_tells_it_from_the_others() -> None:
    assert point_name({"train.seed": "1", "data.train.seed": "2"}) == "train.seed=1,data.train.seed=2"
    assert point_name({"tokens.max_length": "64", "train.learning_rate": "1e-5"}) == "max_length=64,learning_rate=1e-5"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["train.learning_rate"], "--grid train.learning_rate: not of the form"),
        (["=1,2"], "not of the form"),
        (["train.learning_rate="], "no value is given"),
        (["train.learning_rate=1,,2"], "a value is empty"),
        (["train.seed=1", "train.seed=2"], "--grid train.seed: is given twice"),
        (["train..x=1"], "is not a key"),
        (["name=a,b"], "is not part of a sweep"),
        (["resources.time=1,2"], "is not part of a sweep"),
        (["decisions.thresholds=none,f1"], "--grid decisions.thresholds: is not part of a sweep"),
        (["data.fold.number=1,2"], "--grid data.fold.number: is not part of a sweep"),
        (["train.arguments={a: 1},{a: 2}", "train.arguments.a=1,2"], "is also given by --grid"),
    ],
)
def test_a_wrong_grid_is_refused(grid: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        cells(*grid)
    assert message in caught.value.message and caught.value.remedy and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("grid", "message", "remedy"),
    [
        ("train.learning_rat=1,2", "cell learning_rat=1,seed=1: --grid train.learning_rat: unknown key", "did you mean `learning_rate`?"),
        ("train.learning_rate=1e-5,abc", "cell learning_rate=abc,seed=1: --grid train.learning_rate: must be a number, found 'abc'", "docs/recipe.md"),
        ("train.epochs=1,0", "cell epochs=0,seed=1: --grid train.epochs: must be more than 0", "docs/recipe.md"),
        ("train.learning_rate=1e-5,0.00001", "the cells learning_rate=1e-5,seed=1 and learning_rate=0.00001,seed=1 are the same run", "keep one"),
        ("train.batch_size=8,8", "are the same run", "keep one"),
    ],
)  # fmt: skip
def test_a_wrong_cell_is_named(grid: str, message: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        cells(grid)
    assert message in caught.value.message and remedy in caught.value.remedy


def test_a_key_that_set_gives_too_is_refused() -> None:
    with pytest.raises(InputError, match="is also given by --set"):
        cells("train.learning_rate=1,2", overrides=("train.learning_rate=3",))


def test_a_slip_of_the_keyboard_is_no_sweep() -> None:
    with pytest.raises(InputError, match="would be 20000 runs"):
        cells("train.epochs=1,2", seeds=tuple(range(10_000)))


def test_the_grid_of_the_python_api_is_the_same_grid() -> None:
    numpy = pytest.importorskip("numpy")
    values = {
        "train.learning_rate": [1e-5, 3e-5],
        "tokens.batching": ("packed",),
        "train.epochs": numpy.array([1.0, 2.5]),
    }
    given = grid_of(values)
    assert given["train.epochs"] == ("1.0", "2.5")
    found = expand_sweep(TEXT, (), given, (1,))
    assert [cell.recipe.train.learning_rate for cell in found] == [1e-5, 1e-5, 3e-5, 3e-5]
    assert found[0].name == "learning_rate=1e-05,batching=packed,epochs=1.0,seed=1"
    for wrong in ({"a": "1,2"}, {"a": 3}, {"a": []}, {"a": [float("nan")]}, {"a": [object()]}):
        with pytest.raises(InputError):
            grid_of(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "seeds"),
    [(3, (42, 43, 44)), ("2", (42, 43)), ("1,2,7", (1, 2, 7)), ("7,", (7,)), ([5, 1], (5, 1)), (" 3 , 4 ", (3, 4))],
)
def test_seeds(given: object, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(given, 42) == seeds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [0, "0", -1, "-1", "", "a", "1,a", "1,1", "1.5", [], [1, 1], [-1], [2**32], True, [True]]
)
def test_wrong_seeds_are_refused(given: object) -> None:
    with pytest.raises(InputError, match="--seeds") as caught:
        parse_seeds(given, 42)  # type: ignore[arg-type]
    assert caught.value.remedy


def test_a_space_is_ranges_and_choices() -> None:
    space = parse_search(
        ["train.learning_rate=1e-6..1e-4:log", "train.epochs=1..5", "train.arguments.weight_decay=0.0..0.1", "tokens.batching=packed,padded"]
    )  # fmt: skip
    assert space == {
        "train.learning_rate": Range(low=1e-6, high=1e-4, log=True),
        "train.epochs": Range(low=1, high=5, whole=True),
        "train.arguments.weight_decay": Range(low=0, high=0.1),
        "tokens.batching": ChoiceList(values=("packed", "padded")),
    }
    assert corners(space) == [
        ("train.learning_rate=1e-06", "train.epochs=1", "train.arguments.weight_decay=0.0", "tokens.batching=packed"),
        ("train.learning_rate=0.0001", "train.epochs=5", "train.arguments.weight_decay=0.1", "tokens.batching=padded"),
    ]
    assert value_text(space["train.epochs"], 3.0) == "3"
    same = space_of({"train.epochs": "1..5", "tokens.batching": ["packed", "padded"]})
    assert same["train.epochs"] == space["train.epochs"]
    assert same["tokens.batching"] == ChoiceList(values=('"packed"', '"padded"'))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.learning_rate", "not of the form"),
        ("train.learning_rate=1e-4..1e-6", "is not a range"),
        ("train.learning_rate=1..1", "is not a range"),
        ("train.learning_rate=0..1:log", "has no logarithm"),
        ("train.learning_rate=1..2:cubic", "`:cubic` is not known"),
        ("train.learning_rate=a..b", "is not a range"),
        ("train.learning_rate=1e999..2e999", "is not a range"),
        ("train.learning_rate=1e-5", "nothing to search"),
        ("train.learning_rate=1,,2", "a choice is empty"),
        ("tokens.batching=packed,packed", "is given twice"),
        *((f"tokens.{name}=32..64", "decides what is prepared") for name in ENCODED),
        ("tokens.windows.pool=mean,max", "decides what is prepared"),
        ("data.label=a,b", "decides what is prepared"),
        ("train.seed=1..9", "a seed is not better than another"),
        ("resources.time=1..9", "is not part of a sweep"),
    ],
)
def test_a_wrong_space_is_refused(word: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_search([word])
    assert message in caught.value.message and caught.value.remedy


def test_a_key_is_searched_once() -> None:
    with pytest.raises(InputError, match="given twice"):
        parse_search(["train.epochs=1..2", "train.epochs=1..3"])
    with pytest.raises(InputError, match="also given by --set"):
        parse_search(["train.epochs=1..2"], ["train.epochs=1"])
