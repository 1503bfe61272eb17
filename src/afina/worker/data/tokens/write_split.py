"""Token shards to one split of prepared data: the arrays and `rows.parquet`, in the split's order.

Memory is that of one shard. A split in the order of its source is written straight on; one in another order (a `sample` is
shuffled) is first spooled in the source's order, then read back row by row.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from afina.recipe.keys.train_keys import Tokens
from afina.statistics.entities import entities
from afina.worker.data.prepared import ArrayWriter
from afina.worker.data.splits.duplicates import row_keys
from afina.worker.data.tables.data_table import Examples, list_places
from afina.worker.data.tables.words import TaggedWords, find_pieces
from afina.worker.data.tokens.shards import Shard, ShardFolder
from afina.worker.task.word_places import CUT

__all__ = ["TEXTS", "TokenStats", "write_split"]

Array = np.ndarray[Any, Any]
#: Some rows. By name: values of all rows, one after the other, and how many each row has, int64 (N,).
Block = Mapping[str, tuple[Array, Array]]

#: Names of the texts in a shard and in `rows.parquet`: the text, the second text of a pair.
TEXTS = ("text", "text_pair")
#: Bytes of a block that is read back from a spool, and of texts in a row group of `rows.parquet`.
_BLOCK_BYTES = 8 << 20
_TRUNCATED_SHARE = 0.01
_UNKNOWN_SHARE = 0.1


@dataclass
class TokenStats:
    """Counts over the tokens of a split, for warnings.

    Attributes:
        special: ids of special tokens, which no text makes.
        unknown_id: of the token for what the vocabulary lacks; None if there is none.
        cut: texts that were longer than allowed.
        unknown: unknown tokens.
        content: tokens that are not special.
        bare: index in the split of each text that has special tokens only.
    """

    special: Array
    unknown_id: int | None
    cut: int = 0
    unknown: int = 0
    content: int = 0
    rows: int = 0
    bare: list[int] = field(default_factory=list)

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> TokenStats:
        unknown = tokenizer.unk_token_id
        return cls(np.array([i for i in tokenizer.all_special_ids if i != unknown], np.int64), unknown)

    def add(self, block: Block) -> None:
        """Count the next rows of the split."""
        tokens, lengths = block["tokens"]
        counted = ~np.isin(tokens, self.special)
        if self.unknown_id is not None:
            self.unknown += int(np.count_nonzero(tokens == self.unknown_id))
        self.content += int(np.count_nonzero(counted))
        self.cut += int(block["cut"][0].sum())
        before, ends = np.concatenate([[0], np.cumsum(counted)]), np.cumsum(lengths)
        each = before[ends] - before[ends - lengths]  # not reduceat, which cannot sum nothing
        self.bare += (np.flatnonzero(each == 0) + self.rows).tolist()
        self.rows += len(lengths)

    def warnings(self, split: str, examples: Examples, tokenizer: Any, tokens: Tokens) -> Iterator[str]:
        """Texts cut, texts without content, tokens unknown to the model."""
        share = self.cut / len(examples)
        if tokens.windows is not None and self.cut:
            yield f"{self.cut:,} of {len(examples):,} texts of {split} ({share:.1%}) were cut {tokens.cut}: tokens.windows.max_windows"
        elif share > _TRUNCATED_SHARE:
            yield (
                f"{self.cut:,} of {len(examples):,} texts of {split} ({share:.1%}) are longer "
                f"than tokens.max_length {tokens.max_length} and were cut{'' if tokens.truncation == 'head' else ' ' + tokens.cut}"
            )
        if self.bare:
            where = list_places(examples.table, np.array(self.bare))
            yield f"the tokenizer makes only special tokens of {len(self.bare):,} texts of {split}: {where}"
        if self.content and self.unknown / self.content > _UNKNOWN_SHARE:
            yield (
                f"{self.unknown / self.content:.1%} of the tokens of {split} are unknown to the model "
                f"({tokenizer.unk_token}): was it trained on texts of this language and script?"
            )


def write_split(
    aside: Path,
    split: str,
    examples: Examples,
    shards: Sequence[Shard],
    store: ShardFolder,
    dtype: Any,
    stats: TokenStats,
    *,
    texts: bool,
) -> tuple[dict[str, Any], Array]:
    """Write the files of a split.

    Args:
        shards: those of the split's source.
        dtype: of the token ids.
        stats: counts all rows.
        texts: write the texts too.

    Returns:
        The split's entry in the manifest; keys of its rows, see `row_keys`.

    Raises:
        ShardMissing: a shard must be made first.
    """
    has_types = "types" in (stored := store.names(shards))
    kept, words = [name for name in TEXTS if name in stored] if texts else [], examples.words
    optional = ("types", "windows", *(("starts", "ends") if words else ()))
    names = ["tokens", "cut", *(name for name in optional if name in stored), *kept]
    blocks = _in_order(examples.rows, shards, store, names, aside)
    lengths, windows, any_type = [np.empty(0, np.int64)], list[Array](), False
    keys, pieces = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int32)]
    types_file = aside / f"{split}.types.npy"
    with (
        ArrayWriter(aside / f"{split}.tokens.npy", dtype) as tokens,
        ArrayWriter(types_file, np.uint8) as types,
        _RowsWriter(aside / f"{split}.rows.parquet", examples, kept) as rows,
    ):
        for block in blocks:
            tokens.append(block["tokens"][0])
            lengths.append(block["tokens"][1])
            keys.append(row_keys(*block["tokens"]))
            stats.add(block)
            if "windows" in block:
                windows.append(block["windows"][0])
            if words is not None:
                pieces.append(_pieces(words, sum(map(len, lengths[:-1])), block))
            if has_types:
                types.append(block["types"][0])
                any_type |= bool(block["types"][0].any())
            rows.append(block)
    if not any_type:
        types_file.unlink()
    each = np.concatenate(lengths)
    _save_arrays(aside, split, examples, each, np.concatenate(windows) if windows else None)
    entry: dict[str, Any] = {"rows": len(examples), "tokens": int(each.sum()), "longest": int(each.max())}
    if words is not None:
        entry |= _write_words(aside, split, words, np.concatenate(pieces))
    return entry, np.concatenate(keys)


def _save_arrays(aside: Path, split: str, examples: Examples, lengths: Array, windows: Array | None) -> None:
    """Bounds, labels and weights of the rows; `windows` are lengths."""

    def bounds(of: Array) -> Array:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(of)])

    np.save(aside / f"{split}.offsets.npy", bounds(lengths))
    if windows is not None:
        np.save(aside / f"{split}.windows.npy", bounds(windows))
    np.save(aside / f"{split}.labels.npy", np.ascontiguousarray(examples.labels))
    if examples.weights is not None:
        np.save(aside / f"{split}.weights.npy", examples.weights)


def _in_order(
    rows: Array, shards: Sequence[Shard], store: ShardFolder, names: Sequence[str], aside: Path
) -> Iterator[Block]:
    """Blocks of `rows` in their order."""
    blocks = _in_order_of_source(np.sort(rows), shards, store, names)
    if (np.diff(rows) > 0).all():
        return blocks
    return _reordered(blocks, np.argsort(np.argsort(rows)), aside)


def _pieces(words: TaggedWords, done: int, block: Block) -> Array:
    """The first token of each word of a block, which begins at row `done` of the split."""
    some = words.take(np.arange(len(block["cut"][0])) + done)
    begins = np.concatenate([np.zeros(1, np.int64), np.cumsum(block["tokens"][1])])
    places = np.column_stack([block["starts"][0], block["ends"][0]])
    return find_pieces(some.offsets, some.spans, begins, places, block["cut"][0])


def _write_words(aside: Path, split: str, words: TaggedWords, pieces: Array) -> dict[str, int]:
    """Write the words' places; returns words, entities, and those of each that were cut off, for the manifest."""
    np.save(aside / f"{split}.words.npy", np.column_stack([words.spans, pieces]))
    np.save(aside / f"{split}.word_offsets.npy", words.offsets)
    whole, cut = entities(words.codes, words.offsets), pieces == CUT
    before = np.concatenate([[0], np.cumsum(cut)])
    lost = int((before[whole[:, 2]] > before[whole[:, 1]]).sum())
    return {"words": len(pieces), "entities": len(whole), "words_cut": int(cut.sum()), "entities_cut": lost}


