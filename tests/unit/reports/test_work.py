"""What a page says about the work: attempts, times, requested and used resources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.reports.conftest import CURVE, MakeRun, finish, log
from tests.unit.reports.pages import Page, data_of

from afina.reports import write_report
from afina.run.directory import RunDir
from afina.run.outcome import Outcome


def attempts(run: RunDir) -> None:
    """Three attempts as the worker and the requeue write them; the second was killed."""
    events: list[dict[str, Any]] = []
    for number, (name, step, start) in enumerate((("7.0", 0, 1000.0), ("7.1", 20, 2000.0), ("7.2", 30, 3000.0))):
        (run.attempts / name).mkdir()
        facts = {
            "host": "n1",
            "started": start,
            "slurm": {"SLURM_JOB_ID": "7"},
            "cores": 4,
            "versions": {"torch": "2.13"},
        }
        (run.attempts / name / "env.json").write_text(json.dumps(facts))
        events += [
            {"time": start, "event": "attempt_started", "attempt": name},
            {"time": start + 10, "event": "training", "attempt": name, "step": step, "max_steps": 40},
            {"time": start + 12, "event": "first_step", "attempt": name, "step": step + 1},
            {
                "time": start + 50,
                "event": "pace",
                "attempt": name,
                "step": step + 9,
                "tokens_per_s": 900.0 + number,
                "memory_gb": 1.5,
            },
            {
                "time": start + 90,
                "event": "checkpoint",
                "attempt": name,
                "step": step + 10,
                "seconds": 4.0,
                "stall_s": 0.5,
                "bytes": 9,
            },
        ]
    text = "".join(json.dumps(event) + "\n" for event in events) + '{"event": "torn'
    (run.path / "events.jsonl").write_text(text)


def test_attempts_are_marked_and_their_times_are_shown(make_run: MakeRun) -> None:
    run = make_run()
    attempts(run)
    finish(run, attempt="7.2")
    log(run, *CURVE)
    page = Page(write_report(run.path))
    loss = page.svgs()["loss"]
    assert [data_of(loss, part)[0][0][0] for part in ("m0", "m1")] == pytest.approx([20, 30], rel=1e-3)
    assert {"attempt 2", "attempt 3"} <= {text.text for text in loss.iter("text")}
    assert "attempt 3 at step 30" in str(loss.find("desc").text)  # type: ignore[union-attr]
    assert ["7.1", "1:30 min", "10 s", "2 s", "20", "30", "1", "4 s", "0.5 s"] in page.rows
    assert "Tokens per second by step" in page.source and "Memory of the first process in GB by step" in page.source
    assert ["torch", "2.13"] in page.rows
    outcome = json.loads(run.outcome_file.read_text())
    used = {"real_token_share": 0.5, "mfu": 0.25, "peak_flops": 2e12, "peak_source": "measured", "peak_memory_gb": 3.5}
    used["seconds_by_part"] = {"input": 1.0, "forward_backward": 3.0}  # type: ignore[assignment]
    run.outcome_file.write_text(json.dumps({**outcome, "utilisation": used}))
    page = Page(write_report(run.path))
    assert ["model FLOP utilisation", "25.0%"] in page.rows and ["of a peak of", "2 TFLOP/s (measured)"] in page.rows
    assert ["forward and backward", "3 s", "75.0%"] in page.rows
    assert next(row for row in page.rows if row[0].startswith("memory per node"))[2] == "3.5 GB"
    assert ["largest memory of a process", "3.5 GB"] in page.rows


SACCT = """#!/bin/bash
[ "$1" = --duplicates ] && [ "$2" = --noheader ] && [ "$3" = --parsable2 ] || exit 9
echo "$@" >>"$0.calls"
cat <<'ROWS'
7|REQUEUED|90|60|00:01:30|4|1|8G||0|billing=4,cpu=4,gres/gpu=2,mem=8G,node=1
7.batch|COMPLETED|90||00:01:30|4|1||1048576K|0|cpu=4
7|COMPLETED|1000|60|50:00.500|4|1|8G||7200000|billing=4,cpu=4,gres/gpu=2,mem=8G,node=1
7.batch|COMPLETED|1000||00:00:01|4|1||512M|3600000|cpu=4
7.0|COMPLETED|1000||50:00|4|1||4G|3600000|cpu=4
ROWS
"""


def test_requested_and_used_resources(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sacct").write_text(SACCT)
    (folder / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    run = make_run(resources={"nodes": 1, "mem_gb": 16, "time": 60})
    attempts(run)
    finish(run, attempt="7.2")
    page = Page(write_report(run.path))
    assert (
        len((folder / "sacct.calls").read_text().splitlines()) == 1
        and "--jobs=7" in (folder / "sacct.calls").read_text()
    )
    assert ["memory per node, largest task", "17.2 GB (resources.mem_gb 16)", "4.3 GB", "25%"] in page.rows
    assert ["time of the longest attempt", "60 min", "1:30 min", "2%"] in page.rows
    used = next(row for row in page.rows if row[0] == "processor time")
    assert used[3] == f"{3090.5 / (1090 * 4):.0%}"
    assert ["7", "COMPLETED", "16:40 min", "60", "1", "4", "2", "75.0%", "4.3 GB", "7.2e+06"] in page.rows
    assert "2 kWh (7,200,000 J)" in page.text
    (folder / "sacct").write_text("#!/bin/bash\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    page = Page(write_report(run.path))
    assert "No accounting from Slurm (sacct)" in page.text
    assert ["memory per node, largest process", "17.2 GB (resources.mem_gb 16)", "1.5 GB", "9%"] in page.rows, (
        "from the run's own events"
    )
    run.record(Outcome.model_validate({**json.loads(run.outcome_file.read_text()), "device": "cuda"}))
    page = Page(write_report(run.path))
    assert not any(row[0].startswith("memory per node") for row in page.rows), (
        "that of a GPU is not what the recipe requests"
    )
    assert "Memory of the first GPU in GB by step" in page.source


def test_gpu_hours_are_those_of_each_attempt(make_run: MakeRun) -> None:
    """90 s on two nodes of four GPUs, and after a requeue twice on one node of two."""
    run = make_run(resources={"nodes": 2, "gpus_per_node": 4})
    attempts(run)
    for name, nodes, processes in (("7.0", 2, 4), ("7.1", 1, 2), ("7.2", 1, 2)):
        file = run.attempts / name / "env.json"
        geometry = {"nodes": nodes, "processes_per_node": processes}
        file.write_text(json.dumps({**json.loads(file.read_text()), "geometry": geometry}))
    page = Page(write_report(run.path))
    assert ["GPU hours", f"{90 * (8 + 2 + 2) / 3600:.2f}"] in page.rows
