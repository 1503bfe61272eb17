"""Sweeps from Python: one recipe, many runs; a job array, or one after another here. The same call again mends what is missing.

    afina.sweep("recipe.yaml", grid={"train.learning_rate": [1e-5, 3e-5, 5e-5]}, seeds=5).wait()

Every cell is an ordinary run directory, claimed before anything is submitted, and all share the prepared data. What a call
finds done is not done again: finished cells stay, queued and running ones are left alone, those that failed, stopped or were
lost go on from their newest checkpoint. A search (`search=…`) claims nothing ahead: each array task asks Optuna for values
when it starts, in the image (`afina.worker.trial`), and what it learnt is read from the run directories.

Not covered: one limit on parallel runs over several arrays (a second array of the same sweep starts with what the first
leaves of it, one at least), and pruning of trials that look bad.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afina import jobs
from afina.errors import ClaimedError, EnvironmentProblem, InputError, RecipeError, SlurmError
from afina.grid import Cell, expand_sweep, grid_of, parse_seeds
from afina.image import check_image
from afina.launch import array_argv, job_scripts, node_argv, worker_environment
from afina.plan import Plan, check_cores, make_plan
from afina.recipe import Recipe, parse_recipe, parse_recipes, read_recipe
from afina.rundir import RunDir, is_run_dir, write_atomic
from afina.site import environment, load_site
from afina.slurm import in_queue, max_array_size, need_slurm, submit_array
from afina.space import Space, corners, space_of
from afina.sweep_table import LOWER_IS_BETTER, Row, Table, best_metric, tabulate
from afina.sweepdir import CellRecord, SearchRecord, SweepDir, SweepRecord, differences, given_up

__all__ = ["Draft", "Sweep", "carry_out", "draft_sweep", "dry_run", "sweep"]

_BUSY = ("PENDING", "RUNNING")
_SCRIPTS = ("finetune.sbatch", "job.sh", "node.sh")

Say = Callable[[str], None]


class Sweep:
    """A handle on a sweep directory.

    Attributes:
        submitted: the job arrays that the call which made this handle has submitted.
    """

    def __init__(self, path: str | Path, submitted: Sequence[str] = ()) -> None:
        self.dir = SweepDir(path)
        self.submitted = tuple(submitted)
        if not self.dir.file.is_file():
            raise InputError(
                f"{path}: not a sweep directory", "give the folder that `afina sweep RECIPE --grid …` named"
            )

    def __repr__(self) -> str:
        return f"Sweep({str(self.dir.path)!r})"

    @property
    def path(self) -> Path:
        return self.dir.path

    @property
    def record(self) -> SweepRecord:
        found = self.dir.read()
        assert found is not None
        return found

    @property
    def runs(self) -> list[jobs.Run]:
        """The runs that have been claimed, in the order of the cells."""
        paths = [self.dir.runs / cell.name for cell in self.record.cells]
        return [jobs.Run(path) for path in paths if is_run_dir(path)]

    def states(self) -> dict[str, jobs.State]:
        """The state of every cell by its name, with one call of squeue for all of them."""
        cells = self.record.cells
        return dict(zip((cell.name for cell in cells), _states(self.dir, cells), strict=True))

    def wait(self, timeout_s: float | None = None, *, tell: Callable[[Mapping[str, int]], None] | None = None) -> None:
        """Block until no cell is queued or running.

        Args:
            tell: is called with the number of cells in each state, after every look.

        Raises:
            TimeoutError: after `timeout_s` seconds.
        """
        began, pause, looked_again = time.monotonic(), 0.5, False
        while True:
            states = list(self.states().values())
            if tell is not None:
                tell({state: states.count(state) for state in dict.fromkeys(states)})
            busy = any(state in (*_BUSY, "UNKNOWN") for state in states)
            if not busy and looked_again:
                return
            # A shared file system may show the last outcomes a little later.
            looked_again = not busy
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise TimeoutError(f"{self.path}: still running after {timeout_s:g} s")
            time.sleep(2.0 if not busy else pause)
            pause = min(15.0, pause * 1.3)

    def table(self, metric: str | None = None) -> Table:
        """Mean, interval and comparison of the points; `str()` of it is a table. `metric` is another one of the recipe's."""
        record = self.record
        runs = [self.dir.run(cell.name) for cell in record.cells]
        states = _states(self.dir, record.cells)
        outcomes = [run.outcome() for run in runs]
        tried = [_tried(run, record.search) if record.search else {} for run in runs]
        return tabulate(record, outcomes, states, sweep=str(self.path), metric=metric, tried=tried)

    def best(self, metric: str | None = None) -> Row:
        """The best point, or trial.

        Raises:
            InputError: no run has finished yet.
        """
        best = self.table(metric).best
        if best is None:
            raise InputError(f"{self.path}: no run has finished yet", "wait for it: Sweep.wait()")
        return best


