"""The command for many runs of one recipe: sweep, which also shows what a sweep has found."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import click

from afina.cli.options import minutes_of, recipe_options
from afina.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, InputError

__all__ = ["COMMANDS"]


@click.command()
@recipe_options
@click.option("--grid", metavar="KEY=A,B,…", multiple=True, help="Values of a key; several keys are combined.")
@click.option("--seeds", metavar="N", help="So many seeds from the recipe's own on; or these: 1,2,7.")
@click.option("--search", metavar="KEY=LOW..HIGH", multiple=True, help="Let Optuna choose; `:log`, or choices A,B.")
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True, help="How many, with --search.")
@click.option(
    "--search-seed", type=click.IntRange(0), default=0, show_default=True, help="Of the search's random numbers."
)
@click.option("--sweep", "directory", metavar="DIR", help="By default $AFINA_SCRATCH/sweeps/<name>-<digest>.")
@click.option("--max-parallel", type=click.IntRange(1), metavar="N", help="Runs at the same time.")
@click.option("--via", type=click.Choice(["sbatch"]), default="sbatch", help="A job array goes through sbatch.")
@click.option("--nodes", type=click.IntRange(1), metavar="N", help="Of each run.")
@click.option("--gpus-per-node", type=click.IntRange(0), metavar="N", help="0 trains on the CPU.")
@click.option("--time", "time_limit", metavar="TIME", help="Of each run: minutes, HH:MM:SS or D-HH:MM:SS.")
@click.option("--local", is_flag=True, help="Train here, one run after another, without Slurm.")
@click.option("--num-processes", type=click.IntRange(1), metavar="N", help="Processes of each run, with --local.")
@click.option(
    "--dry-run", "dry", is_flag=True, help="Print the cells and exactly what would be submitted; change nothing."
)
@click.option("--wait", "wait", is_flag=True, help="Wait for the end of all runs, then print the table.")
@click.option("--metric", metavar="NAME", help="Another metric for the table, e.g. f1 or test_accuracy.")
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def sweep(
    context: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    site: str | None,
    grid: tuple[str, ...],
    seeds: str | None,
    search: tuple[str, ...],
    trials: int,
    search_seed: int,
    directory: str | None,
    max_parallel: int | None,
    via: str,
    nodes: int | None,
    gpus_per_node: int | None,
    time_limit: str | None,
    local: bool,
    num_processes: int | None,
    dry: bool,
    wait: bool,
    metric: str | None,
    as_json: bool,
) -> None:
    """Run RECIPE over a grid of values and seeds as one job array; with a sweep directory instead, show its table.

    The same command again goes on: finished runs stay, queued and running ones are left alone, the others are submitted
    again and continue from their newest checkpoint. A larger grid adds its new cells.

    \b
    Examples:
      afina sweep recipe.yaml --grid train.learning_rate=1e-5,3e-5,5e-5 --seeds 5 --max-parallel 8
      afina sweep recipe.yaml --search train.learning_rate=1e-6..1e-4:log --trials 20 --max-parallel 4
      afina sweep recipe.yaml --seeds 3 --local
      afina sweep /scratch/me/sweeps/yelp-1a2b3c4d
    """
    from afina.sweeps.draft import draft_sweep, dry_run
    from afina.sweeps.grid import parse_grid
    from afina.sweeps.space import parse_search
    from afina.sweeps.sweep import carry_out, sweep_named

    if (found := sweep_named(recipe)) is not None:
        _look(found, context, metric, wait, as_json)
        return
    if metric is not None and not (wait or local):
        raise InputError("--metric: is for the table", "afina sweep SWEEP_DIR --metric NAME, or with --wait or --local")
    for option, given, needs, there in (
        ("--num-processes", num_processes is not None, "--local", local),
        ("--trials", _given(context, "trials"), "--search", bool(search)),
        ("--search-seed", _given(context, "search_seed"), "--search", bool(search)),
    ):
        if given and not there:
            raise InputError(f"{option}: means nothing without {needs}", f"add {needs}, or leave it out")
    if local:
        for option in ("nodes", "max_parallel", "gpus_per_node"):
            if _given(context, option):
                name = option.replace("_", "-")
                raise InputError(f"--{name}: is for Slurm, and --local runs here", "leave one of the two out")
    draft = draft_sweep(
        recipe,
        grid=parse_grid(grid),
        seeds=seeds,
        search=parse_search(search, overrides) if search else None,
        trials=trials,
        search_seed=search_seed,
        directory=directory,
        overrides=overrides,
        site=site,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time_min=minutes_of(time_limit),
        local=local,
        num_processes=num_processes,
    )
    if dry:
        shown = dry_run(draft, max_parallel)
        print(json.dumps(shown, indent=2, ensure_ascii=False) if as_json else _dry(shown))
        return
    made = carry_out(draft, max_parallel=max_parallel, num_processes=num_processes, say=_say if as_json else _tell)
    if wait and not local:
        _wait(made)
    wanted = [draft.record.cells[number].name for number in draft.wanted]
    if wait or local:
        _finish(made, wanted, metric, as_json)
    if as_json:
        print(json.dumps({"sweep": str(made.path), "jobs": list(made.submitted), "states": made.states()}))
    else:
        print(f"afina: its table: afina sweep {shlex.quote(str(made.path))}")


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _look(found: Any, context: click.Context, metric: str | None, wait: bool, as_json: bool) -> None:
    """The table of a sweep directory."""
    for option in context.params:
        if option not in ("recipe", "metric", "wait", "as_json") and _given(context, option):
            name = {"overrides": "set", "time_limit": "time", "directory": "sweep"}.get(
                option, option.replace("_", "-")
            )
            raise InputError(
                f"--{name}: {found.path} is a sweep directory, whose table is shown",
                "give the recipe to run more of it: the same command as before goes on with the sweep",
            )
    if wait:
        _wait(found)
    table = found.table(metric)
    print(json.dumps(table.to_dict(), indent=2, ensure_ascii=False) if as_json else table)


def _finish(made: Any, wanted: list[str], metric: str | None, as_json: bool) -> None:
    """The table, then exit: 0 where all runs of this call have finished."""
    table = made.table(metric)
    print(json.dumps(table.to_dict(), indent=2, ensure_ascii=False) if as_json else f"\n{table}")
    states = made.states()
    left = {name: states[name] for name in wanted if states[name] != "FINISHED"}
    for name, state in list(left.items())[:10]:
        outcome = made.dir.run(name).outcome()
        why = (outcome.error or "").splitlines()[:1] if outcome else []
        print(f"{state.lower()}: {name}{f': {why[0]}' if why else ''}", file=sys.stderr)
    if left:
        print("afina: the same command goes on with what is not finished", file=sys.stderr)
    failed = any(state == "FAILED" for state in left.values())
    sys.exit(EXIT_FAILED if failed else EXIT_STOPPED if left else EXIT_FINISHED)


def _wait(made: Any) -> None:
    """Wait with a bar where there is a terminal, else with a line at every change. Ctrl-C leaves the jobs to Slurm."""
    order = ("FINISHED", "RUNNING", "PENDING", "STOPPED", "FAILED", "PLANNED", "UNKNOWN")

    def words(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{counts[state]} {state.lower()}" for state in order if counts.get(state))

    try:
        if not sys.stderr.isatty():
            said = ""

            def tell(counts: Mapping[str, int]) -> None:
                nonlocal said
                if (now := words(counts)) != said:
                    said = now
                    _say(now)

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
        _say(f"left waiting; the jobs run on. Its table: afina sweep {shlex.quote(str(made.path))}")
        sys.exit(130)


def _tell(line: str) -> None:
    print(f"afina: {line}", flush=True)


def _say(line: str) -> None:
    print(f"afina: {line}", file=sys.stderr, flush=True)


def _dry(shown: dict[str, Any]) -> str:
    cells = [
        f"{cell['cell']}{'' if cell['submit'] else '  (finished, or under way)'}\n    {shlex.join(cell['overrides'])}".rstrip()
        for cell in shown["cells"]
    ]
    commands = [shlex.join(command) for command in shown["commands"]]
    return "\n".join(
        ["# the sweep directory", shown["sweep"], "", f"# its {len(cells)} runs", *cells, "", "# would run", *commands]
    )


COMMANDS = (sweep,)
