"""From a draft to a sweep directory: prepare the data, claim the missing cells, publish the list.

Cells of the same data and model share prepared data and the reproducibility record. Every change is registered with its
undo, until the caller keeps it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from afina.errors import ClaimedError, InputError
from afina.files import encode_words, write_atomic
from afina.recipe.metrics import lower_is_better
from afina.recipe.parse import parse_recipes
from afina.run import new_run
from afina.run.commands import job_scripts, node_argv
from afina.run.directory import is_run_dir
from afina.run.new_run import make_folder, remove_empty
from afina.run.plan import Plan
from afina.run.provenance.record import make_record, overrides_of
from afina.site.image import check_image
from afina.slurm.client import version
from afina.sweeps.draft import Draft
from afina.sweeps.space import corners
from afina.sweeps.sweep_dir import SCRIPTS, SearchRecord, SweepDir, SweepRecord, record_of
from afina.sweeps.table import best_metric

__all__ = ["Say", "claim_cells", "make_home", "prepare_cells"]

#: Tells the caller how far it is.
Say = Callable[[str], None]


def prepare_cells(draft: Draft, say: Say) -> dict[str, dict[str, Any]]:
    """Prepare once for all cells that share data, model and arguments; the answers by `_share`."""
    plans: dict[str, tuple[str, Plan]] = {}
    if draft.record.search is not None:
        if draft.before is not None and draft.before.search is not None:
            return {"": draft.before.search.prepared}
        search, plan = draft.record.search, draft.record.plan
        many = parse_recipes(search.recipe_text, [[*search.overrides, *words] for words in corners(search.space)])
        for recipe in many:
            probe = plan.model_copy(update={"recipe": recipe.model_copy(update={"resources": plan.recipe.resources})})
            plans.setdefault(_share(probe), ("", probe))
    else:
        for number, plan in draft.plans.items():
            cell = draft.record.cells[number]
            if not is_run_dir(draft.home.runs / cell.name):
                if plan.recipe.data.fold is not None:  # the last one knows the folds of all repeats
                    plans.pop(_share(plan), None)
                plans.setdefault(_share(plan), (cell.point, plan))
    if plans:
        check_image(draft.record.plan.site)
    prepared = {}
    for count, (share, (point, plan)) in enumerate(plans.items(), start=1):
        if len(plans) > 1:
            say(f"preparing {count} of {len(plans)}{f': {point}' if point else ''}")
        try:
            prepared[share] = new_run.prepare(plan)
        except InputError as error:
            if len(plans) > 1 and point:
                raise type(error)(f"cell {point}: {error.message}", error.remedy) from None
            raise
    return {"": next(iter(prepared.values()))} if draft.record.search is not None else prepared


def _share(plan: Plan) -> str:
    """Equal for plans with the same preparation and the same checks in it."""
    recipe = plan.recipe
    what = recipe.model_dump(mode="json", include={"model", "revision", "trust_remote_code", "task", "data", "metrics"})
    what["data"].pop("fold")
    files = {part: [str(path) for path in paths] for part, paths in plan.files.items()}
    tokens = recipe.tokens.encoding
    return json.dumps([what, files, tokens, recipe.train.arguments, recipe.train.best_metric], sort_keys=True)


def make_home(home: SweepDir, undo: contextlib.ExitStack) -> None:
    made = make_folder(home.path)
    undo.callback(remove_empty, made)
    if made:
        undo.callback(lambda: (home.path / ".lock").unlink(missing_ok=True))


def claim_cells(draft: Draft, prepared: Mapping[str, Any], undo: contextlib.ExitStack, say: Say) -> SweepRecord:
    """Claim the missing cells and publish them; `undo` reverts all of it."""
    home, record = draft.home, draft.record
    scripts = {name: home.path / name for name in SCRIPTS}
    for name, source in job_scripts().items():
        if not scripts[name].is_file():
            undo.callback(scripts[name].unlink, missing_ok=True)
            write_atomic(scripts[name], source.read_bytes())
    for folder in (home.runs, home.logs):
        undo.callback(remove_empty, make_folder(folder))
    if record.search is not None:
        record = record.model_copy(update={"search": _search_record(draft, prepared[""], say)})
        if record.search is not None and record.search.prune and not home.pruning.is_file():
            undo.callback(home.pruning.unlink, missing_ok=True)
            lower = record.search.direction == "minimize"
            write_atomic(home.pruning, json.dumps({"metric": record.search.metric, "lower": lower}) + "\n")
        if not home.trial_argv.is_file():
            undo.callback(home.trial_argv.unlink, missing_ok=True)
            write_atomic(home.trial_argv, encode_words(_trial_argv(home, record.plan)))
    shared: dict[str, dict[str, Any]] = {}
    for count, number in enumerate(draft.plans, start=1):
        cell, plan = record.cells[number], draft.plans[number]
        run = home.run(cell.name)
        if is_run_dir(run.path):
            if run.plan().digest != plan.digest:
                raise ClaimedError(f"{run.path}: is a run of another recipe", "choose another --sweep DIR")
            continue
        if run.path.exists() and not any(run.attempts.glob("*")):
            shutil.rmtree(run.path)  # an interrupted claim: the plan is written last, and nothing runs without one
        share = _share(plan)
        if share not in shared:
            shared[share] = _shared_record(draft, plan, prepared[share], say)
        about = record_of(shared[share], plan, cell.overrides)
        new_run.claim_run(
            plan, run.path, text=draft.text, prepared=_of_fold(prepared[share], plan), record=about, scripts=scripts
        )
        undo.callback(shutil.rmtree, run.path, ignore_errors=True)
        if count % 100 == 0:
            say(f"{count} of {len(draft.plans)} run directories made")
    if record != draft.before:
        undo.callback(_restore, home, draft.before)
        home.write(record)
    return record


def _of_fold(prepared: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
    """The answer of `prepare` for the plan's fold, from its answer for another fold of the same data."""
    if plan.recipe.data.fold is None:
        return prepared
    sizes = plan.recipe.data.fold.sizes(prepared["folds"])
    counts = {
        name: {**prepared[name], **{split: size[name] for split, size in sizes.items()}} for name in sizes["eval"]
    }
    return {**prepared, **counts}


