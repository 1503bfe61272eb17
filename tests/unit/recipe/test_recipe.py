from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from tests.common import ROOT
from tests.unit.conftest import DROP, recipe_dict

from afina.errors import RecipeError
from afina.recipe.explain import model_of
from afina.recipe.keys.resource_keys import Resources
from afina.recipe.keys.training_arguments import RESERVED_ARGUMENTS
from afina.recipe.metrics import METRICS
from afina.recipe.parse import load_recipe, parse_recipe
from afina.recipe.schema import Recipe

BASE = """\
name: stars
model: owner/model
data:
  files: {all: reviews.csv}
  text: text
  label: stars
train:
  batch_size: 8
"""


def refused(text: str = BASE, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, overrides, source="r.yaml")
    assert caught.value.remedy, "a refusal without a remedy"
    assert not re.search(r"pydantic|Input should|literal\[|function-|NoneType|type=", str(caught.value))
    return caught.value


# -- what is read ------------------------------------------------------------------------------------------------------

INTERFACE = """\
name: amazon-stars
model: path-or-hub-id
data:
  files: {all: reviews.csv}            # or {train: …, eval: …, test: …}; or hub: yelp_review_full
  text: text                           # or [premise, hypothesis]
  label: stars
  train: {fraction: 0.8, sample: 600, seed: 42}
  eval: {fraction: 0.2, sample: 300, seed: 42}
tokens: {max_length: 256}
train: {batch_size: 8, epochs: 1, learning_rate: 5.0e-5, seed: 1, arguments: {weight_decay: 0.01}}
metrics: [accuracy, f1]
"""


def test_rows_are_divided_by_their_text_unless_the_recipe_or_an_older_plan_says_otherwise() -> None:
    assert parse_recipe(INTERFACE).data.split_by == "text"
    old = Recipe.model_validate(recipe_dict())  # as plan.json of an older afina has it
    for override in ("order", "null"):
        assert parse_recipe(INTERFACE, ["model=owner/model", f"data.split_by={override}"]) == old
    assert "split_by" not in old.digested()["data"]
    assert parse_recipe(INTERFACE).digested()["data"]["split_by"] == "text"
    with pytest.raises(RecipeError, match="split_by"):
        parse_recipe(INTERFACE, ["data.split_by=label"])


@pytest.mark.parametrize(
    ("data", "chooses"),
    [
        ("{files: a.csv, text: t, label: l}", True),
        ("{files: {train: a.csv}, text: t, label: l}", True),
        ("{files: {train: a.csv, eval: b.csv}, text: t, label: l}", False),
        ("{files: {train: a.csv, test: b.csv}, text: t, label: l, eval: {split: test}}", False),
        ("{files: a.csv, text: t, label: l, split_column: s}", False),
        ("{files: a.csv, text: t, label: l, split_column: s, train: {fraction: 0.9}}", True),
        ("{files: {train: a.csv, eval: b.csv}, text: t, label: l, eval: {sample: 9}}", True),
        ("{hub: me/x, text: t, label: l}", True),
        ("{hub: me/x, text: t, label: l, train: {sample: 9}, eval: {split: test, sample: 9}}", False),
        ("{hub: me/x, text: t, label: l, train: {fraction: 0.9}}", True),
    ],
)
def test_a_recipe_that_chooses_no_rows_keeps_its_digest(data: str, chooses: bool) -> None:
    assert parse_recipe(f"{{name: x, model: m, data: {data}}}").data.split_by == ("text" if chooses else None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{files: {train: a.csv, eval: b.csv}, text: t, label: l, split_column: s}", "divides the rows of one source"),
        ("{files: a.csv, text: t, label: l, split_column: t}", "column `t` is the text or the label too"),
        ("{files: a.csv, text: t, label: l, group: l}", "column `l` is the text or the label too"),
    ],
)
def test_columns_of_splits_and_groups_that_cannot_be(data: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"{{name: x, model: m, data: {data}}}")


