"""Evaluation: rows per second of Trainer's `evaluate` and of afina's, with the same weights; and whether they agree.

    padded    Trainer, texts padded to 512, as the tutorial does
    dynamic   Trainer, padded to the longest of a batch, in the order of the rows
    afina     the evaluation of a run, by its own stopwatch: sorted, packed, logits in input order, metrics included

The weights are those of the run's `model/` after one step of training; afina's seconds are its one evaluation. In turn, several
rounds; medians and ranges. The largest difference of the probabilities between `padded` and afina's predictions is shown too.

    AFINA_TEST_DATA=FOLDER python tests/bench/evaluation.py [--rows 1000] [--rounds 3] [--lengths yelp short] [--json found.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import reviews  # type: ignore[import-not-found]
from peers import environment_of, recipe_of, spread  # type: ignore[import-not-found]

TRAINER = """
import json, sys, time
import numpy as np
from datasets import load_dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
model, table, padding, out, longest = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
rows = load_dataset("csv", data_files=table, split="train", keep_default_na=False)
names = sorted(set(map(str, rows["stars"])))
rows = rows.map(lambda r: {"labels": [names.index(str(s)) for s in r["stars"]], **tokenizer(
    r["text"], truncation=True, max_length=int(longest), padding="max_length" if padding == "padded" else False)}, batched=True)
def scores(output):
    said = output[0].argmax(-1)
    return {"accuracy": accuracy_score(output[1], said), "f1": f1_score(output[1], said, average="macro")}
arguments = TrainingArguments(output_dir=out + ".trainer", per_device_eval_batch_size=32, report_to="none", use_cpu=True, disable_tqdm=True)
trainer = Trainer(model=AutoModelForSequenceClassification.from_pretrained(model, dtype="float32"), args=arguments,
                  data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=scores)
began = time.perf_counter()
output = trainer.predict(rows)
seconds = time.perf_counter() - began
shifted = np.exp(output.predictions - output.predictions.max(-1, keepdims=True))
np.save(out, shifted / shifted.sum(-1, keepdims=True))
print(json.dumps({"seconds": seconds, "rows": len(rows)}))
"""


def measure(folder: Path, lengths: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rows per second of each, and how far apart their probabilities are."""
    import pyarrow.parquet as pq

    environment = environment_of(folder, options.threads)
    _, table = reviews.write_parts(folder, lengths, options.rows, quick=options.quick)
    model = reviews.model_for("tiny" if options.quick else "minilm", folder)
    recipe = recipe_of(folder, model, lengths, 1, options.quick)
    rates: dict[str, list[float]] = {"padded": [], "dynamic": [], "afina": []}
    apart = 0.0
    for number in range(options.rounds):
        run = folder / f"{lengths}-{number}"
        argv = [sys.executable, "-m", "afina.cli", "train", str(recipe), "--run", str(run)]
        # `epochs` and `max_steps` exclude each other.
        argv += ["--set", "train.epochs=null", "--set", "train.max_steps=1"]
        subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL)
        outcome = json.loads((run / "outcome.json").read_text())
        rates["afina"].append(options.rows / outcome["utilisation"]["seconds_by_part"]["evaluation"])
        for kind in ("padded", "dynamic"):
            out = folder / f"{kind}.npy"
            argv = [sys.executable, "-c", TRAINER, str(run / "model"), str(table), kind, str(out)]
            argv += ["64" if options.quick else "512"]
            said = subprocess.run(argv, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(said.splitlines()[-1])
            rates[kind].append(found["rows"] / found["seconds"])
        predicted = pq.read_table(run / "predictions.parquet")
        scores = [name for name in predicted.column_names if name.startswith("score: ")]
        ours = np.stack([predicted[name].to_numpy() for name in scores], -1)
        apart = max(apart, float(np.abs(ours - np.load(folder / "padded.npy")).max()))
    return {**{kind: spread(values) for kind, values in rates.items()}, "largest_difference": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=reviews.LENGTHS, default=list(reviews.LENGTHS))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for lengths in options.lengths:
            began = time.perf_counter()
            found[lengths] = measure(Path(name), lengths, options)
            for kind in ("padded", "dynamic", "afina"):
                middle, low, high = found[lengths][kind]
                print(f"{lengths}, {kind}: {middle:.1f} rows/s [{low:.1f}–{high:.1f}]")
            apart = found[lengths]["largest_difference"]
            print(
                f"{lengths}: probabilities differ by {apart:.1e} at most; {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
