"""Prepared data on disk: the one format, written by the prepare stage and read by training.

    <scratch>/prepared/<digest>/
        manifest.json             what it is, and size and SHA-256 of every other file; written last
        <split>.tokens.npy        token ids, uint16 or uint32, shape (T,): the rows one after the other
        <split>.offsets.npy       int64 (N + 1,): row i is tokens[offsets[i]:offsets[i + 1]]
        <split>.labels.npy        int64 (N,) single-label; float32 (N, L) of 0 and 1 multi-label; float32 (N,) regression; int64 (W,)
                                  token-classification: of the words of all rows
        <split>.words.npy         int32 (W, 3), token-classification: first character and end of each word in its row's text, and
                                  the index of its first token in the row
        <split>.word_offsets.npy  int64 (N + 1,), token-classification: words of row i are word_offsets[i] to word_offsets[i + 1] - 1
        <split>.weights.npy       weight of each row in the loss, float32 (N,); only where the recipe names a column of them
        <split>.windows.npy       int64 (W + 1,): window w is tokens[windows[w]:windows[w + 1]], and a row is whole windows; only where the
                                  recipe cuts texts into windows
        <split>.types.npy         token types, uint8 (T,); only where the tokenizer gives any that are not 0
        <split>.rows.parquet      where each row came from; for eval and test its text too (for train where there are folds)
        train.groups.npy          group of each row, int64 (N,); only where there are folds
        tokenizer/                as `save_pretrained` writes it

Written aside and published by rename (`afina.publish`); never edited. Readers take no lock. Reading needs numpy only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from afina.errors import SiteError
from afina.files import describe, difference, seal_of, sync_tree
from afina.worker.task.word_places import WordPlaces

__all__ = [
    "FORMAT",
    "MANIFEST",
    "ArrayWriter",
    "Split",
    "digest_of",
    "is_whole",
    "load_manifest",
    "open_split",
    "seal",
    "verify",
]

FORMAT = 1
MANIFEST = "manifest.json"
_REMEDY = "make it again with `afina prefetch RECIPE` (scratch may have been purged)"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Split:
    """One split, memory-mapped and read-only.

    Attributes:
        tokens: (T,) uint16 or uint32.
        offsets: (N + 1,) int64.
        labels: (N,) int64, (N, L) float32, (N,) float32, or of words (W,) int64, by task.
        types: (T,) uint8, or None where all token types are 0.
        weights: (N,) float32, or None where all rows count the same.
        windows: (W + 1,) int64, bounds of the windows that rows consist of; None: each row is one sequence.
        words: of a token classification.
    """

    tokens: Array
    offsets: Array
    labels: Array
    types: Array | None = None
    weights: Array | None = None
    windows: Array | None = None
    words: WordPlaces | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Array:
        """Tokens of each row, int64 (N,)."""
        return np.diff(self.offsets)

    @property
    def sequences(self) -> Split:
        """Each window as a row; labels mean nothing then. The split itself where there are no windows."""
        if self.windows is None:
            return self
        return Split(self.tokens, self.windows, np.zeros(len(self.windows) - 1, np.int64), self.types)

    def spans(self, rows: Array) -> tuple[Array, Array, Array]:
        """Bounds in `tokens` of the sequences of `rows`: starts and ends (S,); and how many each row has (B,)."""
        starts, ends = np.asarray(self.offsets)[rows], np.asarray(self.offsets)[rows + 1]
        if self.windows is None:
            return starts, ends, np.ones(len(rows), np.int64)
        first = np.searchsorted(self.windows, starts)
        counts = np.searchsorted(self.windows, ends) - first
        places = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        return np.asarray(self.windows)[places], np.asarray(self.windows)[places + 1], counts

    def sum_over_sequences(self, of_lengths: Callable[[Array], Array]) -> Array:
        """The sum over each row's sequences, (N,), of what `of_lengths` says of their lengths, (S,) -> (S,)."""
        each = of_lengths(self.sequences.lengths)
        return each if self.windows is None else np.add.reduceat(each, np.searchsorted(self.windows, self.offsets[:-1]))

    @property
    def windows_of_rows(self) -> Array | None:
        """How many windows each row has, int64 (N,)."""
        return None if self.windows is None else self.sum_over_sequences(np.ones_like)

    @property
    def loss_weights(self) -> Array | None:
        """The weight of each label in the loss, float32: of rows (N,), or of words (W,), 0 where a word has no token of its own; None: 1 each."""
        if self.words is None:
            return self.weights
        own = (np.asarray(self.words.pieces) >= 0).astype(np.float32)
        return own if self.weights is None else own * np.repeat(self.weights, np.diff(self.words.offsets))

    def scored(self, rows: Array | Sequence[int]) -> Array:
        """Which labels the logits of `rows` are for, in their order: those rows, or the words of them that have a token."""
        return np.asarray(rows) if self.words is None else self.words.scored(np.asarray(rows))[0]

    def take(self, rows: Array) -> Split:
        """Some rows, in this order; a copy in memory."""
        lengths = self.lengths[rows]
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.arange(ends[-1]) + np.repeat(np.asarray(self.offsets)[rows] - ends[:-1], lengths)
        windows = None
        if self.windows is not None:
            first, last, _ = self.spans(rows)
            windows = np.concatenate([[0], np.cumsum(last - first)]).astype(np.int64)
        return Split(
            self.tokens[places],
            ends,
            np.asarray(self.labels)[rows if self.words is None else self.words.of_rows(np.asarray(rows))[0]],
            None if self.types is None else self.types[places],
            None if self.weights is None else np.asarray(self.weights)[rows],
            windows,
            None if self.words is None else self.words.take(np.asarray(rows)),
        )


