"""What all of afina costs around a training step, in milliseconds: a tiny model, on which little else costs anything.

Trainer alone and afina with the same batches (padded, torch's dropout, no evaluation or checkpoint within the steps), in turn; seconds of
training over steps. The lease, the watchdog, the stopwatch, looking for the stop file, agreeing on what is next: all are in it.
afina with its defaults is shown beside it; there packing and dropout change the step itself.

    python tests/bench/overhead.py [--steps 2000] [--rounds 5] [--json found.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import reviews  # type: ignore[import-not-found]
from peers import HERE, environment_of, recipe_of, spread  # type: ignore[import-not-found]


def trainer(folder: Path, model: Path, rows: int, epochs: int, environment: dict[str, str]) -> float:
    argv = [sys.executable, str(HERE / "tutorial.py"), "--model", str(model), "--sample", str(rows)]
    argv += ["--train", str(folder / "short-train.csv"), "--eval", str(folder / "short-eval.csv")]
    argv += ["--out", str(folder / "steps.jsonl"), "--epochs", str(epochs), "--max-length", "64"]
    said = subprocess.run(argv, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(said.splitlines()[-1])
    return float(1000 * (found["seconds"] - found["evaluation_seconds"]) / found["steps"])


def afina(folder: Path, model: Path, epochs: int, run: Path, environment: dict[str, str], *changes: str) -> float:
    argv = [sys.executable, "-m", "afina.cli", "train", str(recipe_of(folder, model, "short", epochs, True))]
    for change in ("train.log_every=1", "train.save_every=1000000", "train.save_minutes=null", *changes):
        argv += ["--set", change]
    subprocess.run([*argv, "--run", str(run)], env=environment, check=True, stdout=subprocess.DEVNULL)
    outcome = json.loads((run / "outcome.json").read_text())
    parts = outcome["utilisation"]["seconds_by_part"]
    seconds = sum(parts[name] for name in ("input", "forward_backward", "optimizer", "other"))
    return float(1000 * seconds / outcome["global_step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"trainer": [], "afina, same batches": [], "afina": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = environment_of(folder, 1)
        rows = min(800, 8 * options.steps)
        epochs = max(1, 8 * options.steps // rows)
        reviews.write_parts(folder, "short", rows, quick=True)
        model = reviews.model_for("tiny", folder)
        same = ("tokens.batching=padded", "train.fast_dropout=false", "train.precision=fp32")
        for number in range(options.rounds):
            found["trainer"].append(trainer(folder, model, rows, epochs, environment))
            found["afina, same batches"].append(
                afina(folder, model, epochs, folder / f"same-{number}", environment, *same)
            )
            found["afina"].append(afina(folder, model, epochs, folder / f"run-{number}", environment))
    differences = [b - a for a, b in zip(found["trainer"], found["afina, same batches"], strict=True)]
    said: dict[str, Any] = {peer: spread(values) for peer, values in found.items()}
    said["overhead"] = spread(differences)
    for peer, values in said.items():
        print(f"{peer}: {values[0]:.3f} ms per step [{values[1]:.3f}–{values[2]:.3f}]")
    if options.json:
        options.json.write_text(json.dumps({**said, "rounds": found, "median": statistics.median(differences)}) + "\n")


if __name__ == "__main__":
    main()
