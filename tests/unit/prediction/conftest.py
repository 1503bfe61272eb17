"""A trained run, its reviews, and predictions in the process of the test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests import tiny
from tests.unit.training.in_process import train_here

from afina.prediction import jobs as predicting
from afina.prediction.request import PredictRequest
from afina.worker.predicting import plan_parts, predict_parts

LABELS = ["1", "2", "3", "4", "5"]


def train(place: Path) -> None:
    """A run of a tiny BERT on the reviews in `place`."""
    recipe = tiny.recipe(
        name="stars it's",
        data={"id": "id"},
        tokens={"max_length": 24},
        train={"batch_size": 16, "epochs": 4, "learning_rate": 0.005, "seed": 1, "log_every": None},
        metrics=["accuracy", "f1"],
    )
    (place / "run.yaml").write_text(json.dumps(recipe))
    train_here(place / "run.yaml", place / "run", env={"AFINA_SCRATCH": str(place / "scratch")})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24-token texts (some are longer), and its reviews, in a folder that quoting has to survive."""
    place = tmp_path_factory.mktemp("it's a $(place)")
    (place / "scratch").mkdir()
    tiny.tiny_model(place / "model")
    rows = tiny.tiny_reviews(203, 7)
    for number, row in enumerate(rows):
        row["id"] = f"r{number}"
        row["text"] += " and more of the same" * (number % 11 == 5)
    tiny.write_csv(place / "reviews.csv", rows)
    train(place)
    return place


@pytest.fixture
def run(place: Path) -> Path:
    return place / "run"


@pytest.fixture
def reviews(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(place / "reviews.csv", tmp_path / "reviews.csv"))


def here(run: Path, inputs: str | Path, out: Path, **options: Any) -> dict[str, Any]:
    """What `afina predict` does, in this process."""
    about = planned(run, inputs, out, **options)
    if about["state"] != "whole":
        predict_parts.run(about["parts"], 0, 1, and_merge=True, progress="log")
    return about


def planned(run: Path, inputs: str | Path, out: Path, **options: Any) -> dict[str, Any]:
    """The plan stage of `here`: the inputs are checked, and the folder of parts is there."""
    return plan_parts.plan(predicting.compose(run, [inputs], out, PredictRequest(**options)))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()
