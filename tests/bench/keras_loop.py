"""The tutorial's third way, Keras `fit`: on the torch backend, with keras-hub's BERT, on data that afina prepared.

keras-hub reads the same `model.safetensors` and gets token ids, not texts: its own tokenizers need TensorFlow. pip would install
TensorFlow all the same (keras-hub requires tensorflow-text), so:

    pip install keras h5py absl-py namex optree ml-dtypes sentencepiece && pip install --no-deps keras-hub
    python tests/bench/keras_loop.py --prepared FOLDER --model FOLDER

Not covered: its GELU is the tanh approximation (pooled outputs of MiniLM differ by 4e-4 from Transformers'), and `fit` on the torch
backend is for one process; it has no `ModelParallel` or `DataParallel` yet.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import keras_hub
import numpy as np
from native import batch_of, batches, load  # type: ignore[import-not-found]


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches of similar length, new ones in every epoch; sorted ones for an evaluation."""

    def __init__(self, data: tuple[Any, Any, Any], size: int, seed: int, *, train: bool) -> None:
        super().__init__()
        self.data, self.size, self.seed, self.train = data, size, seed, train
        order = np.argsort(-np.diff(data[1]), kind="stable")
        self.rows = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        self.on_epoch_begin()

    def on_epoch_begin(self) -> None:
        if self.train:
            self.rows = batches(self.data[1], self.size, self.seed)
            self.seed += 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        batch = batch_of(self.data, self.rows[number])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return {"token_ids": ids, "padding_mask": mask, "segment_ids": np.zeros_like(ids)}, batch["labels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", required=True, type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    options = parser.parse_args()

    keras.utils.set_random_seed(options.seed)
    train, test = load(options.prepared, "train"), load(options.prepared, "eval")
    names = json.loads((options.prepared / "manifest.json").read_text())["labels"]
    backbone = keras_hub.models.BertBackbone.from_preset(
        options.model, dtype="mixed_bfloat16" if options.bf16 else "float32"
    )
    task = keras_hub.models.BertTextClassifier(backbone, num_classes=len(names), preprocessor=None, dropout=0.1)
    model = keras.Model(
        task.inputs, task.outputs[0]
    )  # the task's own `fit` needs texts, and tf.data or grain to read them
    rows = Batches(train, options.batch_size, options.seed, train=True)
    steps = options.epochs * len(rows)
    model.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.PolynomialDecay(options.learning_rate, steps, 0.0),
            weight_decay=0.0,
            global_clipnorm=1.0,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    evaluating = [0.0, 0.0]

    class Timed(keras.callbacks.Callback):  # type: ignore[misc]
        def on_test_begin(self, logs: Any = None) -> None:
            evaluating[1] = time.perf_counter()

        def on_test_end(self, logs: Any = None) -> None:
            evaluating[0] += time.perf_counter() - evaluating[1]

    began = time.perf_counter()
    history = model.fit(
        rows, epochs=options.epochs, validation_data=Batches(test, 32, 0, train=False), callbacks=[Timed()], verbose=2
    )
    found = {
        "seconds": time.perf_counter() - began,
        "evaluation_seconds": evaluating[0],
        "steps": steps,
        "accuracy": history.history["val_accuracy"][-1],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
