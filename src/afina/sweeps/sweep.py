"""Sweeps from Python: one recipe, many runs; a job array, or one after another here. The same call again adds what is missing.

    afina.sweep("recipe.yaml", grid={"train.learning_rate": [1e-5, 3e-5, 5e-5]}, seeds=5).wait()

Every cell is an ordinary run directory, claimed before anything is submitted, and all share the prepared data. Finished
cells stay, queued and running ones are left alone, those that failed, stopped or were lost resume from their newest
checkpoint. A search (`search=…`) claims nothing ahead: each array task asks Optuna for values when it starts, in the image
(`afina.worker.node.trial`), and Optuna reads the earlier results from the run directories.

Not covered: one limit on parallel runs over several arrays (a second array of the same sweep gets what the first one leaves,
at least one).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina import api
from afina.errors import AfinaError, ClaimedError, InputError, SlurmError, WaitTimeout, check_argument
from afina.files import read_json, read_words
from afina.formats.columns import value_at
from afina.recipe.schema import Recipe
from afina.run.commands import host_environment
from afina.run.directory import RunDir, is_run_dir, task_of
from afina.run.job_request import JobOptions, JobRequest, accepts
from afina.run.outcome import Outcome, data_warnings
from afina.run.plan import Plan
from afina.run.provenance.split_looks import look_at_test
from afina.run.workers import ask_worker
from afina.slurm.client import AMBIGUOUS, SUBMIT_LIMIT, need_command, need_slurm
from afina.slurm.job_limits import check_possible
from afina.slurm.submit import forget, recover, submitted
from afina.statistics.points import Row
from afina.statistics.predictions import read_predictions
from afina.statistics.weakness import weaknesses
from afina.sweeps.claim import Say, claim_cells, make_home, prepare_cells
from afina.sweeps.draft import BUSY, Draft, SweepRequest, arrays, cell_states, draft_sweep, todo
from afina.sweeps.grid import grid_of
from afina.sweeps.out_of_fold import write_doubtful, write_out_of_fold
from afina.sweeps.space import space_of
from afina.sweeps.sweep_dir import SearchRecord, SweepDir, SweepRecord
from afina.sweeps.table import Table, best_metric, tabulate
from afina.text import plural
from afina.watch.find import resolve_folder
from afina.watch.handle import Run, Runs
from afina.watch.overview import State

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Sweep", "SweepOptions", "carry_out", "sweep", "sweep_named"]


class Sweep:
    """A handle on a sweep directory, or on the sweep of that short name.

    Attributes:
        submitted: the job arrays that the call which made this handle has submitted.
    """

    def __init__(self, path: str | Path, submitted: Sequence[str] = ()) -> None:
        self.dir = SweepDir(resolve_folder(path))
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
        record = self.dir.read()
        assert record is not None
        return record

    @property
    def runs(self) -> Runs:
        """The runs that have been claimed, in the order of the cells."""
        paths = [self.dir.runs / cell.name for cell in self.record.cells]
        return Runs(Run(path) for path in paths if is_run_dir(path))

    def states(self) -> dict[str, State]:
        """The state of every cell by its name, with one call of squeue for all of them."""
        cells = self.record.cells
        return dict(zip((cell.name for cell in cells), cell_states(self.dir, cells), strict=True))

    def wait(self, timeout_s: float | None = None, *, tell: Callable[[Mapping[str, int]], None] | None = None) -> None:
        """Block until no cell is queued or running.

        Args:
            tell: is called with the number of cells in each state, after every query.

        Raises:
            WaitTimeout: after `timeout_s` seconds; it is a TimeoutError too.
            SlurmError: a job is waited for where there is no squeue.
        """
        check_argument("timeout_s", timeout_s, (int, float), "a number of seconds", least=0)
        began, pause, checked_again = time.monotonic(), 0.5, False
        while True:
            states = list(self.states().values())
            if tell is not None:
                tell({state: states.count(state) for state in dict.fromkeys(states)})
            if "UNKNOWN" in states:
                need_command("squeue")
            busy = any(state in (*BUSY, "UNKNOWN") for state in states)
            if not busy and checked_again:
                return
            # A shared file system may show the last outcomes a little later.
            checked_again = not busy
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise WaitTimeout(
                    f"{self.path}: still running after {timeout_s:g} s", "wait longer, or see Sweep.states()"
                )
            time.sleep(2.0 if not busy else pause)
            pause = min(15.0, pause * 1.3)

    def table(self, metric: str | None = None) -> Table:
        """Mean, interval and comparison of the points; `str()` of it is a table. `metric` is another one of the recipe's."""
        record = self.record
        runs = [self.dir.run(cell.name) for cell in record.cells]
        states = cell_states(self.dir, record.cells)
        outcomes = [run.outcome() for run in runs]
        tried = [_tried(run, record.search) if record.search else {} for run in runs]
        chosen = best_metric(record, next((outcome.task for outcome in outcomes if outcome), None))
        weak = [_weakness(run, outcome, chosen) for run, outcome in zip(runs, outcomes, strict=True)]
        table = tabulate(record, outcomes, states, sweep=str(self.path), metric=metric, tried=tried, weak=weak)
        if table.shown:
            looks = look_at_test([run.path for run in runs if is_run_dir(run.path)], "sweep", table.shown)
            table = replace(table, notes=(*table.notes, looks))
        if record.folds and all(state == "FINISHED" for state in states):
            where = write_out_of_fold(self.dir, record)
            doubtful, older = write_doubtful(self.dir)
            notes = (*table.notes, f"Every row as it was predicted out of fold: {where}")
            useless = any(row.weak for row in table.rows)
            what = (
                "Labels that models of no use doubt, which says little"
                if useless
                else "Labels that are probably wrong, to be corrected"
            )
            notes += (f"{what}: {self.dir.doubtful}",) if doubtful else ()
            notes += (f"The runs have changed; the file of before is kept: {older}",) if older else ()
            table = replace(table, notes=notes, doubtful=tuple(doubtful))
        splits = {column.partition("_")[0] for column in (table.metric, table.shown) if column}
        return replace(table, notes=(*table.notes, *_about_data(runs, splits)))

    def best(self, metric: str | None = None) -> Row:
        """The best point, or trial.

        Raises:
            InputError: no run has finished yet or has a value, or all models are of no use.
        """
        table = self.table(metric)
        if table.best is None and any("FINISHED" in row.states for row in table.rows):
            raise InputError(f"{self.path}: {table.notes[0]}", "examine the data and the learning rate first")
        if table.best is None:
            raise InputError(f"{self.path}: no run has finished yet", "wait for it: Sweep.wait()")
        return table.best


