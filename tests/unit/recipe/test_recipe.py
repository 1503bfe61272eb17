"""What a recipe says: its forms, its defaults, what belongs together, its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError
from tests.common import ROOT
from tests.unit.conftest import recipe_dict
from tests.unit.recipe.refusals import BASE, INTERFACE, refused

from afina.errors import RecipeError
from afina.recipe.explain import model_of
from afina.recipe.keys.resource_keys import Resources
from afina.recipe.metrics import METRICS
from afina.recipe.parse import load_recipe, parse_recipe
from afina.recipe.schema import Recipe

# -- what is read ------------------------------------------------------------------------------------------------------


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
