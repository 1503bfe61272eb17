"""`afina predict` beside `transformers.pipeline` at its best batch size: rows a second, memory; and killed and resumed.

Both read the same CSV of short real texts (repeated as often as needed) and write label and probabilities of every row. Each run is a
process of its own, in turn, and the clock covers the whole command; `predicting` leaves out start, loading and, for afina, examining and
merging. The pipeline reads from a generator, so that its memory does not grow either; its batch size is the fastest of several on a
sample. Their scores are compared. Then afina alone predicts growing numbers of rows, and the largest once more while it is killed
(SIGKILL) and resumed.

    AFINA_TEST_DATA=FOLDER python tests/bench/predict.py [--rows 10000 100000 1000000] [--sample 20000] [--json found.json]

Not covered: GPUs, several processes, long texts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reviews  # type: ignore[import-not-found]
from measuring import AFINA, Measured, environment_of, measured, ranged  # type: ignore[import-not-found]

__all__ = ["main"]

PIPELINE = """
import csv, sys, time
import transformers
from transformers import pipeline
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
model, data, out, size, limit = sys.argv[1:4] + [int(sys.argv[4]), int(sys.argv[5])]
classify = pipeline("text-classification", model=model, top_k=None, truncation=True, max_length=limit, batch_size=size)
names = [classify.model.config.id2label[i] for i in range(classify.model.config.num_labels)]
began = time.perf_counter()
with open(data, newline="") as file, open(out, "w", newline="") as to:
    write = csv.writer(to).writerow
    write(["prediction", *names])
    for answer in classify(row["text"] for row in csv.DictReader(file)):
        scores = {one["label"]: one["score"] for one in answer}
        write([answer[0]["label"], *(scores[name] for name in names)])
print(time.perf_counter() - began)
"""
MAX_LENGTH = 256


def classifier(model: Path, folder: Path) -> Path:
    """The pretrained encoder with a random head for five labels: only its speed matters."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    names = {i: f"{i + 1} stars" for i in range(5)}
    head = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=5, id2label=names, label2id={name: i for i, name in names.items()}, dtype=torch.float32
    )
    head.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = min(MAX_LENGTH, tokenizer.model_max_length)
    tokenizer.save_pretrained(folder)
    return folder


class Work:
    """Model, texts and folder, and the command of each peer."""

    def __init__(self, model: Path, texts: list[reviews.Review], folder: Path, options: Sequence[str]) -> None:
        self.folder, self.texts, self.options = folder, texts, options
        self.model = classifier(model, folder / "model")
        self.limit = json.loads((self.model / "tokenizer_config.json").read_text())["model_max_length"]
        self.environment = environment_of(folder, len(os.sched_getaffinity(0)))

    def data(self, count: int) -> Path:
        path = self.folder / f"texts-{count}.csv"
        return path if path.exists() else reviews.write_table(path, self.texts, "short", count)

    def pipeline(self, count: int, batch_size: int) -> dict[str, Any]:
        argv = [sys.executable, "-c", PIPELINE, str(self.model), str(self.data(count))]
        argv += [str(self.folder / "pipeline.csv"), str(batch_size), str(self.limit)]
        done = measured(argv, self.environment)
        return _record("pipeline", count, done, float(done.out.splitlines()[-1]))

    def command(self, count: int, out: Path) -> list[str]:
        words = ["predict", str(self.model), str(self.data(count)), "-o", str(out), "--num-processes", "1", "--json"]
        return [*AFINA, *words, *self.options]

    def afina(self, count: int, out: Path) -> dict[str, Any]:
        out.unlink(missing_ok=True)
        done = measured(self.command(count, out), self.environment)
        answer = json.loads(done.out.splitlines()[-1])
        assert answer["rows"] == count
        return _record("afina", count, done, answer["seconds_predicting"])


def _record(peer: str, count: int, done: Measured, predicting: float) -> dict[str, Any]:
    print(f"{peer}: {count:,} rows in {done.seconds:.1f} s, {done.memory / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return {
        "rows": count,
        "rows/s": count / done.seconds,
        "rows/s predicting": count / predicting,
        "memory MB": done.memory / 1e6,
    }


