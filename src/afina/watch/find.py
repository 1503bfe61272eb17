"""Find run directories: below folders, on scratch, and by their short names.

A folder that this user cannot read is skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from afina.errors import InputError, SiteError, nearest
from afina.files import nearest_path
from afina.run.directory import RunDir, is_run_dir
from afina.site.settings import scratch_of
from afina.slurm.query import jobs_below, run_of_job

__all__ = ["find_runs", "known_runs", "resolve_folder", "short_names"]

#: How deep below a folder runs are searched: sweeps/<sweep>/runs/<cell> is four below scratch.
_DEPTH = 4
#: `4711`, or `4711_3` for a task of an array.
_JOB = re.compile(r"\d+(_\d+)?")


def find_runs(folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Run directories: each folder that is one, else those below it (a sweep's, a folder of runs), by name.

    A name that is not a folder here is resolved on scratch, as `resolve_folder` does.

    Raises:
        InputError: no such folder, or one without a run in it.
    """
    runs: list[Path] = []
    for folder in [folders] if isinstance(folders, str | os.PathLike) else folders:
        path = resolve_folder(folder)
        below = _below(path, _DEPTH)
        if not below:
            raise InputError(
                f"{folder}: not a run directory, and there is none below it",
                "give the folder that `afina train` or `afina submit` named; `afina list` names them",
            )
        runs += below
    return list(dict.fromkeys(runs))


def known_runs() -> list[Path]:
    """All runs on scratch, `runs/*` and `sweeps/*/runs/*`; possibly none.

    Raises:
        SiteError: AFINA_SCRATCH is not set or does not exist.
    """
    scratch = scratch_of()
    return [run for folder in ("runs", "sweeps") for run in _below(scratch / folder, _DEPTH - 1)]


def resolve_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder by its path, by its short name (see `short_names`), by an unambiguous beginning of that, or by the number of its job.

    Raises:
        InputError: there is none, or several short names begin so.
    """
    if not isinstance(folder, str | os.PathLike):
        raise InputError(f"run: must be a run, a path or a name; found {folder!r}", "`afina list` names the runs")
    path = Path(folder).expanduser()
    if _exists(path):
        return path
    scratch = _scratch()
    if path.is_absolute() or scratch is None:
        _check_not_deleted(folder, [path.absolute()])
        hint = nearest_path(path)
        raise InputError(f"{folder}: no such folder", hint or "`afina list` names the runs on scratch")
    first, *rest = path.parts or (".",)
    cell = scratch / "sweeps" / first / "runs" / Path(*rest)
    for candidate in (scratch / path, scratch / "runs" / path, scratch / "sweeps" / path, cell):
        if _exists(candidate):
            return candidate
    folders = [cell.parent] if rest else [scratch / "runs", scratch / "sweeps"]
    matches = [above / name for above in folders for name in _names(above) if _has_prefix(name, path.name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = ", ".join(sorted((match.name for match in matches), key=_natural)[:5])
        more = f" and {len(matches) - 5} more" if len(matches) > 5 else ""
        raise InputError(f"{folder}: several names begin so: {shown}{more}", "write more of the name")
    if _JOB.fullmatch(str(folder)):
        return _run_of_job(str(folder), scratch)
    _check_not_deleted(folder, [scratch / "runs" / path, scratch / "sweeps" / path, cell])
    known = _names(cell.parent) or [name for kind in ("runs", "sweeps") for name in _names(scratch / kind)]
    hint = (
        nearest_path(scratch / "runs" / path) if (scratch / "runs" / path).is_symlink() else nearest(path.name, known)
    )
    raise InputError(
        f"{folder}: no such folder, and no run or sweep of that name below {scratch}",
        hint or "`afina list` names the runs on scratch",
    )


def _run_of_job(number: str, scratch: Path) -> Path:
    """The run that has had this job.

    Raises:
        InputError: there is none, or its directory was deleted.
    """
    for run in reversed(known_runs()):
        if any(job.partition(";")[0] == number for job in RunDir(run).job_ids()):
            return run
    queued = run_of_job(number)
    if queued is not None and is_run_dir(queued):
        return queued
    if queued is not None:
        _check_not_deleted(number, [queued])
    raise InputError(
        f"{number}: no run below {scratch} has had this job: it has not begun, its run directory was deleted, or it is not of afina",
        f"`squeue --me` and `sacct -j {number}` show what Slurm knows of it; `afina list` names the runs that are there",
    )


def _check_not_deleted(word: object, folders: Sequence[Path]) -> None:
    """Refuse a run directory that was deleted while its job is in the queue.

    Raises:
        InputError: one of `folders` is that of such a job, and is not there.
    """
    for folder, jobs in jobs_below([folder for folder in folders if not _exists(folder)]).items():
        raise InputError(
            f"{word}: {folder} was deleted, and job {', '.join(jobs)} of it is still in the queue",
            f"scancel {' '.join(jobs)}; then start another run from the recipe",
        )


def _has_prefix(name: str, prefix: str) -> bool:
    """True where `name` begins so; never within its last number: `yelp-1a2b3c4d-1` does not match `…-10`."""
    return not name.startswith(".") and re.sub(r"(?<=-)\d{1,5}$", "", name).startswith(prefix)


def short_names(runs: Sequence[Path]) -> list[str]:
    """A name for each run: on scratch `<run>` or `<sweep>/<cell>`, elsewhere its path, relative where it lies below the working directory."""
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


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder above that cannot be read
        return False


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _below(folder: Path, depth: int) -> list[Path]:
    """The run directories below `folder`, or the folder itself if it is one. Nothing is searched inside a run directory."""
    runs: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            inside = []
            for entry in entries:
                if entry.name == "plan.json":
                    return [folder]
                if not entry.name.startswith(".") and _is_folder(entry):
                    inside.append(entry.name)
    except OSError:  # not readable, or removed meanwhile
        return runs
    if depth:
        for name in sorted(inside, key=_natural):
            runs += _below(folder / name, depth - 1)
    return runs


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _natural(name: str) -> list[tuple[int, str]]:
    """`run-2` before `run-10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
