"""A run on real reviews that the cluster interrupts many times, beside the same run undisturbed: are logs and weights equal?

    python tests/bench/interrupted.py --image IMAGE.sif --csv reviews.csv --model FOLDER [--interruptions 10] [--seed 1]

Runs on the test cluster (as root, see tests/slurm), in the image, one process, three epochs. The interruptions come from
Slurm, at random steps: the warning before the time limit (USR1 to the batch shell), `scontrol requeue`, a preemption by the higher
partition, a killed process, a failed node. Prints the interruptions, and whether `metrics.jsonl` and the weights are equal byte for byte.
Both nodes are this machine: seconds mean nothing for a real cluster.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/slurm")]
from cluster import TERMINAL, Cluster  # noqa: E402
from tests.faults.slurm_run import give_to_user  # noqa: E402


def _recipe(sample: int, epochs: int) -> dict[str, Any]:
    return {
        "name": "reviews",
        "baselines": False,
        "model": "model",
        "data": {
            "files": {"all": "reviews.csv"},
            "text": "text",
            "label": "stars",
            "train": {"fraction": 0.5, "sample": sample, "seed": 42},
            "eval": {"fraction": 0.5, "sample": sample, "seed": 42},
        },
        "tokens": {"max_length": 128},
        "train": {"batch_size": 8, "epochs": epochs, "log_every": 5, "save_every": 25, "seed": 1},
        "metrics": ["accuracy", "f1"],
        "resources": {"gpus_per_node": 1, "cpus_per_gpu": 1, "time": 60},
    }


def _kill(run: Path) -> None:
    subprocess.run(["pkill", "-KILL", "-f", f"afina.worker train {re.escape(str(run))}"], check=False)


def _preempt(cluster: Cluster, place: Path) -> None:
    argv = ["--partition=urgent", f"--nodes={cluster.nodes}", "--exclusive", "--output=/dev/null"]
    cluster.wait(cluster.sbatch(*argv, script="#!/bin/bash\nsleep 1\n", cwd=place), timeout=300)


def _fail_node(cluster: Cluster, job: int) -> None:
    node = cluster.job(job)["NodeList"]
    try:
        cluster.fail_node(node)
    finally:
        cluster.start_slurmd(node)


def _steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _train(cluster: Cluster, place: Path, name: str, steps: Sequence[int], rng: random.Random) -> dict[str, Any]:
    """One run, interrupted once after each of these steps has been logged."""
    began = time.monotonic()
    options = ("--gpus-per-node=1", "--cpus-per-task=1")
    job = cluster.sbatch(*options, "slurm/finetune.sbatch", "recipe.yaml", "--set", f"name={name}", cwd=place)
    runs = place / "scratch/runs"
    while not (found := list(runs.glob(f"{name}-*/plan.json"))):
        time.sleep(0.2)
    run = found[0].parent
    strikes: dict[str, Callable[[], object]] = {
        "USR1": lambda: cluster.run_as_user(["scancel", "--batch", "--signal=USR1", str(job)]),
        "requeue": lambda: cluster.run_as_user(["scontrol", "requeue", str(job)]),
        "preemption": lambda: _preempt(cluster, place),
        "SIGKILL": lambda: _kill(run),
        "node failure": lambda: _fail_node(cluster, job),
    }
    done: list[str] = []
    while cluster.job(job)["JobState"] not in TERMINAL:
        if len(done) < len(steps):
            attempts, before = len(list((run / "attempts").glob("*/env.json"))), _steps(run)
            trains = attempts > len(done) and (run / "events.jsonl").read_text().count('"first_step"') > len(done)
            if trains and before >= steps[len(done)]:
                time.sleep(rng.uniform(0, 2))
                kind = rng.choice(list(strikes))
                strikes[kind]()
                done.append(f"{kind} after step {max(before, _steps(run))}")
                print(f"{name}: {done[-1]}", file=sys.stderr, flush=True)
        time.sleep(0.5)
    outcome = json.loads((run / "outcome.json").read_text())
    return {
        "outcome": outcome["outcome"],
        "attempts": outcome["attempts"],
        "metrics": outcome["metrics"],
        "interruptions": done,
        "seconds": round(time.monotonic() - began, 1),
        "log_lines": len((run / "metrics.jsonl").read_text().splitlines()),
        "log_sha256": hashlib.sha256((run / "metrics.jsonl").read_bytes()).hexdigest(),
        "weights_sha256": hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True, help="columns text and stars")
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained encoder")
    parser.add_argument("--sample", type=int, default=1000, help="rows of each part")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--interruptions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cluster", type=Path, help="use the cluster that is up in this folder")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="afina-interrupted-", dir="/tmp"))
    place.chmod(0o755)  # the jobs are an ordinary user's, and munged wants to be reached
    (place / "scratch").mkdir()
    shutil.copytree(options.model, place / "model")
    shutil.copy(options.csv, place / "reviews.csv")
    (place / "recipe.yaml").write_text(json.dumps(_recipe(options.sample, options.epochs)))
    own = None if options.cluster else Cluster(place / "cluster")
    cluster = Cluster.attach(options.cluster) if own is None else own.up()
    try:
        give_to_user(place, options.image.resolve(), cluster)
        rng = random.Random(options.seed)
        last = options.sample * options.epochs // _recipe(0, 0)["train"]["batch_size"] - 10
        instants = sorted(rng.sample(range(last), options.interruptions))
        alone = _train(cluster, place, "alone", (), rng)
        found = {
            "seed": options.seed,
            "alone": alone,
            "interrupted": _train(cluster, place, "often", instants, rng),
        }
        found["log_equal"] = found["interrupted"]["log_sha256"] == alone["log_sha256"]
        found["weights_equal"] = found["interrupted"]["weights_sha256"] == alone["weights_sha256"]
        print(json.dumps(found, indent=1))
        return 0 if found["log_equal"] and found["weights_equal"] else 1
    finally:
        if own is not None:
            own.down()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
