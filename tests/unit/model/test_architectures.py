"""Seventy-five architectures: trained a step, predicted in batches and alone, against plain Transformers with each row by itself."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests import tiny
from tests.architectures import ARCHITECTURES, LEFT, MORE, architecture_folder
from tests.unit.training.in_process import train_here
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as HEADS

from afina.recipe.keys.train_keys import Tokens
from afina.recipe.parse import parse_recipe
from afina.worker.compute import packed_model
from afina.worker.data.prepared import Split
from afina.worker.data.tokens.encode import EncodedBatch, Encoder
from afina.worker.inference.classifier import Classifier
from afina.worker.inference.model_folder import export
from afina.worker.model import padding
from afina.worker.model.head import build_model
from afina.worker.model.padding import set_pad_token
from afina.worker.model.tokenizer import load_tokenizer

LONGEST = 100
#: One for each way that rows are batched, heads are pooled and tokenizers are stored; every architecture is in CASES.
RUNS = [
    "big_bird", "canine", "deberta", "fnet", "funnel", "modernbert", "roberta", "xlnet", "bart", "t5", "gpt2",
    "llama",
]  # fmt: skip
CASES = [(kind, side) for kind in ARCHITECTURES for side in (("right", "left") if kind in LEFT else ("right",))]


def texts() -> list[str]:
    """Short and long texts; some hold an end-of-text or a padding token, one has a single word."""
    found = [row["text"] for row in tiny.tiny_reviews(16, 4)]
    found[3] += " </s> good food"
    found[5] = "the <pad> room was fine"
    return [*found, "good " * 120, "good"]


def alone(folder: Path, rows: list[str]) -> np.ndarray[Any, Any]:
    """What transformers says of each row by itself."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        each = [model(**tokenizer(t, truncation=True, max_length=LONGEST, return_tensors="pt")).logits for t in rows]
    return torch.cat(each).numpy()


def close(found: Any, wanted: Any) -> None:
    assert np.abs(found - wanted).max() <= 1e-4 * max(1.0, float(np.abs(wanted).max()))
    assert np.abs(found - wanted).max() <= 1e-3 * float(np.ptp(wanted, 0).max()), "as large as the rows differ"


def train_a_step(folder: Path, out: Path) -> None:
    """One step as a run makes it: the head, the batch, the loss; then saved as a run saves its model."""
    recipe = parse_recipe(
        f"name: x\nmodel: '{folder}'\ndata: {{files: {{all: a.csv}}, text: text, label: stars}}\ntokens: {{max_length: {LONGEST}}}\n"
    )
    tokenizer = load_tokenizer(folder, recipe)
    encoded = EncodedBatch.joined(
        [b for _, b in Encoder(tokenizer, Tokens(max_length=LONGEST)).encode([(None, [texts()])])]
    )
    offsets = np.concatenate([[0], np.cumsum(encoded.lengths)])
    split = Split(encoded.tokens, offsets, np.arange(len(encoded.lengths)) % 3, encoded.types)
    model, _ = build_model(recipe, folder, "single-label", ["a", "b", "c"], 3)
    batching, _ = packed_model.configure(model, recipe, transformers.TrainingArguments(str(out), use_cpu=True))
    set_pad_token(model, tokenizer.pad_token_id)
    batch = packed_model.collator(
        model, split, batching, tokenizer.pad_token_id, tokenizer_side=tokenizer.padding_side
    )(np.argsort(-encoded.lengths, kind="stable").tolist())
    labels, _ = batch.pop("labels")
    model.train()
    torch.nn.functional.cross_entropy(model(**batch)["logits"], labels).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "side"),
    [*CASES, *(pytest.param(kind, "right", marks=pytest.mark.series) for kind in MORE)],
    ids=[*(f"{kind}-{side}" for kind, side in CASES), *MORE],
)
def test_a_row_has_the_logits_that_transformers_gives_it_alone(kind: str, side: str, tmp_path: Path) -> None:
    base = architecture_folder(tmp_path / "base", kind, side=side)
    train_a_step(base, tmp_path / "trained")
    model, rows = Classifier(tmp_path / "trained", tokens=Tokens(max_length=LONGEST)), texts()
    wanted = alone(tmp_path / "trained", rows)
    close(model.logits(rows), wanted)
    close(np.concatenate([model.logits([row]) for row in rows[:4]]), wanted[:4])
    assert np.abs(wanted - alone(base, rows)).max() > 1e-6, "the step changed nothing"


def test_heads_that_read_tokens_are_those_of_the_installed_transformers() -> None:
    """A new version may bring another class whose head reads positions in its own way: then this table and `padding` follow."""
    classes = {kind: getattr(transformers, name, None) for kind, name in HEADS.items()}
    eos, maskless = set(), set()
    for kind, cls in classes.items():
        if cls is None or not hasattr(cls, "forward"):
            continue
        if "attention_mask" not in inspect.signature(cls.forward).parameters:
            maskless.add(kind)
        if "eos_token_id" in inspect.unwrap(cls.forward).__code__.co_names:
            eos.add(kind)
    assert maskless == {"fnet"}
    assert eos == {"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"}
    assert set(HEADS) >= padding._UNPADDED and set(HEADS) >= padding._LEFT


@pytest.mark.filterwarnings("ignore")
def test_sparse_attention_of_big_bird_does_not_depend_on_what_came_before(tmp_path: Path) -> None:
    sparse = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    folder = architecture_folder(tmp_path / "model", "big_bird", **sparse)
    rows = ["good food", "the room was fine " * 12, "a nice book " * 20, "awful"]
    model = Classifier(folder, tokens=Tokens(max_length=LONGEST))
    for order in ([0, 1, 2, 3], [1, 0, 3, 2]):
        wanted = np.concatenate([alone(folder, [rows[i]]) for i in order])
        close(model.logits([rows[i] for i in order]), wanted)


@pytest.mark.series
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_an_architecture(kind: str, tmp_path: Path) -> None:
    """Prepare with its model check, train, predict, export; transformers reads what was exported."""
    architecture_folder(tmp_path / "model", kind, num_labels=None, side="left" if kind in LEFT else "right")
    rows = tiny.tiny_reviews(40, 3, stars=3)
    for row in rows[::9]:
        row["text"] += " </s> and more"
    tiny.write_csv(tmp_path / "d.csv", rows)
    recipe = {
        "name": kind,
        "model": str(tmp_path / "model"),
        "data": {"files": {"all": str(tmp_path / "d.csv")}, "text": "text", "label": "stars"},
        "tokens": {"max_length": LONGEST},
        "baselines": False,
        "train": {"batch_size": 8, "max_steps": 4, "learning_rate": 0.001},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    (tmp_path / "scratch").mkdir()
    run = train_here(tmp_path / "r.yaml", tmp_path / "run", env={"AFINA_SCRATCH": str(tmp_path / "scratch")})
    export(str(run), str(tmp_path / "exported"), onnx=False)
    logits = Classifier(run / "model", tokens=Tokens(max_length=LONGEST)).logits(texts())
    wanted = torch.softmax(torch.from_numpy(alone(tmp_path / "exported", texts())), -1)
    assert (torch.softmax(torch.from_numpy(logits), -1) - wanted).abs().max() <= 1e-4
