"""Commands that watch runs: status, list, logs; cancel, which ends them; and prune, which makes finished ones smaller."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from afina.recipe.metrics import lower_is_better

if TYPE_CHECKING:
    from afina.watch.overview import RunSummary

__all__ = ["COMMANDS"]

#: Seconds between two queries of `--watch`: each asks Slurm once, and other people use it too.
_EVERY_S = 10.0
_STATES = ("PLANNED", "PENDING", "RUNNING", "FINISHED", "STOPPED", "FAILED", "UNKNOWN")
#: In which order a screen that is too small shows them.
_FIRST = ("RUNNING", "PENDING", "UNKNOWN", "FAILED", "STOPPED", "PLANNED", "FINISHED")


@click.command()
@click.argument("runs", metavar="[RUN|SWEEP|FOLDER]...", nargs=-1)
@click.option("--watch", is_flag=True, help=f"Update every {_EVERY_S:.0f} seconds, until none is queued or running.")
@click.option(
    "--json", "as_json", is_flag=True, help="One object for one run, else a list; with --watch one line a query."
)
def status(runs: tuple[str, ...], watch: bool, as_json: bool) -> None:
    """Show runs: state, step, loss, best metric, speed, time left, and why they wait. By default all on scratch.

    Slurm is asked once for all of them.

    \b
    Examples:
      afina status
      afina status yelp-1a2b3c4d-1
      afina status /scratch/me/sweeps/yelp --watch
      afina status /scratch/me/runs/yelp-1a2b3c4d-1 --json
    """
    from afina.errors import InputError
    from afina.watch.find import find_runs, known_runs
    from afina.watch.overview import summarise

    if watch and not as_json and not sys.stdout.isatty():
        raise InputError(
            "--watch draws on a terminal, and standard output is not one", "use --watch --json, or afina status alone"
        )
    paths = find_runs(runs) if runs else known_runs()
    single = len(runs) == 1 and len(paths) == 1 and (_folder_of(runs[0]) == paths[0].name)
    if watch:
        _watch(paths, as_json, single)
        return
    summaries = summarise(paths)
    if as_json:
        print(_as_json(summaries, single))
    else:
        print("\n".join(_text(summaries, single)))


def _folder_of(word: str) -> str:
    return Path(word).absolute().name


def _as_json(summaries: Sequence[RunSummary], single: bool) -> str:
    records = [summary.to_dict() for summary in summaries]
    return json.dumps(records[0] if single else records, ensure_ascii=False)


def _text(summaries: Sequence[RunSummary], single: bool) -> list[str]:
    from afina.cli.screen import page, status_lines, totals
    from afina.watch.find import short_names

    if single:
        return page(summaries[0])
    if not summaries:
        return ["no runs yet: `afina submit RECIPE` or `afina train RECIPE` makes one"]
    return [*status_lines(summaries, short_names([s.run for s in summaries])), totals(summaries)]


def _watch(paths: Sequence[Path], as_json: bool, single: bool) -> None:
    """Draw again and again, until Ctrl-C."""
    from afina.watch.overview import summarise

    def ended(summaries: Sequence[RunSummary]) -> bool:
        return not any(s.state in ("PENDING", "RUNNING", "UNKNOWN") for s in summaries)

    try:
        if as_json:
            while True:
                summaries = summarise(paths)
                print(_as_json(summaries, single), flush=True)
                if ended(summaries):
                    return
                time.sleep(_EVERY_S)
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False) as live:
            while True:
                summaries = sorted(summarise(paths), key=lambda s: _FIRST.index(s.state))
                lines = _text(summaries, single)
                room = live.console.size.height - 2
                if len(lines) > room:  # the heads, the most lively runs, the totals
                    lines = [*lines[: room - 2], f"… {len(lines) - room} more", lines[-1]]
                live.update(Text.from_ansi("\n".join([*lines, time.strftime("%H:%M:%S")])), refresh=True)
                if ended(summaries):
                    return
                time.sleep(_EVERY_S)
    except KeyboardInterrupt:
        return


@click.command(name="list")
@click.argument("folder", required=False)
@click.option(
    "--state",
    "states",
    type=click.Choice(_STATES, case_sensitive=False),
    multiple=True,
    help="Only these; may be given again.",
)
@click.option(
    "--sort",
    type=click.Choice(["age", "name", "state", "best", "step", "size"]),
    default="age",
    show_default=True,
    help="age: the newest first. best: the best of each metric first.",
)
@click.option("--size", "with_size", is_flag=True, help="Also how large each is on disk: reads every folder.")
@click.option("--json", "as_json", is_flag=True)
def list_(folder: str | None, states: tuple[str, ...], sort: str, with_size: bool, as_json: bool) -> None:
    """One line a run: state, best metric, age. By default all on scratch; FOLDER may be a sweep or any folder of runs.

    \b
    Examples:
      afina list
      afina list --state failed --state stopped
      afina list /scratch/me/sweeps/yelp --sort best --size
    """
    from afina.cli.screen import list_lines
    from afina.watch.find import find_runs, known_runs, short_names
    from afina.watch.overview import summarise

    summaries = summarise(find_runs([folder]) if folder else known_runs())
    wanted = {state.upper() for state in states} or set(_STATES)
    kept = [s for s in summaries if s.state in wanted]
    sizes = {s.run: _size(s.run) for s in kept} if with_size or sort == "size" else {}
    kept.sort(key=lambda s: _order(s, sort, sizes))
    if as_json:
        records = [s.to_dict() | ({"size_bytes": sizes[s.run]} if sizes else {}) for s in kept]
        print(json.dumps(records, ensure_ascii=False))
    elif kept:
        names = short_names([s.run for s in kept])
        print("\n".join(list_lines(kept, names, [sizes[s.run] for s in kept] if sizes else None)))
    else:
        print("no runs" + (f" that are {' or '.join(sorted(wanted)).lower()}" if states else " yet"))


def _order(s: RunSummary, sort: str, sizes: dict[Path, int]) -> Any:
    if sort == "best":
        value = s.best_value if s.best_value is not None else float("-inf")
        return s.best_value is None, s.best_metric or "", value if lower_is_better(s.best_metric or "") else -value
    keys = {
        "age": -s.made,
        "state": _FIRST.index(s.state),
        "step": -s.step,
        "size": -sizes.get(s.run, 0),
    }
    return keys.get(sort, 0)  # by name: as they were found


def _size(folder: Path) -> int:
    """Bytes of the files; a file that disappears meanwhile counts as none."""
    import os

    total = 0
    for above, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(above, name)).st_size  # noqa: PTH118 — a Path each is half the time
            except OSError:
                continue
    return total


@click.command()
@click.argument("run")
@click.option(
    "-f", "--follow", "following", is_flag=True, help="Follow it, through later attempts, until the run ends."
)
@click.option("--rank", type=click.IntRange(0), metavar="K", help="Only what process K wrote.")
@click.option("--node", type=click.IntRange(0), metavar="K", help="What was written on node K; by default 0.")
@click.option("--attempt", metavar="A", help="An earlier attempt, e.g. 4711.0; by default the newest.")
@click.option(
    "-n", "--lines", "last", type=click.IntRange(0), metavar="N", help="Only the last N lines (and what follows)."
)
def logs(run: str, following: bool, rank: int | None, node: int | None, attempt: str | None, last: int | None) -> None:
    """Print the log of RUN.

    \b
    Examples:
      afina logs yelp-1a2b3c4d-1 -n 20
      afina logs /scratch/me/runs/yelp-1a2b3c4d-1 -f
      afina logs yelp-1a2b3c4d-1 --attempt 4711.0 --rank 3
    """
    from afina.errors import InputError
    from afina.run.directory import RunDir
    from afina.watch.logs import LogSelection, follow, log_lines

    if rank is not None and node is not None:
        raise InputError("--rank and --node: give one of them", "a rank's node follows from its number")
    choice = LogSelection(attempt, node, rank)
    directory = RunDir(_one(run))
    try:
        for line in follow(directory, choice, last) if following else log_lines(directory, choice, last):
            sys.stdout.write(line)
            if following:
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not following:
            raise


@click.command()
@click.argument("runs", metavar="RUN|SWEEP|FOLDER...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True)
def cancel(runs: tuple[str, ...], as_json: bool) -> None:
    """Cancel the jobs of runs, queued or running; a run that trains without Slurm is asked to stop.

    A run that trains leaves a checkpoint first: `afina submit RUN_DIR` or `afina resume RUN_DIR` continues it.

    \b
    Examples:
      afina cancel yelp-1a2b3c4d-1
      afina cancel /scratch/me/sweeps/yelp
    """
    from afina.watch.cancel import cancel_runs
    from afina.watch.find import find_runs, short_names

    done = cancel_runs(find_runs(runs))
    if as_json:
        print(json.dumps([one.to_dict() for one in done], ensure_ascii=False))
        return
    for one, name in zip(done, short_names([one.run for one in done]), strict=True):
        print(f"{name}: {one.message}")


@click.command()
@click.argument("runs", metavar="RUN|SWEEP|FOLDER...", nargs=-1, required=True)
@click.option(
    "--keep", type=click.Choice(["best", "none"]), default="best", show_default=True, help="The checkpoint that stays."
)
@click.option("--dry-run", is_flag=True, help="Say what would go and what would stay; remove nothing.")
def prune(runs: tuple[str, ...], keep: Literal["best", "none"], dry_run: bool) -> None:
    """Remove the checkpoints of finished runs; `model/`, predictions and all records stay.

    With --keep best, the checkpoint whose weights are in `model/` stays. Runs that have not finished are left alone:
    they resume from their checkpoints.

    \b
    Examples:
      afina prune yelp-1a2b3c4d-1 --dry-run
      afina prune /scratch/me/sweeps/yelp --keep none
    """
    from afina.errors import InputError
    from afina.run.directory import RunDir
    from afina.run.prune import prune as prune_run
    from afina.text import size_in_words
    from afina.watch.find import find_runs, short_names

    paths, freed, refused = find_runs(runs), 0, []
    for path, name in zip(paths, short_names(paths), strict=True):
        try:
            done = prune_run(RunDir(path), keep, dry_run=dry_run)
        except InputError as error:
            refused.append(error)
            print(f"{name}: left alone: {error.message.removeprefix(f'{path}: ')}")
            continue
        freed += sum(done.removed.values())
        verb = "would remove" if dry_run else "removed"
        gone = ", ".join(done.removed) or "nothing"
        print(
            f"{name}: {verb} {gone} ({size_in_words(sum(done.removed.values()))}); stays: {', '.join(['model/', *done.kept])}"
        )
    if len(refused) == len(paths):
        raise refused[0]
    if len(paths) > 1:
        print(f"{size_in_words(freed)} in all")


def _one(word: str) -> Path:
    """The one run of that name.

    Raises:
        InputError: there are several.
    """
    from afina.errors import InputError
    from afina.watch.find import find_runs, short_names

    found = find_runs([word])
    if len(found) > 1:
        names = short_names(found[:5])
        raise InputError(
            f"{word}: holds {len(found)} runs", f"name one of them: {', '.join(names)}{', …' if len(found) > 5 else ''}"
        )
    return found[0]


COMMANDS = (status, list_, logs, cancel, prune)
