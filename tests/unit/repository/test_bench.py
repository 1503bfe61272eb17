"""The benches that set afina beside its peers, small: that they compare what they say, and notice what they look for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_model, tiny_reviews, write_csv

_BENCH = Path(__file__).parents[2] / "bench"


def _bench(name: str, *options: str | Path) -> str:
    argv = [sys.executable, str(_BENCH / name), *map(str, options)]
    env = {**os.environ, "TMPDIR": os.environ["HOME"]}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_missing_optimizer_is_noticed_in_the_weights_and_in_what_was_said(tmp_path: Path) -> None:
    """Trainer goes on with a fresh optimizer and says nothing; afina takes the checkpoint before it and says so."""
    found = tmp_path / "found.json"
    options = ["--peers", "trainer,afina", "--faults", "optimizer", "--steps", "160", "--save-every", "20"]
    said = _bench("peers_faults.py", *options, "--json", found)
    rows = {(row["peer"], row["fault"]): row for row in json.loads(found.read_text())}
    assert len(rows) == 4
    for peer in ("trainer", "afina"):
        undisturbed = rows[peer, "none"]
        assert undisturbed["finished"] and undisturbed["equal"] and undisturbed["steps_repeated"] == 0
    trainer, afina = (rows[peer, "optimizer.pt missing"] for peer in ("trainer", "afina"))
    assert "over before" not in trainer["said"] + afina["said"]
    assert trainer["finished"] and not trainer["equal"] and trainer["silent"]
    assert trainer["doubled_lines"] == trainer["steps_repeated"] > 0
    assert afina["finished"] and afina["equal"] and not afina["silent"]
    assert afina["doubled_lines"] == 0 and afina["steps_repeated"] > 0
    assert "optimizer" in afina["said"]
    assert len(said.strip().splitlines()) == 2 + len(rows)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_cost_of_saving_counts_the_same_saves_for_both(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    options = ["--tiny", "--steps", "24", "--save-every", "6", "--rounds", "1", "--threads", "1"]
    said = _bench("saving.py", *options, "--json", found)
    measured: dict[str, Any] = json.loads(found.read_text())
    assert [(r["peer"], r["saving"]) for r in measured["runs"]] == [
        ("trainer", True),
        ("trainer", False),
        ("afina", True),
        ("afina", False),
    ]
    for peer in ("trainer", "afina"):
        figures = measured["summary"][peer]
        assert figures["saves while training"]["median"] == 3
        assert figures["seconds in saves per run"]["median"] > 0
        assert figures["MB per checkpoint"]["median"] > 1
    assert "| percent of training in saves |" in said


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.timeout(200)
def test_a_page_that_fetches_speaks_or_is_too_wide_is_noticed(tmp_path: Path) -> None:
    pages = {
        "fine": "<p>text</p>",
        "wrong": '<p style="width: 3000px">wide</p><img src="other.png" alt=""><script>console.error("loud")</script>',
    }
    found = {}
    for name, body in pages.items():
        (tmp_path / f"{name}.html").write_text(
            f'<!DOCTYPE html><html lang="en"><title>t</title><body><main>{body}</main>'
        )
        argv = [
            sys.executable,
            str(_BENCH / "page.py"),
            str(tmp_path / f"{name}.html"),
            "--axe",
            "none",
            "--out",
            str(tmp_path / name),
        ]
        found[name] = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False)
    assert found["fine"].returncode == 0 and "0 requests, 0 console lines" in found["fine"].stdout, found["fine"]
    said = found["wrong"].stdout
    assert found["wrong"].returncode == 1 and "WRONG request to file://" in said and "loud" in said, found["wrong"]
    assert "WRONG narrow: " in said and "px wider than the screen" in said
    for name in ("light", "dark", "narrow"):
        assert (tmp_path / f"fine/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "fine/print.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.timeout(120)
def test_looking_at_many_runs_asks_slurm_once(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    said = _bench("many_runs.py", "--runs", "60", "--rounds", "1", "--json", found)
    costs = {cost["command"]: cost for cost in json.loads(found.read_text())}
    assert {"status", "list", "list --size", "status --json"} <= set(costs)
    assert costs["status --json"]["runs"] == 60 and costs["status"]["runs"] == 62 and costs["list"]["runs"] == 61
    for command in ("status", "list", "status --json"):
        assert (costs[command]["squeue_calls"], costs[command]["sacct_calls"]) == (1, 1), command
        assert costs[command]["seconds"] > 0 and costs[command]["peak_mb"] > 5
    assert len(said.strip().splitlines()) == 2 + len(costs)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_peers_train_the_same_epochs_and_an_interrupted_bench_goes_on(tmp_path: Path) -> None:
    options = ["--out", tmp_path, "--quick", "--rows", "32", "--lengths", "short", "--peers", "tutorial", "afina"]
    _bench("peers.py", *options)
    done = (tmp_path / "cells.jsonl").read_text()
    said = _bench("peers.py", *options, "native")
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert "".join(f"{line}\n" for line in lines[:2]) == done, "what was done is not done again"
    cells = {cell["peer"]: cell for cell in map(json.loads, lines)}
    assert set(cells) == {"tutorial", "native", "afina"}
    for cell in cells.values():
        assert cell["steps"] == 4 and 0 < cell["mfu"] < 1 and cell["memory_gb"] > 0.1
        assert cell["training_seconds"] < cell["seconds"] < cell["wall_seconds"]
    assert cells["afina"]["said_by_itself"]["real_token_share"] == 1.0
    # The same useful work over afina's own clock: its MFU and the bench's differ by the peaks they were measured against.
    afina = cells["afina"]
    own = afina["said_by_itself"]
    assert own["mfu"] * own["peak_flops"] == pytest.approx(afina["mfu"] * afina["peak_flops"], rel=0.02)
    assert "| tiny, short, 1 | afina |" in said
    assert [json.loads(line)["peer"] for line in lines] == ["tutorial", "afina", "native"]
    summary = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert summary[0]["peer"] == "tutorial" and summary[0]["speed_training_seconds"] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_every_way_to_make_a_step_makes_one(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    _bench("batching.py", "--quick", "--lengths", "short", "--json", found)
    ways = json.loads(found.read_text())["short"]["variants"]
    assert {"padded", "packed, fast dropout", "packed, bfloat16"} < ways.keys()
    for name, way in ways.items():
        assert way["ms_per_example"][0] > 0 and (way["share_of_real"] == 1) == name.startswith("packed"), name


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_accuracy_is_compared_within_a_seed(tmp_path: Path) -> None:
    options = ["--out", tmp_path, "--quick", "--rows", "32", "--epochs", "1", "--seeds", "1", "--lengths", "short"]
    said = _bench("accuracy.py", *options)
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(c["peer"], c["seed"]) for c in cells] == [("tutorial", 1), ("afina", 1)]
    assert all(0 <= c["accuracy"] <= 1 for c in cells)
    assert f"| short, 1 seeds | accuracy | afina | {cells[1]['accuracy']:.4f}" in said


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_an_evaluation_of_afina_and_one_of_trainer_give_the_same_probabilities(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    _bench("evaluation.py", "--quick", "--rows", "40", "--rounds", "1", "--lengths", "yelp", "--json", found)
    rates = json.loads(found.read_text())["yelp"]
    assert 0 <= rates["largest_difference"] < 1e-5
    assert all(rates[kind][0] > 0 for kind in ("padded", "dynamic", "afina"))


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_predicting_is_compared_with_the_pipeline_and_survives_kills(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    options = ["--tiny", "--rows", "6000", "--growing", "6000", "--sample", "300", "--rounds", "1", "--kills", "1"]
    options += ["--batch-sizes", "8", "--tried", "100", "--chunk-rows", "150"]
    said = _bench("predict.py", *options, "--json", found)
    measured: dict[str, Any] = json.loads(found.read_text())
    assert measured["difference"]["rows"] == 300
    assert measured["difference"]["largest_of_a_score"] < 1e-5 and measured["difference"]["other_label"] == 0
    for peer in ("pipeline", "afina"):
        assert measured["peers"][peer]["rows/s"]["median"] > 0 and measured["peers"][peer]["peak MB"]["median"] > 100
    killed = measured["killed"]
    assert killed["identical"] and 0 < killed["parts_after_each_kill"][0] < killed["parts"] == 40
    assert killed["rows_done_before"] == killed["parts_after_each_kill"][0] * 150
    assert [each["rows"] for each in measured["growing"]] == [6000]
    assert "the same file" in said


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_what_was_foreseen_stands_beside_what_was_used(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    said = _bench("estimates.py", "--quick", "--shapes", "1", "--threads", "1", "--json", found)
    (one,) = json.loads(found.read_text())
    assert one["foreseen"]["basis"] == "rehearsal" and one["later_foreseen"]["basis"] == "earlier runs"
    assert one["foreseen"]["total_steps"] == one["used"]["steps"] == 3 and one["later_used"]["steps"] == 6
    for memory in (one["foreseen"]["host_gb"], one["by_numbers_gb"], one["used"]["host_gb"]):
        assert 0.3 < memory < 3
    # The same libraries, model and batches: what the rehearsal saw is what the run used, nearly.
    assert one["foreseen"]["host_gb"] == pytest.approx(one["used"]["host_gb"], rel=0.25)
    assert len(said.strip().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_peers_prepare_the_same_tokens(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    source = write_csv(tmp_path / "reviews.csv", tiny_reviews(200))
    options = ["--quick", "--csv", source, "--model", tiny_model(tmp_path / "model", max_length=512), "--json", found]
    said = _bench("prepare.py", *options, "--peers", "afina", "map", "--only", "peers", "reading")
    measured: dict[str, Any] = json.loads(found.read_text())
    assert [about["rows"] for about in measured["peers"]] == [200, 200, 400, 400]
    afina, peer = measured["peers"][2:]
    assert (afina["peer"], peer["peer"]) == ("afina", "map") and afina["tokens"] == peer["tokens"] > 400 * 20
    assert 2 * afina["tokens"] < afina["bytes"] < peer["bytes"] + 100_000
    assert min(afina["peak_memory"], peer["peak_memory"]) > 50 << 20
    assert all(low <= middle <= high for middle, low, high in measured["reading"]["us_per_batch"].values())
    assert "| ids: flat arrays |" in said and "| 400 | afina |" in said


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_parts_of_a_start_are_all_there(tmp_path: Path) -> None:
    """Without an image, which these tests do not have; the ways differ in how Python is reached alone."""
    found = tmp_path / "found.json"
    said = _bench("startup.py", "--rounds", "1", "--json", found)
    (record,) = json.loads(found.read_text())["records"]
    parts = ("container", "interpreter", "imports", "model", "group", "step", "afina")
    assert [name for name in record if name not in ("way", "round")] == list(parts)
    assert all(record[part] > 0 for part in parts) and record["imports"] > record["interpreter"]
    assert said.startswith("| way | container |")
