"""The state of runs from a real Slurm: pending and why, running, cancelled, gone; with and without accounting, and unreachable.

The run directories are minimal; the jobs sleep and are root's, as this Python is.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from tests.processes import wait_until

from afina.run.directory import RunDir
from afina.slurm import query as slurm_query
from afina.slurm.query import Job, query
from afina.slurm.reasons import explain
from afina.watch.cancel import cancel_runs
from afina.watch.find import known_runs
from afina.watch.overview import RunSummary, summarise

SLEEP = "#!/bin/sh\nsleep 120\n"


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.setenv("AFINA_SCRATCH", str(tmp_path))
    (tmp_path / "runs").mkdir()
    yield tmp_path / "runs"
    cluster.cancel_all()


def _run(folder: Path, name: str, *options: str, script: str = SLEEP, task: int | None = None) -> str:
    """A run directory with a job, or with a task of an array."""
    argv = ["sbatch", "--parsable", "--output=/dev/null", "--ntasks=1", "--time=10", *options]
    answer = subprocess.run(argv, input=script, capture_output=True, text=True, check=True, cwd="/").stdout
    job = answer.strip() if task is None else f"{answer.strip()}_{task}"
    (folder / name / "attempts").mkdir(parents=True)
    (folder / name / "plan.json").write_text(json.dumps({"recipe": {"name": name}}))
    RunDir(folder / name).append("submissions.jsonl", {"job_id": job, "via": "sbatch"})
    return job


def _until(wanted: Callable[[dict[str, RunSummary]], bool], timeout_s: float = 30) -> dict[str, RunSummary]:
    deadline = time.monotonic() + timeout_s
    while not wanted(found := {s.name: s for s in summarise(known_runs())}):
        assert time.monotonic() < deadline, {name: (s.state, s.why) for name, s in found.items()}
        time.sleep(0.3)
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("accounting", [True, False])
def test_pending_running_and_gone(
    cluster: Cluster, runs: Path, accounting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cluster.accounting != accounting:
        cluster.restart(accounting=accounting)
    try:
        _run(runs, "ended", script="#!/bin/sh\ntrue\n")
        _until(lambda found: found["ended"].state == "FAILED")
        running = _run(runs, "running", "--cpus-per-task=4", "--nodelist=n1")
        _until(lambda found: found["running"].state == "RUNNING")
        _run(runs, "busy", "--cpus-per-task=4", "--nodelist=n1")
        held = _run(runs, "held", "--hold")
        _run(runs, "later", "--begin=now+1hour")
        array = _run(runs, "cell", "--array=0-2%1", "--cpus-per-task=1", "--nodelist=n2", task=0)
        (runs / "next/attempts").mkdir(parents=True)
        (runs / "next/plan.json").write_text(json.dumps({"recipe": {"name": "next"}}))
        RunDir(runs / "next").append("submissions.jsonl", {"job_id": array.replace("_0", "_2"), "via": "sbatch"})
        _run(runs, "cancelled", "--hold")
        (cancelled,) = cancel_runs([runs / "cancelled"])
        assert cancelled.did == "cancelled"
        found = _until(
            lambda found: (
                found["cell"].state == "RUNNING"
                and "JobArrayTaskLimit" in (found["next"].why or "")
                and re.search("busy|higher priority", found["busy"].why or "") is not None
                and found["cancelled"].state == "STOPPED"
            )
        )
        assert {name: s.state for name, s in found.items()} == {
            "ended": "FAILED",
            "running": "RUNNING",
            "busy": "PENDING",
            "held": "PENDING",
            "later": "PENDING",
            "cell": "RUNNING",
            "next": "PENDING",
            "cancelled": "STOPPED",
        }
        assert found["running"].nodes == "n1" and 500 < (found["running"].limit_s or 0) <= 600
        assert found["held"].remedy == f"scontrol release {held}"
        assert "may not start yet" in (found["later"].why or "")
        assert 3000 < (found["later"].starts or 0) - time.time() <= 3700
        assert found["ended"].why and found["ended"].why.startswith("job ")
        # Once slurmctld has forgotten a job only accounting has it.
        assert query(["999999"])["999999"] == Job("999999", "GONE")
        in_accounting = {running} if accounting else set()
        # slurmctld tells slurmdbd seconds later.
        wait_until(lambda: set(slurm_query._final_states([running])) == in_accounting, pause_s=0.3)
        assert {c.did for c in cancel_runs(known_runs())} == {"cancelled", "nothing"}
        _until(lambda found: not {s.state for s in found.values()} & {"PENDING", "RUNNING"})
        monkeypatch.setenv("SLURM_CONF", "/no/such/slurm.conf")
        assert {s.state for s in summarise(known_runs())} == {"UNKNOWN"}
    finally:
        if not cluster.accounting:
            cluster.restart(accounting=True)


def test_every_limit_of_this_slurm_has_an_explanation() -> None:
    libraries = [*Path("/usr/lib").glob("*/slurm*/libslurmfull.so"), *Path("/usr/lib64/slurm").glob("libslurmfull.so")]
    if not libraries:
        pytest.skip("Slurm's library is not where Debian or Red Hat put it")
    reasons = {
        word.decode()
        for word in re.findall(rb"\0((?:QOS|Assoc)(?:Max|Grp|Min)[A-Za-z]+)(?=\0)", libraries[0].read_bytes())
    }
    assert len(reasons) > 50
    without = [reason for reason in sorted(reasons) if explain(reason, "1").words == "Slurm keeps it waiting"]
    assert without == []
