"""Does it learn as much? Accuracy and macro-F1 of the tutorial's script and of `afina train`, over seeds, on the same texts.

Each seed has both train on the same 1,000 rows and judge the same 1,000 others, once: the seed sets the new head, the order and
dropout. The tutorial's texts are padded to the longest of their batch, which changes its speed and not what it learns
(--padded: to 512, as it has it). Shown are means with 95 % intervals (Student's t over the seeds), and of the differences
between the two within a seed. Every finished run is a line of OUT/cells.jsonl: the same command goes on where it was
interrupted.

    AFINA_TEST_DATA=FOLDER python tests/bench/accuracy.py --out FOLDER [--seeds 5] [--rows 1000] [--epochs 3]
    ... --peers tutorial afina afina-fp32     also with `train.precision: fp32`
    ... --quick                  tiny texts and a tiny model: that it works
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import reviews  # type: ignore[import-not-found]
from peers import HERE, environment_of, recipe_of  # type: ignore[import-not-found]

PEERS = ("tutorial", "afina", "afina-fp32")


def run_cell(options: argparse.Namespace, peer: str, lengths: str, seed: int) -> dict[str, Any]:
    folder = options.out
    model = reviews.model_for("tiny" if options.quick else "minilm", folder)
    environment = environment_of(folder, options.threads)
    if peer == "tutorial":
        argv = [sys.executable, str(HERE / "tutorial.py"), "--model", str(model), "--seed", str(seed)]
        for part in ("train", "eval"):
            argv += [f"--{part}", str(folder / f"{lengths}-{part}.csv")]
        argv += [
            "--out",
            str(folder / "tutorial.jsonl"),
            "--epochs",
            str(options.epochs),
            "--sample",
            str(options.rows),
        ]
        argv += ["--max-length", "64" if options.quick else "512", *([] if options.padded else ["--pad-to-batch"])]
        said = subprocess.run(argv, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        return {"accuracy": found["accuracy"], "f1": found["f1"]}
    recipe = recipe_of(folder, model, lengths, options.epochs, options.quick)
    run = folder / "runs" / f"{lengths}-{seed}-{peer}"
    run.parent.mkdir(exist_ok=True)
    # One that was interrupted goes on.
    argv = [sys.executable, "-m", "afina.cli"]
    begun = (run / "plan.json").exists()
    settings = [f"train.seed={seed}", *(["train.precision=fp32"] if peer == "afina-fp32" else [])]
    new = ["train", str(recipe), "--run", str(run), *(word for setting in settings for word in ("--set", setting))]
    argv += ["resume", str(run)] if begun else new
    subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((run / "outcome.json").read_text())["metrics"]
    return {"accuracy": metrics["eval_accuracy"], "f1": metrics["eval_f1"]}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    from scipy import stats

    if len(values) < 2:
        return statistics.mean(values), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--lengths", nargs="+", choices=reviews.LENGTHS, default=list(reviews.LENGTHS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["tutorial", "afina"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--padded", action="store_true", help="pad the tutorial's texts to 512")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "cells.jsonl"
    cells = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for lengths in options.lengths:
        reviews.write_parts(options.out, lengths, options.rows, quick=options.quick)
    for seed in range(1, options.seeds + 1):
        for lengths in options.lengths:
            for peer in options.peers:
                about = {"peer": peer, "lengths": lengths, "seed": seed, "rows": options.rows, "epochs": options.epochs}
                if any(about.items() <= cell.items() for cell in cells):
                    continue
                cells.append({**about, **run_cell(options, peer, lengths, seed)})
                with log.open("a") as file:
                    file.write(json.dumps(cells[-1]) + "\n")
                print(cells[-1], flush=True)
    print("| texts | metric | peer | mean | − tutorial |\n|---|---|---|---|---|")
    for lengths in options.lengths:
        for metric in ("accuracy", "f1"):
            wanted = {"lengths": lengths, "rows": options.rows, "epochs": options.epochs}
            by_seed = {
                peer: {c["seed"]: c[metric] for c in cells if {**wanted, "peer": peer}.items() <= c.items()}
                for peer in options.peers
            }
            base = by_seed.get("tutorial", {})
            for peer, values in by_seed.items():
                mean, half = interval(list(values.values()))
                pairs = [value - base[seed] for seed, value in values.items() if seed in base]
                apart = "–" if peer == "tutorial" or not pairs else "{:+.4f} ± {:.4f}".format(*interval(pairs))
                print(f"| {lengths}, {len(values)} seeds | {metric} | {peer} | {mean:.4f} ± {half:.4f} | {apart} |")


if __name__ == "__main__":
    main()
