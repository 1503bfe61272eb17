"""Token classification: `afina train` beside Transformers' own example (run_ner.py) on the same CoNLL files, over several seeds.

    trainer        what the example does: words given as such, labels on their first pieces and -100 on the others, Trainer, batches padded by
                   DataCollatorForTokenClassification
    afina          `afina train` with its defaults: packed
    afina-padded   with the example's batches and dropout: the losses of every step are compared with the example's

    python tests/bench/entities.py --train train.conll --eval dev.conll --test test.conll --out FOLDER [--models minilm bert-base] [--seeds 1 2 3]

The peers run in turn for each seed, so that other load meets all. Printed are F1 of entities (strict IOB2, micro) on eval and test with means and ranges over the seeds,
real tokens a second of training (evaluations left out), seconds of the whole command, and both as times the example's. F1 is computed here from the
words' tags that each peer predicted: by afina, and by seqeval too where it is installed (`mode="strict", scheme=IOB2`), which must agree. Every finished run is a line of
OUT/cells.jsonl, from which the same command continues. All compute in float32. Not covered: several processes, GPUs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests import tiny
from tests.bench import measuring, reviews

#: What each peer of the example sets in the recipe.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "afina": (),
    "afina-padded": ("tokens.batching=longest", "train.fast_dropout=false", "train.onednn=false"),
}
_PEERS = ("trainer", *_SETTINGS)
_PARTS = ("train", "eval", "test")
Sentence = tuple[list[str], list[str]]


def _model(options: argparse.Namespace, name: str) -> Path:
    """The folder of a model, of its first layers if so many are asked for."""
    whole = reviews.model_for(name, options.out)
    if options.layers is None:
        return whole
    import transformers

    path = options.out / f"model-{name}-{options.layers}"
    if not path.exists():
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        transformers.AutoTokenizer.from_pretrained(whole).save_pretrained(path)
        transformers.AutoModel.from_pretrained(whole, num_hidden_layers=options.layers).save_pretrained(path)
    return path


def read_sentences(path: str | Path) -> dict[int, Sentence]:
    """Words and tags of each sentence, the first and the last column, by the number of its first line."""
    sentences: dict[int, Sentence] = {}
    first = 0
    with Path(path).open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            cells = line.split()
            if not cells or cells[0] == "-DOCSTART-":
                first = 0
                continue
            first = first or number
            words, tags = sentences.setdefault(first, ([], []))
            words.append(cells[0])
            tags.append(cells[-1])
    return sentences


def label_names(sentences: Sequence[Sentence]) -> list[str]:
    """Tags in the order of afina's outputs, so that new heads begin with the same weights."""
    types = sorted({tag[2:] for _, tags in sentences for tag in tags if tag != "O"})
    return ["O", *(f"{prefix}-{name}" for name in types for prefix in "BI")]