class SweepOptions(JobOptions, total=False):
    """Keywords of `afina.sweep`; see `SweepRequest` and `JobRequest`."""

    grid: Mapping[str, Sequence[Any]] | None
    seeds: int | str | Sequence[int] | None
    search: Mapping[str, str | Sequence[Any]] | None
    trials: int
    search_seed: int
    prune: bool
    folds: int | None
    repeats: int
    directory: str | Path | None
    max_parallel: int | None
    local: bool
    num_processes: int | None


@accepts(SweepOptions, SweepRequest, JobRequest)
def sweep(recipe: str | Path | Recipe, **options: Unpack[SweepOptions]) -> Sweep:
    """Run a recipe over a grid of values and seeds, or over folds, or let Optuna choose; the same call again continues the sweep.

    Submits one job array and returns at once; with `local` trains here, one run after another, and returns when they have ended.

    Args:
        grid: the values of each key, `{"train.learning_rate": [1e-5, 3e-5]}`.
        seeds: so many from the recipe's own on, or these.
        search: what Optuna may choose from, `{"train.learning_rate": "1e-6..1e-4:log", "tokens.batching": ["packed", "grouped"]}`.
        trials: how many trials of a search shall succeed.
        search_seed: of the search's random numbers.
        prune: end a trial whose best value is below the median of the finished trials at the same epoch.
        folds: cross-validation: one run for each fold; every row is predicted by a model that was not trained on it.
        repeats: how often the rows are divided into folds.
        directory: the sweep directory; by default `$AFINA_SCRATCH/sweeps/<name>-<digest8>`.
        max_parallel: how many runs at the same time.
        local: train here, without Slurm.
        overrides, site, nodes, gpus_per_node, time_min, num_processes: of each run, see `JobRequest`.

    Raises:
        AfinaError: what would have failed in the queue is refused here; a new sweep then leaves nothing behind.
    """
    values: dict[str, Any] = dict(options)
    job = JobRequest(**{f.name: values.pop(f.name) for f in fields(JobRequest) if f.name in values})
    for name in ("grid", "search"):
        check_argument(name, values.get(name), (Mapping,), 'a mapping such as {"train.learning_rate": [1e-5, 3e-5]}')
    for name, least in (("trials", 1), ("search_seed", 0), ("max_parallel", 1), ("folds", 2), ("repeats", 1)):
        check_argument(name, values.get(name), (int,), "a whole number", least=least)
    check_argument("seeds", values.get("seeds"), (int, str, list, tuple), "a number of seeds, or a list of seeds")
    check_argument("directory", values.get("directory"), (str, Path), "a path")
    search = values.pop("search", None)
    space = space_of(search, job.overrides) if search is not None else None
    request = SweepRequest(**{**values, "grid": grid_of(values.get("grid") or {})}, search=space, job=job)
    return carry_out(draft_sweep(recipe, request))


