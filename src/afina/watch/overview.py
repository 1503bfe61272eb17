"""What all runs do just now: the files of each (`afina.watch.reading`) and one question to Slurm for all of them together.

A run's own files come first; Slurm is asked for runs whose end is not written down, and where it does not answer the state is
UNKNOWN, never FAILED. Runs are found below folders; a folder that is closed to this user is somebody else's, and left out.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from afina.errors import InputError, SiteError, nearest
from afina.recipe.trackers import sync_commands
from afina.site.settings import scratch_of
from afina.slurm.query import Job, query
from afina.slurm.reasons import explain
from afina.watch.reading import Reading, read_run

__all__ = [
    "STATES",
    "RunSummary",
    "State",
    "find_runs",
    "place_of",
    "known_runs",
    "short_names",
    "summarise",
    "summary_of",
]

State = Literal["PLANNED", "PENDING", "RUNNING", "FINISHED", "STOPPED", "FAILED", "UNKNOWN"]
STATES: tuple[State, ...] = ("PLANNED", "PENDING", "RUNNING", "FINISHED", "STOPPED", "FAILED", "UNKNOWN")

#: How deep below a folder runs are looked for: sweeps/<sweep>/runs/<cell> is four below scratch.
_DEPTH = 4
#: Opening files of a shared file system waits for its server: several at a time. On a local disk it gains nothing.
_READERS = 8
#: Slurm's guess of a start that is further away says only that it has none.
_GUESS_S = 30 * 86400


@dataclass(frozen=True)
class RunSummary:
    """One run at one moment.

    Attributes:
        run: the run directory.
        name: the recipe's name.
        state: PLANNED (claimed, never submitted), PENDING, RUNNING, FINISHED, STOPPED (resumable), FAILED; UNKNOWN where
            neither the files nor Slurm can say.
        step, max_steps: optimizer steps done, and of the whole run.
        epoch, loss: of the last log line.
        best_metric, best_value, best_step: the best evaluation by the metric that chooses the best checkpoint.
        tokens_per_s: real tokens (no padding) per second, all processes together.
        attempts: how many there were; `attempt` names the newest.
        seconds_left: of training, as far as its speed tells.
        limit_s: seconds until the job's time limit.
        starts: when Slurm thinks that a waiting job will start, in seconds since the epoch.
        job_id: the newest Slurm job.
        nodes: where it runs.
        why: why it waits, failed or is unknown, in words; `remedy` what to do about it.
        metrics: of the model in `model/`, once there is one.
        error: what failed.
        made, ended: when the run was claimed, and when its outcome was written, in seconds since the epoch.
        sync: commands that bring its records to a tracker's server, or show them.
    """

    run: Path
    name: str
    state: State
    step: int = 0
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    best_metric: str | None = None
    best_value: float | None = None
    best_step: int | None = None
    tokens_per_s: float | None = None
    attempts: int = 0
    attempt: str | None = None
    seconds_left: float | None = None
    limit_s: int | None = None
    starts: float | None = None
    job_id: str | None = None
    nodes: str = ""
    why: str | None = None
    remedy: str | None = None
    metrics: dict[str, Any] | None = None
    error: str | None = None
    made: float = 0.0
    ended: float | None = None
    sync: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return asdict(self) | {"run": str(self.run), "metrics": self.metrics or {}, "sync": list(self.sync)}


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Run directories: each folder that is one, else those below it (a sweep's, a folder of runs), by name.

    What is no folder here is looked for among the runs and sweeps on scratch, as `place_of` does.

    Raises:
        InputError: no such folder, or one without a run in it.
    """
    found: list[Path] = []
    for folder in folders:
        path = place_of(folder)
        below = _below(path, _DEPTH)
        if not below:
            raise InputError(
                f"{folder}: not a run directory, and there is none below it",
                "give the folder that `afina train` or `afina submit` named; `afina list` names them",
            )
        found += below
    return list(dict.fromkeys(found))


def known_runs() -> list[Path]:
    """All runs of this user on scratch: `runs/*` and `sweeps/*/runs/*`; there may be none.

    Raises:
        SiteError: no scratch is named, or it is not there.
    """
    scratch = scratch_of()
    return [run for folder in ("runs", "sweeps") for run in _below(scratch / folder, _DEPTH - 1)]


def summarise(paths: Sequence[str | Path]) -> list[RunSummary]:
    """Summaries in the order of `paths`, with one call of squeue, and at most one of sacct, for all of them."""
    folders = [Path(path).absolute() for path in paths]
    if len(folders) < 2:
        readings = [read_run(path) for path in folders]
    else:
        with ThreadPoolExecutor(_READERS) as pool:
            readings = list(pool.map(read_run, folders))
    asked = {r.path: r.job_ids[-1] for r in readings if r.job_ids and not r.finished and not _is_over(r)}
    unclear = [asked[r.path] for r in readings if r.path in asked and not _says_how(r)]
    jobs = query(list(dict.fromkeys(asked.values())), account=unclear)
    now = time.time()
    return [_summary(reading, jobs.get(asked.get(reading.path, "")), now) for reading in readings]


