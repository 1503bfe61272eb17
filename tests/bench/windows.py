"""Long texts: truncation, head+tail and windows of 32 tokens, and 128 tokens at once: accuracy, tokens trained and seconds.

    python tests/bench/windows.py --out FOLDER [--seeds 3] [--threads 1] [--ways head "windows, mean"]

Documents are four film snippets of one label (movie_snippets.csv in the folder AFINA_TEST_DATA), 600 to train on and 1,000 to measure on; MiniLM, three
epochs. The same command goes on with the runs that are missing. Prints a row as soon as a run has ended, then means and standard deviations over seeds, and the paired difference of each way from
the first: over the rows of eval, of the mean over seeds, with its normal 95 % interval.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from measuring import AFINA, environment_of, measured  # type: ignore[import-not-found]
from reviews import model_for, tiny  # type: ignore[import-not-found]

from afina.run.directory import RunDir
from afina.statistics.predictions import read_predictions

WAYS: dict[str, dict[str, Any]] = {
    "head": {"max_length": 32},
    "head+tail": {"max_length": 32, "truncation": "head+tail"},
    "windows, mean": {"max_length": 32, "windows": {"stride": 8}},
    "windows, max": {"max_length": 32, "windows": {"stride": 8, "pool": "max"}},
    "whole": {"max_length": 128},
}


def _write_documents(folder: Path) -> None:
    with (Path(os.environ["AFINA_TEST_DATA"]) / "movie_snippets.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    draw, documents = random.Random(1), []
    for label in sorted({row["stars"] for row in rows}):
        texts = [row["text"] for row in rows if row["stars"] == label]
        draw.shuffle(texts)
        documents += [{"text": " ".join(texts[i : i + 4]), "stars": label} for i in range(0, len(texts) - 3, 4)]
    draw.shuffle(documents)
    tiny.write_csv(folder / "train.csv", documents[:600])
    tiny.write_csv(folder / "eval.csv", documents[600:1600])


def _write_recipe(folder: Path) -> Path:
    recipe = {
        "name": "long",
        "model": str(model_for("minilm", folder)),
        "data": {"files": {"train": "train.csv", "eval": "eval.csv"}, "text": "text", "label": "stars"},
        "train": {"batch_size": 16, "epochs": 3, "learning_rate": 1e-4, "evaluate": 10**4, "best_metric": "accuracy"},
        "metrics": ["accuracy", "f1"],
        "baselines": False,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    folder = options.out.absolute()
    environment = environment_of(folder, options.threads)
    _write_documents(folder)
    recipe, right, figures = _write_recipe(folder), {way: [] for way in options.ways}, {way: [] for way in options.ways}
    for seed in range(1, options.seeds + 1):
        for way in options.ways:
            run = RunDir(folder / f"run-{list(WAYS).index(way)}-{seed}")
            words = ["--set", f"tokens={json.dumps(WAYS[way])}", "--set", f"train.seed={seed}", "--num-processes", "1"]
            if run.outcome() is None:
                measured([*AFINA, "train", str(recipe), "--run", str(run.path), *words], environment)
            outcome, predictions = run.outcome(), read_predictions(run.predictions, texts=False)
            assert outcome is not None
            seconds = outcome.utilisation["seconds_by_part"]
            trained = seconds["forward_backward"] + seconds["optimizer"]
            count = outcome.global_step * 16 * run.prepared()["tokens"]["train"] / run.prepared()["rows"]["train"]
            right[way].append(predictions.truth == predictions.predicted)
            figures[way].append((outcome.metrics["eval_accuracy"], outcome.metrics["eval_f1"], trained, count))
            print(f"seed {seed}, {way}: accuracy {figures[way][-1][0]:.4f}, {trained:.0f} s of training", flush=True)
    base = np.mean(right[options.ways[0]], axis=0)
    for way, each in figures.items():
        (accuracy, f1, seconds, tokens), spread = np.mean(each, axis=0), np.std(each, axis=0, ddof=1)
        by = np.mean(right[way], axis=0) - base
        half = 1.96 * by.std(ddof=1) / np.sqrt(len(by))
        print(
            f"{way}: accuracy {accuracy:.3f} ± {spread[0]:.3f}, f1 {f1:.3f} ± {spread[1]:.3f}, {tokens:,.0f} tokens in {seconds:.0f} s; minus {options.ways[0]} "
            f"{by.mean():+.3f} ({by.mean() - half:+.3f} to {by.mean() + half:+.3f})"
        )


if __name__ == "__main__":
    main()
