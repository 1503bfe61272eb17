"""The benches of afina itself on tiny inputs, the examination of a page, and the proof on a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.common import ROOT
from tests.unit.repository.conftest import Bench


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_forecast_stands_beside_what_was_used(bench: Bench, tmp_path: Path) -> None:
    options = ["--quick", "--shapes", "1", "--threads", "1", "--json", tmp_path / "found.json"]
    out = bench("estimates", *options)
    (one,) = json.loads((tmp_path / "found.json").read_text())
    assert one["forecast"]["basis"] == "rehearsal" and one["later_forecast"]["basis"] == "earlier runs"
    assert one["forecast"]["total_steps"] == one["used"]["steps"] == 3 and one["later_used"]["steps"] == 6
    assert 0.3 < one["used"]["host_gb"] < 3
    # The same libraries, model and batches; and what further steps take, of which three take little.
    assert one["used"]["host_gb"] <= one["forecast"]["host_gb"] <= one["used"]["host_gb"] + 0.3
    assert len(out.strip().splitlines()) == 3


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_parts_of_a_start_are_all_there(bench: Bench, tmp_path: Path) -> None:
    """Without an image, which these tests do not have; the ways differ only in how Python is reached."""
    out = bench("startup", "--rounds", "1", "--json", tmp_path / "found.json")
    (record,) = json.loads((tmp_path / "found.json").read_text())["records"]
    parts = ("container", "interpreter", "imports", "model", "group", "step", "afina")
    assert [name for name in record if name not in ("way", "round")] == list(parts)
    assert all(record[part] > 0 for part in parts) and record["imports"] > record["interpreter"]
    assert out.startswith("| way | container |")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.timeout(200)
def test_a_page_that_fetches_logs_or_is_too_wide_is_reported(tmp_path: Path) -> None:
    pages = {
        "fine": "<p>text</p>",
        "wrong": '<p style="width: 3000px">wide</p><img src="other.png" alt=""><script>console.error("loud")</script>',
    }
    found = {}
    for name, body in pages.items():
        page = tmp_path / f"{name}.html"
        page.write_text(f'<!DOCTYPE html><html lang="en"><title>t</title><body><main>{body}</main>')
        argv = [
            sys.executable,
            str(ROOT / "tests/bench/page.py"),
            str(page),
            "--axe",
            "none",
            "--out",
            str(tmp_path / name),
        ]
        found[name] = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False)
    assert found["fine"].returncode == 0 and "0 requests, 0 console lines" in found["fine"].stdout, found["fine"]
    out = found["wrong"].stdout
    assert found["wrong"].returncode == 1 and "WRONG request to file://" in out and "loud" in out, found["wrong"]
    assert "WRONG narrow: " in out and "px wider than the screen" in out
    for name in ("light", "dark", "narrow"):
        assert (tmp_path / f"fine/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "fine/print.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_proof_on_a_gpu_runs_on_a_cpu_too(tmp_path: Path) -> None:
    """Its command, with tiny models: each part gives figures, and one without time is recorded as left out."""
    out = tmp_path / "proof.json"
    argv = ["bash", "tests/gpu/prove.sh", "--dry-run", "--out", str(out), "--limit", "300", "--only"]
    done = subprocess.run(
        [*argv, "machine", "tests", "peers 32", "decoder LoRA packed"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    proof = json.loads(out.read_text())
    assert proof["machine"]["peaks"]["float32"] > 0 and proof["tests"]["failed"] == []
    assert [row["peer"] for row in proof["peers 32"]["rows"]] == ["trainer", "afina-graphs"]
    lora = proof["decoder LoRA packed"]
    assert lora["tokens_per_second"] > 0 and lora["trained_parameters"] < lora["parameters"]
    done = subprocess.run([*argv[:5], "--limit", "1", "--only", "tests"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "left_out" in json.loads(out.read_text())["tests"]
