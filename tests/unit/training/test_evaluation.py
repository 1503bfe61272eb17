"""Evaluation: scores by blocks of rows, logits in a file, logits of several ranks, labels of predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests import tiny
from tests.unit.training.in_process import train_here

from afina.statistics.decision_rule import probabilities
from afina.worker.data.prepared import Split
from afina.worker.task.losses import Loss
from afina.worker.task.scoring import compute_metrics
from afina.worker.task.tasks import TASKS, decisions
from afina.worker.task.word_places import CUT, SHARED, WordPlaces
from afina.worker.training import evaluation
from afina.worker.training.results.write_predictions import _columns


@pytest.mark.parametrize("task", [task for task in TASKS if task != "token-classification"])
def test_scores_do_not_depend_on_blocks_or_on_where_the_logits_lie(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(4)
    count, width = 5001, 1 if task == "regression" else 5
    logits = draw.normal(size=(count, width)).astype(np.float32)
    labels = {
        "single-label": draw.integers(0, 5, count),
        "multi-label": (draw.random((count, 5)) > 0.6).astype(np.float32),
        "regression": draw.normal(size=count).astype(np.float32),
    }[task]
    from afina.recipe.metrics import METRICS

    names = list(METRICS[task])
    loss = Loss(task)
    split = Split(np.empty(0, np.uint16), np.arange(count + 1), labels)
    whole = evaluation.scores(loss, names, logits, split)
    wide = np.float64 if task == "regression" else np.int64
    known = probabilities(task, logits) if task != "regression" else logits[:, 0]
    reference = compute_metrics(task, names, decisions(task, logits).astype(wide), labels, width, known)
    assert {k: v for k, v in whole.items() if k != "loss"} == reference
    blocks = evaluation.blocks
    monkeypatch.setattr(evaluation, "_IN_MEMORY", 0)
    mapped = evaluation._allocate(logits.shape, tmp_path / "trainer")
    assert isinstance(mapped, np.memmap) and list((tmp_path / "trainer").iterdir()) == []
    mapped[:] = logits
    for size in (1, 7, 1000):
        if size == 1 and task == "multi-label":
            continue
        monkeypatch.setattr(evaluation, "blocks", lambda count, size=size: blocks(count, size))
        assert evaluation.scores(loss, names, mapped, split) == whole


def test_words_without_a_token_are_outside_the_loss_and_continue_or_miss_an_entity() -> None:
    """Two rows: a word that shares the token of the one before it, and one that was cut off."""
    names = ["O", "B-A", "I-A", "B-B", "I-B"]
    labels = np.array([1, 2, 0, 3, 4], np.int64)
    pieces = np.array([1, SHARED, 2, 1, CUT], np.int32)
    words = WordPlaces(np.array([0, 3, 5]), np.zeros((5, 2), np.int32), pieces)
    split = Split(
        np.empty(0, np.uint16), np.array([0, 4, 8]), labels, weights=np.array([1, 2], np.float32), words=words
    )
    logits = np.zeros((5, 5), np.float32)
    logits[[0, 2, 3], [1, 0, 3]] = 3
    found = evaluation.scores(Loss("token-classification"), ["f1", "recall", "accuracy"], logits, split, names)
    each = [float(np.log(np.exp(3) + 4) - 3)] * 3
    assert found["loss"] == pytest.approx(np.average(each, weights=[1, 1, 2]))
    # "A" is whole; of "B" one word is missing.
    assert (found["f1"], found["recall"], found["accuracy"]) == (0.5, 0.5, 0.8)


def test_lists_of_labels_hold_the_chosen_names() -> None:
    logits = np.array([[1, -1, 2], [-1, -1, -1], [-3, 4, -1]], np.float32)
    labels = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1]], np.float32)
    columns = _columns("multi-label", ["a", "b", "c"], logits, labels)
    assert columns["label"].to_pylist() == [["a"], [], ["b", "c"]]
    assert columns["prediction"].to_pylist() == [["a", "c"], [], ["b"]]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_padding_is_counted_and_ranks_hand_over_their_logits(tmp_path: Path) -> None:
    """Two processes that hand over after every batch, one that keeps its logits in a file: the same numbers."""
    import pyarrow.parquet as pq

    recipe = tiny.write_project(tmp_path, tokens={"batching": "longest"}, train={"epochs": 2, "eval_batch_size": 4})
    env = {"AFINA_SCRATCH": str(tmp_path / "scratch")}
    module = "afina.worker.training.evaluation"
    one = train_here(recipe, tmp_path / "one", env=env, constants={f"{module}._IN_MEMORY": 0})
    two = train_here(recipe, tmp_path / "two", num_processes=2, env=env, constants={f"{module}._HAND_OVER": 1})
    outcomes = [json.loads((run / "outcome.json").read_text()) for run in (one, two)]
    for outcome in outcomes:
        assert 0.5 < outcome["utilisation"]["real_token_share"] < 1
    assert "the sum of 2 processes" in outcomes[1]["utilisation"]["peak_source"]
    tables = [pq.read_table(run / "predictions.parquet") for run in (one, two)]
    assert tables[0].schema == tables[1].schema and len(tables[0]) == len(tables[1]) == 47
    assert tables[0]["text"] == tables[1]["text"] and tables[0]["label"] == tables[1]["label"]
    for run, table, outcome in zip((one, two), tables, outcomes, strict=True):
        right = np.mean(np.array(table["label"].to_pylist()) == np.array(table["prediction"].to_pylist()))
        assert right == pytest.approx(outcome["metrics"]["eval_accuracy"]), "each row got its own logits"
        assert not (run / "trainer").exists()
