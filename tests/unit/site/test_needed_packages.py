"""Packages that only some recipes need."""

from __future__ import annotations

import pytest
from tests.unit.conftest import recipe_dict

from afina.errors import EnvironmentProblem
from afina.recipe import trackers
from afina.recipe.schema import Recipe
from afina.site import python


def test_a_package_that_the_image_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", "no_such_package_of_wandb")
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/afina.sif")
    with pytest.raises(EnvironmentProblem, match=r"which the image /images/afina\.sif does not have") as caught:
        python.check_packages(Recipe(**recipe_dict(trackers=["wandb"])))
    assert "container/lock.sh" in caught.value.remedy and "leave wandb out" in caught.value.remedy
    python.check_packages(Recipe(**recipe_dict()))
    # An attempt, in whatever environment it is resumed, goes on without a tracker, as docs/watching.md has it.
    for more in ({}, {"adapter": {}, "train": {"base_dtype": "bf16"}}):
        python.check_packages(Recipe(**recipe_dict(trackers=["wandb"], **more)), trackers=False)


def test_weights_in_four_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(**recipe_dict(adapter={}, train={"base_dtype": "nf4"}))
    python.check_packages(recipe)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="base_dtype: nf4 needs the package bitsandbytes") as caught:
        python.check_packages(recipe, trackers=False)
    assert "pip install bitsandbytes; or write bf16" in caught.value.remedy
