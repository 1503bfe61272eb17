"""A real run (a tiny model on the CPU), its record, its report, and the same run once more."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.common import program
from tests.unit.conftest import Ran, recipe_dict, tree
from tests.unit.forks import run_forked
from tests.unit.reports.pages import Page

from afina import api
from afina.errors import DataError, InputError, SlurmError
from afina.recipe.schema import Recipe
from afina.reports import write_report
from afina.reports.rerun import plan_again, rerun
from afina.run.commands import sbatch_argv
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest
from afina.run.new_run import claim, claim_run
from afina.run.plan import make_plan
from afina.run.provenance.record import make_record
from afina.site.settings import Site
from afina.watch.handle import run_named


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("it's a place")
    (place / "scratch").mkdir()
    tiny.tiny_model(place / "model")
    tiny.write_csv(place / "reviews.csv", tiny.tiny_reviews(120, 7))
    changes = {"model": "model", "data__id": "rating", "train__log_every": 2, "resources": {"gpus_per_node": 0}}
    changes |= {
        "tokens__max_length": 64,
        "data__train": {"fraction": 0.7},
        "data__eval": {"fraction": 0.3},
        "metrics": ["accuracy", "confusion_matrix"],
        "baselines": False,
    }
    (place / "my recipe.yaml").write_text("# as I wrote it\n" + json.dumps(recipe_dict(**changes)))
    return place


def _afina(place: Path, *arguments: str | Path, cwd: Path | None = None) -> Ran:
    env = {**os.environ, "AFINA_SCRATCH": str(place / "scratch")}
    argv = [sys.executable, "-m", "afina", *map(str, arguments)]
    return run_forked(argv, env=env, cwd=cwd or place)


def _weights(run: Path) -> str:
    return hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_recorded_reported_and_made_again(place: Path, tmp_path: Path) -> None:
    first, second = place / "first", place / "second"
    options = ("--set", "train.learning_rate=3e-3", "--set", "train.epochs=2")
    done = _afina(place, "train", "my recipe.yaml", "--run", first, *options)
    assert done.returncode == 0, done.stderr

    record = json.loads((first / "record.json").read_text())
    assert record["recipe"]["overrides"] == ["train.epochs=2.0", "train.learning_rate=0.003"]
    assert record["git"] == {"none": "the recipe is in no git repository"} and record["image"] is None
    facts = json.loads((first / "attempts/local-1/env.json").read_text())
    assert {"torch", "transformers", "accelerate"} <= facts["versions"].keys()
    assert facts["hardware"]["cpu"] and facts["hardware"]["memory_gb"] > 0.5

    page = Page(write_report(first))
    assert {"Scores", "Each class", "Calibration", "Mistakes", "Lengths and padding", "Time"} <= set(page.headings)
    accuracy = json.loads((first / "outcome.json").read_text())["metrics"]["eval_accuracy"]
    assert next(row for row in page.rows if row[0] == "accuracy" and len(row) == 5)[1] == f"{accuracy:.4f}"
    assert next(row for row in page.rows if row[:1] == ["train"])[:2] == ["train", "89"]
    assert f"afina rerun {re.escape(str(first))}" not in page.text and "afina rerun" in page.text, (
        "quoted for the shell"
    )

    # From elsewhere, when the recipe has changed meanwhile.
    before = tree(first)
    (place / "my recipe.yaml").write_text("name: something else\n")
    dry = _afina(place, "rerun", first, "--dry-run", "--json", cwd=tmp_path)
    assert dry.returncode == 0 and json.loads(dry.stdout)["differs"] == [], dry
    done = _afina(place, "rerun", first, "--run", second, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no recorded difference" in done.stdout
    assert "versions, device, precision and processes are those of the first run" in done.stdout
    assert f"afina: finished: {second}" in done.stdout
    assert tree(first) == before, "the old run is not touched"
    assert (second / "recipe.yaml").read_text() == (first / "recipe.yaml").read_text()
    assert (second / "metrics.jsonl").read_bytes() == (first / "metrics.jsonl").read_bytes()
    assert _weights(second) == _weights(first), "to the last bit, on the CPU"

    answer = json.loads(_afina(place, "compare", first, second, "--json").stdout)
    assert all(d["p"] == 1.0 for d in answer["tests"][0]["paired"]["differences"])
    assert answer["runs"][0]["recipe"] == {}


@pytest.fixture
def old(tmp_path: Path, site: Site, recipe: Callable[..., Recipe], model_folder: Path) -> Callable[..., RunDir]:
    """A claimed run that never ran, without a record unless one is given."""

    def make(record: dict[str, Any] | None = None, **changes: Any) -> RunDir:
        loaded = recipe(model=str(model_folder), **changes)
        file = tmp_path / "re cipes, 'mine'/recipe.yaml"
        plan = make_plan(loaded, site, recipe_file=file)
        prepared = {"model_commit": None, "data_commit": None, "digest": "1" * 64}
        return claim(plan, prepared, ["false"], file.read_text(), tmp_path / "old 'run'", record=record)

    return make


@pytest.fixture(autouse=True)
def _scratch(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))


def test_a_run_without_a_record_is_made_from_its_plan(old: Callable[..., RunDir]) -> None:
    run = old(train__epochs=2)
    again = plan_again(run.path)
    assert again.plan.recipe.train.epochs == 2 and again.text.startswith("{") is False
    assert any("no record.json" in note for note in again.notes)
    (run.path / "recipe.yaml").write_text("name: edited by hand\n")
    again = plan_again(run.path)
    assert again.plan.recipe.train == run.plan().recipe.train and any("taken from plan.json" in n for n in again.notes)
    (run.path / "recipe.yaml").unlink()
    assert plan_again(run.path).plan.recipe.name == "amazon-stars"


def test_revisions_are_pinned_and_files_found_where_they_were(
    old: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = old({"recipe": {"overrides": []}, "afina": "0.0.1"})
    prepared = {"model_commit": "1234567" + "e" * 33, "data_commit": None}
    (run.path / "prepared.json").write_text(json.dumps(prepared))
    monkeypatch.chdir(tmp_path)
    again = plan_again(run.path, JobRequest(num_processes=1))
    assert again.plan.recipe.revision == prepared["model_commit"]
    assert again.plan.files == run.plan().files and again.plan.recipe.data == run.plan().recipe.data
    assert any(note.startswith("afina: 0.0.1 then, ") for note in again.notes)
    before = run.plan()
    assert again.plan.geometry.global_batch == before.geometry.global_batch


def test_a_run_of_the_cpu_asks_for_no_gpu_as_a_job(
    recipe_file: Callable[..., Path], model_folder: Path, scratch: Path
) -> None:
    """A run claimed by `afina train` without a GPU; its short name refers to it."""
    file = recipe_file(model=str(model_folder), resources={"gpus_per_node": 2})
    plan = api.plan_for(file, JobRequest(num_processes=1, gpus_per_node=0))
    record = make_record(plan, {}, file.read_text(), None)
    claim_run(plan, scratch / "runs/cpu-1", prepared={}, record=record)
    again = plan_again("cpu-1", local=False)
    assert again.plan.recipe.resources.gpus_per_node == 0 and again.plan.geometry.gpus_per_node == 0
    assert not any("gpu" in word for word in sbatch_argv(again.plan, scratch / "runs/cpu-2"))
    named = run_named("cpu")
    assert named is not None and named.path == scratch / "runs/cpu-1" and run_named(file) is None
    assert plan_again("cpu-1", JobRequest(gpus_per_node=1), local=False).plan.geometry.gpus_per_node == 1


def test_a_run_goes_on_with_another_time_limit_and_no_other_change(
    old: Callable[..., RunDir], tmp_path: Path, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "sbatch", "echo 4711\n")
    program(tmp_path / "bin", "squeue", "exit 0\n")
    program(tmp_path / "bin", "sinfo", "echo 'gpu*|up|2:00:00|2|64|128000|gpu:4|idle'\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    run = old()
    shown = command("submit", run.path, "--time", "90", "--dry-run")
    assert (
        shown.returncode == 0 and f"  run      {run.path} (resumed)\n" in shown.stdout and "--time=90" in shown.stdout
    )
    changes = [["--set", "train.epochs=9"], ["--nodes", "2"], ["--run", "elsewhere"], ["--site", "other.env"]]
    for option in (*changes, ["--gpus-per-node", "0"], ["--rehearse"], ["--rehearse", "--dry-run"]):
        done = command("submit", run.path, *option)
        assert done.returncode == 2 and f"{option[0]}: " in done.stderr and "only --time can change" in done.stderr
    done = command("submit", run.path, "--time", "90")
    assert done.returncode == 0 and "afina logs" in done.stdout, done.stderr
    assert "--time=90" in list(run.lines("submissions.jsonl"))[-1]["argv"] and run.plan().recipe.resources.time != 90


def test_files_that_are_gone_are_named(old: Callable[..., RunDir], tmp_path: Path) -> None:
    run = old()
    (tmp_path / "re cipes, 'mine'/reviews.csv").unlink()
    with pytest.raises(DataError, match=r"reviews\.csv: does not exist any more"):
        plan_again(run.path)


def test_what_is_no_run_and_what_does_not_go_together(
    old: Callable[..., RunDir], tmp_path: Path, command: Callable[..., Ran]
) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        plan_again(tmp_path)
    run = old()
    for options in (
        ["--nodes", "2"],
        ["--time", "10"],
        ["--submit", "--num-processes", "2"],
        ["--time", "soon", "--submit"],
    ):
        done = command("rerun", run.path, *options)
        assert done.returncode == 2 and "remedy: " in done.stderr and "Traceback" not in done.stderr


def test_without_slurm_nothing_is_claimed(
    old: Callable[..., RunDir], scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = old()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(SlurmError, match="sbatch is not on PATH"):
        rerun(run.path, submit=True)
    assert not (scratch / "runs").exists()