@dataclass(frozen=True)
class Draft:
    """What a call would do: printed by the dry run, done otherwise.

    Attributes:
        home: the sweep directory, there or not.
        before: what its `sweep.json` says now; None for a new sweep.
        record: what it will say.
        wanted: the numbers of the cells that this call is about.
        plans: of those cells, by number; a search has none.
        local: to be run here.
    """

    home: SweepDir
    before: SweepRecord | None
    record: SweepRecord
    wanted: tuple[int, ...]
    plans: Mapping[int, Plan]
    local: bool


def sweep(
    recipe: str | Path | Recipe,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | str | Sequence[int] | None = None,
    search: Mapping[str, str | Sequence[Any]] | None = None,
    trials: int = 20,
    search_seed: int = 0,
    directory: str | Path | None = None,
    overrides: Sequence[str] = (),
    site: str | Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    time_min: int | None = None,
    max_parallel: int | None = None,
    local: bool = False,
    num_processes: int | None = None,
) -> Sweep:
    """Run a recipe over a grid of values and seeds, or let Optuna choose; the same call again goes on.

    Submits one job array and returns at once; with `local` trains here, one run after another, and returns when they have ended.

    Args:
        grid: the values of each key, `{"train.learning_rate": [1e-5, 3e-5]}`.
        seeds: so many from the recipe's own on, or these.
        search: what Optuna may choose from, `{"train.learning_rate": "1e-6..1e-4:log", "tokens.batching": ["packed", "grouped"]}`.
        trials: how many trials of a search shall succeed.
        search_seed: of the search's random numbers.
        directory: the sweep directory; by default `$AFINA_SCRATCH/sweeps/<name>-<digest8>`.
        max_parallel: how many runs at the same time.

    Raises:
        AfinaError: what would have failed in the queue is refused here; a new sweep then leaves nothing behind.
    """
    spaces = space_of(search, overrides) if search is not None else None
    draft = draft_sweep(
        recipe,
        grid=grid_of(grid or {}),
        seeds=seeds,
        search=spaces,
        trials=trials,
        search_seed=search_seed,
        directory=directory,
        overrides=overrides,
        site=site,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time_min=time_min,
        local=local,
        num_processes=num_processes,
    )
    return carry_out(draft, max_parallel=max_parallel, num_processes=num_processes)


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
        processes = num_processes if num_processes is not None else jobs._visible_gpus() or 1
        check_cores(processes)

    def plan_of(one: Recipe) -> Plan:
        return make_plan(
            one,
            where,
            recipe_file=file,
            nodes=1 if local else nodes,
            gpus_per_node=jobs._visible_gpus() if local else gpus_per_node,
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
            overrides=tuple(overrides), prepared={}, worker_argv=(),
        )  # fmt: skip
        cells, wanted = _trials(home, known, trials)
        record = SweepRecord(plan=plan, cells=cells, search=found)
        return Draft(home, before, record, wanted, {}, local)
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
    return Draft(home, before, record, wanted, dict(zip(wanted, plans, strict=True)), local)


