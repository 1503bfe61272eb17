"""Commands that run something: prefetch, train, resume, submit, the demo; and `claim`, which the batch script calls."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import click

from afina.cli.options import (
    another_command,
    dry_run_option,
    finish,
    json_option,
    plan_lines,
    recipe_argument,
    request_options,
    run_argument,
    watch_hint,
)
from afina.run.job_request import JobRequest

__all__ = ["COMMANDS"]


@click.command()
@recipe_argument
@request_options("overrides", "site", "run", "num_processes")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON at the end.")
def train(recipe: str, request: JobRequest, as_json: bool) -> None:
    """Train RECIPE on this machine.

    \b
    Examples:
      afina train slurm/recipes/yelp.yaml
      afina train recipe.yaml --run runs/first --set train.epochs=1 --num-processes 2
    """
    from afina import api

    finish(api.train_here(recipe, request), as_json)


@click.command()
@run_argument
@click.option(
    "--num-processes", type=click.IntRange(1), metavar="N", help="Another number of processes; the global batch stays."
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON at the end.")
def resume(run_dir: str, num_processes: int | None, as_json: bool) -> None:
    """Continue RUN on this machine from its newest complete checkpoint.

    \b
    Example:
      afina resume /scratch/me/runs/yelp-1a2b3c4d-1
    """
    from afina import api

    finish(api.resume_here(run_dir, num_processes=num_processes), as_json)


@click.command()
@recipe_argument
@request_options(
    "overrides",
    "site",
    "via",
    "run",
    "nodes",
    "gpus_per_node",
    "time_min",
    "rehearse",
    "num_processes",
    via={
        "type": click.Choice(["sbatch", "submitit", "local"]),
        "help": "`local` trains on this machine, in the background.",
    },
    num_processes="With --via local: by default one per GPU, or one.",
)
@dry_run_option
@click.option("--wait", "wait", is_flag=True, help="Wait for the end of the run; exit as it did.")
@json_option
def submit(recipe: str, request: JobRequest, dry_run: bool, wait: bool, as_json: bool) -> None:
    """Submit RECIPE (or a run directory that stopped) to Slurm, or start it here in the background.

    \b
    Examples:
      afina submit slurm/recipes/yelp.yaml --nodes 2 --gpus-per-node 4 --time 2:00:00
      afina submit recipe.yaml --dry-run
      afina submit RUN --wait
    """
    from afina import api
    from afina.forecast.estimate import describe

    if dry_run:
        plan, handle = api.plan_to_submit(recipe, request)
        job = api.dry_run(plan, request.via, handle.path if handle else request.run, claimed=handle is not None)
        if as_json:
            answer = {"plan": plan.model_dump(mode="json"), "via": request.via, **job}
            print(json.dumps(answer, indent=2, ensure_ascii=False))
        else:
            print("\n".join([*plan_lines(plan, job), "everything: the same command with --json"]))
        return
    made = api.submit_to_slurm(recipe, request)
    if made.estimate and not as_json:
        print("\n".join(f"afina: {line}" for line in describe(made.estimate)))
    if not (as_json and not wait):
        how = (
            "it trains here, in the background"
            if request.via == "local"
            else f"submitted job {made.job_id} through {request.via}"
        )
        print(f"afina: run {made.path}\nafina: {how}", flush=True)
    if wait:
        made.wait()
        finish(made, as_json)
    elif as_json:
        print(json.dumps({"run": str(made.path), "job_id": made.job_id, "via": request.via, "estimate": made.estimate}))
    else:
        print(watch_hint(made))


@click.command()
@recipe_argument
@request_options("overrides", "site")
@click.option("--refresh", is_flag=True, help="Look up the revisions again instead of the pinned ones.")
@json_option
def prefetch(recipe: str, request: JobRequest, refresh: bool, as_json: bool) -> None:
    """Fetch, check and prepare the model and data of RECIPE; jobs then need no network.

    \b
    Example:
      afina prefetch slurm/recipes/yelp.yaml
    """
    from afina import ahead

    prepared = ahead.prefetch(recipe, overrides=request.overrides, site=request.site, refresh=refresh)
    if as_json:
        print(json.dumps(prepared))
        return
    rows = ", ".join(f"{part} {count}" for part, count in prepared["rows"].items())
    print(f"prepared {prepared['prepared']}{' (already prepared)' if prepared['reused'] else ''}")
    print(f"task {prepared['task']}; rows: {rows}; labels: {', '.join(prepared['labels'] or ['-'])}")
    print(f"next: {another_command('submit' if shutil.which('sbatch') else 'train', recipe, request)}")


@click.command(hidden=True)
@recipe_argument
@request_options("overrides", "site", "nodes", "gpus_per_node")
@click.option("--pointer", required=True, help="File that gets the path of the run directory.")
def claim(recipe: str, request: JobRequest, pointer: str) -> None:
    """Make the run directory of a batch job that was given a recipe; called by finetune.sbatch inside the allocation."""
    from pathlib import Path

    from afina import api
    from afina.files import write_atomic

    run = api.claim(api.plan_for(recipe, replace(request, in_job=True)))
    Path(pointer).parent.mkdir(exist_ok=True)
    write_atomic(Path(pointer), str(run.path))


@click.command()
@click.argument("folder", default="demo")
def demo(folder: str) -> None:
    """Fine-tune a small BERT on generated reviews in FOLDER (by default demo); needs no network and no Slurm.

    \b
    Example:
      afina demo
    """
    from afina.demo import run_demo

    sys.exit(run_demo(folder))


COMMANDS = (train, resume, submit, prefetch, claim, demo)
