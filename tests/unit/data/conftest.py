"""Inputs of the tests of prepared data: tiny models and reviews, and plans over them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_model, tiny_reviews, write_csv

from afina.recipe.schema import Recipe
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny model folders, made once each."""
    made: dict[str, Path] = {}

    def model(arch: str = "bert", **options: Any) -> Path:
        key = f"{arch} {options}"
        if key not in made:
            made[key] = tiny_model(tmp_path_factory.mktemp("it's a model"), arch, **options)
        return made[key]

    return model


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    folder = tmp_path / 'da\'ta, "mine" ünï'
    folder.mkdir()
    return write_csv(folder / "re views.csv", tiny_reviews(120, seed=5))


@pytest.fixture(scope="session")
def check_records() -> dict[str, bytes]:
    """Records of checks that passed; filled by the first test, so that not every process imports torch."""
    return {}


@pytest.fixture
def plan(
    site: Site, models: Callable[..., Path], reviews: Path, check_records: dict[str, bytes]
) -> Iterator[Callable[..., Plan]]:
    pins = site.scratch / "pins"
    pins.mkdir()
    for name, content in check_records.items():
        (pins / name).write_bytes(content)

    def make(model: Path | None = None, data: dict[str, Any] | None = None, **recipe: Any) -> Plan:
        spec = {
            "name": "tiny",
            "model": str(model or models()),
            "data": {"files": {"all": str(reviews)}, "text": "text", "label": "stars", **(data or {})},
            "tokens": {"max_length": 64},
            **recipe,
        }
        return make_plan(Recipe.model_validate(spec), site)

    yield make
    check_records.update({path.name: path.read_bytes() for path in pins.glob("checked-*.json")})


SEED = int(os.environ.get("AFINA_TEST_SEED", str(random.SystemRandom().randrange(1 << 30))))
