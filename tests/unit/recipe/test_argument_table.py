"""The table of TrainingArguments: every field of the installed version is in it once, and a recipe is refused as it says."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from afina.errors import RecipeError
from afina.recipe.keys.training_arguments import EFFECTIVE, FORMER, INEFFECTIVE, RESERVED_ARGUMENTS
from afina.recipe.parse import parse_recipe
from afina.recipe.schema import Recipe
from afina.run.plan import load_plan, make_plan
from afina.site.settings import Site

BASE = "name: stars\nmodel: owner/model\ndata: {hub: owner/data, text: text, label: stars}\ntrain:\n  batch_size: 8\n"
REFUSED = {**RESERVED_ARGUMENTS, **INEFFECTIVE, **FORMER}


def refused(arguments: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(BASE + f"  arguments: {{weight_decay: 0.1, {arguments}}}\n", source="r.yaml")
    return caught.value


def test_every_field_of_the_installed_version_is_in_the_table_once() -> None:
    """A new version of Transformers with another field fails here: decide what the field does in a run."""
    from transformers import TrainingArguments

    installed = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    assert sorted([*EFFECTIVE, *RESERVED_ARGUMENTS, *INEFFECTIVE]) == sorted(installed)
    assert not set(FORMER) & set(installed)


@pytest.mark.parametrize("argument", sorted(REFUSED))
def test_a_refused_argument_names_what_to_use(argument: str) -> None:
    error = refused(f"{argument}: 1")
    assert error.message.startswith(f"r.yaml:6: `train.arguments.{argument}`: ")
    assert error.remedy == REFUSED[argument]
    for section, name in re.findall(r"`(train|tokens)\.(\w+)", error.remedy):
        assert name in Recipe.model_fields[section].annotation.model_fields, f"the remedy names {section}.{name}"  # type: ignore[union-attr]
    for name in re.findall(r"use `(\w+)", error.remedy):
        assert name in EFFECTIVE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("lr_scheduler_type: reduce_lr_on_plateau", "reduce_lr_on_plateau follows evaluations"),
        ("lr_scheduler_type: greedy", "greedy follows the loss of single steps"),
        ("optim: schedule_free_adamw", "trains and evaluates on different weights"),
        ("optim: galore_adamw_layerwise", "its state is in no checkpoint"),
        ("optim: adalomo", "its state is in no checkpoint"),
        ("debug: tpu_metrics_debug", "is for TPUs"),
        ("adam_beta1: 2.0", "must be from 0 to 1 (less than it), found 2"),
        ("adam_beta2: 1", "must be from 0 to 1 (less than it), found 1"),
        ("adam_epsilon: -1.0e-8", "must be from 0 to 1, found -1e-08"),
        ("warmup_steps: -1", "must be from 0 to 1e+09, found -1"),
        ("max_grad_norm: -1", "must be 0 or more, found -1"),
        ("neftune_noise_alpha: -5", "must be from 0 to 1000, found -5"),
    ],
)
def test_values_that_cannot_work(arguments: str, message: str) -> None:
    error = refused(arguments)
    assert message in error.message and error.remedy
    advised = set(re.findall(r"`(\w+)`", error.remedy))
    assert not advised & {*RESERVED_ARGUMENTS, *INEFFECTIVE}, "the advice is itself refused"


def test_a_negative_weight_decay_and_all_other_errors_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(
            BASE + "  epochs: 1e300\n  sead: 3\n  arguments: {weight_decay: -0.1, seed: 3, eval_delay: 2}\nmodle: x\n",
            ["tokens.max_length=0"],
            source="r.yaml",
        )
    lines = caught.value.message.splitlines()
    assert lines[0] == "r.yaml: 7 errors"
    assert [line for line in lines[1:] if not line.startswith("    ")] == [
        "  r.yaml:7: unknown key `train.sead`",
        "  r.yaml:9: unknown key `modle`",
        "  --set tokens.max_length: must be 2 or more, found 0",
        "  r.yaml:6: `train.epochs`: must be 1e+06 or less, found 1e+300",
        "  r.yaml:8: `train.arguments.weight_decay`: must be from 0 to 1000, found -0.1",
        "  r.yaml:8: `train.arguments.seed`: is set by afina itself",
        "  r.yaml:8: `train.arguments.eval_delay`: has no effect in a run of afina",
    ]
    assert lines[2].startswith("    did you mean `seed`?") and "    set `train.seed`" in lines


def test_a_mistyped_key_that_is_required_is_one_error() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(BASE.replace("model:", "modle:"), source="r.yaml")
    assert caught.value.message == "r.yaml:2: unknown key `modle`"


def test_a_run_that_was_made_with_such_an_argument_is_still_read(tmp_path: Path, site: Site) -> None:
    plan = make_plan(parse_recipe(BASE), site).model_dump(mode="json")
    plan["recipe"]["train"]["arguments"] = {"eval_delay": 2}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert load_plan(tmp_path / "plan.json").recipe.train.arguments == {"eval_delay": 2}


@pytest.mark.parametrize(
    ("key", "precision"),
    [
        ("train.precision", "tf32"),
        ("train.precision", "fp16"),
        ("train.arguments.tf32", True),
        ("train.arguments.fp16", True),
    ],
)
def test_a_precision_without_its_device_is_refused(site: Site, key: str, precision: Any) -> None:
    recipe = parse_recipe(BASE, [f"{key}={str(precision).lower()}", "resources.gpus_per_node=0"])
    with pytest.raises(RecipeError, match=rf"{key}: \w+ needs a GPU, and the run has none"):
        make_plan(recipe, site)
    make_plan(parse_recipe(BASE, [f"{key}={str(precision).lower()}"]), site)
