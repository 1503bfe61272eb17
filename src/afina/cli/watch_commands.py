"""Commands that watch runs: status, list, logs; cancel, which ends them; and prune, which makes finished ones smaller."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click

from afina.cli.completion import complete_runs
from afina.cli.options import json_option, run_argument, runs_argument

if TYPE_CHECKING:
    from afina.watch.overview import RunSummary

__all__ = ["COMMANDS"]

#: Seconds between two queries of `--watch`: each asks Slurm once, and other people use it too.
_EVERY_S = 10.0
_STATES = ("PLANNED", "PENDING", "RUNNING", "FINISHED", "STOPPED", "FAILED", "UNKNOWN")
#: In which order a screen that is too small shows them.
_FIRST = ("RUNNING", "PENDING", "UNKNOWN", "FAILED", "STOPPED", "PLANNED", "FINISHED")


def _table_options(order: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        columns = click.option(
            "--columns", metavar="NAME,…", help="Columns: state, run, any key of the recipe, any metric, …"
        )
        sort = click.option("--sort", metavar="NAME", help=f"Sort by a column; by default {order}.")
        return columns(sort(command))

    return decorate


@click.command()
@runs_argument("[RUN|SWEEP|FOLDER]...", required=False)
@_table_options("state, then age")
@click.option("--watch", is_flag=True, help=f"Update every {_EVERY_S:.0f} seconds, until none is queued or running.")
@click.option(
    "--json", "as_json", is_flag=True, help="One object for one run, else a list; with --watch one line a query."
)
def status(runs: tuple[str, ...], columns: str | None, sort: str | None, watch: bool, as_json: bool) -> None:
    """Show runs: state, step, loss, best metric, speed, time left, and why they wait. By default all on scratch.

    Slurm is asked once for all of them.

    \b
    Examples:
      afina status
      afina status yelp-1a2b3c4d-1
      afina status /scratch/me/sweeps/yelp --watch
      afina status sweeps/yelp --columns run,learning_rate,best --sort best
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
    single = len(runs) == 1 and len(paths) == 1 and (_folder_of(runs[0]) == paths[0].name) and not columns
    view = _View(single, columns, sort)
    if watch:
        _watch(paths, as_json, view)
        return
    summaries = summarise(paths)
    print(view.json(summaries) if as_json else "\n".join(view.lines(summaries)))


def _folder_of(word: str) -> str:
    return Path(word).absolute().name


class _View(NamedTuple):
    """How `afina status` shows runs: the page of a single one, or a table."""

    single: bool
    columns: str | None
    sort: str | None

    def json(self, summaries: Sequence[RunSummary]) -> str:
        records = [summary.to_dict() for summary in self._sorted(summaries)]
        return json.dumps(records[0] if self.single else records, ensure_ascii=False)

    def lines(self, summaries: Sequence[RunSummary]) -> list[str]:
        from afina.cli.screen import STATUS, page, run_table, totals

        if self.single:
            return page(summaries[0])
        if not summaries:
            return ["no runs yet: `afina submit RECIPE` or `afina train RECIPE` makes one"]
        heads = self.columns.split(",") if self.columns else STATUS
        table = run_table(self._sorted(summaries), _names(summaries), heads, chosen=bool(self.columns))
        return [*table, totals(summaries)]

    def _sorted(self, summaries: Sequence[RunSummary]) -> Sequence[RunSummary]:
        from afina.cli.screen import sorted_runs

        return sorted_runs(summaries, self.sort, _names(summaries)) if self.sort else summaries


def _names(summaries: Sequence[RunSummary]) -> dict[Path, str]:
    from afina.watch.find import short_names

    runs = [s.run for s in summaries]
    return dict(zip(runs, short_names(runs), strict=True))


