"""How a data file is read: the options of a recipe's `data` section, of `afina init` and of `afina predict`; formats by suffix.

Nothing is guessed: an option that is not given means the format's standard (UTF-8, the suffix's separator, a header, quotes).
An option that no file of a recipe or a prediction can use is refused.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from afina.errors import InputError, nearest
from afina.frozen import FrozenModel

__all__ = [
    "COMPRESSIONS",
    "DATA_SUFFIXES",
    "PLAIN",
    "Delimiter",
    "Encoding",
    "Field",
    "Header",
    "Quoting",
    "ReadOptions",
    "compression_of",
    "format_of",
    "option",
    "suffix_of",
]

DATA_SUFFIXES: dict[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
}
#: After the suffix of a text format: `reviews.csv.gz`.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_TEXT_FORMATS = ("csv", "tsv", "jsonl", "txt", "conll")
#: The formats that each option is for.
_USED_BY = {
    "encoding": _TEXT_FORMATS,
    "delimiter": ("csv", "tsv"),
    "header": ("csv", "tsv"),
    "quoting": ("csv", "tsv"),
    "field": ("jsonl",),
}
_WORDS = {"csv": "CSV", "tsv": "TSV", "jsonl": "JSON", "txt": "text", "conll": "CoNLL"}
_ENCODINGS = ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1250", "cp1251", "cp1252", "cp1253", "cp1254",
              "cp1256", "cp437", "cp850", "latin-1", "iso8859-2", "iso8859-5", "iso8859-15", "koi8-r", "mac-roman", "shift_jis",
              "euc-jp", "euc-kr", "big5", "gbk", "gb18030")  # fmt: skip
_DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}


def _encoding(value: Any) -> Any:
    if isinstance(value, str):
        try:
            # `codecs` has bytes-to-bytes codecs too: base64, zip.
            "".encode(value)
            return codecs.lookup(value).name
        except (LookupError, ValueError):
            hint = nearest(value, _ENCODINGS)
            known = ", ".join(_ENCODINGS[:8])
            raise ValueError(f"no encoding `{value}`; {hint + ' ' if hint else ''}for example {known}") from None
    return value


def _delimiter(value: Any) -> Any:
    if isinstance(value, str):
        value = _DELIMITERS.get(value, value)
        if len(value) != 1 or value in '"\r\n\0':
            raise ValueError(f"{value!r} is not one character; for example `;`, `|` or `tab`")
    return value


def _header(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        names = tuple(value)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError("names of columns are texts; put them in quotes")
        if len(set(names)) < len(names):
            raise ValueError("names a column twice")
        return names
    if not isinstance(value, bool):
        raise ValueError("must be true, false, or the list of the columns' names")
    return value


Encoding = Annotated[str, BeforeValidator(_encoding)]
Delimiter = Annotated[str, BeforeValidator(_delimiter)]
Header = Annotated[bool | tuple[str, ...], BeforeValidator(_header)]
Quoting = Literal["standard", "none"]
Field = str


class ReadOptions(FrozenModel):
    """How files are read. None: the format's standard.

    Attributes:
        encoding: of text files; UTF-8, with or without a byte order mark, by default.
        delimiter: between the cells of CSV and TSV; by default by the suffix.
        header: of CSV and TSV: false where the first line is a row (columns are then `column1`, `column2`, …), or the names.
        quoting: of CSV and TSV: `none` takes quotes as part of the text.
        field: of JSON: the key (`a.b` for nested ones) under which the records are.
    """

    encoding: Encoding | None = None
    delimiter: Delimiter | None = None
    header: Header | None = None
    quoting: Quoting | None = None
    field: Field | None = None

    def given(self) -> dict[str, Any]:
        """The options that are set, as JSON."""
        return self.model_dump(mode="json", exclude_none=True)

    def delimiter_for(self, path: Path) -> str:
        return self.delimiter or ("\t" if format_of(path) == "tsv" else ",")

    @property
    def codec(self) -> str:
        return "utf-8-sig" if self.encoding in (None, "utf-8") else str(self.encoding)

    def is_used_by(self, paths: Iterable[Path]) -> bool:
        """True if one of the files can use each option that is set."""
        formats = {format_of(path) for path in paths}
        return all(formats & set(_USED_BY[key]) for key in self.given())

    def check_used(self, paths: Iterable[Path], name: Callable[[str], str]) -> None:
        """Refuse an option that none of the files can use.

        Args:
            name: what the user calls an option: `data.encoding`, `--encoding`.

        Raises:
            InputError: with the formats that the option is for.
        """
        files = list(paths)
        for key, value in self.given().items():
            if not ReadOptions(**{key: value}).is_used_by(files):
                of = " and ".join(dict.fromkeys(_WORDS[f] for f in _USED_BY[key]))
                raise InputError(f"{name(key)}: is for {of} files, and there is none here", "leave it out")


PLAIN = ReadOptions()


def suffix_of(path: Path) -> str:
    """The suffix of the format, with that of a compression: `.csv`, `.csv.gz`."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower() + suffix
    return suffix


def compression_of(path: Path) -> str | None:
    """gzip, zstd, xz, bzip2 or None, by the suffix."""
    return COMPRESSIONS.get(path.suffix.lower())


def format_of(path: Path) -> str | None:
    """csv, tsv, jsonl, parquet, arrow, conll or txt, by the suffix; None where afina does not read such files."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        kind = format_of(Path(path.stem))
        return kind if kind in _TEXT_FORMATS else None
    return "txt" if suffix == ".txt" else DATA_SUFFIXES.get(suffix)


def option(key: str, value: str) -> str:
    """An option of reading as a remedy names it."""
    flag = "--no-header" if (key, value) == ("header", "false") else f"--{key} {value}"
    return f"`data.{key}: {value}` in a recipe, {flag} on a command line"
