"""afina beside its peers: whole epochs of the same texts with the same model and the same recipe, in turn, several rounds.

    tutorial   the tutorial's script (tests/bench/tutorial.py): pads to 512
    trainer    Trainer with its best options (--best of the same script)
    native     PyTorch and accelerate, a loop of one's own (tests/bench/native.py), on data that afina prepared
    keras      Keras on the torch backend with keras-hub (tests/bench/keras_loop.py); one process; where it is installed
    afina      `afina train` with its defaults
    afina-fp32 with train.precision: fp32, which the default is not where the device has units for bfloat16
    afina-plain with train.cuda_graphs: false; on a GPU

    AFINA_TEST_DATA=FOLDER python tests/bench/peers.py --out FOLDER [--rows 1000] [--epochs 1] [--rounds 3]
    ... --peers tutorial afina --models minilm --lengths yelp --processes 1 2
    ... --quick                  tiny texts and a tiny model: that it works, not how fast it is

Of each run: seconds of training alone (evaluations left out), with evaluations, and of the whole command, start-up, reading
and tokenising included; the most memory of its processes together (proportional set size, looked at twice a second, or
seldom enough to take 2 % of a core); and the
useful share of the machine's peak: the model's floating-point operations for real tokens (afina.worker.compute.flops) over the seconds
of training alone and the best torch.mm of the same cores in the numbers that the peer computes in, measured in the same round. A speed is formed within a round, against
the tutorial where it takes part, so that load from elsewhere meets both sides; shown are medians and ranges over the rounds.
Every finished run is a line of OUT/cells.jsonl: the same command goes on where it was interrupted. OUT/peers.json and
OUT/peers.png (with matplotlib) hold the summary.

On a GPU, and on a CPU with instructions for it, all but the tutorial and afina-fp32 train in bfloat16. Where there is a GPU all of them train
on it; memory is the GPU's then, what torch allocated. Not covered: more than one machine, more than one GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reviews  # type: ignore[import-not-found]

HERE = Path(__file__).parent
PEERS = ("tutorial", "trainer", "native", "keras", "afina", "afina-fp32", "afina-plain")
IN_FLOAT32 = ("tutorial", "afina-fp32")

#: What a peer of afina's own sets beside the recipe.
SETTINGS = {"afina-fp32": ["--set", "train.precision=fp32"], "afina-plain": ["--set", "train.cuda_graphs=false"]}


def recipe_of(folder: Path, model: Path, lengths: str, epochs: float, quick: bool) -> Path:
    recipe = {
        "name": f"bench-{lengths}",
        "model": str(model),
        "task": "single-label",
        "data": {
            "files": {part: str(folder / f"{lengths}-{part}.csv") for part in ("train", "eval")},
            "text": "text",
            "label": "stars",
        },
        "tokens": {"max_length": 64 if quick else 512},
        "train": {"batch_size": 8, "epochs": epochs, "learning_rate": 5e-5, "seed": 42, "keep": "last"},
        "metrics": ["accuracy", "f1"],
    }
    path = folder / f"{model.name}-{lengths}-{epochs:g}.yaml"
    path.write_text(json.dumps(recipe))
    return path


def environment_of(folder: Path, threads: int) -> dict[str, str]:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return {
        **os.environ,
        "AFINA_SCRATCH": str(scratch),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
    }


@functools.cache
def prepared_of(folder: Path, recipe: Path, threads: int) -> Path:
    """The prepared data of a recipe, made where it is not there yet."""
    argv = [sys.executable, "-m", "afina.cli", "prefetch", str(recipe), "--json"]
    done = subprocess.run(argv, env=environment_of(folder, threads), check=True, stdout=subprocess.PIPE, text=True)
    return Path(json.loads(done.stdout[done.stdout.index("{") :])["prepared"])


def _argv(peer: str, options: argparse.Namespace, cell: dict[str, Any], number: int, half: bool) -> list[str]:
    """The peer's command; `half`: it computes in bfloat16."""
    folder, lengths, processes = options.out, cell["lengths"], cell["processes"]
    model = reviews.model_for(cell["model"], folder)
    size, epochs = 8 // processes, f"{options.epochs:g}"
    launch, in_half = [sys.executable], ["--bf16"] if half else []
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    data = ["--train", str(folder / f"{lengths}-train.csv"), "--eval", str(folder / f"{lengths}-eval.csv")]
    if peer in ("tutorial", "trainer"):
        out = folder / f"{peer}.jsonl"
        argv = [*launch, str(HERE / "tutorial.py"), *data, "--model", str(model), "--out", str(out)]
        argv += ["--batch-size", str(size), "--epochs", epochs, "--sample", str(options.rows)]
        return [
            *argv,
            "--max-length",
            "64" if options.quick else "512",
            *(["--best"] if peer == "trainer" else []),
            *in_half,
        ]
    recipe = recipe_of(folder, model, lengths, options.epochs, options.quick)
    if peer.startswith("afina"):
        run = folder / "runs" / f"{cell['model']}-{lengths}-{processes}-{cell['round']}-{number}"
        run.parent.mkdir(exist_ok=True)
        argv = [sys.executable, "-m", "afina.cli", "train", str(recipe), "--run", str(run)]
        argv += SETTINGS.get(peer, [])
        return [*argv, *(["--num-processes", str(processes)] if processes > 1 else [])]
    script = {"native": "native.py", "keras": "keras_loop.py"}[peer]
    prepared = prepared_of(folder, recipe, options.threads)
    argv = [*launch, str(HERE / script), "--prepared", str(prepared), "--model", str(model)]
    return [*argv, "--epochs", str(max(1, round(options.epochs))), "--batch-size", str(size), *in_half]


