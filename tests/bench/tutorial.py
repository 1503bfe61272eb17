"""The Transformers tutorial's own code as a script, to compare afina with.

Reads two CSV files instead of `yelp_review_full`, and a model folder instead of `google-bert/bert-base-cased`; all else is the
tutorial's: shuffle and select, padding to the maximum length, `Trainer`, accuracy after each epoch (and macro-F1). Writes the loss of every
step as JSON Lines.

`--best` is Trainer with the options that help most for the same recipe: padding to the longest text of a batch, batches of similar
length (AdamW is fused by default). `--pad-to-batch` changes the padding alone, with the tutorial's batches. `--bf16` is for devices that are
fast in it. Several processes: `torchrun`, with a smaller batch size each.

    python tests/bench/tutorial.py --train train.csv --eval eval.csv --model FOLDER --out steps.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--label", default="stars")
    parser.add_argument("--sample", type=int, default=1000, help="rows of each part, shuffled; 0: all in their order")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--batch-size", type=int, default=8, help="per process")
    parser.add_argument("--best", action="store_true", help="Trainer's best options instead of the tutorial's")
    parser.add_argument("--pad-to-batch", action="store_true", help="pad to the longest of the batch only")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    options = parser.parse_args()
    by_batch = options.best or options.pad_to_batch

    import numpy as np
    import torch
    from datasets import load_dataset
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    dataset = load_dataset("csv", data_files={"train": options.train, "test": options.eval}, keep_default_na=False)
    names = sorted(set(dataset["train"][options.label]))
    dataset = dataset.map(lambda row: {"labels": names.index(row[options.label])})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenized = dataset.map(
        lambda rows: tokenizer(
            rows["text"],
            padding=False if by_batch else "max_length",
            truncation=True,
            max_length=options.max_length,
        ),
        batched=True,
    )
    train, test = tokenized["train"], tokenized["test"]
    if options.sample:
        train, test = (part.shuffle(seed=42).select(range(min(options.sample, len(part)))) for part in (train, test))

    gpu = torch.cuda.is_available()
    set_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(names), dtype="float32")
    arguments = TrainingArguments(
        output_dir=str(options.out.with_suffix(".trainer")),
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        train_sampling_strategy="group_by_length" if options.best else "random",
        ddp_backend="gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not gpu else None,
        seed=options.seed,
        report_to="none",
        use_cpu=not gpu,
        bf16=options.bf16,
        disable_tqdm=True,
    )

    def compute_metrics(output: Any) -> dict[str, float]:
        logits, labels = output
        chosen = np.argmax(logits, axis=-1)
        macro = f1_score(labels, chosen, average="macro")
        return {"accuracy": float(accuracy_score(labels, chosen)), "f1": float(macro)}

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=compute_metrics,
        **({"data_collator": DataCollatorWithPadding(tokenizer)} if by_batch else {}),
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    if not trainer.is_world_process_zero():
        return
    with options.out.open("w") as out:
        for line in trainer.state.log_history:
            out.write(json.dumps(line) + "\n")
    evaluations = [line for line in trainer.state.log_history if "eval_runtime" in line]
    found = {
        "seconds": round(seconds, 2),
        "steps": trainer.state.global_step,
        "evaluation_seconds": round(sum(line["eval_runtime"] for line in evaluations), 2),
        "accuracy": evaluations[-1]["eval_accuracy"],
        "f1": evaluations[-1]["eval_f1"],
        "gpu_bytes": torch.cuda.max_memory_allocated() if gpu else 0,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
