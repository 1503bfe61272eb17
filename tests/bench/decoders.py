"""Decoders: packed against grouped steps per architecture; and LoRA on SmolLM2-135M beside plain peft + Trainer and MiniLM trained whole.

`packing` times training steps (forward and backward, random weights, hidden size 256, four layers) on texts of Yelp-like lengths, packed and
grouped by length in turns, and prints real tokens per second and their ratio. `lora` trains on real reviews (AFINA_TEST_DATA): `afina train` with
a LoRA recipe and with all weights, the same LoRA through peft and Trainer, and MiniLM with all weights; it prints accuracy, macro-F1, real tokens per second,
peak memory and the size of a checkpoint, mean and spread over seeds.

    python tests/bench/decoders.py packing [--architectures llama gpt2 …] [--rounds 3]
    AFINA_TEST_DATA=… python tests/bench/decoders.py lora [--rows 800] [--seeds 1 2 3] [--json found.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.bench import measuring, reviews
from tests.smollm2 import smollm2_folder

_ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "smollm3",
    "eurobert, mean",
    "gte",
    "deberta-v3",
)
_PEERS = ("afina", "peft", "full", "minilm")
_RATE = {"smollm2": 1e-3, "full": 5e-5, "minilm": 5e-5}


def packing(options: argparse.Namespace) -> None:
    import torch
    from tests.unit.compute.encoders import OTHERS, PAD, model_of, split_of, step

    from afina.worker.compute import attention, packed_model
    from afina.worker.compute.batches import epoch_steps

    torch.set_num_threads(options.threads)
    draw = np.random.default_rng(0)
    rows, batch = options.batches * 50, options.batch_size
    lengths = np.clip(np.round(draw.lognormal(np.log(130), 0.75, rows * batch // 50)), 4, 512).astype(np.int64)
    print("| architecture | packed, tokens/s | grouped, tokens/s | ratio |\n|---|---|---|---|")
    for name in options.architectures:
        size = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
        size |= {"head_dim": 64} if "head_dim" in OTHERS[name] else {}
        size |= {"sliding_window": 256} if "sliding_window" in OTHERS[name] else {}
        if name == "gpt2":
            size = {"n_embd": 256, "n_layer": 4, "n_head": 4}
        size |= {"position_buckets": 256, "max_relative_positions": 512} if name == "deberta-v3" else {}
        about = {**OTHERS[name], **size, "max_position_embeddings": 512}
        models = {way: model_of(about).train() for way in ("packed", "grouped")}
        split = split_of(lengths.tolist(), 0, types=False)
        packed_model.enable_packing(models["packed"], attention.FAST)
        plans = {way: epoch_steps(lengths, batch, 1, 0, way) for way in models}  # type: ignore[arg-type]
        rates: dict[str, list[float]] = {way: [] for way in models}
        for turn in range(options.rounds + 1):
            for way, model in models.items():
                collate = packed_model.collator(model, split, way, PAD)  # type: ignore[arg-type]
                began, tokens = time.perf_counter(), 0
                for chosen in plans[way][: options.batches]:
                    ordered = chosen[np.argsort(-lengths[chosen], kind="stable")]
                    step(model, collate(ordered.tolist()))
                    tokens += int(lengths[chosen].sum())
                if turn:  # the first warms up
                    rates[way].append(tokens / (time.perf_counter() - began))
        ratio = statistics.median(p / g for p, g in zip(rates["packed"], rates["grouped"], strict=True))
        print(
            f"| {name} | {measuring.ranged(rates['packed'], ',.0f')} | {measuring.ranged(rates['grouped'], ',.0f')} | {ratio:.2f} |"
        )


def lora(options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as space:
        folder = Path(space)
        train, test = reviews.write_parts(folder, "short", options.rows)
        for seed in options.seeds:
            for peer in options.peers:
                found.setdefault(peer, []).append(_train(peer, folder, train, test, seed, options))
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1))
    keys = ("accuracy", "macro_f1", "tokens_per_second", "memory_mb", "checkpoint_mb")
    print(f"| | {' | '.join(keys)} |\n|---|{'---|' * len(keys)}")
    for peer, each in found.items():
        print(f"| {peer} | {' | '.join(measuring.ranged([one[key] for one in each], ',.4g') for key in keys)} |")


def _train(
    peer: str, folder: Path, train: Path, test: Path, seed: int, options: argparse.Namespace
) -> dict[str, float]:
    """One training; its scores on `test`, and what it used."""
    kind = "minilm" if peer == "minilm" else "smollm2"
    model = smollm2_folder(options.layers) if kind == "smollm2" else reviews.model_for("minilm", folder)
    out = folder / f"{peer}-{seed}"
    environment = measuring.environment_of(folder, options.threads)
    if peer == "peft":
        argv = [
            sys.executable,
            __file__,
            "--batch-size",
            str(options.batch_size),
            "--threads",
            str(options.threads),
            "peft",
        ]
        argv += [str(model), str(train), str(test), str(out), "--seed", str(seed), "--epochs", str(options.epochs)]
        done = measuring.measured(argv, environment)
        return {**json.loads(done.out.splitlines()[-1]), "memory_mb": done.memory / 1e6}
    recipe: dict[str, Any] = {
        "name": peer,
        "baselines": False,
        "model": str(model),
        "task": "single-label",
        "data": {"files": {"train": str(train), "eval": str(test)}, "text": "text", "label": "stars"},
        "tokens": {"max_length": 256},
        "train": {
            "batch_size": options.batch_size,
            "epochs": options.epochs,
            "learning_rate": _RATE.get(peer, _RATE[kind]),
            "seed": seed,
            "keep": "last",
            "precision": "fp32",
        },
        "metrics": ["accuracy", "f1"],
    }
    if peer == "afina":
        recipe["adapter"] = {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.05, "targets": "auto"}
        recipe["train"]["base_dtype"] = "bf16"
    path = folder / f"{peer}.yaml"
    path.write_text(json.dumps(recipe))
    done = measuring.measured([*measuring.AFINA, "train", str(path), "--run", str(out)], environment)
    outcome = json.loads((out / "outcome.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "eval_accuracy" in line][-1]
    checkpoint = next((out / "checkpoints").glob("step-*"))
    return {
        "accuracy": scores["eval_accuracy"],
        "macro_f1": scores["eval_f1"],
        "tokens_per_second": outcome["utilisation"]["tokens_per_second"],
        "memory_mb": done.memory / 1e6,
        "checkpoint_mb": sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()) / 1e6,
    }


def plain_peft(options: argparse.Namespace) -> None:
    """The same settings by hand: peft, Trainer, its collator with padding."""
    import peft
    import torch
    import transformers
    from datasets import load_dataset
    from sklearn.metrics import accuracy_score, f1_score

    torch.set_num_threads(options.threads)
    transformers.set_seed(options.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    data = load_dataset("csv", data_files={"train": options.train, "test": options.test})
    names = sorted(set(data["train"]["stars"]))

    def encode(batch: Any) -> Any:
        labels = [names.index(value) for value in batch["stars"]]
        return {**tokenizer(batch["text"], truncation=True, max_length=256), "labels": labels}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(names), dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    config = peft.LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.05)
    trainer = transformers.Trainer(
        model=peft.get_peft_model(model, config),
        args=transformers.TrainingArguments(
            options.out,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=_RATE["smollm2"],
            seed=options.seed,
            save_strategy="epoch",
            save_total_limit=1,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=data["train"],
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    seconds = trainer.train().metrics["train_runtime"]
    output = trainer.predict(data["test"])
    decided, checkpoint = output.predictions.argmax(-1), next(Path(options.out).glob("checkpoint-*"))
    tokens = sum(map(len, data["train"]["input_ids"])) * options.epochs
    found = {
        "accuracy": accuracy_score(output.label_ids, decided),
        "macro_f1": f1_score(output.label_ids, decided, average="macro"),
        "tokens_per_second": tokens / seconds,
        "checkpoint_mb": sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()) / 1e6,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("packing")
    one.add_argument("--architectures", nargs="+", choices=_ARCHITECTURES, default=list(_ARCHITECTURES))
    one.add_argument("--batches", type=int, default=6)
    one.add_argument("--rounds", type=int, default=3)
    one.set_defaults(run=packing)
    two = parts.add_parser("lora")
    two.add_argument("--rows", type=int, default=800, help="for training, and as many for evaluation")
    two.add_argument("--epochs", type=int, default=2)
    two.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    two.add_argument("--peers", nargs="+", choices=_PEERS, default=list(_PEERS))
    two.add_argument("--layers", type=int, default=None, help="of SmolLM2; by default all 30")
    two.add_argument("--json", type=Path)
    two.set_defaults(run=lora)
    three = parts.add_parser("peft")
    for name in ("model", "train", "test", "out"):
        three.add_argument(name)
    three.add_argument("--seed", type=int, default=1)
    three.add_argument("--epochs", type=int, default=2)
    three.set_defaults(run=plain_peft)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
