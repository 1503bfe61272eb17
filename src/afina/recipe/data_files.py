"""The data files of a recipe: paths, patterns and folders become absolute files by split.

A folder is a folder of files, of files or folders that are named after splits, of partitions (`label=good/`), or what
`datasets.save_to_disk` wrote. Examines names and permissions, never rows. Not covered: data on the Hub, and URLs.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from afina.errors import DataError, InputError
from afina.files import nearest_path
from afina.formats.read_options import COMPRESSIONS, DATA_SUFFIXES, format_of, suffix_of

__all__ = [
    "NamedSplit",
    "check_format",
    "check_utf8",
    "data_files",
    "file_stem",
    "find_files",
    "find_paths",
    "is_data_file",
    "split_named",
    "split_of",
    "splits_of_folder",
]

#: A key of the recipe's `data.files`.
NamedSplit = Literal["all", "train", "eval", "test"]
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "eval": "eval",
    "validation": "eval",
    "valid": "eval",
    "val": "eval",
    "dev": "eval",
    "test": "test",
    "testing": "test",
}
#: How files of other formats become files of a known one.
_CONVERSIONS = {
    ".zip": "unpack it: unzip FILE; ",
    ".txt": "name a table .csv, or .tsv with tabs, and tagged words .conll; ",
    ".xlsx": "save the sheet as `CSV UTF-8`; ",
    ".xls": "save the sheet as `CSV UTF-8`; ",
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
    for split, given in named.items():
        for address in (path for path in given if "://" in path):
            raise DataError(
                f"data.files.{split}: {address} is an address", "download it first; a data set of the Hub: `data.hub`"
            )
    places = {split: [p for path in paths for p in find_paths(path, base)] for split, paths in named.items()}
    # A file that matches two patterns is read once.
    files: dict[str, tuple[Path, ...]] = {
        split: tuple(dict.fromkeys(f for p in paths for f in _expand(p, f"data.files.{split}: {p}", hint)))
        for split, paths in places.items()
    }
    for path in (p for paths in files.values() for p in paths):
        check_utf8(path)
    if set(files) == {"all"} and len(places["all"]) == 1 and places["all"][0].is_dir():
        return splits_of_folder(places["all"][0], files["all"])
    for split, paths in places.items():
        for path in paths:
            _check_one_split(path, f"data.files.{split}: {path}")
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
        paths = [whole] if whole.exists() else sorted(place / p for p in glob.glob(str(given), root_dir=place))
        if paths:
            return paths
    return [(places[0] / given).absolute()]


def data_files(folder: Path, where: str) -> list[Path]:
    """The data files in a folder, sorted by name, without hidden ones; else those of its splits or partitions.

    Raises:
        DataError: there is none; `where` begins the message.
    """
    if (saved := _saved_files(folder, where)) is not None:
        return saved
    files = sorted(p for p in folder.iterdir() if is_data_file(p) and p.is_file())
    if not files:
        below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        named = (
            [p for p in below if "=" in p.name[1:]]
            or [p for p in below if p.name.casefold() in _SPLIT_NAMES]
            or [p for p in below if p.name == "data"]  # a clone of a data set on the Hub
        )
        files = [file for p in named for file in data_files(p, where)]
    if not files:
        folders = f"; it has the folders {', '.join(p.name for p in below[:10])}" if below else ""
        raise DataError(f"{where}: no data file in this folder", f"known formats: {', '.join(DATA_SUFFIXES)}{folders}")
    return files


def is_data_file(path: Path) -> bool:
    """True of a name that a data file has: its suffix is known, and it is not hidden."""
    return format_of(path) not in (None, "txt") and not path.name.startswith(".")


def _saved_files(folder: Path, where: str) -> list[Path] | None:
    """The files of a folder that `datasets.save_to_disk` wrote; None of any other folder.

    Raises:
        DataError: a file is missing, or the folder's record cannot be read.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [file for split in splits for file in _saved_files(folder / split, where) or []]
        if not (folder / "state.json").is_file():
            return None
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        paths = [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{where}: what save_to_disk wrote cannot be read: {error}", "save the data set again"
        ) from None
    if state.get("_indices_data_files"):
        raise DataError(
            f"{where}: an old `datasets` saved a selection of rows, which is in another file",
            "save it again: load_from_disk(FOLDER).flatten_indices().save_to_disk(NEW)",
        )
    for path in paths:
        if not path.is_file():
            raise DataError(f"{where}: {path.name} is missing", "copy the whole folder, or save the data set again")
    return paths


