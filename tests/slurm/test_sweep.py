"""Sweeps on the test cluster, in the image: one array, killed cells and a failed node, repaired by the same command."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from projects import give_to_user, project_folder
from tests import tiny
from tests.common import LONG
from tests.processes import wait_until

RECIPE = tiny.recipe(
    name="sweep it's $(touch never)",
    data={"split_by": "order"},  # exact shares
    tokens={"max_length": 32},
    train={"batch_size": 16, "epochs": 40, "seed": 1, "evaluate": 800, "save_every": 50, "log_every": None},
    metrics=["accuracy"],
    resources={"gpus_per_node": 1, "cpus_per_gpu": 1, "time": 10},
)


@pytest.fixture(scope="module")
def place(cluster: Cluster, image: Path) -> Iterator[Path]:
    with project_folder(cluster, "afina swe'ep ", image, RECIPE) as path:
        tiny.tiny_model(path / "model")
        tiny.write_csv(path / "reviews.csv", tiny.tiny_reviews(400, 1))
        give_to_user(path, cluster)
        yield path


@pytest.fixture
def afina(cluster: Cluster, place: Path, host: Path) -> Callable[..., dict[str, Any]]:
    """Runs `afina sweep … --json` as the ordinary user, and checks its exit code."""

    def run(*words: str, code: int = 0) -> dict[str, Any]:
        done = cluster.run_as_user([str(host / "afina"), "sweep", *words, "--json"], cwd=place, timeout=400)
        assert done.returncode == code, done.stdout + done.stderr + cluster.diagnose()
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return found

    return run


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    try:
        lines = (run / "events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.timeout(900)
def test_the_same_command_repairs_a_sweep_with_a_killed_run_and_a_failed_node(
    cluster: Cluster, place: Path, afina: Callable[..., dict[str, Any]]
) -> None:
    command = ("recipe.yaml", "--grid", "train.learning_rate=5e-3,1e-3", "--seeds", "2", "--max-parallel", "4")
    first = afina(*command)
    home = Path(first["sweep"])
    cells = json.loads((home / "sweep.json").read_text())["cells"]
    runs = [home / "runs" / cell["name"] for cell in cells]
    assert len(runs) == 4 and set(first["states"].values()) <= {"PENDING", "RUNNING"}
    (array,) = first["jobs"]
    jobs = [f"{array}_{task}" for task in range(4)]
    for run in runs:
        wait_until(lambda run=run: any(run.glob("checkpoints/*/manifest.json")), 180, failure=f"{run} saved nothing")  # type: ignore[misc]

    # The process that trains, of the task whose job id is the array's: its shell requeues this task and no other.
    last = next(task for task in range(4) if cluster.job(jobs[task])["JobId"] == array)
    subprocess.run(["pkill", "-KILL", "-f", f"afina.worker train {re.escape(str(runs[last]))}"], check=True)
    # A whole run, its shell included: nothing can requeue it.
    lost = next(task for task in range(4) if task != last)
    cluster.run_as_user(["scancel", "--signal=KILL", "--batch", jobs[lost]], check=True)
    wait_until(
        lambda: int(cluster.job(jobs[last])["Restarts"]) == 1, 180, failure="the killed rank's task was not requeued"
    )
    assert [cluster.job(job)["Restarts"] for job in jobs] == ["1" if task == last else "0" for task in range(4)]
    cluster.wait(jobs[lost], timeout=60)
    node = cluster.job(jobs[next(task for task in range(4) if task not in (last, lost))])["NodeList"]
    cluster.fail_node(node)
    try:
        repaired = afina(*command)
        assert len(repaired["jobs"]) == 1 and repaired["jobs"] != first["jobs"]
        submitted = [json.loads(line) for line in (home / "submissions.jsonl").read_text().splitlines()]
        assert [line["tasks"] for line in submitted] == [[0, 1, 2, 3], [lost]]
        table = afina(*command, "--wait")
    finally:
        cluster.start_slurmd(node)
    assert sorted(row["states"]["FINISHED"] for row in table["rows"]) == [2, 2]
    for run in runs:
        outcome = json.loads((run / "outcome.json").read_text())
        assert (outcome["outcome"], outcome["global_step"]) == ("finished", 800), outcome
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [(line["step"], "eval_loss" in line) for line in lines]
        assert steps == sorted(set(steps)), "a line is repeated"
    for task in (lost, last):
        began = _events(runs[task], "training")
        # The killed one may meet the failing node too.
        assert len(began) >= 2 and all(event["step"] > 0 for event in began[1:]), "it restarted from step 0"
    restarts = int(cluster.job(jobs[last])["Restarts"])
    assert restarts in (1, 2)
    assert {path.name for path in runs[last].glob("attempts/*")} == {f"{jobs[last]}.{n}" for n in range(restarts + 1)}

    # Finished cells are not run again; a larger grid runs only its new cells.
    assert afina(*command)["jobs"] == []
    (job,) = afina("recipe.yaml", "--grid", "train.learning_rate=5e-3,1e-3", "--seeds", "3")["jobs"]
    cluster.run_as_user(["scancel", str(job)], check=True)
    assert json.loads((home / "submissions.jsonl").read_text().splitlines()[-1])["tasks"] == [4, 5]
    assert len({json.loads((run / "prepared.json").read_text())["digest"] for run in (home / "runs").iterdir()}) == 1


@pytest.mark.timeout(600)
def test_array_tasks_ask_for_their_trials(cluster: Cluster, place: Path, afina: Callable[..., dict[str, Any]]) -> None:
    command = ("recipe.yaml", "--search", "train.learning_rate=1e-4..1e-2:log", "--set", "train.epochs=4")
    table = afina(*command, "--trials", "3", "--max-parallel", "2", "--sweep", "sear ch", "--wait")
    assert [row["states"] for row in table["rows"]] == [{"FINISHED": 1}] * 3
    tried = [float(row["overrides"]["train.learning_rate"]) for row in table["rows"]]
    assert len(set(tried)) == 3 and all(1e-4 <= rate <= 1e-2 for rate in tried)
    # The next trial reports earlier values: the third reports at least one of the first two.
    journal = [json.loads(line) for line in (place / "sear ch/journal.log").read_text().splitlines()]
    assert [line["values"] for line in journal if line.get("values")]
    assert not list(place.rglob("never"))


@pytest.mark.series
@pytest.mark.skipif(not LONG, reason="three minutes: AFINA_LONG=1 make test-cluster")
@pytest.mark.timeout(900)
def test_a_pruned_trial_frees_its_slot_and_stays_pruned_when_it_is_killed(
    cluster: Cluster, place: Path, afina: Callable[..., dict[str, Any]]
) -> None:
    """The search's seed gives the first five trials rates that learn, and the others rates that do not."""
    search = "--search train.learning_rate=1e-8..1e-2:log --search-seed 971 --trials 8 --prune --max-parallel 2"
    settings = ("train.epochs=8", "train.evaluate=20", "train.save_every=20", "name=pruning")
    command = ("recipe.yaml", *search.split(), *(word for setting in settings for word in ("--set", setting)))
    first = afina(*command)
    runs = [Path(first["sweep"]) / f"runs/trial-{n:03}" for n in range(8)]
    (array,) = first["jobs"]
    wait_until(lambda: bool(_events(runs[6], "stopped_early")), 600, failure="trial 6 was not pruned")
    # Between its decision and its end: the next attempt has the decision from the checkpoint, or makes it again.
    subprocess.run(["pkill", "-KILL", "-f", f"afina.worker train {re.escape(str(runs[6]))}"], check=True)
    table = afina(*command, "--wait")
    assert [row["states"] for row in table["rows"]] == [{"FINISHED": 1}] * 8
    pruned = {row["point"] for row in table["rows"] if row.get("pruned")}
    # The sixth runs beside the fifth: it may have had too few finished ones to be compared with.
    assert {"trial-006", "trial-007"} <= pruned <= {"trial-005", "trial-006", "trial-007"}
    assert f", {len(pruned)} of them pruned: " in table["notes"][0]
    outcomes = {run.name: json.loads((run / "outcome.json").read_text()) for run in runs}
    assert {name for name, o in outcomes.items() if o["pruned"]} == pruned
    assert {name for name, o in outcomes.items() if o["global_step"] < 160} == pruned
    assert {cluster.job(f"{array}_{n}")["JobState"] for n in range(8)} == {"COMPLETED"}
    assert sorted(path.name for path in runs[6].glob("attempts/*")) == [f"{array}_6.0", f"{array}_6.1"]
    assert len({event["step"] for event in _events(runs[6], "stopped_early")}) == 1, "another decision after the kill"
    # The same command has nothing left to do.
    assert afina(*command)["jobs"] == []


