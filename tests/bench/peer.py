"""A plain `Trainer` that saves checkpoints and resumes from the last one, to compare afina with.

What a good user writes: `save_steps`, at most two checkpoints, `get_last_checkpoint` on every start, and a line of JSON per
log. `--jit` adds `enable_jit_checkpoint`. The data is a CSV file with a column of text and one of labels.

    python tests/bench/peer.py --csv reviews.csv --model FOLDER --out FOLDER [--save-steps 20] [--jit]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import load_dataset
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


class Log(TrainerCallback):  # type: ignore[misc]
    """A line of JSON for each log, appended."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            with (Path(args.output_dir) / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--label", default="stars")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="per process")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--save-steps", type=int, default=20, help="0: no saving")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--jit", action="store_true")
    options = parser.parse_args()

    rows = load_dataset("csv", data_files=options.csv, split="train").select_columns(["text", options.label])
    names = sorted(set(rows[options.label]))
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(batch: Any) -> Any:
        labels = [names.index(value) for value in batch[options.label]]
        return {**tokenizer(batch["text"], truncation=True, max_length=options.max_length), "labels": labels}

    parts = rows.map(encode, batched=True, remove_columns=rows.column_names).train_test_split(test_size=0.1, seed=42)

    set_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(names), dtype="float32")
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 1,
        save_total_limit=2,
        enable_jit_checkpoint=options.jit,
        eval_strategy="epoch",
        logging_steps=1,
        seed=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda output: {"accuracy": accuracy_score(output[1], output[0].argmax(-1))},
        callbacks=[Log()],
    )
    options.out.mkdir(parents=True, exist_ok=True)
    newest = get_last_checkpoint(str(options.out))
    print(f"resuming from {newest}" if newest else "starting afresh", flush=True)
    trainer.train(resume_from_checkpoint=newest)
    trainer.save_model(str(options.out / "model"))


if __name__ == "__main__":
    main()
