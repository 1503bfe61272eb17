"""Runs that were claimed, with outcomes and jobs as a test wants them; and a Slurm whose queue is a file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import program

from afina.recipe.schema import Recipe
from afina.run import new_run
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.run.plan import make_plan
from afina.site.settings import Site


@pytest.fixture
def claim(
    recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site, tmp_path: Path
) -> Callable[..., RunDir]:
    """Claims a run; with `outcome` its attempt has ended so, with `job` it has a job."""

    def make(name: str = "run", outcome: str = "", job: str = "", worker: str = "false", **more: Any) -> RunDir:
        plan = make_plan(recipe(), site, recipe_file=recipe_file())
        run = new_run.claim(plan, {}, ["bash", "-c", worker, "worker", "{run}"], "", tmp_path / name)
        if job:
            run.append("submissions.jsonl", {"job_id": job, "via": "sbatch"})
        if outcome:
            attempt = f"{job}.0" if job else "local-1"
            code = {"finished": 0, "stopped": 75}.get(outcome, 4)
            run.begin_attempt(attempt)
            run.record(Outcome(**{"outcome": outcome, "exit_code": code, "attempt": attempt, **more}))  # type: ignore[arg-type]
            (run.attempts / attempt / "next").write_text("end\n\n\n")
        return run

    return make


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm whose queue is the file `queue`; each question is a line of `questions`."""
    folder = tmp_path / "bin"
    where = shlex.quote(str(tmp_path))
    program(folder, "squeue", f"echo squeue >>{where}/questions; cat {where}/queue 2>/dev/null || true\n")
    program(folder, "scancel", f"echo scancel >>{where}/questions\n")
    for name in ("sbatch", "srun", "sacct"):
        program(folder, name, "exit 1\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "queue"


#: A worker that stops when it is asked to, as a training does, and records that it did.
STOPS = """
echo up; for i in {1..400}; do [ ! -e "$1/stop" ] || break; sleep 0.05; done
printf '{"outcome": "stopped", "exit_code": 75, "attempt": "%s", "cause": "asked"}' "$AFINA_ATTEMPT" >"$1/outcome.json"; exit 75
"""
