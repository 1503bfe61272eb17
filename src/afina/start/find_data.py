"""Find labelled data for `afina init`: a file, a folder, or a data set of the Hub."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.errors import DataError, EnvironmentProblem, HubError, InputError
from afina.files import nearest_path
from afina.formats.columnar import count_rows
from afina.formats.notes import Notes
from afina.formats.read_options import PLAIN, ReadOptions, compression_of, format_of
from afina.formats.rows import read_rows
from afina.recipe.data_files import check_format, data_files, file_stem, is_data_file, split_of, splits_of_folder
from afina.run.commands import container_argv
from afina.run.plan import bare_plan
from afina.run.workers import ask_worker
from afina.site.image import check_image
from afina.site.settings import Site, cache_environment, environment, hub_token
from afina.start.guess_columns import Source

__all__ = ["LabelledData", "data_files_here", "default_name", "find_data"]

#: Rows of larger files are estimated before they are read, for the progress bar.
_LARGE = 50_000_000


@dataclass(frozen=True)
class LabelledData:
    """Labelled data, by split.

    Attributes:
        origin: the path or the Hub id.
        sources: rows by split: `all`, or train, eval, test.
        files: local files by split; empty for a Hub data set.
        splits: split -> the Hub's split or the file key it is read from; None where there is one source.
        reading: how the files are read; guessed: the reason of each option of it that nobody has given.
    """

    origin: str
    sources: Mapping[str, Source]
    files: Mapping[str, tuple[Path, ...]]
    hub: str | None = None
    config: str | None = None
    splits: Mapping[str, str] | None = None
    reading: ReadOptions = PLAIN
    guessed: Mapping[str, str] = field(default_factory=dict)

    @property
    def main(self) -> Source:
        """The source of the training rows."""
        return self.sources.get("train") or next(iter(self.sources.values()))


def data_files_here(folder: Path) -> list[Path]:
    """Data files in `folder` and in its `data/`, the largest first."""
    files = [path for path in (*folder.glob("*"), *folder.glob("data/*")) if is_data_file(path) and path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def find_data(data: str, site: Site | None, config: str | None = None, reading: ReadOptions = PLAIN) -> LabelledData:
    """A file, a folder or a Hub id. A file called train brings the files of the other splits beside it.

    Raises:
        DataError, InputError: there is no such data; with the nearest name. Or an option of reading that it cannot use.
        EnvironmentProblem: a Hub data set, and nothing here that can fetch it.
    """
    path = Path(os.path.expandvars(data)).expanduser()
    if not path.exists():
        local = data.startswith((".", "/", "~", "$")) or format_of(path) is not None or data.count("/") > 1
        if not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data):
            reading.check_used([], "--{}".format)
            try:
                return _find_on_hub(data, config, site)
            except HubError as error:
                raise error.reworded(
                    f"{error.message}; and no file or folder here has that name. {nearest_path(path)}".rstrip()
                ) from None
        raise DataError(
            f"--data {data}: no such file or folder",
            nearest_path(path) or "give a file, a folder, or the id of a Hub data set (owner/name)",
        )
    if config is not None:
        raise InputError(f"--config {config}: belongs to a Hub data set", "leave it out")
    path = path.absolute()
    by_split = _by_split(path)
    reading.check_used((file for files in by_split.values() for file in files), "--{}".format)
    sources = {split: _source(paths, reading=reading) for split, paths in by_split.items()}
    splits = None if "all" in by_split else {split: split for split in by_split}
    return LabelledData(str(path), sources, by_split, splits=splits, reading=reading)


def default_name(data: LabelledData) -> str:
    """A name for the run: the data's, without characters that a folder's name cannot hold."""
    origin = Path(data.origin)
    stem = data.hub.rpartition("/")[2] if data.hub else file_stem(origin)
    if not data.hub and split_of(origin):
        stem = origin.absolute().parent.name
    return re.sub(r"[\x00-\x1f\x7f/]+", "-", stem).strip(".- ")[:60] or "run"


def _by_split(path: Path) -> dict[str, tuple[Path, ...]]:
    """The files of a folder or a file by split; a file called train stands for those of the other splits beside it."""
    if path.is_dir():
        by_split = splits_of_folder(path, data_files(path, str(path)))
    else:
        check_format(path, str(path))
        if split_of(path) != "train":
            return {"all": (path,)}
        beside = [p for p in sorted(path.parent.iterdir()) if format_of(p) == format_of(path) and split_of(p)]
        by_split = splits_of_folder(path.parent, beside)
    if "train" not in by_split and "all" not in by_split:
        return {"all": tuple(file for paths in by_split.values() for file in paths)}
    return by_split


def _source(paths: Sequence[Path], name: str | None = None, reading: ReadOptions = PLAIN) -> Source:
    counts = [_count_rows(path) if _is_counted(paths, path) else None for path in paths]
    total = sum(count for count in counts if count is not None) if None not in counts else None
    notes = Notes()
    name = name or ", ".join(p.name for p in paths)
    return Source(name, lambda: (row for path in paths for row in read_rows(path, reading, notes)), total, notes)


def _is_counted(paths: Sequence[Path], path: Path) -> bool:
    if format_of(path) == "parquet":
        return True
    return compression_of(path) is None and format_of(path) != "arrow" and sum(p.stat().st_size for p in paths) > _LARGE


def _count_rows(path: Path) -> int | None:
    """Rows of a Parquet file; of others the line breaks, an estimate: those inside a quoted cell count too."""
    if format_of(path) == "parquet":
        return count_rows(path)
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 22), b""))


def _find_on_hub(hub: str, config: str | None, site: Site | None) -> LabelledData:
    if site is None:
        raise EnvironmentProblem(
            f"--data {hub}: a data set from the Hub is fetched to scratch, and there is no site file yet",
            "write one first: afina init --site-only; then run this again",
        )
    files = _fetch({"hub": hub, "config": config, "site": site.model_dump(mode="json")}, site)
    names = {split_of(Path(split)) or split: split for split in files}
    if "train" not in names and "all" not in names:
        names = {"train": next(iter(files)), **{k: v for k, v in names.items() if k in ("eval", "test")}}
    splits: dict[str, str] = {split: names[split] for split in ("train", "eval", "test") if split in names}
    sources = {
        split: _source([Path(files[name])], f"{hub}/{name}" if len(files) > 1 else hub)
        for split, name in splits.items()
    }
    return LabelledData(hub, sources, {}, hub=hub, config=config, splits=splits if len(splits) > 1 else None)


def _fetch(question: Mapping[str, Any], site: Site) -> dict[str, str]:
    """Fetch a Hub data set through the worker's `peek`; its files by split."""
    argv = [sys.executable, "-m", "afina.worker", "peek"]
    here = {**os.environ, **environment(site)}
    env = {**here, **cache_environment(site, here), **hub_token(here)}
    if importlib.util.find_spec("datasets") is None:
        if site.image is None:
            raise EnvironmentProblem(
                f"{question['hub']}: neither the package `datasets` nor an image is here to fetch it",
                "build the image (container/build.sh) and name it in site.env, or `pip install '.[train]'` in a checkout of afina",
            )
        check_image(site)
        argv = container_argv(bare_plan(site), ["python", *argv[1:]], [])
    return dict(ask_worker(argv, env, question, name="fetching the data set")["files"])
