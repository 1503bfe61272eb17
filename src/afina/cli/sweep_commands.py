"""The command for many runs of one recipe: sweep, which also shows the table of a sweep."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import click

from afina.cli.options import json_option, recipe_argument, request_options, say, submit_option
from afina.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, InputError
from afina.run.job_request import JobRequest
from afina.text import can_draw, plural

__all__ = ["COMMANDS"]


@click.command()
@recipe_argument
@request_options(
    "overrides",
    "site",
    "nodes",
    "gpus_per_node",
    "time_min",
    "num_processes",
    nodes="Of each run.",
    time_min="Of each run: minutes, HH:MM:SS or D-HH:MM:SS.",
    num_processes="Processes of each run, with --local.",
)
@click.option("--grid", metavar="KEY=A,B,…", multiple=True, help="Values of a key; several keys are combined.")
@click.option("--seeds", metavar="N", help="So many seeds from the recipe's own on; or these: 1,2,7.")
@click.option("--folds", type=click.IntRange(2), metavar="N", help="Cross-validation: one run for each of N folds.")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How often the rows are divided, with --folds.",
)
@click.option("--search", metavar="KEY=LOW..HIGH", multiple=True, help="Let Optuna choose; `:log`, or choices A,B.")
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True, help="How many, with --search.")
@click.option(
    "--search-seed", type=click.IntRange(0), default=0, show_default=True, help="Of the search's random numbers."
)
@click.option("--prune", is_flag=True, help="End trials that are behind the median of the others, with --search.")
@click.option(
    "--sweep",
    "directory",
    metavar="DIR",
    type=click.Path(),
    help="The sweep directory; by default $AFINA_SCRATCH/sweeps/<name>-<digest>.",
)
@click.option("--max-parallel", type=click.IntRange(1), metavar="N", help="Runs at the same time.")
@click.option("--via", type=click.Choice(["sbatch"]), default="sbatch", help="A job array goes through sbatch.")
@submit_option(default=True, what="Train")
@click.option(
    "--dry-run", "dry", is_flag=True, help="Print the cells and exactly what would be submitted; change nothing."
)
@click.option("--wait", "wait", is_flag=True, help="Wait for the end of all runs, then print the table.")
@click.option("--metric", metavar="NAME", help="Another metric for the table, e.g. f1 or test_accuracy.")
@json_option
@click.pass_context
def sweep(context: click.Context, /, recipe: str, request: JobRequest, **options: Any) -> None:
    """Run RECIPE over a grid of values and seeds as one job array; with a sweep directory instead, show its table.

    The same command again continues: finished runs stay, queued and running ones are left alone, the others are submitted
    again and resume from their newest checkpoint. A larger grid adds its new cells.

    \b
    Examples:
      afina sweep recipe.yaml --grid train.learning_rate=1e-5,3e-5,5e-5 --seeds 5 --max-parallel 8
      afina sweep recipe.yaml --search train.learning_rate=1e-6..1e-4:log --trials 20 --max-parallel 4
      afina sweep recipe.yaml --folds 5 --repeats 2
      afina sweep recipe.yaml --seeds 3 --local
      afina sweep /scratch/me/sweeps/yelp-1a2b3c4d
    """
    from afina.sweeps.draft import draft_sweep, dry_run
    from afina.sweeps.sweep import carry_out, sweep_named

    shown = _Shown(options.pop("wait"), options.pop("metric"), options.pop("as_json"))
    dry = options.pop("dry")
    options["local"] = not options.pop("submitted")
    if (known := sweep_named(recipe)) is not None:
        _check_shown_only(known, context)
        if shown.wait:
            _wait(known)
        shown.print_table(known)
        return
    _check_options(context, shown)
    draft = draft_sweep(recipe, _request(request, options))
    if dry:
        planned = dry_run(draft)
        print(json.dumps(planned, indent=2, ensure_ascii=False) if shown.as_json else _dry_run_text(planned))
        return
    made = carry_out(draft, _to_stderr if shown.as_json else say)
    if shown.wait and not draft.request.local:
        _wait(made)
    if shown.wait or draft.request.local:
        _finish(made, [draft.record.cells[number].name for number in draft.wanted], shown)
    if shown.as_json:
        print(json.dumps({"sweep": str(made.path), "jobs": list(made.submitted), "states": made.states()}))
    else:
        print(f"afina: its table: afina sweep {shlex.quote(str(made.path))}")


class _Shown(NamedTuple):
    """How a sweep's table is shown."""

    wait: bool
    metric: str | None
    as_json: bool

    def print_table(self, sweep: Any, before: str = "") -> None:
        table = sweep.table(self.metric)
        print(json.dumps(table.to_dict(), indent=2, ensure_ascii=False) if self.as_json else f"{before}{table}")


