"""Commands about existing runs: report, compare, rerun."""

from __future__ import annotations

import json
from typing import Any

import click

from afina.cli.options import (
    dry_run_option,
    finish,
    json_option,
    plan_lines,
    request_options,
    run_argument,
    runs_argument,
    say,
    submit_option,
    watch_hint,
)
from afina.run.job_request import JobRequest

__all__ = ["COMMANDS"]

#: More runs than this are tested only with --test: each test reads predictions.
_MOST_TESTED = 20
#: Fields of an outcome by the name that all commands give them.
_HEADS = {"samples_per_second": "examples/s", "world_size": "processes", "global_step": "step"}


@click.command()
@click.argument("path", metavar="[RUN|SWEEP]", required=False)
@click.option("--png", is_flag=True, help="Also write the charts as PNG files.")
@click.option("--each", is_flag=True, help="For a folder of runs: write the page of every run, too.")
@click.option("--no-text", is_flag=True, help="Leave the texts of mistaken rows out; their rows and ids stay.")
@click.option(
    "-o", "--output", metavar="FOLDER", help="Write it there; by default into the run or the sweep, as report/."
)
@click.option("--json", "as_json", is_flag=True, help="Print the path of the page as JSON.")
def report(path: str | None, png: bool, each: bool, no_text: bool, output: str | None, as_json: bool) -> None:
    """Write a self-contained page about a run, or about the runs of a sweep, and print its path.

    Without an argument: about the newest run on scratch. The page is RUN/report/index.html and needs no network; its charts
    lie beside it as SVG files.

    \b
    Examples:
      afina report
      afina report /scratch/me/runs/yelp-1a2b3c4d-1
      afina report /scratch/me/sweeps/rates --each --png
    """
    from afina.reports import write_report

    page = write_report(path, png=png, texts=not no_text, each=each, output=output)
    print(json.dumps({"report": str(page)}) if as_json else page)


@click.command()
@runs_argument("RUN...", required=True)
@click.option("--metric", metavar="NAME", help="The score to test; by default what chooses the best checkpoint.")
@click.option(
    "--test/--no-test",
    "test",
    default=None,
    help=f"Paired tests of each run against the first; by default for up to {_MOST_TESTED} runs.",
)
@click.option("--split", type=click.Choice(["eval", "test"]), default="eval", help="The split whose rows are compared.")
@click.option("--html", "page", metavar="FOLDER", help="Also write it as a page with curves, FOLDER/index.html.")
@json_option
def compare(
    runs: tuple[str, ...], metric: str | None, test: bool | None, split: str, page: str | None, as_json: bool
) -> None:
    """Compare runs: differences between their recipes, their scores, and tests whether those differ by more than chance.

    A folder stands for the runs below it. Each run is tested against the first on the same eval rows: McNemar's exact test for
    accuracy, the paired bootstrap for other scores, Wilcoxon's test for absolute errors. Sweeps with --folds are tested as a whole, over
    the folds that both have.

    \b
    Examples:
      afina compare runs/base runs/longer
      afina compare sweeps/rates --no-test --json
      afina compare runs/base runs/longer --html comparison
      afina compare runs/chosen runs/base --split test
    """
    from afina.reports import compare as comparing
    from afina.reports import write_comparison
    from afina.run.provenance.split_looks import look_at_test

    comparison = comparing.compare(runs, split)
    tests, looked = None, ""
    if test or (test is None and (len(comparison.runs) <= _MOST_TESTED or comparison.folded)):
        tests = comparing.verdicts(comparison, metric)
    if split == "test":
        looked = look_at_test([run.path for run in comparison.runs], "compare", metric or "")
    written = write_comparison(comparison, tests, page, looked) if page else None
    if as_json:
        answer = comparing.to_json(comparison, tests) | ({"looked": looked} if looked else {})
        answer |= {"report": str(written)} if written else {}
        print(json.dumps(answer, ensure_ascii=False))
    else:
        _print(comparison, tests)
        print(looked, end="\n" * bool(looked))
        print(written or "", end="\n" * bool(written))


@click.command()
@run_argument
@submit_option(default=False, what="Train")
@request_options(
    "run",
    "via",
    "site",
    "nodes",
    "gpus_per_node",
    "time_min",
    "num_processes",
    run="The new run directory; by default one under $AFINA_SCRATCH/runs/.",
    nodes="With --submit: other resources than the first time.",
    num_processes="Here: by default as many as the first time.",
)
@dry_run_option
@json_option
def rerun(run_dir: str, request: JobRequest, submitted: bool, dry_run: bool, as_json: bool) -> None:
    """Repeat RUN as a new run, with the same recipe, overrides and revisions, on today's site.

    Differences from the first run (image, versions, git commit, data, processes) are printed first.

    \b
    Examples:
      afina rerun /scratch/me/runs/yelp-1a2b3c4d-1
      afina rerun /scratch/me/runs/yelp-1a2b3c4d-1 --submit --time 2:00:00
    """
    from afina.errors import InputError
    from afina.reports.rerun import plan_again
    from afina.reports.rerun import rerun as run_again

    of_a_job = (request.nodes, request.gpus_per_node, request.time_min)
    if not submitted and any(value is not None for value in of_a_job):
        raise InputError("--nodes, --gpus-per-node and --time are for a job", "add --submit, or leave them out")
    if submitted and request.num_processes is not None:
        raise InputError("--num-processes is for this machine", "with --submit use --nodes and --gpus-per-node")
    if dry_run:
        again = plan_again(run_dir, request, local=not submitted)
        if as_json:
            answer = {"plan": again.plan.model_dump(mode="json"), "overrides": again.overrides, "differs": again.notes}
            print(json.dumps(answer, ensure_ascii=False))
            return
        for note in again.notes:
            print(f"afina: differs: {note}")
        print("\n".join(plan_lines(again.plan)))
        return
    made = run_again(run_dir, request, submit=submitted, say=say)
    if not submitted:
        finish(made, as_json)
    elif as_json:
        print(json.dumps({"run": str(made.path), "job_id": made.job_id, "via": request.via}))
    else:
        print(f"afina: submitted job {made.job_id} through {request.via}\n{watch_hint(made)}")


def _print(comparison: Any, tests: Any) -> None:
    """A row for each run: scores, recipe, the rest; in several tables where one is wider than the terminal."""
    import sys

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, markup=False)
    from afina.cli.screen import tables

    if not comparison.recipe:
        print("The recipes are the same.")
    values = {**comparison.metrics, **comparison.recipe, **comparison.about}
    cells = {_HEADS.get(head, head): [_shown(value) for value in column] for head, column in values.items()}
    print("\n".join(tables(comparison.names, cells)).rstrip())
    for name, run in zip(comparison.names, comparison.runs, strict=True):
        for warning in run.warnings:
            console.print(f"warning: {name}: {warning}")
    if tests:
        from rich.table import Table

        from afina.reports.compare import test_rows

        heads, rows, others = test_rows(tests)
        table = Table(*heads, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print("", *([table] if rows else []), *others, sep="\n")


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


COMMANDS = (report, compare, rerun)