def _watch(paths: Sequence[Path], as_json: bool, view: _View) -> None:
    """Draw again and again, until Ctrl-C."""
    from afina.watch.overview import summarise

    def ended(summaries: Sequence[RunSummary]) -> bool:
        return not any(s.state in ("PENDING", "RUNNING", "UNKNOWN") for s in summaries)

    try:
        if as_json:
            while True:
                summaries = summarise(paths)
                print(view.json(summaries), flush=True)
                if ended(summaries):
                    return
                time.sleep(_EVERY_S)
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False) as live:
            while True:
                summaries = sorted(summarise(paths), key=lambda s: _FIRST.index(s.state))
                lines = view.lines(summaries)
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
@click.argument("folder", required=False, shell_complete=complete_runs)
@click.option(
    "--state",
    "states",
    type=click.Choice(_STATES, case_sensitive=False),
    multiple=True,
    help="Only these; may be given again.",
)
@_table_options("age")
@click.option("--size", "with_size", is_flag=True, help="Also how large each is on disk: reads every folder.")
@json_option
def list_(
    folder: str | None,
    states: tuple[str, ...],
    columns: str | None,
    sort: str | None,
    with_size: bool,
    as_json: bool,
) -> None:
    """One line a run: state, best metric, age. By default all on scratch; FOLDER may be a sweep or any folder of runs.

    \b
    Examples:
      afina list
      afina list --state failed --state stopped
      afina list /scratch/me/sweeps/yelp --sort best --size
    """
    from afina.cli.screen import LIST, run_table, sorted_runs
    from afina.watch.find import find_runs, known_runs
    from afina.watch.overview import summarise

    summaries = summarise(find_runs([folder]) if folder else known_runs())
    wanted = {state.upper() for state in states} or set(_STATES)
    kept = [s for s in summaries if s.state in wanted]
    heads = (
        columns.split(",") if columns else [*LIST[:-1], *(["size"] if with_size or sort == "size" else []), LIST[-1]]
    )
    sizes = {s.run: _size(s.run) for s in kept} if "size" in heads else {}
    names = _names(kept)
    kept = sorted_runs(kept, sort or "age", names, sizes)
    if as_json:
        records = [s.to_dict() | ({"size_bytes": sizes[s.run]} if sizes else {}) for s in kept]
        print(json.dumps(records, ensure_ascii=False))
    elif kept:
        print("\n".join(run_table(kept, names, heads, chosen=bool(columns), sizes=sizes)))
    else:
        print("no runs" + (f" that are {' or '.join(sorted(wanted)).lower()}" if states else " yet"))


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
@run_argument
@click.option(
    "-f", "--follow", "following", is_flag=True, help="Follow it, through later attempts, until the run ends."
)
@click.option("--rank", type=click.IntRange(0), metavar="K", help="Only what process K wrote.")
@click.option("--node", type=click.IntRange(0), metavar="K", help="What was written on node K; by default 0.")
@click.option("--attempt", metavar="A", help="An earlier attempt, e.g. 4711.0; by default the newest.")
@click.option(
    "-n", "--lines", "last", type=click.IntRange(0), metavar="N", help="Only the last N lines (and what follows)."
)
def logs(
    run_dir: str, following: bool, rank: int | None, node: int | None, attempt: str | None, last: int | None
) -> None:
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
    directory = RunDir(_one(run_dir))
    try:
        for line in follow(directory, choice, last) if following else log_lines(directory, choice, last):
            sys.stdout.write(line)
            if following:
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not following:
            raise


@click.command()
@runs_argument("RUN|SWEEP|FOLDER...", required=True)
@json_option
def cancel(runs: tuple[str, ...], as_json: bool) -> None:
    """Cancel the jobs of runs, queued or running; a run that trains without Slurm is asked to stop.

    A run that trains leaves a checkpoint first: `afina submit RUN` or `afina resume RUN` continues it.

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
@runs_argument("RUN|SWEEP|FOLDER...", required=True)
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

    runs = find_runs([word])
    if len(runs) > 1:
        names = short_names(runs[:5])
        raise InputError(
            f"{word}: holds {len(runs)} runs", f"name one of them: {', '.join(names)}{', …' if len(runs) > 5 else ''}"
        )
    return runs[0]


COMMANDS = (status, list_, logs, cancel, prune)