def carry_out(
    draft: Draft,
    *,
    max_parallel: int | None = None,
    num_processes: int | None = None,
    say: Say = lambda line: print(f"afina: {line}", flush=True),
) -> Sweep:
    """Prepare, claim, and submit or run what is missing.

    Raises:
        AfinaError: a new sweep leaves nothing behind, an old one is as it was before.
    """
    if not draft.local:
        need_slurm()
    prepared = _prepared(draft, say)
    with contextlib.ExitStack() as undo:
        _make_home(draft.home, undo)
        with draft.home.lock():
            if draft.home.read() != draft.before:
                raise ClaimedError(f"{draft.home.path}: was changed just now by another `afina sweep`", "try it again")
            record = _claim(draft, prepared, undo, say)
            if draft.local:
                undo.pop_all()
                _run_here(draft.home, record, draft.wanted, num_processes, say)
                return Sweep(draft.home.path)
            submitted = _submit(draft, record, max_parallel, undo, say)
    return Sweep(draft.home.path, submitted)


def dry_run(draft: Draft, max_parallel: int | None = None) -> dict[str, Any]:
    """The sweep directory, the cells and their overrides, which of them would be submitted, and with which commands."""
    todo, _ = _todo(draft)
    cells = [
        {
            "cell": draft.record.cells[number].name,
            "overrides": list(draft.record.cells[number].overrides),
            "submit": number in todo,
        }
        for number in draft.wanted
    ]
    commands = [] if draft.local else [argv for argv, _, _ in _arrays(draft, todo, max_parallel)]
    return {"sweep": str(draft.home.path), "cells": cells, "commands": commands}


# -- what is there, and what is missing --------------------------------------------------------------------------------


def _states(home: SweepDir, cells: Sequence[CellRecord]) -> list[jobs.State]:
    """The state of each cell; a finished one asks nobody."""
    arrays = home.jobs_of()
    asked: dict[int, list[str]] = {}
    states: list[jobs.State] = []
    for number, cell in enumerate(cells):
        run = home.run(cell.name)
        outcome = run.outcome()
        if outcome is not None and outcome.outcome == "finished":
            states.append("FINISHED")
            continue
        ids = [*arrays.get(number, ()), *(str(line["job_id"]) for line in run.lines("submissions.jsonl"))]
        if ids:
            asked[number] = ids
        if outcome is not None:
            states.append("STOPPED" if outcome.outcome == "stopped" else "FAILED")
        elif ids:
            states.append("FAILED")  # lost: it left the queue and recorded nothing
        else:
            states.append("UNKNOWN" if run.attempt_names() else "PLANNED")
    queue = in_queue(sorted({job for ids in asked.values() for job in ids}))
    for number, ids in asked.items():
        found = {queue[job] for job in ids}
        under_way: tuple[jobs.State, ...] = ("RUNNING", "PENDING", "UNKNOWN")
        states[number] = next((state for state in under_way if state in found), states[number])
    return states


def _todo(draft: Draft) -> tuple[list[int], dict[str, int]]:
    """The wanted cells that are neither done nor under way, and how many of the wanted are in which state."""
    states = _states(draft.home, draft.record.cells)
    counts: dict[str, int] = {}
    for number in draft.wanted:
        counts[states[number]] = counts.get(states[number], 0) + 1
    if any(states[number] == "UNKNOWN" and draft.home.jobs_of().get(number) for number in draft.wanted):
        raise SlurmError(
            "squeue does not answer: whether the cells are still queued is not known, and none is submitted twice",
            "try it again when `squeue --me` answers",
        )
    return [number for number in draft.wanted if states[number] not in ("FINISHED", *_BUSY)], counts


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


def _tried(run: RunDir, search: SearchRecord) -> dict[str, str]:
    """The values of a trial, from its plan."""
    if not is_run_dir(run.path):
        return {}
    recipe = run.plan().recipe.model_dump(mode="json")
    found = {}
    for key in search.space:
        value: Any = recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        found[key] = f"{value:.6g}" if isinstance(value, float) else str(value)
    return found


# -- making ------------------------------------------------------------------------------------------------------------


