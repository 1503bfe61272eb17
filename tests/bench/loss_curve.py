"""The tutorial's script and afina with the tutorial's settings, on the same rows and model: the loss of every step.

Runs both, one after the other, and prints the largest difference of the training loss over all steps, of the validation
loss and of the accuracy. Small by default, so that CI can run it for correctness; `--sample 1000 --max-length 512` is the
tutorial's size.

    python tests/bench/loss_curve.py --csv reviews.csv --model FOLDER [--sample 200] [--json]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def compare(
    table: Path, model: str, *, sample: int, max_length: int, epochs: float, label: str, seed: int
) -> dict[str, Any]:
    """Run both in a temporary folder; returns the largest absolute differences and the seconds of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with table.open(encoding="utf-8", newline="") as source:
            rows = [{"text": r["text"], label: r[label]} for r in csv.DictReader(source)]
        half = len(rows) // 2
        for part, some in (("train", rows[:half]), ("eval", rows[half:])):
            with (folder / f"{part}.csv").open("w", encoding="utf-8", newline="") as out:
                writer = csv.DictWriter(out, ["text", label])
                writer.writeheader()
                writer.writerows(some)
        env = {**os.environ, "AFINA_SCRATCH": str(folder), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
        tutorial = [sys.executable, str(Path(__file__).with_name("tutorial.py")), "--train", str(folder / "train.csv")]
        tutorial += ["--eval", str(folder / "eval.csv"), "--model", model, "--out", str(folder / "steps.jsonl")]
        tutorial += [
            "--label",
            label,
            "--sample",
            str(sample),
            "--max-length",
            str(max_length),
            "--epochs",
            str(epochs),
        ]
        tutorial += ["--seed", str(seed)]
        said = subprocess.run(tutorial, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        recipe = {
            "name": "curve",
            "model": model,
            "task": "single-label",
            "data": {
                "files": {"train": str(folder / "train.csv"), "eval": str(folder / "eval.csv")},
                "text": "text",
                "label": label,
                "train": {"sample": sample, "seed": 42},
                "eval": {"sample": sample, "seed": 42},
            },
            "tokens": {"max_length": max_length, "batching": "padded"},
            "train": {
                "batch_size": 8,
                "epochs": epochs,
                "learning_rate": 5e-5,
                "seed": seed,
                "log_every": 1,
                "keep": "last",
                "fast_dropout": False,
                "precision": "fp32",
            },
            "metrics": ["accuracy"],
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        run = folder / "run"
        afina = [sys.executable, "-m", "afina.cli", "train", str(folder / "recipe.yaml"), "--run", str(run)]
        subprocess.run(afina, env=env, check=True, stdout=subprocess.DEVNULL)
        theirs = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        ours = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        outcome = json.loads((run / "outcome.json").read_text())
    found: dict[str, Any] = {
        "steps": outcome["global_step"],
        "tutorial_seconds": json.loads(said.splitlines()[-1])["seconds"],
    }
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy"):
        pairs = list(zip((x[key] for x in theirs if key in x), (x[key] for x in ours if key in x), strict=True))
        found[f"max_difference_{key}"] = max(abs(a - b) for a, b in pairs)
        found[f"compared_{key}"] = len(pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True, type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--label", default="stars")
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    print(
        json.dumps(
            compare(
                options.csv,
                options.model,
                sample=options.sample,
                max_length=options.max_length,
                epochs=options.epochs,
                label=options.label,
                seed=options.seed,
            ),
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
