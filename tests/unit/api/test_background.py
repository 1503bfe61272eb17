"""`via="local"`: the same handle on a run that trains on this machine in the background."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import tiny
from tests.processes import wait_until
from tests.unit.api.conftest import STOPS

import afina
from afina.errors import InputError
from afina.run.directory import RunDir

#: A worker that finishes when the file `go` is there.
FINISHES = """
echo up; until [ -e "$1/go" ]; do sleep 0.05; done
printf '{"outcome": "finished", "exit_code": 0, "attempt": "%s", "metrics": {"eval_x": 1.0}}' "$AFINA_ATTEMPT" >"$1/outcome.json"
"""


def attempt_of(run: afina.Run) -> dict[str, object]:
    return list(run.dir.lines("submissions.jsonl"))[-1]


def test_a_run_in_the_background_has_the_same_handle(claim: Callable[..., RunDir]) -> None:
    run = afina.Run(claim(worker=FINISHES).path).submit(via="local")
    assert (run.state, run.done(), run.job_id, attempt_of(run)["via"]) == ("RUNNING", False, None, "local")
    assert f"in the background: process {attempt_of(run)['pid']}" in (run.summary.why or "")
    with pytest.raises(InputError, match="this run is RUNNING"):
        run.submit(via="local")
    lines = run.log(follow=True)
    assert next(lines) == "up\n"
    (run.path / "go").touch()
    assert run.result(timeout=60).metrics == {"eval_x": 1.0}
    assert list(lines) == ["afina: FINISHED\n"] and run.log() == "up\n"


def test_it_outlives_the_process_that_submitted_it(claim: Callable[..., RunDir]) -> None:
    """The submitter is killed with its whole session, as at the end of a terminal."""
    path = claim(worker=FINISHES).path
    code = f"import afina, os, signal; afina.Run({str(path)!r}).submit(via='local'); os.killpg(0, signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code], start_new_session=True, check=False)
    assert done.returncode == -signal.SIGKILL
    run = pickle.loads(pickle.dumps(afina.Run(path)))
    assert run.state == "RUNNING"
    (path / "go").touch()
    assert run.result(timeout=60).outcome == "finished"


@pytest.mark.parametrize("started", [False, True])
def test_it_is_cancelled_from_the_first_moment_on(claim: Callable[..., RunDir], started: bool) -> None:
    run = afina.Run(claim(worker=STOPS).path).submit(via="local")
    if started:
        wait_until(lambda: run.dir.attempts.joinpath("local-1/node0.log").read_text())
    assert run.cancel().did == "asked"
    assert isinstance(run.exception(timeout=60), afina.Cancelled)
    run.submit(via="local")  # goes on, and the old stop file is not its own
    assert run.dir.attempt_names() == ["local-1", "local-2"] and run.state == "RUNNING"
    run.cancel()
    run.wait(timeout=60)


def test_a_supervisor_that_dies_is_no_success(claim: Callable[..., RunDir]) -> None:
    run = afina.Run(claim(worker="sleep 60").path).submit(via="local")
    os.kill(int(str(attempt_of(run)["pid"])), signal.SIGKILL)
    wait_until(lambda: run.state == "FAILED")
    assert "attempt local-1 died without an outcome" in str(run.exception(timeout=30))


def test_a_worker_that_cannot_start_is_a_failure_with_its_reason(claim: Callable[..., RunDir]) -> None:
    run = claim()
    argv = run.path / "worker.argv"
    argv.write_bytes(argv.read_bytes().replace(b"bash\0", b"/no/such/apptainer\0"))
    error = afina.Run(run.path).submit(via="local").exception(timeout=60)
    assert isinstance(error, afina.Failed) and "/no/such/apptainer: No such file" in str(error), error


@pytest.mark.parametrize("name", ["nodes", "gpus_per_node", "time_min", "slurm", "after"])
def test_options_of_a_job_are_refused(recipe_file: Callable[..., Path], name: str) -> None:
    value = {"slurm": {"nice": 1}, "after": ["7"]}.get(name, 1)
    with pytest.raises(InputError, match=f"{name}: has no effect on this machine"):
        afina.submit(recipe_file(), via="local", **{name: value})  # type: ignore[call-overload]
    with pytest.raises(InputError, match="num_processes: has no effect on a job of Slurm"):
        afina.submit(recipe_file(), num_processes=2, dry_run=True)


@pytest.mark.timeout(240)
def test_a_real_training_in_the_background(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    recipe = tiny.write_project(tmp_path / "project", rows=60, train={"max_steps": 2})
    run = afina.submit(recipe, via="local", num_processes=1)
    assert run.result(timeout=200).global_step == 2 and run.model_path.is_dir()
    assert run.summary.attempt == "local-1" and isinstance(run.warnings, tuple)
    assert Path(run) == run.path, "a run is a path wherever one is taken"