def sweep_named(name: str | Path) -> Sweep | None:
    """The sweep of that folder or short name; None if it is a recipe, or does not exist."""
    if Path(name).is_file():
        return None
    with contextlib.suppress(InputError):
        return Sweep(name)
    return None


def carry_out(draft: Draft, say: Say = lambda line: print(f"afina: {line}", flush=True)) -> Sweep:
    """Prepare, claim, and submit or run what is missing.

    Raises:
        AfinaError: a new sweep leaves nothing behind, an old one is as it was before.
    """
    if not draft.request.local:
        need_slurm()
        check_possible(draft.record.plan)  # resources are the same in all cells
    prepared = prepare_cells(draft, say)
    with contextlib.ExitStack() as undo:
        make_home(draft.home, undo)
        with draft.home.lock():
            if draft.home.read() != draft.before:
                raise ClaimedError(f"{draft.home.path}: was changed by another `afina sweep`", "try it again")
            record = claim_cells(draft, prepared, undo, say)
            if draft.request.local:
                undo.pop_all()
                _run_here(draft, record, say)
                return Sweep(draft.home.path)
            submitted = _submit(draft, record, undo, say)
    return Sweep(draft.home.path, submitted)


def _tried(run: RunDir, search: SearchRecord) -> dict[str, str]:
    """The values of a trial, from its plan."""
    if not is_run_dir(run.path):
        return {}
    recipe = run.plan().recipe.model_dump(mode="json")
    values = {key: value_at(recipe, key) for key in search.space}
    return {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in values.items()}


def _about_data(runs: Sequence[RunDir], splits: Collection[str]) -> list[str]:
    """Warnings about the data that spoil the numbers of these splits, once for all runs."""
    warnings = (data_warnings(read_json(run.path / "prepared.json")).items() for run in runs)
    lines = (line for each in warnings for split, lines in each if split in splits for line in lines)
    return list(dict.fromkeys(f"Warning: {line}" for line in lines))


def _weakness(run: RunDir, outcome: Outcome | None, metric: str) -> str | None:
    """Why the model of a finished run is of no use; None if it is, or its predictions are gone."""
    if outcome is None or outcome.outcome != "finished" or not run.predictions.is_file():
        return None
    with contextlib.suppress(AfinaError):
        return next(
            iter(weaknesses(read_predictions(run.predictions, texts=False), metric.removeprefix("eval_"))), None
        )
    return None


