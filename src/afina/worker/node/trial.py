"""Make the run directory of a search's next trial: `python -m afina.worker trial RUN_DIR`, with RUN_DIR `<sweep>/runs/<trial>`.

An array task calls it when it starts, in the image, where Optuna is: a node's host has only bash and Apptainer, and the values
are chosen when the earlier results are known, not on the login node before. Optuna keeps its study in a journal file in
the sweep directory (`JournalFileBackend` with the lock that is made by an exclusive open, which NFS 3 and newer honour); there is
no server. Results are reported here too: each call first reports the runs that have ended since, read from their run directories.
No process has to live to the end of a run for its value to count.

A run that was killed, stopped or requeued keeps its trial: it resumes from its checkpoint with the values it has. A trial whose
run failed by its settings is reported as failed; `afina sweep` then adds another in its place.

Seeded: the sampler (TPE) draws from the search's seed, the trial's number and how often it was asked for. With one trial at
a time a search is repeatable; with several it depends on which ends first. A trial that was pruned
(`afina.worker.survival.early_stop`) counts with the value that it had. Not covered: several objectives.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
import zlib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from afina.errors import InputError
from afina.recipe.parse import parse_recipe
from afina.run.allocation import Allocation
from afina.run.directory import PRUNING, RunDir, is_run_dir
from afina.run.new_run import claim
from afina.run.plan import geometry_for
from afina.sweeps.space import ChoiceList, Space, value_text
from afina.sweeps.sweep_dir import SCRIPTS, SearchRecord, SweepDir, SweepRecord, failed_for_good, record_of

__all__ = ["answer", "open_study", "take_trial", "report_ended"]

#: A trial that was asked for and has no run after this long was lost in between.
_LOST_AFTER = timedelta(minutes=15)


def answer(arguments: list[str]) -> dict[str, Any]:
    """The run directory, made if it is not there yet."""
    run = RunDir(arguments[0])
    if not is_run_dir(run.path):
        take_trial(SweepDir(run.path.parents[1]), run)
    return {"run": str(run.path)}


def take_trial(sweep: SweepDir, run: RunDir) -> None:
    """Report what has ended, ask for a trial, claim `run` with its values.

    Raises:
        InputError: no search, or values that make no run (a batch that does not divide): the trial is reported as failed.
    """
    record = sweep.read()
    if record is None or record.search is None:
        raise InputError(f"{sweep.path}: is not a search", "start one: afina sweep RECIPE --search …")
    search, name = record.search, run.path.name
    study = open_study(sweep, search, name)
    report_ended(study, sweep, search)
    # Asked for before, and then this process or its node died: the same values.
    mine = [t for t in _running(study) if t.user_attrs.get("cell") == name]
    if mine:
        number, values = mine[-1].number, mine[-1].params
    else:
        trial = study.ask(fixed_distributions=_distributions(search.space))
        trial.set_user_attr("cell", name)
        number, values = trial.number, trial.params
    overrides = [f"{key}={value_text(domain, values[key])}" for key, domain in search.space.items()]
    try:
        _claim(sweep, record, search, run, overrides)
    except InputError:
        _report(study, number, None)
        raise
    print(f"afina: {name} tries {' '.join(overrides)}", file=sys.stderr, flush=True)


def open_study(sweep: SweepDir, search: SearchRecord, cell: str = "") -> Any:
    """The study in the sweep's journal, created if needed; the sampler draws for `cell`."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = JournalFileOpenLock(str(sweep.journal))
    _repair(sweep.journal, lock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = JournalStorage(JournalFileBackend(str(sweep.journal), lock_obj=lock))
        sampler = optuna.samplers.TPESampler(seed=zlib.crc32(f"{search.seed} {cell}".encode()), constant_liar=True)
        return optuna.create_study(
            study_name="search", storage=storage, sampler=sampler, direction=search.direction, load_if_exists=True
        )


def report_ended(study: Any, sweep: SweepDir, search: SearchRecord) -> None:
    """Report to the study the value of each run that has finished, and the trials that failed."""
    for trial in _running(study):
        cell = trial.user_attrs.get("cell")
        if cell is None:
            if trial.datetime_start and datetime.now() - trial.datetime_start > _LOST_AFTER:
                _report(study, trial.number, None)
            continue
        run = sweep.run(cell)
        outcome = run.outcome()
        if outcome is not None and outcome.outcome == "finished":
            value = outcome.metrics.get(search.metric)
            usable = isinstance(value, int | float) and math.isfinite(value)
            _report(study, trial.number, float(value) if usable else None)  # type: ignore[arg-type]
        elif failed_for_good(run, outcome):
            _report(study, trial.number, None)


def _report(study: Any, number: int, value: float | None) -> None:
    """Report the value of a trial, or None for one that failed; another process may report it at the same moment."""
    import optuna

    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        state = optuna.trial.TrialState.FAIL if value is None else None
        study.tell(number, value, state=state, skip_if_finished=True)


def _running(study: Any) -> list[Any]:
    import optuna

    return list(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)))


def _repair(journal: Path, lock: Any) -> None:
    """Cut off a last line that is torn: a process that was killed while it wrote it, or a disk that was full.

    Optuna would join the next line to it, and then refuse the whole journal.
    """
    if not journal.exists():
        return
    lock.acquire()
    try:
        with journal.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            tail = min(size, 1 << 20)
            file.seek(size - tail)
            torn = tail - (file.read(tail).rfind(b"\n") + 1)
            if torn:
                file.truncate(size - torn)
    finally:
        lock.release()


def _distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, Any] = {}
    for key, domain in space.items():
        if isinstance(domain, ChoiceList):
            distributions[key] = CategoricalDistribution(domain.values)
        elif domain.whole:
            distributions[key] = IntDistribution(int(domain.low), int(domain.high), log=domain.log)
        else:
            distributions[key] = FloatDistribution(domain.low, domain.high, log=domain.log)
    return distributions


def _claim(sweep: SweepDir, record: SweepRecord, search: SearchRecord, run: RunDir, overrides: list[str]) -> None:
    base = record.plan
    recipe = parse_recipe(search.recipe_text, [*search.overrides, *overrides], source="recipe")
    recipe = recipe.model_copy(update={"resources": base.recipe.resources})
    geometry = geometry_for(recipe, base.geometry.processes_per_node, nodes=base.geometry.nodes)
    plan = base.model_copy(update={"recipe": recipe, "geometry": geometry})
    scripts = {name: sweep.path / name for name in (*SCRIPTS, *([PRUNING] if search.prune else []))}
    about = record_of(search.run_record, plan, overrides)
    claim(plan, search.prepared, search.worker_argv, search.recipe_text, run.path, scripts=scripts, record=about)
    allocation = Allocation.from_env()
    if allocation.array_job_id:
        run.append("submissions.jsonl", {"job_id": allocation.job, "via": "sbatch"})
