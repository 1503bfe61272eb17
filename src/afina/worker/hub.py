"""Models and data sets from the Hugging Face Hub: pinned to a commit once, fetched once, found again without network.

A pin (`<scratch>/pins/<kind>-….json`) says which commit a name meant when it was first asked for; every later prepare and
every job takes that commit, until `AFINA_REFRESH=1` (`afina prefetch --refresh`) asks again. Models stay in the Hub's own
cache. Data sets are kept as Parquet under `<scratch>/cache/datasets/<name>-<digest>/`, one file per split, published by
rename: `datasets` is needed only the first time, and its cache, whose names differ offline, never again.

Not covered: data sets that need a Python script (datasets 4 dropped them), images and sound.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, DataError, HubError, InputError, RecipeError, nearest
from afina.recipe import Data, Recipe
from afina.rundir import write_atomic
from afina.site import Site
from afina.worker.store import publish, staging
from afina.worker.tables import Table, read_files

__all__ = ["HubData", "Pin", "fetch_data", "fetch_model", "pin"]

Say = Callable[[str], None]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PICKLES = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_SMALL = (".json", ".txt", ".model", ".jinja", ".codes")
#: huggingface_hub sleeps as long as a 429 tells it to, five times over; the Hub's window is 300 s. A longer wait than
#: this many seconds is for the user to decide on.
_LONGEST_WAIT = 10
#: Features of a data set that can be text or labels.
_KEPT = ("Value", "ClassLabel", "List", "LargeList", "Sequence")
#: A compute node has no internet; it must find what a node with internet left.
_PREFETCH = "run `afina prefetch RECIPE` on a node with internet (often the login node), with the same AFINA_SCRATCH"


@dataclass(frozen=True)
class Pin:
    """A name on the Hub, resolved.

    Attributes:
        id: `owner/name`, where an old name such as `yelp_review_full` has none.
        commit: 40 hex digits.
        files: names of all files of that commit.
    """

    id: str
    commit: str
    files: tuple[str, ...]


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

    def read(self, split: str, columns: Sequence[str]) -> Table:
        """As `tables.read_files`; rows are called `<id>/<split>, row n`."""
        path, name = self.folder / self.splits[split], f"{self.id}/{split}"
        try:
            table = read_files([path], columns)
        except DataError as error:
            raise DataError(error.message.replace(str(path), name), error.remedy) from None
        return Table(table.columns, table.classes, (name,), table.source, table.row)


def pin(site: Site, kind: str, name: str, revision: str | None, say: Say) -> Pin:
    """The commit of `name` (kind "model" or "dataset"): as recorded, else asked of the Hub and recorded.

    Raises:
        HubError: it is not there, not allowed, or the Hub cannot be reached.
        RecipeError: there is no such revision; with those that are known.
    """
    asked = revision or "main"
    key = hashlib.sha256(json.dumps([kind, name, asked]).encode()).hexdigest()[:12]
    path = site.scratch / "pins" / f"{kind}-{_slug(name)}-{key}.json"
    known = _read_pin(path)
    if known is not None and (os.environ.get("AFINA_REFRESH") != "1" or _COMMIT.fullmatch(asked)):
        return known
    found = _resolve(kind, name, revision)
    if known is not None and known.commit != found.commit:
        say(f"{kind} {name}: {asked} moved from {known.commit[:12]} to {found.commit[:12]}")
    path.parent.mkdir(exist_ok=True)
    record = {"kind": kind, "asked": name, "revision": asked, **asdict(found)}
    write_atomic(path, json.dumps({**record, "pinned_at": int(time.time())}, indent=1) + "\n")
    return found


def fetch_model(recipe: Recipe, pin: Pin, say: Say, *, again: bool = False) -> Path:
    """The folder of the recipe's Hub model, complete on local disk.

    Args:
        again: fetch it even if it is there, because it is damaged.

    Raises:
        HubError: not allowed, the transfer broke off, or the Hub cannot be reached.
        InputError: the repository holds no weights.
    """
    wanted = _wanted(pin.files, recipe)
    folder = None if again else _cached(pin.id, pin.commit, wanted)
    if folder is None:
        say(f"fetching model {recipe.model} at {pin.commit[:12]}")
        with _hub_errors("model", recipe.model, recipe.revision):
            import huggingface_hub

            _bound_waits()
            patterns = [_literal(name) for name in wanted]
            _persist(
                lambda: huggingface_hub.snapshot_download(
                    pin.id, revision=pin.commit, allow_patterns=patterns, max_workers=4, force_download=again
                )
            )
        folder = _cached(pin.id, pin.commit, wanted)
    if folder is None:
        # Offline, snapshot_download is content with the part of a snapshot that is there.
        raise HubError(f"model {recipe.model}: some of its files are not on this machine", _PREFETCH)
    return folder


def fetch_data(site: Site, data: Data, pin: Pin, say: Say) -> HubData:
    """The recipe's Hub data set as Parquet on local disk.

    Raises:
        HubError: not allowed, the transfer broke off, or the Hub cannot be reached.
        RecipeError: an unknown configuration; with those that are known.
        InputError: datasets cannot load it.
    """
    assert data.hub is not None
    key = hashlib.sha256(json.dumps([data.hub, data.config, pin.commit]).encode()).hexdigest()[:16]
    folder = site.cache / "datasets" / f"{_slug(data.hub)}-{key}"
    splits = _splits(folder)
    if splits is None:
        say(f"fetching data set {data.hub} at {pin.commit[:12]}")
        _download(data, pin, folder)
        splits = _splits(folder)
    if splits is None:
        raise HubError(f"data set {data.hub}: {folder} is not complete", "remove that folder and run the command again")
    return HubData(data.hub, pin.commit, folder, splits)


# -- pins -------------------------------------------------------------------------------------------------------------


def _resolve(kind: str, name: str, revision: str | None) -> Pin:
    with _hub_errors(kind, name, revision):
        import huggingface_hub

        api = huggingface_hub.HfApi()
        for pause in (1, 4, None):
            try:
                info = (api.model_info if kind == "model" else api.dataset_info)(name, revision=revision, timeout=10)
                break
            except huggingface_hub.errors.HfHubHTTPError as error:
                # These calls do not try again by themselves, unlike downloads.
                status = error.response.status_code
                wait = _wait_of(error.response.headers) or pause
                if pause is None or wait is None or wait > _LONGEST_WAIT or not (status == 429 or status >= 500):
                    raise
                time.sleep(wait)
    assert info.sha is not None
    return Pin(info.id, info.sha, tuple(sibling.rfilename for sibling in info.siblings or ()))


def _read_pin(path: Path) -> Pin | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Pin(value["id"], value["commit"], tuple(value["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name)


# -- models -----------------------------------------------------------------------------------------------------------


def _wanted(files: Iterable[str], recipe: Recipe) -> list[str]:
    """Config, tokenizer and weights; safetensors where there are any, pickled weights only where not."""
    top = [name for name in files if "/" not in name]
    weights = [n for n in top if _SAFETENSORS.fullmatch(n)] or [n for n in top if _PICKLES.fullmatch(n)]
    if not weights:
        raise InputError(
            f"model {recipe.model}: its repository has no model.safetensors and no pytorch_model.bin",
            "choose a model with PyTorch weights; a repository with only GGUF, ONNX or adapter files cannot be trained",
        )
    pickled = not _SAFETENSORS.fullmatch(weights[0])
    small = [
        name
        for name in top
        if name.endswith(_SMALL) and not (name.endswith(".index.json") and pickled != name.startswith("pytorch_model"))
    ]
    code = [name for name in files if name.endswith(".py")] if recipe.trust_remote_code else []
    return sorted({*small, *weights, *code})


def _cached(name: str, commit: str, wanted: Sequence[str]) -> Path | None:
    """The snapshot's folder if all of `wanted` is in the Hub's cache; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    folder: Path | None = None
    for file in wanted:
        path = try_to_load_from_cache(name, file, revision=commit)
        if not isinstance(path, str):
            return None
        folder = Path(path).parents[file.count("/")]
    return folder


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


