"""A recipe as text: YAML, and `--set`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.recipe.refusals import BASE, refused

from afina.recipe.parse import parse_recipe
from afina.recipe.schema import Recipe

# -- YAML --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "read"),
    [
        *((f"a: {text}", text) for text in ("12:30:00", "yes", "no", "on")),
        *((f"a: {text}", None) for text in ("null", "~", "")),
        *(("a: 1e-4", 1e-4), ("a: 3E-5", 3e-5), ("a: true", True), ("a: 'quoted'", "quoted")),
        *(("a: 010", 10), ("a: 1_000", 1000), ("a: 0x10", 16)),
    ],
)
def test_yaml_reads_what_is_written(line: str, read: Any) -> None:
    arguments = parse_recipe(BASE + f"  arguments:\n    {line}\n").train.arguments
    assert arguments == {"a": read} and type(arguments["a"]) is type(read)


def test_yes_and_no_are_column_and_label_names() -> None:
    r = parse_recipe(BASE.replace("label: stars", "label: on\n  labels: [yes, no, 1, 2.5]"))
    assert (r.data.label, r.data.labels) == (("on",), ("yes", "no", "1", "2.5"))


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", "", "is empty"),
        ("# only a comment\n", "", "is empty"),
        ("- a\n- b\n", "", "a mapping of keys, found ['a', 'b']"),
        ("just text\n", "", "a mapping of keys, found 'just text'"),
        (BASE + "name: again\n", ":9", "key `name` is there already"),
        (BASE + "  batch_size: 9\n", ":9", "key `batch_size` is there already"),
        (BASE + "data:\n  text: x\n", ":9", "key `data` is there already"),
        (BASE + "train: {epochs: 1}\n", ":9", "key `train` is there already"),
        ("name: a\n\tmodel: b\n", ":2", "not valid YAML"),
        (BASE + "metrics: [accuracy\n", ":10", "not valid YAML"),
        (BASE + "metrics: *missing\n", ":9", "undefined alias"),
        (BASE + "metrics: !!python/name:os.system x\n", ":9", "not valid YAML"),
        (BASE + "---\nname: second\n", ":9", "not valid YAML"),
        (BASE + "revision: a\x07b\n", ":9", "not valid YAML"),
        ("[" * 3000, "", "nested too deeply"),
        (BASE + "3: 4\n", ":9", "`3`: is a key that is not text"),
        ("name: &a [*a]\n", "", "contains itself"),
    ],
)
def test_broken_files_are_refused_with_their_line(text: str, line: str, what: str) -> None:
    message = refused(text).message
    assert message.startswith(f"r.yaml{line}: ") and what in message


def test_a_byte_order_mark_is_no_key() -> None:
    assert parse_recipe("\ufeff" + BASE).name == "stars"


def test_an_alias_is_overridden_in_one_place_only() -> None:
    text = BASE.replace("  text:", "  train: &part {sample: 5}\n  eval: *part\n  text:")
    r = parse_recipe(text, ["data.train.sample=9"])
    assert (r.data.train.sample, r.data.eval.sample) == (9, 5)


# -- --set -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("train.learning_rate=3e-5", lambda r: r.train.learning_rate, 3e-5),
        ("train.learning_rate=1.e-4", lambda r: r.train.learning_rate, 1e-4),
        (" train.learning_rate = 3E-5 ", lambda r: r.train.learning_rate, 3e-5),
        ("train.epochs=0.5", lambda r: r.train.epochs, 0.5),
        ("train.epochs=", lambda r: r.train.epochs, None),
        ("train.arguments={weight_decay: 0.1, warmup_steps: 0.06}", lambda r: r.train.arguments["warmup_steps"], 0.06),
        ("train.arguments.weight_decay=1e-2", lambda r: r.train.arguments, {"weight_decay": 0.01}),
        ("data.text=[premise, hypothesis]", lambda r: r.data.text, ("premise", "hypothesis")),
        ("data.files.all=[a.csv, 'b c.csv']", lambda r: r.data.files["all"], ("a.csv", "b c.csv")),
        ("data.files.all=a=b.csv", lambda r: r.data.files["all"], ("a=b.csv",)),
        ("resources.time=12:30:00", lambda r: r.resources.time, 750),
        ("tokens.max_length=64", lambda r: r.tokens.max_length, 64),
        ("metrics=accuracy", lambda r: r.metrics, ("accuracy",)),
        ("data.labels=[' a ', b]", lambda r: r.data.labels, ("a", "b")),
        ("data.test.sample=5", lambda r: r.data.test.sample, 5),
        ('name="a: b"', lambda r: r.name, "a: b"),
        ("name='$(touch x)'", lambda r: r.name, "$(touch x)"),
    ],
)
def test_overrides(override: str, get: Callable[[Recipe], Any], value: Any) -> None:
    assert get(parse_recipe(BASE, [override])) == value


def test_the_last_override_wins() -> None:
    assert parse_recipe(BASE, ["train.seed=1", "train.seed=2"]).train.seed == 2
    assert parse_recipe(BASE, ["train={seed: 1}", "train.epochs=2"]).train.seed == 1


@pytest.mark.parametrize("override", ["nonsense", "=3", "train..seed=1", ".=1", "train.=1", ""])
def test_malformed_overrides(override: str) -> None:
    error = refused(BASE, override)
    assert error.message == f"--set {override}: not of the form key.sub=value"


@pytest.mark.parametrize(
    ("override", "message", "remedy"),
    [
        ("train.epochz=2", "--set train.epochz: unknown key `train.epochz`", "did you mean `epochs`?"),
        ("trian.epochs=2", "--set trian.epochs: unknown key `trian`", "did you mean `train`?"),
        ("train.seed.x=1", "--set train.seed.x: `train.seed`: must be a whole number, found {'x': 1}", ""),
        ("data.text.x=1", "--set data.text.x=1: `text` is a value, it has no keys", "set `data.text` itself"),
    ],
)
def test_overrides_of_what_does_not_exist(override: str, message: str, remedy: str) -> None:
    error = refused(BASE, override)
    assert error.message == message and error.remedy.startswith(remedy)