def _prepared(draft: Draft, say: Say) -> dict[str, dict[str, Any]]:
    """Prepare once for all cells that share data, model and arguments; what was prepared, by `_share`."""
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
                plans.setdefault(_share(plan), (cell.point, plan))
    if plans:
        check_image(draft.record.plan.site)
    found = {}
    for count, (share, (point, plan)) in enumerate(plans.items(), start=1):
        if len(plans) > 1:
            say(f"preparing {count} of {len(plans)}{f': {point}' if point else ''}")
        try:
            found[share] = jobs.prepare(plan)
        except InputError as error:
            if len(plans) > 1 and point:
                raise type(error)(f"cell {point}: {error.message}", error.remedy) from None
            raise
    return {"": next(iter(found.values()))} if draft.record.search is not None else found


def _share(plan: Plan) -> str:
    """Equal for plans that prepare the same, and for which preparing checks the same."""
    recipe = plan.recipe
    what = recipe.model_dump(mode="json", include={"model", "revision", "trust_remote_code", "task", "data"})
    files = {part: [str(path) for path in paths] for part, paths in plan.files.items()}
    return json.dumps([what, files, recipe.tokens.max_length, recipe.train.arguments], sort_keys=True)


def _make_home(home: SweepDir, undo: contextlib.ExitStack) -> None:
    missing = [folder for folder in (home.path, *home.path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True, mode=0o700 if folder == home.path else 0o777)
        undo.callback(_remove_empty, folder)
    if missing:
        undo.callback(lambda: (home.path / ".lock").unlink(missing_ok=True))


def _claim(draft: Draft, prepared: Mapping[str, Any], undo: contextlib.ExitStack, say: Say) -> SweepRecord:
    """Claim the cells that are not there, and publish them; `undo` takes it all back."""
    home, record = draft.home, draft.record
    scripts = {name: home.path / name for name in _SCRIPTS}
    for name, source in job_scripts().items():
        if not scripts[name].is_file():
            undo.callback(scripts[name].unlink, missing_ok=True)
            write_atomic(scripts[name], source.read_bytes())
    for folder in (home.runs, home.logs):
        if not folder.is_dir():
            folder.mkdir(mode=0o700)
            undo.callback(_remove_empty, folder)
    if record.search is not None:
        record = record.model_copy(update={"search": _search_record(draft, prepared[""])})
        if not home.trial_argv.is_file():
            undo.callback(home.trial_argv.unlink, missing_ok=True)
            write_atomic(
                home.trial_argv, b"".join(os.fsencode(word) + b"\0" for word in _trial_argv(home, record.plan))
            )
    for count, number in enumerate(draft.plans, start=1):
        cell, plan = record.cells[number], draft.plans[number]
        run = home.run(cell.name)
        if is_run_dir(run.path):
            if run.plan().digest != plan.digest:
                raise ClaimedError(f"{run.path}: is a run of another recipe", "choose another --sweep DIR")
            continue
        if run.path.exists() and not any(run.attempts.glob("*")):
            shutil.rmtree(run.path)  # its claiming was cut short: a plan is written last, and nothing ran without one
        jobs.claim(plan, run.path, prepared=prepared[_share(plan)], scripts=scripts)
        undo.callback(shutil.rmtree, run.path, ignore_errors=True)
        if count % 100 == 0:
            say(f"{count} of {len(draft.plans)} run directories made")
    if record != draft.before:
        undo.callback(_restore, home, draft.before)
        home.write(record)
    return record


def _search_record(draft: Draft, prepared: Mapping[str, Any]) -> SearchRecord:
    search = draft.record.search
    assert search is not None
    if draft.before is not None and draft.before.search is not None:
        return draft.before.search.model_copy(update={"trials": search.trials})
    metric = best_metric(draft.record, str(prepared["task"]))
    name = metric.partition("_")[2]
    plan = draft.record.plan
    return search.model_copy(
        update={
            "metric": metric,
            "direction": "minimize" if name in LOWER_IS_BETTER else "maximize",
            "prepared": dict(prepared),
            "worker_argv": tuple(node_argv(plan, _outside(draft.home, plan))),
        }
    )


def _trial_argv(home: SweepDir, plan: Plan) -> list[str]:
    """The command that makes the run directory of a trial; that directory is to be its last word."""
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


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


# -- submitting --------------------------------------------------------------------------------------------------------


def _arrays(
    draft: Draft, todo: Sequence[int], max_parallel: int | None, busy: int = 0
) -> Iterator[tuple[list[str], int, list[int]]]:
    """The command, the first cell and the tasks of each array: an array's numbers end at Slurm's MaxArraySize."""
    size = max_array_size() if todo else 1
    firsts = sorted({number // size * size for number in todo})
    for first in firsts:
        tasks = [number - first for number in todo if first <= number < first + size]
        # Slurm limits each array by itself: what runs already, and the other arrays, have their share.
        at_once = max(1, (max_parallel - min(busy, max_parallel)) // len(firsts)) if max_parallel else None
        plan = draft.plans[first + tasks[0]] if draft.plans else draft.record.plan
        yield array_argv(plan, draft.home.path, tasks, first=first, at_once=at_once), first, tasks


def _submit(
    draft: Draft, record: SweepRecord, max_parallel: int | None, undo: contextlib.ExitStack, say: Say
) -> list[str]:
    todo, counts = _todo(replace(draft, record=record))
    busy = sum(counts.get(state, 0) for state in _BUSY)
    submitted: list[str] = []
    for argv, first, tasks in _arrays(draft, todo, max_parallel, busy):
        plan = draft.plans[first + tasks[0]] if draft.plans else record.plan
        with _uninterrupted():
            job = submit_array(plan, argv)
            undo.pop_all()
            draft.home.append(job, first, tasks)
            for task in tasks:
                run = draft.home.run(record.cells[first + task].name)
                if is_run_dir(run.path):
                    run.append("submissions.jsonl", {"job_id": f"{job}_{task}", "via": "sbatch"})
        submitted.append(job)
    undo.pop_all()
    kept = f"{counts.get('FINISHED', 0)} finished, {busy} queued or running, " if draft.before else ""
    which = f" as job array {', '.join(submitted)}" if submitted else ""
    say(f"sweep {draft.home.path}: {len(draft.wanted)} runs: {kept}{len(todo)} submitted{which}")
    return submitted


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until what Slurm took is written down; outside the main thread it is not ours to hold."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


# -- running here ------------------------------------------------------------------------------------------------------


def _run_here(home: SweepDir, record: SweepRecord, wanted: Sequence[int], num_processes: int | None, say: Say) -> None:
    """One cell after another; ends at a stop (Ctrl-C) and at what would meet every cell (bad input, a full disk)."""
    states = _states(home, record.cells)
    say(f"sweep {home.path}: {len(wanted)} runs, {sum(states[number] == 'FINISHED' for number in wanted)} finished")
    for count, number in enumerate(wanted, start=1):
        cell = record.cells[number]
        if states[number] == "FINISHED":
            continue
        if states[number] in _BUSY:
            say(f"{cell.name}: is {states[number]} in Slurm, left alone")
            continue
        run = home.run(cell.name)
        if record.search is not None and not is_run_dir(run.path):
            _ask(home, record.plan, run)
        say(f"run {count} of {len(wanted)}: {cell.name}")
        outcome = jobs.resume(run.path, num_processes=num_processes).outcome
        if outcome is not None and outcome.outcome == "stopped":
            say("stopped; the same command goes on from here")
            return
        if outcome is not None and outcome.exit_code in (2, 3):
            kind = InputError if outcome.exit_code == 2 else EnvironmentProblem
            message, _, remedy = (outcome.error or "").partition("\n  remedy: ")
            raise kind(f"{cell.name}: {message}", remedy)


def _ask(home: SweepDir, plan: Plan, run: RunDir) -> None:
    """Make the run directory of a trial, as a job does it.

    Raises:
        AfinaError: as the worker said it.
    """
    words = [os.fsdecode(word) for word in home.trial_argv.read_bytes().split(b"\0")[:-1]]
    here = {**os.environ, **environment(plan.site)}
    done = subprocess.run(
        [*words, str(run.path)],
        env={**here, **worker_environment(plan, offline=True, env=here)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        said, _, remedy = done.stderr.strip().removeprefix("error: ").partition("\n  remedy: ")
        kind = InputError if done.returncode == 2 else EnvironmentProblem
        raise kind(said or f"the trial could not be made: exit code {done.returncode}", remedy or "see the lines above")