def _request(job: JobRequest, options: Mapping[str, Any]) -> Any:
    from afina.sweeps.draft import SweepRequest
    from afina.sweeps.grid import parse_grid
    from afina.sweeps.space import parse_search

    search = parse_search(options["search"], job.overrides) if options["search"] else None
    own = {name: value for name, value in options.items() if name != "via"}
    return SweepRequest(**{**own, "grid": parse_grid(options["grid"]), "search": search, "job": job})


def _check_options(context: click.Context, shown: _Shown) -> None:
    """Refuse options without the one that they belong to."""
    local, search = not context.params["submitted"], bool(context.params["search"])
    if shown.metric is not None and not (shown.wait or local):
        raise InputError("--metric: is for the table", "afina sweep SWEEP_DIR --metric NAME, or with --wait or --local")
    folds = context.params["folds"] is not None
    for name, needs, is_given in (
        ("num_processes", "--local", local),
        ("repeats", "--folds", folds),
        ("trials", "--search", search),
        ("search_seed", "--search", search),
        ("prune", "--search", search),
    ):
        if _given(context, name) and not is_given:
            raise InputError(f"{_flag(name)}: has no effect without {needs}", f"add {needs}, or leave it out")
    for name in ("nodes", "max_parallel", "gpus_per_node"):
        if local and _given(context, name):
            raise InputError(f"{_flag(name)}: is for Slurm, and --local runs here", "leave one of the two out")


def _check_shown_only(known: Any, context: click.Context) -> None:
    for name in context.params:
        if name not in ("recipe", "metric", "wait", "as_json") and _given(context, name):
            raise InputError(
                f"{_flag(name)}: {known.path} is a sweep directory: its table is shown",
                "give the recipe to run more of it: the same command as before continues the sweep",
            )


def _flag(name: str) -> str:
    flags = {
        "overrides": "--set",
        "time_min": "--time",
        "directory": "--sweep",
        "dry": "--dry-run",
        "submitted": "--submit/--local",
    }
    return flags.get(name, f"--{name.replace('_', '-')}")


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _finish(made: Any, wanted: Sequence[str], shown: _Shown) -> None:
    """Print the table, then exit: 0 if all runs of this call have finished."""
    from afina.watch.find import short_names

    shown.print_table(made, before="\n")
    states = made.states()
    left = {name: states[name] for name in wanted if states[name] != "FINISHED"}
    for name, state in list(left.items())[:10]:
        outcome = made.dir.run(name).outcome()
        why = (outcome.error or "").splitlines()[:1] if outcome else []
        print(f"{state.lower()}: {name}{f': {why[0]}' if why else ''}", file=sys.stderr)
    if left:
        print("afina: the same command continues what is not finished", file=sys.stderr)
    if not shown.as_json:
        print(f"next: afina report {shlex.quote(short_names([made.path])[0])}")
    failed = any(state == "FAILED" for state in left.values())
    sys.exit(EXIT_FAILED if failed else EXIT_STOPPED if left else EXIT_FINISHED)


def _wait(made: Any) -> None:
    """Wait with a bar where there is a terminal, else with a line at every change. Ctrl-C leaves the jobs to Slurm."""
    order = ("FINISHED", "RUNNING", "PENDING", "STOPPED", "FAILED", "PLANNED", "UNKNOWN")

    def words(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{counts[state]} {state.lower()}" for state in order if counts.get(state))

    try:
        if not can_draw(sys.stderr):
            last = ""

            def tell(counts: Mapping[str, int]) -> None:
                nonlocal last
                if (now := words(counts)) != last:
                    last = now
                    _to_stderr(now)

            made.wait(tell=tell)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("", total=len(made.record.cells))
            made.wait(
                tell=lambda counts: progress.update(bar, completed=counts.get("FINISHED", 0), description=words(counts))
            )
    except KeyboardInterrupt:
        _to_stderr(f"no longer waiting; the jobs continue. Its table: afina sweep {shlex.quote(str(made.path))}")
        sys.exit(130)


def _to_stderr(line: str) -> None:
    print(f"afina: {line}", file=sys.stderr, flush=True)


def _dry_run_text(shown: dict[str, Any]) -> str:
    cells = [
        f"{cell['cell']}{'' if cell['submit'] else '  (finished, queued or running)'}\n    {shlex.join(cell['overrides'])}".rstrip()
        for cell in shown["cells"]
    ]
    commands = [shlex.join(command) for command in shown["commands"]]
    return "\n".join(
        [
            "# the sweep directory",
            shown["sweep"],
            "",
            f"# its {plural(len(cells), 'run')}",
            *cells,
            "",
            "# would run",
            *commands,
        ]
    )


COMMANDS = (sweep,)
