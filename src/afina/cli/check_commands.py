"""Commands that check before the first job: doctor, rehearse, and the keys of a recipe."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import textwrap
from typing import Any

import click

from afina.cli.completion import complete_keys
from afina.cli.options import another_command, json_option, recipe_argument, request_options
from afina.errors import EXIT_ENVIRONMENT, InputError
from afina.run.job_request import JobRequest
from afina.text import CLEAR_LINE, can_draw, plural

__all__ = ["COMMANDS"]


@click.command()
@recipe_argument
@request_options("overrides", "site", "nodes", "gpus_per_node", "time_min")
@click.option(
    "--seconds", type=click.FloatRange(0), default=10.0, show_default=True, help="Time steps for about this long."
)
@click.option("--json", "as_json", is_flag=True, help="Print the forecast and what was measured as JSON.")
def rehearse(recipe: str, request: JobRequest, seconds: float, as_json: bool) -> None:
    """Run a few training steps, a save and an evaluation of RECIPE here, without network, and forecast the run.

    It leaves nothing behind. It measures the machine it runs on: for a GPU, call it inside an allocation.

    \b
    Examples:
      afina rehearse recipe.yaml
      srun --gpus=1 --pty afina rehearse recipe.yaml --nodes 2
    """
    from afina import ahead
    from afina.forecast.estimate import describe
    from afina.text import size_in_words

    estimate, measured = ahead.rehearse(
        recipe,
        seconds=seconds,
        overrides=request.overrides,
        site=request.site,
        nodes=request.nodes,
        gpus_per_node=request.gpus_per_node,
        time_min=request.time_min,
    )
    if as_json:
        print(json.dumps({**estimate.to_json(), "measured": measured.model_dump()}))
        return
    steps, step = len(measured.seconds), sum(measured.seconds) / len(measured.seconds)
    memory = size_in_words(measured.peak_bytes)
    if measured.gpu_peak_bytes is not None:
        memory += f", {size_in_words(measured.gpu_peak_bytes)} of the GPU"
    cut = (
        "network cut"
        if measured.network == "cut"
        else "network not cut: the kernel refuses; offline variables were set"
    )
    print(f"rehearsed on {measured.device_name} ({measured.device}, {plural(measured.threads, 'thread')}), {cut}")
    print(
        f"{step:.3f} s per step (mean of {steps}); memory peak {memory} with {measured.longest_tokens:,} tokens in the longest "
        f"batch; checkpoint {size_in_words(measured.checkpoint_bytes or 0)} in {measured.save_seconds or 0:.1f} s"
    )
    print("\n".join(describe(estimate.to_json())))


@click.command()
@click.argument("recipe", required=False, type=click.Path())
@request_options(
    "overrides",
    "site",
    "nodes",
    "gpus_per_node",
    nodes="Of that job; by default the recipe's, or one.",
    gpus_per_node="GPUs of each node of that job.",
)
@click.option("--inside", "is_inside", is_flag=True, help="Only the checks in the image (or here, without one).")
@click.option("--job", "with_job", is_flag=True, help="Then also submit a short job that starts like a run.")
@click.option(
    "--wait-minutes",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Cancel the job if it waits longer.",
)
@json_option
def doctor(
    recipe: str | None, request: JobRequest, is_inside: bool, with_job: bool, wait_minutes: float, as_json: bool
) -> None:
    """Check everything that a job depends on: site, scratch, image, Slurm; each line ok, a warning or failed, with its remedy.

    With RECIPE also that its partition can run it. Exit code 3 if something failed.

    \b
    Examples:
      afina doctor
      afina doctor recipe.yaml --job
      afina doctor --inside
    """
    from afina import diagnosis as checks
    from afina.ahead import target_for
    from afina.diagnosis.job import try_job
    from afina.site.finding import Finding

    target = target_for(recipe, request, quick=is_inside, with_job=with_job)
    all_findings: list[Any] = []

    def say(findings: Any) -> None:
        for finding in findings:
            all_findings.append(finding)
            if not as_json:
                _clear()
                _print_finding(finding)

    if is_inside:
        say(checks.inside(target))
    else:
        say(checks.examine(target))
        if with_job:
            if target.site is None or not target.has_slurm:
                say([Finding("job", "failed", "no job can be tried: see above", "mend the site first")])
            else:
                job = try_job(target, wait_s=wait_minutes * 60, progress=_progress)
                with contextlib.closing(job):
                    say(job)
    _clear()
    count = {level: sum(f.level == level for f in all_findings) for level in ("ok", "warning", "failed")}
    if as_json:
        print(json.dumps({**count, "findings": [f.to_json() for f in all_findings]}, ensure_ascii=False))
    else:
        print(f"{count['ok']} ok, {plural(count['warning'], 'warning')}, {count['failed']} failed")
        if recipe is not None and not count["failed"]:
            print(f"next: {another_command('prefetch', recipe, request)}")
    sys.exit(EXIT_ENVIRONMENT if count["failed"] else 0)


_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def _print_finding(finding: Any) -> None:
    from afina.site.package import with_pages

    level = click.style(f"{finding.level:<8}", fg=_COLOURS[finding.level])
    lines = [finding.message]
    if finding.remedy and finding.level != "ok":
        lines.append(f"remedy: {with_pages(finding.remedy)}")
    if sys.stdout.isatty():
        width = max(30, shutil.get_terminal_size().columns - 21)
        lines = [part for line in lines for part in textwrap.wrap(line, width, break_on_hyphens=False)]
    click.echo(f"{level} {finding.check:<11} " + f"\n{'':<21}".join(lines))


def _progress(line: str) -> None:
    if can_draw(sys.stderr):
        print(f"{CLEAR_LINE}{line}", end="", file=sys.stderr, flush=True)


def _clear() -> None:
    if can_draw(sys.stderr):
        print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


@click.group()
def recipe() -> None:
    """The keys of a recipe."""


@recipe.command()
@click.argument("keys", nargs=-1, metavar="[KEY]...", shell_complete=complete_keys)
@json_option
def keys(keys: tuple[str, ...], as_json: bool) -> None:
    """List the keys of a recipe with their defaults and meanings; those that begin with KEY, or contain it.

    \b
    Examples:
      afina recipe keys
      afina recipe keys train.l
      afina recipe keys scheduler
    """
    from afina.recipe.manual import key_rows

    rows = [row for row in key_rows() if not keys or any(key.strip("=") in row.key for key in keys)]
    if not rows:
        raise InputError(f"{' '.join(keys)}: no key has that in its name", "afina recipe keys lists all of them")
    if as_json:
        print(json.dumps([row._asdict() for row in rows], ensure_ascii=False))
        return
    for row in rows:
        click.echo(f"{click.style(row.key, bold=True)}  {row.default}".rstrip())
        click.echo(
            click.wrap_text(
                row.meaning,
                width=shutil.get_terminal_size().columns - 2,
                initial_indent="    ",
                subsequent_indent="    ",
            )
        )


COMMANDS = (doctor, rehearse, recipe)