def strict_f1(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """F1 of entities as afina counts them; where seqeval is installed it must give the same."""
    import numpy as np

    from afina.statistics.entities import entities

    names = label_names([([], [*a, *b]) for a, b in zip(true, predicted, strict=True)])
    offsets = np.cumsum([0, *map(len, true)])
    own = [entities(np.array([names.index(tag) for row in rows for tag in row]), offsets) for rows in (true, predicted)]
    known, guessed = (set(map(tuple, each.tolist())) for each in own)
    f1 = 2 * len(known & guessed) / max(1, len(known) + len(guessed))
    if importlib.util.find_spec("seqeval"):
        from seqeval.metrics import f1_score
        from seqeval.scheme import IOB2

        theirs = f1_score([*map(list, true)], [*map(list, predicted)], mode="strict", scheme=IOB2, zero_division=0)
        if abs(theirs - f1) > 1e-12:
            raise SystemExit(f"error: F1 {f1} here, {theirs} by seqeval")
    return f1


def _tags_of_run(run: Path, split: str, sentences: dict[int, Sentence]) -> list[list[str]]:
    """The words' tags that the spans of a run's predictions mean, in the order of the sentences."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(
        run / ("predictions.parquet" if split == "eval" else f"predictions_{split}.parquet")
    )
    spans = dict(zip(table["row"].to_pylist(), table["prediction"].to_pylist(), strict=True))
    rows = []
    for line, (words, _) in sentences.items():
        tags, place = ["O"] * len(words), 0
        begins = {entity["start"]: entity for entity in spans[line]}
        inside: dict[str, Any] | None = None
        for number, word in enumerate(words):
            if place in begins:
                inside = begins.pop(place)
                tags[number] = f"B-{inside['label']}"
            elif inside is not None and place < inside["end"]:
                tags[number] = f"I-{inside['label']}"
            place += len(word) + 1
        if begins:
            raise SystemExit(f"error: line {line}: entities {begins} do not begin with a word")
        rows.append(tags)
    return rows


def _run_cell(options: argparse.Namespace, cell: dict[str, Any]) -> dict[str, Any]:
    """Run one peer once; its figures."""
    files = {part: str(getattr(options, part)) for part in _PARTS}
    model, out = _model(options, cell["model"]), options.out / "-".join(map(str, cell.values()))
    environment, load = measuring.environment_of(options.out, options.threads), os.getloadavg()[0]
    shutil.rmtree(out, ignore_errors=True)  # of a bench that was interrupted
    train: dict[str, Any] = {
        "batch_size": options.batch_size, "epochs": options.epochs, "learning_rate": options.learning_rate, "seed": cell["seed"]
    }  # fmt: skip
    sentences = {part: read_sentences(path) for part, path in files.items()}
    if cell["peer"] == "trainer":
        settings = {**files, **train, "model": str(model), "out": str(out), "max_length": options.max_length}
        done = measuring.measured([sys.executable, __file__, "peer"], environment, json.dumps(settings))
        found = json.loads(done.out.splitlines()[-1])
        tags, losses, training = found["tags"], found["losses"], found["seconds"]
    else:
        recipe = {
            "name": "entities",
            "model": str(model),
            "task": "token-classification",
            "data": {"files": files, "text": "tokens", "label": "ner_tags", "test": {}},
            "tokens": {"max_length": options.max_length},
            "train": {**train, "keep": "last", "log_every": 1, "precision": "fp32", "save_minutes": None},
        }
        path = out.with_suffix(".yaml")
        path.write_text(json.dumps(recipe))
        more = [word for setting in _SETTINGS[cell["peer"]] for word in ("--set", setting)]
        done = measuring.measured([*measuring.AFINA, "train", str(path), "--run", str(out), *more], environment)
        outcome = json.loads((out / "outcome.json").read_text())
        seconds = outcome["utilisation"]["seconds_by_part"]
        training = sum(seconds[name] for name in ("input", "forward_backward", "optimizer", "other"))
        tags = {split: _tags_of_run(out, split, sentences[split]) for split in ("eval", "test")}
        losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in losses if "loss" in line]
    f1 = {split: strict_f1([true for _, true in sentences[split].values()], tags[split]) for split in ("eval", "test")}
    if cell["peer"] != "trainer":
        for split, value in f1.items():
            if abs(value - outcome["metrics"][f"{split}_f1"]) > 1e-9:
                raise SystemExit(
                    f"error: {out}: {split}_f1 {outcome['metrics'][f'{split}_f1']}, its predictions have {value}"
                )
    return {
        **cell,
        "eval_f1": f1["eval"],
        "test_f1": f1["test"],
        "training_seconds": training,
        "wall_seconds": done.seconds,
        "memory_gb": round(done.memory / 1e9, 3),
        "load_before": load,
        "losses": losses,
    }


def plain_example() -> None:
    """What run_ner.py does, with the settings of standard input."""
    import numpy as np
    import transformers
    from datasets import Dataset

    given = json.load(sys.stdin)
    sentences = {part: list(read_sentences(given[part]).values()) for part in _PARTS}
    names = label_names([one for each in sentences.values() for one in each])
    tokenizer = transformers.AutoTokenizer.from_pretrained(given["model"])

    def encode(batch: Any) -> Any:
        tokens = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=given["max_length"])
        tokens["labels"] = []
        for row, tags in enumerate(batch["ner_tags"]):
            words, before, labels = tokens.word_ids(row), None, []
            for word in words:
                labels.append(-100 if word is None or word == before else names.index(tags[word]))
                before = word
            tokens["labels"].append(labels)
        return tokens

    data = {}
    for part, rows in sentences.items():
        table = Dataset.from_dict({"tokens": [words for words, _ in rows], "ner_tags": [tags for _, tags in rows]})
        data[part] = table.map(encode, batched=True, remove_columns=table.column_names)
    transformers.set_seed(given["seed"])
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        given["model"], num_labels=len(names), id2label=dict(enumerate(names)), dtype="float32"
    )
    arguments = transformers.TrainingArguments(
        given["out"],
        num_train_epochs=given["epochs"],
        per_device_train_batch_size=given["batch_size"],
        learning_rate=given["learning_rate"],
        seed=given["seed"],
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer),
    )
    began = time.perf_counter()
    trainer.train()
    seconds, log = time.perf_counter() - began, trainer.state.log_history
    evaluating = sum(line["eval_runtime"] for line in log if "eval_runtime" in line)
    tags: dict[str, list[list[str]]] = {}
    for split in ("eval", "test"):
        output = trainer.predict(data[split])
        best, tags[split] = output.predictions.argmax(-1), []
        for row, (words, _) in enumerate(sentences[split]):
            chosen = [names[i] for i in best[row][np.asarray(output.label_ids[row]) != -100]]
            tags[split].append(chosen + ["O"] * (len(words) - len(chosen)))  # behind max_length
    found = {"seconds": seconds - evaluating, "tags": tags, "losses": [line["loss"] for line in log if "loss" in line]}
    print(json.dumps(found))


def _tokens(options: argparse.Namespace, model: str) -> int:
    """Real tokens of an epoch."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(_model(options, model))
    rows = [words for words, _ in read_sentences(options.train).values()]
    encoded = tokenizer(rows, is_split_into_words=True, truncation=True, max_length=options.max_length)
    return sum(map(len, encoded["input_ids"]))


def _print_tables(options: argparse.Namespace, cells: Sequence[dict[str, Any]]) -> None:
    for model in options.models:
        tokens = _tokens(options, model) * options.epochs
        of = {peer: {c["seed"]: c for c in cells if (c["model"], c["peer"]) == (model, peer)} for peer in options.peers}
        base = of.get("trainer", {})
        print(
            f"| {model}, seeds {', '.join(map(str, options.seeds))} | F1 eval | F1 test | tokens/s | wall, s | training, times | wall, times | GB |"
        )
        print("|---" * 8 + "|")
        for peer, mine in of.items():
            each = list(mine.values())
            times = {
                key: [base[seed][key] / cell[key] for seed, cell in mine.items() if seed in base] or [float("nan")]
                for key in ("training_seconds", "wall_seconds")
            }
            scores = [" / ".join(f"{cell[key]:.4f}" for cell in each) + f" (mean {statistics.mean(c[key] for c in each):.4f})" for key in ("eval_f1", "test_f1")]  # fmt: skip
            speed = measuring.ranged([tokens / cell["training_seconds"] for cell in each], ",.0f")
            wall, memory = (
                measuring.ranged([c[k] for c in each], form)
                for k, form in (("wall_seconds", ".1f"), ("memory_gb", ".2f"))
            )
            print(
                f"| {peer} | {' | '.join(scores)} | {speed} | {wall} | {measuring.ranged(times['training_seconds'])} | {measuring.ranged(times['wall_seconds'])} | {memory} |"
            )
        for seed in base:
            if seed in of.get("afina-padded", {}):
                pairs = list(zip(base[seed]["losses"], of["afina-padded"][seed]["losses"], strict=True))
                apart = max(abs(a - b) for a, b in pairs)
                print(
                    f"{model}, seed {seed}: losses of {len(pairs)} steps, afina-padded and trainer: largest difference {apart:.1e}"
                )
    print(
        "F1 checked by seqeval"
        if importlib.util.find_spec("seqeval")
        else "seqeval is not installed: F1 as afina counts it"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    if (sys.argv[1:] if arguments is None else list(arguments)) == ["peer"]:
        return plain_example()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in (*_PARTS, "out"):
        parser.add_argument(f"--{part}", required=True, type=lambda value: Path(value).resolve())
    parser.add_argument("--models", nargs="+", choices=reviews.MODELS, default=["minilm"])
    parser.add_argument("--peers", nargs="+", choices=_PEERS, default=list(_PEERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, help="of each file, the first; by default all")
    parser.add_argument("--layers", type=int, help="of the model, the first; by default all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for part in _PARTS:  # under a name that afina knows as CoNLL
        rows = list(read_sentences(getattr(options, part)).values())[: options.rows]
        setattr(options, part, tiny.write_conll(options.out / f"{part}.conll", rows))
    log = options.out / "cells.jsonl"
    cells = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for model in options.models:
        for seed in options.seeds:
            for peer in options.peers:
                cell = {"model": model, "peer": peer, "seed": seed}
                if any(cell.items() <= done.items() for done in cells):
                    continue
                cells.append(_run_cell(options, cell))
                with log.open("a") as file:
                    file.write(json.dumps(cells[-1]) + "\n")
                print(
                    f"{model}, {peer}, seed {seed}: F1 {cells[-1]['eval_f1']:.4f}, {cells[-1]['wall_seconds']:.0f} s",
                    flush=True,
                )
    _print_tables(options, cells)


if __name__ == "__main__":
    main()
