"""A new run: prepare the data of a plan and claim its run directory, on the host, before anything is submitted or trained."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from afina.errors import ClaimedError, EnvironmentProblem, InputError
from afina.files import encode_words, write_atomic
from afina.redact import redact_comments, redact_settings
from afina.run.commands import host_environment, job_scripts, node_argv, worker_argv
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.run.provenance.record import make_record
from afina.run.workers import ask_worker
from afina.site.image import check_image

__all__ = ["check_free", "claim", "claim_run", "make_folder", "next_free", "prepare", "remove_empty"]


def prepare(plan: Plan, *, refresh: bool = False) -> dict[str, Any]:
    """Pin, load, check, tokenise and publish the data of a plan, in a worker process; returns the worker's answer.

    Args:
        refresh: look up the revisions on the Hub again.

    Raises:
        AfinaError: the worker's.
    """
    env = host_environment(plan, offline=False)
    env |= {"AFINA_REFRESH": "1"} if refresh else {}
    return ask_worker(worker_argv(plan, "prepare"), env, plan.model_dump(mode="json"), name="the prepare stage")


def claim_run(
    plan: Plan,
    path: str | Path | None = None,
    *,
    slurm: str | None = None,
    text: str | None = None,
    prepared: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    scripts: Mapping[str, Path] | None = None,
) -> RunDir:
    """Check the image, prepare, then claim a run directory: bad data leaves nothing behind.

    Args:
        path: the run directory; by default the next free one of the plan.
        slurm: Slurm's version, for the record.
        text: the recipe's text, if it is not that of the plan's recipe file.
        prepared: the answer of `prepare`, if it was called: the runs of a sweep share it.
        record: likewise of `make_record`.
        scripts: what the job runs; by default `job_scripts()`.
    """
    check_free(path)
    if prepared is None:
        check_image(plan.site)
        prepared = prepare(plan)
    argv = node_argv(plan, _extra_binds(plan, path))
    if text is None:
        whole = json.dumps(plan.recipe.model_dump(mode="json"), indent=2)
        text = plan.recipe_file.read_text(encoding="utf-8") if plan.recipe_file else whole
    text = redact_comments(text)
    record = record or make_record(plan, prepared, text, slurm)
    return claim(plan, prepared, argv, text, path, scripts=scripts or job_scripts(), record=record)


def _extra_binds(plan: Plan, path: str | Path | None) -> list[Path]:
    """A run directory outside scratch must be visible in the container; it does not exist yet, its parent does."""
    if path is None or Path(path).absolute().is_relative_to(plan.site.scratch):
        return []
    return [Path(path).absolute().parent]


def check_free(path: str | Path | None) -> None:
    """Refuse early a `path` that cannot be claimed; `claim` decides.

    Raises:
        ClaimedError: it is a run already.
        InputError: a folder that holds something else.
    """
    if path is None or not Path(path).exists():
        return
    here = Path(path)
    names = {p.name for p in here.iterdir()} if here.is_dir() else {here.name}
    if "attempts" in names and here.is_dir():
        outcome = RunDir(here).outcome()
        if outcome is not None and outcome.outcome == "finished":
            raise ClaimedError(
                f"{here}: this run has finished", f"{RunDir(here).how_to_train_on()}, or choose another --run DIR"
            )
        raise ClaimedError(
            f"{here}: this run directory is already claimed",
            f"continue it with `afina resume {shlex.quote(str(here))}`, or choose another --run DIR",
        )
    if names:
        raise InputError(
            f"{here}: exists, and is not an empty folder",
            "choose another --run DIR; nothing that exists is overwritten",
        )


def claim(
    plan: Plan,
    prepared: Mapping[str, Any],
    argv: Sequence[str],
    recipe_text: str,
    path: str | Path | None = None,
    *,
    scripts: Mapping[str, Path] | None = None,
    record: Mapping[str, Any] | None = None,
) -> RunDir:
    """Claim a run directory and write the run's inputs.

    Args:
        plan: written to `plan.json`.
        prepared: the answer of the prepare stage: where prepared data and model are.
        argv: the node worker's command; `{run}` stands for the run directory, `{run}/node.sh` for the script in it.
        recipe_text: the recipe as the user wrote it.
        path: the run directory; by default the next free `<scratch>/runs/<name>-<digest8>-<n>`.
        scripts: copied into it, by name.
        record: written to `record.json` (see `afina.run.provenance.record`).

    Raises:
        ClaimedError, InputError: as `check_free`.
        EnvironmentProblem: the directory cannot be made.
    """
    run, made = _make(plan, path)
    filled = {"{run}": str(run.path), "{run}/node.sh": str(run.path / "node.sh")}
    words = (filled.get(word, word) for word in argv)
    contents: dict[str, str | bytes] = {
        "recipe.yaml": recipe_text,
        "prepared.json": json.dumps(dict(prepared), indent=2) + "\n",
        "worker.argv": encode_words(words),
        **{name: _without(script.read_bytes(), plan.site.sbatch_omit) for name, script in (scripts or {}).items()},
        **({"record.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n"} if record else {}),
        "plan.json": _public(plan).to_json(),  # last: it makes the directory a run
    }
    try:
        for name, content in contents.items():
            write_atomic(run.path / name, content)
    except BaseException:
        for name in contents:
            (run.path / name).unlink(missing_ok=True)
        remove_empty(made)
        raise
    return run


def _make(plan: Plan, path: str | Path | None) -> tuple[RunDir, list[Path]]:
    """Make the directory; returns the folders that did not exist before, the outermost first."""
    run = RunDir(path) if path else None
    made: list[Path] = []
    try:
        if run:
            check_free(run.path)
            made = make_folder(run.path)
        else:
            run = _next(plan)
            made = [run.path]
        try:
            run.attempts.mkdir(mode=0o700)
        except FileExistsError:
            made = []
            raise ClaimedError(f"{run.path}: another process has just claimed it", "choose another --run DIR") from None
        made.append(run.attempts)
        run.path.chmod(0o700 | (run.path.stat().st_mode & stat.S_ISGID))  # a group's folder passes its group on
    except OSError as error:
        remove_empty(made)
        where = run.path if run else plan.site.runs
        raise EnvironmentProblem(
            f"{where}: {error.strerror}", "check AFINA_SCRATCH or --run DIR, its permissions and quota"
        ) from error
    return run, made


def next_free(plan: Plan) -> RunDir:
    """The next `<scratch>/runs/<name>-<digest8>-<n>` that is not there yet."""
    name = plan.recipe.name.replace("\\", "_")  # Slurm cannot name a log below a folder with a backslash
    stem = f"{name}-{plan.digest[:8]}"
    number = 1
    while (path := plan.site.runs / f"{stem}-{number}").exists():
        number += 1
    return RunDir(path)


def _next(plan: Plan) -> RunDir:
    plan.site.runs.mkdir(exist_ok=True)
    while True:
        run = next_free(plan)
        try:
            run.path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return run


def _public(plan: Plan) -> Plan:
    """The plan with secrets redacted in the site's variables and options, which are free text; the account stays: a job needs it."""
    site = plan.site
    sbatch = {name: redact_settings(value) for name, value in site.sbatch.items()}
    extra = tuple(redact_settings(line) for line in site.sbatch_extra)
    if (sbatch, extra) == (site.sbatch, site.sbatch_extra):
        return plan
    return plan.model_copy(update={"site": site.model_copy(update={"sbatch": sbatch, "sbatch_extra": extra})})


def _without(script: bytes, options: Sequence[str]) -> bytes:
    """A batch script without the `#SBATCH` lines of these options: what sbatch's command line can set, it cannot take back."""
    unwanted = tuple(f"#SBATCH --{name}".encode() for name in options)
    lines = script.splitlines(keepends=True)
    return (
        b"".join(
            line for line in lines if not (line.startswith(unwanted) and re.match(rb"#SBATCH --[a-z-]+(=|\s)", line))
        )
        if unwanted
        else script
    )


def make_folder(path: Path) -> list[Path]:
    """Make `path` and the folders above it; returns those that were not there, the outermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # made by another process just now: not ours to remove
                folder.mkdir(mode=0o700 if folder == path else 0o777)
                made.append(folder)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that were just made, the innermost first, as far as they are empty."""
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()
