"""Real trainings of tiny models: every task, one and two processes, stops and resumes, and the files that are written.

A run that is stopped by signals is a command, as a user starts it; the others are forks (`train_here`, `run_here`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.unit.forks import run_here
from tests.unit.training.in_process import attempt_here, train_here


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models (with dropout, and without), reviews in several shapes, and a scratch folder."""
    place = tmp_path_factory.mktemp("it's a place")
    tiny.write_project(place)
    still = shutil.copytree(place / "model", place / "still")
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    rows = tiny.tiny_reviews(203, 7)
    flags = {"good": (4, 5), "bad": (1, 2), "extreme": (1, 5)}
    many = [{"text": r["text"], **{name: int(r["stars"] in of) for name, of in flags.items()}} for r in rows]
    tiny.write_csv(place / "many.csv", many)
    return place


def _recipe(*, train: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    sections = {"metrics": ["accuracy", "f1"], **sections}
    return tiny.recipe(train={"epochs": 2, "seed": 1, **(train or {})}, **sections)


def _environment(place: Path) -> dict[str, str]:
    return {**os.environ, "AFINA_SCRATCH": str(place / "scratch"), "HF_HUB_OFFLINE": "1"}


def _start(place: Path, run: Path, recipe: dict[str, Any], *options: str) -> subprocess.Popen[str]:
    file = run.with_suffix(".yaml")
    file.write_text(json.dumps(recipe))
    argv = [sys.executable, "-m", "afina", "train", str(file), "--run", str(run), *options]
    return subprocess.Popen(argv, env=_environment(place), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _train_here(
    place: Path,
    name: str,
    recipe: dict[str, Any],
    processes: int = 1,
    code: int = 0,
    constants: Mapping[str, object] = {},
) -> Path:
    file = place / f"{name}.yaml"
    file.write_text(json.dumps(recipe))
    env = _environment(place)
    return train_here(file, place / name, num_processes=processes, code=code, env=env, constants=constants)


def _stop_here(place: Path, name: str, recipe: dict[str, Any], lines: int, processes: int = 1) -> Path:
    """A run that is asked to stop when its metrics log has `lines` lines; it looks at each step, or might be over before."""
    constants = {"afina.worker.survival.stop._CHECK_EVERY_S": 0.0}
    with ThreadPoolExecutor(1) as thread:
        stopped = thread.submit(_train_here, place, name, recipe, processes, 75, constants)
        _wait_for_lines(place / name, lines)
        (place / name / "stop").touch()
        return stopped.result()


def _resume(place: Path, run: Path, *options: str) -> tuple[int, str]:
    done = run_here("resume", run, *options, env=_environment(place))
    return done.returncode, done.stdout + done.stderr


def _outcome(run: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads((run / "outcome.json").read_text())
    return outcome


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _wait_for_lines(run: Path, count: int, *, attempt: int = 1) -> None:
    """Until the given attempt trains and the metrics log has at least `count` lines."""
    for _ in range(6000):
        events, metrics = run / "events.jsonl", run / "metrics.jsonl"
        started = events.exists() and events.read_text().count("first_step") >= attempt
        if started and metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not reach {count} lines")


#: Every step is evaluated, so that each stop leaves an evaluation to the next attempt.
WHOLE = _recipe(
    train={"epochs": 4, "evaluate": 1, "save_every": 5},
    metrics=["accuracy", "precision", "recall", "f1", "mcc", "confusion_matrix"],
)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The undisturbed run."""
    return _train_here(place, "whole", WHOLE)


#: Without dropout, whose masks depend on the number of processes, and in float32.
STILL = {"model": "still", "train": {"precision": "fp32"}}


@pytest.fixture(scope="module")
def packed(place: Path) -> Path:
    """A run of one process, without dropout, eight epochs."""
    return _train_here(place, "one-packed", _recipe(model="still", train={"precision": "fp32", "epochs": 8}))


def test_a_finished_run_has_all_promised_files(whole: Path) -> None:
    import pyarrow.parquet as pq

    outcome = _outcome(whole)
    steps = -(-156 // 8) * 4
    assert [outcome[key] for key in ("outcome", "exit_code", "attempts", "global_step")] == ["finished", 0, 1, steps]
    assert {"eval_confusion_matrix", "eval_mcc", "eval_recall_per_class"} <= set(outcome["metrics"])
    assert outcome["samples_per_second"] > 0
    assert outcome["seconds"] > 0
    table = pq.read_table(whole / "predictions.parquet").to_pydict()
    assert len(table["text"]) == 47
    right = sum(a == b for a, b in zip(table["label"], table["prediction"], strict=True))
    assert right / 47 == pytest.approx(outcome["metrics"]["eval_accuracy"])
    kept = [path.name for path in (whole / "checkpoints").iterdir()]
    assert kept == [f"step-{outcome['model_step']}"], "train.keep_after: best"
    assert isinstance(outcome["warnings"], list)
    assert np.load(whole / "trained_rows.npy").shape == (156, 2), "every row of train once"
    config = json.loads((whole / "model/config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
    log = (whole / "attempts/local-1/node0.log").read_text()
    assert "validation loss" in log and "Traceback" not in log
    assert whole.stat().st_mode & 0o777 == 0o700


def test_the_exported_model_repeats_the_recorded_predictions_in_a_plain_pipeline(whole: Path) -> None:
    code = (
        "import json, sys\nfrom transformers import pipeline\nimport pyarrow.parquet as pq\n"
        "table = pq.read_table(sys.argv[1] + '/predictions.parquet').to_pydict()\n"
        "classify = pipeline('text-classification', model=sys.argv[1] + '/model', top_k=None, max_length=64, truncation=True)\n"
        "answers = [{each['label']: each['score'] for each in one} for one in classify(table['text'])]\n"
        "apart = max(abs(p - table['score: ' + n][i]) for i, one in enumerate(answers) for n, p in one.items())\n"
        "print(json.dumps([sorted(answers[0]), apart]))\n"
    )
    argv = [sys.executable, "-W", "ignore", "-c", code, str(whole)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    labels, apart = json.loads(done.stdout.splitlines()[-1])
    assert labels == ["1", "2", "3", "4", "5"] and apart < 1e-5
    assert (whole / "model/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_is_stopped_repeatedly_equals_the_undisturbed_run(place: Path, whole: Path) -> None:
    run = place / "stopped"
    process = _start(place, run, WHOLE)
    _wait_for_lines(run, 5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert _outcome(run)["outcome"] == "stopped"
    with ThreadPoolExecutor(1) as thread:
        resumed = thread.submit(attempt_here, run, "local-2", code=75, env=_environment(place))
        _wait_for_lines(run, 20, attempt=2)
        os.kill(json.loads((run / "lease.json").read_text())["pid"], signal.SIGTERM)
        resumed.result()
    resume = [sys.executable, "-m", "afina", "resume", str(run)]
    resumed = subprocess.Popen(resume, env=_environment(place), stdout=subprocess.DEVNULL)
    _wait_for_lines(run, 50, attempt=3)
    subprocess.run(["pkill", "-KILL", "-f", f"afina.worker train {run}"], check=True)
    assert resumed.wait(timeout=120) == 4
    assert "signal 9" in _outcome(run)["error"]
    code, output = _resume(place, run)
    assert code == 0, output
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert _outcome(run)["attempts"] == 4
    code, output = _resume(place, run)
    assert code == 0, "a finished run stays as it is"
    assert "nothing to do: this run has finished" in output and "to train further" in output


def _assert_close(run: Path, reference: Path, steps: int) -> None:
    """Losses, metrics and gradient norms of the first `steps` steps differ by rounding only."""
    lines, expected = ([line for line in _lines(one) if line["step"] <= steps] for one in (run, reference))
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for a, b in zip(expected, lines, strict=True):
        for key in ("loss", "training_loss", "eval_loss", "eval_accuracy", "grad_norm"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), (a["step"], key)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batching", ["longest", "grouped"])
def test_two_processes_that_accumulate_are_the_same_training(place: Path, batching: str) -> None:
    """Uneven last steps included."""
    recipe = _recipe(**STILL, tokens={"batching": batching})
    one = _train_here(place, f"one-{batching}", recipe)
    recipe["train"]["max_batch_per_device"] = 2
    _assert_close(_train_here(place, f"two-{batching}", recipe, 2), one, 42)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_or_accumulation_are_the_same_packed_training(place: Path, packed: Path) -> None:
    recipe = json.loads(packed.with_suffix(".yaml").read_text())
    two = _train_here(place, "two-packed", recipe, 2)
    recipe["train"]["max_batch_per_device"] = 2
    parts = _train_here(place, "parts-packed", recipe)
    for run in (two, parts):
        _assert_close(run, packed, 42)


def test_the_training_loss_of_an_epoch_is_the_mean_over_its_examples(packed: Path) -> None:
    lines = _lines(packed)
    losses = [line["loss"] for line in lines if "loss" in line]
    means = [line["training_loss"] for line in lines if "training_loss" in line]
    assert len(losses) == 20 * 8 and len(means) == 8
    for epoch, mean in enumerate(means):
        of_epoch = losses[20 * epoch : 20 * (epoch + 1)]
        assert mean == pytest.approx((8 * sum(of_epoch[:19]) + 4 * of_epoch[19]) / 156, rel=1e-5)
    assert f"{means[0]:.6f}" in (packed / "attempts/local-1/node0.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_weighted_loss_is_the_same_on_two_processes_that_accumulate_and_pytorchs_own(place: Path) -> None:
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    rows = [{**row, "weight": (0, 0.5, 1, 4)[n % 4]} for n, row in enumerate(tiny.tiny_reviews(203, 7))]
    tiny.write_csv(place / "weighted.csv", rows)
    recipe = _recipe(
        model="still",
        data={"files": {"all": "weighted.csv"}, "weight": "weight"},
        train={"precision": "fp32", "epochs": 1, "class_weights": {"1": 3, "5": 0.5}, "label_smoothing": 0.1},
    )
    one = _train_here(place, "weighted", recipe)
    recipe["train"]["max_batch_per_device"] = 2
    recipe["tokens"]["batching"] = "padded"
    two = _train_here(place, "weighted-two", recipe, 2)
    _assert_close(two, one, 21)
    assert _lines(two)[0]["loss"] == pytest.approx(_lines(one)[0]["loss"], rel=2e-6)
    table = pq.read_table(one / "predictions.parquet").to_pydict()
    names = _outcome(one)["labels"]
    prepared = Path(json.loads((one / "prepared.json").read_text())["prepared"])
    weights = torch.from_numpy(np.load(prepared / "eval.weights.npy")).double()
    assert weights.tolist() == [{row["text"]: row["weight"] for row in rows}[text] for text in table["text"]]
    logits = torch.tensor([table[f"score: {name}"] for name in names]).T.double().log()
    labels, of_classes = (
        torch.tensor([names.index(label) for label in table["label"]]),
        torch.tensor([3, 1, 1, 1, 0.5]).double(),
    )
    each = torch.nn.functional.cross_entropy(logits, labels, of_classes, reduction="none", label_smoothing=0.1)
    expected = (weights * each).sum() / (weights * of_classes[labels]).sum()
    assert _outcome(one)["metrics"]["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_of_one_process_resumes_with_two(place: Path, packed: Path) -> None:
    run = _stop_here(place, "geometry", json.loads(packed.with_suffix(".yaml").read_text()), 4)
    code, output = _resume(place, run, "--num-processes", "2")
    assert code == 0, output
    one, two = _lines(packed), _lines(run)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_evaluation_interrupted_by_a_stop_is_repeated_by_the_next_attempt(place: Path) -> None:
    """The evaluation takes seconds, one row at a time; the stop is requested when its step has been logged."""
    tiny.write_csv(place / "long.csv", tiny.tiny_reviews(300, 11))
    recipe = _recipe(
        data={"files": {"train": "reviews.csv", "eval": "long.csv"}, "train": None, "eval": None},
        tokens={"batching": "longest"},
        train={"max_steps": 12, "evaluate": 6, "epochs": None, "eval_batch_size": 1},
    )
    whole = _train_here(place, "evaluated", recipe, 2)
    run = _stop_here(place, "abandoned", recipe, 6, 2)
    assert [line["step"] for line in _lines(run)] == [1, 2, 3, 4, 5, 6], "the stop did not wait for the evaluation"
    assert (_outcome(run)["cause"], _outcome(run)["global_step"]) == ("asked", 6)
    attempt_here(run, "local-2", num_processes=2, env=_environment(place))
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.timeout(300)
def test_the_deadline_stops_a_run_with_a_checkpoint_and_save_minutes_limits_the_age_of_the_newest(place: Path) -> None:
    """The stop begins half a second, two saves and three steps before the deadline: ten seconds leave some for the training."""
    train = {"epochs": 4000, "save_every": 50000, "save_minutes": 0.005, "evaluate": 50000, "log_every": 100}
    file = place / "limited.yaml"
    file.write_text(json.dumps(_recipe(train=train)))
    env = {**_environment(place), "AFINA_DEADLINE": str(time.time() + 10)}
    constants = {"afina.schedule._INEXACT_S": 0.5}
    run = train_here(file, place / "limited", code=75, env=env, constants=constants)
    outcome = _outcome(run)
    assert outcome["cause"] == "limit"
    assert (run / f"checkpoints/step-{outcome['global_step']}/manifest.json").is_file()
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    saved = [event for event in events if event["event"] == "checkpoint"]
    assert len(saved) > 2
    assert all(event["bytes"] > 0 and event["seconds"] > 0 and event["stall_s"] >= 0 for event in saved)


@pytest.mark.parametrize(
    ("kind", "sections", "keys"),
    [
        (
            "regression",
            {"task": "regression", "data": {"label": "rating"}, "metrics": ["mse", "mae", "pearson", "spearman"]},
            {"eval_mse", "eval_mae", "eval_pearson", "eval_spearman"},
        ),
        (
            "multi_label_classification",
            {
                "data": {"label": ["good", "bad", "extreme"], "files": {"all": "many.csv"}},
                "metrics": ["f1", "f1_micro", "subset_accuracy", "auroc", "costs:total:lower"],
                "train": {"best_metric": "total"},
            },
            {"eval_f1", "eval_f1_micro", "eval_subset_accuracy", "eval_auroc", "eval_total"},
        ),
    ],
)
def test_the_other_tasks_train_and_compute_their_metrics(
    place: Path, kind: str, sections: dict[str, Any], keys: set[str]
) -> None:
    (place / "costs.py").write_text("def total(labels, predictions):\n    return (labels != predictions).sum() / 7\n")
    run = _train_here(place, kind, _recipe(**sections))
    outcome = _outcome(run)
    assert keys <= set(outcome["metrics"])
    if kind != "regression":  # one's own metric, of which the least is best, chose the checkpoint
        totals = {line["step"]: line["eval_total"] for line in _lines(run) if "eval_total" in line}
        assert outcome["best_step"] == min(totals, key=lambda step: (totals[step], step))
        assert outcome["metrics"]["eval_total"] == totals[outcome["model_step"]]
    config = json.loads((run / "model/config.json").read_text())
    assert config["problem_type"] == kind
    if kind != "regression":
        assert list(config["id2label"].values()) == ["good", "bad", "extreme"]
    losses = [line["loss"] for line in _lines(run) if "loss" in line]
    assert len(losses) == outcome["global_step"]
    assert min(losses[-10:]) < losses[0]


def test_a_loss_that_is_not_finite_fails_the_run(place: Path) -> None:
    run = _train_here(place, "nan", _recipe(train={"learning_rate": 1e20, "arguments": {"max_grad_norm": 0}}), code=4)
    outcome = _outcome(run)
    assert outcome["outcome"] == "failed"
    assert (outcome["cause"], outcome["exit_code"]) == ("loss", 4)
    assert "rows of that step: " in outcome["error"] and "remedy" in outcome["error"]
    step = int(outcome["error"].split("at step ")[1].split()[0])
    rows = outcome["error"].split("rows of that step: ")[1].splitlines()[0]
    assert step >= 1 and rows.count("row ") == 8 and "reviews.csv" in rows, rows


def test_a_claimed_run_directory_is_refused_and_unchanged(place: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    done = run_here("train", whole.with_suffix(".yaml"), "--run", whole, env=_environment(place))
    assert done.returncode == 2
    assert "this run has finished" in done.stderr and "model=" in done.stderr and "Traceback" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_damaged_checkpoints_are_set_aside_or_refused(place: Path) -> None:
    """One stopped run: every checkpoint damaged, then deleted, then restored but for the newest one's optimizer state."""
    run = _stop_here(place, "damaged", _recipe(train={"save_every": 2, "epochs": 8}), 9)
    checkpoints, kept = run / "checkpoints", place / "kept checkpoints"
    shutil.copytree(checkpoints, kept)
    for checkpoint in checkpoints.glob("step-*"):
        with (checkpoint / "model.safetensors").open("r+b") as file:
            file.seek(5000)
            byte = file.read(1)
            file.seek(5000)
            file.write(bytes([byte[0] ^ 1]))
    code, output = _resume(place, run)
    assert code == 3
    assert "no checkpoint is usable" in output
    shutil.rmtree(checkpoints)
    code, output = _resume(place, run)
    assert code == 2 and "there is no checkpoint of them" in output and "afina rerun" in output
    kept.rename(checkpoints)
    newest, older = sorted(checkpoints.glob("step-*"), key=lambda p: -int(p.name.split("-")[1]))[:2]
    (newest / "optimizer.pt").unlink()
    code, output = _resume(place, run)
    assert code == 0, output
    assert f"resuming from {older.name}" in output and "optimizer.pt: is missing" in output
