"""A Hub on this machine with a tiny model and a data set of reviews."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hub.server import HubServer
from tests.tiny import dataset_card, parquet_bytes, star_names, tiny_model, tiny_reviews

MODEL, DATA = "me/tiny", "me/reviews"


def data_files(seed: int = 0) -> dict[str, bytes | str | Path]:
    rows = [{**row, "stars": row["stars"] - 1} for row in tiny_reviews(60, seed)]
    labels = {"stars": star_names()}
    return {
        "README.md": dataset_card(
            {"default": {"train": "train.parquet", "test": "test.parquet"}},
            labels,
            {"text": "string", "rating": "float64"},
        ),
        "train.parquet": parquet_bytes(rows[:40]),
        "test.parquet": parquet_bytes(rows[40:]),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def hub(tmp_path: Path, model: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        server.add_model(MODEL, model)
        server.add_dataset(DATA, data_files())
        yield server
