"""What it costs to look at a thousand runs: seconds, peak memory and calls of Slurm of `afina status`, `afina list`, `afina compare`.

    python tests/bench/many_runs.py [--runs 1000] [--rounds 5] [--json FILE]

The run directories are synthetic, of the size of real ones: a plan, a log of 2,000 steps with ten evaluations over five classes,
four hours of events. Half are runs of their own, half are cells of sweeps of 25. squeue and sacct are small programs on PATH that
count how often they are called and answer for all jobs; their own time (a shell's) is in the seconds, a busy slurmctld's is not.
A file system with a server behind it answers slower than the local disk here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["make_runs", "measure"]

#: Of a hundred runs.
_SHARES = {"finished": 60, "running": 10, "pending": 10, "stopped": 10, "failed": 7, "lost": 3}
_SWEEP = 25
_EVERY = 10
_STEPS = 2000


@dataclass(frozen=True)
class Cost:
    """Of one command: wall seconds (the median of all rounds), peak memory of its process, calls of Slurm in one round."""

    command: str
    seconds: float
    peak_mb: float
    squeue_calls: int
    sacct_calls: int
    runs: int


def make_runs(scratch: Path, count: int) -> dict[str, list[Path]]:
    """Run directories below scratch, by how they stand; the jobs of those that are queued or running are numbered from 1."""
    from afina.recipe.schema import parse_recipe
    from afina.run.plan import make_plan
    from afina.site.settings import Site

    (scratch / "reviews.csv").write_text("text,stars\ngood,5\nbad,1\n")
    model = scratch / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(16))
    (model / "tokenizer.json").write_text("{}")
    recipe = {
        "name": "NAME",
        "model": str(model),
        "data": {"files": {"all": str(scratch / "reviews.csv")}, "text": "text", "label": "stars"},
        "metrics": ["accuracy", "f1", "precision", "recall"],
    }
    plan = make_plan(parse_recipe(json.dumps(recipe)), Site(scratch=scratch)).to_json()
    kinds = [kind for kind, share in _SHARES.items() for _ in range(share)]
    made: dict[str, list[Path]] = {kind: [] for kind in _SHARES}
    for number in range(count):
        # 37 and 100 have no common divisor: the kinds are spread evenly.
        kind = kinds[number * 37 % 100]
        if number % 2:
            sweep = scratch / "sweeps" / f"sweep-{number // 2 // _SWEEP}"
            path = sweep / "runs" / f"cell-{number // 2 % _SWEEP}"
        else:
            path = scratch / "runs" / f"run-{number}"
        path.mkdir(parents=True)
        (path / "plan.json").write_text(plan.replace("NAME", f"run {number}"))
        _fill(path, kind, number + 1)
        made[kind].append(path)
    return made


def _fill(path: Path, kind: str, job: int) -> None:
    now = time.time()
    attempt = f"{job}.0"
    _write(path / "submissions.jsonl", [{"time": now - 15000, "job_id": str(job), "via": "sbatch"}])
    (path / "prepared.json").write_text(json.dumps({"task": "single-label", "rows": {"train": 5333, "eval": 1000}}))
    (path / "attempts").mkdir()
    if kind == "pending":
        return
    (path / "attempts" / attempt).mkdir()
    done = _STEPS if kind == "finished" else _STEPS // 2
    events: list[dict[str, Any]] = [
        {
            "time": now - 14500,
            "event": "attempt_started",
            "attempt": attempt,
            "nodes": 1,
            "processes": 4,
            "devices": "cuda",
        },
        {"time": now - 14450, "event": "training", "attempt": attempt, "step": 0, "max_steps": _STEPS},
        {"time": now - 14440, "event": "first_step", "attempt": attempt, "step": 1},
    ]
    for minute in range(240):
        about = {"step": done * minute // 240, "max_steps": _STEPS, "epoch": 1.5, "loss": 0.4, "tokens_per_s": 51234.5}
        speed = {
            "examples_per_s": 311.2,
            "real_token_share": 0.97,
            "mfu": 0.41,
            "seconds_left": 3600,
            "memory_gb": 31.2,
        }
        events.append({"time": now - 14400 + 60 * minute, "event": "pace", "attempt": attempt, **about, **speed})
    log: list[dict[str, Any]] = []
    for step in range(_EVERY, done + 1, _EVERY):
        log.append({"step": step, "epoch": step / 667, "loss": 2 / step, "grad_norm": 1.0, "learning_rate": 5e-5})
        if step % (_STEPS // 10) == 0:
            log.append({"step": step, "epoch": step / 667, **_evaluation(step)})
    _write(path / "metrics.jsonl", log)
    if kind not in ("running", "lost"):
        outcome = {
            "outcome": kind,
            "exit_code": {"finished": 0, "stopped": 75, "failed": 4}[kind],
            "attempt": attempt,
            "global_step": done,
            "max_steps": _STEPS,
            "metrics": _evaluation(done) if kind == "finished" else {},
            "error": "CUDA out of memory\n  remedy: lower train.max_batch_per_device" if kind == "failed" else None,
            "cause": {"finished": None, "stopped": "limit", "failed": "memory"}[kind],
            "best_step": done,
            "model_step": done,
            "task": "single-label",
        }
        (path / "outcome.json").write_text(json.dumps(outcome, indent=2))
        events.append(
            {
                "time": now,
                "event": "attempt_ended",
                "attempt": attempt,
                "outcome": kind,
                "next": "end",
                "why": "the end",
            }
        )
    _write(path / "events.jsonl", events)


def _evaluation(step: int) -> dict[str, Any]:
    scores = {f"eval_{name}": 0.5 + step / 10000 for name in ("loss", "accuracy", "f1", "precision", "recall")}
    lists = {f"eval_{name}_per_class": [0.5123456789] * 5 for name in ("f1", "precision", "recall")}
    return {**scores, **lists}


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_slurm(folder: Path, made: dict[str, list[Path]]) -> None:
    """squeue and sacct for these runs: each call is a line in `calls`."""
    folder.mkdir()
    answers = {"squeue": [], "sacct": []}
    for kind, state in (("running", "RUNNING"), ("pending", "PENDING")):
        for path in made[kind]:
            job = json.loads((path / "submissions.jsonl").read_text())["job_id"]
            answers["squeue"].append(
                f"{job}|{job}|{state}|1:00:00|N/A|n1|{'None' if state == 'RUNNING' else 'Priority'}"
            )
    for path in made["lost"]:
        job = json.loads((path / "submissions.jsonl").read_text())["job_id"]
        answers["sacct"].append(f"{job}|{job}|NODE_FAIL")
    for name, lines in answers.items():
        (folder / f"{name}.txt").write_text("".join(line + "\n" for line in lines))
        program = folder / name
        program.write_text('#!/bin/sh\necho "${0##*/}" >>"${0%/*}/calls"\nexec cat "$0.txt"\n')
        program.chmod(0o755)


def measure(scratch: Path, programs: Path, rounds: int) -> list[Cost]:
    """Each command `rounds` times, in turn; everything was read once before."""
    commands = [["status"], ["list"], ["list", "--size"], ["status", "--json"]]
    if _has("compare"):
        commands.append(["compare", str(scratch)])
    env = {**os.environ, "AFINA_SCRATCH": str(scratch), "PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "200"}
    seconds: dict[int, list[float]] = {i: [] for i in range(len(commands))}
    last: dict[int, tuple[float, list[str], int]] = {}
    for round_number in range(rounds + 1):
        for i, words in enumerate(commands):
            (programs / "calls").unlink(missing_ok=True)
            with tempfile.TemporaryFile("w+") as out:
                began = time.perf_counter()
                process = subprocess.Popen([sys.executable, "-m", "afina.cli", *words], env=env, stdout=out)
                _, code, used = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(code)
                took = time.perf_counter() - began
                out.seek(0)
                said = out.read()
            if process.returncode:
                raise SystemExit(f"afina {' '.join(words)}: exit code {process.returncode}")
            if round_number:  # the first fills the page cache
                seconds[i].append(took)
            calls = (programs / "calls").read_text().split() if (programs / "calls").exists() else []
            runs = len(json.loads(said)) if "--json" in words else len(said.splitlines())
            last[i] = (used.ru_maxrss / 1000, calls, runs)
    return [
        Cost(
            " ".join(word for word in words if word != str(scratch)),
            statistics.median(seconds[i]),
            last[i][0],
            last[i][1].count("squeue"),
            last[i][1].count("sacct"),
            last[i][2],
        )
        for i, words in enumerate(commands)
    ]


def _has(command: str) -> bool:
    from afina.cli import cli

    return command in cli.commands


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="afina-many-") as folder:
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        made = make_runs(scratch, options.runs)
        make_slurm(Path(folder) / "programs", made)
        costs = measure(scratch, Path(folder) / "programs", options.rounds)
    print(f"| {options.runs} runs | seconds | peak MB | squeue | sacct |\n|---|---|---|---|---|")
    for cost in costs:
        print(
            f"| `afina {cost.command}` | {cost.seconds:.2f} | {cost.peak_mb:.0f} | {cost.squeue_calls} | {cost.sacct_calls} |"
        )
    if options.json:
        options.json.write_text(json.dumps([vars(cost) for cost in costs], indent=1))


if __name__ == "__main__":
    main()
