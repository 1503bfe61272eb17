"""What a prepare stage has tokenised so far, piece by piece, so that one that is killed is gone on with by the next.

    <scratch>/cache/prepare/<digest>-<key>/<source>-<n>.npz      one piece: some rows of a source, tokenised

The digest is that of the prepared data, the key adds the versions that made the piece. The rows of a piece are decided before anything is tokenised, by the rows that are used and the length of their texts; so
the n-th piece under a key is the same whoever makes it, with however many threads. It is written aside and renamed, not flushed:
each array carries its CRC-32, and a piece that a crash of the machine left incomplete is made again. Two processes may work in one
folder, and one may remove it under the other: what is missing is made again.
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

__all__ = ["Missing", "Piece", "Pieces", "cut_pieces", "discard", "sweep"]

Array = np.ndarray[Any, Any]

#: Bytes of text in a piece: what a killed process repeats at most, two seconds of one core. A row counts a little more than
#: its text, so that a piece of very short ones is bounded too.
PIECE_BYTES = 8 << 20
_ROW_BYTES = 64
_DIGEST = 16
#: A folder that nobody has written into for so long belongs to a prepare that nobody will go on with.
ABANDONED_S = 7 * 86400.0


class Missing(Exception):
    """A piece is not there, or not whole: make it (again)."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a source.

    Attributes:
        name: of its file, without suffix.
        source: the key of the source.
        rows: indices of rows, ascending, int64 (N,).
        sizes: bytes of their texts, int64 (N,).
        kept: whose texts are kept beside the tokens, bool (N,).
    """

    name: str
    source: str
    rows: Array
    sizes: Array
    kept: Array

    def __len__(self) -> int:
        return len(self.rows)


def cut_pieces(number: int, source: str, rows: Array, sizes: Array, kept: Array) -> list[Piece]:
    """Pieces of about `PIECE_BYTES`, for all used rows of a source; arguments as `Piece` has them."""
    ends = np.cumsum(sizes + _ROW_BYTES)
    bounds = [0, *(np.flatnonzero(np.diff((ends - 1) // PIECE_BYTES)) + 1).tolist(), len(rows)]
    return [
        Piece(f"{number}-{n:05d}", source, rows[a:b], sizes[a:b], kept[a:b])
        for n, (a, b) in enumerate(itertools.pairwise(bounds))
    ]


class Pieces:
    """The folder of one prepare.

    Args:
        digest: of what is prepared; it decides which rows are in a piece, and their texts.
        versions: of what makes tokens of them.
    """

    def __init__(self, parent: Path, digest: str, versions: Mapping[str, str]) -> None:
        about = json.dumps([PIECE_BYTES, _ROW_BYTES, versions], sort_keys=True)
        key = hashlib.sha256(about.encode()).hexdigest()[:8]
        self.folder = parent / f"{digest[:_DIGEST]}-{key}"

    def has(self, piece: Piece) -> bool:
        return self._path(piece).exists()

    def save(self, piece: Piece, arrays: Mapping[str, Any]) -> None:
        """Publish a piece.

        Raises:
            OSError: no room, no permission.
        """
        packed = io.BytesIO()
        np.savez(packed, rows=piece.rows, **arrays)
        aside = self.folder / f".{piece.name}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            for last in (False, True):
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    aside.write_bytes(packed.getbuffer())
                    aside.replace(self._path(piece))
                    return
                except FileNotFoundError:  # another process was first to finish, and tidied up
                    if last:
                        raise
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()

    def load(self, piece: Piece) -> dict[str, Array]:
        """The arrays of a piece.

        Raises:
            Missing: it is not there, or not whole; then it is removed.
        """
        path = self._path(piece)
        try:
            with np.load(path) as arrays:
                found = dict(arrays)
            if not np.array_equal(found.pop("rows"), piece.rows):
                raise ValueError("other rows")
            return found
        except FileNotFoundError:
            raise Missing(piece.name) from None
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError):
            path.unlink(missing_ok=True)
            raise Missing(piece.name) from None

    def names(self, pieces: Sequence[Piece]) -> set[str]:
        """Names of all arrays that any of `pieces` has, by their directories.

        Raises:
            Missing: one is not there, or not whole.
        """
        found: set[str] = set()
        for piece in pieces:
            try:
                with zipfile.ZipFile(self._path(piece)) as archive:
                    found.update(name.removesuffix(".npy") for name in archive.namelist())
            except FileNotFoundError:
                raise Missing(piece.name) from None
            except zipfile.BadZipFile:
                self._path(piece).unlink(missing_ok=True)
                raise Missing(piece.name) from None
        return found

    def size(self) -> int:
        """Bytes on disk."""
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in self.folder.iterdir())
        return 0

    def _path(self, piece: Piece) -> Path:
        return self.folder / f"{piece.name}.npz"


def discard(parent: Path, digest: str) -> None:
    """Remove all pieces of what is prepared under `digest`, whichever versions made them."""
    for folder in parent.glob(f"{digest[:_DIGEST]}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path, *, now: float) -> None:
    """Remove the folders that were abandoned.

    Args:
        now: the file system's time, seconds since 1970.
    """
    with contextlib.suppress(OSError):
        for folder in parent.iterdir():
            with contextlib.suppress(OSError):
                if now - folder.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)
