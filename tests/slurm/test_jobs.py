"""Whole runs on the test cluster, in the image: sbatch with a recipe, sbatch with a run, submitit, and afina train.

Tiny model, tiny reviews. Every way to start a run, on every geometry, is the same training: the same global batch, steps and
metrics.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from projects import give_to_user, project_folder
from tests import tiny
from tests.common import LONG, ROOT

RECIPE = tiny.recipe(
    name="tiny 'stars' $(touch never)",
    data={"split_by": "order"},  # exact shares
    train={"batch_size": 16, "epochs": 3, "learning_rate": 0.005, "seed": 1, "keep": "last", "log_every": None},
    metrics=["accuracy", "f1"],
    resources={"gpus_per_node": 1, "cpus_per_gpu": 1, "time": 10},
)


@pytest.fixture(scope="module")
def place(cluster: Cluster, image: Path) -> Iterator[Path]:
    """A project folder: recipe, reviews, model, site.env and the batch script."""
    with project_folder(cluster, 'afina it\'s a "project" ', image, RECIPE) as path:
        tiny.tiny_model(path / "model")
        config = path / "model/config.json"
        # Without dropout, whose masks depend on the number of processes.
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config.write_text(json.dumps(json.loads(config.read_text()) | still))
        tiny.write_csv(path / "reviews.csv", tiny.tiny_reviews(700, 1))
        shutil.copy(ROOT / "slurm/finetune.sbatch", path / "slurm/finetune.sbatch")
        give_to_user(path, cluster)
        yield path


def _newest(place: Path) -> Path:
    return max((place / "scratch/runs").iterdir(), key=lambda p: p.stat().st_mtime_ns)


def _finished(run: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads((run / "outcome.json").read_text())
    logs = "\n".join(log.read_text(errors="replace") for log in run.glob("attempts/*/node*.log"))
    assert outcome["outcome"] == "finished", f"{outcome}\n{logs}"
    return outcome


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _sbatch(cluster: Cluster, place: Path, *arguments: str, expect: str = "COMPLETED") -> Path:
    job = cluster.sbatch(*arguments, cwd=place)
    state = cluster.wait(job, timeout=240)
    log = (place / f"slurm-{job}.out").read_text(errors="replace")
    assert state == expect, f"{state}\n{log}\n{cluster.diagnose()}"
    return place / f"slurm-{job}.out"


@pytest.fixture(scope="module")
def single(cluster: Cluster, place: Path) -> Path:
    """The reference run: sbatch with a recipe, one process."""
    log = _sbatch(cluster, place, "--gpus-per-node=1", "--cpus-per-task=1", "slurm/finetune.sbatch", "recipe.yaml")
    assert "validation loss" in log.read_text(), "the tutorial's table is not in the job's log"
    return _newest(place)


@pytest.mark.timeout(600)
def test_a_recipe_through_sbatch_learns(single: Path) -> None:
    outcome = _finished(single)
    assert outcome["global_step"] == 105
    assert outcome["global_batch"] == 16
    assert outcome["metrics"]["eval_accuracy"] > 0.5
    assert (single / "model/model.safetensors").is_file()
    assert (single / "predictions.parquet").is_file()
    assert single.stat().st_mode & 0o777 == 0o700
    env = json.loads(next(single.glob("attempts/*/env.json")).read_text())
    assert env["container"].endswith(".sif")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (2, 2)])
def test_more_processes_are_the_same_training(
    cluster: Cluster, place: Path, single: Path, nodes: int, gpus: int
) -> None:
    _sbatch(
        cluster,
        place,
        f"--nodes={nodes}",
        f"--gpus-per-node={gpus}",
        "--cpus-per-task=2",
        "slurm/finetune.sbatch",
        "recipe.yaml",
        "--set",
        "train.arguments.weight_decay=0.0",
    )
    run = _newest(place)
    outcome = _finished(run)
    assert (outcome["world_size"], outcome["global_batch"], outcome["global_step"]) == (nodes * gpus, 16, 105)
    assert len(list(run.glob("attempts/*/node*.log"))) == nodes
    first, other = _metrics(single), _metrics(run)
    assert [line["step"] for line in first] == [line["step"] for line in other]
    # The same batches: the first losses are close (later ones drift apart by rounding), and it learns as well.
    assert other[0]["loss"] == pytest.approx(first[0]["loss"], rel=0.01)
    assert outcome["metrics"]["eval_accuracy"] > 0.5


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (2, 1)])
def test_submitit_is_the_same_training(
    cluster: Cluster, place: Path, host: Path, single: Path, nodes: int, gpus: int
) -> None:
    code = (
        "import afina, json\n"
        f"run = afina.submit('recipe.yaml', nodes={nodes}, gpus_per_node={gpus})\n"
        "first = run.state\n"
        "print(json.dumps([str(run.path), first, run.result(timeout_s=300).model_dump(), run.state]))\n"
    )
    answer = cluster.run_as_user([str(host / "python"), "-c", code], cwd=place, timeout=400, check=True)
    path, first, outcome, last = json.loads(answer.stdout.splitlines()[-1])
    assert (first in ("PENDING", "RUNNING"), last) == (True, "FINISHED")
    assert (outcome["world_size"], outcome["global_batch"]) == (nodes * gpus, 16)
    if nodes == 1:
        assert (Path(path) / "metrics.jsonl").read_bytes() == (single / "metrics.jsonl").read_bytes()
    else:
        assert outcome["metrics"]["eval_accuracy"] > 0.5


@pytest.mark.timeout(600)
def test_afina_train_and_submit_are_the_same_training(cluster: Cluster, place: Path, host: Path, single: Path) -> None:
    done = cluster.run_as_user(
        [str(host / "afina"), "train", "recipe.yaml", "--run", "runs/here"],
        cwd=place,
        timeout=300,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _finished(place / "runs/here")
    done = cluster.run_as_user(
        [str(host / "afina"), "submit", "recipe.yaml", "--wait", "--json"], cwd=place, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    submitted = Path(json.loads(done.stdout.splitlines()[-1])["run"])
    for run in (place / "runs/here", submitted):
        assert (run / "metrics.jsonl").read_bytes() == (single / "metrics.jsonl").read_bytes(), run


def _wait_for_the_first_step(place: Path, pattern: str) -> Path:
    for _ in range(720):
        run = next((place / "scratch/runs").glob(pattern), None)
        if run and (run / "events.jsonl").exists() and "first_step" in (run / "events.jsonl").read_text():
            return run
        time.sleep(0.25)
    raise AssertionError(f"no run {pattern} reached its first step")


@pytest.mark.timeout(600)
def test_the_signal_before_the_limit_stops_requeues_and_finishes_the_same_run(cluster: Cluster, place: Path) -> None:
    """Sends USR1 to the batch shell, as --signal=B:USR1 does; the time at which Slurm sends it is not tested."""
    settings = ("name=limited", "train.epochs=20", "train.evaluate=175", "train.save_every=175")
    options = [word for setting in settings for word in ("--set", setting)]
    script = ("slurm/finetune.sbatch", "recipe.yaml")
    job = cluster.sbatch("--gpus-per-node=1", "--cpus-per-task=1", *script, *options, cwd=place)
    run = _wait_for_the_first_step(place, "limited-*")
    cluster.run_as_user(["scancel", "--batch", "--signal=USR1", str(job)], check=True)
    assert cluster.wait(job, timeout=400, restarts=1) == "COMPLETED", (place / f"slurm-{job}.out").read_text()
    outcome = _finished(run)
    assert outcome["attempts"] == 2
    assert outcome["global_step"] == 700
    steps = [(line["step"], "eval_loss" in line) for line in _metrics(run)]
    assert steps == sorted(set(steps)), "a line is repeated or missing"
    assert len(steps) == 70 + 4


@pytest.mark.timeout(300)
def test_bad_input_is_refused_in_the_job_with_its_code(cluster: Cluster, place: Path) -> None:
    before = sorted((place / "scratch/runs").iterdir())
    job = cluster.sbatch("slurm/finetune.sbatch", "recipe.yaml", "--set", "data.label=starz", cwd=place)
    assert cluster.wait(job, timeout=120) == "FAILED"
    log = (place / f"slurm-{job}.out").read_text()
    assert "did you mean `stars`?" in log
    assert "Traceback" not in log
    assert str(cluster.job(job)["ExitCode"]).startswith("2:")
    assert sorted((place / "scratch/runs").iterdir()) == before


@pytest.mark.timeout(600)
def test_a_job_with_a_killed_rank_is_requeued(cluster: Cluster, place: Path, single: Path) -> None:
    """The model equals that of the undisturbed run."""
    job = cluster.sbatch(
        "--gpus-per-node=1",
        "--cpus-per-task=1",
        "slurm/finetune.sbatch",
        "recipe.yaml",
        "--set",
        "name=killed",
        cwd=place,
    )
    run = _wait_for_the_first_step(place, "killed-*")
    subprocess.run(["pkill", "-KILL", "-f", f"afina.worker train {re.escape(str(run))}"], check=True)
    assert cluster.wait(job, timeout=300, restarts=1) == "COMPLETED", (place / f"slurm-{job}.out").read_text()
    ended = [
        e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] == "attempt_ended"
    ]
    assert [(e["outcome"], e["cause"], e["next"]) for e in ended] == [("failed", "killed", "requeue")]
    assert _finished(run)["attempts"] == 2
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (single / name).read_bytes(), name


#: Log-probabilities of a model folder's own program, without afina, for the texts on standard input.
PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
assert not [name for name in sys.modules if name.startswith("afina")]
with torch.inference_mode():
    logits = [model.eval()(**tokenizer(text, return_tensors="pt")).logits[0] for text in json.load(sys.stdin)]
print(json.dumps(torch.stack(logits).log_softmax(1).tolist()))
"""


