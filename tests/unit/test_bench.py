"""The benches that set afina beside its peers, small: that they compare what they say, and notice what they look for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_model, tiny_reviews, write_csv

_BENCH = Path(__file__).parents[1] / "bench"


def _bench(name: str, *options: str | Path) -> str:
    argv = [sys.executable, str(_BENCH / name), *map(str, options)]
    env = {**os.environ, "TMPDIR": os.environ["HOME"]}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_missing_optimizer_is_noticed_in_the_weights_and_in_what_was_said(tmp_path: Path) -> None:
    """Trainer goes on with a fresh optimizer and says nothing; afina takes the checkpoint before it and says so."""
    found = tmp_path / "found.json"
    options = ["--peers", "trainer,afina", "--faults", "optimizer", "--steps", "300", "--save-every", "20"]
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
@pytest.mark.timeout(300)
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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_peers_prepare_the_same_tokens(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    source = write_csv(tmp_path / "reviews.csv", tiny_reviews(200))
    options = ["--quick", "--csv", source, "--model", tiny_model(tmp_path / "model"), "--json", found]
    said = _bench("prepare.py", *options, "--peers", "afina", "map", "--only", "peers", "reading")
    measured: dict[str, Any] = json.loads(found.read_text())
    afina, peer = measured["peers"]
    assert (afina["peer"], peer["peer"]) == ("afina", "map") and afina["tokens"] == peer["tokens"] > 400 * 20
    assert 2 * afina["tokens"] < afina["bytes"] < peer["bytes"] + 100_000
    assert min(afina["peak_memory"], peer["peak_memory"]) > 50 << 20
    assert all(low <= middle <= high for middle, low, high in measured["reading"]["us_per_batch"].values())
    assert "| ids: flat arrays |" in said and "| 400 | afina |" in said
