"""Run directories as far as looking at them needs them; small programs for squeue, sacct and scancel that count their calls."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from tests.common import program

from afina.run.directory import RunDir
from afina.run.outcome import Outcome


class Slurm:
    """What squeue and sacct will say, and what they and scancel were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answer("squeue")
        self.answer("sacct")
        self.answer("scancel")

    def answer(self, name: str, *lines: str, fails: str = "") -> None:
        calls = shlex.quote(str(self.folder / "calls"))
        note = f'printf "%s " "${{0##*/}}" "$@" >>{calls}; echo >>{calls}\n'
        body = (
            f"echo {shlex.quote(fails)} >&2; exit 1\n" if fails else "".join(f"echo {shlex.quote(x)}\n" for x in lines)
        )
        program(self.folder, name, note + body)

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path / 'fake slurm'}:{os.environ['PATH']}")
    return Slurm(tmp_path / "fake slurm")


@pytest.fixture
def runs(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    (scratch / "runs").mkdir()
    return scratch / "runs"


def make(path: Path, *, job: str | None = None, **train: Any) -> RunDir:
    """A run directory as far as looking at it needs one."""
    (path / "attempts").mkdir(parents=True)
    (path / "plan.json").write_text(json.dumps({"recipe": {"name": path.name, "task": "auto", "train": train}}))
    (path / "prepared.json").write_text(json.dumps({"rows": {"train": 100}}))
    run = RunDir(path)
    if job:
        run.append("submissions.jsonl", {"job_id": job, "via": "sbatch"})
        time.sleep(
            0.01
        )  # the times of files are a few milliseconds behind the clock: nothing of it ends before it was submitted
    return run


def begin(run: RunDir, attempt: str, step: int = 0) -> None:
    run.begin_attempt(attempt)
    run.event("attempt_started", attempt=attempt)
    run.event("training", attempt=attempt, step=step, max_steps=50)


def end(run: RunDir, attempt: str, how: Any, cause: str, following: str) -> None:
    code = {"finished": 0, "stopped": 75, "failed": 4}[how]
    run.record(
        Outcome(outcome=how, exit_code=code, attempt=attempt, global_step=20, cause=cause, error="it broke\nhere")
    )
    run.event("attempt_ended", attempt=attempt, outcome=how, cause=cause, next=following)


def metric(run: RunDir, **record: Any) -> None:
    with run.metrics_file.open("a") as file:
        file.write(json.dumps(record) + "\n")
