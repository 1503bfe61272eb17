"""The prepare stage: `python -m afina.worker.prepare [--json]` with a plan (JSON) on standard input.

Pins revisions, loads, checks the data, maps labels, tokenises once and publishes by rename under
`<scratch>/prepared/<digest>/` (see `afina.worker.store`). The digest covers everything that decides the content, so
that work that was done is found again. The last line of standard output is one JSON object, the result; messages for
people go to standard error. With `--json` an error is the last line of standard output instead.

One process, one node; several may prepare the same at once: the first to finish wins, the others take its work.
Nothing here trains, and nothing here needs the network where data and model are local or already fetched.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from afina.errors import AfinaError, DataError, EnvironmentProblem, InputError, SiteError
from afina.plan import Plan
from afina.recipe import Recipe
from afina.site import cache_environment

__all__ = ["main", "prepare"]

_BATCH = 1000
#: Raised when the same inputs would be prepared differently than before.
_RECIPE_FORMAT = 1
_TRUNCATED_SHARE = 0.01
#: Bytes for each token while it is estimated how much room is needed: its id, and as much again for slack.
_BYTES_PER_TOKEN = 4
#: A launcher's variables would make TrainingArguments join a process group that nobody forms.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE", "PMI_RANK",
             "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK")  # fmt: skip

Say = Callable[[str], None]


class _Terminated(BaseException):
    """SIGTERM came: unwind, clean up, exit 143."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; see `afina.errors`. 130 after an interrupt, 143 after SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    unknown = [a for a in argv if a != "--json"]
    if unknown:
        print(
            f"error: unknown argument {unknown[0]}\n  remedy: afina.worker.prepare [--json] < plan.json",
            file=sys.stderr,
        )
        return InputError.exit_code
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        plan = _read_plan(sys.stdin.read())
        set_environment(plan, os.environ)
        with _full_disk(plan):
            result = prepare(plan)
        for warning in result["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return 0
    except AfinaError as error:
        if "--json" in argv:
            print(error.to_json(), flush=True)  # the caller says it, once
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was published", file=sys.stderr)
        return 130
    except _Terminated:
        print("terminated: nothing was published", file=sys.stderr)
        return 143
    finally:
        signal.signal(signal.SIGTERM, previous)


def prepare(plan: Plan, say: Say = lambda line: print(line, file=sys.stderr)) -> dict[str, Any]:
    """Prepare the data of `plan`, or find that it is prepared; returns the result object.

    Raises:
        InputError, EnvironmentProblem: see the modules that this one composes.
    """
    from afina.worker import hub, pretrained, store

    recipe, site = plan.recipe, plan.site
    pins = site.scratch / "pins"
    # What costs a second is refused before anything large is fetched: mistyped names on the Hub, arguments.
    data_pin = hub.pin(site, "dataset", recipe.data.hub, recipe.data.revision, say) if recipe.data.hub else None
    model_pin = hub.pin(site, "model", recipe.model, recipe.revision, say) if plan.model_folder is None else None
    if data_pin or model_pin:
        pretrained.check_arguments(recipe.train.arguments, pins)
    folder = plan.model_folder
    if folder is not None:
        pretrained.check_files(folder)
    else:
        assert model_pin is not None
        folder = _fetched_model(recipe, model_pin, say)
    data = hub.fetch_data(site, recipe.data, data_pin, say) if data_pin else None
    content = _content(plan, folder, data)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    final = site.prepared / digest
    manifest = _find(final, say)
    reused = manifest is not None
    # Data is checked first: a wrong column is said within a second, transformers takes several to import.
    examples = None if reused else _examples(plan, data)
    pretrained.check_model(folder, recipe, pins)
    late = pretrained.check_arguments(recipe.train.arguments, pins)
    if manifest is None:
        assert examples is not None
        manifest = _build(plan, folder, examples, final, content, say)
    splits = manifest["splits"]
    if splits["train"]["rows"] < recipe.train.batch_size:
        late.append(
            f"train has {splits['train']['rows']} rows, fewer than train.batch_size {recipe.train.batch_size}: "
            "each epoch is one short step"
        )
    assert manifest["format"] == store.FORMAT
    return {
        "prepared": str(final),
        "digest": digest,
        "task": manifest["task"],
        "labels": manifest["labels"],
        "model_folder": str(folder),
        "model_commit": model_pin.commit if model_pin else None,
        "data_commit": data.commit if data else None,
        "rows": {part: about["rows"] for part, about in splits.items()},
        "tokens": {part: about["tokens"] for part, about in splits.items()},
        "warnings": [*manifest["warnings"], *late],
        "reused": reused,
    }


def _fetched_model(recipe: Recipe, pin: Any, say: Say) -> Path:
    from afina.worker import hub, pretrained

    folder = hub.fetch_model(recipe, pin, say)
    try:
        pretrained.check_files(folder)
    except InputError as error:
        say(f"{error.message}; fetching it again")
        folder = hub.fetch_model(recipe, pin, say, again=True)
        pretrained.check_files(folder, "the repository itself holds a broken file: choose another revision or model")
    return folder


def set_environment(plan: Plan, env: MutableMapping[str, str]) -> None:
    """Caches under scratch, no launcher, no network where none is needed. Before any Hugging Face library is imported."""
    token = (
        Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface").expanduser() / "token"
    )
    if not env.get("HF_TOKEN_PATH") and token.is_file():
        # The token that `hf auth login` left stays valid where HF_HOME moves to scratch.
        env["HF_TOKEN_PATH"] = str(token)
    env.update(cache_environment(plan.site, env))
    for name in _LAUNCHER:
        env.pop(name, None)
    env["TOKENIZERS_PARALLELISM"] = "true"
    env["TRANSFORMERS_VERBOSITY"] = "error"
    # datasets otherwise sends a request to a counter beside the Hub at each load.
    env["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
    if plan.model_folder is not None and plan.recipe.data.hub is None:
        env["HF_HUB_OFFLINE"] = "1"
    if env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        # datasets listens to its own variable first.
        env["HF_DATASETS_OFFLINE"] = "1"
    if not sys.stderr.isatty():
        env.setdefault("HF_HUB_VERBOSITY", "error")
        env.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        env.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _read_plan(text: str) -> Plan:
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]
        where = ".".join(str(k) for k in reason["loc"])
        raise InputError(
            f"standard input is not a plan: {where + ': ' if where else ''}{reason['msg']}",
            "this stage is run by `afina prefetch RECIPE`; by hand give it the plan.json of a run",
        ) from None


# -- what it is: the digest -------------------------------------------------------------------------------------------


def _content(plan: Plan, folder: Path, data: Any) -> dict[str, Any]:
    """Everything that decides what is prepared; the digest is over this."""
    from afina.worker import pretrained

    recipe = plan.recipe
    source: dict[str, Any]
    if data is not None:
        source = {"hub": recipe.data.hub, "config": recipe.data.config, "commit": data.commit}
    else:
        source = {
            "files": {
                part: [{"name": path.name, "sha256": _sha256(path)} for path in paths]
                for part, paths in plan.files.items()
            }
        }
    return {
        "format": _RECIPE_FORMAT,
        "source": source,
        "data": recipe.data.model_dump(mode="json", exclude={"files", "hub", "config", "revision"}),
        "task": recipe.task,
        "max_length": recipe.tokens.max_length,
        "tokenizer": pretrained.tokenizer_identity(folder),
        "trust_remote_code": recipe.trust_remote_code,
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "check the path and its permissions") from None
    return digest.hexdigest()


def _find(final: Path, say: Say) -> dict[str, Any] | None:
    """The manifest of what is prepared already; damaged work is set aside."""
    from afina.worker import store

    if not final.exists():
        return None
    try:
        return store.verify(final, digests=False)
    except SiteError as error:
        say(f"{error.message}: {_set_aside(final).name} keeps what is left; preparing again")
        return None


def _set_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f".damaged-{folder.name[:8]}-{number}")).exists():
        number += 1
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    return aside