def summary_of(path: str | Path) -> RunSummary:
    """As `summarise`, of one run."""
    return summarise([path])[0]


# -- finding -----------------------------------------------------------------------------------------------------------


def place_of(folder: str | Path) -> Path:
    """The folder as it was named, or as `short_names` names one on scratch, or the one whose short name begins so.

    Raises:
        InputError: there is none, or several short names begin so.
    """
    path = Path(folder).expanduser()
    if _is_there(path):
        return path
    scratch = _scratch()
    if path.is_absolute() or scratch is None:
        hint = nearest(path.name, _names(path.parent))
        raise InputError(f"{folder}: no such folder", hint or "`afina list` names the runs on scratch")
    first, *rest = path.parts or (".",)
    cell = scratch / "sweeps" / first / "runs" / Path(*rest)
    for place in (scratch / path, scratch / "runs" / path, scratch / "sweeps" / path, cell):
        if _is_there(place):
            return place
    homes = [cell.parent] if rest else [scratch / "runs", scratch / "sweeps"]
    begin = [home / name for home in homes for name in _names(home) if _begins(name, path.name)]
    if len(begin) == 1:
        return begin[0]
    if begin:
        shown = ", ".join(sorted((place.name for place in begin), key=_natural)[:5])
        more = f" and {len(begin) - 5} more" if len(begin) > 5 else ""
        raise InputError(f"{folder}: begins the names of several: {shown}{more}", "write more of the name")
    known = _names(cell.parent) or [name for kind in ("runs", "sweeps") for name in _names(scratch / kind)]
    hint = nearest(path.name, known)
    raise InputError(
        f"{folder}: no such folder, and no run or sweep of that name below {scratch}",
        hint or "`afina list` names the runs on scratch",
    )


def _begins(name: str, begin: str) -> bool:
    """Whether `name` begins so; the number at its end is not cut, so that `yelp-1a2b3c4d-1` never means `…-10`."""
    return not name.startswith(".") and re.sub(r"(?<=-)\d{1,5}$", "", name).startswith(begin)


def short_names(runs: Sequence[Path]) -> list[str]:
    """What to call each run: below scratch `<run>` or `<sweep>/<cell>`, elsewhere its path as seen from here, if it lies below."""
    scratch = _scratch()
    here = Path.cwd()
    return [_short(run, scratch, here) for run in runs]


def _short(run: Path, scratch: Path | None, here: Path) -> str:
    if scratch is not None and run.is_relative_to(scratch):
        parts = run.relative_to(scratch).parts
        if len(parts) == 2 and parts[0] == "runs":
            return parts[1]
        if len(parts) == 4 and (parts[0], parts[2]) == ("sweeps", "runs"):
            return f"{parts[1]}/{parts[3]}"
    return str(run.relative_to(here)) if run != here and run.is_relative_to(here) else str(run)