@pytest.mark.series
@pytest.mark.skipif(not LONG, reason="three minutes: AFINA_LONG=1 make test-cluster")
@pytest.mark.timeout(900)
def test_the_same_command_repairs_folds_and_every_row_is_predicted_once_in_each_repeat(
    cluster: Cluster, place: Path, afina: Callable[..., dict[str, Any]]
) -> None:
    """A run is killed with its shell, and a node fails; the rest of the array goes on."""
    import pyarrow.parquet as pq

    settings = ("train.epochs=10", "train.evaluate=100", "train.save_every=20", "name=folds")
    command = ("recipe.yaml", "--folds", "5", "--repeats", "2", "--max-parallel", "4")
    command += tuple(word for setting in settings for word in ("--set", setting))
    first = afina(*command)
    home = Path(first["sweep"])
    runs = [home / "runs" / cell["name"] for cell in json.loads((home / "sweep.json").read_text())["cells"]]
    (array,) = first["jobs"]
    assert len(runs) == 10
    for run in runs[:2]:
        wait_until(lambda run=run: any(run.glob("checkpoints/*/manifest.json")), 180, failure=f"{run} saved nothing")  # type: ignore[misc]
    cluster.run_as_user(["scancel", "--signal=KILL", "--batch", f"{array}_0"], check=True)
    cluster.wait(f"{array}_0", timeout=60)
    node = cluster.job(f"{array}_1")["NodeList"]
    cluster.fail_node(node)
    try:
        assert len(afina(*command)["jobs"]) == 1
        assert json.loads((home / "submissions.jsonl").read_text().splitlines()[-1])["tasks"] == [0]
    finally:
        cluster.start_slurmd(node)
    (row,) = afina(*command, "--wait")["rows"]
    assert len(row["values"]) == 10 and row["states"] == {"FINISHED": 10}
    low, high = row["interval"]
    assert low < row["mean"] < high
    for run in runs[:2]:
        began = _events(run, "training")
        assert len(began) >= 2 and all(event["step"] > 0 for event in began[1:]), "it restarted from step 0"
    table = pq.read_table(home / "out_of_fold.parquet").to_pydict()
    assert table["repeat"] == [1] * 400 + [2] * 400 and table["row"] == [*range(1, 401)] * 2
    assert {(repeat, fold) for repeat, fold in zip(table["repeat"], table["fold"], strict=True)} == {
        (repeat, fold) for repeat in (1, 2) for fold in range(1, 6)
    }