# -- making it --------------------------------------------------------------------------------------------------------


def _examples(plan: Plan, data: Any) -> tuple[Any, dict[str, Any], list[str]]:
    """Labels, examples by part, and what is doubtful about them."""
    from afina.worker.examples import build_examples, choose_sources
    from afina.worker.tables import read_files

    recipe = plan.recipe
    warnings: list[str] = []
    sources = choose_sources(recipe.data, list(data.splits if data is not None else plan.files), warnings)
    columns = [*recipe.data.text, *recipe.data.label, *([recipe.data.id] if recipe.data.id else [])]
    tables = {
        source: data.read(source, columns) if data is not None else read_files(plan.files[source], columns)
        for source in dict.fromkeys(sources.values())
    }
    return *build_examples(recipe.task, recipe.data, tables, sources, warnings), warnings


def _build(
    plan: Plan,
    folder: Path,
    found: tuple[Any, dict[str, Any], list[str]],
    final: Path,
    content: Mapping[str, Any],
    say: Say,
) -> dict[str, Any]:
    from afina.worker import store
    from afina.worker.pretrained import load_tokenizer

    recipe = plan.recipe
    labels, parts, warnings = found
    tokenizer = load_tokenizer(folder, recipe)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with store.staging(final) as staging:
        _check_room(plan.site.prepared, parts, recipe.tokens.max_length)
        splits = {}
        progress = _Progress(sum(len(e) for e in parts.values()), say)
        with progress:
            for part, examples in parts.items():
                splits[part], truncated = _tokenise(
                    staging, part, examples, tokenizer, recipe.tokens.max_length, config, progress
                )
                _write_rows(staging, part, examples)
                if truncated / len(examples) > _TRUNCATED_SHARE:
                    warnings.append(
                        f"{truncated:,} of {len(examples):,} texts of {part} ({truncated / len(examples):.1%}) are longer "
                        f"than tokens.max_length {recipe.tokens.max_length} and were cut"
                    )
        tokenizer.save_pretrained(staging / "tokenizer")
        about = {
            "digest": final.name,
            "task": labels.task,
            "labels": list(labels.names) if labels.names is not None else None,
            "num_labels": len(labels.names) if labels.names is not None else 1,
            "text_columns": list(recipe.data.text),
            "source": content["source"],
            "max_length": recipe.tokens.max_length,
            "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            "splits": splits,
            "warnings": warnings,
            "made_with": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "numpy")},
            "content": content,
        }
        store.seal(staging, about)
        if not store.publish(staging, final):
            say(f"another process prepared {final.name[:8]} at the same time; its work is taken")
    return store.load_manifest(final)


