"""Runs `afina train` with other values of module constants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import tiny

__all__ = ["run_with"]


def run_with(place: Path, name: str, constants: str, *options: str, **train: Any) -> Path:
    """`afina train` on 163 rows with constants of the worker's modules set otherwise."""
    (place / "scratch").mkdir(exist_ok=True)
    if not (place / "model").exists():
        tiny.tiny_model(place / "model")
        tiny.write_csv(place / "reviews.csv", tiny.tiny_reviews(203, 7))
    batching = train.pop("batching", "auto")
    recipe = tiny.recipe(tokens={"batching": batching}, train={"epochs": 2, **train})
    (place / f"{name}.yaml").write_text(json.dumps(recipe))
    # Read at the start of every Python process of the run, and nowhere else.
    custom = place / "custom"
    custom.mkdir(exist_ok=True)
    (custom / "sitecustomize.py").write_text(
        "import sys\n"
        "class Late:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        wanted = {constants!r}\n"
        "        if name != wanted.split(':')[0]: return None\n"
        "        sys.meta_path.remove(self)\n"
        "        import importlib.util\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        run = spec.loader.exec_module\n"
        "        def execute(module): run(module); exec(wanted.split(':', 1)[1], vars(module))\n"
        "        spec.loader.exec_module = execute\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Late())\n"
    )
    environment = {
        **os.environ,
        "AFINA_SCRATCH": str(place / "scratch"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(custom),
    }
    argv = [sys.executable, "-m", "afina.cli", "train", str(place / f"{name}.yaml"), "--run", str(place / name)]
    done = subprocess.run([*argv, *options], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / name