# -- data sets --------------------------------------------------------------------------------------------------------


def _splits(folder: Path) -> dict[str, str] | None:
    """Split -> file, if all files are there as they were written."""
    try:
        about = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
        for file, size in about["sizes"].items():
            if (folder / file).stat().st_size != size:
                return None
        return {str(split): str(file) for split, file in about["splits"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _download(data: Data, pin: Pin, folder: Path) -> None:
    assert data.hub is not None
    with staging(folder) as aside:
        with _hub_errors("dataset", data.hub, data.revision):
            import datasets

            _bound_waits()
            config = _config_name(data, pin)
            # A cache of its own: no lock is shared with another process, nothing of it is left behind, and where the
            # Hub refuses, load_dataset cannot silently return another revision that it finds there.
            cache = str(aside / "cache")
            loaded = _persist(lambda: datasets.load_dataset(pin.id, config, revision=pin.commit, cache_dir=cache))
            if not loaded:
                raise InputError(f"data set {data.hub}: it has no splits", "check the data set's page")
            splits, sizes = {}, {}
            for number, (split, rows) in enumerate(loaded.items()):
                file = f"{number}-{_slug(split)}.parquet"
                rows.select_columns([n for n, f in rows.features.items() if type(f).__name__ in _KEPT]).to_parquet(
                    str(aside / file)
                )
                splits[split], sizes[file] = file, (aside / file).stat().st_size
            del loaded, rows
        shutil.rmtree(aside / "cache", ignore_errors=True)
        record = {"id": data.hub, "config": data.config, "commit": pin.commit, "splits": splits, "sizes": sizes}
        write_atomic(aside / "splits.json", json.dumps(record, indent=1) + "\n")
        if folder.exists() and _splits(folder) is None:
            shutil.rmtree(folder)
        publish(aside, folder)


def _persist(call: Callable[[], Any]) -> Any:
    """Try again after a reset connection, which huggingface_hub gives up on; what is complete is not fetched twice."""
    for pause in (1, 3):
        try:
            return call()
        except Exception as error:
            if not any(type(e).__name__ == "ReadError" for e in _chain(error)):
                raise
            time.sleep(pause)
    return call()


def _config_name(data: Data, pin: Pin) -> str | None:
    import datasets

    known = _persist(lambda: datasets.get_dataset_config_names(pin.id, revision=pin.commit))
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


# -- what the Hub says when it says no --------------------------------------------------------------------------------


def _bound_waits() -> None:
    """Raise at once where the Hub asks for a long wait, instead of sleeping through it."""
    import huggingface_hub

    session = huggingface_hub.get_session()
    hooks = session.event_hooks
    if _refuse_long_wait not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], _refuse_long_wait]}


