"""The prepare stage: `python -m afina.worker prepare` with a plan (JSON) on standard input.

Pins revisions, fetches, checks the data, maps labels, tokenises once and publishes by rename under `<scratch>/prepared/<digest>/`
(see `afina.worker.data.prepared`). The digest covers everything that decides the content, so prepared data is found again; its
bytes are compared with the manifest first, and damaged data is made again.

One process, one node, all cores that it may use. Of several that would prepare the same, one works and the others wait (see
`afina.processes`) and find it done. An interrupted prepare resumes from its token shards (see `afina.worker.data.tokens.shards`). Not
covered: training; the network is used only where data or model are not local or fetched.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from afina.errors import DataError, InputError, RecipeError, SiteError
from afina.files import sha256
from afina.processes import advisory_lock
from afina.publish import sweep
from afina.recipe.metrics import selection_metric
from afina.recipe.schema import Recipe
from afina.run.allocation import Allocation
from afina.run.commands import without_launcher
from afina.run.plan import Plan
from afina.site.python import check_packages
from afina.site.settings import cache_environment
from afina.text import plural
from afina.worker.data.prepared import digest_of, verify
from afina.worker.data.tables.data_table import DataSource
from afina.worker.disk_errors import disk_errors
from afina.worker.reply import Terminated, not_a_question, read_question

__all__ = ["answer", "prepare"]

#: To be raised when the same inputs would give other prepared data: labels, splits, samples, tokens or warnings. 2: lists of one
#: label are single labels; hash splits of regressions have strata; samples follow the texts.
_RECIPE_FORMAT = 2
#: The share of one class in eval from which accuracy says little.
_ONE_SIDED = 0.8
Say = Callable[[str], None]
Check = Callable[[Plan, dict[str, Any], Say], list[str]]


def answer(arguments: list[str], check: Check = lambda plan, result, say: []) -> dict[str, Any]:
    """Prepare the plan on standard input; returns what `prepare` returns.

    Args:
        check: called with what has been prepared; returns warnings.

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
            result["warnings"] += check(plan, result, lambda line: print(line, file=sys.stderr))
    except (KeyboardInterrupt, Terminated):
        print("stopped: nothing unfinished is left; finished token shards are kept for the next time", file=sys.stderr)
        raise
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    return result


def prepare(plan: Plan, say: Say = lambda line: print(line, file=sys.stderr)) -> dict[str, Any]:
    """Prepare the data of `plan`, or find it prepared; returns the answer.

    Raises:
        InputError, EnvironmentProblem: see the modules that this one composes.
    """
    from afina.worker.data.splits.duplicates import check_trained_before
    from afina.worker.data.tokens.shards import discard
    from afina.worker.data.tokens.tokenise import shards_folder
    from afina.worker.model.training_sizes import expected_sizes

    recipe = plan.recipe
    _sweep(plan)
    check_packages(recipe)
    inputs = _fetch(plan, say)
    states = _states(plan)
    content = _content(plan, inputs)
    final = plan.site.prepared / digest_of(content)
    manifest, late = _find(final), None
    if manifest is None:
        final.parent.mkdir(parents=True, exist_ok=True)
        with advisory_lock(final.parent / f".turn-{final.name[:16]}", f"preparing {recipe.name}", say):
            manifest = _find(final, say)
            if manifest is None:
                manifest, late = _make(plan, inputs, states, final, content, say)
    discard(shards_folder(plan), final.name)
    reused = late is None
    if late is None:
        late = _check_model(plan, inputs.model_folder, manifest["splits"]["train"]["rows"])
    _check_measures(plan, final, manifest)
    splits, folds = _of_fold(recipe, final, manifest)
    # A fold's rows of eval are among those of train on disk.
    measured = {split: split if split in manifest["splits"] else "train" for split in splits if split != "train"}
    short_epochs = _check_schedule(recipe, splits)
    before = check_trained_before(final, inputs.model_folder, measured)
    late += [warning for each in before.values() for warning in each]
    late += [*_check_metric(recipe, manifest), *short_epochs]
    spoiled = {split: [*manifest.get("spoiled", {}).get(split, []), *before.get(split, [])] for split in measured}
    return {
        "prepared": str(final),
        "digest": final.name,
        "task": manifest["task"],
        "labels": manifest["labels"],
        "model_folder": str(inputs.model_folder),
        "model_files": inputs.model_files,
        "model_commit": inputs.model_commit,
        "data_commit": inputs.data.commit if inputs.data else None,
        "rows": {split: about["rows"] for split, about in splits.items()},
        "tokens": {split: about["tokens"] for split, about in splits.items()},
        "groups": {split: about["groups"] for split, about in splits.items() if "groups" in about},
        "folds": folds,
        "sizes": expected_sizes(
            inputs.model_folder, recipe, manifest["task"], manifest["num_labels"], plan.site.scratch / "pins"
        ),
        "warnings": [*manifest["warnings"], *late],
        "spoiled": {split: warnings for split, warnings in spoiled.items() if warnings},
        "files": _files_of(plan, manifest),
        "reused": reused,
    }


