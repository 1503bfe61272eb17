"""Handles on runs for Python and notebooks: state, metrics, logs, result.

afina.runs().table()
afina.submit("recipe.yaml").result().metrics
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.errors import EnvironmentProblem, InputError, TrainingError
from afina.files import read_json
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir, is_run_dir
from afina.run.outcome import Outcome
from afina.watch.cancel import Cancelled, cancel_runs
from afina.watch.find import find_runs, known_runs, resolve_folder
from afina.watch.logs import LogSelection, log_lines
from afina.watch.overview import RunSummary, State, summarise, summary_of

if TYPE_CHECKING:
    import pandas

__all__ = ["Run", "Runs", "run_named", "runs"]


class Run:
    """A run, by its directory or its short name. It keeps no state: everything is read from the run directory and from squeue."""

    def __init__(self, path: str | Path) -> None:
        place = resolve_folder(path)
        if not is_run_dir(place):
            raise InputError(
                f"{path}: not a run directory", "give the folder that `afina train` or `afina submit` named"
            )
        self.dir = RunDir(place)

    def __repr__(self) -> str:
        return f"Run({str(self.dir.path)!r})"

    @property
    def path(self) -> Path:
        return self.dir.path

    @property
    def job_id(self) -> str | None:
        """The last Slurm job that was submitted for it."""
        ids = [str(s["job_id"]) for s in self.dir.lines("submissions.jsonl")]
        return ids[-1] if ids else None

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

    def wait(self, timeout_s: float | None = None) -> State:
        """Block until the run is neither queued nor running; returns its state.

        Works without accounting: it reads the run directory, and asks squeue whether the job still exists.

        Raises:
            TimeoutError: after `timeout_s` seconds.
        """
        began, pause = time.monotonic(), 0.5
        while True:
            state = self.state
            if state not in ("PENDING", "RUNNING", "UNKNOWN"):
                if state != "FAILED" or self.outcome is not None:
                    return state
                # Gone from the queue without an outcome: a shared file system may show the file a little later.
                time.sleep(5)
                return self.state
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise TimeoutError(f"{self.path}: still {state} after {timeout_s:g} s")
            time.sleep(pause)
            pause = min(15.0, pause * 1.3)

    def result(self, timeout_s: float | None = None) -> Outcome:
        """Wait, and return the outcome of a finished run.

        Raises:
            TrainingError: the run stopped or failed; with the recorded cause.
        """
        state = self.wait(timeout_s)
        outcome = self.outcome
        if state == "FINISHED" and outcome is not None:
            return outcome
        if state == "PLANNED":
            raise InputError(f"{self.path}: was never submitted", f"afina submit '{self.path}'")
        failure = outcome.failure if outcome else None
        why = failure.message if failure else "its job left the queue without an outcome"
        resume = f"`afina resume '{self.path}'` continues from the newest checkpoint"
        raise TrainingError(
            f"{self.path}: {state}: {why}",
            f"{failure.remedy}; {resume}" if failure and failure.remedy else resume,
            cause=failure.cause if failure else "",
        )

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

    def log(
        self, *, attempt: str | None = None, node: int | None = None, rank: int | None = None, last: int | None = None
    ) -> str:
        """The log of an attempt, by default the newest, of node 0; `last` lines of it, or all.

        Raises:
            InputError: no such attempt, node or rank; or nothing was logged yet.
        """
        return "".join(log_lines(self.dir, LogSelection(attempt, node, rank), last))

    def cancel(self) -> Cancelled:
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
    """Several runs; a notebook shows them as a table."""

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
    return Runs(Run(found) for found in (known_runs() if path is None else find_runs([path])))


def run_named(recipe: str | Path | Recipe) -> Run | None:
    """The run with this directory or short name; None for a recipe, and where there is no such run."""
    if isinstance(recipe, Recipe) or (Path(recipe).exists() and not is_run_dir(recipe)):
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
