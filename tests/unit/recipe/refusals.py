"""A smallest recipe as text, and the refusal of a wrong one."""

from __future__ import annotations

import re

import pytest

from afina.errors import RecipeError
from afina.recipe.parse import parse_recipe

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