def _refuse_long_wait(response: Any) -> None:
    if response.status_code != 429:
        return
    wait = _wait_of(response.headers)
    if wait is not None and wait > _LONGEST_WAIT:
        raise _rate_limited(wait)


def _wait_of(headers: Any) -> int | None:
    """Seconds until the Hub listens again: `Retry-After`, or `t=` of the `RateLimit` header."""
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("retry-after", "")) or re.search(
        r"\bt=(\d+)", headers.get("ratelimit", "")
    )
    return int(found[1]) if found else None


def _rate_limited(wait: int | None) -> HubError:
    after = f"in {wait} s" if wait is not None else "in a few minutes"
    anonymous = "" if _token() else "; with HF_TOKEN (or `hf auth login`) the limit is higher"
    return HubError("the Hub limits the rate of requests (429)", f"run the same command again {after}{anonymous}")


@contextlib.contextmanager
def _hub_errors(kind: str, name: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the Hugging Face libraries raise into one message with a remedy."""
    try:
        yield
    except AfinaError:
        raise
    except Exception as error:
        chain = list(_chain(error))
        full = next(
            (e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), None
        )
        if full is not None:
            raise full from None
        ours = next((e for e in chain if isinstance(e, AfinaError)), None)
        if ours is not None:
            raise ours from None
        explained = _explain(chain, "data set" if kind == "dataset" else kind, kind, name, revision)
        if explained is None:
            raise
        raise explained from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _explain(
    chain: Sequence[BaseException], word: str, kind: str, name: str, revision: str | None
) -> AfinaError | None:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    who = "with the token in use" if _token() else "without a token"
    text = " ".join(str(e) for e in chain)
    if _found(chain, errors.GatedRepoError) or "is a gated dataset" in text:
        return HubError(
            f"{word} {name} is gated: its owner lets in only those who accepted its terms (asked {who})",
            f"accept them on {page}, then set HF_TOKEN to a token of that account (or `hf auth login`)",
        )
    status = _status(chain)
    if _found(chain, errors.RevisionNotFoundError):
        key = "revision" if kind == "model" else "data.revision"
        return RecipeError(f"{key}: {word} {name} has no revision `{revision}`", _revisions(kind, name, revision or ""))
    if status == 401 and _token() and "invalid" in text.lower():
        return HubError(f"{word} {name}: the Hub refuses your token (401)", "set HF_TOKEN to a valid one, or unset it")
    if _found(chain, errors.RepositoryNotFoundError) or status == 404:
        return HubError(
            f"there is no {word} {name} on the Hub, or it is private (asked {who})",
            f"check the spelling on {page}; for a private one set HF_TOKEN (or `hf auth login`)",
        )
    if isinstance(bad := _found(chain, errors.HFValidationError), BaseException):
        return InputError(
            f"{word} {name}: not a Hub id: {_first_line(bad)}", "an id is `owner/name`; a folder must exist"
        )
    if status in (401, 403):
        return HubError(f"{word} {name}: the Hub refuses access ({status}, asked {who})", f"see {page}; set HF_TOKEN")
    if status == 429:
        return _rate_limited(
            next((_wait_of(r.headers) for e in chain if (r := getattr(e, "response", None)) is not None), None)
        )
    if status is not None and status >= 500:
        return HubError(
            f"{word} {name}: the Hub has a fault ({status})", "run the same command again later: status.huggingface.co"
        )
    if _found(chain, errors.OfflineModeIsEnabled) or os.environ.get("HF_HUB_OFFLINE") == "1":
        return HubError(f"{word} {name} is not on this machine, and HF_HUB_OFFLINE=1 forbids to fetch it", _PREFETCH)
    names = {kind.__name__ for e in chain for kind in type(e).__mro__}
    if names & {"RemoteProtocolError", "ReadError", "ReadTimeout", "IncompleteRead"} or "onsistency check" in text:
        return HubError(
            f"{word} {name}: the transfer broke off", "run the same command again; it resumes where it stopped"
        )
    if names & {"ConnectError", "ConnectTimeout", "TimeoutException", "ConnectionError", "ProxyError", "gaierror"}:
        return HubError(f"{word} {name}: the Hub cannot be reached from this machine", _PREFETCH)
    if (
        kind == "dataset" and any(type(e).__module__.startswith(("datasets", "pyarrow")) for e in chain)
    ) or "script" in text:
        return InputError(
            f"data set {name}: datasets cannot load it: {_first_line(chain[0])}",
            "see its page; often `revision: refs/convert/parquet` helps, or download it and name `data.files`",
        )
    if _found(chain, errors.LocalEntryNotFoundError):
        return HubError(f"{word} {name}: the Hub cannot be reached from this machine", _PREFETCH)
    if _found(chain, errors.HfHubHTTPError):
        return HubError(
            f"{word} {name}: the Hub answers {status}: {_first_line(chain[0])}", "run the same command again later"
        )
    return None


def _found(chain: Sequence[BaseException], kind: type[BaseException]) -> BaseException | None:
    return next((e for e in chain if isinstance(e, kind)), None)


def _status(chain: Sequence[BaseException]) -> int | None:
    for error in chain:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _revisions(kind: str, name: str, revision: str) -> str:
    """What revisions there are, nearest first; one more request, and no remedy is lost if it fails."""
    import huggingface_hub

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(name, repo_type=kind)
    except Exception:
        return "leave `revision` out for the newest, or give a branch, a tag or a commit of 40 hex digits"
    known = [ref.name for ref in (*refs.branches, *refs.tags)]
    hint = nearest(revision, known)
    return f"{hint + ' ' if hint else ''}known: {', '.join(known[:20])}; or a commit of 40 hex digits"
