"""A draft: the cells of a sweep, which of them are missing, and the commands that submit them.

Reads the recipe, the site, the sweep directory and (for the states) squeue; changes nothing. `--dry-run` prints a draft,
`afina.sweeps.sweep` carries it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from afina import api
from afina.errors import InputError, RecipeError, SlurmError
from afina.recipe.parse import any_recipe, parse_recipe, read_recipe
from afina.recipe.schema import Recipe
from afina.run.commands import sweep_argv
from afina.run.directory import is_run_dir
from afina.run.job_request import JobRequest
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site, load_site
from afina.slurm.query import query
from afina.slurm.submit import max_array_size
from afina.sweeps.grid import Cell, expand_folds, expand_sweep, parse_seeds
from afina.sweeps.space import Space, corners
from afina.sweeps.sweep_dir import CellRecord, SearchRecord, SweepDir, SweepRecord, differences, failed_for_good
from afina.watch.overview import State, summarise

__all__ = ["BUSY", "ArrayPart", "Draft", "SweepRequest", "arrays", "cell_states", "draft_sweep", "dry_run", "todo"]

#: States of a cell that is queued or running.
BUSY = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Draft:
    """A draft of a call's effects: the dry run prints it.

    Attributes:
        home: the sweep directory, there or not.
        before: its `sweep.json` now; None for a new sweep.
        record: its `sweep.json` afterwards.
        text: the recipe as it is written.
        wanted: the numbers of the cells that this call is about.
        plans: of those cells, by number; a search has none.
        request: what was asked for.
    """

    home: SweepDir
    before: SweepRecord | None
    record: SweepRecord
    text: str
    wanted: tuple[int, ...]
    plans: Mapping[int, Plan]
    request: SweepRequest


@dataclass(frozen=True)
class SweepRequest:
    """A request for runs: which ones (the arguments of `afina.sweep`, values as text), and the request of each, `job`."""

    grid: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seeds: int | str | Sequence[int] | None = None
    search: Space | None = None
    trials: int = 20
    search_seed: int = 0
    prune: bool = False
    folds: int | None = None
    repeats: int = 1
    directory: str | Path | None = None
    max_parallel: int | None = None
    local: bool = False
    job: JobRequest = JobRequest()


@dataclass(frozen=True)
class _Source:
    """A recipe's text, and how a parsed variant of it becomes a plan."""

    text: str
    name: str
    file: Path | None
    site: Site
    job: JobRequest

    @classmethod
    def of(cls, recipe: str | Path | Recipe, job: JobRequest) -> _Source:
        site = load_site(job.site)
        if isinstance(recipe, str | Path):
            return cls(read_recipe(recipe), str(recipe), Path(recipe), site, job)
        given = any_recipe(recipe)
        return cls(json.dumps(given.model_dump(mode="json")), "recipe", given.file, site, job)

    def plan(self, recipe: Recipe) -> Plan:
        return make_plan(recipe, self.site, self.job, recipe_file=self.file)

    def plan_with(self, words: Sequence[str]) -> Plan:
        return self.plan(parse_recipe(self.text, [*self.job.overrides, *words], source=self.name))


def draft_sweep(recipe: str | Path | Recipe, request: SweepRequest) -> Draft:
    """Examine everything, change nothing.

    Raises:
        RecipeError, InputError: a cell that is not a valid recipe, with its name; a sweep directory of another recipe.
    """
    source = _Source.of(recipe, api.on_this_machine(request.job) if request.local else request.job)
    plan = source.plan_with(())
    home = SweepDir(request.directory) if request.directory else SweepDir.default(plan, request.folds)
    before = home.read()
    drafting = _draft_grid if request.search is None else _draft_search
    draft = (drafting if request.folds is None else _draft_folds)(source, request, plan, home, before)
    if before is not None:
        _check_same(home, before, draft.record)
    return draft


def _draft_folds(
    source: _Source, request: SweepRequest, plan: Plan, home: SweepDir, before: SweepRecord | None
) -> Draft:
    assert request.folds is not None
    if request.search is not None or request.grid or request.seeds is not None:
        raise InputError(
            "--folds: cannot be combined with --grid, --search or --seeds: a setting that was chosen by the scores of the folds is "
            "scored too kindly by them",
            "choose the setting first, on other rows; then --folds for it alone. To compare two settings: two sweeps with --folds, "
            "and afina compare SWEEP OTHER_SWEEP",
        )
    expanded = expand_folds(source.text, source.job.overrides, request.folds, request.repeats, source=source.name)
    plans = [_planned(source, cell, named=False) for cell in expanded]
    cells, wanted = _joined(before.cells if before else (), expanded, plans)
    repeats = max(request.repeats, before.repeats if before else 1)
    record = SweepRecord(plan=plan, cells=cells, folds=request.folds, repeats=repeats)
    return Draft(home, before, record, source.text, wanted, dict(zip(wanted, plans, strict=True)), request)