@dataclass(frozen=True)
class _Inputs:
    """Model and data on this machine.

    Attributes:
        model_files: size and SHA-256 by name.
        model_commit: of a model from the Hub.
        data, data_pin: of a data set from the Hub: its files, and its pinned revision.
    """

    model_folder: Path
    model_files: Mapping[str, Any]
    model_commit: str | None
    data: Any
    data_pin: Any


def _of_fold(
    recipe: Recipe, folder: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, Any], list[list[dict[str, int]]] | None]:
    """Rows and tokens of the splits that the recipe trains and evaluates on; and of every fold, where it has folds."""
    from afina.worker.data.splits.folds import check_folds

    splits = dict(manifest["splits"])
    if recipe.data.fold is None:
        return splits, None
    folds = check_folds(folder, manifest["task"], recipe.data)
    sizes = recipe.data.fold.sizes(folds)
    return {"train": {**splits.pop("train"), **sizes["train"]}, "eval": sizes["eval"], **splits}, folds


def _check_measures(plan: Plan, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check the recipe's loss and metrics against the task and the labels of prepared data in `folder`."""
    from afina.worker.data.labels.loss_weights import label_weights
    from afina.worker.data.prepared import open_split
    from afina.worker.task.own_metrics import check_metrics

    recipe, task = plan.recipe, manifest["task"]
    label_weights(recipe.train, task, manifest["labels"], open_split(folder, "train").labels)
    check_metrics(task, recipe.metric_texts, manifest["num_labels"], plan.metric_code)
    if recipe.decisions is not None and (wrong := recipe.decisions.misfit(task, manifest["num_labels"])):
        raise RecipeError(f"decisions.{wrong[0]}: {wrong[1]}", wrong[2])


def _check_schedule(recipe: Recipe, splits: Mapping[str, Any]) -> list[str]:
    """Refuse a patience that takes no effect; a remark where each epoch is one short step."""
    rows = {split: about["rows"] for split, about in splits.items()}
    evaluations = recipe.train.schedule(rows["train"], rows.get("eval", 0)).evaluations
    if (early := recipe.train.early_stopping) is not None and early.patience + 1 >= evaluations:
        raise RecipeError(
            f"train.early_stopping: a patience of {early.patience} ends no training of {evaluations} evaluations before its end",
            "evaluate more often (`train.evaluate`), train longer, lower `patience`, or leave `early_stopping` out",
        )
    if rows["train"] >= recipe.train.batch_size:
        return []
    fewer = f"train has {plural(rows['train'], 'row')}, fewer than train.batch_size {recipe.train.batch_size}"
    return [f"{fewer}: each epoch is one short step"]


def _sweep(plan: Plan) -> None:
    """Remove what killed processes have left."""
    from afina.worker.data.tokens import shards
    from afina.worker.data.tokens.tokenise import shards_folder

    for folder in (plan.site.scratch / "pins", plan.site.prepared, plan.site.cache / "datasets"):
        sweep(folder, now=time.time())
    shards.sweep(shards_folder(plan), now=time.time())


def _fetch(plan: Plan, say: Say) -> _Inputs:
    """Fetch model and data from the Hub, or find them on disk; the model's files are complete."""
    from afina.worker.hub import datasets
    from afina.worker.hub import pins as hub
    from afina.worker.model.check_arguments import check_arguments
    from afina.worker.model.model_files import check_files, record_model

    recipe, site = plan.recipe, plan.site
    # Checks that take a second come before large downloads: mistyped names on the Hub, arguments.
    data_pin = hub.pin(site, "dataset", recipe.data.hub, recipe.data.revision, say) if recipe.data.hub else None
    model_pin = hub.pin(site, "model", recipe.model, recipe.revision, say) if plan.model_folder is None else None
    if data_pin or model_pin:
        check_arguments(recipe.train, site.scratch / "pins")
    if model_pin is None:
        assert plan.model_folder is not None
        folder = plan.model_folder
        check_files(folder)
        model_files = record_model(folder, recipe)
    else:
        fetched = hub.fetch_model(site, recipe, model_pin, say)
        folder, model_files = fetched.folder, fetched.files
        check_files(folder, "the repository itself holds a broken file: choose another revision or model")
    data = datasets.fetch_data(site, recipe.data, data_pin, say) if data_pin else None
    return _Inputs(folder, model_files, model_pin.commit if model_pin else None, data, data_pin)


def _check_metric(recipe: Recipe, manifest: Mapping[str, Any]) -> list[str]:
    """A remark where the best checkpoint is chosen by accuracy and one class is most of eval."""
    about = manifest["splits"].get("train" if recipe.data.fold else "eval", {})
    metric = selection_metric(manifest["task"], recipe.train.best_metric)
    if metric != "accuracy" or recipe.train.keep != "best" or "largest_class" not in about:
        return []
    name, rows = about["largest_class"]
    share = rows / about["rows"]
    if share < _ONE_SIDED:
        return []
    return [
        f"{share:.1%} of eval is {name!r}: a model that always answers it has accuracy {share:.3f}, and the best checkpoint is "
        "chosen by accuracy; `train.best_metric: f1` counts each class alike"
    ]


def _files_of(plan: Plan, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """SHA-256 and rows of each data file, by its name; of several files with one name by the path below their common folder."""
    digests = manifest["source"].get("files") or {}
    files = {
        path: each["sha256"]
        for part, paths in plan.files.items()
        for path, each in zip(paths, digests.get(part, ()), strict=False)
    }
    read = manifest.get("read") or {}
    records = {}
    for path, digest in files.items():
        alike = [other for other in files if other.name == path.name]
        name = path.name if len(alike) == 1 else str(path.relative_to(os.path.commonpath(alike)))
        rows = [count for other, count in read.items() if Path(other).name == path.name]
        records[name] = {"sha256": digest, "rows": read.get(str(path), rows[0] if len(rows) == 1 else None)}
    return records


def _make(
    plan: Plan, inputs: _Inputs, states: Mapping[str, Any], final: Path, content: Mapping[str, Any], say: Say
) -> tuple[dict[str, Any], list[str]]:
    """Check and tokenise the data, and publish it at `final`; returns the manifest, and warnings about the model."""
    from afina.worker.data.splits.build_splits import read_splits
    from afina.worker.data.tokens.tokenise import build
    from afina.worker.hub.datasets import fetch_data

    data = inputs.data
    if inputs.data_pin:
        data = fetch_data(plan.site, plan.recipe.data, inputs.data_pin, say, digests=True)
    # Data is checked first: a wrong column is reported within a second, importing transformers takes several.
    checked = read_splits(plan, data, states, say)
    warnings = _check_model(plan, inputs.model_folder, len(checked.splits["train"]))
    return build(plan, inputs.model_folder, checked, final, content, say), warnings


def _check_model(plan: Plan, folder: Path, rows: int) -> list[str]:
    """Warnings about the model and the arguments of the training on `rows` rows."""
    from afina.worker.model.check_arguments import check_arguments
    from afina.worker.model.pretrained import check_model

    pins, steps = plan.site.scratch / "pins", plan.recipe.train.schedule(rows, 0).total_steps
    return [*check_model(folder, plan.recipe, pins), *check_arguments(plan.recipe.train, pins, steps)]


def set_environment(plan: Plan, env: MutableMapping[str, str]) -> None:
    """Caches under scratch, no launcher, no network where none is needed. Before any Hugging Face library is imported."""
    token = (
        Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface").expanduser() / "token"
    )
    if not env.get("HF_TOKEN_PATH") and token.is_file():
        # The token that `hf auth login` left stays valid where HF_HOME moves to scratch.
        env["HF_TOKEN_PATH"] = str(token)
    env.update(cache_environment(plan.site, env))
    # With a launcher's variables TrainingArguments would wait for a process group that does not exist.
    for name in set(env) - set(without_launcher(env)):
        env.pop(name)
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


# -- the digest -------------------------------------------------------------------------------------------------------


def _content(plan: Plan, inputs: _Inputs) -> dict[str, Any]:
    """Everything that decides the prepared data; the digest is over this."""
    from afina.worker.model.tokenizer import tokenizer_identity

    recipe, data = plan.recipe, inputs.data
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
        **({"groups": "whole"} if recipe.data.group else {}),
        "source": source,
        "data": recipe.data.digested(exclude=("files", "hub", "config", "revision", "fold")),
        **({"folds": True} if recipe.data.fold else {}),
        "task": recipe.task,
        **recipe.tokens.encoding,
        "tokenizer": tokenizer_identity(inputs.model_folder),
        "trust_remote_code": recipe.trust_remote_code,
    }


def _states(plan: Plan) -> dict[str, Any]:
    """States of the files of each key of `data.files`, before anything is read."""
    with _readable():
        return {key: DataSource(tuple(paths)).state() for key, paths in plan.files.items()}


def _digest(path: Path) -> str:
    with _readable():
        return sha256(path)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}", "check the path and its permissions") from None


def _find(final: Path, say: Say = lambda line: None) -> dict[str, Any] | None:
    """The manifest of existing prepared data, all bytes compared; None if there is none, or it is damaged."""
    if not final.exists():
        return None
    try:
        return verify(final)
    except SiteError as error:
        say(f"{error.message}; preparing again")
        return None
