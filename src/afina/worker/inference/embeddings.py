"""Frozen embeddings of the run's pretrained model with logistic regression (ridge for regressions): a simple model beside the fine-tuned one.

An embedding is the mean of the last layer's vectors over all tokens of a text, for encoders and decoders alike (of an encoder-decoder its encoder's); of
windows the mean of theirs. The weights are those before training, without adapter; each feature is standardised on train. Rows are embedded in a
stratified order until all are done or the time is over: what is not embedded is left out, on eval and test too. In bfloat16 on a GPU that has it, else float32.

Not covered: models that need rows of equal lengths.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from afina.errors import EnvironmentProblem, InputError
from afina.recipe.schema import Recipe
from afina.text import size_in_words
from afina.worker.compute import attention
from afina.worker.compute.batches import TOKENS_PER_ROW, Collator, EvalBatches
from afina.worker.compute.cpu import free_memory
from afina.worker.compute.packing import pool
from afina.worker.data.linear_model import SimpleModel, fit_linear, kind_of, stratified_order
from afina.worker.data.prepared import Split
from afina.worker.model.adapters import weights_folder
from afina.worker.model.head import build_model
from afina.worker.model.padding import needs_equal_lengths, padding_side, set_pad_token

__all__ = ["Embedder", "fit_embeddings"]

Array = np.ndarray[Any, Any]

#: Values of the embeddings of a split (200 MB), and those times labels in the regression (20 s on two cores).
_MOST_VALUES, _MOST_CELLS = 50_000_000, 1_000_000_000
#: Fewer rows of a split than this, where it has more, say nothing.
_LEAST_ROWS = 100
#: Rows that are embedded to learn how fast it is; after them as many as take this long, in seconds.
_FIRST_ROWS, _BLOCK_S = 16, 2.0
_BATCH_ROWS = 32
#: Features where the configuration names them otherwise.
_WIDTH = 1024


class Embedder:
    """The body of a run's pretrained model.

    Attributes:
        width: features of an embedding.

    Args:
        folder: of the model.
        manifest: of the prepared data.

    Raises:
        EnvironmentProblem: there is too little memory.
        InputError: the model needs rows of equal lengths.
    """

    def __init__(self, recipe: Recipe, folder: Path, manifest: Mapping[str, Any], device: str) -> None:
        self.device = torch.device(device)
        # In float32, of files that may hold half as many bytes; and once more while they are read.
        needed, free = (
            3 * sum(file.stat().st_size for file in weights_folder(folder).glob("*.safetensors")),
            free_memory(),
        )
        if needed > free:
            raise EnvironmentProblem(f"{size_in_words(needed)} of memory may be needed, {size_in_words(free)} are free")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        plain = recipe.model_copy(update={"adapter": None, "train": recipe.train.model_copy(update={"freeze": None})})
        labels = manifest["labels"], manifest["num_labels"]
        model, _ = build_model(plain, folder, manifest["task"], *labels)
        if (why := needs_equal_lengths(model)) is not None:
            raise InputError(f"rows of unequal lengths cannot share a batch ({why})")
        attention.disable_cudnn_sdpa(self.device)
        self._pad, self._side = manifest["pad_token_id"], padding_side(model, manifest.get("padding_side", "right"))
        set_pad_token(model, self._pad)
        body = model.base_model
        body = body.get_encoder() if model.config.is_encoder_decoder else body
        if getattr(body.config, "use_cache", False):
            body.config.use_cache = False
        in_half = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.width = int(getattr(body.config, "hidden_size", None) or _WIDTH)
        self._body = body.to(self.device, torch.bfloat16 if in_half else torch.float32).eval()
        self._rate = 0.0

    def embed(self, split: Split, order: Array, deadline: float) -> Array:
        """Embeddings of the first rows of `order`, float32 (N, F): as many as are done at `deadline` (`time.monotonic`)."""
        ends, blocks, done = np.cumsum(split.lengths[order]), [np.empty((0, 0), np.float32)], 0
        while done < len(order) and (left := deadline - time.monotonic()) > 0:
            before = int(ends[done - 1]) if done else 0
            room = before + self._rate * min(left, _BLOCK_S)
            stop = int(np.searchsorted(ends, room, side="right")) if self._rate else _FIRST_ROWS
            stop = min(max(stop, done + 1), len(order))
            began = time.monotonic()
            blocks.append(self._embed(split.take(order[done:stop])))
            self._rate = (int(ends[stop - 1]) - before) / max(1e-6, time.monotonic() - began)
            done = stop
        return np.concatenate(blocks[1:] or blocks)

    @torch.inference_mode()
    def _embed(self, split: Split) -> Array:
        """Of all rows of a split."""
        collate = Collator(split, self._pad, side=self._side)
        parts, rows = [], []
        batches = EvalBatches(split.lengths, _BATCH_ROWS, 0, 1, _BATCH_ROWS * TOKENS_PER_ROW)
        for some in batches:
            batch = collate(some)
            del batch["labels"]
            windows = batch.pop("windows", None)
            inputs = {name: value.to(self.device) for name, value in batch.items()}
            vectors = self._body(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            means = (vectors * mask).sum(1) / mask.sum(1)
            parts.append(means if windows is None else pool(means, windows.to(self.device), "mean"))
            rows += some
        embeddings: Array = torch.cat(parts)[torch.from_numpy(np.argsort(rows)).to(self.device)].cpu().numpy()
        if not np.isfinite(embeddings).all():
            raise InputError("the pretrained model's vectors are not finite")
        return embeddings


def fit_embeddings(
    embedder: Embedder, task: str, splits: dict[str, Split], width: int, limit_s: float, seed: int = 0
) -> SimpleModel:
    """Embed, train on `train`, predict the other splits.

    Args:
        width: the number of labels, 1 for a regression.
        limit_s: to embed; the regression comes on top. A quarter for each of eval and test, the rest for train.

    Raises:
        EnvironmentProblem: too few rows were embedded.
    """
    began, features, rows, cut = time.monotonic(), {}, {}, False
    for quarter, name in [*enumerate((name for name in splits if name != "train"), 1), (4, "train")]:
        split, labels = splits[name], width if name == "train" and width > 2 else 1
        most = max(1, min(_MOST_VALUES, _MOST_CELLS // labels) // embedder.width)
        order = stratified_order(task, np.asarray(split.labels), seed)[:most]
        features[name] = found = embedder.embed(split, order, began + limit_s * quarter / 4)
        rows[name], cut = order[: len(found)], cut or len(found) < len(order)
        if len(found) < min(_LEAST_ROWS, len(split)):
            raise EnvironmentProblem(
                f"{len(found):,} of {len(split):,} rows of {name} were embedded in {max(0, limit_s):.0f} s"
            )
    train = features.pop("train")
    mean, deviation = (getattr(np, how)(train, axis=0, dtype=np.float64).astype(np.float32) for how in ("mean", "std"))
    deviation[deviation == 0] = 1

    def standardised(values: Array) -> Array:
        scaled: Array = (values - mean) / deviation
        return scaled

    model = fit_linear(task, standardised(train), splits["train"].take(rows["train"]), width)
    logits, samples = {}, {}
    for name, values in features.items():
        whole = len(values) == len(splits[name])
        back = np.argsort(rows[name])
        logits[name] = model(standardised(values))[back]
        if not whole:
            samples[name] = rows[name][back]
    seconds = round(time.monotonic() - began, 2)
    about = f"frozen embeddings and {kind_of(task)}", "over the mean of the last layer's vectors before training"
    counts = len(train), len(splits["train"])
    return SimpleModel(*about, *counts, seconds, logits, limit_s if cut else None, samples)
