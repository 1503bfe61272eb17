"""Trainings of token classifiers: entities are learnt, a checkpoint resumes exactly, `model/` says the same in prediction and in plain
Transformers, with an adapter too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests import tiny
from tests.unit.recipe.refusals import BASE, refused
from tests.unit.training.in_process import lines, weights

from afina.prediction.jobs import compose
from afina.prediction.request import PredictRequest, find_model
from afina.statistics.predictions import read_predictions
from afina.statistics.scores import mistakes, score
from afina.worker.predicting import plan_parts, predict_parts

WORDS = (
    "task=token-classification", "data.files={all: tags.conll}", "data.text=tokens", "data.label=ner_tags",
    "metrics=[f1, precision, recall, f1_macro, accuracy]", "train.learning_rate=0.01", "train.max_steps=60",
    "train.log_every=5",
)  # fmt: skip
#: Without afina: entities by a pipeline, and the labels of words by the rule of Transformers' examples: those of first tokens.
PLAIN = """
import json, sys
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline
folder, texts = sys.argv[1], json.load(sys.stdin)
assert not [name for name in sys.modules if name.startswith("afina")]
find = pipeline("token-classification", model=folder, aggregation_strategy="first")
entities = [[[e["start"], e["end"], e["entity_group"]] for e in find(text)] for text in texts]
model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
labels = []
for text in texts:
    inputs = tokenizer(text.split(), is_split_into_words=True, return_tensors="pt")
    best, ids = model(**inputs).logits[0].argmax(-1).tolist(), inputs.word_ids(0)
    labels.append([model.config.id2label[best[ids.index(word)]] for word in range(len(text.split()))])