def _shared_record(draft: Draft, plan: Plan, prepared: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The reproducibility record of the runs that share data and model, with the overrides of all cells."""
    record = make_record(plan, prepared, draft.text, version(), say)
    record["recipe"]["overrides"] = overrides_of(draft.text, draft.record.plan.recipe)
    return record


def _search_record(draft: Draft, prepared: Mapping[str, Any], say: Say) -> SearchRecord:
    search = draft.record.search
    assert search is not None
    if draft.before is not None and draft.before.search is not None:
        return draft.before.search.model_copy(update={"trials": search.trials})
    metric = best_metric(draft.record, str(prepared["task"]))
    plan = draft.record.plan
    if search.prune:
        _check_pruning(plan, prepared["rows"])
    return search.model_copy(
        update={
            "metric": metric,
            "direction": "minimize" if lower_is_better(metric, plan.recipe.metric_texts) else "maximize",
            "prepared": dict(prepared),
            "run_record": _shared_record(draft, plan, prepared, say),
            "worker_argv": tuple(node_argv(plan, _outside(draft.home, plan))),
        }
    )


def _check_pruning(plan: Plan, rows: Mapping[str, int]) -> None:
    """Refuse a pruning that takes no effect."""
    evaluations = plan.recipe.train.schedule(rows["train"], rows.get("eval", 0)).evaluations
    if evaluations < 2:
        raise InputError(
            f"--prune: prunes no trial: each is evaluated {'once, at its end' if evaluations else 'never'}",
            "evaluate more often (`train.evaluate`), train longer, or leave it out",
        )


def _trial_argv(home: SweepDir, plan: Plan) -> list[str]:
    """The command that makes the run directory of a trial, without its last word: that directory."""
    words = node_argv(plan, _outside(home, plan), "trial")[:-1]
    return [str(home.path / "node.sh") if word == "{run}/node.sh" else word for word in words]


def _outside(home: SweepDir, plan: Plan) -> list[Path]:
    return [] if home.path.is_relative_to(plan.site.scratch) else [home.path]


def _restore(home: SweepDir, before: SweepRecord | None) -> None:
    if before is not None:
        home.write(before)
    else:
        home.file.unlink(missing_ok=True)
        home.cells_file.unlink(missing_ok=True)
