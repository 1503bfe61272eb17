"""A Slurm of small programs on PATH: sbatch records its words, and what `prepare` says is given."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.common import program

from afina.run import new_run
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest
from afina.run.outcome import Outcome
from afina.sweeps.draft import SweepRequest, draft_sweep
from afina.sweeps.grid import parse_grid
from afina.sweeps.space import parse_search
from afina.sweeps.sweep import Sweep, carry_out

GRID = "train.learning_rate=5e-3,1e-3"


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm: sbatch records its words, and answers 100, 101, …; nothing is ever in the queue."""
    folder = tmp_path / "fake bin"
    calls = shlex.quote(str(tmp_path / "sbatch"))
    program(
        folder,
        "sbatch",
        f'[ "$1" != --version ] || exec echo slurm 22.05.8; printf "%s\\0" "$@" >>{calls}; printf "\\n\\0" >>{calls}; echo $((99 + $(tr -cd "\\n" <{calls} | wc -c)))\n',
    )
    program(folder, "squeue", "exit 0\n")
    program(folder, "scontrol", "exit 1\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def submitted(tmp_path: Path) -> Callable[[], list[list[str]]]:
    """The words of every call of sbatch, without the token of the submission."""

    def read() -> list[list[str]]:
        file = tmp_path / "sbatch"
        calls: list[list[str]] = [[]]
        for word in file.read_bytes().split(b"\0")[:-1] if file.exists() else ():
            if word == b"\n":
                calls.append([])
            elif not word.startswith(b"--comment=afina:"):
                calls[-1].append(os.fsdecode(word))
        return calls[:-1]

    return read


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that were prepared; what they become is made up."""
    plans: list[Any] = []

    def prepare(plan: Any) -> dict[str, Any]:
        plans.append(plan)
        rows = {"train": 64, "eval": 20}
        answer = {"prepared": f"/prepared/{plan.recipe.tokens.max_length}", "task": "single-label", "rows": rows}
        if plan.recipe.data.fold is None:
            return answer
        sizes = [[(4, 6), (5, 5)], [(3, 3, 4)]][plan.recipe.data.fold.of - 2]
        folds = [[{"rows": n, "tokens": 10 * n} for n in repeat] for repeat in (*sizes, *sizes[-1:])]
        return {
            **answer,
            "folds": folds,
            "rows": {"train": 6, "eval": 4, "test": 3},
            "tokens": {"train": 60, "eval": 40},
        }

    monkeypatch.setattr(new_run, "prepare", prepare)
    return plans


@pytest.fixture
def sweep(
    bin: Path, prepared: list[Any], recipe_file: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Sweep]:
    """`afina.sweep` of the recipe of these tests, with the grid as the command line has it."""
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))

    def run(*grid: str, max_parallel: int | None = None, **options: Any) -> Sweep:
        changes = options.pop("changes", {})
        if "search" in options:
            options["search"] = parse_search(options["search"])
        job = JobRequest(**{f.name: options.pop(f.name) for f in fields(JobRequest) if f.name in options})
        request = SweepRequest(grid=parse_grid(grid), max_parallel=max_parallel, job=job, **options)
        return carry_out(draft_sweep(recipe_file(**changes), request))

    return run


def end(
    run: RunDir,
    kind: str,
    accuracy: float | None = 0.5,
    *,
    cause: str = "",
    code: int = 0,
    pruned: bool = False,
    **events: Any,
) -> None:
    """Let a run have ended."""
    run.begin_attempt("9.0")
    if events:
        run.event("attempt_ended", attempt="9.0", **events)
    outcome: Any = kind
    run.record(
        Outcome(outcome=outcome, exit_code=code, attempt="9.0", task="single-label", metrics={"eval_accuracy": accuracy}, cause=cause, pruned=pruned)
    )  # fmt: skip


def queue(bin: Path, *jobs: str) -> None:
    """Let squeue say `<array>_<task> STATE` of these."""
    words = [f"{job}|4242|{state}|10:00|N/A|n1|None" for job, _, state in (job.partition(" ") for job in jobs)]
    program(bin, "squeue", f"printf '%s\\n' {' '.join(map(shlex.quote, words))}\n")


def array_of(words: list[str]) -> str:
    return next(word for word in words if word.startswith("--array=")).removeprefix("--array=")


SEARCH = ["train.learning_rate=1e-5..1e-1:log", "train.arguments.weight_decay=0.0,0.1", "train.epochs=1..9"]


def ask(made: Sweep, number: int) -> RunDir:
    """What an array task does when it starts."""
    from afina.worker.node import trial

    run = made.dir.run(made.record.cells[number].name)
    assert trial.answer([str(run.path)]) == {"run": str(run.path)}
    return run