def _tokenise(
    staging: Path,
    part: str,
    examples: Any,
    tokenizer: Any,
    max_length: int,
    config: Mapping[str, Any],
    progress: _Progress,
) -> tuple[dict[str, int], int]:
    """Write the arrays of a part; returns what the manifest says of it, and the number of texts that were cut."""
    import numpy as np

    from afina.worker.store import ArrayWriter

    size = config.get("vocab_size")
    dtype = np.uint16 if max(len(tokenizer), size if isinstance(size, int) else 0) <= 1 << 16 else np.uint32
    lengths = np.zeros(len(examples), np.int64)
    truncated, any_type = 0, False
    types_file = staging / f"{part}.types.npy"
    with ArrayWriter(staging / f"{part}.tokens.npy", dtype) as tokens, ArrayWriter(types_file, np.uint8) as types:
        for start in range(0, len(examples), _BATCH):
            texts = examples.texts.slice(start, _BATCH).to_pylist()
            pairs = examples.pairs.slice(start, _BATCH).to_pylist() if examples.pairs is not None else None
            batch = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False)
            ids = batch["input_ids"]
            lengths[start : start + len(ids)] = [len(row) for row in ids]
            flat = np.fromiter((i for row in ids for i in row), np.int64)
            empty = next((i for i, row in enumerate(ids) if not row), None)
            if empty is not None:
                raise DataError(
                    f"{part}: {examples.table.where(start + empty)}: the tokenizer makes no token of this text",
                    "remove this row",
                )
            if isinstance(size, int) and flat.max() >= size:
                raise InputError(
                    f"model: its tokenizer gives token {flat.max()}, its config has vocab_size {size}",
                    "tokenizer and weights do not belong together: take both from one model",
                )
            tokens.append(flat)
            if "token_type_ids" in batch:
                flat_types = np.fromiter((i for row in batch["token_type_ids"] for i in row), np.uint8)
                types.append(flat_types)
                any_type |= bool(flat_types.any())
            truncated += _count_truncated(batch, ids, max_length)
            progress.advance(len(ids))
    if not any_type:
        types_file.unlink()
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    np.save(staging / f"{part}.offsets.npy", offsets)
    np.save(staging / f"{part}.labels.npy", np.ascontiguousarray(examples.labels))
    return {"rows": len(examples), "tokens": int(offsets[-1]), "longest": int(lengths.max())}, truncated


