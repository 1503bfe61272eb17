"""Rerun: a new run from the recipe, overrides and revisions of an old one, on today's site.

Model and data are pinned to the commits that the old run used, and files are read from the same absolute paths. Differences (image,
commit, prepared data, number of processes) are reported before training starts; those of versions, device and precision, which only the
training knows, at its end. The old run is not changed. Equal inputs give
an equal model if the machine computes alike: see docs/stopping.md.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from afina import api
from afina.errors import AfinaError, DataError
from afina.recipe.parse import parse_recipe
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest
from afina.run.plan import Plan, check_cores, make_plan
from afina.run.provenance.methods import execution_differences, execution_of
from afina.run.provenance.record import differences, make_record, read_record, recipe_as_run
from afina.site.settings import load_site
from afina.slurm.client import need_slurm, version
from afina.watch.handle import Run

__all__ = ["Again", "plan_again", "rerun"]


@dataclass(frozen=True)
class Again:
    """A rerun that has been planned.

    Attributes:
        old: the run that is repeated.
        plan: the plan of the new run.
        text: the old run's recipe.
        overrides: overrides of that text.
        notes: differences from the old run, in words.
    """

    old: RunDir
    plan: Plan
    text: str
    overrides: tuple[str, ...]
    notes: tuple[str, ...]


def plan_again(run: str | Path, request: JobRequest = JobRequest(), *, local: bool = True) -> Again:
    """Plan `run` again; changes nothing.

    Args:
        request: site and resources.
        local: train on this machine, with the old run's number of processes if that used one node, else one per GPU here.

    Raises:
        InputError: not a run directory, or its files do not exist any more.
    """
    old = Run(run).dir
    before, prepared, record = old.plan(), old.prepared(), read_record(old.path)
    text, overrides, note = recipe_as_run(old.path, before)
    notes = [note] if note else []
    # In quotes: a commit may look like a number.
    commits = {"revision": prepared.get("model_commit"), "data.revision": prepared.get("data_commit")}
    pins = [f"{key}={json.dumps(commit)}" for key, commit in commits.items() if commit]
    recipe = parse_recipe(text, [*overrides, *pins], source=str(old.path / "recipe.yaml"))
    if local:
        gpus = api.visible_gpus()
        processes = (
            request.num_processes or gpus or (before.geometry.processes_per_node if before.geometry.nodes == 1 else 1)
        )
        check_cores(processes)
        gpus = gpus if request.gpus_per_node is None else request.gpus_per_node
        request = replace(request, num_processes=processes, gpus_per_node=gpus)
    plan = _planned(recipe, before, request)
    if plan.geometry.num_processes != before.geometry.num_processes:
        notes.append(
            f"processes: {before.geometry.num_processes} then, {plan.geometry.num_processes} now (same rows and order, other dropout masks)"
        )
    return Again(old, plan, text, (*overrides, *pins), (*notes, *_differences(record, plan, text)))


def _planned(recipe: Recipe, before: Plan, request: JobRequest) -> Plan:
    """Like `make_plan`, but with the absolute paths of the old run's files: its relative paths may mean others from here."""
    missing = [path for paths in before.files.values() for path in paths if not path.exists()]
    missing += [before.model_folder] if before.model_folder and not before.model_folder.is_dir() else []
    if missing:
        raise DataError(
            f"{missing[0]}: does not exist any more, and the run was made from it",
            "put it back, or train its recipe.yaml with `--set data.files=…`",
        )
    # Absolute paths to find the files; the recipe itself stays as it was written.
    there: dict[str, object] = {}
    if before.files:
        files = {part: tuple(map(str, paths)) for part, paths in before.files.items()}
        there["data"] = recipe.data.model_copy(update={"files": files})
    if before.model_folder:
        there["model"] = str(before.model_folder)
    absolute = recipe.model_copy(update=there)
    plan = make_plan(absolute, load_site(request.site), request, recipe_file=before.recipe_file)
    recipe = recipe.model_copy(update={"resources": plan.recipe.resources})
    kept = {"files": before.files, "model_folder": before.model_folder, "metric_code": before.metric_code}
    return plan.model_copy(update={"recipe": recipe, **kept})


def _differences(record: dict[str, object], plan: Plan, text: str) -> list[str]:
    """Differences that are known before data and model have been read."""
    if not record:
        return ["the old run has no record.json: differences from it are unknown"]
    return differences(record, make_record(plan, {}, text, version()))


def rerun(
    run: str | Path,
    request: JobRequest = JobRequest(),
    *,
    submit: bool = False,
    say: Callable[[str], None] = print,
) -> Run:
    """Repeat `run`: train here and return at the end, or with `submit` return once the job is in the queue.

    Args:
        request: the new run directory, site, resources, and how it is submitted.
        say: called with a line for each difference.

    Raises:
        AfinaError: as `afina.train` and `afina.submit`; the run directory of a refused submission is removed.
    """
    if submit:
        need_slurm()
    again = plan_again(run, request, local=not submit)
    for note in again.notes:
        say(f"differs: {note}")
    made = api.claim(again.plan, request.run, text=again.text)
    reported = set(again.notes)
    late = [line for line in differences(read_record(again.old.path), read_record(made.path)) if line not in reported]
    for line in late:
        say(f"differs: {line}")
    if not (again.notes or late):
        say(
            "no recorded difference from the first run so far; versions, device and precision are known when it has run"
        )
    say(f"run {made.path}")
    try:
        if submit:
            say(f"when it has run: afina compare {shlex.quote(str(again.old.path))} {shlex.quote(str(made.path))}")
            return api.submit(made.path, via=request.via)
        done = api.resume_here(made.path)
        found = execution_differences(execution_of(again.old), execution_of(RunDir(made.path)))
        for line in found or ["versions, device, precision and processes are those of the first run"]:
            say(f"differs: {line}" if found else line)
        return done
    except AfinaError:
        if submit:
            shutil.rmtree(made.path)
        raise
