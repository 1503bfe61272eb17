"""The data files of a recipe: paths, patterns and folders become absolute files by split; and the formats that afina reads.

Examines names and permissions, never contents. Not covered: data on the Hub, and URLs.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from afina.errors import DataError, InputError, nearest

__all__ = [
    "DATA_SUFFIXES",
    "NamedSplit",
    "check_format",
    "check_utf8",
    "data_files",
    "find_files",
    "find_paths",
    "split_of",
]

#: A key of the recipe's `data.files`.
NamedSplit = Literal["all", "train", "eval", "test"]
DATA_SUFFIXES: dict[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "eval": "eval",
    "validation": "eval",
    "valid": "eval",
    "dev": "eval",
    "test": "test",
}
#: How files of other formats become files of a known one.
_CONVERSIONS = {
    ".gz": "unpack it: gunzip -k FILE; ",
    ".bz2": "unpack it: bunzip2 -k FILE; ",
    ".xz": "unpack it: unxz -k FILE; ",
    ".zst": "unpack it: unzstd FILE; ",
    ".zip": "unpack it: unzip FILE; ",
    ".xlsx": "save the sheet as `CSV UTF-8`; ",
    ".xls": "save the sheet as `CSV UTF-8`; ",
    ".arrow": "write Parquet: datasets.Dataset.from_file(FILE).to_parquet(NEW); ",
    ".feather": "write Parquet: pandas.read_feather(FILE).to_parquet(NEW); ",
    ".pkl": "write Parquet: pandas.read_pickle(FILE).to_parquet(NEW); ",
}


def find_files(named: Mapping[NamedSplit, Sequence[str]], base: Path, hint: str = "") -> dict[str, tuple[Path, ...]]:
    """The files of each split, absolute, each once and in order.

    Args:
        named: the recipe's `data.files`: paths, patterns and folders by split, or all of them as `all`.
        base: the recipe's folder; relative paths start here, then in the working directory.
        hint: ends the remedy when a file does not exist.

    Raises:
        DataError: no such file, an unknown format, a file without read permission.
        InputError: a path that is not UTF-8.
    """
    places = {split: [p for path in paths for p in find_paths(path, base)] for split, paths in named.items()}
    # A file that matches two patterns is read once.
    files: dict[str, tuple[Path, ...]] = {
        split: tuple(dict.fromkeys(f for p in paths for f in _expand(p, f"data.files.{split}: {p}", hint)))
        for split, paths in places.items()
    }
    for path in (p for paths in files.values() for p in paths):
        check_utf8(path)
    if set(files) == {"all"} and len(places["all"]) == 1 and places["all"][0].is_dir():
        return _splits_of_folder(files["all"])
    return files


def find_paths(path: str, base: Path) -> list[Path]:
    """The absolute paths that a path or pattern names: below `base`, else below the working directory.

    If nothing matches, the one path below `base`.
    """
    given = Path(os.path.expandvars(path))
    if path.startswith("~"):
        with contextlib.suppress(RuntimeError):  # `~nobody`: a file name like any other
            given = given.expanduser()
    places = [Path("/")] if given.is_absolute() else [base, Path.cwd()]
    for place in places:
        # `root_dir` keeps a bracket in a folder's own name from being read as a pattern.
        whole = (place / given).absolute()
        found = [whole] if whole.exists() else sorted(place / p for p in glob.glob(str(given), root_dir=place))
        if found:
            return found
    return [(places[0] / given).absolute()]


def data_files(folder: Path, where: str) -> list[Path]:
    """The data files in a folder, sorted by name, without hidden ones.

    Raises:
        DataError: there is none; `where` begins the message.
    """
    known = (p for p in folder.iterdir() if p.suffix.lower() in DATA_SUFFIXES and not p.name.startswith("."))
    found = sorted(p for p in known if p.is_file())
    if not found:
        raise DataError(f"{where}: no data file in this folder", f"known formats: {', '.join(DATA_SUFFIXES)}")
    return found


def check_format(path: Path, where: str, also: Sequence[str] = ()) -> None:
    """Refuse a file with a suffix that is neither a data file's nor in `also`.

    Raises:
        DataError: with how to convert it, if that is known; `where` begins the message.
    """
    suffix = path.suffix.lower()
    if suffix not in (*DATA_SUFFIXES, *also):
        raise DataError(
            f"{where}: format {path.suffix or '(no suffix)'} is not known",
            f"{_CONVERSIONS.get(suffix, '')}known formats: {', '.join((*DATA_SUFFIXES, *also))}",
        )


def split_of(path: Path) -> str | None:
    """The split that a data file is named after (`train.csv`, `validation-00000-of-00002.parquet`, …), or None."""
    return _SPLIT_NAMES.get(path.stem.replace("_", "-").split("-")[0].casefold())


def check_utf8(path: str | Path | None) -> None:
    """Refuse a path that is not UTF-8: neither the plan (JSON) nor the model card could hold it."""
    if path is None:
        return
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{str(path)!r}: this path is not UTF-8", "rename the file or folder") from None


def _expand(path: Path, where: str, hint: str) -> list[Path]:
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            raise DataError(
                f"{where}: a folder of `datasets.save_to_disk`, which afina does not read",
                "write Parquet instead: datasets.load_from_disk(FOLDER)[SPLIT].to_parquet('train.parquet')",
            )
        return data_files(path, where)
    if path.is_file():
        check_format(path, where)
        if not os.access(path, os.R_OK):
            raise DataError(f"{where}: you have no permission to read it", f"chmod u+r '{path}'")
        return [path]
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = nearest(path.name, siblings)
    raise DataError(
        f"{where}: no such file",
        (similar or "paths are looked up beside the recipe, then in the working directory") + hint,
    )


def _splits_of_folder(paths: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """train.csv, test-00000-of-00002.parquet, … in one folder are its splits; files with other names are one whole.

    Raises:
        DataError: some are named after splits and some are not: as one whole, test rows would be trained on.
    """
    splits: dict[str, tuple[Path, ...]] = {}
    for path in paths:
        split = split_of(path) or "all"
        splits[split] = (*splits.get(split, ()), path)
    if "all" in splits and len(splits) > 1:
        split, other = next(s for s in splits if s != "all"), splits["all"][0]
        raise DataError(
            f"data.files.all: {other.parent} holds {splits[split][0].name}, which is {split}, "
            f"and {other.name}, which is not named after a split",
            "name the files of each split: `files: {train: …, eval: …, test: …}`",
        )
    return splits
