"""Shared by several commands: the options that make a JobRequest, a time on the command line, and how a run's end is printed."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from afina.cli.completion import complete_keys, complete_runs
from afina.errors import AfinaError, InputError, nearest_name
from afina.run.job_request import JobRequest
from afina.text import minutes_in_words, plural

__all__ = [
    "another_command",
    "dry_run_option",
    "finish",
    "json_option",
    "minutes",
    "next_command",
    "plan_lines",
    "reading_options",
    "recipe_argument",
    "request_options",
    "run_argument",
    "runs_argument",
    "say",
    "submit_option",
    "usage_remedy",
    "watch_hint",
]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print a summary of what would be done; change nothing.")
recipe_argument = click.argument("recipe", type=click.Path())
run_argument = click.argument("run_dir", metavar="RUN", shell_complete=complete_runs)


def runs_argument(metavar: str, *, required: bool) -> Callable[..., Any]:
    """The argument `runs`: any number of runs, sweeps and folders."""
    return click.argument("runs", metavar=metavar, nargs=-1, required=required, shell_complete=complete_runs)


def submit_option(*, default: bool, what: str) -> Callable[..., Any]:
    """`--submit/--local`, the same in all commands that can do both: as a Slurm job, or on this machine."""
    usual = "submit" if default else "local"
    help_text = f"{what} as a Slurm job, or here; by default --{usual}."
    return click.option("--submit/--local", "submitted", default=default, help=help_text)


def minutes(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Callback of an option: minutes, HH:MM:SS or D-HH:MM:SS, in minutes."""
    from pydantic import ValidationError

    from afina.recipe.keys.resource_keys import Resources

    if value is None:
        return None
    try:
        return Resources.model_validate({"time": value}).time
    except ValidationError as error:
        raise InputError(
            f"--time {value}: {error.errors()[0]['msg'].removeprefix('Value error, ')}",
            "for example --time 90 or --time 2:30:00",
        ) from None


#: Fields of a JobRequest as options: the option, its metavar, type and help.
_OPTIONS: dict[str, tuple[str, str | None, Any, str]] = {
    "overrides": (
        "--set",
        "KEY=VALUE",
        None,
        "Override a key of the recipe, e.g. train.learning_rate=3e-5; `afina recipe keys` lists them.",
    ),
    "site": ("--site", "FILE", click.Path(), "Site file; by default $AFINA_SITE, slurm/site.env, ~/.config/afina/site.env."),
    "via": ("--via", None, click.Choice(["sbatch", "submitit"]), "The batch script of afina, or the Python package submitit."),
    "run": ("--run", "DIR", click.Path(), "The run directory; by default one under $AFINA_SCRATCH/runs/."),
    "nodes": ("--nodes", "N", click.IntRange(1), "Nodes of the job; by default the recipe's."),
    "gpus_per_node": ("--gpus-per-node", "N", click.IntRange(0), "GPUs of each node; 0 trains on the CPU."),
    "time_min": ("--time", "TIME", None, "The job's time limit: minutes, HH:MM:SS or D-HH:MM:SS."),
    "num_processes": ("--num-processes", "N", click.IntRange(1), "Processes on this machine; by default one per GPU, or one."),
    "rehearse": ("--rehearse", None, None, "First a few steps and a save here, without network; then submit."),
}  # fmt: skip
#: What else some of them are.
_SETTINGS: dict[str, dict[str, Any]] = {
    "overrides": {"multiple": True, "shell_complete": complete_keys},
    "via": {"default": "sbatch", "show_default": True},
    "time_min": {"callback": minutes},
    "rehearse": {"is_flag": True},
}


