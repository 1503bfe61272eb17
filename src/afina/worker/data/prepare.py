"""The prepare stage: `python -m afina.worker prepare` with a plan (JSON) on standard input.

Pins revisions, loads, checks the data, maps labels, tokenises once and publishes by rename under
`<scratch>/prepared/<digest>/` (see `afina.worker.data.prepared`). The digest covers everything that decides the content, so
that work that was done is found again. The last line of standard output is one JSON object, the result; messages for
people go to standard error. With `--json` an error is the last line of standard output instead.

One process, one node, all cores that it may use; of several that would prepare the same, one works and the others wait for it
(see `afina.processes`) and find it done. One that is killed leaves what it has tokenised for the next (see
`afina.worker.data.shards`); one whose parent has died stops. What is found is compared with its digests first: what is damaged is made again.
Nothing here trains, nothing needs the network where data and model are local or already fetched, and nothing is written
where all is there. Tokens and passwords are blackened in whatever this stage says.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from afina.errors import DataError, InputError, SiteError
from afina.recipe.trackers import check_trackers
from afina.run.allocation import Allocation
from afina.run.plan import Plan
from afina.site.settings import cache_environment
from afina.worker.reply import Terminated, disk_errors, not_a_question, read_question

__all__ = ["answer", "prepare"]

#: Raised when the same inputs would be prepared differently than before.
_RECIPE_FORMAT = 1
#: A launcher's variables would make TrainingArguments join a process group that nobody forms.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE", "PMI_RANK",
             "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK")  # fmt: skip

Say = Callable[[str], None]


def answer(arguments: list[str]) -> dict[str, Any]:
    """Prepare the plan on standard input; returns what `prepare` returns.

    Raises:
        InputError, EnvironmentProblem: as `prepare`.
    """
    if arguments:
        raise InputError(f"unknown argument {arguments[0]}", "python -m afina.worker prepare < plan.json")
    plan = _read_plan()
    set_environment(plan, os.environ)
    try:
        with disk_errors(plan.site.scratch):
            result = prepare(plan)
    except (KeyboardInterrupt, Terminated):
        print("stopped: nothing unfinished is left; finished token shards are kept for the next time", file=sys.stderr)
        raise
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    return result


def prepare(plan: Plan, say: Say = lambda line: print(line, file=sys.stderr)) -> dict[str, Any]:
    """Prepare the data of `plan`, or find that it is prepared; returns the result object.

    Raises:
        InputError, EnvironmentProblem: see the modules that this one composes.
    """
    from afina.processes import advisory_lock
    from afina.publish import sweep
    from afina.worker.data import prepared, shards
    from afina.worker.data.tokenise import build, work_folder
    from afina.worker.hub import datasets
    from afina.worker.hub import pins as hub
    from afina.worker.model import pretrained
    from afina.worker.model.arguments import check_arguments

    recipe, site = plan.recipe, plan.site
    pins = site.scratch / "pins"
    for folder in (pins, site.prepared, site.cache / "datasets"):
        sweep(folder, now=time.time())
    shards.sweep(work_folder(plan), now=time.time())
    check_trackers(recipe.trackers)
    # What costs a second is refused before anything large is fetched: mistyped names on the Hub, arguments.
    data_pin = hub.pin(site, "dataset", recipe.data.hub, recipe.data.revision, say) if recipe.data.hub else None
    model_pin = hub.pin(site, "model", recipe.model, recipe.revision, say) if plan.model_folder is None else None
    if data_pin or model_pin:
        check_arguments(recipe.train.arguments, pins)
    if plan.model_folder is not None:
        folder = plan.model_folder
        pretrained.check_files(folder)
        model_files = pretrained.record_model(folder, recipe)
    else:
        assert model_pin is not None
        fetched = hub.fetch_model(site, recipe, model_pin, say)
        folder, model_files = fetched.folder, fetched.files
        pretrained.check_files(folder, "the repository itself holds a broken file: choose another revision or model")
    data = datasets.fetch_data(site, recipe.data, data_pin, say) if data_pin else None
    states = _states(plan)
    content = _content(plan, folder, data)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    final = site.prepared / digest
    manifest = _find(final)
    reused = manifest is not None
    late: list[str] | None = None
    if manifest is None:
        final.parent.mkdir(parents=True, exist_ok=True)
        with advisory_lock(final.parent / f".turn-{digest[:16]}", f"preparing {recipe.name}", say):
            manifest = _find(final, say)
            reused = manifest is not None
            if manifest is None:
                if data_pin:
                    data = datasets.fetch_data(site, recipe.data, data_pin, say, digests=True)
                # Data is checked first: a wrong column is said within a second, transformers takes several to import.
                checked = _check(plan, data, states, say)
                late = pretrained.check_model(folder, recipe, pins)
                late += check_arguments(recipe.train.arguments, pins)
                manifest = build(plan, folder, checked, final, content, say)
    shards.discard(work_folder(plan), digest)
    if late is None:
        late = pretrained.check_model(folder, recipe, pins)
        late += check_arguments(recipe.train.arguments, pins)
    splits = manifest["splits"]
    if splits["train"]["rows"] < recipe.train.batch_size:
        late.append(
            f"train has {splits['train']['rows']} rows, fewer than train.batch_size {recipe.train.batch_size}: "
            "each epoch is one short step"
        )
    assert manifest["format"] == prepared.FORMAT
    return {
        "prepared": str(final),
        "digest": digest,
        "task": manifest["task"],
        "labels": manifest["labels"],
        "model_folder": str(folder),
        "model_files": model_files,
        "model_commit": model_pin.commit if model_pin else None,
        "data_commit": data.commit if data else None,
        "rows": {part: about["rows"] for part, about in splits.items()},
        "tokens": {part: about["tokens"] for part, about in splits.items()},
        "warnings": [*manifest["warnings"], *late],
        "reused": reused,
    }


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
    cores = Allocation.from_env(env).cores()
    if cores < len(os.sched_getaffinity(0)):
        # Where Slurm does not bind a task to its cores, its tokenizer's threads keep to their number.
        env.setdefault("RAYON_NUM_THREADS", str(cores))
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


def _read_plan() -> Plan:
    try:
        return Plan.model_validate(read_question("a plan"))
    except ValidationError as error:
        reason = error.errors()[0]
        where = ".".join(str(k) for k in reason["loc"])
        raise not_a_question("a plan", f"{where}: {reason['msg']}" if where else reason["msg"]) from None


# -- what it is: the digest -------------------------------------------------------------------------------------------


def _content(plan: Plan, folder: Path, data: Any) -> dict[str, Any]:
    """Everything that decides what is prepared; the digest is over this."""
    from afina.worker.model import pretrained

    recipe = plan.recipe
    source: dict[str, Any]
    if data is not None:
        source = {"hub": recipe.data.hub, "config": recipe.data.config, "commit": data.commit}
    else:
        source = {
            "files": {
                part: [{"name": path.name, "sha256": _digest(path)} for path in paths]
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


def _states(plan: Plan) -> dict[str, Any]:
    """Of the files of each key of `data.files`, before anything is read."""
    from afina.worker.data.tables import DataSource

    try:
        return {key: DataSource(tuple(paths)).state() for key, paths in plan.files.items()}
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}", "check the path and its permissions") from None


def _digest(path: Path) -> str:
    from afina.files import sha256

    try:
        return sha256(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "check the path and its permissions") from None


def _find(final: Path, say: Say | None = None) -> dict[str, Any] | None:
    """The manifest of what is prepared already, every byte of it compared; None if there is nothing, or it is damaged."""
    from afina.worker.data import prepared

    if not final.exists():
        return None
    try:
        return prepared.verify(final)
    except SiteError as error:
        if say is not None:
            say(f"{error.message}; preparing again")
        return None


# -- making it --------------------------------------------------------------------------------------------------------


def _check(plan: Plan, data: Any, states: Mapping[str, Any], say: Say) -> Any:
    """Read the data once, and see that they can be trained on."""
    from afina.worker.data.splits import build_examples, choose_sources
    from afina.worker.data.tables import DataSource
    from afina.worker.data.tokenise import Checked
    from afina.worker.progress import Progress

    spec = plan.recipe.data
    warnings: list[str] = []
    chosen = choose_sources(spec, list(data.splits if data is not None else plan.files), warnings)
    keys = list(dict.fromkeys(chosen.values()))
    sources = {
        key: DataSource((data.file(key),), f"{data.id}/{key}")
        if data is not None
        else DataSource(tuple(plan.files[key]))
        for key in keys
    }
    if data is not None:
        states = {key: source.state() for key, source in sources.items()}
    columns = [*spec.label, *([spec.id] if spec.id else [])]
    with Progress("reading", "read", "rows", None, say) as progress:
        tables = {key: source.read(columns, spec.text, progress.advance) for key, source in sources.items()}
    labels, parts = build_examples(plan.recipe.task, spec, tables, chosen, warnings)
    return Checked(labels, parts, warnings, sources, states)
