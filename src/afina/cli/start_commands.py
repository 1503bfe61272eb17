"""Commands before the first job: init, doctor, rehearse."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from afina.cli.options import another_command, reading_options, request_options
from afina.errors import EXIT_ENVIRONMENT, InputError
from afina.run.job_request import JobRequest

if TYPE_CHECKING:
    from afina.formats.read_options import ReadOptions
    from afina.site.settings import Site
    from afina.slurm.cluster import Cluster
    from afina.start.examine import Examined
    from afina.start.find_data import LabelledData
    from afina.start.guess_columns import Column

__all__ = ["COMMANDS"]


@click.command()
@click.argument("folder", default=".", metavar="[FOLDER]")
@click.option(
    "--data", metavar="FILE|FOLDER|HUB_ID", help="Labelled texts: CSV, TSV, JSON, Parquet, Arrow, or on the Hub."
)
@reading_options
@click.option("--config", metavar="NAME", help="The Hub data set's configuration.")
@click.option(
    "--text", "texts", multiple=True, metavar="COL", help="The text column; several times for pairs and more."
)
@click.option(
    "--label", "labels", multiple=True, metavar="COL", help="The label column; several 0/1 columns for multi-label."
)
@click.option("--model", metavar="HUB_ID|FOLDER", help="The pretrained model.")
@click.option("--name", help="The run's name.")
@click.option("--scratch", metavar="FOLDER", help="A folder on shared scratch; made if missing.")
@click.option("--image", metavar="FILE", help="The Apptainer image.")
@click.option("--site-only", is_flag=True, help="Write only the site file.")
@click.option("--files", is_flag=True, help="Only copy batch scripts, recipes and examples of sites into FOLDER/slurm.")
@click.option("--yes", is_flag=True, help="Ask nothing, take the defaults.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON; asks nothing.")
def init(**options: Any) -> None:
    """Examine labelled data and this cluster, and write recipe.yaml and slurm/site.env into FOLDER.

    Asks for what the options leave open and suggests a default. A comment in the recipe gives the reason for each choice.
    Nothing is overwritten: an existing recipe.yaml is refused, an existing site file is used.

    \b
    Examples:
      afina init
      afina init project --data reviews.csv --yes
      afina init project --files
      afina init --data train.parquet --text sentence --label class --model ./model
    """
    from afina.site.package import copy_slurm_files
    from afina.slurm.cluster import read_cluster
    from afina.start.init import check_new

    if options.pop("files"):
        copied = copy_slurm_files(Path(options["folder"]))
        print(
            json.dumps({"written": [str(path) for path in copied]})
            if options["as_json"]
            else "\n".join(map(str, copied))
        )
        return
    given = _Given(**options)
    base = Path(given.folder)
    recipe_path = None if given.site_only else check_new(base)
    ask = _Asker(given.yes or given.as_json)
    cluster = read_cluster()
    # The site first: a data set from the Hub needs its scratch, and perhaps its image.
    site_path, site, is_new = _site(given, base, cluster, ask)
    written = [str(site_path)] if is_new else []
    examined: Examined | None = None
    warnings: list[str] = []
    if recipe_path is not None:
        examined, warnings = _recipe(given, recipe_path, base, site, cluster, ask)
        written.append(str(recipe_path))
    following = _next_commands(recipe_path, cluster.partitions != (), site, base)
    if given.as_json:
        about = {"rows": examined.rows, "labels": dict(examined.labels)} if examined else {}
        print(json.dumps({"written": written, **about, "warnings": warnings, "next": following}, ensure_ascii=False))
        return
    for path in written:
        print(f"wrote {path}")
    if examined is not None:
        print(f"{examined.rows:,} rows, {len(examined.labels) or 'no'} labels; the reasons are comments in the recipe")
    for warning in warnings:
        print(f"warning: {warning}")
    print("\n".join(["next:", *(f"  {command}" for command in following)]))


@dataclass(frozen=True)
class _Given:
    """The options of `afina init`; it asks for what is None or empty."""

    folder: str
    data: str | None
    config: str | None
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    model: str | None
    name: str | None
    scratch: str | None
    image: str | None
    site_only: bool
    yes: bool
    as_json: bool
    reading: ReadOptions


def _site(given: _Given, base: Path, cluster: Cluster, ask: _Asker) -> tuple[Path, Site | None, bool]:
    """The existing site file or a new one; the site (None while its image is missing); whether it is new."""
    from afina.site.settings import find_site_file, load_site
    from afina.start.find_machine import find_machine
    from afina.start.init import SITE, write_site

    path = base / SITE
    known = None if given.site_only else find_site_file() or (path if path.is_file() else None)
    if known is not None:
        return known, load_site(known), False
    machine = find_machine(base, os.environ, given.scratch, given.image)
    if not given.scratch and not path.exists():
        chosen = ask("Scratch folder, which every node sees", machine.scratch, "--scratch")
        if chosen != machine.scratch:
            machine = find_machine(base, os.environ, chosen, given.image)
    return *write_site(base, machine, cluster), True


def _recipe(
    given: _Given, path: Path, base: Path, site: Site | None, cluster: Cluster, ask: _Asker
) -> tuple[Examined, list[str]]:
    """Examine the data, ask for what is open, write the recipe; what was examined, and warnings."""
    from afina.start.find_data import data_files_here, default_name, find_data
    from afina.start.find_model import find_model
    from afina.start.init import Choices, examine_all, propose, write_recipe
    from afina.start.recipe_text import DEFAULT_MODEL, MULTILINGUAL_MODEL, data_warnings

    here = data_files_here(base) or data_files_here(Path())
    question = "Data: a file, a folder, or the id of a Hub data set"
    data = find_data(
        given.data or ask(question, str(here[0]) if here else None, "--data"), site, given.config, given.reading
    )
    data = _without_header(given, data, site, ask)
    texts, labels, row_id, split_column = _columns(given, data, ask)
    examined = _with_bar(
        lambda tick: examine_all(data, texts, labels, tick, split_column),
        sum((s.total_rows or 0) for s in data.sources.values()),
    )
    default = MULTILINGUAL_MODEL if examined[0].non_ascii > 0.3 else DEFAULT_MODEL
    model = find_model(given.model or ask("Model: a Hub id or a folder", default, "--model"), list(examined[0].sample))
    name = given.name or ask("Name of the run", default_name(data), "--name")
    proposal = propose(data, Choices(name, texts, labels, row_id, model, split_column), examined, cluster, base)
    write_recipe(path, proposal, site, data)
    return examined[0], data_warnings(proposal)


def _without_header(given: _Given, data: LabelledData, site: Site | None, ask: _Asker) -> LabelledData:
    """The data; where the first line of a CSV or TSV looks like a row and the user says that it is one, read without a header."""
    from afina.formats.read_options import format_of
    from afina.start.find_data import find_data
    from afina.start.guess_columns import columns_of, header_error

    delimited = any(format_of(path) in ("csv", "tsv") for paths in data.files.values() for path in paths)
    if not delimited or given.reading.header is not None or (given.texts and given.labels):
        return data
    error = header_error(columns_of(data.main), data.origin)
    if error is None or not ask.confirm(f"{error.message}. Read it as a row", error):
        return data
    return find_data(data.origin, site, given.config, given.reading.model_copy(update={"header": False}))


def _columns(
    given: _Given, data: LabelledData, ask: _Asker
) -> tuple[tuple[str, ...], tuple[str, ...], str | None, str | None]:
    """The columns of text, label, id and split."""
    from afina.formats.rows import check_file
    from afina.start.guess_columns import check_named, columns_of, guess_columns, guess_split_column

    columns = columns_of(data.main)
    ask.show(_table(columns))
    text, label, row_id = guess_columns(columns)
    texts = given.texts or (ask("Text column", text, "--text"),)
    check_named(columns, texts, "--text", data.origin)
    labels = given.labels or (ask("Label column", None if label in texts else label, "--label"),)
    check_named(columns, labels, "--label", data.origin)
    if set(texts) & set(labels):
        raise InputError("--text: none of the columns may be a label", "name each column once")
    for path in (path for paths in data.files.values() for path in paths):
        check_file(path, (*texts, *labels), data.reading)
    split_column = guess_split_column(columns, (*texts, *labels)) if len(data.sources) == 1 else None
    return texts, labels, row_id if row_id not in (*texts, *labels) else None, split_column


class _Asker:
    """Asks with a default; silent, it takes the default."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent

    def __call__(self, question: str, default: str | None, option: str) -> str:
        if not self.silent:
            try:
                return str(click.prompt(question, default=default, err=True))
            except click.Abort:
                if sys.stdin.isatty():  # Ctrl-C, Ctrl-D
                    raise
            print(file=sys.stderr)
            raise InputError(f"no answer: {question}", f"give it with {option}, or take all defaults with --yes")
        if default is None:
            raise InputError(f"no default: {question}", f"give it with {option}")
        return default

    def confirm(self, question: str, otherwise: InputError) -> bool:
        """Yes or no; raises `otherwise` where nobody can answer."""
        if not self.silent:
            try:
                return click.confirm(question, default=True, err=True)
            except click.Abort:
                if sys.stdin.isatty():
                    raise
            print(file=sys.stderr)
        raise otherwise

    def show(self, text: str) -> None:
        if not self.silent:
            print(text, file=sys.stderr)


