"""Hub data sets as Parquet on local disk: fetched once at their pinned commit, then used without network.

    <scratch>/cache/datasets/<name>-<digest>/
        splits.json             which file is which split; size and SHA-256 of each
        <n>-<split>.parquet

`python -m afina.worker peek` fetches one for `afina init`. Published by rename. `datasets` is needed for the first fetch only, so its cache, whose names differ offline, does not matter.

Not covered: data sets that need a Python script (datasets 4 dropped them), images and sound.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import HubError, InputError, RecipeError, nearest
from afina.files import describe, difference, sync_file, write_atomic
from afina.processes import advisory_lock
from afina.publish import publish, staging
from afina.recipe.keys.data_keys import Data
from afina.site.settings import Site
from afina.worker.hub.errors_explained import hub_errors, refuse_long_waits, retry_resets
from afina.worker.hub.pins import Pin, pin, slug
from afina.worker.reply import read_question

__all__ = ["HubData", "answer", "fetch_data"]

Say = Callable[[str], None]

#: Feature types that can be text or labels.
_KEPT = ("Value", "ClassLabel", "List", "LargeList", "Sequence")


@dataclass(frozen=True)
class HubData:
    """A data set at one commit, on local disk.

    Attributes:
        id: as the recipe names it.
        commit: 40 hex digits.
        folder: holds `<split>.parquet`.
        splits: file name by split.
    """

    id: str
    commit: str
    folder: Path
    splits: dict[str, str]

    def file(self, split: str) -> Path:
        return self.folder / self.splits[split]


def answer(arguments: list[str]) -> dict[str, Any]:
    """The files of a data set, fetched whole to where `afina prefetch` finds them: {"files": {split: path}}.

    The question is {"site": a site, "hub": id, "config": name or null, "revision": …}.
    """

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    question = read_question("a question about data")
    site, hub = Site.model_validate(question["site"]), question["hub"]
    data = Data(hub=hub, config=question.get("config"), text=("text",), label=("label",))
    fetched = fetch_data(site, data, pin(site, "dataset", hub, question.get("revision"), say), say)
    return {"files": {split: str(fetched.file(split)) for split in fetched.splits}}


def fetch_data(site: Site, data: Data, pin: Pin, say: Say, *, digests: bool = False) -> HubData:
    """The recipe's Hub data set as Parquet on local disk.

    Args:
        digests: compare SHA-256 of existing files too, not only sizes: for a caller that is about to read them.

    Raises:
        HubError: not allowed, the transfer broke off, or the Hub cannot be reached.
        RecipeError: an unknown configuration; with those that are known.
        InputError: datasets cannot load it.
    """
    assert data.hub is not None
    key = hashlib.sha256(json.dumps([data.hub, data.config, pin.commit]).encode()).hexdigest()[:16]
    folder = site.cache / "datasets" / f"{slug(data.hub)}-{key}"
    splits = _splits(folder, digests=digests)
    if splits is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with advisory_lock(folder.parent / f".turn-{key}", f"fetching data set {data.hub}", say):
            splits = _splits(folder, digests=digests)
            if splits is None:
                again = " again, because the local copy is damaged" if folder.exists() else ""
                say(f"fetching data set {data.hub} at {pin.commit[:12]}{again}")
                _download(data, pin, folder)
                splits = _splits(folder)
    if splits is None:
        raise HubError(f"data set {data.hub}: {folder} is not complete", "remove that folder and run the command again")
    return HubData(data.hub, pin.commit, folder, splits)


def _splits(folder: Path, *, digests: bool = False) -> dict[str, str] | None:
    """Split -> file, if all files are as they were written."""
    try:
        about = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
        if difference(folder, about["files"], digests=digests) is not None:
            return None
        return {str(split): str(file) for split, file in about["splits"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _download(data: Data, pin: Pin, folder: Path) -> None:
    assert data.hub is not None
    with staging(folder) as aside:
        with hub_errors("dataset", data.hub, data.revision):
            import datasets

            refuse_long_waits()
            config = _config_name(data, pin)
            # A private cache: no lock is shared with another process, nothing is left behind, and where the Hub refuses,
            # load_dataset cannot silently return another cached revision.
            cache = str(aside / "cache")
            loaded = retry_resets(lambda: datasets.load_dataset(pin.id, config, revision=pin.commit, cache_dir=cache))
            if not loaded:
                raise InputError(f"data set {data.hub}: it has no splits", "check the data set's page")
            splits = {}
            for number, (split, rows) in enumerate(loaded.items()):
                file = f"{number}-{slug(split)}.parquet"
                rows.select_columns([n for n, f in rows.features.items() if type(f).__name__ in _KEPT]).to_parquet(
                    str(aside / file)
                )
                sync_file(aside / file)
                splits[split] = file
            del loaded, rows
        shutil.rmtree(aside / "cache", ignore_errors=True)
        files = describe(aside, splits.values())
        record = {"id": data.hub, "config": data.config, "commit": pin.commit, "splits": splits, "files": files}
        write_atomic(aside / "splits.json", json.dumps(record, indent=1) + "\n")
        publish(aside, folder, lambda there: _splits(there, digests=True) is not None)


def _config_name(data: Data, pin: Pin) -> str | None:
    import datasets

    known = retry_resets(lambda: datasets.get_dataset_config_names(pin.id, revision=pin.commit))
    if data.config is None:
        if len(known) > 1 and "default" not in known:
            raise RecipeError(
                f"data.config: {data.hub} has {len(known)} configurations", f"name one; known: {', '.join(known)}"
            )
        return None
    if data.config not in known:
        hint = nearest(data.config, known)
        raise RecipeError(
            f"data.config: {data.hub} has no configuration `{data.config}`",
            f"{hint + ' ' if hint else ''}known: {', '.join(known)}",
        )
    return data.config
