"""Tiny real inputs for tests: a Transformers model folder, and reviews whose words tell their stars.

`write_project` writes a whole project folder. `tiny_model` writes an ordinary checkpoint (config.json, model.safetensors, tokenizer.json, ...) with random weights:
it loads, trains and saves like a large one, it has learnt nothing. `tiny_reviews` draws rows that a tiny model can
learn within seconds; they are synthetic and say nothing about real reviews. The same arguments give the same bytes.

torch, transformers and pyarrow are imported inside the functions that need them.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "dataset_card",
    "parquet_bytes",
    "recipe",
    "star_names",
    "tagged_sentences",
    "tiny_model",
    "tiny_reviews",
    "tiny_tagger",
    "words",
    "write_conll",
    "write_csv",
    "write_jsonl",
    "write_parquet",
    "write_project",
    "write_tsv",
]

Row = Mapping[str, Any]

_TONE = (
    ("awful", "broken", "refund", "terrible", "waste", "never"),
    ("poor", "disappointing", "weak", "slow", "flimsy", "regret"),
    ("okay", "average", "acceptable", "mixed", "fine", "ordinary"),
    ("good", "solid", "pleasant", "useful", "reliable", "nice"),
    ("excellent", "perfect", "love", "superb", "brilliant", "best"),
)
# fmt: off
_FILLER = [
    "the", "a", "this", "that", "it", "was", "is", "and", "but", "with", "for", "my", "our", "very", "quite", "food",
    "room", "phone", "book", "staff", "service", "price", "box", "battery", "screen", "cable", "table", "light",
    "sound", "colour", "delivery", "came", "arrived", "looked", "worked", "felt", "made", "bought", "used", "after",
    "before", "again", "today", "yesterday", "week", "month", "one", "two",
]
# fmt: on
_PUNCTUATION = list(".,!?'\"-:;()/0123456789")


def words() -> list[str]:
    """Every word that `tiny_reviews` uses, in a fixed order."""
    return [word for tone in _TONE for word in tone] + _FILLER


def star_names(stars: int = 5) -> list[str]:
    """Label names in the style of the Hub's review sets: "1 star", "2 stars", ..."""
    return [f"{n} star" if n == 1 else f"{n} stars" for n in range(1, stars + 1)]


def tiny_reviews(n: int, seed: int = 0, stars: int = 5) -> list[dict[str, Any]]:
    """`n` rows of `text`, `stars` (int, 1 to `stars`, as even as can be) and `rating` (float, near `stars`).

    One row in seven holds a comma, quotes, an accent or a line break, so that a file format that mangles one is caught.
    """
    if not 2 <= stars <= len(_TONE):
        raise ValueError(f"stars must be 2 to {len(_TONE)}, not {stars}")
    rng = random.Random(seed)
    labels = [1 + i % stars for i in range(n)]
    rng.shuffle(labels)
    rows = []
    for index, label in enumerate(labels):
        tone = _TONE[round((label - 1) * (len(_TONE) - 1) / (stars - 1))]
        text = [rng.choice(_FILLER) for _ in range(rng.randint(3, 14))]
        for word in rng.sample(tone, rng.randint(2, 3)):
            text.insert(rng.randint(0, len(text)), word)
        body = " ".join(text)
        if index % 7 == 3:
            body = rng.choice((f'"{body}", they said', f"{body}, très bien", f"{body}\nand more; really"))
        rating = min(float(stars), max(1.0, label + rng.uniform(-0.4, 0.4)))
        rows.append({"text": body, "stars": label, "rating": round(rating, 2)})
    return rows


def _write_delimited(path: Path, rows: Sequence[Row], delimiter: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    return _write_delimited(path, rows, ",")


def write_tsv(path: Path, rows: Sequence[Row]) -> Path:
    return _write_delimited(path, rows, "\t")


def write_jsonl(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Row], class_labels: Mapping[str, Sequence[str]] | None = None) -> Path:
    """`class_labels` ({"stars": ["1 star", ...]}) goes into the schema's metadata, where `datasets` reads it."""
    path.write_bytes(parquet_bytes(rows, class_labels))
    return path


