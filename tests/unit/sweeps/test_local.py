"""Sweeps that train here, one run after another: stopped and continued, a search, a cross-validation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import tiny_model, tiny_reviews, write_csv
from tests.unit.conftest import Ran
from tests.unit.forks import ForkedWorkers

from afina.run.directory import RunDir
from afina.sweeps.sweep import Sweep


@pytest.fixture
def trainable(recipe_file: Callable[..., Path], tmp_path: Path) -> Path:
    path = recipe_file(
        model=str(tiny_model(tmp_path / "model", layers=1)),
        data__train={"fraction": 0.8},
        data__eval={"fraction": 0.2},
        baselines=False,
    )
    write_csv(path.parent / "reviews.csv", tiny_reviews(80))
    return path


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_local_sweep_stops_with_ctrl_c_and_goes_on(
    command: Callable[..., Ran], trainable: Path, scratch: Path
) -> None:
    settings = ("tokens.max_length=32", "train.epochs=40", "train.evaluate=200", "train.save_every=200")
    words = ["sweep", str(trainable), "--seeds", "2", "--local", "--json"]
    words += [word for setting in settings for word in ("--set", setting)]
    env = {**os.environ, "AFINA_SCRATCH": str(scratch)}
    process = ForkedWorkers(
        [sys.executable, "-m", "afina", *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(b'"first_step"' in file.read_bytes() for file in scratch.glob("sweeps/*/runs/*/events.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped; the same command continues from here" in said, said
    (home,) = (scratch / "sweeps").iterdir()
    made = Sweep(home)
    assert sorted(made.states().values()) == ["PLANNED", "STOPPED"]
    stopped = next(run for run in made.runs if run.state == "STOPPED")
    assert stopped.outcome is not None and stopped.outcome.global_step > 0
    # It is the same sweep with the cell that was begun.
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{\n") :])["rows"][0]["states"] == {"FINISHED": 2}
    assert [run.outcome.attempts for run in made.runs if run.outcome] == [2, 1]
    again = command(*words)
    assert again.returncode == 0 and [run.outcome.attempts for run in made.runs if run.outcome] == [2, 1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_local_search_trains_what_it_asked_for(command: Callable[..., Ran], trainable: Path, tmp_path: Path) -> None:
    words = ["--search", "train.learning_rate=1e-4..1e-2:log", "--trials", "2", "--local"]
    words += ["--sweep", str(tmp_path / "out side")]
    settings = ["--set", "tokens.max_length=32", "--set", "train.max_steps=2", "--set", "train.epochs=null"]
    done = command("sweep", trainable, *words, *settings, "--json")
    assert done.returncode == 0, done.stderr
    made = Sweep(tmp_path / "out side")
    assert [run.outcome.outcome for run in made.runs if run.outcome] == ["finished"] * 2
    rates = [run.dir.plan().recipe.train.learning_rate for run in made.runs]
    assert len(set(rates)) == 2 and all(1e-4 <= rate <= 1e-2 for rate in rates)


@pytest.mark.slow
@pytest.mark.series
@pytest.mark.timeout(600)
def test_a_local_cross_validation_predicts_every_row_once(
    command: Callable[..., Ran], trainable: Path, scratch: Path
) -> None:
    import pyarrow.parquet as pq

    words = ["sweep", str(trainable), "--folds", "2", "--local", "--set", "tokens.max_length=32"]
    words += ["--set", "train.epochs=1"]
    env = {"AFINA_SCRATCH": str(scratch)}
    done = command(*words, env=env)
    assert done.returncode == 0, done.stderr
    (home,) = (scratch / "sweeps").iterdir()
    grown = command(*words, "--repeats", "2", "--json", env=env)
    assert grown.returncode == 0, grown.stderr
    made = Sweep(home)
    assert [run.outcome.attempts for run in made.runs if run.outcome] == [1] * 4
    assert len(list((scratch / "prepared").glob("*/manifest.json"))) == 1, "tokenised once"
    table = pq.read_table(home / "out_of_fold.parquet").to_pydict()
    assert table["repeat"] == [1] * 80 + [2] * 80 and table["row"] == [*range(1, 81)] * 2
    assert set(table["fold"]) == {1, 2} and {"text", "label", "prediction"} <= table.keys()
    for run in made.runs:
        rows = RunDir(run.path).prepared()["rows"]
        assert len(pq.read_table(RunDir(run.path).predictions)) == rows["eval"] == 80 - rows["train"]
    page = command("report", str(home), env=env)
    assert page.returncode == 0 and "Means over folds" in (home / "report/index.html").read_text()
