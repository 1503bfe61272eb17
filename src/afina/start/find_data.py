"""Find labelled data for `afina init`: a file, a folder, or a data set of the Hub."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import DataError, EnvironmentProblem, InputError, nearest
from afina.recipe.data_files import DATA_SUFFIXES, check_format, data_files, split_of
from afina.recipe.formats import read_rows, readable_parquet
from afina.run.commands import container_argv
from afina.run.plan import bare_plan
from afina.run.workers import ask_worker
from afina.site.settings import Site, cache_environment, environment, hub_token
from afina.start.examine import Source

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
    """

    origin: str
    sources: Mapping[str, Source]
    files: Mapping[str, tuple[Path, ...]]
    hub: str | None = None
    config: str | None = None
    splits: Mapping[str, str] | None = None

    @property
    def main(self) -> Source:
        """The source of the training rows."""
        return self.sources.get("train") or next(iter(self.sources.values()))


def data_files_here(folder: Path) -> list[Path]:
    """Data files in `folder` and in its `data/`, the largest first."""
    files = [
        path
        for path in (*folder.glob("*"), *folder.glob("data/*"))
        if path.suffix.lower() in DATA_SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]
    return sorted(files, key=lambda path: -path.stat().st_size)


def find_data(data: str, site: Site | None, config: str | None = None) -> LabelledData:
    """A file, a folder or a Hub id. A file called train brings the files of the other splits beside it.

    Raises:
        DataError, InputError: there is no such data; with the nearest name.
        EnvironmentProblem: a Hub data set, and nothing here that can fetch it.
    """
    path = Path(os.path.expandvars(data)).expanduser()
    if not path.exists():
        local = data.startswith((".", "/", "~", "$")) or path.suffix.lower() in DATA_SUFFIXES or data.count("/") > 1
        if not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data):
            return _find_on_hub(data, config, site)
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"--data {data}: no such file or folder",
            nearest(path.name, siblings) or "give a file, a folder, or the id of a Hub data set (owner/name)",
        )
    if config is not None:
        raise InputError(f"--config {config}: belongs to a Hub data set", "leave it out")
    path = path.absolute()
    by_split = _by_split(path, _files_of(path))
    sources = {split: _source(paths) for split, paths in by_split.items()}
    return LabelledData(
        str(path), sources, by_split, splits=None if "all" in by_split else {split: split for split in by_split}
    )


def default_name(data: LabelledData) -> str:
    """A name for the run: the data's, without characters that a folder's name cannot hold."""
    origin = Path(data.origin)
    stem = data.hub.rpartition("/")[2] if data.hub else origin.stem
    if not data.hub and split_of(origin):
        stem = origin.absolute().parent.name
    return re.sub(r"[\x00-\x1f\x7f/]+", "-", stem).strip(".- ")[:60] or "run"


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return list(data_files(path, str(path)))
    check_format(path, str(path))
    if split_of(path) != "train":
        return [path]
    return [p for p in sorted(path.parent.iterdir()) if p.suffix.lower() == path.suffix.lower() and split_of(p)]


def _by_split(path: Path, files: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    by_split: dict[str, tuple[Path, ...]] = {}
    for file in files:
        split = split_of(file) or "all"
        by_split[split] = (*by_split.get(split, ()), file)
    if "all" in by_split and len(by_split) > 1:
        split = next(s for s in by_split if s != "all")
        raise DataError(
            f"{path} holds {by_split[split][0].name}, the {split} split, and {by_split['all'][0].name}, which names no split",
            "put the files of the splits into a folder of their own, or give one file",
        )
    if "train" not in by_split and "all" not in by_split:
        return {"all": tuple(file for paths in by_split.values() for file in paths)}
    return by_split


def _source(paths: Sequence[Path], name: str | None = None) -> Source:
    counted = sum(p.stat().st_size for p in paths) > _LARGE or all(p.suffix.lower() == ".parquet" for p in paths)
    total = sum(map(_count_rows, paths)) if counted else None
    name = name or ", ".join(p.name for p in paths)
    return Source(name, lambda: (row for path in paths for row in read_rows(path)), total)


def _count_rows(path: Path) -> int:
    """Rows of a Parquet file; of others the line breaks, an estimate: those inside a quoted cell count too."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        with readable_parquet(path):
            return int(pq.read_metadata(path).num_rows)
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
                "build the image (container/build.sh) and name it in site.env, or `pip install 'afina[train]'`",
            )
        argv = container_argv(bare_plan(site), ["python", *argv[1:]], [])
    return dict(ask_worker(argv, env, question, name="fetching the data set")["files"])
