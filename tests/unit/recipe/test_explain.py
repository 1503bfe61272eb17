"""Unknown keys and wrong values: each is refused with its line and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.conftest import DROP
from tests.unit.recipe.refusals import BASE, refused

from afina.errors import RecipeError
from afina.recipe.parse import load_recipe, parse_recipe

# -- unknown keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "hint"),
    [
        (BASE + "modle: x\n", 9, "modle", "model"),
        (BASE.replace("label: stars", "lable: stars\n  label: stars"), 6, "data.lable", "label"),
        (BASE.replace("text: text", "text: text\n  train:\n    sampel: 3"), 7, "data.train.sampel", "sample"),
        (BASE.replace("text: text", "text: text\n  test: {fractoin: 0.1}"), 6, "data.test.fractoin", "fraction"),
        (BASE.replace("files: {all:", "files: {trian:"), 4, "data.files.trian", "train"),
        (BASE + "  learning-rate: 1e-4\n", 9, "train.learning-rate", "learning_rate"),
        (BASE + "tokens: {max_lenght: 1}\n", 9, "tokens.max_lenght", "max_length"),
        (BASE + "resources:\n  nodes: 1\n  gpu_per_node: 2\n", 11, "resources.gpu_per_node", "gpus_per_node"),
    ],
)
def test_unknown_keys_are_refused_with_line_and_nearest(text: str, line: int, key: str, hint: str) -> None:
    error = refused(text)
    assert error.message == f"r.yaml:{line}: unknown key `{key}`"
    assert error.remedy.startswith(f"did you mean `{hint}`? known here: ")


def test_pairs_are_not_cut_in_their_middle() -> None:
    text = BASE.replace("text: text", "text: [a, b]") + "tokens: {truncation: head+tail}\n"
    assert "`tokens.truncation`: is of single texts, and `data.text` names two" in refused(text).message


@pytest.mark.parametrize("key", ["name", "model", "data", "data.text", "data.label"])
def test_missing_keys(recipe_file: Callable[..., Path], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(**{key.replace(".", "__"): DROP}))
    assert f"`{key}` is missing" in caught.value.message
    assert f"add `{key.split('.')[-1]}:`" in caught.value.remedy


def test_a_section_for_its_defaults_is_empty_braces(recipe_file: Callable[..., Path]) -> None:
    for key in ("decisions", "train.early_stopping", "tokens.windows"):
        with pytest.raises(RecipeError, match=f"{key}: true makes no sense here") as caught:
            load_recipe(recipe_file(), [f"{key}=true"])
        assert caught.value.remedy == "write `{}` for the defaults, or leave it out"


# -- values ------------------------------------------------------------------------------------------------------------


WRONG = {
    "train.evaluate=sometimes": "must be `epoch`, or a number of optimizer steps (1 or more), found 'sometimes'",
    "train.evaluate=0": "must be `epoch`, or a number of optimizer steps (1 or more), found 0",
    "train.save_every=1.5": "must be `epoch`, or a number of optimizer steps (1 or more), found 1.5",
    "train.save_every=true": "true makes no sense here",
    "train.batch_size=eight": "must be a whole number, found 'eight'",
    "train.batch_size=8.5": "must be a whole number, found 8.5",
    "train.batch_size=true": "true makes no sense here",
    "train.batch_size=0": "must be 1 or more, found 0",
    "train.batch_size=[": "must be a whole number, found '['",
    "train.batch_size=null": "must be a whole number, found nothing (null)",
    "train.learning_rate=fast": "must be a number, found 'fast'",
    "train.learning_rate=0": "must be more than 0, found 0",
    "train.learning_rate=.inf": "must be a number, found inf",
    "train.learning_rate=.nan": "must be a number, found nan",
    "metrics=[accuracy, costs:]": "`costs:` must be `module:function`",
    "metrics=[costs:total:less]": "`costs:total:less` must be `module:function`",
    "metrics=[costs:accuracy]": "`accuracy` is the name of another metric here",
    "metrics=[a:total, b:total]": "`total` is the name of another metric here",
    "train.best_metric=confusion_matrix": "`confusion_matrix` is a table: it has no best one",
    "train.epochs=-1": "must be more than 0, found -1",
    "train.epochs=yes": "must be a number, found 'yes'",
    "train.seed=-1": "must be 0 or more, found -1",
    "train.seed=4294967296": "must be less than 4294967296, found 4294967296",
    "train.keep=bset": "must be one of best, last, found 'bset'",
    "train.arguments=[a]": "must be a mapping of keys, found ['a']",
    "train=null": "must be a mapping of keys, found nothing (null)",
    "train=5": "must be a mapping of keys, found 5",
    "data.train=0.5": "must be a mapping of keys, found 0.5",
    "data.files=3": "must be a path, a list of paths, or a mapping such as {train: a.csv, eval: b.csv}, found 3",
    "data.files.all={a: 1}": "must be text, or a list of texts, found {'a': 1}",
    "data.files.all=[]": "names no file",
    "data.files={}": "is empty: write `{all: reviews.csv}` or `{train: …, eval: …}`",
    "data.text={a: 1}": "must be text, or a list of texts, found {'a': 1}",
    "data.text=3": "must be text, or a list of texts, found 3",
    "data.text=''": "must not be empty, found ''",
    "data.text=[]": "at least one text column",
    "data.text=[a, b, a]": "names column `a` twice",
    "data.encoding=cp12522": "no encoding `cp12522`; did you mean `cp1252`?",
    "data.encoding=base64": "no encoding `base64`",
    "data.delimiter=ab": "'ab' is not one character",
    "data.header=[a, a]": "names a column twice",
    "data.header=yes": "must be true, false, or the list",
    "data.quoting=odd": "must be",
    "data.label=[]": "at least one label column",
    "data.labels=one": "must be a list, found 'one'",
    "data.train.fraction=0": "must be more than 0, found 0",
    "data.train.fraction=1.2": "must be 1 or less, found 1.2",
    "data.train.sample=0": "must be 1 or more, found 0",
    "data.splits={a: 1}": "must be text, found the number 1",
    "tokens.batching=packedd": "must be one of auto, packed, grouped, longest, padded, found 'packedd'",
    "tokens.max_length=1": "must be 2 or more, found 1",
    "task=single": "must be one of auto, single-label, multi-label, regression, token-classification, found 'single'",
    "name=3": "must be text, found the number 3",
    "name=a/b": "'a/b' is not usable as a folder's name",
    "name=.hidden": "'.hidden' is not usable as a folder's name",
    "name=" + "☃" * 100: "is not usable as a folder's name",
    "model=''": "must not be empty, found ''",
    "model=": "must be text, found nothing (null)",
    "revision=1e5": "must be text, found the number 100000.0",
    "resources.nodes=0": "must be 1 or more, found 0",
    "resources.gpus_per_node=-1": "must be 0 or more, found -1",
    "resources.mem_gb=32G": "must be a whole number, found '32G'",
    "metrics=[acuracy]": "`acuracy` is not a metric; did you mean `accuracy`? known: accuracy, f1",
    "train.best_metric=loss": "`loss` is not a metric; ",
    "trust_remote_code=maybe": "must be true or false, found 'maybe'",
    "trust_remote_code=true": "runs code from the model's repository, `revision` is missing",
    "data.label=text": "column `text` is the text too",
    "data.text=[text, text]": "names column `text` twice",
    "data.label=[a, b, a]": "names column `a` twice",
    "data.labels=[]": "is an empty list",
    "data.labels=[a, null]": "nothing (null) is not a label",
    "data.labels=[a, '  ']": "'  ' is not a label",
    "data.label_separator=''": "must not be empty",
    "train.batch_size=10000000000": "must be 1000000000 or less",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_values_on_the_command_line(override: str) -> None:
    error = refused(BASE, override)
    assert error.message.startswith(f"--set {override.partition('=')[0]}"), error.message
    assert WRONG[override] in error.message


@pytest.mark.parametrize(
    "override", [o for o in WRONG if o.count(".") < 2 and not o.startswith("name=") and not o.endswith("=[")]
)
def test_wrong_values_in_the_file_name_the_line(override: str) -> None:
    """The same refusals for what stands in the file: with the line, and never blamed on a --set that is elsewhere."""
    path, _, value = override.partition("=")
    section, _, key = path.rpartition(".")
    lines = BASE.splitlines()
    kept = [line for line in lines if not re.match(rf"\s*{key or section}:", line)]
    if section:
        if f"{section}:" not in kept:
            kept.append(f"{section}:")
        at = kept.index(f"{section}:") + 1
        kept.insert(at, f"  {key}: {value}")
    else:
        kept = [line for line in kept if not (path in ("train",) and "batch_size" in line)]
        kept.append(f"{path}: {value}")
        at = len(kept) - 1
    error = refused("\n".join(kept) + "\n", "tokens.max_length=64" if section != "tokens" else "train.seed=1")
    assert error.message.startswith(f"r.yaml:{at + 1}: "), error.message
    assert WRONG[override] in error.message


def test_numbers_are_refused_where_text_belongs_with_the_remedy() -> None:
    assert refused(BASE, "revision=1234567").remedy == "put it in quotes, also for --set: \"'1234567'\""
    assert parse_recipe(BASE, ["revision='1234567'"]).revision == "1234567"


@pytest.mark.parametrize(
    ("written", "minutes"),
    [("90", 90), ("'90'", 90), ("90:00", 90), ("0:30", 1), ("1:30:01", 91), ("12:30:00", 750), ("1-2:30", 1590)],
)
def test_time_limits_are_minutes_rounded_up(written: str, minutes: int) -> None:
    assert parse_recipe(BASE + f"resources:\n  time: {written}\n").resources.time == minutes
    assert parse_recipe(BASE, [f"resources.time={written}"]).resources.time == minutes


@pytest.mark.parametrize("written", ["0", "-5", "abc", "1.5", "1:2:3:4", "12:", "true", "[1]", "²", "infinite", "0:00"])
def test_wrong_times(written: str) -> None:
    error = refused(BASE, f"resources.time={written}")
    assert error.message.startswith("--set resources.time: ")
    assert re.search(r"is not a time limit: write minutes|must be 1 or more|makes no sense", error.message)


@pytest.mark.parametrize("value", ["2024-01-01", ".nan", ".inf", "!!set {a}", "!!binary aGk="])
def test_arguments_hold_what_json_can(value: str) -> None:
    error = refused(BASE + f"  arguments:\n    x: {value}\n")
    assert error.message.startswith("r.yaml:10: `train.arguments.x`: ") and "not a plain value" in error.message