def _table(columns: tuple[Column, ...]) -> str:
    width = max(len(c.name) for c in columns)
    lines = [f"  {c.name:<{width}}  {c.distinct:>5} distinct in {c.rows:,} rows   {c.example}" for c in columns]
    return "\n".join(["Columns:", *lines])


def _with_bar(work: Any, total: int) -> Any:
    """Run `work(tick)`, with a progress bar on a terminal where there are many rows."""
    if not sys.stderr.isatty() or total < 20_000:
        return work(None)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the data", total=total)
        return work(lambda rows: bar.update(task, completed=rows))


def _next_commands(recipe: Path | None, slurm: bool, site: Any, folder: Path) -> list[str]:
    # The site file is searched from the working directory.
    enter = [f"cd {shlex.quote(str(folder))}"] if folder.absolute() != Path.cwd() else []
    if recipe is None:
        return [*enter, "afina doctor", "afina init"]
    # In the checkout, before entering the folder.
    build = (
        "container/build.sh --output IMAGE    # in the checkout; IMAGE is the path in site.env, or name your own there"
    )
    image = [build] if site is None else []
    commands = ("doctor", "prefetch", "rehearse", "submit" if slurm else "train")
    return [*image, *enter, *(another_command(command, recipe.name) for command in commands)]


@click.command()
@click.argument("recipe")
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
    from afina import api
    from afina.forecast import evidence as measure
    from afina.forecast.estimate import describe
    from afina.forecast.forecast import forecast
    from afina.run.new_run import prepare
    from afina.site.image import check_image
    from afina.slurm.cluster import read_cluster

    plan = api.plan_for(recipe, request)
    check_image(plan.site)
    prepared = prepare(plan)
    measured = measure.rehearse(plan, prepared, seconds=seconds)
    estimate = forecast(plan, prepared, read_cluster(accounting=False), measured)
    if as_json:
        print(json.dumps({**estimate.to_json(), "measured": measured.model_dump()}))
        return
    steps, step = len(measured.seconds), sum(measured.seconds) / len(measured.seconds)
    memory = f"{measured.peak_bytes / 1e9:.2f} GB"
    if measured.gpu_peak_bytes is not None:
        memory += f", {measured.gpu_peak_bytes / 1e9:.2f} GB of the GPU"
    cut = (
        "network cut"
        if measured.network == "cut"
        else "network not cut: the kernel refuses; offline variables were set"
    )
    print(f"rehearsed on {measured.device_name} ({measured.device}, {measured.threads} threads), {cut}")
    print(
        f"{step:.3f} s per step (mean of {steps}); memory peak {memory} with {measured.longest_tokens:,} tokens in the longest "
        f"batch; checkpoint {(measured.checkpoint_bytes or 0) / 1e9:.3f} GB in {measured.save_seconds or 0:.1f} s"
    )
    print("\n".join(describe(estimate.to_json())))


