"""Commands that run something: prefetch, train, resume, submit, the demo; and `claim`, which the batch script calls."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from typing import Any

import click

from afina.cli.options import again, finish, following, minutes_of, recipe_options

__all__ = ["COMMANDS"]


@click.command()
@recipe_options
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
    from afina import api

    finish(api.train(recipe, overrides=overrides, run=run, site=site, num_processes=num_processes), as_json)


@click.command()
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
    from afina import api

    finish(api.resume(run_dir, num_processes=num_processes), as_json)


@click.command()
@recipe_options
@click.option("--via", type=click.Choice(["sbatch", "submitit"]), default="sbatch", show_default=True)
@click.option("--run", metavar="DIR", help="The run directory; by default one under $AFINA_SCRATCH/runs/.")
@click.option("--nodes", type=click.IntRange(1), metavar="N")
@click.option("--gpus-per-node", type=click.IntRange(0), metavar="N", help="0 trains on the CPU.")
@click.option("--time", "time_limit", metavar="TIME", help="Minutes, HH:MM:SS or D-HH:MM:SS.")
@click.option("--dry-run", is_flag=True, help="Print the plan and exactly what would be submitted; change nothing.")
@click.option("--rehearse", is_flag=True, help="First a few steps and a save here, with the network cut; then submit.")
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
    rehearse: bool,
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
    from afina import api
    from afina.forecast.estimate import describe

    minutes = minutes_of(time_limit)
    if dry_run:
        asked = {"nodes": nodes, "gpus_per_node": gpus_per_node, "time_min": minutes}
        plan, there = api.plan_to_submit(recipe, overrides=overrides, run=run, site=site, rehearse=rehearse, **asked)
        shown = api.dry_run(plan, via, there.path if there else run, claimed=there is not None)
        print(
            json.dumps({"plan": plan.model_dump(mode="json"), "via": via, **shown}, indent=2, ensure_ascii=False)
            if as_json
            else _dry(plan, shown)
        )
        return
    made = api.submit(
        recipe,
        via=via,
        overrides=overrides,
        run=run,
        site=site,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time_min=minutes,
        rehearse=rehearse,
    )
    if made.estimate and not as_json:
        print("\n".join(f"afina: {line}" for line in describe(made.estimate)))
    if not (as_json and not wait):
        print(f"afina: run {made.path}\nafina: submitted job {made.job_id} through {via}", flush=True)
    if wait:
        made.wait()
        finish(made, as_json)
    elif as_json:
        print(json.dumps({"run": str(made.path), "job_id": made.job_id, "via": via, "estimate": made.estimate}))
    else:
        print(following(made))


@click.command()
@recipe_options
@click.option("--refresh", is_flag=True, help="Look the revisions up again instead of taking the pinned ones.")
@click.option("--json", "as_json", is_flag=True)
def prefetch(recipe: str, overrides: tuple[str, ...], site: str | None, refresh: bool, as_json: bool) -> None:
    """Fetch, check and prepare the model and data of RECIPE; jobs then need no network.

    \b
    Example:
      afina prefetch slurm/recipes/yelp.yaml
    """
    from afina import api

    prepared = api.prepare(api.plan_for(recipe, overrides=overrides, site=site), refresh=refresh)
    if as_json:
        print(json.dumps(prepared))
        return
    rows = ", ".join(f"{part} {count}" for part, count in prepared["rows"].items())
    print(f"prepared {prepared['prepared']}{' (was there already)' if prepared['reused'] else ''}")
    print(f"task {prepared['task']}; rows: {rows}; labels: {', '.join(prepared['labels'] or ['-'])}")
    print(f"next: {again('submit' if shutil.which('sbatch') else 'train', recipe, overrides, site)}")


@click.command(hidden=True)
@recipe_options
@click.option("--nodes", type=int, default=1)
@click.option("--gpus-per-node", type=int, default=0)
@click.option("--pointer", required=True, help="File that gets the path of the run directory.")
def claim(
    recipe: str, overrides: tuple[str, ...], site: str | None, nodes: int, gpus_per_node: int, pointer: str
) -> None:
    """Make the run directory of a batch job that was given a recipe; called by finetune.sbatch inside the allocation."""
    from pathlib import Path

    from afina import api
    from afina.files import write_atomic

    plan = api.plan_for(recipe, overrides=overrides, site=site, nodes=nodes, gpus_per_node=gpus_per_node, job=True)
    run = api.claim(plan)
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


def _dry(plan: Any, shown: dict[str, Any]) -> str:
    script = shown.get("script", "").splitlines()
    return "\n".join(
        [
            plan.to_json().rstrip(),
            "",
            "# would go on with" if shown["claimed"] else "# would claim",
            shown["run"],
            "",
            "# would run",
            shlex.join(shown["command"]),
            *(["", "# the script it submits", *script] if script else []),
        ]
    )


COMMANDS = (train, resume, submit, prefetch, claim, demo)
