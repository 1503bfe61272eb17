"""Run directories that afina 0.1 made (commit 9f9b820) go on: resumed, reported, predicted with.

`old/scratch-9f9b820.tar.gz` is a scratch folder with a tiny model, its prepared data, a finished run, and one that was stopped at
step 17 of 72. `@SCRATCH@` and `@PYTHON@` stand in its text files for the paths of this machine.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.unit.conftest import Ran

from afina.run.directory import RunDir

ARCHIVE = Path(__file__).parent / "old/scratch-9f9b820.tar.gz"
BINARY = (".parquet", ".npy", ".safetensors", ".pt")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "old scratch"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in BINARY:
            text = path.read_text().replace("@SCRATCH@", str(folder)).replace("@PYTHON@", sys.executable)
            path.write_text(text)
    # The plan's digest covers the paths of its files, which are others here; a checkpoint names the plan that made it.
    for manifest in folder.glob("runs/*/checkpoints/*/manifest.json"):
        digest = RunDir(manifest.parents[2]).plan().digest
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "plan": digest}))
    return folder


@pytest.fixture
def here(command: Callable[..., Ran], old: Path) -> Callable[..., Ran]:
    def run(*arguments: str | Path) -> Ran:
        return command(*arguments, env={"AFINA_SCRATCH": str(old), "AFINA_RUNTIME": "none"})

    return run


def test_an_old_run_is_resumed_to_the_weights_of_a_new_one(here: Callable[..., Ran], old: Path) -> None:
    stopped, new = old / "runs/stopped", old / "runs/new"
    assert "afina.worker.launch" in (stopped / "worker.argv").read_text()
    for done in (
        here("resume", stopped),
        here("train", old / "recipe.yaml", "--run", new, "--set", "data.split_by=order"),
    ):
        assert done.returncode == 0, done.stderr
    outcome = RunDir(stopped).outcome()
    assert outcome is not None and (outcome.outcome, outcome.global_step) == ("finished", 72)
    # Its first 17 steps were computed on another machine: equal to the bit on the same processor with as many threads.
    resumed, fresh = (load_file(run / "model/model.safetensors") for run in (stopped, new))
    assert resumed.keys() == fresh.keys()
    assert max(float(np.abs(resumed[name] - fresh[name]).max()) for name in fresh) < 1e-3
    logs = [
        [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (stopped, new)
    ]
    assert logs[0] == logs[1]


def test_an_old_run_is_shown_reported_and_predicted_with(here: Callable[..., Ran], old: Path, tmp_path: Path) -> None:
    finished = old / "runs/finished"
    shown = here("status", finished)
    assert shown.returncode == 0 and "FINISHED" in shown.stdout.upper(), shown.stderr
    reported = here("report", finished)
    assert reported.returncode == 0 and (finished / "report/index.html").stat().st_size > 10_000, reported.stderr
    (tmp_path / "new.csv").write_text("text\ngood\nbad\n")
    predicted = here("predict", finished, tmp_path / "new.csv", "--output", tmp_path / "out.csv")
    assert predicted.returncode == 0, predicted.stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3
