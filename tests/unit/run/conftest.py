from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from afina.recipe.schema import Recipe
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site


@pytest.fixture
def plan(recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site) -> Plan:
    return make_plan(recipe(), site, recipe_file=recipe_file())
