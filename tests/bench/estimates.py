"""Forecasts beside what runs really took: time and memory of six runs of different shapes, on the CPU.

For each shape: `afina rehearse` in a fresh scratch folder, which holds no earlier run; then the run itself with `afina train`; then a
forecast from that run of one with twice the epochs, and that run too. Times are those of the rehearsal and of the outcomes, start-up to end;
memory used is that of the outcome, the largest resident set of the worker.

    AFINA_TEST_DATA=FOLDER python tests/bench/estimates.py [--rows 600] [--threads 2] [--shapes …] [--json found.json]
    python tests/bench/estimates.py --quick

Not covered: GPUs, several processes, a machine that does other work at the same time (the load before each run is recorded).
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
from measuring import AFINA, environment_of  # type: ignore[import-not-found]

__all__ = ["SHAPES", "Shape", "main", "measure", "table"]


@dataclass(frozen=True)
class Shape:
    """A model, a kind of text and the batches of a step; `rows` is a share of the bench's rows."""

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
    """Forecast and used, of one shape."""
    rows = int(rows * shape.rows)
    environment = environment_of(folder, threads)
    reviews.write_parts(folder, shape.lengths, rows, quick=quick)
    (folder / "recipe.yaml").write_text(json.dumps(_recipe(shape, reviews.model_for(shape.model, folder))))
    found: dict[str, Any] = {"shape": shape.name, "rows": rows, "threads": threads, "load": [os.getloadavg()[0]]}
    seconds = "0.5" if quick else "10"
    rehearse = [*AFINA, "rehearse", "recipe.yaml", "--seconds", seconds, "--json"]
    found["forecast"] = _json_of(rehearse, folder, environment)
    found["used"] = _train(folder, environment, "first")
    found["load"].append(os.getloadavg()[0])
    found["later_forecast"] = _json_of([sys.executable, "-c", _FORECAST, "train.epochs=2"], folder, environment)
    found["later_used"] = _train(folder, environment, "second", "--set", "train.epochs=2")
    return found


#: The forecast of a run that is not rehearsed.
_FORECAST = """
import json, sys
from afina import api
from afina.forecast.forecast import forecast
from afina.run.job_request import JobRequest
from afina.run.new_run import prepare
plan = api.plan_for("recipe.yaml", JobRequest(overrides=sys.argv[1:]))
print(json.dumps(forecast(plan, prepare(plan)).to_json()))
"""


def _recipe(shape: Shape, model: Path) -> dict[str, Any]:
    train: dict[str, Any] = {"batch_size": shape.batch_size, "epochs": 1, "learning_rate": 5e-5}
    if shape.per_device:
        train["max_batch_per_device"] = shape.per_device
    return {
        "name": "bench",
        "baselines": False,
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


def _json_of(argv: Sequence[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """The JSON object that a command prints last."""
    done = subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{argv[:4]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _train(folder: Path, environment: dict[str, str], name: str, *options: str) -> dict[str, Any]:
    run = folder / "scratch/runs" / name
    argv = [*AFINA, "train", "recipe.yaml", "--run", str(run), *options]
    with (folder / f"{name}.log").open("wb") as log:
        done = subprocess.run(argv, env=environment, cwd=folder, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise RuntimeError((folder / f"{name}.log").read_text(errors="replace")[-3000:])
    outcome = json.loads((run / "outcome.json").read_text())
    return {
        "seconds": outcome["seconds"],
        "seconds_by_part": outcome["utilisation"]["seconds_by_part"],
        "host_gb": outcome["utilisation"]["peak_memory_gb"],
        "steps": outcome["global_step"],
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    heads = ("run", "steps", "time: forecast, used", "", "memory: rehearsed, used", "", "requested")
    heads += ("twice as long: forecast, used", "")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for one in found:
        forecast, used, later, later_used = (one[k] for k in ("forecast", "used", "later_forecast", "later_used"))
        cells = (
            one["shape"],
            str(used["steps"]),
            f"{forecast['seconds']:.0f} s, {used['seconds']:.0f} s",
            f"{forecast['seconds'] / used['seconds']:.2f}",
            f"{forecast['host_gb']:.2f}, {used['host_gb']:.2f} GB",
            f"{forecast['host_gb'] / used['host_gb']:.2f}",
            f"{forecast['time_min']} min, {forecast['mem_gb']} GB",
            f"{later['seconds']:.0f} s, {later_used['seconds']:.0f} s",
            f"{later['seconds'] / later_used['seconds']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600, help="to train on, and as many to evaluate on")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shapes", type=int, nargs="*", metavar="N", help="only these, counted from 1")
    parser.add_argument("--quick", action="store_true", help="two tiny shapes, to see that it works")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
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