def open_split(folder: str | Path, split: str) -> Split:
    """Open `split` (train, eval, test) of prepared data.

    Raises:
        SiteError: a file is missing or damaged.
    """
    folder = Path(folder)
    arrays: dict[str, Array | None] = {}
    optional = ("types", "weights", "windows", "words", "word_offsets")
    for name in ("tokens", "offsets", "labels", *optional):
        path = folder / f"{split}.{name}.npy"
        if name in optional and not path.exists():
            arrays[name] = None
            continue
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise SiteError(f"prepared data {path}: is missing", _REMEDY) from None
        except (OSError, ValueError) as error:
            raise SiteError(f"prepared data {path}: cannot be read: {error}", _REMEDY) from None
    tokens, offsets, labels = (arrays[n] for n in ("tokens", "offsets", "labels"))
    assert tokens is not None and offsets is not None and labels is not None
    words, ends, places = arrays["words"], arrays["word_offsets"], None
    fit = len(offsets) == len(labels if ends is None else ends) + (ends is None)
    if words is not None and ends is not None:
        fit &= int(ends[-1]) == len(words) == len(labels)
        places = WordPlaces(ends, words[:, :2], words[:, 2])
    if not fit or int(offsets[-1]) != len(tokens):
        raise SiteError(f"prepared data {folder}: the arrays of `{split}` do not fit together", _REMEDY)
    return Split(tokens, offsets, labels, arrays["types"], arrays["weights"], arrays["windows"], places)


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of prepared data.

    Raises:
        SiteError: it is missing, altered or of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SiteError(f"prepared data {path}: is missing", _REMEDY) from None
    except (OSError, ValueError) as error:
        raise SiteError(f"prepared data {path}: cannot be read: {error}", _REMEDY) from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        version = value.get("format") if isinstance(value, dict) else None
        raise SiteError(f"prepared data {path}: format {version}, this afina reads {FORMAT}", _REMEDY)
    if value.get("sealed") != seal_of(value):
        raise SiteError(f"prepared data {path}: its content differs from what was written", _REMEDY)
    return value


def verify(folder: str | Path, *, digests: bool = True) -> dict[str, Any]:
    """Compare every file with the manifest, and return the manifest.

    Args:
        digests: compare SHA-256 too (reads everything), not only presence and size.

    Raises:
        SiteError: names the first file that is missing or altered.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    wrong = difference(folder, manifest["files"], digests=digests)
    if wrong is not None:
        raise SiteError(f"prepared data {wrong}", _REMEDY)
    return manifest


def digest_of(content: Mapping[str, Any]) -> str:
    """The name of prepared data: SHA-256 over the record of everything that decides it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(staging: Path, about: Mapping[str, Any]) -> None:
    """Flush every file in `staging` to disk and write the manifest: `about`, the format, and all files."""
    paths = sorted(p for p in staging.rglob("*") if p.is_file())
    files = describe(staging, [path.relative_to(staging).as_posix() for path in paths])
    body = {"format": FORMAT, **about, "files": files}
    with (staging / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**body, "sealed": seal_of(body)}, file, indent=1, ensure_ascii=False)
        file.write("\n")
    sync_tree(staging)


def is_whole(folder: Path) -> bool:
    """True if `folder` holds undamaged prepared data; compares every byte."""
    try:
        verify(folder)
    except SiteError:
        return False
    return True


class ArrayWriter:
    """Writes a one-dimensional .npy file by appending; the length is written when it is closed.

    NumPy leaves room in the header for the first axis to grow (`numpy.lib.format`, since 1.23): it is rewritten in place.
    """

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._length = 0
        self._start = self._header()

    def _header(self) -> int:
        shape = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self._length,)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, shape)
        return self._file.tell()

    def append(self, values: Array) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self._length += len(values)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                end = self._header()
                assert end == self._start, "the header grew over the data"
