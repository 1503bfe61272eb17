"""Text files: opened with their compression and encoding; what a wrong byte means, and which option would help."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from afina.errors import DataError
from afina.formats.notes import Notes
from afina.formats.read_options import PLAIN, ReadOptions, compression_of, format_of, option

__all__ = [
    "MISSING_WORDS",
    "foreign",
    "likely_encoding",
    "note_damaged",
    "note_missing",
    "open_binary",
    "open_text",
    "readable",
    "undecodable",
    "utf_16_hint",
]

#: First bytes of files that are not text: what the file is, and the remedy.
_MAGIC = {
    b"\x1f\x8b": ("compressed with gzip", "end its name with .gz"),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet (.xlsx)", "unpack it, or save the sheet as `CSV UTF-8`"),
    b"PAR1": ("Parquet", "name it .parquet"),
    b"ARROW1": ("Arrow", "name it .arrow"),
    b"BZh": ("compressed with bzip2", "end its name with .bz2"),
    b"\xfd7zX": ("compressed with xz", "end its name with .xz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "end its name with .zst"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet (.xls)", "save the sheet as `CSV UTF-8`"),
}
#: First characters of files that are not data: what the file is, and the remedy.
_FOREIGN = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the data", "fetch the data: git lfs pull"),
    b"<!doctype html": ("a web page", "download the file itself, not the page about it"),
    b"<html": ("a web page", "download the file itself, not the page about it"),
}
#: How programs write a missing value or a cell that failed, in lower case.
MISSING_WORDS = frozenset(
    [
        "nan",
        "na",
        "n/a",
        "#n/a",
        "<na>",
        "none",
        "null",
        "(null)",
        "nat",
        "#ref!",
        "#value!",
        "#div/0!",
        "#name?",
        "#num!",
        "#null!",
    ]
)
_LONGEST_WORD = max(map(len, MISSING_WORDS))
_MISSING_TEXT = "the text is a word for a missing value (NA, nan, None, #REF!, …): correct or remove such rows"
#: Bytes that no text in Windows-1252 has.
_NOT_CP1252 = frozenset(b"\x81\x8d\x8f\x90\x9d")
_MOST_LINES = 1000
_SHOWN = 24
#: C1 control characters, which no text has: Windows-1252 that was read as Latin-1. And the mark of a byte that was lost.
_DAMAGED = {
    "holds control characters (U+0080 to U+009F) where Windows has quotes, dashes and €: was it read as Latin-1? "
    "From the original file, " + option("encoding", "cp1252"): "[\u0080-\u009f]",
    "holds U+FFFD, the mark of a character that an earlier conversion lost: convert the original file again": "\ufffd",
    "holds letters such as Ã© or â€™, UTF-8 that was read as Windows-1252: convert the original file again, or "
    + option("encoding", "utf-8"): "[ÃÂâ][\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]",
}

#: One of them is in every text that `_DAMAGED` finds.
_DAMAGED_BYTES = (b"\xc2", b"\xc3\x82", b"\xc3\x83", b"\xc3\xa2", b"\xef\xbf\xbd")


def open_binary(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked."""
    compression = compression_of(path)
    if compression == "gzip":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == "xz":
        return lzma.open(path, "rb")
    if compression == "bzip2":
        return bz2.open(path, "rb")
    if compression == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(os.fspath(path)), "zstd"), 1 << 20)
    return path.open("rb")


@contextlib.contextmanager
def open_text(path: Path, reading: ReadOptions = PLAIN, newline: str | None = "") -> Iterator[IO[str]]:
    """The file's text.

    Raises:
        DataError: bytes are not in the encoding, the file is not of its format, damaged, or cannot be opened.
    """
    with (
        readable(path, reading),
        open_binary(path) as raw,
        io.TextIOWrapper(raw, _codec(path, reading), newline=newline) as text,
    ):
        yield text


def _codec(path: Path, reading: ReadOptions) -> str:
    """The codec for the file: that of its byte order mark where `utf-16-le` was meant without one."""
    if not re.fullmatch("utf-(16|32)-[lb]e", reading.codec):
        return reading.codec
    with open_binary(path) as file:
        start = file.read(2)
    return reading.codec[:6] if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else reading.codec