@pytest.mark.series
@pytest.mark.skipif(not LONG, reason="three minutes: AFINA_LONG=1 make test-cluster")
@pytest.mark.timeout(900)
def test_a_sharded_training_is_killed_and_cancelled_on_two_nodes_and_ends_on_one(cluster: Cluster, place: Path) -> None:
    """Its model has in plain Transformers the logits of the run."""
    import numpy as np
    import pyarrow.parquet as pq

    settings = ("name=sharded", "train.sharding=fsdp", "train.precision=fp32", "train.epochs=20", "train.save_every=20")
    options = [word for setting in settings for word in ("--set", setting)]
    geometry = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2")
    job = cluster.sbatch(*geometry, "slurm/finetune.sbatch", "recipe.yaml", *options, cwd=place)
    run = _wait_for_the_first_step(place, "sharded-*")

    def starts() -> list[int]:
        events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
        return [event["step"] for event in events if event["event"] == "first_step"]

    def wait_for(number: int) -> None:
        for _ in range(480):
            if len(starts()) == number and (number > 1 or any(run.glob("checkpoints/*/manifest.json"))):
                return
            time.sleep(0.25)
        raise AssertionError(f"{starts()}\n{cluster.diagnose()}")

    wait_for(1)
    subprocess.run(["pkill", "-KILL", "-o", "-f", f"afina.worker train {re.escape(str(run))}"], check=True)
    wait_for(2)
    cluster.run_as_user(["scancel", str(job)], check=True)
    assert cluster.wait(job, timeout=120, restarts=1) == "CANCELLED"
    step = max(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))
    assert len(list(run.glob(f"checkpoints/step-{step}/shard-*"))) == 4
    _sbatch(cluster, place, "--gpus-per-node=2", "--cpus-per-task=2", "slurm/finetune.sbatch", str(run))
    outcome = _finished(run)
    assert (outcome["attempts"], outcome["world_size"], outcome["global_step"]) == (3, 2, 700)
    assert len(starts()) == 3 and starts()[1] > 20 and starts()[2] == step + 1, starts()
    steps = [(line["step"], "eval_loss" in line) for line in _metrics(run)]
    assert steps == sorted(set(steps)), "a line is repeated"
    assert outcome["metrics"]["eval_accuracy"] > 0.5

    table = pq.read_table(run / "predictions.parquet")
    scores = np.stack([table[name].to_numpy() for name in table.column_names if name.startswith("score: ")], axis=1)
    argv = [sys.executable, "-W", "ignore", "-c", PLAIN, str(run / "model")]
    texts = json.dumps(table["text"].to_pylist())
    plain = subprocess.run(argv, input=texts, capture_output=True, text=True, check=True, timeout=300)
    assert np.abs(np.log(scores) - np.array(json.loads(plain.stdout))).max() < 1e-5


@pytest.mark.timeout(600)
def test_a_repeated_failure_ends_the_job(cluster: Cluster, place: Path) -> None:
    """The model's weights are truncated after the claim: the same failure twice, without a step in between."""
    shutil.copytree(place / "model", place / "broken")
    for name in [place / "broken", *(place / "broken").iterdir()]:
        shutil.chown(name, cluster.user, cluster.user)
    settings = ("name=broken", "model=broken", "train.epochs=300")
    options = [word for setting in settings for word in ("--set", setting)]
    job = cluster.sbatch(
        "--gpus-per-node=1", "--cpus-per-task=1", "slurm/finetune.sbatch", "recipe.yaml", *options, cwd=place
    )
    run = _wait_for_the_first_step(place, "broken-*")
    os.truncate(place / "broken/config.json", 10)
    subprocess.run(["pkill", "-KILL", "-f", f"afina.worker train {re.escape(str(run))}"], check=True)
    assert cluster.wait(job, timeout=300, restarts=1) == "FAILED", (place / f"slurm-{job}.out").read_text()
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["outcome"] == "failed" and "remedy" in outcome["error"]
