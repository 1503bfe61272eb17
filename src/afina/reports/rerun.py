"""A run once more: a new run directory from what the old one wrote down, on the site of today.

The recipe's text and its overrides are those of the old run, model and data are pinned to the commits that it used, and files are looked for where
it found them. What is not the same now (image, versions, commit, prepared data, number of processes) is said before anything is trained. The old run is not
touched. Equal inputs make an equal model where the machine does: see docs/stopping.md.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from afina import api
from afina.errors import AfinaError, DataError, RecipeError
from afina.recipe.schema import Recipe, parse_recipe
from afina.run.directory import RunDir
from afina.run.plan import Plan, check_cores, make_plan
from afina.run.record import differences, make_record, read_record
from afina.site.settings import load_site
from afina.slurm.client import need_slurm, version
from afina.watch.handle import Run

__all__ = ["Again", "plan_again", "rerun"]


@dataclass(frozen=True)
class Again:
    """A run that is to be made again.

    Attributes:
        plan: of the new run.
        text: the recipe as the old run has it.
        overrides: over that text.
        notes: what is not as it was, in words.
    """

    old: RunDir
    plan: Plan
    text: str
    overrides: tuple[str, ...]
    notes: tuple[str, ...]


def plan_again(
    run: str | Path,
    *,
    site: str | Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    time_min: int | None = None,
    num_processes: int | None = None,
    local: bool = True,
) -> Again:
    """The plan of `run` once more; changes nothing.

    Args:
        local: for this machine: then the processes are the old run's, if that used one node, else what this machine has.

    Raises:
        InputError: not a run directory, or its files are not there any more.
    """
    old = Run(run).dir
    before, prepared, record = old.plan(), old.prepared(), read_record(old.path)
    text, overrides, notes = _recipe_text(old, before)
    # In quotes: a commit may look like a number.
    commits = {"revision": prepared.get("model_commit"), "data.revision": prepared.get("data_commit")}
    pins = [f"{key}={json.dumps(commit)}" for key, commit in commits.items() if commit]
    changes = {"nodes": nodes, "gpus_per_node": gpus_per_node, "time": time_min}
    asked = [f"resources.{key}={value}" for key, value in changes.items() if value is not None]
    if local and gpus_per_node is None:
        asked.append(f"resources.gpus_per_node={api.visible_gpus()}")
    if local:
        asked.append("resources.nodes=1")
    recipe = parse_recipe(text, [*overrides, *pins, *asked], source=str(old.path / "recipe.yaml"))
    processes = (num_processes or _processes(before)) if local else None
    if processes:
        check_cores(processes)
    plan = _planned(recipe, before, site, processes)
    if plan.geometry.num_processes != before.geometry.num_processes:
        notes.append(
            f"processes: {before.geometry.num_processes} then, {plan.geometry.num_processes} now (the same rows and order, other dropout masks)"
        )
    return Again(old, plan, text, (*overrides, *pins), (*notes, *_not_the_same(record, plan, text)))


def _recipe_text(old: RunDir, before: Plan) -> tuple[str, list[str], list[str]]:
    """The recipe's text and overrides; checked against the plan, which is what was run."""
    whole = json.dumps(before.recipe.model_dump(mode="json"), indent=2, ensure_ascii=False)
    try:
        text = (old.path / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return whole, [], ["recipe.yaml is missing: the recipe is taken from plan.json"]
    overrides = (read_record(old.path).get("recipe") or {}).get("overrides")
    lines = [str(line) for line in overrides] if isinstance(overrides, list) else []
    with contextlib.suppress(RecipeError):
        if parse_recipe(text, lines) == before.recipe:
            return text, lines, []
    return whole, [], ["recipe.yaml and record.json do not make the recipe that was run: it is taken from plan.json"]


def _processes(before: Plan) -> int:
    gpus = api.visible_gpus()
    return gpus or (before.geometry.processes_per_node if before.geometry.nodes == 1 else 1)


def _planned(recipe: Recipe, before: Plan, site: str | Path | None, processes: int | None) -> Plan:
    """As `make_plan`, with the files that the old run found: its relative paths may mean others from here."""
    missing = [path for paths in before.files.values() for path in paths if not path.exists()]
    missing += [before.model_folder] if before.model_folder and not before.model_folder.is_dir() else []
    if missing:
        raise DataError(
            f"{missing[0]}: is not there any more, and the run was made from it",
            "put it back, or train its recipe.yaml with `--set data.files=…`",
        )
    # Absolute paths for the look at the disk; the recipe itself stays as it was written.
    there: dict[str, object] = {}
    if before.files:
        files = {part: tuple(map(str, paths)) for part, paths in before.files.items()}
        there["data"] = recipe.data.model_copy(update={"files": files})
    if before.model_folder:
        there["model"] = str(before.model_folder)
    plan = make_plan(
        recipe.model_copy(update=there), load_site(site), recipe_file=before.recipe_file, processes_per_node=processes
    )
    return plan.model_copy(update={"recipe": recipe, "files": before.files, "model_folder": before.model_folder})


def _not_the_same(record: dict[str, object], plan: Plan, text: str) -> list[str]:
    """What differs now, as far as it can be told before data and model are looked at."""
    if not record:
        return ["the old run has no record.json: what differs now cannot be told"]
    return differences(record, make_record(plan, {}, text, version()))


def rerun(
    run: str | Path,
    *,
    path: str | Path | None = None,
    submit: bool = False,
    via: api.Via = "submitit",
    site: str | Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    time_min: int | None = None,
    num_processes: int | None = None,
    say: Callable[[str], None] = print,
) -> Run:
    """Make `run` again; trains here and returns at the end, or with `submit` returns once it is in the queue.

    Args:
        path: the new run directory; by default one under `$AFINA_SCRATCH/runs/`.
        say: called with lines about what differs.

    Raises:
        AfinaError: as `jobs.train` and `jobs.submit`; a run directory that was made for a refused submission is taken back.
    """
    if submit:
        need_slurm()
    again = plan_again(
        run,
        site=site,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time_min=time_min,
        num_processes=num_processes,
        local=not submit,
    )
    for note in again.notes:
        say(f"differs: {note}")
    made = api.claim(again.plan, path, text=again.text)
    told = set(again.notes)
    late = [line for line in differences(read_record(again.old.path), read_record(made.path)) if line not in told]
    for line in late:
        say(f"differs: {line}")
    if not (again.notes or late):
        say("nothing that is recorded differs from the first time")
    say(f"run {made.path}")
    try:
        return api.submit(made.path, via=via) if submit else api.resume(made.path)
    except AfinaError:
        if submit:
            shutil.rmtree(made.path)
        raise
