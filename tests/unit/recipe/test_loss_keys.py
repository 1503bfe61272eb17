"""Keys that decide the loss: what is refused with a recipe, and digests that unset keys do not change."""

from __future__ import annotations

from typing import Any

import pytest

from afina.errors import RecipeError
from afina.recipe.keys.data_keys import Data
from afina.recipe.keys.train_keys import Tokens, Train
from afina.recipe.parse import parse_recipe
from afina.recipe.schema import Recipe

TEXT = "{name: a, model: o/m, data: {files: {all: x.csv}, text: text, label: label}}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.class_weights={good: -1}"], "train.class_weights.good: -1 is not a weight"),
        (["train.class_weights={good: .nan}"], "is not a weight"),
        (["train.class_weights={good: .inf}"], "is not a weight"),
        (["train.class_weights={good: 1e300}"], "is not a weight"),
        (["train.class_weights={good: true}"], "is not a weight"),
        (["train.class_weights={good: many}"], "is not a weight"),
        (["train.class_weights={1: 2, '1': 3}"], "names a label twice"),
        (["train.class_weights=even"], "must be `balanced`, or a weight for each label"),
        (["train.class_weights={}"], "must be `balanced`, or a weight for each label"),
        (["train.class_weights=[1, 2]"], "must be `balanced`, or a weight for each label"),
        (["train.loss=hinge"], "must be one of cross_entropy, focal"),
        (["train.focal_gamma=1"], "belongs to the focal loss"),
        (["train.loss=focal", "train.focal_gamma=-1"], "must be 0 or more"),
        (["train.loss=focal", "train.label_smoothing=0.1"], "has no definition for the focal loss"),
        (["train.label_smoothing=1"], "must be less than 1"),
        (["train.label_smoothing=-0.1"], "must be 0 or more"),
        (["data.weight=text"], "is the text or the label too"),
        (["data.weight=label"], "is the text or the label too"),
        (["task=single-label", "train.pos_weight=balanced"], "does not fit a single-label task"),
        (["task=multi-label", "train.class_weights=balanced"], "does not fit a multi-label task"),
        (["task=regression", "train.class_weights=balanced"], "does not fit a regression"),
        (["task=regression", "train.pos_weight=balanced"], "does not fit a regression"),
        (["task=regression", "train.loss=cross_entropy"], "does not fit a regression"),
        (["task=regression", "train.label_smoothing=0.1"], "does not fit a regression"),
    ],
)
def test_losses_that_make_no_sense_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")) as caught:
        parse_recipe(TEXT, settings)
    assert caught.value.remedy


def test_labels_of_weights_are_text() -> None:
    assert parse_recipe(TEXT, ["train.class_weights={1: 2, bad: 0.5}"]).train.class_weights == {"1": 2.0, "bad": 0.5}
    assert parse_recipe(TEXT, ["train.class_weights.good=3"]).train.class_weights == {"good": 3.0}


def test_unset_later_keys_stay_out_of_digests() -> None:
    """Run directories and prepared data of older versions keep their digests."""
    plain: Any = parse_recipe(TEXT, ["data.split_by=order"]).digested()
    for name, section in (("data", Data), ("train", Train), ("tokens", Tokens)):
        assert set(section.added_later) <= set(section.model_fields)
        assert set(plain[name]) == set(section.model_fields) - set(section.added_later)
    assert "train" in plain["data"] and plain["data"]["train"]["seed"] == 42
    assert set(plain) == set(Recipe.model_fields) - set(Recipe.added_later)
    used = parse_recipe(TEXT, ["train.label_smoothing=0.1", "data.weight=w"]).digested()
    assert used["train"]["label_smoothing"] == 0.1 and used["data"]["weight"] == "w"
    assert "class_weights" not in used["train"]
