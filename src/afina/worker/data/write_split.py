"""Pieces to a part of prepared data: the arrays and `rows.parquet`, in the order that the part wants.

Memory is that of one piece. A part in the order of its source is written straight on; one in another order (a `sample` is
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

from afina.worker.data import prepared
from afina.worker.data.shards import Piece, Pieces
from afina.worker.data.splits import Examples

__all__ = ["TEXTS", "Seen", "write_part"]

Array = np.ndarray[Any, Any]
#: Some rows: by name, what they have one after the other, and how much of it each has, int64 (N,).
Block = Mapping[str, tuple[Array, Array]]

#: What texts are called in a piece and in `rows.parquet`: the text, the second text of a pair.
TEXTS = ("text", "text_pair")
#: Bytes in a block that is read back from a spool, and of texts in a row group of `rows.parquet`.
_BLOCK_BYTES = 8 << 20


@dataclass
class Seen:
    """What there is to say of the tokens of a part.

    Attributes:
        special: ids of tokens that no text makes.
        unknown_id: of the token for what the vocabulary does not have; None if there is none.
        cut: texts that were longer than allowed.
        unknown: tokens that are unknown.
        content: tokens that are not special.
        bare: index in the part of each text that has special tokens only.
    """

    special: Array
    unknown_id: int | None
    cut: int = 0
    unknown: int = 0
    content: int = 0
    rows: int = 0
    bare: list[int] = field(default_factory=list)

    def add(self, block: Block) -> None:
        """The next rows of the part."""
        tokens, lengths = block["tokens"]
        counted = ~np.isin(tokens, self.special)
        if self.unknown_id is not None:
            self.unknown += int(np.count_nonzero(tokens == self.unknown_id))
        self.content += int(np.count_nonzero(counted))
        self.cut += int(block["cut"][0].sum())
        before, ends = np.concatenate([[0], np.cumsum(counted)]), np.cumsum(lengths)
        each = before[ends] - before[ends - lengths]  # not reduceat, which has no sum of nothing
        self.bare += (np.flatnonzero(each == 0) + self.rows).tolist()
        self.rows += len(lengths)


def write_part(
    aside: Path,
    part: str,
    examples: Examples,
    pieces: Sequence[Piece],
    made: Pieces,
    dtype: Any,
    texts: Sequence[str],
    seen: Seen,
) -> dict[str, int]:
    """Write the files of a part.

    Args:
        pieces: those of the part's source.
        dtype: of the token ids.
        texts: those of `TEXTS` that go into `rows.parquet`.
        seen: is told all rows.

    Returns:
        What the manifest says of it.

    Raises:
        Missing: a piece must be made first.
    """
    has_types = "types" in made.names(pieces)
    names = ["tokens", "cut", *(["types"] if has_types else []), *texts]
    ascending = bool((np.diff(examples.rows) > 0).all())
    blocks = _in_order_of_source(np.sort(examples.rows), pieces, made, names)
    if not ascending:
        blocks = _reordered(blocks, np.argsort(np.argsort(examples.rows)), aside)
    lengths, any_type = [np.empty(0, np.int64)], False
    types_file = aside / f"{part}.types.npy"
    with (
        prepared.ArrayWriter(aside / f"{part}.tokens.npy", dtype) as tokens,
        prepared.ArrayWriter(types_file, np.uint8) as types,
        _RowsWriter(aside / f"{part}.rows.parquet", examples, texts) as rows,
    ):
        for block in blocks:
            tokens.append(block["tokens"][0])
            lengths.append(block["tokens"][1])
            seen.add(block)
            if has_types:
                types.append(block["types"][0])
                any_type |= bool(block["types"][0].any())
            rows.append(block)
    if not any_type:
        types_file.unlink()
    each = np.concatenate(lengths)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(each)])
    np.save(aside / f"{part}.offsets.npy", offsets)
    np.save(aside / f"{part}.labels.npy", np.ascontiguousarray(examples.labels))
    return {"rows": len(examples), "tokens": int(offsets[-1]), "longest": int(each.max())}


def _in_order_of_source(rows: Array, pieces: Sequence[Piece], made: Pieces, names: Sequence[str]) -> Iterator[Block]:
    """Blocks of `rows`, which ascend."""
    for piece in pieces:
        low, high = np.searchsorted(rows, [piece.rows[0], piece.rows[-1] + 1])
        if low == high:
            continue
        found = made.load(piece)
        mine = np.zeros(len(piece), bool)
        mine[np.searchsorted(piece.rows, rows[low:high])] = True
        block = {}
        for name in names:
            if name in TEXTS:
                among, each = mine[piece.kept], found[f"{name}_lengths"]
            else:
                among, each = mine, np.ones(len(piece), np.int64) if name == "cut" else found["lengths"]
            # A piece without token types has only zeros.
            flat = found[name] if name in found else np.zeros(int(each.sum()), np.uint8)
            block[name] = (flat, each) if among.all() else (flat[np.repeat(among, each)], each[among])
        yield block


def _reordered(blocks: Iterator[Block], place: Array, folder: Path) -> Iterator[Block]:
    """The rows of `blocks` in another order.

    Args:
        place: where each row is among those of `blocks`, int64 (N,).
        folder: for files, which are gone when all was read.
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
            found = {}
            for name, file in files.items():
                size, begin = sizes[name][some], ends[name][some] - sizes[name][some]
                raw = b"".join(map(os.pread, [file.fileno()] * len(some), size.tolist(), begin.tolist()))
                found[name] = (np.frombuffer(raw, dtypes[name]), size // dtypes[name].itemsize)
            yield found


class _RowsWriter:
    """`rows.parquet`: where each row came from (`row`, see `afina.worker.data.readers`, and `file`), `id`, its texts if wanted."""

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