def _count_truncated(batch: Any, ids: list[list[int]], max_length: int) -> int:
    encodings = getattr(batch, "encodings", None)
    full = [i for i, row in enumerate(ids) if len(row) >= max_length]
    return sum(1 for i in full if encodings is None or encodings[i].overflowing)


def _write_rows(staging: Path, part: str, examples: Any) -> None:
    """Where each row came from: `row` (see `afina.worker.tables`), `file`, `id`; the text of eval and test rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = examples.table
    columns = {
        "row": pa.array(table.row, pa.int64()),
        "file": pa.DictionaryArray.from_arrays(
            pa.array(table.source, pa.int32()), pa.array(table.sources, pa.string())
        ),
    }
    if examples.ids is not None:
        columns["id"] = examples.ids
    if part != "train":
        columns["text"] = examples.texts
        if examples.pairs is not None:
            columns["text_pair"] = examples.pairs
    pq.write_table(pa.table(columns), staging / f"{part}.rows.parquet", compression="zstd")


# -- room and staging -------------------------------------------------------------------------------------------------


def _check_room(folder: Path, parts: Mapping[str, Any], max_length: int) -> None:
    """Refuse before writing where the file system has less room than the estimate: a token for every three bytes of text."""
    needed = 1 << 20
    for part, examples in parts.items():
        columns = [column for column in (examples.texts, examples.pairs) if column is not None]
        size = sum(column.nbytes for column in columns)
        needed += _BYTES_PER_TOKEN * min(size // 3 + 3 * len(examples), len(examples) * max_length)
        needed += 0 if part == "train" else size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentProblem(
            f"{folder}: about {_size(needed)} are needed, {_size(free)} are free",
            "remove old runs and prepared data there, or point AFINA_SCRATCH at a larger file system",
        )


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


@contextlib.contextmanager
def _full_disk(plan: Plan) -> Iterator[None]:
    """A full disk, a spent quota, a limit on file size, wherever it shows, becomes one message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentProblem(
                f"{error.filename or plan.site.scratch}: {error.strerror}; {_size(shutil.disk_usage(plan.site.scratch).free)} are free on the file system of "
                f"{plan.site.scratch}",
                "free space or quota (`df -h`, `df -i`, `quota`, `ulimit -f`), then run the same command again",
            ) from error
        if error.filename is not None and str(error.filename).startswith(str(plan.site.scratch)):
            raise EnvironmentProblem(
                f"{error.filename or plan.site.scratch}: {error.strerror}", "check AFINA_SCRATCH and its permissions"
            ) from error
        raise


class _Progress:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, total: int, say: Say) -> None:
        self.total, self.say, self.done = total, say, 0
        self._started = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("tokenising"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.add_task("tokenising", total=self.total)
            self._bar.start()
        return self

    def advance(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            rate = self.done / (self._last - self._started)
            self.say(f"tokenised {self.done:,} of {self.total:,} texts, {rate:,.0f} per second")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


if __name__ == "__main__":
    sys.exit(main())