def _scratch() -> Path | None:
    try:
        return scratch_of()
    except SiteError:
        return None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder above that is closed
        return False


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _below(folder: Path, depth: int) -> list[Path]:
    """The run directories in `folder`, or the folder itself if it is one; run directories are not searched."""
    found: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            inside = []
            for entry in entries:
                if entry.name == "plan.json":
                    return [folder]
                if not entry.name.startswith(".") and _is_folder(entry):
                    inside.append(entry.name)
    except OSError:  # closed to us, or gone meanwhile
        return found
    if depth:
        for name in sorted(inside, key=_natural):
            found += _below(folder / name, depth - 1)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _natural(name: str) -> list[tuple[int, str]]:
    """`run-2` before `run-10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# -- judging -----------------------------------------------------------------------------------------------------------


def _is_local(attempt: str | None) -> bool:
    return attempt is not None and attempt.startswith("local-")


def _says_how(reading: Reading) -> bool:
    """Whether the newest attempt recorded how it ended; what comes after it is another question."""
    return bool(reading.outcome) and reading.outcome.get("attempt") == (
        reading.attempt or reading.outcome.get("attempt")
    )


def _is_over(reading: Reading) -> bool:
    """Whether the files alone say that the run has ended: its newest attempt recorded how, and nothing follows it."""
    if not _says_how(reading) or reading.submitted > reading.recorded:
        return False
    return _is_local(str(reading.outcome.get("attempt"))) or reading.next == "end"


def _summary(reading: Reading, job: Job | None, now: float) -> RunSummary:
    state, why, remedy = _judge(reading, job)
    outcome, pace = reading.outcome, reading.pace
    running = state == "RUNNING"
    speed = pace.get("tokens_per_s") if running else (outcome.get("utilisation") or {}).get("tokens_per_second")
    best = reading.best or (None, None, None)
    starts = job.start if job and state == "PENDING" and job.start and now < job.start < now + _GUESS_S else None
    return RunSummary(
        run=reading.path,
        name=reading.name,
        state=state,
        step=reading.step,
        max_steps=reading.max_steps,
        epoch=reading.epoch,
        loss=reading.loss,
        best_metric=best[0],
        best_value=best[1],
        best_step=best[2],
        tokens_per_s=speed,
        attempts=len(reading.attempts),
        attempt=reading.attempt,
        seconds_left=_seconds_left(reading, now) if running else None,
        limit_s=job.time_left_s if job and running else None,
        starts=starts,
        job_id=reading.job_ids[-1] if reading.job_ids else None,
        nodes=job.nodes if job and running else str(reading.lease.get("host") or "") if running else "",
        why=why,
        remedy=remedy,
        metrics=outcome.get("metrics") or {},
        error=outcome.get("error") if state != "FINISHED" else None,
        made=reading.made,
        ended=reading.recorded if state in ("FINISHED", "STOPPED", "FAILED") and reading.recorded else None,
        sync=tuple(sync_commands(reading.path, reading.trackers)),
    )


def _judge(reading: Reading, job: Job | None) -> tuple[State, str | None, str | None]:
    """The state, why, and what to do about it."""
    if reading.finished:
        return "FINISHED", None, None
    holder = reading.lease.get("attempt")
    if reading.sign == "alive" or (reading.sign == "fresh" and _is_local(holder)):
        return "RUNNING", None, None
    if job is not None and job.state == "RUNNING":
        return "RUNNING", "its job has started" if not reading.attempts else None, None
    if job is not None and job.state == "PENDING":
        waiting = explain(job.reason, job.job_id)
        return "PENDING", str(waiting), waiting.remedy
    if job is not None and job.state == "UNKNOWN":
        if reading.sign == "fresh":
            return "RUNNING", "Slurm does not answer; the run gave a sign of life within the last minute", None
        return "UNKNOWN", "Slurm does not answer", "try again later; the run itself is not affected"
    return _judge_ended(reading, job)


def _judge_ended(reading: Reading, job: Job | None) -> tuple[State, str | None, str | None]:
    outcome, attempt = reading.outcome, reading.attempt
    recorded: State = "STOPPED" if outcome.get("outcome") == "stopped" else "FAILED"
    again = f"afina submit {_quoted(reading.path)}" if job else f"afina resume {_quoted(reading.path)}"
    if _says_how(reading):
        return recorded, _first_line(outcome), again if recorded == "STOPPED" else None
    if job is not None:
        if job.slurm_state == "CANCELLED" or job.job_id in reading.cancelled:
            return "STOPPED", "its job was cancelled", again
        said = f" (Slurm says {job.slurm_state})" if job.slurm_state else ""
        what = f"attempt {attempt}" if attempt else f"job {job.job_id}"
        return (
            "FAILED",
            f"{what} left the queue without an outcome{said}",
            f"see `afina logs {_quoted(reading.path)}`; {again}",
        )
    if reading.sign == "dead":
        return "FAILED", f"attempt {reading.lease.get('attempt')} died without an outcome", again
    if reading.sign == "silent":
        where, silent = reading.lease.get("host"), reading.silent_s / 60
        return (
            "UNKNOWN",
            f"its attempt on {where} has given no sign of life for {silent:.0f} min",
            f"look on {where}; {again}",
        )
    if reading.attempts and not outcome:
        return (
            "UNKNOWN",
            "its attempt is starting, or died before it began to train",
            f"see `afina logs {_quoted(reading.path)}`",
        )
    if outcome:
        return recorded, _first_line(outcome), again if recorded == "STOPPED" else None
    return "PLANNED", None, f"afina submit {_quoted(reading.path)}"


def _first_line(outcome: dict[str, Any]) -> str | None:
    if outcome.get("outcome") == "stopped":
        causes = {"asked": "somebody asked for the stop", "signal": "by a signal", "limit": "at the time limit"}
        return causes.get(str(outcome.get("cause")))
    return (str(outcome.get("error") or "").splitlines() or [""])[0] or None


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _seconds_left(reading: Reading, now: float) -> float | None:
    """As the training says; else from its first step and its last checkpoint."""
    if isinstance(said := reading.pace.get("seconds_left"), int | float):
        return max(0.0, said - (now - float(reading.pace.get("time") or now)))
    if reading.began and reading.saved and reading.max_steps and reading.saved[1] > reading.began[1]:
        a_step = (reading.saved[0] - reading.began[0]) / (reading.saved[1] - reading.began[1])
        return max(0.0, a_step * (reading.max_steps - reading.saved[1]) - (now - reading.saved[0]))
    return None