def measured(argv: Sequence[str], environment: dict[str, str]) -> tuple[str, float, float]:
    """Run a command: its standard output, wall seconds, and the most memory of all its processes together, in GB."""
    began, most, over = time.perf_counter(), [0], threading.Event()
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            pause = 0.5
            while not over.wait(pause):
                looked = time.perf_counter()
                most[0] = max(most[0], _bytes_below(process.pid))
                # Walking through the pages of gigabytes takes a tenth of a second of a core that others train on.
                pause = max(0.5, 50 * (time.perf_counter() - looked))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        said, complained = process.communicate()
        over.set()
        thread.join()
    if process.returncode:
        raise SystemExit(f"error: {' '.join(argv)}\n{said[-2000:]}\n{complained[-4000:]}")
    return said, time.perf_counter() - began, most[0] / 1e9


def _bytes_below(root: int) -> int:
    """Proportional set size of a process and all its descendants (proc(5))."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    wanted, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in wanted} - wanted
        wanted |= more
        grown = bool(more)
    total = 0
    for pid in wanted:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def run_cell(options: argparse.Namespace, cell: dict[str, Any], number: int, peaks: dict[str, Any]) -> dict[str, Any]:
    """Run one peer once; what was found."""
    half = peaks["half"] and cell["peer"] not in IN_FLOAT32
    peak = peaks["bfloat16" if half else "float32"]
    argv = _argv(cell["peer"], options, cell, number, half)
    if cell["peer"].startswith("afina"):
        shutil.rmtree(argv[argv.index("--run") + 1], ignore_errors=True)  # of a bench that was interrupted
    threads = max(1, options.threads // cell["processes"])
    load = os.getloadavg()[0]
    said, wall, memory = measured(argv, environment_of(options.out, threads))
    if cell["peer"].startswith("afina"):
        outcome = json.loads((Path(argv[argv.index("--run") + 1]) / "outcome.json").read_text())
        parts = outcome["utilisation"]["seconds_by_part"]
        training = sum(parts[name] for name in ("input", "forward_backward", "optimizer", "other"))
        found = {
            "training_seconds": training,
            "seconds": training + parts["evaluation"] + parts["saving"],
            "steps": outcome["global_step"],
            "accuracy": outcome["metrics"]["eval_accuracy"],
            "said_by_itself": outcome["utilisation"],
        }
        if outcome["device"] == "cuda":
            memory = outcome["utilisation"]["peak_memory_gb"]
    else:
        last = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))
        found = {
            "training_seconds": last["seconds"] - last["evaluation_seconds"],
            "seconds": last["seconds"],
            "steps": last["steps"],
            "accuracy": last["accuracy"],
        }
        memory = last.get("gpu_bytes", 0) / 1e9 or memory
    work = _work(options, cell)
    examples = options.rows * options.epochs
    return {
        **cell,
        **found,
        "wall_seconds": wall,
        "memory_gb": round(memory, 3),
        "examples_per_second": examples / found["training_seconds"],
        "tokens_per_second": work["tokens"] * options.epochs / found["training_seconds"],
        "mfu": 3 * work["flops"] * options.epochs / found["training_seconds"] / peak,
        "peak_flops": peak,
        "load_before": load,
    }


def _work(options: argparse.Namespace, cell: dict[str, Any]) -> dict[str, float]:
    """Real tokens and forward floating-point operations of an epoch."""
    import numpy as np
    from transformers import AutoConfig

    from afina.worker.compute.flops import forward_flops

    model = reviews.model_for(cell["model"], options.out)
    recipe = recipe_of(options.out, model, cell["lengths"], options.epochs, options.quick)
    lengths = np.diff(np.load(prepared_of(options.out, recipe, options.threads) / "train.offsets.npy"))
    config = AutoConfig.from_pretrained(model, num_labels=5)
    return {"tokens": int(lengths.sum()), "flops": float(forward_flops(config, lengths).sum())}


def peaks_now(threads: int) -> dict[str, Any]:
    """The best torch.mm of so many threads, in a process of its own, in FLOP/s by dtype; `half`: afina chooses bf16 here."""
    code = """
import json, torch
from afina.recipe.schema import Train
from afina.worker.compute import precision
from afina.worker.compute.flops import device_peak
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
found = {"half": precision.choose(Train(), precision.current_device()).precision == "bf16"}
for numbers in ("float32", *(["bfloat16"] if found["half"] else [])):
    found[numbers] = device_peak(device, numbers).flops
