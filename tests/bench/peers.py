"""afina beside its peers: the same texts, model and recipe, in turn, several rounds.

    tutorial        the tutorial's script (tutorial.py): pads to 512
    trainer         Trainer with its best options (tutorial.py --best)
    native          a PyTorch loop with accelerate (native.py), on data that afina prepared
    keras           Keras on the torch backend with keras-hub (keras_loop.py); one process; if it is installed
    afina           `afina train` with its defaults
    afina-fp32      with train.precision: fp32
    afina-tutorial  the tutorial's batches, dropout and precision: the losses of every step are compared with the tutorial's
    afina-graphs    with train.cuda_graphs: true; on a GPU

    AFINA_TEST_DATA=FOLDER python tests/bench/peers.py --out FOLDER [--rows 1000] [--epochs 1] [--rounds 3]
    ... --peers tutorial afina --models minilm --lengths yelp --processes 1 2
    ... --peers tutorial afina --epochs 3 --rounds 5 --vary-seed --pad-to-batch     accuracy and macro-F1 over five seeds
    ... --quick                  tiny texts and a tiny model: does it work, not how fast

Each run gives seconds of training (without evaluations), with evaluations (without saves: the peers save nothing), and of the whole command; evaluated rows
per second; memory (of its processes together, on a GPU what torch allocated); and MFU: the model's floating-point operations for real tokens
(afina.worker.compute.flops) over the seconds of training and the best torch.mm of the same cores, in the precision of the peer. Speeds are
relative to the tutorial in the same round, so that other load meets both; shown are medians and ranges over the rounds. Every finished
run is a line of OUT/cells.jsonl, from which the same command continues; OUT/peers.json holds the summary.

On a GPU, and on a CPU with instructions for it, all but the tutorial, afina-tutorial and afina-fp32 train in bfloat16. Not covered: more
than one machine, more than one GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reviews  # type: ignore[import-not-found]
from measuring import AFINA, environment_of, measured, ranged, spread  # type: ignore[import-not-found]

HERE = Path(__file__).resolve().parent
#: What each peer of afina sets in the recipe.
SETTINGS: dict[str, tuple[str, ...]] = {
    "afina": (),
    "afina-fp32": ("train.precision=fp32",),
    "afina-tutorial": (
        *("train.precision=fp32", "train.fast_dropout=false", "train.log_every=1"),
        *("tokens.batching=padded", "train.save_every=1000000", "train.save_minutes=null"),
    ),
    "afina-graphs": ("train.cuda_graphs=true",),
}
PEERS = ("tutorial", "trainer", "native", "keras", *SETTINGS)
IN_FLOAT32 = ("tutorial", "afina-fp32", "afina-tutorial")
SEED = 42


def recipe_of(folder: Path, model: Path, lengths: str, options: argparse.Namespace) -> Path:
    """The tutorial's recipe with afina's defaults, on all rows of the files in their order."""
    recipe = {
        "name": f"bench-{lengths}",
        "baselines": False,  # its peers train none
        "model": str(model),
        "task": "single-label",
        "data": {
            "files": {part: str(folder / f"{lengths}-{part}.csv") for part in ("train", "eval")},
            "text": "text",
            "label": "stars",
        },
        "tokens": {"max_length": 64 if options.quick else 512},
        "train": {
            "batch_size": options.batch_size,
            "epochs": options.epochs,
            "learning_rate": 5e-5,
            "seed": SEED,
            "keep": "last",
        },
        "metrics": ["accuracy", "f1"],
    }
    path = folder / f"{model.name}-{lengths}-{options.epochs}-{options.batch_size}.yaml"
    path.write_text(json.dumps(recipe))
    return path


@functools.cache
def prepared_of(folder: Path, recipe: Path, threads: int) -> Path:
    """The prepared data of a recipe, prepared if it is not there yet."""
    out = measured([*AFINA, "prefetch", str(recipe), "--json"], environment_of(folder, threads)).out
    return Path(json.loads(out[out.index("{") :])["prepared"])


def log_of(options: argparse.Namespace, cell: dict[str, Any]) -> Path:
    """The loss of every step: a file of the tutorial, or in a run directory of afina."""
    name = "-".join(str(cell[key]) for key in ("peer", "model", "lengths", "processes", "round", "seed"))
    path = options.out / "runs" / name
    return path / "metrics.jsonl" if cell["peer"] in SETTINGS else path.with_suffix(".jsonl")


def _argv(options: argparse.Namespace, cell: dict[str, Any], half: bool) -> list[str]:
    """The peer's command; `half`: it computes in bfloat16."""
    peer, lengths, processes, folder = cell["peer"], cell["lengths"], cell["processes"], options.out
    model = reviews.model_for(cell["model"], folder)
    log = log_of(options, cell)
    (folder / "runs").mkdir(exist_ok=True)
    recipe = recipe_of(folder, model, lengths, options)
    if peer in SETTINGS:
        settings = [word for setting in (*SETTINGS[peer], f"train.seed={cell['seed']}") for word in ("--set", setting)]
        shutil.rmtree(log.parent, ignore_errors=True)  # of a bench that was interrupted
        number = ["--num-processes", str(processes)] if processes > 1 else []
        return [*AFINA, "train", str(recipe), "--run", str(log.parent), *settings, *number]
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    common = [
        "--model",
        str(model),
        "--epochs",
        str(options.epochs),
        "--batch-size",
        str(options.batch_size // processes),
    ]
    common += ["--seed", str(cell["seed"]), *(["--bf16"] if half else [])]
    if peer in ("native", "keras"):
        script = {"native": "native.py", "keras": "keras_loop.py"}[peer]
        prepared = prepared_of(folder, recipe, options.threads)
        return [*launch, str(HERE / script), "--prepared", str(prepared), *common]
    argv = [*launch, str(HERE / "tutorial.py"), "--out", str(log), "--sample", "0", *common]
    argv += [word for part in ("train", "eval") for word in (f"--{part}", str(folder / f"{lengths}-{part}.csv"))]
    argv += ["--max-length", "64" if options.quick else "512"]
    return [*argv, *(["--best"] if peer == "trainer" else ["--pad-to-batch"] if options.pad_to_batch else [])]


def run_cell(options: argparse.Namespace, cell: dict[str, Any], peaks: dict[str, Any]) -> dict[str, Any]:
    """Run one peer once; its figures."""
    half = peaks["half"] and cell["peer"] not in IN_FLOAT32
    argv, load = _argv(options, cell, half), os.getloadavg()[0]
    done = measured(argv, environment_of(options.out, max(1, options.threads // cell["processes"])))
    figures: dict[str, Any] = {}
    if cell["peer"] in SETTINGS:
        outcome = json.loads(log_of(options, cell).with_name("outcome.json").read_text())
        parts = outcome["utilisation"]["seconds_by_part"]
        training = sum(parts[name] for name in ("input", "forward_backward", "optimizer", "other"))
        evaluating, seconds = parts["evaluation"], training + parts["evaluation"]
        steps, gpu = outcome["global_step"], outcome["device"] == "cuda"
        metrics = {name: outcome["metrics"][f"eval_{name}"] for name in ("accuracy", "f1")}
        memory = outcome["utilisation"]["peak_memory_gb"] if gpu else done.memory / 1e9
        figures["utilisation"] = outcome["utilisation"]
    else:
        last = json.loads(next(line for line in reversed(done.out.splitlines()) if line.startswith("{")))
        evaluating, seconds, steps = last["evaluation_seconds"], last["seconds"], last["steps"]
        training = seconds - evaluating
        metrics = {name: last[name] for name in ("accuracy", "f1") if name in last}
        memory = (last.get("gpu_bytes") or done.memory) / 1e9
    work, peak = _work(options, cell), peaks["bfloat16" if half else "float32"]
    return {
        **cell,
        **figures,
        **metrics,
        "steps": steps,
        "training_seconds": training,
        "seconds": seconds,
        "wall_seconds": done.seconds,
        "memory_gb": round(memory, 3),
        "tokens_per_second": work["tokens"] * options.epochs / training,
        "evaluated_per_second": options.rows * options.epochs / evaluating,
        "mfu": 3 * work["flops"] * options.epochs / training / peak,
        "peak_flops": peak,
        "load_before": load,
    }


def _work(options: argparse.Namespace, cell: dict[str, Any]) -> dict[str, float]:
    """Real tokens and forward floating-point operations of an epoch."""
    import numpy as np
    from transformers import AutoConfig

    from afina.worker.compute.flops import forward_flops

    model = reviews.model_for(cell["model"], options.out)
    recipe = recipe_of(options.out, model, cell["lengths"], options)
    lengths = np.diff(np.load(prepared_of(options.out, recipe, options.threads) / "train.offsets.npy"))
    config = AutoConfig.from_pretrained(model, num_labels=5)
    return {"tokens": int(lengths.sum()), "flops": float(forward_flops(config, lengths).sum())}


def peaks_now(threads: int) -> dict[str, Any]:
    """FLOP/s of the best torch.mm by dtype; `half`: afina chooses bf16 here."""
    import torch

    from afina.recipe.keys.train_keys import Train
    from afina.worker.compute import precision, products
    from afina.worker.compute.flops import device_peak

    torch.set_num_threads(threads)
    products.use_onednn()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = precision.choose(Train(), precision.current_device()).precision == "bf16"
    kinds = ("float32", "bfloat16") if half else ("float32",)
    return {"half": half, **{kind: device_peak(device, kind).flops for kind in kinds}}


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model, lengths, processes and peer: figures of all rounds, speeds relative to the tutorial in one process."""
    rows = []
    for model, lengths, processes in sorted({(c["model"], c["lengths"], c["processes"]) for c in cells}, key=str):
        same = [c for c in cells if (c["model"], c["lengths"]) == (model, lengths)]
        base = {c["round"]: c for c in same if c["peer"] == "tutorial" and c["processes"] == 1}
        for peer in PEERS:
            mine = [c for c in same if c["peer"] == peer and c["processes"] == processes]
            if not mine:
                continue
            row: dict[str, Any] = {"model": model, "lengths": lengths, "processes": processes, "peer": peer}
            for key in ("training_seconds", "seconds", "wall_seconds"):
                row[f"speed_{key}"] = [base[c["round"]][key] / c[key] for c in mine if c["round"] in base]
            for key in (
                *("training_seconds", "seconds", "wall_seconds", "memory_gb", "mfu", "tokens_per_second"),
                *("evaluated_per_second", "accuracy", "f1"),
            ):
                row[key] = [c[key] for c in mine if key in c]
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("model, texts, processes", "peer", "times the tutorial: training", "with evaluation", "whole command")
    heads += ("MFU", "tokens/s", "evaluated rows/s", "GB", "accuracy")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        speeds = [ranged(s) if (s := row[f"speed_{key}"]) else "–" for key in ("training_seconds", "seconds")]
        speeds.append(ranged(row["speed_wall_seconds"]) if row["speed_wall_seconds"] else "–")
        cells = [f"{row['model']}, {row['lengths']}, {row['processes']}", row["peer"], *speeds]
        cells += [format(spread(row["mfu"])[0], ".1%"), format(spread(row["tokens_per_second"])[0], ",.0f")]
        cells += [format(spread(row[key])[0], form) for key, form in (("evaluated_per_second", ",.1f"), ("memory_gb", ".2f"))]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} | {spread(row['accuracy'])[0]:.3f} |")
    return "\n".join(lines)


def table_of_scores(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds with 95 % intervals (Student's t), and of the differences from the tutorial within a seed."""
    from afina.statistics.intervals import mean_interval

    def shown(values: list[float], form: str) -> str:
        interval = mean_interval(values)
        half = "" if interval.high is None else f" ± {interval.high - interval.mean:.4f}"
        return format(interval.mean, form) + half

    lines = ["| model, texts | score | peer | mean | − tutorial |", "|---|---|---|---|---|"]
    for row in rows:
        for score in ("accuracy", "f1"):
            base = next((r[score] for r in rows if (r["model"], r["lengths"], r["peer"]) == (row["model"], row["lengths"], "tutorial")), [])  # fmt: skip
            apart = [b - a for a, b in zip(base, row[score], strict=False)] if row["peer"] != "tutorial" else []
            if row[score]:
                cells = f"{row['peer']} | {shown(row[score], '.4f')} | {shown(apart, '+.4f') if apart else '–'}"
                lines.append(f"| {row['model']}, {row['lengths']} | {score} | {cells} |")
    return "\n".join(lines)


def losses(options: argparse.Namespace, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest differences between the logs of `tutorial` and `afina-tutorial`, and how many lines were compared."""
    logs = {(c["peer"], c["model"], c["lengths"], c["round"], c["seed"]): log_of(options, c) for c in cells}
    found: dict[str, Any] = {}
    for (peer, *about), log in logs.items():
        other = logs.get(("tutorial", *about))
        if peer != "afina-tutorial" or other is None:
            continue
        theirs, ours = ([json.loads(line) for line in path.read_text().splitlines()] for path in (other, log))
        for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy"):
            pairs = list(zip((x[key] for x in theirs if key in x), (x[key] for x in ours if key in x), strict=True))
            before = found.get(key, {"lines": 0, "difference": 0.0})
            most = max(before["difference"], *(abs(a - b) for a, b in pairs))
            found[key] = {"lines": before["lines"] + len(pairs), "difference": most}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS[:6]))
    parser.add_argument("--models", nargs="+", choices=reviews.MODELS, default=["minilm"])
    parser.add_argument("--lengths", nargs="+", choices=reviews.LENGTHS, default=list(reviews.LENGTHS))
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1])
    parser.add_argument("--batch-size", type=int, default=8, help="of all processes together")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all processes together")
    parser.add_argument("--vary-seed", action="store_true", help="another seed in each round")
    parser.add_argument("--pad-to-batch", action="store_true", help="the tutorial pads to the longest text of a batch")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.rows, options.rounds = ["tiny"], min(options.rows, 64), 1
    if "keras" in options.peers and importlib.util.find_spec("keras_hub") is None:
        print("keras-hub is not installed: left out; see tests/bench/keras_loop.py", flush=True)
        options.peers.remove("keras")
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    for lengths in options.lengths:
        reviews.write_parts(options.out, lengths, options.rows, quick=options.quick)
    log = options.out / "cells.jsonl"
    cells = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for cell in _wanted(options):
        if any(cell.items() <= done.items() for done in cells):
            continue
        cells.append(run_cell(options, cell, _peaks(cell["round"], options.threads)))
        with log.open("a") as file:
            file.write(json.dumps(cells[-1]) + "\n")
        shown = ", ".join(f"{key} {cell[key]}" for key in ("round", "model", "lengths", "processes", "peer"))
        print(f"{shown}: {cells[-1]['training_seconds']:.1f} s of training", flush=True)
    same = (options.rows, options.epochs, options.batch_size)
    chosen = [c for c in cells if (c["rows"], c["epochs"], c["batch_size"]) == same]
    rows, apart = summarise(chosen), losses(options, chosen)
    machine = {"cores": os.cpu_count(), "threads": options.threads, "machine": platform.machine()}
    (options.out / "peers.json").write_text(json.dumps({**machine, "rows": rows, "losses": apart}, indent=1) + "\n")
    print(table(rows))
    if options.vary_seed:
        print(f"\n{table_of_scores(rows)}")
    for key, about in apart.items():
        print(f"{key}: afina-tutorial is within {about['difference']:.1e} of the tutorial in {about['lines']} lines")


@functools.cache
def _peaks(round_number: int, threads: int) -> dict[str, Any]:
    """Measured once a round."""
    return peaks_now(threads)


def _wanted(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs in their order; another peer begins each round."""
    cells = []
    for number in range(options.rounds):
        first = number % len(options.peers)
        for model in options.models:
            for lengths in options.lengths:
                for processes in options.processes:
                    for peer in options.peers[first:] + options.peers[:first]:
                        if peer == "keras" and (processes > 1 or model == "tiny"):
                            continue
                        about = {"round": number, "model": model, "lengths": lengths, "processes": processes}
                        seed = SEED + number * options.vary_seed
                        size = {
                            "rows": options.rows,
                            "epochs": options.epochs,
                            "batch_size": options.batch_size,
                            "seed": seed,
                        }
                        cells.append({**about, "peer": peer, **size})
    return cells


if __name__ == "__main__":
    main()
