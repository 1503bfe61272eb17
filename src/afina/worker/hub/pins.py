"""Names on the Hugging Face Hub, pinned to a commit once; models fetched once, found again without network.

A pin (`<scratch>/pins/<kind>-….json`) says which commit a name meant when it was first asked for; every later prepare and
every job takes that commit, until `AFINA_REFRESH=1` (`afina prefetch --refresh`) asks again. Models stay in the Hub's own
cache; a file of it that is not what the Hub said it is gets fetched again. Data sets: `afina.worker.hub.datasets`.
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
from afina.recipe.schema import Recipe
from afina.site.settings import Site
from afina.worker.hub.errors_explained import LONGEST_WAIT, PREFETCH, bound_waits, hub_errors, persist, wait_of
from afina.worker.model.pretrained import training_files

__all__ = ["HubModel", "Pin", "fetch_model", "pin", "slug"]

Say = Callable[[str], None]

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pin:
    """A name on the Hub, resolved.

    Attributes:
        id: `owner/name`, where an old name such as `yelp_review_full` has none.
        commit: 40 hex digits.
        files: names of all files of that commit.
        digests: what the Hub says of a model's files: `sha256:<hex>` of a large one, `git:<hex>` (SHA-1 of the blob) of another.
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
    """The commit of `name` (kind "model" or "dataset"): as recorded, else asked of the Hub and recorded.

    Raises:
        HubError: it is not there, not allowed, or the Hub cannot be reached.
        RecipeError: there is no such revision; with those that are known.
    """
    asked = revision or "main"
    key = hashlib.sha256(json.dumps([kind, name, asked]).encode()).hexdigest()[:12]
    path = site.scratch / "pins" / f"{kind}-{slug(name)}-{key}.json"
    known = _read_pin(path)
    if known is not None and _COMMIT.fullmatch(asked) and known.commit != asked:
        known = None  # not what was written here
    if known is not None and (os.environ.get("AFINA_REFRESH") != "1" or _COMMIT.fullmatch(asked)):
        return known
    found = _resolve(kind, name, revision)
    if known is not None and known.commit != found.commit:
        say(f"{kind} {name}: {asked} moved from {known.commit[:12]} to {found.commit[:12]}")
    path.parent.mkdir(exist_ok=True)
    record = {"kind": kind, "asked": name, "revision": asked, **asdict(found)}
    write_atomic(path, json.dumps({**record, "pinned_at": int(time.time())}, indent=1) + "\n")
    return found


def fetch_model(site: Site, recipe: Recipe, pin: Pin, say: Say) -> HubModel:
    """The recipe's Hub model, complete on local disk, every file as the Hub said it is.

    Raises:
        HubError: not allowed, the transfer broke off, or the Hub cannot be reached.
        InputError: the repository holds no weights.
    """
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
        # Offline, snapshot_download is content with the part of a snapshot that is there.
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
                # These calls do not try again by themselves, unlike downloads.
                status = error.response.status_code
                wait = wait_of(error.response.headers) or pause
                if pause is None or wait is None or wait > LONGEST_WAIT or not (status == 429 or status >= 500):
                    raise
                time.sleep(wait)
    assert info.sha is not None
    if _COMMIT.fullmatch(revision or "") and info.sha != revision:
        raise HubError(
            f"{kind} {name}: the Hub answers with commit {info.sha}, {revision} was asked for",
            "a branch or a tag has the name of a commit: see its page, and give the commit that you mean",
        )
    siblings = info.siblings or ()
    digests = {s.rfilename: d for s in siblings if kind == "model" and (d := _digest(s)) is not None}
    return Pin(info.id, info.sha, tuple(s.rfilename for s in siblings), digests)


def _digest(sibling: Any) -> str | None:
    """What the Hub says of one file; None where it (or a mirror of it) says nothing."""
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
    """The model if all of `wanted` is whole in the Hub's cache; else what is wrong: names, with the path of a damaged one.

    Asks nobody, and reads everything.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path()
    files: dict[str, FileRecord] = {}
    wrong: dict[str, Path | None] = {}
    for name in wanted:
        found = try_to_load_from_cache(pin.id, name, revision=pin.commit)
        if not isinstance(found, str):
            wrong[name] = None
            continue
        folder = Path(found).parents[name.count("/")]
        try:
            files |= describe(folder, [name])
            whole = _is_as_pinned(folder / name, files[name], pin.digests.get(name))
        except OSError:
            whole = False
        if not whole:
            wrong[name] = folder / name
    return (None if wrong else HubModel(folder, files)), wrong


def _is_as_pinned(path: Path, found: FileRecord, expected: str | None) -> bool:
    kind, _, digest = (expected or "").partition(":")
    if kind == "sha256":
        return found["sha256"] == digest
    if kind == "git":
        blob = hashlib.sha1(b"blob %d\0" % found["size"])
        blob.update(path.read_bytes())
        return blob.hexdigest() == digest
    return True


def _download(pin: Pin, names: list[str], *, again: bool) -> None:
    """Args: again: fetch them even if they are there, because they are damaged."""
    if not names:
        return
    import huggingface_hub

    bound_waits()
    patterns = [_literal(name) for name in names]
    persist(
        lambda: huggingface_hub.snapshot_download(
            pin.id, revision=pin.commit, allow_patterns=patterns, max_workers=4, force_download=again
        )
    )


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
