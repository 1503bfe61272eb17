"""The tutorial's second way: a native PyTorch loop with accelerate, on data that afina prepared.

The data is read as `afina.worker.data.prepared` stores it: `<part>.tokens.npy` with the tokens of all rows in sequence,
`<part>.offsets.npy`, `<part>.labels.npy`, memory-mapped. Rows of similar length make a batch, padded to its longest; AdamW with a linear
schedule, clipping, accuracy after each epoch. Not covered: checkpoints, stopping, resuming.

    afina prefetch recipe.yaml                       (prints the path of the prepared data)
    python tests/bench/native.py --prepared FOLDER --model FOLDER
    torchrun --nproc_per_node 2 tests/bench/native.py --prepared FOLDER --model FOLDER --batch-size 4
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup


def load(folder: Path, part: str) -> tuple[Any, Any, Any]:
    """Tokens, offsets and labels of a part."""
    tokens, offsets, labels = (
        np.load(folder / f"{part}.{n}.npy", mmap_mode="r") for n in ("tokens", "offsets", "labels")
    )
    return tokens, offsets, labels


def batches(offsets: Any, size: int, seed: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """Rows of this rank's batches: shuffled, sorted by length in windows of 50 batches, batches shuffled."""
    draw = np.random.default_rng(seed)
    order, lengths = draw.permutation(len(offsets) - 1), np.diff(offsets)
    window = 50 * size * ranks
    windows = (order[i : i + window] for i in range(0, len(order), window))
    order = np.concatenate([rows[np.argsort(-lengths[rows], kind="stable")] for rows in windows])
    steps = [order[i : i + size * ranks] for i in range(0, len(order), size * ranks)]
    return [steps[i][rank::ranks].tolist() or [int(steps[i][0])] for i in draw.permutation(len(steps))]


def batch_of(data: tuple[Any, Any, Any], rows: list[int]) -> dict[str, Any]:
    """`input_ids`, `attention_mask` and `labels`, padded to the longest row; the padding token of BERT is 0."""
    tokens, offsets, labels = data
    texts = [tokens[offsets[row] : offsets[row + 1]].astype(np.int64) for row in rows]
    ids = np.zeros((len(rows), max(map(len, texts))), np.int64)
    mask = np.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": np.array(labels[rows])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", required=True, type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="per process")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    # `cpu=True`: otherwise several processes on CPUs each believe they are alone.
    accelerator = Accelerator(cpu=not gpu, mixed_precision="bf16" if options.bf16 else "no")
    set_seed(options.seed)
    train, test = load(options.prepared, "train"), load(options.prepared, "eval")
    names = json.loads((options.prepared / "manifest.json").read_text())["labels"]
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(names), dtype=torch.float32
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    steps = options.epochs * len(batches(train[1], options.batch_size, 0, rank, ranks))
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)

    def tensors(rows: list[int], data: tuple[Any, Any, Any]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(a).to(accelerator.device) for name, a in batch_of(data, rows).items()}

    began, evaluating, accuracy = time.perf_counter(), 0.0, 0.0
    for epoch in range(options.epochs):
        model.train()
        for rows in batches(train[1], options.batch_size, options.seed + epoch, rank, ranks):
            accelerator.backward(model(**tensors(rows, train)).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        since = time.perf_counter()
        model.eval()
        order = np.argsort(-np.diff(test[1]), kind="stable")
        chunks = [order[i : i + 32].tolist() for i in range(0, len(order), 32)][rank::ranks]
        right = torch.zeros(1, device=accelerator.device)
        with torch.inference_mode():
            for rows in chunks:
                batch = tensors(rows, test)
                right += (accelerator.unwrap_model(model)(**batch).logits.argmax(-1) == batch["labels"]).sum()
        accuracy = float(accelerator.reduce(right)) / len(order)
        evaluating += time.perf_counter() - since
        accelerator.print(f"epoch {epoch + 1}: accuracy {accuracy:.4f}")
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "evaluation_seconds": evaluating, "steps": steps, "accuracy": accuracy}
    found["gpu_bytes"] = torch.cuda.max_memory_allocated() if gpu else 0
    accelerator.print(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
