"""The sweep directory as a type. Each run of a sweep is an ordinary run directory in it.

    sweep.json                    recipe, grid and seeds (or the space of a search), and the cells in order
    cells                         the folder of each cell below runs/, NUL-separated, for bash; its n-th is array task n
    runs/<cell>/                  the run directories
    submissions.jsonl             the job arrays and which cells they are of
    finetune.sbatch job.sh node.sh   what the jobs run; its copies go into every run directory
    logs/<array>_<task>.out       the output of a task's batch script
    out_of_fold.parquet           of folds: each row as the model predicted it that was not trained on it, once for each repeat
    doubtful_labels.csv           those whose label is probably wrong, to be corrected
    trial.argv  journal.log       of a search: the command that asks for a trial, and Optuna's journal
    pruning.json                  of a search that prunes: the metric; every run directory gets a copy

Cells are only added, at the end: a task that waits in the queue keeps its number. `sweep.json` is
written last when a sweep is made or grows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from afina.errors import ClaimedError, EnvironmentProblem, InputError
from afina.files import encode_words, write_atomic
from afina.formats.columns import flatten
from afina.frozen import FrozenModel
from afina.recipe.keys.train_keys import AS_RECORDED
from afina.run.directory import PRUNING, RunDir, is_run_dir, task_of
from afina.run.outcome import Outcome
from afina.run.plan import Plan
from afina.sweeps.space import Space
from afina.version import __version__

__all__ = [
    "SCRIPTS",
    "CellRecord",
    "SearchRecord",
    "SweepDir",
    "SweepRecord",
    "differences",
    "failed_for_good",
    "record_of",
]

#: What the jobs of a sweep run; every run directory gets a copy.
SCRIPTS = ("finetune.sbatch", "job.sh", "node.sh")
#: What an interrupted `afina sweep` may leave in a sweep directory.
_OURS = {".lock", "cells", "intent.json", "logs", "runs", "trial.argv", PRUNING, *SCRIPTS}


class CellRecord(FrozenModel):
    """One cell: its folder, its point of the grid, its seed, what `--set` it is, the digest of its plan, and the number of its fold.

    The cells of a search have a name only: the values of a trial are in its run directory once it has started.
    """

    name: str
    point: str = ""
    seed: int | None = None
    overrides: tuple[str, ...] = ()
    digest: str | None = None
    fold: int | None = None


class SearchRecord(FrozenModel):
    """A search in a job: the space, and everything that a run directory is made from (`run_record`: its record.json)."""

    space: Space
    trials: int
    seed: int
    metric: str
    direction: Literal["maximize", "minimize"]
    recipe_text: str
    overrides: tuple[str, ...]
    prepared: dict[str, Any]
    run_record: dict[str, Any]
    worker_argv: tuple[str, ...]
    prune: bool = False


class SweepRecord(FrozenModel):
    """`sweep.json`. `plan` is that of the recipe without a cell's values."""

    afina_version: str = __version__
    plan: Plan
    grid: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    cells: tuple[CellRecord, ...] = ()
    search: SearchRecord | None = None
    folds: int | None = None
    repeats: int = 1

    @property
    def kind(self) -> str:
        """The option that it was made with."""
        return "--search" if self.search is not None else f"--folds {self.folds}" if self.folds else "--grid"

    @property
    def overlap(self) -> float:
        """Rows that a model is tested on / rows that it is trained on, where the runs are folds."""
        return 1 / (self.folds - 1) if self.folds else 0.0

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


