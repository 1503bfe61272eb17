"""A sweep before anything is done: which cells, where, which of them are missing, and with which commands they are submitted.

Reads the recipe, the site, the sweep directory and (for the states) squeue; changes nothing. What a draft says is what
`afina.sweeps.sweep` does and what `--dry-run` prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina import api
from afina.errors import InputError, RecipeError, SlurmError
from afina.recipe.schema import Recipe, parse_recipe, read_recipe
from afina.run.commands import sweep_argv
from afina.run.directory import is_run_dir
from afina.run.plan import Plan, check_cores, make_plan
from afina.site.settings import load_site
from afina.slurm.query import query
from afina.slurm.submit import max_array_size
from afina.sweeps.directory import CellRecord, SearchRecord, SweepDir, SweepRecord, differences, given_up
from afina.sweeps.grid import Cell, expand_sweep, parse_seeds
from afina.sweeps.space import Space, corners
from afina.watch.overview import State, summarise

__all__ = ["BUSY", "Draft", "arrays", "cell_states", "draft_sweep", "dry_run", "todo"]

#: States of a cell that something is done about already.
BUSY = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Draft:
    """What a call would do: printed by the dry run, done otherwise.

    Attributes:
        home: the sweep directory, there or not.
        before: what its `sweep.json` says now; None for a new sweep.
        record: what it will say.
        text: the recipe as it is written.
        wanted: the numbers of the cells that this call is about.
        plans: of those cells, by number; a search has none.
        local: to be run here.
    """

    home: SweepDir
    before: SweepRecord | None
    record: SweepRecord
    text: str
    wanted: tuple[int, ...]
    plans: Mapping[int, Plan]
    local: bool


def draft_sweep(
    recipe: str | Path | Recipe,
    *,
    grid: Mapping[str, Sequence[str]],
    seeds: int | str | Sequence[int] | None = None,
    search: Space | None = None,
    trials: int = 20,
    search_seed: int = 0,
    directory: str | Path | None = None,
    overrides: Sequence[str] = (),
    site: str | Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    time_min: int | None = None,
    local: bool = False,
    num_processes: int | None = None,
) -> Draft:
    """Look at everything, change nothing; arguments as `sweep`, grid and space as they are parsed.

    Raises:
        RecipeError, InputError: a cell that is no recipe, with its name; a sweep directory of another recipe.
    """
    if isinstance(recipe, Recipe):
        text, file, source = json.dumps(recipe.model_dump(mode="json")), None, "recipe"
    else:
        text, file, source = read_recipe(recipe), Path(recipe), str(recipe)
    where = load_site(site)
    processes = None
    if local:
        processes = num_processes if num_processes is not None else api.visible_gpus() or 1
        check_cores(processes)

    def plan_of(one: Recipe) -> Plan:
        return make_plan(
            one,
            where,
            recipe_file=file,
            nodes=1 if local else nodes,
            gpus_per_node=api.visible_gpus() if local else gpus_per_node,
            processes_per_node=processes,
            time_min=time_min,
        )

    plan = plan_of(parse_recipe(text, overrides, source=source))
    home = SweepDir(directory) if directory else SweepDir.default(plan)
    before = home.read()
    if before is not None:
        _check_same(home, before, plan, search)
    known = before.cells if before else ()
    if search is not None:
        if grid or seeds is not None:
            raise InputError(
                "--search: stands alone, a trial is one run",
                "afterwards compare the best values over seeds: --grid … --seeds 5",
            )
        if trials < 1:
            raise InputError(f"--trials {trials}: no trial is no search", "for example --trials 20")
        for words in corners(search):
            try:
                plan_of(parse_recipe(text, [*overrides, *words], source=source))
            except RecipeError as error:
                said = error.message.replace("--set ", "--search ")
                raise RecipeError(f"{said} (with {', '.join(words)})", error.remedy) from None
        found = SearchRecord(
            space=search, trials=trials, seed=search_seed, metric="", direction="maximize", recipe_text=text,
            overrides=tuple(overrides), prepared={}, run_record={}, worker_argv=(),
        )  # fmt: skip
        cells, wanted = _trials(home, known, trials)
        record = SweepRecord(plan=plan, cells=cells, search=found)
        return Draft(home, before, record, text, wanted, {}, local)
    grid, listed = dict(grid), None
    if "train.seed" in grid:
        if seeds is not None:
            raise InputError("--grid train.seed: is also given by --seeds", "keep one of the two")
        listed = ",".join([*grid.pop("train.seed"), ""])
    if not grid and seeds is None and listed is None:
        raise InputError("nothing to sweep over", "give --grid KEY=A,B, --seeds N or --search KEY=LOW..HIGH")
    chosen = parse_seeds(listed or (1 if seeds is None else seeds), plan.recipe.train.seed)
    expanded = expand_sweep(text, overrides, grid, chosen, source=source)
    plans = [_planned(plan_of, cell, named=bool(grid)) for cell in expanded]
    cells, wanted = _joined(known, expanded, plans)
    record = SweepRecord(plan=plan, grid={k: tuple(v) for k, v in grid.items()}, seeds=chosen, cells=cells)
    return Draft(home, before, record, text, wanted, dict(zip(wanted, plans, strict=True)), local)


def dry_run(draft: Draft, max_parallel: int | None = None) -> dict[str, Any]:
    """The sweep directory, the cells and their overrides, which of them would be submitted, and with which commands."""
    missing, _ = todo(draft)
    cells = [
        {
            "cell": draft.record.cells[number].name,
            "overrides": list(draft.record.cells[number].overrides),
            "submit": number in missing,
        }
        for number in draft.wanted
    ]
    commands = [] if draft.local else [argv for argv, _, _ in arrays(draft, missing, max_parallel)]
    return {"sweep": str(draft.home.path), "cells": cells, "commands": commands}


def cell_states(home: SweepDir, cells: Sequence[CellRecord]) -> list[State]:
    """The state of each cell, as `afina status` says it; one call of squeue for all, and one for trials not made yet."""
    runs = [home.run(cell.name) for cell in cells]
    claimed = [number for number, run in enumerate(runs) if is_run_dir(run.path)]
    states: list[State] = ["PLANNED"] * len(runs)
    for number, summary in zip(claimed, summarise([runs[number].path for number in claimed]), strict=True):
        states[number] = summary.state
    # Tasks that the run itself does not know: it is not made yet, or the command died before it could note them there.
    unnoted: dict[int, list[str]] = {}
    for number, jobs_of_cell in home.jobs_of().items():
        if number < len(runs) and states[number] not in ("FINISHED", *BUSY):
            known = {str(line["job_id"]) for line in runs[number].lines("submissions.jsonl")}
            if unknown := [job for job in jobs_of_cell if job not in known]:
                unnoted[number] = unknown
    queue = query([job for ids in unnoted.values() for job in ids], account=())
    for number, ids in unnoted.items():
        found = {queue[job].state for job in ids}
        under_way: tuple[State, ...] = ("RUNNING", "PENDING", "UNKNOWN")
        lost: State = "FAILED" if states[number] == "PLANNED" else states[number]
        states[number] = next((state for state in under_way if state in found), lost)
    return states


def todo(draft: Draft) -> tuple[list[int], dict[str, int]]:
    """The wanted cells that are neither done nor under way, and how many of the wanted are in which state."""
    states = cell_states(draft.home, draft.record.cells)
    counts: dict[str, int] = {}
    for number in draft.wanted:
        counts[states[number]] = counts.get(states[number], 0) + 1
    if any(states[number] == "UNKNOWN" and draft.home.jobs_of().get(number) for number in draft.wanted):
        raise SlurmError(
            "squeue does not answer: whether the cells are still queued is not known, and none is submitted twice",
            "try it again when `squeue --me` answers",
        )
    return [number for number in draft.wanted if states[number] not in ("FINISHED", *BUSY)], counts


def arrays(
    draft: Draft, missing: Sequence[int], max_parallel: int | None, busy: int = 0
) -> Iterator[tuple[list[str], int, list[int]]]:
    """The command, the first cell and the tasks of each array: an array's numbers end at Slurm's MaxArraySize."""
    size = max_array_size() if missing else 1
    firsts = sorted({number // size * size for number in missing})
    for first in firsts:
        tasks = [number - first for number in missing if first <= number < first + size]
        # Slurm limits each array by itself: what runs already, and the other arrays, have their share.
        at_once = max(1, (max_parallel - min(busy, max_parallel)) // len(firsts)) if max_parallel else None
        plan = draft.plans[first + tasks[0]] if draft.plans else draft.record.plan
        yield sweep_argv(plan, draft.home.path, tasks, first=first, at_once=at_once), first, tasks


def _check_same(home: SweepDir, before: SweepRecord, plan: Plan, search: Space | None) -> None:
    if differ := differences(before.plan, plan):
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise InputError(
            f"{home.path}: is a sweep of another recipe: {'; '.join(differ[:3])}{more}",
            "choose another --sweep DIR; the sweep that is there stays as it is",
        )
    if (before.search is None) != (search is None):
        raise InputError(
            f"{home.path}: was made with {'--grid' if before.search is None else '--search'}",
            "choose another --sweep DIR",
        )
    if before.search is not None and before.search.space != search:
        there = {key: domain.model_dump(exclude={"kind"}) for key, domain in before.search.space.items()}
        raise InputError(
            f"{home.path}: is a search of another space: {there}", "choose another --sweep DIR, or the same --search"
        )


def _planned(plan_of: Callable[[Recipe], Plan], cell: Cell, *, named: bool) -> Plan:
    try:
        return plan_of(cell.recipe)
    except RecipeError as error:
        raise RecipeError(f"cell {cell.name}: {error.message}" if named else error.message, error.remedy) from None


def _joined(
    known: Sequence[CellRecord], expanded: Sequence[Cell], plans: Sequence[Plan]
) -> tuple[tuple[CellRecord, ...], tuple[int, ...]]:
    """The old cells and behind them the new ones; and the numbers of those in the grid. The same recipe is the same cell."""
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
                CellRecord(name=name, point=cell.point, seed=cell.seed, overrides=cell.overrides, digest=digest)
            )
        wanted.append(by_digest[digest])
    return tuple(cells), tuple(wanted)


def _trials(home: SweepDir, known: Sequence[CellRecord], trials: int) -> tuple[tuple[CellRecord, ...], tuple[int, ...]]:
    """The trials that are there and new ones behind them, until as many can still succeed as were asked for."""
    cells = list(known)
    wanted = []
    for number, cell in enumerate(known):
        run = home.run(cell.name)
        if not given_up(run, run.outcome()):
            wanted.append(number)
    while len(wanted) < trials:
        wanted.append(len(cells))
        cells.append(CellRecord(name=f"trial-{len(cells):03}"))
    return tuple(cells), tuple(wanted)
