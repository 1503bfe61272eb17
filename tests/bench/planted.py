"""Planted faults of labelled data: are they found, and what do the scores say?

    AFINA_TEST_DATA=FOLDER python tests/bench/planted.py --out FOLDER [--only groups] [--seed 0] [--rows 1000] [--threads 2]

flipped     film snippets, the lowest fifth and the highest of their ratings; 5 % of the labels are exchanged. Of the exchanged labels, the share among the
            tenth of the rows that `doubtful_labels.csv` of a five-fold cross-validation ranks first, and the precision of those it calls issues
groups      snippets of the second and the fourth fifth; each of 50 authors signs every text with a name, and has one label in nine of ten; scores on an
            eval split of rows and on one of whole authors, and on the texts of 50 other authors, which is what a user gets

MiniLM, two epochs and five. The seed decides the snippets, the exchanged labels, the authors' labels and the training. The same command goes on with
what is missing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
from pathlib import Path
from typing import Any

from measuring import AFINA, environment_of, measured  # type: ignore[import-not-found]
from reviews import model_for, tiny  # type: ignore[import-not-found]

from afina.run.directory import RunDir

#: Stars of the snippets, and the label that they stand for: clear ones, and ones that are hard to tell.
_CLEAR = {"1": "bad", "5": "good"}
_HARD = {"2": "bad", "4": "good"}


def _snippets(rows: int, names: dict[str, str], seed: int) -> list[dict[str, str]]:
    """Snippets of two fifths of the ratings, half of each, in a random order."""
    with (Path(os.environ["AFINA_TEST_DATA"]) / "movie_snippets.csv").open(encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["stars"] in names]
    random.Random(10 * seed + 1).shuffle(found)
    chosen = [row for stars in names for row in [each for each in found if each["stars"] == stars][: rows // 2]]
    random.Random(10 * seed + 2).shuffle(chosen)
    return [{"text": row["text"], "label": names[row["stars"]]} for row in chosen]


def _recipe(folder: Path, epochs: int, seed: int, **keys: Any) -> Path:
    recipe = {
        "name": folder.name,
        "model": str(model_for("minilm", folder)),
        "data": {"files": {"all": "all.csv"}, "text": "text", "label": "label", **keys},
        "train": {"batch_size": 16, "epochs": epochs, "learning_rate": 1e-4, "keep": "last", "seed": 42 + seed},
        "metrics": ["accuracy", "f1"],
        "baselines": False,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def flipped(folder: Path, environment: dict[str, str], rows: int, seed: int) -> None:
    table = _snippets(rows, _CLEAR, seed)
    planted = set(random.Random(10 * seed + 3).sample(range(rows), rows // 20))
    for number in planted:
        table[number]["label"] = "good" if table[number]["label"] == "bad" else "bad"
    tiny.write_csv(folder / "all.csv", [{"id": number, **row} for number, row in enumerate(table)])
    home = folder / "sweep"
    argv = [*AFINA, "sweep", str(_recipe(folder, 2, seed, id="id")), "--folds", "5", "--local", "--sweep", str(home)]
    measured(argv, environment)
    with (home / "doubtful_labels.csv").open(encoding="utf-8", newline="") as file:
        ranked = [(int(row["id"]), row["issue"] == "yes") for row in csv.DictReader(file)]
    first = {number for number, _ in ranked[: rows // 10]}
    issues = {number for number, issue in ranked if issue}
    print(
        f"flipped: {len(planted & first)} of {len(planted)} exchanged labels are among the first {rows // 10} of {rows} rows; "
        f"{len(planted & issues)} of {len(issues)} issues are exchanged labels"
    )


def groups(folder: Path, environment: dict[str, str], rows: int, seed: int) -> None:
    draw, table = random.Random(10 * seed + 4), _snippets(2 * rows, _HARD, seed)
    by_label = {name: [row["text"] for row in table if row["label"] == name] for name in _HARD.values()}
    written: list[dict[str, str]] = []
    while len(written) < 2 * rows:
        author = len(written) % 100
        usual, other = ("good", "bad") if author % 2 else ("bad", "good")
        label = usual if (draw.random() < 0.9 and by_label[usual]) or not by_label[other] else other
        name = f"writer{author:02d}"
        written.append({"text": f"{by_label[label].pop()} {name}", "label": label, "author": name})
    seen = [row for row in written if int(row["author"][-2:]) < 50]
    tiny.write_csv(folder / "all.csv", seen)
    tiny.write_csv(folder / "others.csv", [row for row in written if int(row["author"][-2:]) >= 50])
    files = {"all": "all.csv", "test": "others.csv"}
    for way, keys in {"rows": {}, "authors": {"group": "author"}}.items():
        run = RunDir(folder / f"run-{way}")
        parts = {"train": {"fraction": 0.7}, "eval": {"fraction": 0.3}, "test": {}}
        recipe = _recipe(folder, 5, seed, files=files, **parts, **keys)
        if run.outcome() is None:
            measured([*AFINA, "train", str(recipe), "--run", str(run.path), "--num-processes", "1"], environment)
        outcome = run.outcome()
        assert outcome is not None
        print(
            f"groups: divided by {way}: eval accuracy {outcome.metrics['eval_accuracy']:.3f}, of other authors {outcome.metrics['test_accuracy']:.3f}"
        )


_FAULTS = {"flipped": flipped, "groups": groups}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=_FAULTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for fault in [options.only] if options.only else _FAULTS:
        folder = options.out.absolute() / f"{fault}-{options.seed}"
        _FAULTS[fault](folder, environment_of(folder, options.threads), options.rows, options.seed)


if __name__ == "__main__":
    main()