print(json.dumps(found))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model, lengths, processes and peer: medians and ranges over the rounds, speed against the tutorial's one process."""
    found = []
    keys = sorted({(c["model"], c["lengths"], c["processes"]) for c in cells}, key=str)
    for model, lengths, processes in keys:
        same = [c for c in cells if (c["model"], c["lengths"]) == (model, lengths)]
        base = {c["round"]: c for c in same if c["peer"] == "tutorial" and c["processes"] == 1}
        for peer in PEERS:
            mine = [c for c in same if c["peer"] == peer and c["processes"] == processes]
            if not mine:
                continue
            row: dict[str, Any] = {"model": model, "lengths": lengths, "processes": processes, "peer": peer}
            for key in ("training_seconds", "seconds", "wall_seconds"):
                pairs = [base[c["round"]][key] / c[key] for c in mine if c["round"] in base]
                row[f"speed_{key}"] = spread(pairs) if pairs else None
            for key in (
                "training_seconds",
                "seconds",
                "wall_seconds",
                "memory_gb",
                "mfu",
                "tokens_per_second",
                "accuracy",
            ):
                row[key] = spread([c[key] for c in mine])
            row["rounds"] = len(mine)
            found.append(row)
    return found


def spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [statistics.median(values), min(values), max(values)]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model, texts, processes | peer | times the tutorial: training | with evaluation | whole command | MFU | tokens/s | GB | accuracy |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        speeds = [
            "–" if (s := row[f"speed_{key}"]) is None else f"{s[0]:.2f} [{s[1]:.2f}–{s[2]:.2f}]"
            for key in ("training_seconds", "seconds", "wall_seconds")
        ]
        lines.append(
            f"| {row['model']}, {row['lengths']}, {row['processes']} | {row['peer']} | {' | '.join(speeds)} | {row['mfu'][0]:.1%} "
            f"| {row['tokens_per_second'][0]:,.0f} | {row['memory_gb'][0]:.2f} | {row['accuracy'][0]:.3f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed of training against the tutorial, one panel for each model and kind of text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [row for row in rows if row["speed_training_seconds"]]
    panels = sorted({(row["model"], row["lengths"]) for row in drawn})
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, (model, lengths) in zip(axes[0], panels, strict=True):
        some = [row for row in drawn if (row["model"], row["lengths"]) == (model, lengths)][::-1]
        names = [f"{row['peer']}, {row['processes']}" for row in some]
        speeds = [row["speed_training_seconds"] for row in some]
        errors = [[s[0] - s[1] for s in speeds], [s[2] - s[0] for s in speeds]]
        axis.barh(
            names,
            [s[0] for s in speeds],
            xerr=errors,
            color=["#2a6f97" if n.startswith("afina") else "#b0b7bd" for n in names],
        )
        for name, speed, row in zip(names, speeds, some, strict=True):
            axis.text(speed[2], name, f"  {speed[0]:.1f} ×, MFU {row['mfu'][0]:.0%}", va="center", fontsize=8)
        axis.set_xlim(0, max(s[2] for s in speeds) * 1.5)
        axis.set_title(f"{model}, {lengths} texts", fontsize=10)
        axis.set_xlabel("times the tutorial's speed (peer, processes)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[peer for peer in PEERS if peer != "afina-plain"])
    parser.add_argument("--models", nargs="+", choices=reviews.MODELS, default=["minilm"])
    parser.add_argument("--lengths", nargs="+", choices=reviews.LENGTHS, default=list(reviews.LENGTHS))
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all processes together")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
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
    names = ("round", "model", "lengths", "processes", "peer", "rows", "epochs")
    done = {tuple(cell[name] for name in names) for cell in cells}
    for number in range(options.rounds):
        peaks = None
        for model in options.models:
            for lengths in options.lengths:
                turn = options.peers[number % len(options.peers) :] + options.peers[: number % len(options.peers)]
                for processes in options.processes:
                    for peer in turn:
                        about = (number, model, lengths, processes, peer, options.rows, options.epochs)
                        if about in done or (peer == "keras" and (processes > 1 or model == "tiny")):
                            continue
                        peaks = peaks or peaks_now(options.threads)
                        cell = run_cell(options, dict(zip(names, about, strict=True)), len(cells), peaks)
                        cells.append(cell)
                        with log.open("a") as file:
                            file.write(json.dumps(cell) + "\n")
                        print(
                            f"round {number + 1}, {model}, {lengths}, {processes} process(es), {peer}: "
                            f"{cell['training_seconds']:.1f} s of training, {cell['wall_seconds']:.1f} s in all",
                            flush=True,
                        )
    chosen = [c for c in cells if (c["rows"], c["epochs"]) == (options.rows, options.epochs)]
    rows = summarise(chosen)
    machine = {"cores": os.cpu_count(), "threads": options.threads, "machine": platform.machine()}
    (options.out / "peers.json").write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        plot(rows, options.out / "peers.png")
    print(table(rows))


if __name__ == "__main__":
    main()