@contextlib.contextmanager
def readable(path: Path, reading: ReadOptions = PLAIN) -> Iterator[None]:
    """Around code that reads a text file; raises as `open_text`."""
    try:
        yield
    except UnicodeError:
        raise undecodable(path, reading) from None
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise _not_unpacked(path, error) from None
    except OSError as error:
        if error.errno is None:
            raise _not_unpacked(path, error) from None
        raise DataError(f"{path}: {os.strerror(error.errno)}", "check the path and its permissions") from None


def foreign(path: Path) -> DataError | None:
    """The error for a file that is another thing than its name says: a Git LFS pointer, a web page, JSON; or None."""
    with open_binary(path) as file:
        start = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().lower()
    for first, (what, how) in _FOREIGN.items():
        if start.startswith(first):
            return DataError(f"{path}: is {what}", how)
    if re.match(rb'\[?\s*\{\s*"', start) and format_of(path) != "jsonl":
        return DataError(f"{path}: is JSON", "name it .jsonl or .json")
    return None


def utf_16_hint(text: str) -> str:
    """The remedy for a text with NUL bytes that was read as UTF-8."""
    return "is the file UTF-16? " + option("encoding", "utf-16-be" if text.startswith("\0") else "utf-16-le")


def _not_unpacked(path: Path, error: Exception) -> DataError:
    with path.open("rb") as file:
        start = file.read(8)
    kind = compression_of(path)
    if not any(start.startswith(magic) for magic, (what, _) in _MAGIC.items() if what == f"compressed with {kind}"):
        return DataError(f"{path}: is not {kind}, its name says {path.suffix}", f"name it without {path.suffix}")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: cannot be unpacked as {compression_of(path)}: {reason}", "copy or write the file again")


def undecodable(path: Path, reading: ReadOptions = PLAIN) -> DataError:
    """The error for a file that is not in its encoding: its real format, or row, line and offset of the first wrong byte."""
    with open_binary(path) as file:
        start = file.read(64)
    for magic, (what, how) in _MAGIC.items():
        if start.startswith(magic):
            return DataError(f"{path}: is {what}, its name says {path.suffix}", how)
    if marked := _marked_encoding(start):
        return DataError(f"{path}: the file is {marked.upper()}", option("encoding", marked))
    name = (reading.encoding or "utf-8").upper()
    if name == "UTF-8" and b"\0" in start:
        return DataError(f"{path}: holds NUL bytes", utf_16_hint(start.decode("latin-1")))
    if re.match("UTF-(16|32)", name):
        return DataError(f"{path}: the file is not {name}", f"{option('encoding', 'ITS_ENCODING')}; UTF-8 needs none")
    at = 0
    with open_binary(path) as file:
        for line, raw in enumerate(file, 1):
            try:
                raw.decode(reading.codec)
            except UnicodeDecodeError as error:
                at, byte, place = at + error.start, raw[error.start], f"line {line}"
                if format_of(path) in ("csv", "tsv"):
                    cells = csv.reader(_lines_before(path, at), delimiter=reading.delimiter_for(path))
                    rows = sum(1 for row in cells if row) - (reading.header in (None, True))
                    place = f"row {rows} ({place})" if rows > 0 else "the header"
                message = f"{path}, {place}: byte 0x{byte:02x} at offset {at} is not {name}"
                return DataError(message, _encoding_remedy(path, raw, error.start, reading))
            at += len(raw)
    return DataError(f"{path}: changed while it was read", "wait until it is complete")