class SweepDir:
    """A sweep directory, there or not yet. Nothing is written before `write`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"SweepDir({str(self.path)!r})"

    file = property(lambda self: self.path / "sweep.json")
    cells_file = property(lambda self: self.path / "cells")
    runs = property(lambda self: self.path / "runs")
    logs = property(lambda self: self.path / "logs")
    script = property(lambda self: self.path / "finetune.sbatch")
    trial_argv = property(lambda self: self.path / "trial.argv")
    pruning = property(lambda self: self.path / PRUNING)
    journal = property(lambda self: self.path / "journal.log")
    out_of_fold = property(lambda self: self.path / "out_of_fold.parquet")
    doubtful = property(lambda self: self.path / "doubtful_labels.csv")

    @classmethod
    def default(cls, plan: Plan, folds: int | None = None) -> SweepDir:
        """`<scratch>/sweeps/<name>-<digest8>`: one folder for each recipe, whatever the grid; folds have their own."""
        return cls(
            plan.site.scratch / "sweeps" / f"{plan.recipe.name}-{plan.digest[:8]}{f'-{folds}-folds' if folds else ''}"
        )

    def run(self, cell: str) -> RunDir:
        return RunDir(self.runs / cell)

    def read(self) -> SweepRecord | None:
        """`sweep.json`, or None if the sweep does not exist yet.

        Raises:
            InputError: it is damaged, of another version, or the folder holds something else.
        """
        try:
            return SweepRecord.model_validate_json(self.file.read_bytes(), context=AS_RECORDED)
        except (FileNotFoundError, NotADirectoryError):
            self._check_free()
            return None
        except ValidationError as error:
            first = str(error).splitlines()[0]
            raise InputError(
                f"{self.file}: not a sweep of afina {__version__}: {first}",
                "use the afina that made it, or choose another --sweep DIR",
            ) from None

    def _check_free(self) -> None:
        try:
            names = {path.name for path in self.path.iterdir()}
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise InputError(f"{self.path}: is a file", "choose another --sweep DIR") from None
        if is_run_dir(self.path):
            raise InputError(f"{self.path}: is a run directory, not a sweep", "choose another --sweep DIR")
        if foreign := sorted(names - _OURS):
            raise InputError(
                f"{self.path}: is not a sweep, and holds {foreign[0]}",
                "choose another --sweep DIR; nothing that exists is overwritten",
            )

    def write(self, record: SweepRecord) -> None:
        """Publish the cells: the list that the jobs read, then the record."""
        write_atomic(self.cells_file, encode_words(cell.name for cell in record.cells))
        write_atomic(self.file, record.to_json())

    def append(self, job_id: str, first: int, tasks: list[int]) -> None:
        """Record that array `job_id` was submitted: its task n is cell `first + n`."""
        RunDir(self.path).append("submissions.jsonl", {"job_id": job_id, "first": first, "tasks": tasks})

    def jobs_of(self) -> dict[int, list[str]]:
        """Array tasks that were submitted for each cell, by its number, in order."""
        jobs: dict[int, list[str]] = {}
        for line in RunDir(self.path).lines("submissions.jsonl"):
            for task in line.get("tasks", ()):
                jobs.setdefault(line["first"] + task, []).append(task_of(line["job_id"], task))
        return jobs

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process on this host make, submit or run the sweep's cells; the lock ends with the process.

        Not covered: hosts whose file system locks locally; there the lease of each run keeps two attempts apart.

        Raises:
            ClaimedError: another process does.
        """
        with (self.path / ".lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ClaimedError(
                    f"{self.path}: another `afina sweep` is working here", "wait for it to end, or stop it"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise EnvironmentProblem(f"{file.name}: {error.strerror}", "check its permissions") from None
            yield


def differences(before: Plan, now: Plan) -> list[str]:
    """The differences between two plans, `key: VALUE there, VALUE now` each; without resources and name."""
    there, here = _flat(before), _flat(now)
    return [
        f"{key}: {_shown(there.get(key))} there, {_shown(here.get(key))} now"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def record_of(shared: Mapping[str, Any], plan: Plan, overrides: Sequence[str]) -> dict[str, Any]:
    """A run's `record.json`: what its sweep has in common, with the run's own plan, files and overrides (behind the common ones)."""
    common = shared["recipe"]["overrides"]
    return {
        **shared,
        "claimed": round(time.time(), 3),
        "plan": plan.digest,
        "recipe": {**shared["recipe"], "overrides": None if common is None else [*common, *overrides]},
        "data": {
            **shared["data"],
            "files": {part: [str(path) for path in paths] for part, paths in plan.files.items()},
        },
    }


def failed_for_good(run: RunDir, outcome: Outcome | None) -> bool:
    """True if the run failed because of its settings: another attempt would fail again.

    After a stop, a broken node, a full disk or a kill the run can be resumed.
    """
    if outcome is None or outcome.outcome != "failed" or outcome.exit_code != 4 or outcome.cause in ("disk", "node"):
        return False
    ended = [
        event.get("next")
        for event in run.lines("events.jsonl")
        if event.get("event") == "attempt_ended" and event.get("attempt") == outcome.attempt
    ]
    return ended[-1] == "end" if ended else outcome.cause != "killed"


def _flat(plan: Plan) -> dict[str, Any]:
    recipe = plan.recipe.model_dump(mode="json", exclude={"name", "resources"})
    recipe["data"]["files"] = {part: [str(path) for path in paths] for part, paths in plan.files.items()}  # absolute
    return {key: value for key, value in flatten(recipe).items() if value not in (None, {})}


def _shown(value: Any) -> str:
    return "nothing" if value is None else shlex.quote(text) if " " in (text := str(value)) else text
