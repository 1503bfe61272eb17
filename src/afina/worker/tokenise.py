"""Examples to prepared data: tokenised batch by batch into arrays that grow on disk, sealed, published.

Memory stays that of the texts and one batch of tokens. What is written where: see `afina.worker.store`.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from afina.errors import DataError, EnvironmentProblem, InputError
from afina.plan import Plan
from afina.worker import store
from afina.worker.disk import readable_size
from afina.worker.pretrained import load_tokenizer
from afina.worker.publish import publish, staging

__all__ = ["build"]

_BATCH = 1000
_TRUNCATED_SHARE = 0.01
#: Bytes for each token while it is estimated how much room is needed: its id, and as much again for slack.
_BYTES_PER_TOKEN = 4

Say = Callable[[str], None]


def build(
    plan: Plan,
    folder: Path,
    found: tuple[Any, dict[str, Any], list[str]],
    final: Path,
    content: Mapping[str, Any],
    say: Say,
) -> dict[str, Any]:
    """Tokenise `found` (labels, examples by part, warnings) and publish it at `final`; returns the manifest.

    Args:
        folder: the model's, for its tokenizer and vocabulary.
        content: what the digest in `final`'s name is over.

    Raises:
        DataError: a text of which the tokenizer makes nothing.
        EnvironmentProblem: the file system has less room than the estimate.
        InputError: the tokenizer gives tokens that the model does not have.
    """
    recipe = plan.recipe
    labels, parts, warnings = found
    tokenizer = load_tokenizer(folder, recipe)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with staging(final) as aside:
        _check_room(plan.site.prepared, parts, recipe.tokens.max_length)
        splits = {}
        progress = _Progress(sum(len(e) for e in parts.values()), say)
        with progress:
            for part, examples in parts.items():
                splits[part], truncated = _tokenise(
                    aside, part, examples, tokenizer, recipe.tokens.max_length, config, progress
                )
                _write_rows(aside, part, examples)
                if truncated / len(examples) > _TRUNCATED_SHARE:
                    warnings.append(
                        f"{truncated:,} of {len(examples):,} texts of {part} ({truncated / len(examples):.1%}) are longer "
                        f"than tokens.max_length {recipe.tokens.max_length} and were cut"
                    )
        tokenizer.save_pretrained(aside / "tokenizer")
        about = {
            "digest": final.name,
            "task": labels.task,
            "labels": list(labels.names) if labels.names is not None else None,
            "num_labels": len(labels.names) if labels.names is not None else 1,
            "text_columns": list(recipe.data.text),
            "source": content["source"],
            "max_length": recipe.tokens.max_length,
            "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            "splits": splits,
            "warnings": warnings,
            "made_with": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "numpy")},
            "content": content,
        }
        store.seal(aside, about)
        if not publish(aside, final, store.is_whole):
            say(f"another process prepared {final.name[:8]} at the same time; its work is taken")
    return store.load_manifest(final)


def _tokenise(
    aside: Path,
    part: str,
    examples: Any,
    tokenizer: Any,
    max_length: int,
    config: Mapping[str, Any],
    progress: _Progress,
) -> tuple[dict[str, int], int]:
    """Write the arrays of a part; returns what the manifest says of it, and the number of texts that were cut."""
    size = config.get("vocab_size")
    dtype = np.uint16 if max(len(tokenizer), size if isinstance(size, int) else 0) <= 1 << 16 else np.uint32
    lengths = np.zeros(len(examples), np.int64)
    truncated, any_type = 0, False
    types_file = aside / f"{part}.types.npy"
    with (
        store.ArrayWriter(aside / f"{part}.tokens.npy", dtype) as tokens,
        store.ArrayWriter(types_file, np.uint8) as types,
    ):
        for start in range(0, len(examples), _BATCH):
            texts = examples.texts.slice(start, _BATCH).to_pylist()
            pairs = examples.pairs.slice(start, _BATCH).to_pylist() if examples.pairs is not None else None
            batch = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False)
            ids = batch["input_ids"]
            lengths[start : start + len(ids)] = [len(row) for row in ids]
            flat = np.fromiter((i for row in ids for i in row), np.int64)
            empty = next((i for i, row in enumerate(ids) if not row), None)
            if empty is not None:
                raise DataError(
                    f"{part}: {examples.table.where(start + empty)}: the tokenizer makes no token of this text",
                    "remove this row",
                )
            if isinstance(size, int) and flat.max() >= size:
                raise InputError(
                    f"model: its tokenizer gives token {flat.max()}, its config has vocab_size {size}",
                    "tokenizer and weights do not belong together: take both from one model",
                )
            tokens.append(flat)
            if "token_type_ids" in batch:
                flat_types = np.fromiter((i for row in batch["token_type_ids"] for i in row), np.uint8)
                types.append(flat_types)
                any_type |= bool(flat_types.any())
            truncated += _count_truncated(batch, ids, max_length)
            progress.advance(len(ids))
    if not any_type:
        types_file.unlink()
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    np.save(aside / f"{part}.offsets.npy", offsets)
    np.save(aside / f"{part}.labels.npy", np.ascontiguousarray(examples.labels))
    return {"rows": len(examples), "tokens": int(offsets[-1]), "longest": int(lengths.max())}, truncated


def _count_truncated(batch: Any, ids: list[list[int]], max_length: int) -> int:
    encodings = getattr(batch, "encodings", None)
    full = [i for i, row in enumerate(ids) if len(row) >= max_length]
    return sum(1 for i in full if encodings is None or encodings[i].overflowing)


def _write_rows(aside: Path, part: str, examples: Any) -> None:
    """Where each row came from: `row` (see `afina.worker.tables`), `file`, `id`; the text of eval and test rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = examples.table
    columns = {
        "row": pa.array(table.row, pa.int64()),
        "file": pa.DictionaryArray.from_arrays(
            pa.array(table.source, pa.int32()), pa.array(table.sources, pa.string())
        ),
    }
    if examples.ids is not None:
        columns["id"] = examples.ids
    if part != "train":
        columns["text"] = examples.texts
        if examples.pairs is not None:
            columns["text_pair"] = examples.pairs
    pq.write_table(pa.table(columns), aside / f"{part}.rows.parquet", compression="zstd")


def _check_room(folder: Path, parts: Mapping[str, Any], max_length: int) -> None:
    """Refuse before writing where the file system has less room than the estimate: a token for every three bytes of text."""
    needed = 1 << 20
    for part, examples in parts.items():
        columns = [column for column in (examples.texts, examples.pairs) if column is not None]
        size = sum(column.nbytes for column in columns)
        needed += _BYTES_PER_TOKEN * min(size // 3 + 3 * len(examples), len(examples) * max_length)
        needed += 0 if part == "train" else size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentProblem(
            f"{folder}: about {readable_size(needed)} are needed, {readable_size(free)} are free",
            "remove old runs and prepared data there, or point AFINA_SCRATCH at a larger file system",
        )


class _Progress:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, total: int, say: Say) -> None:
        self.total, self.say, self.done = total, say, 0
        self._started = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("tokenising"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.add_task("tokenising", total=self.total)
            self._bar.start()
        return self

    def advance(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            rate = self.done / (self._last - self._started)
            self.say(f"tokenised {self.done:,} of {self.total:,} texts, {rate:,.0f} per second")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
