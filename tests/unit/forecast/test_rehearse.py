"""A rehearsal for real, with a tiny model: network cut, nothing left, and its forecast beside the run that follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.common import program
from tests.unit.conftest import tree
from tests.unit.forks import run_here
from tests.unit.training.in_process import train_here

from afina.api import plan_for
from afina.forecast.evidence import earlier_runs, workload_of
from afina.run.job_request import JobRequest
from afina.worker.checks.model_check import check_model_on_rows
from afina.worker.data.prepare import prepare

Ran = subprocess.CompletedProcess[str]
#: Changes of a recipe, and whether a run without the change tells its speed and memory.
LIKENESS = {
    "tokens.max_length=48": 0,
    "train.precision=bf16": 0,
    "train.freeze=1": 0,
    "train.onednn=false": 0,
    "train.cuda_graphs=true": 0,
    "train.eval_batch_size=4": 0,
    "train.batch_size=8": 0,
    "train.arguments.optim=sgd": 0,
    "adapter={rank: 2}": 0,
    "train.arguments.weight_decay=0.1": 1,
    "train.epochs=7": 1,
    "train.learning_rate=0.5": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("it's a place")
    (place / "scra tch").mkdir()
    resources = {"gpus_per_node": 0, "cpus_per_gpu": 1, "time": 30}
    tiny.write_project(place, 260, train={"batch_size": 16, "epochs": 2}, resources=resources)
    return place


def afina(place: Path, *arguments: str, **env: str) -> Ran:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return run_here(*arguments, env={"AFINA_SCRATCH": str(place / "scra tch"), **env})


@pytest.fixture(scope="module")
def prepared(place: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFINA_SCRATCH", str(place / "scra tch"))
        plan = plan_for(place / "recipe.yaml")
    answer = prepare(plan)
    check_model_on_rows(plan, answer, print)
    return answer


@pytest.fixture(scope="module")
def rehearsed(place: Path, prepared: dict[str, Any]) -> dict[str, Any]:
    before = tree(place)
    done = afina(place, "rehearse", "recipe.yaml", "--seconds", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    assert tree(place) == before, "something is left of the rehearsal"
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_a_rehearsal_makes_steps_a_save_and_an_evaluation(rehearsed: dict[str, Any], prepared: dict[str, Any]) -> None:
    measured = rehearsed["measured"]
    assert rehearsed["basis"] == "rehearsal" and measured["device"] == "cpu"
    assert len(measured["seconds"]) == len(measured["costs"]) >= 2
    assert measured["checkpoint_bytes"] > 12 * measured["parameters"] and measured["eval_seconds_per_cost"] > 0
    assert rehearsed["total_steps"] == 2 * 14
    # The longest batch of the epoch has more tokens than sixteen mean rows.
    assert measured["longest_tokens"] > 16 * prepared["tokens"]["train"] / prepared["rows"]["train"]
    assert measured["base_bytes"] < measured["peak_bytes"] < 3e9


@pytest.mark.slow
def test_the_network_is_cut_where_the_kernel_allows_it(rehearsed: dict[str, Any]) -> None:
    code = (
        "import ctypes,sys; libc = ctypes.CDLL(None); sys.exit(libc.unshare(0x40000000) and libc.unshare(0x50000000))"
    )
    allowed = subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert rehearsed["measured"]["network"] == ("cut" if allowed else "offline variables")


def test_a_process_that_has_left_the_network_reaches_nobody() -> None:
    """Not even this machine."""
    code = (
        "import os, socket\nfrom afina.worker.isolation import cut_network, interfaces\n"
        "server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen()\n"
        "before = os.getuid(), os.getgid()\n"
        "if not cut_network(): raise SystemExit(77)\n"
        "assert (os.getuid(), os.getgid()) == before and interfaces() == []\n"
        "try: socket.create_connection(server.getsockname(), timeout=5)\n"
        "except OSError as error: print(error)\n"
        "else: raise SystemExit('connected')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel lets no ordinary user leave the network")
    assert done.returncode == 0 and "unreachable" in done.stdout, done


@pytest.mark.slow
def test_the_work_of_a_run_is_in_the_answer_of_the_prepare_stage(
    place: Path, prepared: dict[str, Any], monkeypatch: pytest.MonkeyPatch, rehearsed: dict[str, Any]
) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(place / "scra tch"))
    work = workload_of(plan_for(place / "recipe.yaml"), prepared)
    assert work.rows == {"train": 212, "eval": 48} and not work.simple_models and work.sizes is not None
    assert (
        work.sizes.weights == 4 * rehearsed["measured"]["parameters"]
        and work.sizes.checkpoint == 3 * work.sizes.weights
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_is_the_evidence_of_the_next_forecast(
    place: Path, prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submission writes the forecast down, after a rehearsal with its measurements."""
    scratch = place / "scra tch"
    train_here(place / "recipe.yaml", scratch / "runs/first", env={"AFINA_SCRATCH": str(scratch)})
    monkeypatch.setenv("AFINA_SCRATCH", str(place / "scra tch"))
    (run,) = earlier_runs(plan_for(place / "recipe.yaml"))
    outcome = json.loads(next((place / "scra tch/runs").glob("*/outcome.json")).read_text())
    tokens = prepared["tokens"]
    assert run.tokens_per_second == pytest.approx(outcome["samples_per_second"] * tokens["train"] / 212)
    assert run.tokens_per_second == pytest.approx(outcome["utilisation"]["tokens_per_second"], rel=0.01)
    assert run.device == "cpu" and 0 < run.startup_seconds < outcome["seconds"]
    passes = 2 + (outcome["model_step"] != outcome["global_step"])  # once more for the predictions of the best step
    assert run.evaluated_tokens == passes * tokens["eval"] and run.simple_seconds is None, "the recipe has no baselines"
    for change, alike in LIKENESS.items():
        assert len(earlier_runs(plan_for(place / "recipe.yaml", JobRequest(overrides=[change])))) == alike, change

    folder = tmp_path / "fake bin"
    program(folder, "sinfo", "echo 'gpu*|up|30:00|1-infinite|1|4|16000|(null)|idle'\n")
    program(folder, "scontrol", "echo 'JobRequeue = 1'\n")
    program(folder, "sbatch", "echo 77\n")
    path = f"{folder}:{os.environ['PATH']}"
    done = afina(place, "submit", "recipe.yaml", "--run", "quick", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "forecast from earlier runs like it: 28 steps" in done.stdout and "submitted job 77" in done.stdout
    forecast = json.loads((place / "quick/estimate.json").read_text())
    assert forecast["basis"] == "earlier runs" and forecast["limit_min"] == 30 and forecast["measured"] is None

    done = afina(place, "submit", "recipe.yaml", "--rehearse", "--run", "careful", "--json", PATH=path)
    assert done.returncode == 0, done.stderr
    submitted = json.loads(done.stdout)
    assert submitted["job_id"] == "77" and submitted["estimate"] == json.loads(
        (place / "careful/estimate.json").read_text()
    )
    assert submitted["estimate"]["basis"] == "rehearsal" and len(submitted["estimate"]["measured"]["seconds"]) >= 2
    assert not list((place / "scra tch").glob(".rehearsal-*"))


@pytest.mark.slow
def test_what_fails_in_the_rehearsal_is_not_submitted(place: Path, prepared: dict[str, Any], tmp_path: Path) -> None:
    """A learning rate that breaks the loss; the run directory goes, and nothing is asked of Slurm."""
    folder = tmp_path / "fake bin"
    program(folder, "sinfo", "exit 1\n")
    program(folder, "sbatch", f"[ \"$1\" = --version ] || touch '{tmp_path}/submitted'; echo 77\n")
    done = afina(
        place, "submit", "recipe.yaml", "--rehearse", "--run", "never", "--set", "train.learning_rate=1e30",
        "--set", "train.arguments.max_grad_norm=0", PATH=f"{folder}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 4 and "the loss is not finite at step" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "never").exists() and not (tmp_path / "submitted").exists()
    assert not list((place / "scra tch").glob(".rehearsal-*"))