@click.command()
@click.argument("recipe", required=False)
@request_options(
    "overrides",
    "site",
    "nodes",
    "gpus_per_node",
    nodes="Of that job; by default the recipe's, or one.",
    gpus_per_node="",
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
@click.option("--json", "as_json", is_flag=True)
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
    from afina import doctor as checks
    from afina.doctor.job import try_job
    from afina.site.finding import Finding

    target = _target(recipe, request, quick=is_inside, with_job=with_job)
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
        print(f"{count['ok']} ok, {count['warning']} warnings, {count['failed']} failed")
        if recipe is not None and not count["failed"]:
            print(f"next: {another_command('prefetch', recipe, request)}")
    sys.exit(EXIT_ENVIRONMENT if count["failed"] else 0)


def _target(recipe: str | None, request: JobRequest, *, quick: bool, with_job: bool) -> Any:
    """What the doctor examines. A site or a recipe that cannot be read becomes a finding."""
    from afina import api
    from afina.doctor.target import Target
    from afina.errors import AfinaError
    from afina.run.plan import bare_plan
    from afina.site.settings import environment, load_site
    from afina.slurm.cluster import Cluster, read_cluster

    where = plan = error = None
    env = dict(os.environ)
    try:
        where = load_site(request.site)
        env |= environment(where)
        if recipe is not None:
            plan = api.plan_for(recipe, request)
        elif request.nodes or request.gpus_per_node:
            plan = bare_plan(where, nodes=request.nodes or 1, gpus_per_node=request.gpus_per_node or 0)
    except AfinaError as problem:
        error = problem
    return Target(env, Cluster() if quick else read_cluster(), where, plan, error, recipe is not None, with_job)


_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def _print_finding(finding: Any) -> None:
    level = click.style(f"{finding.level:<8}", fg=_COLOURS[finding.level])
    click.echo(f"{level} {finding.check:<11} {finding.message}")
    if finding.remedy and finding.level != "ok":
        click.echo(f"{'':<20} remedy: {finding.remedy}")


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


COMMANDS = (init, doctor, rehearse)
