"""Texts as windows: the numbers of a text equal those computed by hand from its windows, however they are batched, and a run is of texts."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests import tiny
from tests.unit.recipe.refusals import BASE, refused
from tests.unit.training.in_process import lines, weights

from afina.errors import RecipeError
from afina.recipe.keys.train_keys import Tokens
from afina.worker.compute import packed_model
from afina.worker.compute.attention import PLAIN
from afina.worker.compute.batches import EvalBatches, pool_windows
from afina.worker.data.prepared import Split, load_manifest, open_split
from afina.worker.data.tfidf import without_repeated
from afina.worker.data.tokens.encode import Encoder
from afina.worker.inference.classifier import Classifier
from afina.worker.training.results.export_results import export_results

TOKENS = {"max_length": 16, "windows": {"stride": 4, "max_windows": 3}}
KEYS = (f"tokens={json.dumps(TOKENS)}", "train.log_every=1", "train.save_every=1", "train.keep_checkpoints=9")


def _texts(count: int = 80) -> list[dict[str, Any]]:
    """Reviews, some of many words."""
    return [{**row, "text": " ".join([row["text"]] * (1 + n % 5))} for n, row in enumerate(tiny.tiny_reviews(count, 7))]


@pytest.fixture(scope="module")
def long_project(project: Path) -> Path:
    rows = [{**row, "weight": (1, 0.5, 0, 4)[n % 4]} for n, row in enumerate(_texts())]
    tiny.write_csv(project / "reviews.csv", rows)
    return project


def _windows(tokenizer: Any, text: str) -> list[list[int]]:
    """Windows by hand: the text's tokens, 14 at a time, 4 of them shared, with the special tokens at both ends."""
    ids, step, parts = tokenizer(text, add_special_tokens=False)["input_ids"], 14 - 4, []
    for start in range(0, len(ids), step):
        parts.append([tokenizer.cls_token_id, *ids[start : start + 14], tokenizer.sep_token_id])
        if start + 14 >= len(ids):
            break
    return parts[:3]