def test_the_interface_example() -> None:
    r = parse_recipe(INTERFACE)
    assert r == Recipe.model_validate(recipe_dict(model="path-or-hub-id", data__split_by="text"))
    assert (r.data.files, r.data.text, r.data.label) == ({"all": ("reviews.csv",)}, ("text",), ("stars",))
    assert r.data.eval.model_dump() == {"split": None, "fraction": 0.2, "sample": 300, "seed": 42}
    assert (r.task, r.train.num_epochs, r.train.learning_rate, r.metrics) == ("auto", 1.0, 5e-5, ("accuracy", "f1"))


def test_the_other_forms_of_the_interface() -> None:
    r = parse_recipe(
        INTERFACE.replace("files: {all: reviews.csv}", "hub: yelp_review_full").replace("text: text", "text: [a, b]")
    )
    assert r.data.hub == "yelp_review_full" and r.data.files is None and r.data.text == ("a", "b")
    r = parse_recipe(BASE, ["data.files={train: a.csv, eval: [b.csv, c.csv], test: d.csv}"])
    assert r.data.files == {"train": ("a.csv",), "eval": ("b.csv", "c.csv"), "test": ("d.csv",)}
    assert parse_recipe(BASE, ["data.files=folder"]).data.files == {"all": ("folder",)}
    assert parse_recipe(BASE, ["data.label=[a, b]", "task=multi-label"]).data.label == ("a", "b")


def test_defaults_are_the_documented_ones() -> None:
    r = parse_recipe(BASE)
    assert (r.train.num_epochs, r.train.learning_rate, r.train.seed, r.train.keep) == (3.0, 5e-5, 42, "best")
    assert (r.train.evaluate, r.train.save_every) == ("epoch", "epoch")
    assert (r.tokens.max_length, r.tokens.batching) == (512, "auto")
    assert r.resources == Resources(nodes=1, gpus_per_node=1, cpus_per_gpu=4, mem_gb=None, time=60)


def test_the_tutorial_exactly() -> None:
    r = load_recipe(ROOT / "slurm/recipes/yelp_tutorial.yaml")
    assert (r.model, r.task, r.revision) == ("google-bert/bert-base-cased", "single-label", None)
    assert (r.data.hub, r.data.config, r.data.text, r.data.label) == ("yelp_review_full", None, ("text",), ("label",))
    assert r.data.train.model_dump() == {"split": "train", "fraction": None, "sample": 1000, "seed": 42}
    assert r.data.eval.model_dump() == {"split": "test", "fraction": None, "sample": 1000, "seed": 42}
    assert r.data.test is None
    assert (r.tokens.max_length, r.tokens.batching) == (512, "padded")
    train = r.train
    assert (train.batch_size, train.epochs, train.max_steps, train.learning_rate) == (8, 3, None, 5e-5)
    assert (train.evaluate, train.arguments, train.seed) == ("epoch", {"lr_scheduler_type": "linear"}, 42)
    assert r.metrics == ("accuracy",)


