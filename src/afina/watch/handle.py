"""Handles on runs for Python and notebooks: state, metrics, logs, result.

afina.runs().table()
afina.submit("recipe.yaml").result().metrics
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from afina.errors import AfinaError, Cancelled, EnvironmentProblem, Failed, InputError, Stopped, check_argument
from afina.files import read_json
from afina.run.directory import RunDir, is_run_dir
from afina.run.job_request import JobRequest, Via
from afina.run.outcome import ANOTHER_RUN, Outcome
from afina.run.plan import check_cores, geometry_for
from afina.run.supervise import start_in_background
from afina.site.image import check_image
from afina.site.settings import environment
from afina.slurm.client import need_slurm
from afina.slurm.job_limits import check_possible
from afina.slurm.submit import check_not_queued, submit_sbatch, uninterrupted
from afina.slurm.submitit_job import submit_submitit
from afina.watch.cancel import Cancellation, cancel_runs
from afina.watch.find import find_runs, known_runs, resolve_folder
from afina.watch.logs import LogSelection, log_lines
from afina.watch.logs import follow as follow_log
from afina.watch.overview import RunSummary, State, summarise, summary_of
from afina.watch.reading import read_result
from afina.watch.wait import OPEN, wait_for, wait_until_ended

if TYPE_CHECKING:
    import pandas
    from typing_extensions import Unpack

__all__ = ["LogOptions", "Run", "Runs", "as_completed", "run_named", "runs", "wait"]


class LogOptions(TypedDict, total=False):
    """Which log; see `LogSelection`."""

    attempt: str | None
    node: int | None
    rank: int | None


class Run:
    """A run, by its directory or its short name. It keeps no state: everything is read from the run directory and from squeue."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        place = resolve_folder(path)
        if not is_run_dir(place):
            raise InputError(
                f"{path}: not a run directory", "give the folder that `afina train` or `afina submit` named"
            )
        self.dir = RunDir(place)

    def __repr__(self) -> str:
        return f"Run({str(self.dir.path)!r})"

    def __fspath__(self) -> str:
        return str(self.dir.path)

    @property
    def path(self) -> Path:
        return self.dir.path

    @property
    def job_id(self) -> str | None:
        """Its newest Slurm job; None where it was never in a queue."""
        return next(reversed(self.dir.job_ids()), None)

    @property
    def outcome(self) -> Outcome | None:
        return self.dir.outcome()

    @property
    def state(self) -> State:
        """PLANNED, PENDING, RUNNING, FINISHED, STOPPED, FAILED; UNKNOWN where Slurm does not answer."""
        return self.summary.state

    @property
    def summary(self) -> RunSummary:
        """State, step, loss, best metric, speed, time left and why it waits; queries Slurm if necessary."""
        return summary_of(self.path)

    def done(self) -> bool:
        """True where it is neither queued nor running."""
        return self.state not in OPEN

    def wait(self, timeout: float | None = None, *, timeout_s: float | None = None) -> State:
        """Block until the run is neither queued nor running; returns its state.

        Works without accounting: it reads the run directory, and asks squeue whether the job still exists.

        Args:
            timeout: seconds; `timeout_s` is its former name.

        Raises:
            WaitTimeout: after that time; it is a TimeoutError too.
        """
        return wait_for([self.path], timeout if timeout is not None else timeout_s)[self.path].state

    def result(self, timeout: float | None = None, *, timeout_s: float | None = None) -> Outcome:
        """Wait, and return the outcome of a finished run.

        Raises:
            Failed, Stopped, Cancelled: it did not finish; with the recorded cause and what to do.
            InputError: it was never submitted.
            WaitTimeout: as `wait`.
        """
        state = self.wait(timeout if timeout is not None else timeout_s)
        outcome = self.outcome
        if state == "FINISHED" and outcome is not None:
            return outcome
        raise self._error(self.summary, outcome)

    def exception(self, timeout: float | None = None) -> AfinaError | None:
        """Wait, and return what `result` would raise; None of a finished run.

        Raises:
            WaitTimeout: as `wait`.
        """
        self.wait(timeout)
        try:
            self.result()
        except AfinaError as error:
            return error
        return None

    def __await__(self) -> Generator[Any, None, Outcome]:
        """`await run` is `run.result()`; the event loop goes on meanwhile."""
        return self._awaited().__await__()

    async def _awaited(self) -> Outcome:
        await wait_until_ended(self.path)
        return self.result()

    def _error(self, summary: RunSummary, outcome: Outcome | None) -> AfinaError:
        """The exception of a run that has not finished."""
        path = shlex.quote(str(self.path))
        if summary.state == "PLANNED":
            return InputError(f"{self.path}: was never submitted", f"run.submit(), or: afina submit {path}")
        again = f"run.submit(), or `afina {'submit' if self.job_id else 'resume'} {path}`, continues from the newest checkpoint"
        failure = outcome.failure if outcome else None
        why = failure.message if failure else summary.why or "no outcome was recorded"
        message = f"{self.path}: {summary.state}: {why}"
        if summary.state == "STOPPED":
            cause = (outcome.cause if outcome else None) or ""
            cancelled = cause == "asked" or "cancelled" in (summary.why or "")
            return (Cancelled if cancelled else Stopped)(message, again, cause=cause)
        remedy = failure.remedy if failure else ""
        if not remedy or outcome is None or outcome.cause not in ANOTHER_RUN:
            repeats = outcome is not None and outcome.fails_again
            remedy = "; ".join(filter(None, [remedy, f"then {again}" if repeats or remedy else again]))
        error = Failed(message, remedy, cause=failure.cause if failure else "")
        error.exit_code = outcome.exit_code if outcome else error.exit_code
        return error

    def variables_here(self, num_processes: int | None = None) -> dict[str, str]:
        """The environment of an attempt on this machine, beside this process's.

        Raises:
            InputError: the run was moved, its checkpoints are gone, or its plan is for several nodes.
        """
        plan = self.dir.plan()
        self.dir.check_place()
        self.dir.check_progress()
        check_image(plan.site, resumed=True)
        if num_processes is not None:
            check_cores(num_processes)
            geometry_for(plan.recipe, num_processes, nodes=1)
        elif plan.geometry.nodes > 1:
            raise InputError(
                f"{self.path}: was planned for {plan.geometry.nodes} nodes",
                "continue it on the cluster with `afina submit DIR`, or here with --num-processes N",
            )
        processes = {"AFINA_PROCESSES": str(num_processes)} if num_processes else {}
        return {**environment(plan.site), "AFINA_LAUNCH": "local", **processes}

    def submit(self, *, time_min: int | None = None, via: Via = "submitit", num_processes: int | None = None) -> Run:
        """Submit it again: the job continues from the newest checkpoint.

        Args:
            time_min: another time limit for this job, in minutes.
            via: `local` continues it on this machine, in the background, with `num_processes`.

        Raises:
            InputError: it has finished, or a job of it is queued or running.
            SlurmError: Slurm refused, or does not answer.
        """
        request = JobRequest(time_min=time_min, via=via, num_processes=num_processes)
        request.check_via()
        if via != "local":
            need_slurm()
        if (state := self.state) in ("PENDING", "RUNNING", "FINISHED"):
            remedy = self.dir.how_to_train_on() if state == "FINISHED" else "nothing to submit"
            raise InputError(f"{self.path}: this run is {state}", remedy)
        check_not_queued(self.dir)
        if via == "local":
            with uninterrupted():
                start_in_background(self.dir, self.variables_here(num_processes))
            return self
        plan = self.dir.plan().with_time(request.time_min)
        self.dir.check_place()
        self.dir.check_progress()
        check_image(plan.site, resumed=True)
        check_possible(plan)
        (submit_sbatch if request.via == "sbatch" else submit_submitit)(plan, self.dir)
        return self

    def records(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`: `step`, `epoch` and either `loss` and `learning_rate`, or `eval_*`."""
        return self.dir.metrics()

    def metrics(self) -> pandas.DataFrame:
        """The records as a pandas DataFrame: one row a step, one column a number; NaN where a step has none.

        Lists (`eval_f1_per_class`, …) are left to `records`.

        Raises:
            EnvironmentProblem: pandas is not installed.
        """
        rows: dict[int, dict[str, Any]] = {}
        for record in self.records():
            row = rows.setdefault(int(record["step"]), {})
            row.update({name: value for name, value in record.items() if not isinstance(value, list | dict)})
        return _pandas().DataFrame(list(rows.values())).set_index("step") if rows else _pandas().DataFrame()

    @overload
    def log(self, *, follow: Literal[True], last: int | None = None, **which: Unpack[LogOptions]) -> Iterator[str]: ...
    @overload
    def log(self, *, follow: Literal[False] = False, last: int | None = None, **which: Unpack[LogOptions]) -> str: ...
    def log(self, *, follow: bool = False, last: int | None = None, **which: Unpack[LogOptions]) -> str | Iterator[str]:
        """The log of an attempt, by default the newest, of node 0; `last` lines of it, or all.

        Args:
            follow: return an iterator: the lines, then new ones as they come, through later attempts, until the run has ended.
            which: `attempt`, `node`, `rank`.

        Raises:
            InputError: no such attempt, node or rank; or nothing was logged yet.
        """
        lines = (follow_log if follow else log_lines)(self.dir, LogSelection(**which), last)
        return lines if follow else "".join(lines)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the data and the scores, such as texts that are in two splits; known once the data is prepared."""
        return read_result(self.path).warnings

    @property
    def model_path(self) -> Path:
        """The folder of the trained model, for the next step.

        Raises:
            InputError: it is not there yet.
        """
        if self.outcome is None or not self.dir.model.is_dir():
            raise InputError(f"{self.path}: has no model yet: it is {self.state}", "wait for it: run.result()")
        return Path(self.dir.model)

    def cancel(self) -> Cancellation:
        """Cancel its jobs, or ask it to stop where it trains outside of Slurm; returns what was done.

        Raises:
            SlurmError: Slurm does not answer, or refused.
        """
        return cancel_runs([self.path])[0]

    @property
    def estimate(self) -> dict[str, Any] | None:
        """The forecast at submission, `estimate.json`; None if there was none."""
        return read_json(self.path / "estimate.json") or None

    def _repr_html_(self) -> str:
        return _html([self.summary])


class Runs(list[Run]):
    """Several runs, from handles, paths or short names; a notebook shows them as a table."""

    def __init__(self, runs: Iterable[Run | str | os.PathLike[str]] = ()) -> None:
        if isinstance(runs, str | bytes | Mapping | os.PathLike) or not isinstance(runs, Iterable):
            raise InputError(f"runs: must be a list of runs; found {runs!r}", "for example afina.wait([run])")
        super().__init__(run if isinstance(run, Run) else Run(run) for run in runs)

    def wait(self, timeout: float | None = None) -> list[State]:
        """Wait for all of them, with one query of Slurm at a time; returns their states.

        Raises:
            WaitTimeout: after `timeout` seconds.
        """
        ended = wait_for([run.path for run in self], timeout)
        return [ended[run.path].state for run in self]

    def cancel(self) -> list[Cancellation]:
        """Cancel the jobs of all, with one query of Slurm and one scancel.

        Raises:
            SlurmError: Slurm does not answer, or refused.
        """
        return cancel_runs([run.path for run in self])

    def summaries(self) -> list[RunSummary]:
        """The summary of each, with one query of Slurm for all."""
        return summarise([run.path for run in self])

    def table(self) -> pandas.DataFrame:
        """The summaries as a pandas DataFrame, one row a run.

        Raises:
            EnvironmentProblem: pandas is not installed.
        """
        rows = [{k: v for k, v in s.to_dict().items() if k not in ("metrics", "sync")} for s in self.summaries()]
        return _pandas().DataFrame(rows)

    def _repr_html_(self) -> str:
        return _html(self.summaries())


def runs(path: str | Path | None = None) -> Runs:
    """The runs below a folder (a sweep's, a folder of runs, one run directory), by default all of yours on scratch.

    Raises:
        InputError: no such folder, or no run in it.
        SiteError: no folder given, and scratch is not known.
    """
    return Runs(known_runs() if path is None else find_runs([path]))


def wait(runs: Iterable[Run | str | os.PathLike[str]], timeout: float | None = None) -> Runs:
    """Wait until none of the runs is queued or running; returns them. However many there are, Slurm is asked once at a time.

    Raises:
        WaitTimeout: after `timeout` seconds.
    """
    waiting = Runs(runs)
    waiting.wait(timeout)
    return waiting


def as_completed(runs: Iterable[Run | str | os.PathLike[str]], timeout: float | None = None) -> Iterator[Run]:
    """The runs, each when it is neither queued nor running any more; `result()` then returns or raises at once.

    Raises:
        WaitTimeout: after `timeout` seconds.
    """
    left = {run.path: run for run in Runs(runs)}
    check_argument("timeout", timeout, (int, float), "a number of seconds", least=0)
    end = None if timeout is None else time.monotonic() + timeout
    while left:
        for path in wait_for(list(left), None if end is None else max(0.0, end - time.monotonic()), first=True):
            yield left.pop(path)


def run_named(recipe: object) -> Run | None:
    """The run with this directory or short name; None for a recipe, and where there is no such run."""
    if isinstance(recipe, Run):
        return recipe
    if not isinstance(recipe, str | Path) or (Path(recipe).exists() and not is_run_dir(recipe)):
        return None
    with contextlib.suppress(InputError):
        return Run(recipe)
    return None


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise EnvironmentProblem(
            "pandas is not installed here",
            f"{shlex.quote(sys.executable)} -m pip install pandas; or use Run.records(), which needs nothing",
        ) from None
    return pandas


_SHOWN = ("state", "step", "max_steps", "epoch", "loss", "best_value", "tokens_per_s", "attempts", "job_id", "why")


def _html(summaries: Sequence[RunSummary]) -> str:
    """A table without styles or scripts."""
    heads = "".join(f'<th scope="col">{escape(name.replace("_", " "))}</th>' for name in _SHOWN)
    rows = "".join(
        f'<tr><th scope="row" title="{escape(str(s.run))}">{escape(s.run.name)}</th>'
        + "".join(f"<td>{_cell(getattr(s, name))}</td>" for name in _SHOWN)
        + "</tr>"
        for s in summaries
    )
    return f'<table><thead><tr><th scope="col">run</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else escape(str(value))
