"""Pins: names on the Hugging Face Hub resolved to commits; and models, fetched once, then used without network.

A pin (`<scratch>/pins/<kind>-….json`) records the commit of a name at its first use. Every later prepare and every job takes that
commit until `AFINA_REFRESH=1` (`afina prefetch --refresh`) resolves the name again. Models stay in the Hub's own cache; a file
whose digest is not the Hub's is fetched again. Data sets: `afina.worker.hub.datasets`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from afina.errors import HubError, InputError
from afina.files import FileRecord, describe, write_atomic
from afina.processes import advisory_lock
from afina.recipe.local_model import check_no_adapter
from afina.recipe.schema import Recipe
from afina.site.settings import Site
from afina.worker.hub.errors_explained import (
    LONGEST_WAIT,
    PREFETCH,
    hub_errors,
    refuse_long_waits,
    retry_after,
    retry_resets,
)
from afina.worker.model.model_files import training_files

__all__ = ["HubModel", "Pin", "fetch_model", "pin", "slug"]

Say = Callable[[str], None]

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pin:
    """A name on the Hub, resolved.

    Attributes:
        id: `owner/name`, also for an old name without owner such as `yelp_review_full`.
        commit: 40 hex digits.
        files: names of all files of that commit.
        digests: the Hub's digests of a model's files: `sha256:<hex>` of a large file, `git:<hex>` (SHA-1 of the blob) of a small one.
    """

    id: str
    commit: str
    files: tuple[str, ...]
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HubModel:
    """A Hub model on local disk.

    Attributes:
        folder: the snapshot.
        files: size and SHA-256 of the files that training reads.
    """

    folder: Path
    files: dict[str, FileRecord]


def pin(site: Site, kind: str, name: str, revision: str | None, say: Say) -> Pin:
    """The commit of `name` (kind "model" or "dataset"): as recorded, else by the Hub, and then recorded.

    Raises:
        HubError: no such name, no access, or no connection to the Hub.
        RecipeError: no such revision; with the known ones.
    """
    wanted = revision or "main"
    key = hashlib.sha256(json.dumps([kind, name, wanted]).encode()).hexdigest()[:12]
    path = site.scratch / "pins" / f"{kind}-{slug(name)}-{key}.json"
    known = _read_pin(path)
    if known is not None and _COMMIT.fullmatch(wanted) and known.commit != wanted:
        known = None  # the file was altered
    if known is not None and (os.environ.get("AFINA_REFRESH") != "1" or _COMMIT.fullmatch(wanted)):
        return known
    resolved = _resolve(kind, name, revision)
    if known is not None and known.commit != resolved.commit:
        say(f"{kind} {name}: {wanted} moved from {known.commit[:12]} to {resolved.commit[:12]}")
    path.parent.mkdir(exist_ok=True)
    record = {"kind": kind, "asked": name, "revision": wanted, **asdict(resolved)}
    write_atomic(path, json.dumps({**record, "pinned_at": int(time.time())}, indent=1) + "\n")
    return resolved


def fetch_model(site: Site, recipe: Recipe, pin: Pin, say: Say) -> HubModel:
    """The recipe's Hub model, complete on local disk, every file with the Hub's digest.

    Raises:
        HubError: no access, the transfer broke off, or no connection to the Hub.
        InputError: the repository has no weights.
    """
    check_no_adapter(f"the repository {recipe.model}", pin.files)
    wanted = training_files(pin.files, recipe)
    if not wanted:
        raise InputError(
            f"model {recipe.model}: its repository has no model.safetensors and no pytorch_model.bin",
            "choose a model with PyTorch weights; a repository with only GGUF, ONNX or adapter files cannot be trained",
        )
    model, wrong = _cached(pin, wanted)
    if model is not None:
        return model
    key = hashlib.sha256(f"{pin.id}@{pin.commit}".encode()).hexdigest()[:16]
    with advisory_lock(site.scratch / "pins" / f".turn-{key}", f"fetching model {recipe.model}", say):
        model, wrong = _cached(pin, wanted)  # another process may have fetched it meanwhile
        if model is not None:
            return model
        damaged = {name: path for name, path in wrong.items() if path is not None}
        for path in damaged.values():
            say(f"{path}: its content is not what the Hub holds; fetching it again")
        if not damaged:
            say(f"fetching model {recipe.model} at {pin.commit[:12]}")
        with hub_errors("model", recipe.model, recipe.revision):
            _download(pin, [name for name in wrong if name not in damaged], again=False)
            _download(pin, list(damaged), again=True)
        model, wrong = _cached(pin, wanted)
    if model is None:
        # Offline, snapshot_download returns an incomplete snapshot without an error.
        missing, broken = next(iter(wrong.items()))
        what = f"{broken} is damaged" if broken else f"{missing} is not on this machine"
        raise HubError(f"model {recipe.model}: {what}", PREFETCH)
    return model


# -- pins -------------------------------------------------------------------------------------------------------------


def _resolve(kind: str, name: str, revision: str | None) -> Pin:
    with hub_errors(kind, name, revision):
        import huggingface_hub

        api = huggingface_hub.HfApi()
        for pause in (1, 4, None):
            try:
                info = (
                    api.model_info(name, revision=revision, timeout=10, files_metadata=True)
                    if kind == "model"
                    else api.dataset_info(name, revision=revision, timeout=10)
                )
                break
            except huggingface_hub.errors.HfHubHTTPError as error:
                # Unlike downloads, these calls do not retry by themselves.
                status = error.response.status_code
                wait = retry_after(error.response.headers) or pause
                if pause is None or wait is None or wait > LONGEST_WAIT or not (status == 429 or status >= 500):
                    raise
                time.sleep(wait)
    assert info.sha is not None
    if _COMMIT.fullmatch(revision or "") and info.sha != revision:
        raise HubError(
            f"{kind} {name}: the Hub answers with commit {info.sha} instead of {revision}",
            "a branch or a tag is named like a commit: see its page, and give the right commit",
        )
    siblings = info.siblings or ()
    digests = {s.rfilename: d for s in siblings if kind == "model" and (d := _digest(s)) is not None}
    return Pin(info.id, info.sha, tuple(s.rfilename for s in siblings), digests)


def _digest(sibling: Any) -> str | None:
    """The Hub's digest of one file; None where the Hub, or a mirror of it, gives none."""
    if sibling.lfs is not None:
        return f"sha256:{sibling.lfs.sha256}"
    return f"git:{sibling.blob_id}" if sibling.blob_id else None