def _draft_search(
    source: _Source, request: SweepRequest, plan: Plan, home: SweepDir, before: SweepRecord | None
) -> Draft:
    assert request.search is not None
    if request.grid or request.seeds is not None:
        raise InputError(
            "--search: cannot be combined with --grid or --seeds, a trial is one run",
            "afterwards compare the best values over seeds: --grid … --seeds 5",
        )
    if request.trials < 1:
        raise InputError(f"--trials {request.trials}: a search needs at least one trial", "for example --trials 20")
    if request.prune:
        _check_lengths(request.search, plan)
    for words in corners(request.search):
        try:
            source.plan_with(words)
        except RecipeError as error:
            message = error.message.replace("--set ", "--search ")
            raise RecipeError(f"{message} (with {', '.join(words)})", error.remedy) from None
    search = SearchRecord(
        space=request.search, trials=request.trials, seed=request.search_seed, metric="", direction="maximize",
        recipe_text=source.text, overrides=tuple(source.job.overrides), prepared={}, run_record={}, worker_argv=(),
        prune=request.prune,
    )  # fmt: skip
    cells, wanted = _trials(home, before.cells if before else (), request.trials)
    return Draft(home, before, SweepRecord(plan=plan, cells=cells, search=search), source.text, wanted, {}, request)


def _check_lengths(space: Space, plan: Plan) -> None:
    """Refuse to prune among trials of different lengths: their schedules of the learning rate differ at the same epoch."""
    deciding = ("train.epochs", "train.max_steps", *(["train.batch_size"] if plan.recipe.train.max_steps else []))
    for key in deciding:
        if key in space:
            raise InputError(
                f"--prune: `{key}` is searched, and trials of different lengths cannot be compared on their way",
                f"search without {key}, or leave --prune out",
            )


def _draft_grid(
    source: _Source, request: SweepRequest, plan: Plan, home: SweepDir, before: SweepRecord | None
) -> Draft:
    grid, seeds = dict(request.grid), request.seeds
    if "train.seed" in grid:
        if seeds is not None:
            raise InputError("--grid train.seed: is also given by --seeds", "keep one of the two")
        seeds = ",".join([*grid.pop("train.seed"), ""])
    elif not grid and seeds is None:
        raise InputError("nothing to sweep over", "give --grid KEY=A,B, --seeds N, --folds N or --search KEY=LOW..HIGH")
    chosen = parse_seeds(1 if seeds is None else seeds, plan.recipe.train.seed)
    expanded = expand_sweep(source.text, source.job.overrides, grid, chosen, source=source.name)
    plans = [_planned(source, cell, named=bool(grid)) for cell in expanded]
    cells, wanted = _joined(before.cells if before else (), expanded, plans)
    record = SweepRecord(plan=plan, grid={k: tuple(v) for k, v in grid.items()}, seeds=chosen, cells=cells)
    return Draft(home, before, record, source.text, wanted, dict(zip(wanted, plans, strict=True)), request)


def dry_run(draft: Draft) -> dict[str, Any]:
    """The sweep directory, its cells with their overrides, which of them would be submitted, and the commands."""
    missing, _ = todo(draft)
    cells = [
        {
            "cell": draft.record.cells[number].name,
            "overrides": list(draft.record.cells[number].overrides),
            "submit": number in missing,
        }
        for number in draft.wanted
    ]
    commands = [] if draft.request.local else [part.argv for part in arrays(draft, missing)]
    return {"sweep": str(draft.home.path), "cells": cells, "commands": commands}


def cell_states(home: SweepDir, cells: Sequence[CellRecord]) -> list[State]:
    """The state of each cell, as in `afina status`; one call of squeue for all, and one for trials without a directory."""
    runs = [home.run(cell.name) for cell in cells]
    claimed = [number for number, run in enumerate(runs) if is_run_dir(run.path)]
    states: list[State] = ["PLANNED"] * len(runs)
    for number, summary in zip(claimed, summarise([runs[number].path for number in claimed]), strict=True):
        states[number] = summary.state
    # Tasks that the run does not know: it does not exist yet, or the command died before it could record them there.
    unrecorded: dict[int, list[str]] = {}
    for number, jobs_of_cell in home.jobs_of().items():
        if number < len(runs) and states[number] not in ("FINISHED", *BUSY):
            known = {str(line["job_id"]) for line in runs[number].lines("submissions.jsonl")}
            if unknown := [job for job in jobs_of_cell if job not in known]:
                unrecorded[number] = unknown
    queue = query([job for ids in unrecorded.values() for job in ids], account=())
    for number, ids in unrecorded.items():
        in_queue = {queue[job].state for job in ids}
        active: tuple[State, ...] = ("RUNNING", "PENDING", "UNKNOWN")
        lost: State = "FAILED" if states[number] == "PLANNED" else states[number]
        states[number] = next((state for state in active if state in in_queue), lost)
    return states


