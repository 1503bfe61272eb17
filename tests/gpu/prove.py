"""What one GPU shows of afina, as JSON; `prove.sh` beside this file prepares the environment and calls it.

    machine     GPU, versions, peaks of torch.mm
    tests       tests/gpu
    peers 8 …   bert-base on texts of Yelp's lengths beside the tutorial, Trainer's best options and a plain loop: tests/bench/peers.py
    decoder …   SmolLM2-135M, or a Llama of its size with random weights: all weights and LoRA, packed and grouped

A part that fails is recorded with its output, and the others go on; one that finds no time left is recorded as left out. Speeds with random
weights are those of the trained ones; their accuracy says nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/bench")]

BATCHES = (8, 32, 128)
PEERS = ("tutorial", "trainer", "native", "afina", "afina-graphs")
#: Seconds in which the whole has to be over, and the least that a part is started with.
LIMIT_S, LEAST_S = 480, 20


class NoTime(Exception):
    """The time is over before this part began."""


def machine(_: argparse.Namespace, place: Path, left: float) -> dict[str, Any]:
    import peers  # type: ignore[import-not-found]
    import torch
    import transformers

    gpu = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "capability": torch.cuda.get_device_capability() if gpu else None,
        "peaks": peers.peaks_now(len(os.sched_getaffinity(0))),
    }


def tests(_: argparse.Namespace, place: Path, left: float) -> dict[str, Any]:
    report = place / "tests.xml"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/gpu"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)
    cases = list(xml.parse(report).iter("testcase"))
    failed = [
        str(case.get("name")) for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    ran = len(cases) - skipped - len(failed)
    return {"passed": ran, "skipped": skipped, "failed": failed, "output": done.stdout[-3000:] if failed else ""}


def of_peers(batch: int) -> Callable[[argparse.Namespace, Path, float], dict[str, Any]]:
    def measure(options: argparse.Namespace, place: Path, left: float) -> dict[str, Any]:
        out = place / f"peers-{batch}"
        argv = [sys.executable, "tests/bench/peers.py", "--out", str(out), "--batch-size", str(batch), "--rounds", "1"]
        # Those that the tests of the benches on a CPU leave to this one.
        argv += ["--peers", *(("trainer", "afina-graphs") if options.dry_run else PEERS)]
        argv += ["--quick", "--lengths", "short"] if options.dry_run else ["--models", "bert-base", "--lengths", "yelp"]
        argv += ["--rows", "32" if options.dry_run else str(max(1000, 40 * batch))]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)
        cells = out / "cells.jsonl"
        kept = (
            "peer",
            "tokens_per_second",
            "mfu",
            "memory_gb",
            "training_seconds",
            "seconds",
            "wall_seconds",
            "accuracy",
        )
        found = [json.loads(line) for line in cells.read_text().splitlines()] if cells.is_file() else []
        rows = [{key: cell[key] for key in kept if key in cell} for cell in found]
        return {"rows": rows, **({"failed": done.stderr[-3000:]} if done.returncode else {})}

    return measure


def decoder(keys: dict[str, str]) -> Callable[[argparse.Namespace, Path, float], dict[str, Any]]:
    def measure(options: argparse.Namespace, place: Path, left: float) -> dict[str, Any]:
        import reviews  # type: ignore[import-not-found]
        from measuring import AFINA, environment_of  # type: ignore[import-not-found]

        model = reviews.model_for("tiny" if options.dry_run else "smollm2", place)
        rows, steps, batch = (64, 4, 8) if options.dry_run else (4000, 60, 32)
        recipe = {
            "name": "decoder",
            "baselines": False,
            "model": str(model),
            "data": {"files": {}, "text": "text", "label": "stars"},
            "tokens": {"max_length": 64 if options.dry_run else 512},
            "train": {"batch_size": batch, "max_steps": steps, "learning_rate": 2e-4, "keep": "last"},
        }
        for part, path in zip(
            ("train", "eval"), reviews.write_parts(place, "yelp", rows, quick=options.dry_run), strict=True
        ):
            table = list(csv.DictReader(path.open(newline="", encoding="utf-8")))[: rows if part == "train" else 500]
            reviews.tiny.write_csv(place / f"decoder-{part}.csv", table)
            recipe["data"]["files"][part] = str(place / f"decoder-{part}.csv")  # type: ignore[index]
        (place / "decoder.yaml").write_text(json.dumps(recipe))
        run = place / f"decoder-{len(list(place.glob('decoder-*/')))}"
        argv = [*AFINA, "train", str(place / "decoder.yaml"), "--run", str(run)]
        argv += [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        environment = environment_of(place, len(os.sched_getaffinity(0)))
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=left, check=False)
        if done.returncode:
            return {"failed": (done.stdout + done.stderr)[-3000:]}
        outcome = json.loads((run / "outcome.json").read_text())
        saves = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        return {
            **{
                key: outcome["utilisation"].get(key)
                for key in ("tokens_per_second", "mfu", "peak_memory_gb", "real_token_share")
            },
            "trained_parameters": outcome["trained_parameters"],
            "parameters": outcome["parameters"],
            "checkpoint_bytes": max(
                (event["bytes"] for event in saves if event["event"] == "checkpoint"), default=None
            ),
            "accuracy": outcome["metrics"].get("eval_accuracy"),
        }

    return measure


PARTS: dict[str, Callable[[argparse.Namespace, Path, float], dict[str, Any]]] = {
    "machine": machine,
    "tests": tests,
    "peers 8": of_peers(8),
    "decoder LoRA packed": decoder({"adapter": "{}"}),
    "decoder LoRA grouped": decoder({"adapter": "{}", "tokens.batching": "grouped"}),
    "decoder whole packed": decoder({}),
    "peers 32": of_peers(32),
    "peers 128": of_peers(128),
}


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for the whole")
    parser.add_argument("--dry-run", action="store_true", help="tiny models; on the CPU too")
    options = parser.parse_args(arguments)
    ends, proof = time.monotonic() + options.limit, {}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory(prefix="afina-proof-") as place:
        for name in options.only:
            began = time.monotonic()
            try:
                if ends - began < LEAST_S:
                    raise NoTime
                found = PARTS[name](options, Path(place), ends - began)
            except NoTime:
                found = {"left_out": "no time is left"}
            except subprocess.TimeoutExpired:
                found = {"failed": f"not over when the {options.limit:g} s were"}
            except Exception:
                found = {"failed": traceback.format_exc()[-3000:]}
            proof[name] = {**found, "seconds": round(time.monotonic() - began, 1)}
            # After each part: whatever ends this process, what is known is on the disk.
            options.out.write_text(json.dumps(proof, indent=1) + "\n")
            print(name, json.dumps(proof[name])[:600], flush=True)
    return int(any(part.get("failed") for part in proof.values()))


if __name__ == "__main__":
    sys.exit(main())
