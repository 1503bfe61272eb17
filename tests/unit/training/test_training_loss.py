"""The training loss of an epoch, against one computed by hand: weights that stand still, plain Transformers, one text at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.unit.training.in_process import lines
from tests.unit.training.test_token_runs import WORDS
from torch.nn.functional import cross_entropy

from afina.worker.data.prepared import open_split
from afina.worker.data.splits.folds import open_rows

#: Steps of 10 rows, the last of fewer, in micro-batches of 5; two epochs, of which the second tells whether anything moved.
STILL = (
    "train.max_steps=null",
    "train.epochs=2",
    "train.evaluate=epoch",
    "train.batch_size=10",
    "train.max_batch_per_device=5",
)
FIXED = ("train.learning_rate=1e-12", "train.precision=fp32")


def _plain(project: Path, trainer: Any, kind: str) -> tuple[Any, Any]:
    """A model of Transformers' own with the weights of the run, and its tokenizer."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(
        project / "still", num_labels=trainer.model.config.num_labels, ignore_mismatched_sizes=True
    )
    model.load_state_dict(trainer.model.state_dict())
    return model.eval(), transformers.AutoTokenizer.from_pretrained(project / "model")


def _means(trainer: Any) -> list[float]:
    return [line["training_loss"] for line in lines(trainer) if "training_loss" in line]


@pytest.mark.parametrize("weighted", [False, True])
def test_of_texts_in_windows_it_is_the_mean_over_texts(
    build: Callable[..., Any], project: Path, weighted: bool
) -> None:
    rows = [
        {**row, "text": " ".join([row["text"]] * (1 + n % 5)), "weight": (1, 0.5, 0, 4)[n % 4]}
        for n, row in enumerate(tiny.tiny_reviews(80, 7))
    ]
    tiny.write_csv(project / "long.csv", rows)
    tokens = {"max_length": 16, "windows": {"stride": 4, "max_windows": 3}}
    keys = (
        f"tokens={json.dumps(tokens)}",
        "data.files={all: long.csv}",
        f"model={project / 'still'}",
        *(["data.weight=weight"] * weighted),
    )
    trainer = build({}, *STILL, *FIXED, *keys)
    model, tokenizer = _plain(project, trainer, "AutoModelForSequenceClassification")
    data = trainer.attempt.data
    table = open_rows(data.folder, "train", data.rows)
    total = divisor = 0.0
    split = open_split(data.folder, "train")
    assert len(table) % 10 and trainer.attempt.geometry.accumulation == 2
    for row, label in zip(table["row"].to_pylist(), split.labels.tolist(), strict=True):
        text, weight = rows[row - 1]["text"], rows[row - 1]["weight"] if weighted else 1
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        starts = [0, *range(10, max(10, len(ids) - 4), 10)][:3]
        windows = [[tokenizer.cls_token_id, *ids[s : s + 14], tokenizer.sep_token_id] for s in starts]
        with torch.no_grad():
            logits = torch.cat([model(input_ids=torch.tensor([window])).logits for window in windows]).mean(0)
        total += weight * float(cross_entropy(logits, torch.tensor(label)))
        divisor += weight
    assert _means(trainer) == pytest.approx([total / divisor] * 2, rel=1e-5)


def test_of_entities_it_is_the_mean_over_words(build: Callable[..., Any], project: Path) -> None:
    trainer = build({}, *WORDS, *STILL, *FIXED, f"model={project / 'still'}")
    model, tokenizer = _plain(project, trainer, "AutoModelForTokenClassification")
    data = trainer.attempt.data
    table = open_rows(data.folder, "train", data.rows)
    sentences, line = {}, 3
    for words, tags in tiny.tagged_sentences(80, 7):
        sentences[line] = words, tags
        line += len(words) + 1
    losses: list[float] = []
    assert len(table) % 10 and trainer.attempt.geometry.accumulation == 2
    for row in table["row"].to_pylist():
        words, tags = sentences[row]
        inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        first = [inputs.word_ids(0).index(n) for n in range(len(words))]
        with torch.no_grad():
            logits = model(**inputs).logits[0][first]
        labels = torch.tensor([data.labels.index(tag) for tag in tags])
        losses += cross_entropy(logits, labels, reduction="none").tolist()
    assert _means(trainer) == pytest.approx([sum(losses) / len(losses)] * 2, rel=1e-5)
