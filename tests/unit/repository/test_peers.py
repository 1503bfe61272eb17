"""The benches of afina beside its peers on tiny inputs: they compare what they claim to compare, and detect what they check.

Not covered: benches that need Slurm or an image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.unit.repository.conftest import Bench


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.timeout(500)
def test_peers_train_the_same_and_an_interrupted_bench_continues(bench: Bench, tmp_path: Path) -> None:
    options = ["--out", tmp_path, "--quick", "--rows", "32", "--lengths", "short", "--threads", "1", "--vary-seed"]
    bench("peers", *options, "--peers", "tutorial", "afina-tutorial")
    done = (tmp_path / "cells.jsonl").read_text()
    out = bench("peers", *options, "--peers", "tutorial", "afina-tutorial", "native", "afina")
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert "".join(f"{line}\n" for line in lines[:2]) == done, "finished cells are not trained again"
    assert [json.loads(line)["peer"] for line in lines] == ["tutorial", "afina-tutorial", "native", "afina"]
    cells = {cell["peer"]: cell for cell in map(json.loads, lines)}
    for cell in cells.values():
        assert cell["steps"] == 4 and 0 < cell["mfu"] < 1 and cell["memory_gb"] > 0.1 and 0 <= cell["accuracy"] <= 1
        assert cell["training_seconds"] < cell["seconds"] < cell["wall_seconds"] and cell["evaluated_per_second"] > 0
    # MFU by the bench and by afina itself differ by the peaks that they were measured against.
    afina, own = cells["afina"], cells["afina"]["utilisation"]
    assert 0.8 < own["real_token_share"] <= 1.0  # packed, and filled up a little
    assert own["mfu"] * own["peak_flops"] == pytest.approx(afina["mfu"] * afina["peak_flops"], rel=0.02)
    assert "| tiny, short, 1 | afina |" in out and f"| accuracy | afina | {afina['accuracy']:.4f}" in out
    summary = json.loads((tmp_path / "peers.json").read_text())
    assert summary["rows"][0]["peer"] == "tutorial" and summary["rows"][0]["speed_training_seconds"] == [1.0]
    # The promise of docs/tutorial.md: Trainer's own loop and afina give the same loss, step by step.
    compared = summary["losses"]
    assert {key: compared[key]["lines"] for key in ("loss", "eval_loss", "eval_accuracy")} == {
        "loss": 4,
        "eval_loss": 1,
        "eval_accuracy": 1,
    }
    assert compared["loss"]["difference"] < 1e-5 and compared["eval_loss"]["difference"] < 1e-5
    assert compared["eval_accuracy"]["difference"] < 1e-9
    assert _evaluation_differs_by(next((tmp_path / "runs").glob("afina-tiny-*")), tmp_path / "short-eval.csv") < 1e-5


def _evaluation_differs_by(run: Path, table: Path) -> float:
    """The largest difference between the probabilities of a run's packed evaluation and of padded Transformers."""
    import numpy as np
    import pyarrow.csv
    import pyarrow.parquet
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    predictions = pyarrow.parquet.read_table(run / "predictions.parquet")
    ours = np.stack([predictions[n].to_numpy() for n in predictions.column_names if n.startswith("score: ")], axis=-1)
    texts = predictions["text"].to_pylist()
    known = pyarrow.csv.read_csv(table, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    assert sorted(texts) == sorted(known["text"].to_pylist()), "all rows were evaluated"
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(run / "model", dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(**batch).logits.softmax(-1).numpy()
    return float(np.abs(ours - theirs).max())


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.timeout(500)
def test_a_missing_optimizer_shows_in_the_weights_and_in_the_output(bench: Bench, tmp_path: Path) -> None:
    """Trainer continues with a fresh optimizer without a warning; afina takes the checkpoint before it and warns."""
    options = ["--peers", "trainer,afina", "--faults", "optimizer", "--steps", "60", "--save-every", "10"]
    out = bench("peers_faults", *options, "--json", tmp_path / "found.json")
    rows = {(row["peer"], row["fault"]): row for row in json.loads((tmp_path / "found.json").read_text())}
    assert len(rows) == 4
    for peer in ("trainer", "afina"):
        undisturbed = rows[peer, "none"]
        assert undisturbed["finished"] and undisturbed["equal"] and undisturbed["steps_repeated"] == 0
    trainer, afina = (rows[peer, "optimizer.pt missing"] for peer in ("trainer", "afina"))
    assert "over before" not in trainer["notes"] + afina["notes"]
    assert trainer["finished"] and not trainer["equal"] and trainer["silent"]
    assert trainer["doubled_lines"] == trainer["steps_repeated"] > 0
    assert afina["finished"] and afina["equal"] and not afina["silent"]
    assert afina["doubled_lines"] == 0 and afina["steps_repeated"] > 0
    assert "optimizer" in afina["notes"]
    assert len(out.strip().splitlines()) == 2 + len(rows)


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.timeout(500)
def test_predicting_is_compared_with_the_pipeline_and_survives_kills(bench: Bench, tmp_path: Path) -> None:
    options = ["--quick", "--rows", "600", "--sample", "600", "--rounds", "1", "--kills", "1", "--batch-sizes", "8"]
    out = bench("predict", *options, "--json", tmp_path / "found.json", "--", "--chunk-rows", "20")
    measured: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert measured["difference"]["rows"] == 600
    assert measured["difference"]["largest_of_a_score"] < 1e-5 and measured["difference"]["other_label"] == 0
    for peer in ("pipeline", "afina"):
        (record,) = measured["peers"][peer]
        assert record["rows/s"] > 0 and record["memory MB"] > 100
    killed = measured["killed"]
    assert killed["identical"] and 0 < killed["parts_after_each_kill"][0] < 30
    assert killed["rows_done_before"] == killed["parts_after_each_kill"][0] * 20
    assert measured["growing"] == [] and "the same file" in out


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_peers_prepare_the_same_tokens(bench: Bench, tmp_path: Path) -> None:
    options = ["--quick", "--rows", "400", "--peers", "afina", "map", "--json", tmp_path / "found.json"]
    out = bench("prepare", *options)
    afina, peer = json.loads((tmp_path / "found.json").read_text())["peers"]
    assert (afina["peer"], peer["peer"]) == ("afina", "map") and afina["tokens"] == peer["tokens"] > 400 * 20
    assert 2 * afina["tokens"] < afina["bytes"] < peer["bytes"] + 100_000
    assert min(afina["memory"], peer["memory"]) > 50 << 20 and "| 400 | afina |" in out


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.timeout(500)
def test_entities_are_trained_as_by_transformers_example(bench: Bench, tmp_path: Path) -> None:
    """With its batches and its dropout the losses of all steps are equal; all peers are scored by one rule."""
    rows = tiny.tagged_sentences(96, 5)
    for part, some in (("train", rows[:48]), ("eval", rows[48:72]), ("test", rows[72:])):
        tiny.write_conll(tmp_path / f"{part}.txt", some)
    files = [word for part in ("train", "eval", "test") for word in (f"--{part}", tmp_path / f"{part}.txt")]
    options = ["--models", "tiny", "--seeds", "1", "--epochs", "2", "--max-length", "64"]
    options += ["--learning-rate", "0.01", "--threads", "1", "--peers", "trainer", "afina-padded"]
    out = bench("entities", *files, *options, "--out", tmp_path / "out")
    trainer, afina = map(json.loads, (tmp_path / "out/cells.jsonl").read_text().splitlines())
    assert len(trainer["losses"]) == 12 and afina["losses"] == pytest.approx(trainer["losses"], abs=1e-5)
    assert (afina["eval_f1"], afina["test_f1"]) == (trainer["eval_f1"], trainer["test_f1"])
    assert "12 steps, afina-padded and trainer: largest difference" in out