def _in_order_of_source(
    rows: Array, shards: Sequence[Shard], store: ShardFolder, names: Sequence[str]
) -> Iterator[Block]:
    """Blocks of `rows`, which ascend."""
    for shard in shards:
        low, high = np.searchsorted(rows, [shard.rows[0], shard.rows[-1] + 1])
        if low == high:
            continue
        arrays = store.load(shard)
        mine = np.zeros(len(shard), bool)
        mine[np.searchsorted(shard.rows, rows[low:high])] = True
        block = {}
        for name in names:
            if name in TEXTS:
                among, each = mine[shard.kept], arrays[f"{name}_lengths"]
            else:
                counts = {"cut": np.ones(len(shard), np.int64), "windows": arrays.get("windows_lengths", mine)}
                among, each = mine, counts.get(name, arrays["lengths"])
            # A shard without token types has only zeros.
            flat = arrays[name] if name in arrays else np.zeros(int(each.sum()), np.uint8)
            block[name] = (flat, each) if among.all() else (flat[np.repeat(among, each)], each[among])
        yield block


def _reordered(blocks: Iterator[Block], place: Array, folder: Path) -> Iterator[Block]:
    """The rows of `blocks` in another order.

    Args:
        place: where each row is among those of `blocks`, int64 (N,).
        folder: for spool files, which are already unlinked while they are in use.
    """
    lengths: dict[str, list[Array]] = {}
    dtypes: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for block in blocks:
            for name, (flat, each) in block.items():
                if name not in files:
                    path = folder / f"{name}.spool"
                    files[name] = stack.enter_context(path.open("w+b"))
                    path.unlink()
                    lengths[name], dtypes[name] = [], flat.dtype
                files[name].write(np.ascontiguousarray(flat).tobytes())
                lengths[name].append(each)
        sizes = {name: np.concatenate(each) * dtypes[name].itemsize for name, each in lengths.items()}
        ends = {name: np.cumsum(size) for name, size in sizes.items()}
        for file in files.values():
            file.flush()
        weights = np.cumsum(np.sum([size[place] for size in sizes.values()], axis=0))
        bounds = [0, *(np.flatnonzero(np.diff((weights - 1) // _BLOCK_BYTES)) + 1).tolist(), len(place)]
        for start, stop in itertools.pairwise(bounds):
            some = place[start:stop]
            reordered = {}
            for name, file in files.items():
                size, begin = sizes[name][some], ends[name][some] - sizes[name][some]
                raw = b"".join(map(os.pread, [file.fileno()] * len(some), size.tolist(), begin.tolist()))
                reordered[name] = (np.frombuffer(raw, dtypes[name]), size // dtypes[name].itemsize)
            yield reordered


class _RowsWriter:
    """Writes `rows.parquet`: where each row came from (`row`, as `afina.worker.data.tables.readers` counts, and `file`), `id`, texts."""

    def __init__(self, path: Path, examples: Examples, texts: Sequence[str]) -> None:
        table = examples.table
        columns = {
            "row": pa.array(table.row, pa.int64()),
            "file": pa.DictionaryArray.from_arrays(
                pa.array(table.source, pa.int32()), pa.array(table.sources, pa.string())
            ),
        }
        if examples.ids is not None:
            columns["id"] = examples.ids
        self._table, self._texts = pa.table(columns), texts
        self._held: list[Block] = []
        self._done = self._size = 0
        schema = self._table.schema
        for name in texts:
            schema = schema.append(pa.field(name, pa.large_string()))
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def append(self, block: Block) -> None:
        self._held.append({name: block[name] for name in ("cut", *self._texts)})
        self._size += sum(len(block[name][0]) for name in self._texts)
        if self._size > _BLOCK_BYTES:
            self._flush()

    def _flush(self) -> None:
        count = sum(len(block["cut"][1]) for block in self._held)
        group = self._table.slice(self._done, count)
        for name in self._texts:
            flat, each = (np.concatenate([block[name][i] for block in self._held]) for i in (0, 1))
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(each)])
            texts = pa.LargeStringArray.from_buffers(count, pa.py_buffer(ends), pa.py_buffer(flat))
            group = group.append_column(pa.field(name, pa.large_string()), texts)
        self._writer.write_table(group)
        self._held, self._done, self._size = [], self._done + count, 0

    def __enter__(self) -> _RowsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._held:
                self._flush()
        finally:
            self._writer.close()
