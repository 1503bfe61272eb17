"""What was foreseen against what was used: time and memory of six runs of different shapes, on the CPU.

For each shape, in this order: `afina rehearse` in a fresh scratch folder, which knows of no earlier run; then the run itself with
`afina train`. The time foreseen is that of the rehearsal, start-up to end; the one used is the outcome's. Memory foreseen is told
twice, by the rehearsal and by the model's numbers alone; the one used is the most that the kernel saw of the worker (`ru_maxrss` of
wait4(2)). Then the forecast from earlier runs: of twice the epochs, from the run that was just made, against such a run.

    AFINA_TEST_DATA=FOLDER python tests/bench/estimates.py [--rows 600] [--threads 2] [--shapes …] [--json found.json]
    python tests/bench/estimates.py --quick

Not covered: GPUs, several processes, a machine that does other work at the same time (the load before each run is noted).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reviews  # type: ignore[import-not-found]

__all__ = ["SHAPES", "Shape", "measure", "table"]


@dataclass(frozen=True)
class Shape:
    """A model, a kind of text, and how a step is made of it; `rows` as a share of the bench's rows."""

    name: str
    model: str
    lengths: str
    max_length: int
    batch_size: int
    batching: str = "auto"
    per_device: int | None = None
    rows: float = 1.0


SHAPES = (
    Shape("tiny, short texts, 16 a step", "tiny", "short", 64, 16),
    Shape("MiniLM, short texts, 8 a step", "minilm", "short", 96, 8),
    Shape("MiniLM, short texts, 64 a step", "minilm", "short", 96, 64),
    Shape("MiniLM, long texts, 8 a step", "minilm", "yelp", 512, 8),
    Shape("MiniLM, long texts, 16 a step in fours, padded", "minilm", "yelp", 256, 16, "longest", 4, 0.5),
    Shape("BERT base, short texts, 8 a step", "bert-base", "short", 96, 8, rows=0.5),
)
_QUICK = (Shape("tiny, short texts, 16 a step", "tiny", "short", 64, 16), Shape("tiny, long texts, 8 in twos", "tiny", "yelp", 128, 8, "longest", 2))  # fmt: skip


def measure(shape: Shape, folder: Path, rows: int, threads: int, *, quick: bool) -> dict[str, Any]:
    """Foreseen and used, of one shape."""
    rows = int(rows * shape.rows)
    folder.mkdir()
    (folder / "scratch").mkdir()
    reviews.write_parts(folder, shape.lengths, rows, quick=quick)
    recipe = _recipe(shape, reviews.model_for(shape.model, folder))
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    environment = {
        **os.environ,
        "AFINA_SCRATCH": str(folder / "scratch"),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    found: dict[str, Any] = {"shape": shape.name, "rows": rows, "threads": threads}
    found["load"] = [round(os.getloadavg()[0], 2)]
    seconds = "0.5" if quick else "10"
    said = json.loads(_afina(folder, environment, "rehearse", "recipe.yaml", "--seconds", seconds, "--json"))
    found["foreseen"] = {k: said[k] for k in ("basis", "seconds", "seconds_by_part", "host_gb", "total_steps", "checkpoint_gb", "time_min", "mem_gb")}  # fmt: skip
    found["by_numbers_gb"] = _foresee(folder, environment)["host_gb"]
    found["used"] = _train(folder, environment, "first")
    found["load"].append(round(os.getloadavg()[0], 2))
    again = ("--set", "train.epochs=2")
    later = _foresee(folder, environment, *again[1:])
    found["later_foreseen"] = {k: later[k] for k in ("basis", "seconds", "host_gb")}
    found["later_used"] = _train(folder, environment, "second", *again)
    found["load"].append(round(os.getloadavg()[0], 2))
    return found


def _recipe(shape: Shape, model: Path) -> dict[str, Any]:
    train: dict[str, Any] = {"batch_size": shape.batch_size, "epochs": 1, "learning_rate": 5e-5}
    if shape.per_device:
        train["max_batch_per_device"] = shape.per_device
    return {
        "name": "bench",
        "model": str(model),
        "data": {
            "files": {"train": f"{shape.lengths}-train.csv", "eval": f"{shape.lengths}-eval.csv"},
            "text": "text",
            "label": "stars",
        },
        "tokens": {"max_length": shape.max_length, "batching": shape.batching},
        "train": train,
        "resources": {"gpus_per_node": 0, "cpus_per_gpu": os.cpu_count() or 1, "time": 120},
    }


def _afina(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    argv = [sys.executable, "-m", "afina.cli", *arguments]
    done = subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"afina {arguments[0]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1]


def _foresee(folder: Path, environment: dict[str, str], *overrides: str) -> dict[str, Any]:
    """What `afina submit` would write down, without submitting."""
    code = (
        "import json, sys; from afina import api as jobs; from afina.forecast.forecast import foresee\nfrom afina.run.job_request import JobRequest\n"
        "plan = jobs.plan_for('recipe.yaml', JobRequest(overrides=sys.argv[1:]))\n"
        "print(json.dumps(foresee(plan, jobs.prepare(plan)).to_json()))"
    )
    argv = [sys.executable, "-c", code, *overrides]
    done = subprocess.run(argv, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _train(folder: Path, environment: dict[str, str], name: str, *options: str) -> dict[str, Any]:
    run = folder / "scratch/runs" / name
    argv = [sys.executable, "-m", "afina.cli", "train", "recipe.yaml", "--run", str(run), *options]
    with (folder / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(argv, env=environment, cwd=folder, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError((folder / f"{name}.log").read_text(errors="replace")[-3000:])
    outcome = json.loads((run / "outcome.json").read_text())
    return {
        "seconds": outcome["seconds"],
        "seconds_by_part": outcome["utilisation"]["seconds_by_part"],
        "host_gb": usage.ru_maxrss * 1024 / 1e9,
        "steps": outcome["global_step"],
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    head = ("run", "steps", "time: foreseen, used", "", "memory: rehearsed, by numbers, used", "", "asked for", "twice as long: foreseen, used", "")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in found:
        foreseen, used, later = one["foreseen"], one["used"], one["later_used"]
        cells = (
            one["shape"],
            str(used["steps"]),
            f"{foreseen['seconds']:.0f} s, {used['seconds']:.0f} s",
            f"{foreseen['seconds'] / used['seconds']:.2f}",
            f"{foreseen['host_gb']:.2f}, {one['by_numbers_gb']:.2f}, {used['host_gb']:.2f} GB",
            f"{foreseen['host_gb'] / used['host_gb']:.2f}, {one['by_numbers_gb'] / used['host_gb']:.2f}",
            f"{foreseen['time_min']} min, {foreseen['mem_gb']} GB",
            f"{one['later_foreseen']['seconds']:.0f} s, {later['seconds']:.0f} s",
            f"{one['later_foreseen']['seconds'] / later['seconds']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600, help="to train on, and as many to evaluate on")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shapes", type=int, nargs="*", metavar="N", help="only these, counted from 1")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes, to see that it works")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shapes = _QUICK if options.quick else SHAPES
    chosen = [shapes[n - 1] for n in options.shapes] if options.shapes else shapes
    found = []
    with tempfile.TemporaryDirectory() as name:
        for number, shape in enumerate(chosen):
            rows = 48 if options.quick else options.rows
            found.append(measure(shape, Path(name) / str(number), rows, options.threads, quick=options.quick))
            print(f"{shape.name}: done", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
