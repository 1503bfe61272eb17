"""Run directories with an outcome, metrics and predictions, as far as a report reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afina.recipe.schema import Recipe
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.outcome import Outcome
from afina.run.plan import make_plan
from afina.site.settings import Site

MakeRun = Callable[..., RunDir]


EVIL = "<script>alert(1)</script> & \"quoted\" 'it' </pre>"


@pytest.fixture
def make_run(tmp_path: Path, site: Site, recipe: Callable[..., Recipe], model_folder: Path) -> MakeRun:
    """A claimed run directory, written by the code that writes real ones."""

    def make(labels: list[str] | None = None, **changes: Any) -> RunDir:
        loaded = recipe(model=str(model_folder), **changes)
        plan = make_plan(loaded, site, recipe_file=tmp_path / "re cipes, 'mine'/recipe.yaml")
        text = json.dumps(loaded.model_dump(mode="json"))
        prepared = {
            "prepared": "/scratch/prepared/1",
            "labels": labels or ["1", "2", "3"],
            "rows": {"train": 600, "eval": 200},
            "tokens": {"train": 12345, "eval": 4321},
            "warnings": ["label '3' occurs once in train"],
        }
        return claim(plan, prepared, ["python"], text, tmp_path / "run <&> 'x'")

    return make


def finish(run: RunDir, **fields: Any) -> None:
    folder = run.begin_attempt()
    (folder / "env.json").write_text(
        json.dumps({"host": "node<1>", "started": 0, "geometry": {"nodes": 2, "processes_per_node": 2}})
    )
    given: dict[str, Any] = {
        "outcome": "finished",
        "exit_code": 0,
        "attempt": folder.name,
        "global_step": 40,
        "max_steps": 40,
        "samples_per_second": 12.5,
        "labels": ["1", "2", "3"],
        "metrics": {
            "eval_loss": 0.5,
            "eval_accuracy": 0.75,
            "eval_f1_per_class": [0.11, 0.22, 0.33],
            "eval_confusion_matrix": [[5, 1, 0], [2, 6, 0], [0, 0, 0]],
        },
    }
    run.record(Outcome(**{**given, **fields}))


def log(run: RunDir, *lines: dict[str, Any]) -> None:
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


CURVE = (
    {"step": 10, "epoch": 0.5, "loss": 1.5},
    {"step": 20, "epoch": 1.0, "loss": 1.0},
    {"step": 20, "epoch": 1.0, "eval_loss": 0.9, "eval_accuracy": 0.5, "eval_f1_per_class": [0.1]},
    {"step": 40, "epoch": 2.0, "loss": 0.7},
    {"step": 40, "epoch": 2.0, "eval_loss": 0.5, "eval_accuracy": 0.75, "training_loss": 0.8125},
)


def predict(run: RunDir, *, texts: list[str] | None = None, part: str = "") -> None:
    """Predictions of 90 rows: label 1 always right, 2 half, 3 never; the confidence grows with the row."""
    truth = [1 + i % 3 for i in range(90)]
    predicted = [1 if t == 1 or t == 3 or i % 2 else 2 for i, t in enumerate(truth)]
    sure = [0.5 + i / 200 for i in range(90)]
    table = {
        "row": list(range(90)),
        "file": ["some where/reviews.csv"] * 90,
        "id": [f"r{i}" for i in range(90)],
        "text": texts or [f"text number {i} " + "long " * 100 for i in range(90)],
        "label": list(map(str, truth)),
        "prediction": list(map(str, predicted)),
        **{
            f"score: {k}": [s if p == k else (1 - s) / 2 for p, s in zip(predicted, sure, strict=True)]
            for k in (1, 2, 3)
        },
    }
    pq.write_table(pa.table(table), run.path / f"predictions{part}.parquet")
