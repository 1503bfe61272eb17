"""Preparing data: afina beside `datasets.map`, with the tutorial's options and with its best ones; and killed at random instants.

The texts are real reviews joined to the lengths of Yelp reviews. Peers work in turn, each in a process of its own with empty caches: rows
per second over the life of that process, start and imports included; bytes on disk; memory of its processes together.

    AFINA_TEST_DATA=FOLDER python tests/bench/prepare.py --rows 10000 100000 650000 [--rounds 1] [--json found.json]
    ... --peers afina map                  these peers only
    ... --kills 3 --kill-rows 100000       kill `afina prefetch`'s stage at random instants; compare with an undisturbed one
    ... --quick                            synthetic texts and a tiny model: does it work, not how fast

Peers: `map` and `padded` are `load_dataset("csv")` and `map(batched=True)` of the tokenizer, without padding and with
`padding="max_length"`; `… on all cores` are the same with `num_proc`. 650,000 padded rows take 3 GB of disk. Not covered: network file
systems; more than one node.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reviews  # type: ignore[import-not-found]
from measuring import environment_of, measured, ranged  # type: ignore[import-not-found]

MAX_LENGTH = 512
PEERS = ("afina", "map", "map on all cores", "padded", "padded on all cores")
PREPARE = (sys.executable, "-m", "afina.worker", "prepare")

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


def plan_of(table: Path, model: Path, scratch: Path) -> str:
    from afina.recipe.schema import Recipe
    from afina.run.plan import make_plan
    from afina.site.settings import Site

    scratch.mkdir(parents=True, exist_ok=True)
    data = {"files": {"all": str(table)}, "text": "text", "label": "stars"}
    recipe = {"name": "bench", "model": str(model), "data": data, "tokens": {"max_length": MAX_LENGTH}}
    return make_plan(Recipe.model_validate(recipe), Site(scratch=scratch)).to_json()


def run_peer(peer: str, table: Path, rows: int, model: Path, folder: Path) -> dict[str, Any]:
    """Prepare with one peer; its seconds, memory, tokens and bytes on disk."""
    shutil.rmtree(folder, ignore_errors=True)
    environment = environment_of(folder, len(os.sched_getaffinity(0)))
    if peer == "afina":
        done = measured(PREPARE, environment, plan_of(table, model, folder))
        answer = json.loads(done.out.splitlines()[-1])
        files = [path for path in Path(answer["prepared"]).rglob("*") if path.is_file()]
        tokens = sum(answer["tokens"].values())
    else:
        processes = len(os.sched_getaffinity(0)) if peer.endswith("all cores") else None
        if processes:
            environment["TOKENIZERS_PARALLELISM"] = "false"
        argument = [str(table), str(model), "max_length" if peer.startswith("padded") else False, processes, MAX_LENGTH]
        done = measured([sys.executable, "-c", MAP, json.dumps(argument)], environment)
        answer = json.loads(done.out.splitlines()[-1])
        files, tokens = [Path(file) for file in answer["files"]], answer["tokens"]
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder)
    return {
        "peer": peer,
        "rows": rows,
        "seconds": round(done.seconds, 2),
        "cpu_seconds": round(done.cpu_seconds, 2),
        "memory": done.memory,
        "rows_per_second": round(rows / done.seconds, 1),
        "tokens": tokens,
        "bytes": size,
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kills(table: Path, model: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill a prepare stage `count` times, let the next one finish, compare with an undisturbed one."""
    environment, plan = environment_of(folder, len(os.sched_getaffinity(0))), plan_of(table, model, folder)
    rng = random.Random(seed)
    undisturbed = measured(PREPARE, environment, plan)
    final = Path(json.loads(undisturbed.out.splitlines()[-1])["prepared"])
    expected = tree(final)
    shutil.rmtree(final)
    work = folder / "cache" / "prepare"
    attempts: list[float] = []
    for number in range(count + 1):
        began, shards = time.perf_counter(), len(list(work.glob("*/*.npz")))
        process = subprocess.Popen(
            PREPARE, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert process.stdin is not None
        process.stdin.write(plan.encode())
        process.stdin.close()
        if number < count:
            # Between its first new shard and the instant where an undisturbed one would end.
            while len(list(work.glob("*/*.npz"))) <= shards and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.random() * undisturbed.seconds / (2 * count + 2))
            process.kill()
        process.wait()
        attempts.append(round(time.perf_counter() - began, 2))
    return {
        "seed": seed,
        "undisturbed_seconds": round(undisturbed.seconds, 2),
        "attempts": attempts,
        "equal": tree(final) == expected,
        "left_behind": sorted(p.name for p in [*work.iterdir(), *final.parent.iterdir()] if p != final),
    }


def table_of(found: dict[str, Any]) -> str:
    heads = ("rows", "peer", "rows/s", "seconds", "processor s", "memory MiB", "MiB on disk", "bytes per token")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for one in found["peers"]:
        groups.setdefault((one["rows"], one["peer"]), []).append(one)
    for (rows, peer), some in groups.items():
        median = {key: statistics.median(one[key] for one in some) for key in ("seconds", "cpu_seconds", "memory", "bytes")}  # fmt: skip
        lines.append(
            f"| {rows:,} | {peer} | {ranged([one['rows_per_second'] for one in some], ',.0f')} | {median['seconds']:.1f} | "
            f"{median['cpu_seconds']:.1f} | {median['memory'] / 2**20:,.0f} | {median['bytes'] / 2**20:,.0f} | "
            f"{median['bytes'] / some[0]['tokens']:.2f} |"
        )
    if killed := found.get("kills"):
        lines.append(
            f"\nkilled after {', '.join(f'{s} s' for s in killed['attempts'][:-1])}; the last took {killed['attempts'][-1]} s, undisturbed "
            f"{killed['undisturbed_seconds']} s; {'the same bytes' if killed['equal'] else 'OTHER BYTES'}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--kill-rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30), help="of the kills")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor() or platform.machine()},
        "versions": {n: importlib.metadata.version(n) for n in ("transformers", "tokenizers", "datasets", "pyarrow")},
        "load_before": round(os.getloadavg()[0], 2),
        "peers": [],
    }

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory(dir=options.folder, prefix="afina-bench-") as name:
        place = Path(name)
        texts = reviews.read_reviews(quick=options.quick)
        model = reviews.tiny.tiny_model(place / "model", max_length=MAX_LENGTH) if options.quick else reviews.model_for("minilm", place)  # fmt: skip
        for rows in options.rows:
            table = reviews.write_table(place / f"{rows}.csv", texts, "yelp", rows)
            for number in range(options.rounds):
                first = number % len(options.peers)
                for peer in options.peers[first:] + options.peers[:first]:
                    found["peers"].append(run_peer(peer, table, rows, model, place / "peer"))
                    write()
                    print(f"{rows:,} rows, {peer}: {found['peers'][-1]['rows_per_second']:,} rows/s", file=sys.stderr)
        if options.kills:
            table = reviews.write_table(place / "killed.csv", texts, "yelp", options.kill_rows)
            found["kills"] = kills(table, model, place / "kills", options.kills, options.seed)
    write()
    print(table_of(found))


if __name__ == "__main__":
    main()