print(json.dumps({"entities": entities, "labels": labels}))
"""


def _spans(column: list[Any]) -> list[Any]:
    return [[[e["start"], e["end"], e["label"]] for e in entities or ()] for entities in column]


def test_a_run_learns_and_its_model_says_the_same_everywhere(build: Callable[..., Any], tmp_path: Path) -> None:
    from afina.worker.inference.classifier import Classifier
    from afina.worker.training.results.export_results import export_results

    trainer = build({}, *WORDS)
    assert trainer.attempt.batching == "packed"
    results = export_results(trainer)
    run, metrics = trainer.attempt.run, results.metrics
    assert metrics["eval_f1"] > 0.6 and 0 < metrics["eval_f1_macro"] <= 1 and metrics["eval_accuracy"] > 0.8
    table = pq.read_table(run.predictions).to_pydict()
    sentences = {" ".join(words): tags for words, tags in tiny.tagged_sentences(80, 7)}
    for text, label, predicted in zip(table["text"], table["label"], table["prediction"], strict=True):
        assert [entity["label"] for entity in label] == [t[2:] for t in sentences[text] if t.startswith("B-")]
        for entity in [*label, *predicted]:
            assert text[entity["start"] : entity["end"]] == entity["text"] != ""
        assert all(0.3 < entity["score"] <= 1 for entity in predicted)
    # Reports compute from the predictions what the run computed.
    predictions = read_predictions(run.predictions)
    scores = score(predictions, 200)
    for name in ("f1", "precision", "recall", "f1_macro"):
        interval = scores.overall[name]
        assert (
            interval.value == pytest.approx(metrics[f"eval_{name}"]) and interval.low <= interval.value <= interval.high
        )
    assert predictions.labels == ("STRONG", "WEAK") and scores.support == [
        sum(e["label"] == kind for row in table["label"] for e in row) for kind in predictions.labels
    ]
    wrong = {index for index, _ in mistakes(predictions, 1000)}
    assert wrong == {
        i for i, (a, b) in enumerate(zip(_spans(table["label"]), _spans(table["prediction"]), strict=True)) if a != b
    }

    classifier = Classifier(find_model(run.path)[1])
    assert classifier.batching == "packed" and classifier.task == "token-classification"
    ours = classifier.predict([*table["text"], None, " "])
    assert [row["entities"] for row in ours[-2:]] == [None, None]
    assert _spans([row["entities"] for row in ours[:-2]]) == _spans(table["prediction"])
    _check_files(run.path, table, classifier, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(run.model)],
        input=json.dumps(table["text"]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    names, split = trainer.attempt.data.labels, trainer.attempt.data.splits["eval"]
    assert [label for row in theirs["labels"] for label in row] == [names[i] for i in trainer.logits.argmax(-1)]
    assert len(split.labels) == len(trainer.logits)
    # A pipeline begins an entity with I- too; where the model never does, it finds the same entities.
    legal = [i for i, row in enumerate(theirs["labels"]) if _is_iob2(row)]
    assert len(legal) > 5
    assert [theirs["entities"][i] for i in legal] == [_spans(table["prediction"])[i] for i in legal]


def _check_files(run: Path, table: dict[str, Any], classifier: Any, place: Path) -> None:
    """Lists of words are taken as they are, and the words of texts as people write them are the same."""
    words = [text.split() for text in table["text"]]
    assert _spans([row["entities"] for row in classifier.predict(words)]) == _spans(table["prediction"])
    attached = [f'("{text}", U.S.)' for text in table["text"]]
    words = [["(", '"', *each, '"', ",", "U.S.", ")"] for each in words]
    rows = [{"tokens": each} for each in [*words, *attached, ["food"] * 300]]
    data, out = tiny.write_jsonl(place / "new.jsonl", rows), place / "new.out.jsonl"
    about = plan_parts.plan(compose(run, [data], out, PredictRequest(chunk_rows=20)))
    summary = predict_parts.run(about["parts"], 0, 1, and_merge=True, progress="log")["summary"]
    assert summary["words"] == sum(map(len, words)) * 2 + 300 and 0 < summary["words_cut"] < 300
    found = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    assert _spans(found[: len(words)]) == _spans([row["entities"] for row in classifier.predict(words)])
    # A folder of any origin is checked first: these texts together and each alone.
    about = plan_parts.plan(
        compose(
            shutil.copytree(run / "model", place / "plain"),
            [data],
            place / "plain.jsonl",
            PredictRequest(text="tokens"),
        )
    )
    predict_parts.run(about["parts"], 0, 1, and_merge=True, progress="log")
    plain = [json.loads(line)["prediction"] for line in (place / "plain.jsonl").read_text().splitlines()]
    assert _spans(plain[:-1]) == _spans(found[:-1])
    for text, entities, same in zip(attached, found[len(words) : -1], found, strict=False):
        assert [text[e["start"] : e["end"]] for e in entities] == [e["text"] for e in entities]
        assert ["".join(e["text"].split()) for e in entities] == ["".join(e["text"].split()) for e in same]


def _is_iob2(tags: list[str]) -> bool:
    return all(
        t[0] != "I" or (before != "O" and before[2:] == t[2:]) for before, t in zip(["O", *tags], tags, strict=False)
    )


@pytest.mark.parametrize(
    "keys", [(), ("adapter={rank: 4, dropout: 0.1, targets: all-linear}",)], ids=["whole", "adapter"]
)
def test_a_checkpoint_resumes_exactly(build: Callable[..., Any], keys: tuple[str, ...]) -> None:
    from afina.worker.inference.classifier import Classifier
    from afina.worker.training.results.export_results import export_results

    given = (*WORDS, *keys, "train.max_steps=9", "train.save_every=3", "train.evaluate=4", "train.keep_checkpoints=9")
    trainer, again = build({}, *given), build({}, *given, train=False)
    step = "step-6"
    shutil.copytree(trainer.attempt.run.checkpoints / step, again.attempt.run.checkpoints / step)
    shutil.copy(trainer.attempt.run.metrics_file, again.attempt.run.metrics_file)
    again.train(resume_from_checkpoint=str(again.attempt.run.checkpoints / step))
    again.attempt.saver.finish()
    assert bool((weights(again) == weights(trainer)).all()) and lines(again) == lines(trainer)
    if keys:
        export_results(trainer)
        table = pq.read_table(trainer.attempt.run.predictions).to_pydict()
        found = Classifier(trainer.attempt.run.model).predict(table["text"])
        assert _spans([row["entities"] for row in found]) == _spans(table["prediction"])


def test_batches_and_processes_change_nothing(build: Callable[..., Any]) -> None:
    """The same weights after steps of packed, grouped and padded batches, and after micro-batches: the loss is the mean over a step's words."""
    plain = ("model=still", *WORDS, "train.max_steps=4", "train.precision=fp32", "train.learning_rate=0.01")
    packed = build({}, *plain)
    for other in (("tokens.batching=longest",), ("tokens.batching=padded",), ("train.max_batch_per_device=2",)):
        trainer = build({}, *plain, *other)
        apart = float((weights(trainer) - weights(packed)).abs().max())
        assert apart < 2e-4, (other, apart)
        assert np.abs(trainer.logits - packed.logits).max() < 5e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.fold={of: 5}", "data.fold"),
        ("data.labels=[O, B-A]", "data.labels"),
        ("data.text=[a, b]", "data.text"),
        ("tokens.truncation=head+tail", "tokens.truncation"),
        ("tokens.windows={}", "tokens.windows"),
        ("train.class_weights=balanced", "train.class_weights"),
        ("metrics=[mcc]", "mcc"),
        ("metrics=['mine:score']", "metrics"),
    ],
)
def test_what_has_no_meaning_for_words_is_refused(override: str, message: str) -> None:
    assert message in str(refused(BASE, "task=token-classification", override))
