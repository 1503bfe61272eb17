"""Parse, call, print, exit. Everything heavy is imported inside the commands: `afina --help` starts in a blink."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from afina import __version__
from afina.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, AfinaError, InputError

__all__ = ["cli", "main"]

F = TypeVar("F", bound=Callable[..., Any])

_CODES = {"FINISHED": EXIT_FINISHED, "STOPPED": EXIT_STOPPED, "FAILED": EXIT_FAILED}


def main(argv: Sequence[str] | None = None) -> None:
    """The `afina` command. Exit codes: 0 finished, 2 your input, 3 the environment, 4 training failed, 75 stopped and resumable."""
    try:
        cli.main(args=None if argv is None else list(argv), standalone_mode=False)
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        print("afina: interrupted; nothing half-made is left behind", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        # The machine said no (permission, quota, a name too long). Without a file it is a defect: keep the traceback.
        if error.filename is None:
            raise
        print(
            f"error: {error.filename}: {error.strerror}\n  remedy: check the path, its permissions and your quota",
            file=sys.stderr,
        )
        sys.exit(EXIT_ENVIRONMENT)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 finished · 2 your input · 3 the environment · 4 the training failed · 75 stopped, resumable.",
)
@click.version_option(__version__, prog_name="afina")
def cli() -> None:
    """Fine-tune a pretrained Hugging Face model on labelled text as a Slurm batch job that survives the cluster.

    \b
    Examples:
      afina train recipe.yaml                       train here
      afina submit recipe.yaml --nodes 2            as a Slurm job
      afina prefetch recipe.yaml                    fetch and prepare, on a node with internet
      afina status RUN_DIR                          how it goes
    """


def _recipe_options(command: F) -> F:
    for decorate in (
        click.option(
            "--site",
            metavar="FILE",
            help="Site file; by default $AFINA_SITE, slurm/site.env, ~/.config/afina/site.env.",
        ),
        click.option(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            multiple=True,
            help="Overrule a key of the recipe, e.g. train.learning_rate=3e-5.",
        ),
        click.argument("recipe"),
    ):
        command = decorate(command)
    return command


@cli.command()
@_recipe_options
@click.option("--run", metavar="DIR", help="The run directory; by default one under $AFINA_SCRATCH/runs/.")
@click.option(
    "--num-processes",
    type=click.IntRange(1),
    metavar="N",
    help="Processes on this machine; by default one per GPU, or one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON at the end.")
def train(
    recipe: str, overrides: tuple[str, ...], site: str | None, run: str | None, num_processes: int | None, as_json: bool
) -> None:
    """Train RECIPE on this machine.

    \b
    Examples:
      afina train slurm/recipes/yelp.yaml
      afina train recipe.yaml --run runs/first --set train.epochs=1 --num-processes 2
    """
    from afina import jobs

    _finish(jobs.train(recipe, overrides=overrides, run=run, site=site, num_processes=num_processes), as_json)


@cli.command()
@click.argument("run_dir")
@click.option(
    "--num-processes", type=click.IntRange(1), metavar="N", help="Another number of processes; the global batch stays."
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON at the end.")
def resume(run_dir: str, num_processes: int | None, as_json: bool) -> None:
    """Continue RUN_DIR on this machine from its newest complete checkpoint.

    \b
    Example:
      afina resume /scratch/me/runs/yelp-1a2b3c4d-1
    """
    from afina import jobs

    _finish(jobs.resume(run_dir, num_processes=num_processes), as_json)


@cli.command()
@_recipe_options
@click.option("--via", type=click.Choice(["sbatch", "submitit"]), default="sbatch", show_default=True)
@click.option("--run", metavar="DIR", help="The run directory; by default one under $AFINA_SCRATCH/runs/.")
@click.option("--nodes", type=click.IntRange(1), metavar="N")
@click.option("--gpus-per-node", type=click.IntRange(0), metavar="N", help="0 trains on the CPU.")
@click.option("--time", "time_limit", metavar="TIME", help="Minutes, HH:MM:SS or D-HH:MM:SS.")
@click.option("--dry-run", is_flag=True, help="Print the plan and exactly what would be submitted; change nothing.")
@click.option("--wait", "wait", is_flag=True, help="Wait for the end of the run; exit as it did.")
@click.option("--json", "as_json", is_flag=True)
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    site: str | None,
    via: Any,
    run: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    time_limit: str | None,
    dry_run: bool,
    wait: bool,
    as_json: bool,
) -> None:
    """Submit RECIPE (or a run directory that stopped) to Slurm.

    \b
    Examples:
      afina submit slurm/recipes/yelp.yaml --nodes 2 --gpus-per-node 4 --time 2:00:00
      afina submit recipe.yaml --dry-run
      afina submit RUN_DIR --wait
    """
    from afina import jobs

    minutes = _minutes(time_limit)
    if dry_run:
        plan = jobs.plan_for(
            recipe, overrides=overrides, site=site, nodes=nodes, gpus_per_node=gpus_per_node, time_min=minutes
        )
        shown = jobs.dry_run(plan, via, run)
        print(
            json.dumps({"plan": plan.model_dump(mode="json"), "via": via, **shown}, indent=2, ensure_ascii=False)
            if as_json
            else _dry(plan, shown)
        )
        return
    made = jobs.submit(
        recipe,
        via=via,
        overrides=overrides,
        run=run,
        site=site,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time_min=minutes,
    )
    if not (as_json and not wait):
        print(f"afina: run {made.path}\nafina: submitted job {made.job_id} through {via}", flush=True)
    if wait:
        made.wait()
        _finish(made, as_json)
    elif as_json:
        print(json.dumps({"run": str(made.path), "job_id": made.job_id, "via": via}))


@cli.command()
@_recipe_options
@click.option("--refresh", is_flag=True, help="Look the revisions up again instead of taking the pinned ones.")
@click.option("--json", "as_json", is_flag=True)
def prefetch(recipe: str, overrides: tuple[str, ...], site: str | None, refresh: bool, as_json: bool) -> None:
    """Fetch, check and prepare the model and data of RECIPE; jobs then need no network.

    \b
    Example:
      afina prefetch slurm/recipes/yelp.yaml
    """
    from afina import jobs

    prepared = jobs.prepare(jobs.plan_for(recipe, overrides=overrides, site=site), refresh=refresh)
    if as_json:
        print(json.dumps(prepared))
        return
    rows = ", ".join(f"{part} {count}" for part, count in prepared["rows"].items())
    print(f"prepared {prepared['prepared']}{' (was there already)' if prepared['reused'] else ''}")
    print(f"task {prepared['task']}; rows: {rows}; labels: {', '.join(prepared['labels'] or ['-'])}")


@cli.command(hidden=True)
@_recipe_options
@click.option("--nodes", type=int, default=1)
@click.option("--gpus-per-node", type=int, default=0)
@click.option("--pointer", required=True, help="File that gets the path of the run directory.")
def claim(
    recipe: str, overrides: tuple[str, ...], site: str | None, nodes: int, gpus_per_node: int, pointer: str
) -> None:
    """Make the run directory of a batch job that was given a recipe; called by finetune.sbatch inside the allocation."""
    from pathlib import Path

    from afina import jobs
    from afina.rundir import write_atomic

    plan = jobs.plan_for(recipe, overrides=overrides, site=site, nodes=nodes, gpus_per_node=gpus_per_node, job=True)
    run = jobs.claim(plan)
    Path(pointer).parent.mkdir(exist_ok=True)
    write_atomic(Path(pointer), str(run.path))


@cli.command()
@click.argument("run_dir")
@click.option("--json", "as_json", is_flag=True)
def status(run_dir: str, as_json: bool) -> None:
    """The state of RUN_DIR, its step and its metrics.

    \b
    Example:
      afina status /scratch/me/runs/yelp-1a2b3c4d-1 --json
    """
    from afina import jobs

    run = jobs.Run(run_dir)
    outcome, lines = run.outcome, run.metrics()
    record: dict[str, Any] = {
        "run": str(run.path),
        "state": run.state,
        "job_id": run.job_id,
        "step": lines[-1]["step"] if lines else 0,
        "metrics": outcome.metrics if outcome else {},
        "error": outcome.error if outcome else None,
    }
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    print(f"{record['state']}  step {record['step']}  job {record['job_id'] or '-'}  {run.path}")
    for name, value in record["metrics"].items():
        if isinstance(value, float):
            print(f"  {name} {value:.6f}")
    if record["error"]:
        print(f"  {record['error']}")


@cli.command()
@click.argument("folder", default="demo")
def demo(folder: str) -> None:
    """Fine-tune a small BERT on generated reviews in FOLDER (by default demo); needs no network and no Slurm.

    \b
    Example:
      afina demo
    """
    from afina.demo import run_demo

    sys.exit(run_demo(folder))


@cli.command()
@click.argument("run_dir")
def report(run_dir: str) -> None:
    """Write a self-contained page about RUN_DIR, and print its path.

    \b
    Example:
      afina report /scratch/me/runs/yelp-1a2b3c4d-1
    """
    from afina.report import write_report

    print(write_report(run_dir))


def _finish(run: Any, as_json: bool) -> None:
    """Say how the run ended, and exit with its code."""
    outcome = run.outcome
    if outcome is None:
        raise AfinaError(f"{run.path}: no outcome was recorded", "see the logs in attempts/")
    if as_json:
        print(json.dumps({"run": str(run.path), **outcome.model_dump()}, ensure_ascii=False))
    elif outcome.outcome == "failed":
        print(f"error: {outcome.error}\n  run: {run.path}", file=sys.stderr)
    else:
        print(f"afina: {outcome.outcome}: {run.path}")
    sys.exit(outcome.exit_code)


def _minutes(text: str | None) -> int | None:
    from pydantic import ValidationError

    from afina.recipe import Resources

    if text is None:
        return None
    try:
        return Resources.model_validate({"time": text}).time
    except ValidationError as error:
        raise InputError(
            f"--time {text}: {error.errors()[0]['msg'].removeprefix('Value error, ')}",
            "for example --time 90 or --time 2:30:00",
        ) from None


def _dry(plan: Any, shown: dict[str, Any]) -> str:
    script = shown.get("script", "").splitlines()
    return "\n".join(
        [
            plan.to_json().rstrip(),
            "",
            "# would claim",
            shown["run"],
            "",
            "# would run",
            shlex.join(shown["command"]),
            *(["", "# the script it submits", *script] if script else []),
        ]
    )


if __name__ == "__main__":
    main()