def _check_one_split(path: Path, where: str) -> None:
    """Refuse a folder that holds several splits as one of them."""
    if not path.is_dir():
        return
    if (path / "dataset_dict.json").is_file():
        names = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise DataError(
            f"{where}: holds several splits: {', '.join(names)}", f"name the folder of one: {path / names[0]}"
        )
    splits = {split for file in data_files(path, where) if (split := _split_in(path, file))}
    if len(splits) > 1:
        raise DataError(
            f"{where}: holds several splits: {', '.join(sorted(splits))}",
            "name the files of each split: `files: {train: …, eval: …, test: …}`; or only the folder: `files: FOLDER`",
        )


def _split_in(folder: Path, path: Path) -> str | None:
    """The split that a file's folder below `folder`, else the file, is named after; or None."""
    above = path.relative_to(folder).parts[:-1] if path.is_relative_to(folder) else ()
    return next((_SPLIT_NAMES[name.casefold()] for name in above if name.casefold() in _SPLIT_NAMES), split_of(path))


def check_format(path: Path, where: str, also: Sequence[str] = ()) -> None:
    """Refuse a file with a suffix that is neither a data file's nor in `also`.

    Raises:
        DataError: with how to convert it, if that is known; `where` begins the message.
    """
    kind, suffix = format_of(path), path.suffix.lower()
    if kind is None or (kind == "txt" and ".txt" not in also):
        packed = f"unpack it, {suffix_of(path)} is not read; " if suffix in COMPRESSIONS else ""
        raise DataError(
            f"{where}: format {path.suffix or '(no suffix)'} is not known",
            f"{packed or _CONVERSIONS.get(suffix, '')}known formats: {', '.join((*DATA_SUFFIXES, *also))}, "
            f"those of text also with {', '.join(COMPRESSIONS)}",
        )


def file_stem(path: Path) -> str:
    """The name without the suffix of its format and compression."""
    return path.name[: len(path.name) - len(suffix_of(path))] if suffix_of(path) else path.name


def split_of(path: Path) -> str | None:
    """The split that a data file, or its folder, is named after (`train.csv`, `validation-00000-of-00002.parquet`, `test/0.csv`);
    or None."""
    return split_named(file_stem(path).replace("_", "-").split("-")[0])


def split_named(name: str) -> str | None:
    """The split that a name means (`Validation`: eval), or None."""
    return _SPLIT_NAMES.get(name.strip().casefold())


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
        return data_files(path, where)
    if path.is_file():
        check_format(path, where)
        if not os.access(path, os.R_OK):
            raise DataError(f"{where}: you have no permission to read it", shlex.join(["chmod", "u+r", str(path)]))
        return [path]
    raise DataError(
        f"{where}: no such file",
        (nearest_path(path) or "paths are looked up beside the recipe, then in the working directory") + hint,
    )


def splits_of_folder(folder: Path, paths: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """The files of a folder by split, after their names (train.csv, test-00000-of-00002.parquet, …) or those of their folders;
    files with other names are one whole.

    Raises:
        DataError: some are named after splits and some are not: as one whole, test rows would be trained on.
    """
    splits: dict[str, tuple[Path, ...]] = {}
    for path in paths:
        split = _split_in(folder, path)
        splits[split or "all"] = (*splits.get(split or "all", ()), path)
    if "all" in splits and len(splits) > 1:
        split, other = next(s for s in splits if s != "all"), splits["all"][0]
        raise DataError(
            f"data.files.all: {folder} holds {splits[split][0].relative_to(folder)}, which is {split}, "
            f"and {other.relative_to(folder)}, which is not named after a split",
            "name the files of each split: `files: {train: …, eval: …, test: …}`",
        )
    return splits