def request_options(*names: str, **changes: str | dict[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command: these fields of a JobRequest become options, and the command gets the `request` that they make.

    Args:
        changes: the help of a field if it differs, or several settings of its option.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(*args: Any, **given: Any) -> Any:
            request = JobRequest(**{name: given.pop(name) for name in names})
            return command(*args, request=request, **given)

        decorated: Callable[..., Any] = call
        for name in reversed(names):
            change, (option, metavar, kind, text) = changes.get(name, {}), _OPTIONS[name]
            settings = {"metavar": metavar, "type": kind, "help": text, **_SETTINGS.get(name, {})}
            settings |= {"help": change} if isinstance(change, str) else change
            decorated = click.option(option, name, **settings)(decorated)
        return decorated

    return decorate


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command: how files are read becomes options, and the command gets the `reading` that they make."""

    @functools.wraps(command)
    def call(*args: Any, no_header: bool, **given: Any) -> Any:
        from pydantic import ValidationError

        from afina.formats.read_options import ReadOptions

        values = {key: given.pop(key) for key in ("encoding", "delimiter", "quoting", "field")}
        header = given.pop("header")
        values["header"] = False if no_header else header.split(",") if header else None
        try:
            reading = ReadOptions.model_validate({key: value for key, value in values.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                f"--{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}", "see --help"
            ) from None
        return command(*args, reading=reading, **given)

    decorated: Callable[..., Any] = call
    for option in (
        click.option("--field", metavar="KEY", help="JSON: the key under which the records are."),
        click.option("--quoting", type=click.Choice(["standard", "none"]), help="CSV: `none` takes quotes as text."),
        click.option("--no-header", is_flag=True, help="CSV: the first line is a row; columns are column1, column2, …"),
        click.option(
            "--header", metavar="NAME,NAME", help="CSV: the first line is a row; these are the columns' names."
        ),
        click.option("--delimiter", metavar="CHAR", help="CSV: between cells: `;`, `|`, `tab`."),
        click.option("--encoding", metavar="NAME", help="Of text files, for example cp1252; UTF-8 by default."),
    ):
        decorated = option(decorated)
    return decorated


def say(line: str) -> None:
    print(f"afina: {line}", flush=True)


def finish(run: Any, as_json: bool) -> None:
    """Print how the run ended, and exit with its code."""
    outcome = run.outcome
    if outcome is None:
        raise AfinaError(f"{run.path}: no outcome was recorded", "see the logs in attempts/")
    if as_json:
        print(json.dumps({"run": str(run.path), **outcome.model_dump()}, ensure_ascii=False))
    elif outcome.outcome == "failed":
        print(f"error: {outcome.error}\n  run: {run.path}", file=sys.stderr)
    else:
        print(f"afina: {outcome.outcome}: {run.path}\nnext: {next_command(run.path, outcome.outcome)}")
    sys.exit(outcome.exit_code)


def next_command(run: Any, outcome: str) -> str:
    """The next commands after a run that has ended here."""
    from afina.watch.find import short_names

    name = shlex.quote(short_names([run])[0])
    return f"afina resume {name}" if outcome == "stopped" else f"afina report {name}; afina predict {name} NEW.csv"


def usage_remedy(error: click.ClickException, argv: Sequence[str] | None) -> str:
    """The remedy for a wrong option or argument: the recipe's key, the site's variable, or the command's help."""
    context = getattr(error, "ctx", None)
    see = f"see {context.command_path if context else 'afina'} --help"
    if not isinstance(error, click.NoSuchOption) or not error.option_name.startswith("--"):
        return see
    name = error.option_name.removeprefix("--")
    takes_keys = context is not None and any(p.name == "overrides" for p in context.command.params)
    return _slurm_remedy(name) or (_key_remedy(name) if takes_keys else None) or _near(error) or see


def _near(error: click.NoSuchOption) -> str:
    if error.possibilities or error.ctx is None:  # click's message names them
        return ""
    known = [option for parameter in error.ctx.command.params for option in parameter.opts]
    near = nearest_name(error.option_name, known)
    return f"did you mean {near}?" if near else ""


def _key_remedy(name: str) -> str | None:
    """An option that is a key of the recipe, or an argument of Transformers' Trainer."""
    from afina.cli.completion import recipe_keys
    from afina.recipe.keys.training_arguments import FORMER, RESERVED_ARGUMENTS

    name = name.replace("-", "_")
    keys = [key for key, _ in recipe_keys()]
    key = next((key for key in keys if key == name or key.rpartition(".")[2] == name), None)
    if key is not None:
        return f"it is a key of the recipe: --set {key}=VALUE"
    instead = RESERVED_ARGUMENTS.get(name) or FORMER.get(name)
    return f"in the recipe, or with --set KEY=VALUE: {instead}" if instead else None


def _slurm_remedy(name: str) -> str | None:
    """An option that sbatch has."""
    from afina.site.variables import RESERVED_OPTIONS

    if name in RESERVED_OPTIONS:
        return f"an option of sbatch: {RESERVED_OPTIONS[name]}"
    if name in ("account", "partition", "qos", "reservation", "constraint", "exclude", "nodelist", "mail-type", "gres"):
        variable = f"SBATCH_{name.upper().replace('-', '_')}"
        own = name in ("account", "partition", "qos", "reservation", "mail-type")
        setting = f"{variable}=VALUE" if own else f"AFINA_SBATCH_EXTRA=--{name}=VALUE"
        return f"an option of sbatch: set {setting} in the site file, or in the environment of this command"
    return None


def another_command(command: str, recipe: str, request: JobRequest = JobRequest()) -> str:
    """Another command for the same recipe, overrides and site, quoted for a shell."""
    words = ["afina", command, recipe, *(word for value in request.overrides for word in ("--set", value))]
    return shlex.join([*words, *(["--site", str(request.site)] if request.site else [])])


def plan_lines(plan: Any, job: Mapping[str, Any] = {}) -> list[str]:
    """A plan in a few lines.

    Args:
        job: of `api.dry_run`: the run directory and the command.
    """
    recipe, g, train = plan.recipe, plan.geometry, plan.recipe.train
    batch = f"{plural(g.global_batch, 'example')} per step = {g.batch_per_device} × {g.accumulation} × {plural(g.num_processes, 'process', 'processes')}"
    files = ", ".join(dict.fromkeys(path.name for paths in plan.files.values() for path in paths)) or recipe.data.hub
    files = files if len(files) <= 60 else f"{files[:59]}…"
    per_node = plural(g.gpus_per_node, "GPU") if g.gpus_per_node else "no GPU"
    cores = plural(g.cpus_per_process * g.processes_per_node, "core")
    memory = f", {recipe.resources.mem_gb} GB" if recipe.resources.mem_gb else ""
    site = plan.site
    slurm = [f"{name.removeprefix('SBATCH_').lower()} {value}" for name, value in site.sbatch.items()]
    facts = {
        "run": f"{job['run']} ({'resumed' if job['claimed'] else 'new'})" if job else "",
        "data": f"{files}; {', '.join(recipe.data.text)} -> {', '.join(recipe.data.label)}",
        "training": f"{train.length}, {batch}, learning rate {train.learning_rate:g}",
        "trained": recipe.trained,
        "sharding": f"{train.sharding} over {plural(g.num_processes, 'process', 'processes')}"
        if train.sharding != "none"
        else "",
        "job": f"{plural(g.nodes, 'node')} with {per_node}, {cores}{memory}; {minutes_in_words(recipe.resources.time)} at most",
        "site": "; ".join([str(site.file or "the environment"), *slurm]),
        "image": str(site.image or f"none: {sys.executable}"),
        "script": plural(len(job["script"].splitlines()), "line") if job.get("script") else "",
        "command": shlex.join(job["command"]) if job else "",
    }
    return [
        f"{recipe.name}: {recipe.task}, {recipe.model}",
        *(f"  {name:<9}{text}" for name, text in facts.items() if text),
    ]


def watch_hint(run: Any) -> str:
    """One line: how to watch a run that was just submitted."""
    from afina.watch.find import short_names

    name = shlex.quote(short_names([run.path])[0])
    return f"afina: watch it with `afina status {name} --watch`, follow its log with `afina logs {name} -f`"