@pytest.mark.parametrize("path", sorted((ROOT / "slurm/recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path).name == path.stem.replace("_", "-")


def test_frozen() -> None:
    r = parse_recipe(BASE)
    for value, key in ((r, "name"), (r.train, "seed"), (r.data, "text"), (r.data.train, "sample")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(value, key, "x")


def test_json_both_ways() -> None:
    r = parse_recipe(INTERFACE, ["resources.time=1-0", "train.save_every=7", "data.labels=[1, 2]"])
    hub = parse_recipe(BASE.replace("files: {all: reviews.csv}", "hub: yelp_review_full\n  splits: {eval: test}"))
    for value in (r, hub, parse_recipe(BASE)):
        assert Recipe.model_validate_json(value.model_dump_json()) == value
        assert Recipe.model_validate(value.model_dump(mode="json")) == value


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


def test_an_unknown_key_is_named_before_what_it_lacks() -> None:
    assert "unknown key `modle`" in refused(BASE.replace("model:", "modle:")).message


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


# -- what belongs together ---------------------------------------------------------------------------------------------


def test_hub_and_files_together_or_neither() -> None:
    both = BASE.replace("  text:", "  hub: yelp_review_full\n  text:")
    neither = BASE.replace("  files: {all: reviews.csv}\n", "")
    for text, overrides, place in ((both, (), ""), (neither, (), ""), (BASE, ("data.hub=x",), " with --set data.hub")):
        assert refused(text, *overrides).message.startswith(f"r.yaml:3{place}: `data`: give either `hub`")


@pytest.mark.parametrize("key", ["config", "revision", "splits"])
def test_hub_keys_with_files(key: str) -> None:
    value = "{a: b}" if key == "splits" else "x"
    error = refused(BASE.replace("  text:", f"  {key}: {value}\n  text:"))
    assert error.message == f"r.yaml:5: `data.{key}`: belongs to a Hub data set; with `files` leave it out"


def test_epochs_and_max_steps() -> None:
    error = refused(BASE + "  epochs: 1\n  max_steps: 5\n")
    assert error.message == "r.yaml:7: `train`: give `epochs` or `max_steps`, not both"


@pytest.mark.parametrize(
    ("source", "train", "others", "ok"),
    [
        ("all", "fraction: 0.8", "eval: {fraction: 0.2}", True),
        ("all", "fraction: 0.7", "eval: {fraction: 0.2}, test: {fraction: 0.1}", True),
        ("all", "fraction: 0.9", "eval: {fraction: 0.2}", False),
        ("all", "fraction: 0.5", "eval: {fraction: 0.5}, test: {fraction: 0.01}", False),
        # Fractions of different sources have nothing to do with each other.
        ("train", "split: train, fraction: 0.9", "eval: {split: test, fraction: 0.5}", True),
        ("train", "split: train, fraction: 0.9", "eval: {split: train, fraction: 0.5}", False),
    ],
)
def test_fractions_of_one_source_add_up(source: str, train: str, others: str, ok: bool) -> None:
    files = "{all: a.csv}" if source == "all" else "{train: a.csv, test: b.csv}"
    text = f"name: n\nmodel: m\ndata: {{files: {files}, text: t, label: l, train: {{{train}}}, {others}}}\n"
    if ok:
        parse_recipe(text)
    else:
        assert f"at most 1 of `{source}` is there to give" in refused(text).message


@pytest.mark.parametrize("task", METRICS)
def test_metrics_are_those_of_the_task(task: str) -> None:
    for metric in METRICS[task]:
        assert parse_recipe(BASE, [f"task={task}", f"metrics=[{metric}]"]).metrics == (metric,)
    foreign = next(m for ms in METRICS.values() for m in ms if m not in METRICS[task])
    error = refused(BASE + f"task: {task}\nmetrics:\n  - {METRICS[task][0]}\n  - {foreign}\n")
    assert error.message.startswith(f"r.yaml:12: `metrics.1`: `{foreign}` is not a metric of a {task} task; ")
    assert ", ".join(METRICS[task]) in error.message


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


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_recipe_that_is_not_there_names_the_nearest(recipe_file: Callable[..., Path]) -> None:
    path = recipe_file()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path.with_name("recpie.yaml"))
    assert "no such file" in caught.value.message and str(path) in caught.value.remedy


def test_folders_and_other_encodings(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    for encoding, text, byte in (("latin-1", BASE.replace("stars", "größe"), 8), ("utf-16", BASE, 0)):
        (tmp_path / "r.yaml").write_bytes(text.encode(encoding))
        with pytest.raises(RecipeError, match=f"byte {byte} is not UTF-8"):
            load_recipe(tmp_path / "r.yaml")


def test_nasty_names_as_recipe_files(tmp_path: Path, nasty: str) -> None:
    path = tmp_path / f"{nasty}.yaml"
    path.write_text(BASE + "x: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.message == f"{path}:9: unknown key `x`"


def test_every_key_has_a_type_that_is_explained() -> None:
    """A text where another type belongs gets a message in plain words, whatever the key."""

    def walk(model: type[BaseModel], above: str) -> list[str]:
        found = []
        for key, field in model.model_fields.items():
            below = model_of(field.annotation)
            found += walk(below, f"{above}{key}.") if below else [above + key]
        return found

    keys = walk(Recipe, "")
    assert len(keys) > 45
    for key in keys:
        error = refused(BASE, f"{key}={{a: {{b: 1}}}}") if key != "train.arguments" else refused(BASE, f"{key}=1")
        assert error.message.startswith(f"--set {key}"), error.message


# -- secrets and foreign code ------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aBcDeFgH1jKlMnOpQrStUvWxYz012345678"[:34]
SECRET_URL = "https://me:s3cr3t-pw@hub.example.org/owner/name"


@pytest.mark.parametrize("secret", [TOKEN, SECRET_URL], ids=["token", "url"])
@pytest.mark.parametrize(
    "key",
    ["model", "revision", "data.hub", "data.id", "train.arguments.run_name", "train.batch_size", "train.arguments"],
)
def test_a_secret_is_refused_and_not_repeated(key: str, secret: str) -> None:
    value = f'{{project: ["{secret}"]}}' if key == "train.arguments" else f'"{secret}"'
    error = refused(BASE, f"{key}={value}")
    assert error.message.startswith(f"--set {key}") and "holds a token or a password" in error.message
    assert "HF_TOKEN in the environment" in error.remedy
    assert TOKEN[3:] not in str(error) and "s3cr3t-pw" not in str(error)


def test_a_secret_in_the_file_names_its_line() -> None:
    error = refused(BASE + f"  arguments:\n    weight_decay: 0.1\n    logging_name: {TOKEN}\n")
    assert error.message == "r.yaml:11: `train.arguments.logging_name`: holds a token or a password"


def test_the_hubs_token_is_not_an_argument() -> None:
    error = refused(BASE, f"train.arguments.hub_token={TOKEN}")
    assert error.remedy == "set HF_TOKEN in the environment" and TOKEN not in str(error)
    malformed = refused(BASE, f"model.sub={TOKEN}")
    assert TOKEN not in str(malformed) and "has no keys" in malformed.message


def test_a_recipe_from_python_does_not_repeat_a_secret() -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({**recipe_dict(), "model": TOKEN})
    with pytest.raises(RecipeError) as explained:
        Recipe(**{**recipe_dict(), "model": TOKEN})
    assert TOKEN not in str(caught.value) + str(explained.value)


@pytest.mark.parametrize("name", ["hf_style", "token", "a@b", "https://example.org/a@b", "hf_" + "x" * 8, "keyword"])
def test_ordinary_words_are_no_secrets(name: str) -> None:
    assert parse_recipe(BASE, [f'data.text="{name}"']).data.text == (name,)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12], COMMIT.upper(), COMMIT + "0", f"refs/pr/{COMMIT}"])
def test_foreign_code_needs_a_full_commit(revision: str) -> None:
    error = refused(BASE + f"trust_remote_code: true\nrevision: {revision}\n")
    assert error.message.startswith("r.yaml:9: `trust_remote_code`: runs code from the model's repository")
    assert f"`{revision}` can move" in error.message and "40 hex digits" in error.remedy


def test_foreign_code_that_is_pinned_or_local() -> None:
    assert parse_recipe(BASE, ["trust_remote_code=true", f"revision='{COMMIT}'"]).trust_remote_code
    for folder in ("./model", "/data/model", "~/model", "$HOME/model", "../a/b"):
        assert parse_recipe(BASE, ["trust_remote_code=true", f"model='{folder}'"]).trust_remote_code
    assert parse_recipe(BASE).trust_remote_code is False


@pytest.mark.parametrize("argument", ["per_device_train_batch_size", "num_train_epochs"])
def test_an_argument_beside_the_keys_of_train(argument: str) -> None:
    error = refused(BASE, f"train.{argument}=1")
    assert "unknown key" in error.message and error.remedy.startswith(f"{RESERVED_ARGUMENTS[argument]};")