def _submit(draft: Draft, record: SweepRecord, undo: contextlib.ExitStack, say: Say) -> list[str]:
    home = draft.home
    if (recovered := recover(home.path)) is not None:
        _record_array(home, record, recovered[0], **recovered[1])
        forget(home.path)
    missing, counts = todo(replace(draft, record=record))
    busy = sum(counts.get(state, 0) for state in BUSY)
    job_ids: list[str] = []
    portions = list(arrays(draft, missing, busy))
    while portions:
        part = portions.pop(0)
        try:
            record_of_part = {"first": part.first, "tasks": part.tasks}
            with submitted(part.plan, part.argv, {home.path: record_of_part}) as job:
                undo.pop_all()
                _record_array(home, record, job, part.first, part.tasks)
        except SlurmError as error:
            if error.cause == AMBIGUOUS:
                undo.pop_all()
            if error.cause != SUBMIT_LIMIT or (len(part.tasks) == 1 and not job_ids):
                raise
            if len(part.tasks) == 1:
                unsubmitted = 1 + sum(len(later.tasks) for later in portions)
                say(
                    f"{error.message}: {plural(unsubmitted, 'run is', 'runs are')} left; repeat the command when some of your jobs have ended"
                )
                missing = missing[: len(missing) - unsubmitted]
                break
            portions = [*part.halves(), *portions]  # as many as the limit lets in
            continue
        job_ids.append(job)
    undo.pop_all()
    kept = f"{counts.get('FINISHED', 0)} finished, {busy} queued or running, " if draft.before else ""
    which = f" as job array {', '.join(job_ids)}" if job_ids else ""
    say(f"sweep {draft.home.path}: {plural(len(draft.wanted), 'run')}: {kept}{len(missing)} submitted{which}")
    return job_ids


def _record_array(home: SweepDir, record: SweepRecord, job: str, first: int, tasks: list[int]) -> None:
    """Record that array `job` was submitted, in the sweep and in its runs: its task n is cell `first + n`."""
    home.append(job, first, tasks)
    for task in tasks:
        run = home.run(record.cells[first + task].name)
        if is_run_dir(run.path):
            log = home.logs / f"{job.partition(';')[0]}_{task}.out"
            run.append("submissions.jsonl", {"job_id": task_of(job, task), "via": "sbatch", "log": str(log)})


# -- running here ------------------------------------------------------------------------------------------------------


def _run_here(draft: Draft, record: SweepRecord, say: Say) -> None:
    """Train one cell after another, until a stop (Ctrl-C) or a failure that every cell would have (bad input, a full disk)."""
    home, wanted = draft.home, draft.wanted
    states = cell_states(home, record.cells)
    say(
        f"sweep {home.path}: {plural(len(wanted), 'run')}, {sum(states[number] == 'FINISHED' for number in wanted)} finished"
    )
    for count, number in enumerate(wanted, start=1):
        cell = record.cells[number]
        if states[number] == "FINISHED":
            continue
        if states[number] in BUSY:
            say(f"{cell.name}: is {states[number]} elsewhere, left alone")
            continue
        run = home.run(cell.name)
        if record.search is not None and not is_run_dir(run.path):
            _make_trial(home, record.plan, run)
        say(f"run {count} of {len(wanted)}: {cell.name}")
        outcome = api.resume_here(run.path, num_processes=draft.request.job.num_processes).outcome
        if outcome is not None and outcome.outcome == "stopped":
            say("stopped; the same command continues from here")
            return
        if outcome is not None and outcome.failure is not None and outcome.exit_code in (2, 3):
            raise outcome.failure.error().about(cell.name)


def _make_trial(home: SweepDir, plan: Plan, run: RunDir) -> None:
    """Make the run directory of a trial, as a job does it.

    Raises:
        AfinaError: the worker's.
    """
    words = read_words(home.trial_argv)
    ask_worker([*words, str(run.path)], host_environment(plan, offline=True), name="the next trial")