def measure(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """All figures; the largest of `options.rows` is killed and resumed too."""
    sizes = options.batch_sizes
    speeds = {size: work.pipeline(options.tried, size)["rows/s predicting"] for size in sizes if len(sizes) > 1}
    best = max(speeds, key=lambda size: speeds[size]) if speeds else sizes[0]
    found: dict[str, Any] = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    found |= {"batch_sizes": speeds, "batch_size": best, "peers": {"pipeline": [], "afina": []}}
    sample = work.folder / f"out-{options.sample}.parquet"
    for number in range(options.rounds):
        for peer in ("pipeline", "afina") if number % 2 == 0 else ("afina", "pipeline"):
            record = work.pipeline(options.sample, best) if peer == "pipeline" else work.afina(options.sample, sample)
            found["peers"][peer].append(record)
    found["difference"] = _difference(work.folder / "pipeline.csv", sample)
    more = [count for count in sorted(options.rows) if count != options.sample]
    found["growing"] = [work.afina(count, work.folder / f"out-{count}.parquet") for count in more]
    largest = max(options.rows)
    found["killed"] = _killed(work, largest, work.folder / f"out-{largest}.parquet", options.kills)
    return found


def _killed(work: Work, count: int, whole: Path, kills: int) -> dict[str, Any]:
    """Predict again into another file, killed `kills` times; whether the two files are the same."""
    out = work.folder / "killed.parquet"
    parts = out.with_name(out.name + ".parts")
    after = []
    for _ in range(kills):
        before = len(list(parts.glob("part-*")))
        process = subprocess.Popen(work.command(count, out), env=work.environment, stdout=subprocess.DEVNULL)
        while len(list(parts.glob("part-*"))) < before + 2 and process.poll() is None:
            time.sleep(0.01)
        for pid in [process.pid, *_children(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        after.append(len(list(parts.glob("part-*"))))
    last = json.loads(measured(work.command(count, out), work.environment).out.splitlines()[-1])
    return {
        "rows": count,
        "parts_after_each_kill": after,
        "rows_done_before": last["rows_done_before"],
        "identical": whole.read_bytes() == out.read_bytes(),
    }


def _children(pid: int) -> list[int]:
    """Of a process; workers run in sessions of their own."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(stat.parent.name))
    return children


def _difference(theirs: Path, ours: Path) -> dict[str, Any]:
    """The largest difference of a score, and how many labels differ."""
    import numpy as np
    import pyarrow.csv
    import pyarrow.parquet

    one, two = pyarrow.csv.read_csv(theirs), pyarrow.parquet.read_table(ours)
    names = [name for name in one.column_names if name != "prediction"]
    apart = max(float(np.abs(one[name].to_numpy() - two[f"score: {name}"].to_numpy()).max()) for name in names)
    labels = (table["prediction"].to_pylist() for table in (one, two))
    other = sum(a != b for a, b in zip(*labels, strict=True))
    return {"rows": len(one), "largest_of_a_score": apart, "other_label": other}


def table(found: dict[str, Any]) -> str:
    figures = ("rows/s", "rows/s predicting", "memory MB")
    lines = [f"| peer | rows | {' | '.join(figures)} |", "|---" * 5 + "|"]
    groups = [(f"pipeline, batch size {found['batch_size']}", found["peers"]["pipeline"]), ("afina", found["peers"]["afina"])]  # fmt: skip
    for peer, records in [*groups, *(("afina", [one]) for one in found["growing"])]:
        cells = [ranged([record[name] for record in records], ",.0f") for name in figures]
        lines.append(f"| {peer} | {records[0]['rows']:,} | {' | '.join(cells)} |")
    killed, difference = found["killed"], found["difference"]
    lines += [
        "",
        f"killed at {killed['parts_after_each_kill']} parts, resumed at {killed['rows_done_before']:,} of {killed['rows']:,} rows: "
        f"{'the same file' if killed['identical'] else 'ANOTHER FILE'}",
        f"scores differ from the pipeline's by {difference['largest_of_a_score']:.1e} at most, "
        f"{difference['other_label']} of {difference['rows']:,} labels differ",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="for afina alone")
    parser.add_argument("--sample", type=int, default=20_000, help="rows that both peers predict")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--tried", type=int, default=2_000, help="rows for each batch size of the pipeline")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and synthetic texts: is it right, not how fast"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("options", nargs="*", help="after --: options of `afina predict`")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="afina-bench-predict-") as name:
        model = reviews.model_for("tiny" if options.quick else "minilm", Path(name))
        work = Work(model, reviews.read_reviews(quick=options.quick), Path(name), options.options)
        found = measure(work, options)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
