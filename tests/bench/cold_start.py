"""From the command to the end of the first step, by part: `afina train` and the tutorial's script on the same texts and model.

Both run once before, so that data is prepared (or cached) and files are in the page cache. A probe in every Python says how
long imports took and how many modules there were at the first step. In turn, several rounds; medians and ranges, in seconds.

    AFINA_TEST_DATA=FOLDER python tests/bench/cold_start.py [--rounds 3] [--json found.json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import reviews  # type: ignore[import-not-found]
from peers import HERE, environment_of, recipe_of, spread  # type: ignore[import-not-found]

#: Read at the start of every Python process; speaks only where a first training step ends.
PROBE = """
import importlib.abc, importlib.util, json, os, sys, time
BEGAN = time.time()
ROOTS = {"torch", "transformers", "datasets", "sklearn", "scipy", "accelerate", "pandas", "pyarrow", "numpy", "afina"}
SECONDS, ASKED, WITHIN = {}, set(), []
class Timed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in ROOTS or name in ASKED:
            return None
        ASKED.add(name)
        spec = importlib.util.find_spec(name)
        ASKED.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module
        def timed(module):
            # What is imported while another module is, counts as that one's.
            began, outermost = time.time(), not WITHIN
            WITHIN.append(name)
            try:
                execute(module)
            finally:
                WITHIN.pop()
            if outermost:
                SECONDS[root] = SECONDS.get(root, 0.0) + time.time() - began
            if name == "transformers.trainer":
                usual = module.Trainer.training_step
                def first(self, *arguments, **named):
                    module.Trainer.training_step = usual
                    at, imports = time.time(), dict(SECONDS)
                    found = usual(self, *arguments, **named)
                    with open(os.environ["COLD_START"], "a") as file:
                        file.write(json.dumps({"process": BEGAN, "step_begins": at, "step_ends": time.time(),
                                               "modules": len(sys.modules), "imports": imports}) + "\\n")
                    return found
                module.Trainer.training_step = first
        spec.loader.exec_module = timed
        return spec
sys.meta_path.insert(0, Timed())
"""


def once(argv: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a command; the seconds until its first step has ended, by part."""
    note = folder / "probe.jsonl"
    note.unlink(missing_ok=True)
    began = time.time()
    subprocess.run(argv, env={**environment, "COLD_START": str(note)}, check=True, stdout=subprocess.DEVNULL)
    said = json.loads(note.read_text().splitlines()[0])
    imports = sum(said["imports"].values())
    return {
        "before the process that trains": said["process"] - began,
        "imports": imports,
        "reading, building, measuring": said["step_begins"] - said["process"] - imports,
        "the first step, without the optimizer": said["step_ends"] - said["step_begins"],
        "all": said["step_ends"] - began,
        "modules": said["modules"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {"tutorial": [], "afina": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(PROBE)
        environment = environment_of(folder, options.threads)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        train, test = reviews.write_parts(folder, "short", options.rows, quick=options.quick)
        # Few rows are trained on; all are read.
        model = reviews.model_for("tiny" if options.quick else "minilm", folder)
        tutorial = [sys.executable, str(HERE / "tutorial.py"), "--train", str(train), "--eval", str(test)]
        tutorial += ["--model", str(model), "--out", str(folder / "steps.jsonl"), "--epochs", "1", "--sample", "16"]
        tutorial += ["--max-length", "64" if options.quick else "512"]
        recipe = recipe_of(folder, model, "short", 1, options.quick)
        for number in range(-1, options.rounds):
            afina = [sys.executable, "-m", "afina.cli", "train", str(recipe), "--run", str(folder / f"run{number}")]
            afina += ["--set", "train.epochs=null", "--set", "train.max_steps=2"]
            for peer, argv in (("tutorial", tutorial), ("afina", afina)):
                parts = once(argv, folder, environment)
                if number >= 0:
                    found[peer].append(parts)
    said = {peer: {part: spread([r[part] for r in rounds]) for part in rounds[0]} for peer, rounds in found.items()}
    print("| seconds | tutorial | afina |\n|---|---|---|")
    for part in said["afina"]:
        cells = [
            f"{m:.5g} [{low:.5g}–{high:.5g}]" for m, low, high in (said[peer][part] for peer in ("tutorial", "afina"))
        ]
        print(f"| {part} | {' | '.join(cells)} |")
    if options.json:
        options.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