def parquet_bytes(rows: Sequence[Row], class_labels: Mapping[str, Sequence[str]] | None = None) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([dict(row) for row in rows])
    if class_labels:
        dtypes = {"string": "string", "int64": "int64", "double": "float64"}
        features: dict[str, Any] = {
            field.name: {"names": list(class_labels[field.name]), "_type": "ClassLabel"}
            if field.name in class_labels
            else {"dtype": dtypes[str(field.type)], "_type": "Value"}
            for field in table.schema
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def dataset_card(
    configs: Mapping[str, Mapping[str, str]],
    class_labels: Mapping[str, Sequence[str]] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> str:
    """README.md of a Hub data set: `configs` is {config: {split: path or glob}}.

    `class_labels` ({column: names}) and `dtypes` ({column: "string", ...}) become the `dataset_info` of every
    configuration; without them the card names no features and `datasets` infers them from the files.
    """
    lines = ["---"]
    if class_labels or dtypes:
        lines.append("dataset_info:")
        for config in configs:
            lines += [f"- config_name: {config}", "  features:"]
            for column, dtype in (dtypes or {}).items():
                lines += [f"  - name: {column}", f"    dtype: {dtype}"]
            for column, names in (class_labels or {}).items():
                lines += [f"  - name: {column}", "    dtype:", "      class_label:", "        names:"]
                lines += [f"          '{index}': {json.dumps(name)}" for index, name in enumerate(names)]
    lines.append("configs:")
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {json.dumps(path)}"]
    return "\n".join([*lines, "---", "", "# Synthetic reviews for tests", ""])


def tiny_model(
    folder: Path,
    arch: str = "bert",
    num_labels: int | None = None,
    hidden: int = 32,
    layers: int = 2,
    max_length: int = 128,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a checkpoint of `arch` ("bert", "roberta" or "distilbert") into `folder` and return `folder`.

    Without `num_labels` it is a headless encoder, as pretrained models are; with it, a sequence classifier.
    `dtype` ("float32", "bfloat16", "float16") is that of the stored weights. `hidden` is a multiple of 4.
    """
    import torch
    import transformers

    tokenizer = _tokenizer(arch, max_length)
    shape: dict[str, Any]
    if arch == "distilbert":
        shape = {"dim": hidden, "hidden_dim": 2 * hidden, "n_layers": layers, "n_heads": 4}
    else:
        shape = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
        }
    # RoBERTa numbers its positions from pad_token_id + 1.
    positions = max_length + (2 if arch == "roberta" else 0)
    if num_labels is not None:
        shape["num_labels"] = num_labels
    config = transformers.AutoConfig.for_model(
        arch,
        vocab_size=len(tokenizer),
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    family = transformers.AutoModel if num_labels is None else transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(**sections: Any) -> dict[str, Any]:
    """A recipe for `model` and `reviews.csv` beside it. A section's keys are added to its own; None leaves a key out."""
    merged: dict[str, Any] = {
        "name": "tiny",
        "model": "model",
        "data": {
            "files": {"all": "reviews.csv"},
            "text": "text",
            "label": "stars",
            "train": {"fraction": 0.8, "seed": 42},
            "eval": {"fraction": 0.2, "seed": 42},
        },
        "tokens": {"max_length": 64},
        "baselines": False,  # a process of some seconds at the end of every run
        "train": {"batch_size": 8, "learning_rate": 0.003, "log_every": 1},
    }
    for key, value in sections.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, Mapping) else value
        if isinstance(value, Mapping):
            merged[key] = {name: item for name, item in merged[key].items() if item is not None}
    return merged


def write_project(folder: Path, rows: int = 203, seed: int = 7, **sections: Any) -> Path:
    """Write model, `rows` reviews, the recipe of these sections and an empty scratch; returns the recipe's path."""
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    tiny_model(folder / "model")
    write_csv(folder / "reviews.csv", tiny_reviews(rows, seed))
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe(**sections), indent=1) + "\n", encoding="utf-8")
    return path


def tiny_tagger(folder: Path, seed: int = 0) -> Path:
    """A token classifier with the labels O, B-X and I-X, of `tiny_model`: it knows nothing, and is sure of it."""
    from safetensors.numpy import load_file, save_file

    tiny_model(folder, num_labels=3, seed=seed)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] *= 100
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["BertForTokenClassification"], "id2label": dict(enumerate(["O", "B-X", "I-X"]))}
    (folder / "config.json").write_text(json.dumps({**config, "word_units": "spaces"}))
    return folder


def _tokenizer(arch: str, max_length: int) -> Any:
    import transformers

    if arch == "roberta":
        from tokenizers.pre_tokenizers import ByteLevel

        tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
        merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("e", "r"), ("a", "n"), ("o", "u")]
        tokens += [left + right for left, right in merges] + ["<mask>"]
        vocab = {token: index for index, token in enumerate(tokens)}
        return transformers.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    classes = {"bert": transformers.BertTokenizer, "distilbert": transformers.DistilBertTokenizer}
    if arch not in classes:
        raise ValueError(f"arch must be bert, distilbert or roberta, not {arch!r}")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words(), *letters, *_PUNCTUATION]
    tokens += [f"##{letter}" for letter in letters]
    # "a" is both a word and a letter: the later duplicate goes, the numbering stays dense.
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return classes[arch](vocab=vocab, model_max_length=max_length)


def tagged_sentences(n: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """Words and IOB2 tags of `n` reviews: strong and weak words of their tone are entities, neighbours of one kind one of them."""
    kinds = {word: kind for tones, kind in (((0, 4), "STRONG"), ((1, 3), "WEAK")) for i in tones for word in _TONE[i]}
    rows = []
    for row in tiny_reviews(n, seed):
        sentence, tags = "".join(c if c.isalnum() else " " for c in row["text"]).split(), []
        for word in sentence:
            kind = kinds.get(word)
            tags.append("O" if kind is None else ("I-" if tags and tags[-1].endswith(kind) else "B-") + kind)
        rows.append((sentence, tags))
    return rows


def write_conll(path: Path, rows: Iterable[tuple[Sequence[str], Sequence[str]]]) -> Path:
    """A word and its tag a line, with another column between, as CoNLL-2003 has them."""
    sentences = ("".join(f"{word} NN {tag}\n" for word, tag in zip(*row, strict=True)) for row in rows)
    path.write_text("-DOCSTART- -X- O\n\n" + "\n".join(sentences), encoding="utf-8")
    return path
