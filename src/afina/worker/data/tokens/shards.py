"""Token shards: an interrupted prepare resumes from them.

    <scratch>/cache/prepare/<digest>-<key>/<source>-<n>.npz      one shard: some rows of a source, tokenised

The digest is that of the prepared data, the key adds the versions of the libraries. Which rows are in a shard is decided before
anything is tokenised, by the rows in use and the length of their texts; so the n-th shard under a key is the same for every
process and any number of threads. It is written aside and renamed, not flushed: each array carries its CRC-32, and a shard
that a crash of the machine left incomplete is made again. Two processes may work in one folder, and one may remove it under the
other: missing shards are made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Shard", "ShardFolder", "ShardMissing", "discard", "plan_shards", "sweep"]

Array = np.ndarray[Any, Any]

#: Bytes of text in a shard: at most this much is tokenised again after a kill, two seconds of one core. A row counts a little
#: more than its text, so that a shard of very short ones is bounded too.
SHARD_BYTES = 8 << 20
_ROW_BYTES = 64
_DIGEST = 16
#: A folder without a write for so long is abandoned.
ABANDONED_S = 7 * 86400.0


class ShardMissing(Exception):
    """A shard is absent or incomplete, and must be made (again)."""


@dataclass(frozen=True)
class Shard:
    """Some rows of a source.

    Attributes:
        name: of its file, without suffix.
        source: the key of the source.
        rows: indices of rows, ascending, int64 (N,).
        sizes: bytes of their texts, int64 (N,).
        kept: rows whose texts are stored beside the tokens, bool (N,).
    """

    name: str
    source: str
    rows: Array
    sizes: Array
    kept: Array

    def __len__(self) -> int:
        return len(self.rows)


def plan_shards(number: int, source: str, rows: Array, sizes: Array, kept: Array) -> list[Shard]:
    """Shards of about `SHARD_BYTES` for all rows of a source that are in use; arguments as `Shard` has them."""
    ends = np.cumsum(sizes + _ROW_BYTES)
    bounds = [0, *(np.flatnonzero(np.diff((ends - 1) // SHARD_BYTES)) + 1).tolist(), len(rows)]
    return [
        Shard(f"{number}-{n:05d}", source, rows[a:b], sizes[a:b], kept[a:b])
        for n, (a, b) in enumerate(itertools.pairwise(bounds))
    ]


class ShardFolder:
    """The shards of one prepare.

    Args:
        digest: of the data to prepare; it decides which rows are in a shard, and their texts.
        versions: of the libraries that tokenise.
    """

    def __init__(self, parent: Path, digest: str, versions: Mapping[str, str]) -> None:
        about = json.dumps([SHARD_BYTES, _ROW_BYTES, versions], sort_keys=True)
        key = hashlib.sha256(about.encode()).hexdigest()[:8]
        self.folder = parent / f"{digest[:_DIGEST]}-{key}"

    def has(self, shard: Shard) -> bool:
        return self._path(shard).exists()

    def save(self, shard: Shard, arrays: Mapping[str, Any]) -> None:
        """Publish a shard.

        Raises:
            OSError: no room, no permission.
        """
        archive = io.BytesIO()
        np.savez(archive, rows=shard.rows, **arrays)
        aside = self.folder / f".{shard.name}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            for last in (False, True):
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    aside.write_bytes(archive.getbuffer())
                    aside.replace(self._path(shard))
                    return
                except FileNotFoundError:  # another process was first to publish, and removed the folder
                    if last:
                        raise
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()

    def load(self, shard: Shard) -> dict[str, Array]:
        """The arrays of a shard.

        Raises:
            ShardMissing: it is absent, or incomplete; then it is removed.
        """
        path = self._path(shard)
        try:
            with np.load(path) as archive:
                arrays = dict(archive)
            if not np.array_equal(arrays.pop("rows"), shard.rows):
                raise ValueError("other rows")
            return arrays
        except FileNotFoundError:
            raise ShardMissing(shard.name) from None
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError):
            path.unlink(missing_ok=True)
            raise ShardMissing(shard.name) from None

    def names(self, shards: Sequence[Shard]) -> set[str]:
        """Names of the arrays that any of `shards` has, from their directories.

        Raises:
            ShardMissing: one is absent, or incomplete.
        """
        array_names: set[str] = set()
        for shard in shards:
            try:
                with zipfile.ZipFile(self._path(shard)) as archive:
                    array_names.update(name.removesuffix(".npy") for name in archive.namelist())
            except FileNotFoundError:
                raise ShardMissing(shard.name) from None
            except zipfile.BadZipFile:
                self._path(shard).unlink(missing_ok=True)
                raise ShardMissing(shard.name) from None
        return array_names

    def size(self) -> int:
        """Bytes on disk."""
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in self.folder.iterdir())
        return 0

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.name}.npz"


def discard(parent: Path, digest: str) -> None:
    """Remove the shards of the data with this digest, of all versions."""
    for folder in parent.glob(f"{digest[:_DIGEST]}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path, *, now: float) -> None:
    """Remove abandoned folders.

    Args:
        now: the file system's time, seconds since 1970.
    """
    with contextlib.suppress(OSError):
        for folder in parent.iterdir():
            with contextlib.suppress(OSError):
                if now - folder.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)
