"""Predictions that are killed, shared out, merged, or meet a full disk: the output is the same file."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from tests.unit.conftest import tree
from tests.unit.forks import ForkedWorkers
from tests.unit.prediction.conftest import here, planned

from afina.prediction.request import folder_of
from afina.worker.__main__ import main as door
from afina.worker.predicting import predict_parts
from afina.worker.predicting.parts import Parts

# -- killed and resumed ------------------------------------------------------------------------------------------------


def _large(reviews: Path, times: int) -> Path:
    lines = pa_csv.read_csv(reviews, parse_options=pa_csv.ParseOptions(newlines_in_values=True))
    data = reviews.with_name("large.parquet")
    pq.write_table(pa.concat_tables([lines] * times), data, row_group_size=777)
    return data


def test_killed_at_any_instant_the_output_is_the_same_file(run: Path, reviews: Path, tmp_path: Path) -> None:
    """SIGKILL to the worker, SIGINT to the command, then to the end."""
    data = _large(reviews, 20)
    folder = tmp_path / "outputs"
    folder.mkdir()
    whole, out = folder / "whole.parquet", folder / "killed.parquet"
    here(run, data, whole, chunk_rows=100)
    parts = folder_of(out)

    def until(count: int) -> None:
        for _ in range(6000):
            if len(list(parts.glob("part-*"))) >= count:
                return
            time.sleep(0.01)
        raise AssertionError("no part was made")

    about = planned(run, data, out, chunk_rows=100)
    assert about["chunks"] == 41
    killed = ForkedWorkers([sys.executable, "-m", "afina.worker", "predict", "run", str(parts)])
    until(2)
    killed.kill()
    killed.wait()
    there = len(list(parts.glob("part-*")))
    assert 2 <= there < 41
    command = [sys.executable, "-m", "afina", "predict", str(run), str(data), "-o", str(out), "--chunk-rows", "100"]
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(there + 2)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, errors
    assert "afina: resuming: " in errors and "Continue with: afina predict" in errors and "Traceback" not in errors
    assert there + 2 <= len(list(parts.glob("part-*"))) < 41
    assert not out.exists()
    here(run, data, out, chunk_rows=100)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["killed.parquet", "whole.parquet"]


def test_shares_are_the_same_file_and_the_last_one_merges(run: Path, reviews: Path, tmp_path: Path) -> None:
    here(run, reviews, tmp_path / "whole.csv", chunk_rows=30)
    about = planned(run, reviews, tmp_path / "shared.csv", chunk_rows=30)
    merged = [predict_parts.run(about["parts"], k, 3, and_merge=True, progress="log")["merged"] for k in (2, 0, 1)]
    assert merged == [False, False, True]
    assert (tmp_path / "shared.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_merge_that_was_killed_is_repeated(run: Path, reviews: Path, tmp_path: Path) -> None:
    """The output has its name, the folder is still there; and a damaged part is made again."""
    out = tmp_path / "out.csv"
    about = planned(run, reviews, out, chunk_rows=50)
    predict_parts.run(about["parts"], 0, 1, and_merge=False, progress="log")
    part = Parts(about["parts"]).path(1)
    part.write_bytes(part.read_bytes()[:-9])
    assert planned(run, reviews, out, chunk_rows=50)["done"] == 4
    predict_parts.run(about["parts"], 0, 1, and_merge=False, progress="log")
    kept = shutil.copytree(about["parts"], tmp_path / "kept")
    predict_parts.merge(about["parts"])
    content = out.read_bytes()
    marker = {"file": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    kept.rename(about["parts"])
    (folder_of(out) / "merged.json").write_text(
        json.dumps({**marker, "summary": {"rows": 203, "blank": 0, "truncated": 0}})
    )
    assert here(run, reviews, out, chunk_rows=50)["state"] == "resumed"
    assert out.read_bytes() == content and not folder_of(out).exists()


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_is_done(
    run: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file sizes, which merging is the first to meet."""
    out = tmp_path / "out.csv"
    about = planned(run, reviews, out, chunk_rows=20)
    predict_parts.run(about["parts"], 0, 1, and_merge=False, progress="log")
    before = tree(Path(about["parts"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
        code = door(["predict", "merge", about["parts"], "--json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failure = json.loads(capsys.readouterr().out)["failure"]
    assert code == 3 and "File too large" in failure["message"] and "it resumes" in failure["remedy"]
    assert tree(Path(about["parts"])) == before and not out.exists()
    here(run, reviews, out, chunk_rows=20)
    assert len(rows_of_csv(out)) == 203


def rows_of_csv(path: Path) -> list[Any]:
    table: pa.Table = pa_csv.read_csv(path, parse_options=pa_csv.ParseOptions(newlines_in_values=True))
    return list(table.to_pylist())