def todo(draft: Draft) -> tuple[list[int], dict[str, int]]:
    """The wanted cells that are neither finished nor queued nor running, and the number of wanted cells by state."""
    states = cell_states(draft.home, draft.record.cells)
    counts: dict[str, int] = {}
    for number in draft.wanted:
        counts[states[number]] = counts.get(states[number], 0) + 1
    if any(states[number] == "UNKNOWN" and draft.home.jobs_of().get(number) for number in draft.wanted):
        raise SlurmError(
            "squeue does not answer: cells may still be queued, and none is submitted twice",
            "try it again when `squeue --me` answers",
        )
    return [number for number in draft.wanted if states[number] not in ("FINISHED", *BUSY)], counts


@dataclass(frozen=True)
class ArrayPart:
    """A job array: its task n is cell `first + n`, and `at_once` of them may run at the same time (None: any number)."""

    plan: Plan
    home: Path
    first: int
    tasks: list[int]
    at_once: int | None

    @property
    def argv(self) -> list[str]:
        return sweep_argv(self.plan, self.home, self.tasks, first=self.first, at_once=self.at_once)

    def halves(self) -> list[ArrayPart]:
        middle = (len(self.tasks) + 1) // 2
        return [replace(self, tasks=self.tasks[:middle]), replace(self, tasks=self.tasks[middle:])]


def arrays(draft: Draft, missing: Sequence[int], busy: int = 0) -> Iterator[ArrayPart]:
    """The job arrays of the missing cells: an array's numbers end at Slurm's MaxArraySize."""
    size = max_array_size() if missing else 1
    max_parallel = draft.request.max_parallel
    firsts = sorted({number // size * size for number in missing})
    for first in firsts:
        tasks = [number - first for number in missing if first <= number < first + size]
        # Slurm limits each array by itself: running cells and the other arrays have their share.
        at_once = max(1, (max_parallel - min(busy, max_parallel)) // len(firsts)) if max_parallel else None
        plan = draft.plans[first + tasks[0]] if draft.plans else draft.record.plan
        yield ArrayPart(plan, draft.home.path, first, tasks, at_once)


def _check_same(home: SweepDir, before: SweepRecord, record: SweepRecord) -> None:
    if differ := differences(before.plan, record.plan):
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise InputError(
            f"{home.path}: is a sweep of another recipe: {'; '.join(differ[:3])}{more}",
            "choose another --sweep DIR; the existing sweep stays as it is",
        )
    if before.kind != record.kind:
        raise InputError(f"{home.path}: was made with {before.kind}", "choose another --sweep DIR")
    if before.search is not None and record.search is not None and before.search.prune != record.search.prune:
        raise InputError(
            f"{home.path}: was made with{'' if before.search.prune else 'out'} --prune",
            "choose another --sweep DIR, or repeat the command as it was",
        )
    if before.search is not None and record.search is not None and before.search.space != record.search.space:
        there = {key: domain.model_dump(exclude={"kind"}) for key, domain in before.search.space.items()}
        raise InputError(
            f"{home.path}: is a search of another space: {there}", "choose another --sweep DIR, or the same --search"
        )


def _planned(source: _Source, cell: Cell, *, named: bool) -> Plan:
    try:
        return source.plan(cell.recipe)
    except RecipeError as error:
        raise RecipeError(f"cell {cell.name}: {error.message}" if named else error.message, error.remedy) from None


def _joined(
    known: Sequence[CellRecord], expanded: Sequence[Cell], plans: Sequence[Plan]
) -> tuple[tuple[CellRecord, ...], tuple[int, ...]]:
    """The old cells, then the new ones; and the numbers of those in the grid. The same recipe is the same cell."""
    cells = list(known)
    by_digest = {cell.digest: number for number, cell in enumerate(cells)}
    names = {cell.name for cell in cells}
    wanted = []
    for cell, plan in zip(expanded, plans, strict=True):
        digest = plan.digest
        if digest not in by_digest:
            by_digest[digest] = len(cells)
            name = cell.name if cell.name not in names else f"{cell.name}-{digest[:6]}"
            names.add(name)
            cells.append(
                CellRecord(
                    name=name, point=cell.point, seed=cell.seed, overrides=cell.overrides, digest=digest, fold=cell.fold
                )
            )
        wanted.append(by_digest[digest])
    return tuple(cells), tuple(wanted)


def _trials(home: SweepDir, known: Sequence[CellRecord], trials: int) -> tuple[tuple[CellRecord, ...], tuple[int, ...]]:
    """The existing trials, then new ones, until as many as were asked for can still succeed."""
    cells = list(known)
    wanted = []
    for number, cell in enumerate(known):
        run = home.run(cell.name)
        if not failed_for_good(run, run.outcome()):
            wanted.append(number)
    while len(wanted) < trials:
        wanted.append(len(cells))
        cells.append(CellRecord(name=f"trial-{len(cells):03}"))
    return tuple(cells), tuple(wanted)
