"""The project folder of all runs of the suite: a tiny model, reviews, a recipe, prepared data.

One recipe: 300 steps of a few milliseconds, a save every 20, an evaluation every 75, a log line per step, so that a
repeated or missing step shows in the log. Scenarios change it with `--set`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import tiny

__all__ = ["SAVE_EVERY", "STEPS", "environment", "write_project", "overrides", "prefetch"]

SAVE_EVERY = 20
STEPS = 300

# 243 training rows are 31 steps an epoch, the last of three rows: an epoch ends neither at a save nor evenly.
# Slow to learn, so that the best evaluation is not the first.
_TRAIN = {"max_steps": STEPS, "learning_rate": 4.0e-4, "seed": 1, "save_every": SAVE_EVERY, "evaluate": 75}
_RESOURCES = {"gpus_per_node": 1, "cpus_per_gpu": 1, "time": 30}


def write_project(folder: Path) -> Path:
    """Write model, reviews, sentences with tags, recipe and an empty scratch into `folder`; existing files stay."""
    if not (folder / "recipe.yaml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tiny.write_conll(folder / "tags.conll", tiny.tagged_sentences(301, 1))
        tiny.write_project(folder, 301, 1, name="faults", train=_TRAIN, metrics=["accuracy"], resources=_RESOURCES)
    return folder


def prefetch(place: Path) -> None:
    """Prepare the data once, without a container, for all runs."""
    if any(place.glob("scratch/prepared/*/manifest.json")):
        return
    argv = [sys.executable, "-m", "afina", "prefetch", "recipe.yaml"]
    done = subprocess.run(
        argv, cwd=place, env=environment(place), capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"afina prefetch failed:\n{done.stdout}{done.stderr}")


def environment(place: Path) -> dict[str, str]:
    """The environment of runs without a container. Equal digests need an equal number of threads: one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AFINA_", "SLURM_", "SBATCH_"))}
    return {
        **kept,
        "AFINA_SCRATCH": str(place / "scratch"),
        "AFINA_RUNTIME": "none",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(place),
    }


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """`--set key=value` for each changed key."""
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