def _read_pin(path: Path) -> Pin | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Pin(value["id"], value["commit"], tuple(value["files"]), dict(value.get("digests", {})))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name)


# -- models -----------------------------------------------------------------------------------------------------------


def _cached(pin: Pin, wanted: list[str]) -> tuple[HubModel | None, dict[str, Path | None]]:
    """The model if all of `wanted` is intact in the Hub's cache; else the bad files by name, with the path of a damaged one.

    Uses no network; reads all files.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path()
    files: dict[str, FileRecord] = {}
    wrong: dict[str, Path | None] = {}
    for name in wanted:
        cached = try_to_load_from_cache(pin.id, name, revision=pin.commit)
        if not isinstance(cached, str):
            wrong[name] = None
            continue
        folder = Path(cached).parents[name.count("/")]
        try:
            files |= describe(folder, [name])
            intact = _is_as_pinned(folder / name, files[name], pin.digests.get(name))
        except OSError:
            intact = False
        if not intact:
            wrong[name] = folder / name
    return (None if wrong else HubModel(folder, files)), wrong


def _is_as_pinned(path: Path, record: FileRecord, expected: str | None) -> bool:
    kind, _, digest = (expected or "").partition(":")
    if kind == "sha256":
        return record["sha256"] == digest
    if kind == "git":
        blob = hashlib.sha1(b"blob %d\0" % record["size"])
        blob.update(path.read_bytes())
        return blob.hexdigest() == digest
    return True


def _download(pin: Pin, names: list[str], *, again: bool) -> None:
    """Args: again: fetch files even if they exist, because they are damaged."""
    if not names:
        return
    import huggingface_hub

    refuse_long_waits()
    patterns = [_literal(name) for name in names]
    retry_resets(
        lambda: huggingface_hub.snapshot_download(
            pin.id, revision=pin.commit, allow_patterns=patterns, max_workers=4, force_download=again
        )
    )


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