def _marked_encoding(start: bytes) -> str | None:
    """The encoding that a byte order mark tells; UTF-8 needs none."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else None


def _encoding_remedy(path: Path, line: bytes, at: int, reading: ReadOptions) -> str:
    """The option that would help; by the bytes of the first lines that are not UTF-8."""
    if reading.encoding not in (None, "utf-8"):
        return f"{option('encoding', 'ITS_ENCODING')}; UTF-8 needs none"
    found = _examine_bytes(path)
    if found.mostly_utf_8:
        return "other letters in it are UTF-8: correct this place (a text cut within a character, or taken from another file)"
    if not found.like_cp1252:
        return f"{option('encoding', 'ITS_ENCODING')} (cp1251, koi8-r, mac-roman, shift_jis, gb18030, …); or save the file as UTF-8"
    shown = line[max(0, at - _SHOWN // 2) : at + _SHOWN // 2].decode("cp1252").strip()
    windows = ", which has quotes and dashes there" if found.of_windows else ""
    return f"{option('encoding', 'cp1252')} (Windows{windows}: “{shown}”); or save the file as UTF-8"


class _Bytes(NamedTuple):
    """The bytes of the first lines that are not ASCII: most are UTF-8; those that are not are as in Windows-1252, and of it alone."""

    mostly_utf_8: bool
    like_cp1252: bool
    of_windows: bool


def _examine_bytes(path: Path) -> _Bytes:
    good = bad = letters = 0
    bytes_: set[int] = set()
    with open_binary(path) as file:
        lines = (raw for raw in file if not raw.isascii())
        for raw in (next(lines, b"") for _ in range(_MOST_LINES)):
            text = raw.decode("utf-8", "surrogateescape")
            wrong = [ord(c) - 0xDC00 for c in text if "\udc80" <= c <= "\udcff"]
            bytes_.update(wrong)
            bad += len(wrong)
            good += sum(c > "\x7f" for c in text) - len(wrong)
            letters += sum(map(str.isalpha, text))
    # In the languages of Western Europe most letters are ASCII.
    western = bad > 0 and not bytes_ & _NOT_CP1252 and bad <= letters
    return _Bytes(good > bad, western, bool(bytes_ & set(range(0x80, 0xA0))))


def likely_encoding(path: Path) -> str | None:
    """utf-32 and utf-16 by the first bytes, cp1252 by the first lines that are not UTF-8; None for UTF-8, and where nothing tells.

    Raises:
        DataError: the file cannot be opened or unpacked.
    """
    with readable(path), open_binary(path) as file:
        start = file.read(8)
    if start.startswith(tuple(_MAGIC)):
        return None
    if marked := _marked_encoding(start):
        return marked
    if b"\0" in start[:2]:
        return "utf-16-be" if start.startswith(b"\0") else "utf-16-le"
    found = _examine_bytes(path)
    return "cp1252" if found.like_cp1252 and not found.mostly_utf_8 else None


def _lines_before(path: Path, end: int) -> Iterator[str]:
    """Lines up to byte `end`, one character for each byte, and a character in place of the next one."""
    with open_binary(path) as raw, io.TextIOWrapper(raw, "latin-1", newline="") as file:
        for line in file:
            if len(line) > end:
                yield line[:end] + "?"
                return
            end -= len(line)
            yield line


def note_damaged(notes: Notes, texts: Any, rows: Any) -> None:
    """Note texts that show a wrong conversion of the file.

    Args:
        texts: an Arrow array of strings, or a list of texts.
        rows: the number of each.
    """
    if not isinstance(texts, list):
        data = texts.buffers()[2]
        raw = data.to_pybytes() if data is not None else b""
        # Bytes are searched at a tenth of the cost of a regular expression over each text.
        if not any(mark in raw for mark in _DAMAGED_BYTES):
            return
    for message, pattern in _DAMAGED.items():
        indices = _found(pattern, texts)
        if len(indices):
            notes.add(message, rows[indices[0]], len(indices))


def note_missing(notes: Notes, texts: Any, rows: Any) -> None:
    """Note texts that are nothing but a word for a missing value. Arguments as those of `note_damaged`."""
    if isinstance(texts, list):
        missing: Any = [i for i, text in enumerate(texts) if text.strip().lower() in MISSING_WORDS]
    else:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        few = pc.fill_null(pc.less_equal(pc.binary_length(texts), _LONGEST_WORD), False)
        short = np.flatnonzero(few.to_numpy(zero_copy_only=False))
        words = pc.utf8_lower(pc.utf8_trim_whitespace(texts.take(pa.array(short))))
        missing = short[pc.is_in(words, pa.array(MISSING_WORDS, words.type)).to_numpy(zero_copy_only=False)]
    if len(missing):
        notes.add(_MISSING_TEXT, rows[missing[0]], len(missing))


def _found(pattern: str, texts: Any) -> Any:
    if isinstance(texts, list):
        return [i for i, text in enumerate(texts) if not text.isascii() and re.search(pattern, text)]
    import numpy as np
    import pyarrow.compute as pc

    return np.flatnonzero(pc.fill_null(pc.match_substring_regex(texts, pattern), False).to_numpy(zero_copy_only=False))