def test_the_windows_of_a_text(long_project: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(long_project / "model")
    texts = [row["text"] for row in _texts(30)]
    batches = Encoder(copy.deepcopy(tokenizer), Tokens.model_validate(TOKENS)).encode(
        [(0, [texts[:7]]), (1, [texts[7:]])]
    )
    expected = [_windows(tokenizer, text) for text in texts]
    for places, (_, batch) in zip((slice(7), slice(7, None)), batches, strict=True):
        flat = [window for windows in expected[places] for window in windows]
        assert batch.windows is not None and batch.windows[1].tolist() == [len(w) for w in expected[places]]
        assert batch.windows[0].tolist() == [len(window) for window in flat]
        assert batch.tokens.tolist() == [i for window in flat for i in window]
        assert batch.lengths.tolist() == [sum(map(len, windows)) for windows in expected[places]]
        assert batch.cut.any() and not batch.cut.all()


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("batching", ["packed", "padded", "longest"])
def test_logits_and_gradients_of_texts_equal_those_by_hand(project: Path, how: str, batching: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    draw = np.random.default_rng(3)
    lengths, counts = np.array([16, 5, 16, 16, 9, 7, 16, 16]), np.array([2, 1, 3, 2])
    windows = np.concatenate([[0], np.cumsum(lengths)])
    split = Split(
        draw.integers(5, 50, windows[-1]),
        windows[np.concatenate([[0], np.cumsum(counts)])],
        np.array([0, 1, 2, 0]),
        windows=windows,
    )
    model = (
        AutoModelForSequenceClassification.from_pretrained(
            project / "still", num_labels=3, ignore_mismatched_sizes=True
        )
        .double()
        .eval()
    )
    signs = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)

    def result(logits: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        (logits * signs).square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    order, number, by_hand = [2, 0, 3, 1], 0, []
    for count in counts:
        each = []
        for window in range(number, number + count):
            ids = torch.tensor(split.tokens[windows[window] : windows[window + 1]])[None]
            each.append(model(input_ids=ids).logits)
        number += count
        rows = torch.cat(each)
        by_hand.append(rows.mean(0) if how == "mean" else rows.max(0).values)
    expected = result(torch.stack([by_hand[row] for row in order]))
    if batching == "packed":
        packed_model.enable_packing(model, PLAIN)
    pool_windows(model, how)
    batch = packed_model.collator(model, split, batching, 0, max_length=16)(order)
    assert batch.pop("labels")[0].tolist() == [2, 0, 0, 1]
    for mine, true in zip(result(model(**batch).logits), expected, strict=True):
        assert torch.allclose(mine, true, rtol=1e-9, atol=1e-12)


def test_a_split_keeps_its_windows_and_batches_count_them() -> None:
    windows = np.array([0, 3, 5, 9, 10, 14])
    split = Split(np.arange(14), np.array([0, 5, 9, 14]), np.array([0, 1, 2]), windows=windows)
    assert split.sum_over_sequences(lambda lengths: lengths**2).tolist() == [9 + 4, 16, 1 + 16]
    taken = split.take(np.array([2, 0]))
    assert taken.tokens.tolist() == [9, 10, 11, 12, 13, 0, 1, 2, 3, 4] and taken.windows is not None
    assert taken.windows.tolist() == [0, 1, 5, 8, 10] and taken.labels.tolist() == [2, 0]
    assert split.windows_of_rows is not None and split.windows_of_rows.tolist() == [2, 1, 2]
    assert EvalBatches(split.lengths, 3, 0, 1, None, split.windows_of_rows).batches == [[0], [2, 1]]
    assert EvalBatches(split.lengths, 3, 0, 1, 10, split.windows_of_rows).batches == [[0, 2], [1]]


def test_a_run_is_of_texts_and_predicts_as_it_evaluates(build: Callable[..., Any], long_project: Path) -> None:
    still = f"model={long_project / 'still'}"
    packed, padded = (
        build({}, still, *KEYS, f"tokens={json.dumps({**TOKENS, 'batching': b})}") for b in ("packed", "padded")
    )
    split = open_split(packed.attempt.run.prepared()["prepared"], "train")
    assert split.windows is not None and len(split.windows) - 1 > 2 * len(split)
    assert packed.logits.shape == (len(packed.attempt.data.splits["eval"]), 5)
    assert _losses(padded) == pytest.approx(_losses(packed), rel=1e-4)
    assert np.abs(padded.logits - packed.logits).max() < 1e-4
    export_results(packed)
    classifier = Classifier(packed.attempt.run.model, tokens=packed.attempt.plan.recipe.tokens)
    folder = Path(packed.attempt.run.prepared()["prepared"])
    texts = pq.read_table(folder / "eval.rows.parquet")["text"]
    assert np.abs(classifier.logits(texts.to_pylist()) - packed.logits).max() < 1e-5
    assert "each alone" in classifier.check_rows(classifier.encode([texts.combine_chunks()]))
    # TF-IDF counts each token of a text once.
    whole = without_repeated(open_split(folder, "eval"), *load_manifest(folder)["repeated"])
    at_once = [classifier.tokenizer(text)["input_ids"] for text in texts.to_pylist()]
    kept = [[*ids[: 1 + 14 + 10 + 10], ids[-1]] if len(ids) > 36 else ids for ids in at_once]  # of three windows
    assert len({len(ids) for ids in kept}) > 5 and whole.tokens.tolist() == [i for ids in kept for i in ids]
    assert whole.lengths.tolist() == [len(ids) for ids in kept] and len(whole.labels) == len(texts)


@pytest.mark.series
def test_accumulated_and_resumed_runs_are_the_same(build: Callable[..., Any], long_project: Path) -> None:
    still = f"model={long_project / 'still'}"
    whole, parts = (build({}, still, *KEYS, *extra) for extra in ((), ("train.max_batch_per_device=2",)))
    assert _losses(parts) == pytest.approx(_losses(whole), rel=1e-4)
    undisturbed, again = build({}, *KEYS), build({}, *KEYS, train=False)
    shutil.copytree(undisturbed.attempt.run.checkpoints / "step-2", again.attempt.run.checkpoints / "step-2")
    shutil.copy(undisturbed.attempt.run.metrics_file, again.attempt.run.metrics_file)
    again.train(resume_from_checkpoint=str(again.attempt.run.checkpoints / "step-2"))
    again.attempt.saver.finish()
    assert lines(again) == lines(undisturbed) and bool((weights(again) == weights(undisturbed)).all())


def _losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in lines(trainer) if "loss" in line]


@pytest.mark.parametrize(
    "keys, message",
    [
        ("tokens: {max_length: 64, windows: {stride: 40}}", "windows of 64 tokens share 40: at most half of them, 32"),
        ("tokens: {windows: {}, truncation: head+tail}", "has no meaning beside `tokens.windows`"),
        ("tokens: {windows: {pool: first}}", "tokens.windows.pool"),
    ],
)
def test_what_does_not_fit_is_refused(keys: str, message: str) -> None:
    assert message in str(refused(BASE + keys + "\n").message)


def test_a_tokenizer_without_overflow_is_refused() -> None:
    class Letters:
        model_input_names = ("input_ids",)

    with pytest.raises(RecipeError, match="has no fast tokenizer"):
        Encoder(Letters(), Tokens.model_validate(TOKENS))
