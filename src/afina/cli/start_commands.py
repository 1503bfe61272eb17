"""`afina init`: looks at this machine and the data, asks, and writes the recipe and the site file at the end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click

from afina.cli.asker import Asker
from afina.cli.options import another_command, reading_options
from afina.errors import EnvironmentProblem, InputError, SiteError
from afina.text import can_draw, plural

if TYPE_CHECKING:
    from afina.formats.read_options import ReadOptions
    from afina.site.settings import Site
    from afina.slurm.cluster import Cluster
    from afina.start.examine import Examined
    from afina.start.find_data import LabelledData
    from afina.start.find_machine import Machine
    from afina.start.guess_columns import Column
    from afina.start.recipe_text import Proposal

__all__ = ["COMMANDS"]

#: So many columns are named where one must be chosen.
_SHOWN = 12


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
    from afina.start.init import check_new, write_recipe
    from afina.start.recipe_text import data_warnings

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
    ask = Asker(given.yes or given.as_json)
    cluster = read_cluster()
    examined: Examined | None = None
    warnings: list[str] = []
    with _SiteFile(given, base, cluster, ask) as place:
        if recipe_path is not None:
            data, proposal, examined = _proposal(given, base, place, cluster, ask)
            warnings = data_warnings(proposal)
            site = place.write()
            write_recipe(recipe_path, proposal, site, data)
        else:
            site = place.write()
    written = [*place.written, *([str(recipe_path)] if recipe_path else [])]
    warnings = [*place.warnings, *warnings]
    following = _next_commands(recipe_path, cluster.partitions != (), site is None and place.first, base)
    if given.as_json:
        about = {"rows": examined.rows, "labels": dict(examined.labels)} if examined else {}
        print(json.dumps({"written": written, **about, "warnings": warnings, "next": following}, ensure_ascii=False))
        return
    for path in written:
        print(f"wrote {path}")
    if examined is not None:
        print(
            f"{plural(examined.rows, 'row')}, {len(examined.labels) or 'no'} labels; the reasons are comments in the recipe"
        )
    for warning in warnings:
        print(f"warning: {warning}")
    print("\n".join(["next:", *(f"  {command}" for command in following)]))


class _Given(NamedTuple):
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


class _SiteFile:
    """The existing site file, or a new one that is written when everything else is known, or when the Hub needs its scratch.

    Left by an exception, it removes what it made.
    """

    def __init__(self, given: _Given, base: Path, cluster: Cluster, ask: Asker) -> None:
        from afina.site.settings import find_site_file, load_site
        from afina.start.find_machine import find_machine
        from afina.start.init import SITE

        self._base, self._cluster, self._site, self._machine = base, cluster, None, None
        self._made: list[Path] = []
        self.written: list[str] = []
        self.warnings: list[str] = []
        #: What comes first where the site's image is missing.
        self.first: Literal["build", "pull"] = "build"
        path = base / SITE
        known = None if given.site_only else find_site_file() or (path if path.is_file() else None)
        if known is not None:
            try:
                self._site = load_site(known)
            except SiteError as error:  # its image may still have to be built
                self.warnings.append(f"{known}: {error.message}")
            return
        self._machine = find_machine(base, os.environ, given.scratch, given.image)
        if given.scratch or path.exists():
            return

        def usable(scratch: str) -> Machine:
            machine = find_machine(base, os.environ, scratch, given.image)
            _check_creatable(Path(machine.scratch))
            return machine

        self._machine = ask.checked("Scratch folder, which every node sees", self._machine.scratch, "--scratch", usable)

    def write(self) -> Site | None:
        """The site; None while its image is missing."""
        from afina.site.references import is_reference
        from afina.start.init import SITE, write_site

        if self._machine is not None:
            wanted = (Path(self._machine.scratch), self._base.absolute() / SITE)
            self._made = [
                missing[-1] for path in wanted if (missing := [p for p in (path, *path.parents) if not p.exists()])
            ]
            self.first = "pull" if is_reference(self._machine.image or "") else "build"
            path, self._site = write_site(self._base, self._machine, self._cluster)
            self.written, self._machine = [str(path)], None
        return self._site

    def __enter__(self) -> _SiteFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for path in self._made if kind is not None else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _check_creatable(folder: Path) -> None:
    """Refuse a folder that neither exists nor can be made.

    Raises:
        InputError: with the folder above that is in the way.
    """
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "is not writable by you" if above.is_dir() else "is a file"
        raise InputError(f"{folder}: {above} {why}", "name a folder that you can write: --scratch FOLDER")


def _proposal(
    given: _Given, base: Path, place: _SiteFile, cluster: Cluster, ask: Asker
) -> tuple[LabelledData, Proposal, Examined]:
    """Examine the data and ask for what is open; nothing is written but a site for a data set on the Hub."""
    from afina.recipe.schema import Recipe
    from afina.start.find_data import data_files_here, default_name, find_data
    from afina.start.find_model import find_model
    from afina.start.init import Choices, examine_all, propose
    from afina.start.recipe_text import DEFAULT_MODEL, MULTILINGUAL_MODEL

    def data_of(text: str) -> LabelledData:
        try:
            return find_data(text, None, given.config, given.reading)
        except EnvironmentProblem:  # on the Hub: fetching needs scratch
            return find_data(text, place.write(), given.config, given.reading)

    here = data_files_here(base) or data_files_here(Path())
    question = "Data: a file, a folder, or the id of a Hub data set"
    data = ask.checked(question, str(here[0]) if here else None, "--data", data_of, given.data)
    data = _without_header(given, _as_it_is_written(given, data, ask), ask)
    texts, labels, row_id, guessed = _columns(given, data, ask)
    examined = _with_bar(
        lambda tick: examine_all(data, texts, labels, tick, guessed["split_column"]),
        sum((s.total_rows or 0) for s in data.sources.values()),
    )
    default = MULTILINGUAL_MODEL if examined[0].non_ascii > 0.3 else DEFAULT_MODEL
    sample = list(examined[0].sample)
    model = ask.checked(
        "Model: a Hub id or a folder", default, "--model", lambda text: find_model(text, sample), given.model
    )

    def usable_name(text: str) -> str:
        Recipe(name=text, model="x", data={"hub": "x", "text": "text", "label": "label"})  # type: ignore[arg-type]
        return text

    name = ask.checked("Name of the run", default_name(data), "--name", usable_name, given.name)
    proposal = propose(data, Choices(name, texts, labels, row_id, model, **guessed), examined, cluster, base)
    return data, proposal, examined[0]


def _as_it_is_written(given: _Given, data: LabelledData, ask: Asker) -> LabelledData:
    """The data, read in the encoding and with the separator of its first file where nobody has given others, and nobody objects."""
    from afina.start.find_data import find_data
    from afina.start.guess_reading import guess_reading

    first = next((path for paths in data.files.values() for path in paths), None)
    reading, reasons = given.reading, dict[str, str]()
    for guess in guess_reading(first, reading) if first is not None else ():
        if ask.silent and not guess.certain:
            break
        question = f"{first}: {guess.reason}. Read it with {guess.key} {guess.value}"
        if not ask.silent and not ask.confirm(question, InputError(question, f"give it with --{guess.key}")):
            break
        reading, reasons[guess.key] = reading.model_copy(update={guess.key: guess.option}), guess.reason
    if not reasons:
        return data
    return replace(find_data(data.origin, None, given.config, reading), guessed=reasons)


def _without_header(given: _Given, data: LabelledData, ask: Asker) -> LabelledData:
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
    reading = data.reading.model_copy(update={"header": False})
    return replace(find_data(data.origin, None, given.config, reading), guessed=data.guessed)


def _columns(
    given: _Given, data: LabelledData, ask: Asker
) -> tuple[tuple[str, ...], tuple[str, ...], str | None, dict[str, Any]]:
    """The columns of text, label and id; and those that look like something else, by the key of `Choices`."""
    from afina.formats.rows import check_file
    from afina.start.guess_columns import (
        check_named,
        columns_of,
        guess_columns,
        guess_group,
        guess_split_column,
        guess_weight,
        other_labels,
    )

    columns = columns_of(data.main)
    ask.show(_table(columns))
    text, label, row_id = guess_columns(columns)
    there = ", ".join(f"`{c.name}`" for c in columns[:_SHOWN]) + ", …" * (len(columns) > _SHOWN)

    def named(option: str, others: tuple[str, ...] = ()) -> Callable[[str], tuple[str, ...]]:
        def check(name: str, *more: str) -> tuple[str, ...]:
            check_named(columns, (name, *more), option, data.origin)
            if {name, *more} & set(others):
                raise InputError("--text: none of the columns may be a label", "name each column once")
            return (name, *more)

        return check

    texts = (
        named("--text")(*given.texts)
        if given.texts
        else ask.checked("Text column", text, f"--text, one of {there}", named("--text"))
    )
    of_label = named("--label", texts)
    guessed = None if label in texts else label
    labels = (
        of_label(*given.labels)
        if given.labels
        else ask.checked("Label column", guessed, f"--label, one of {there}", of_label)
    )
    for path in (path for paths in data.files.values() for path in paths):
        check_file(path, (*texts, *labels), data.reading)
    taken = (*texts, *labels)
    row_id = row_id if row_id not in taken else None
    others = [{c.name for c in columns_of(source)} for source in data.sources.values() if source is not data.main]
    shared = [c for c in columns if all(c.name in names for names in others)]
    by_name: dict[str, Any] = {
        "split_column": guess_split_column(columns, taken) if len(data.sources) == 1 else None,
        "group": guess_group(shared, (*taken, row_id or "")),
        "weight": guess_weight(columns, taken),
        "other_labels": () if given.labels or not ask.silent else other_labels(columns, texts, labels[0]),
    }
    return texts, labels, row_id, by_name


def _table(columns: tuple[Column, ...]) -> str:
    width = max(len(c.name) for c in columns)
    lines = [f"  {c.name:<{width}}  {c.distinct:>5} distinct in {plural(c.rows, 'row')}   {c.example}" for c in columns]
    return "\n".join(["Columns:", *lines])


def _with_bar(work: Any, total: int) -> Any:
    """Run `work(tick)`, with a progress bar on a terminal where there are many rows."""
    if not can_draw(sys.stderr) or total < 20_000:
        return work(None)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the data", total=total)
        return work(lambda rows: bar.update(task, completed=rows))


def _next_commands(recipe: Path | None, slurm: bool, image: Literal[False, "build", "pull"], folder: Path) -> list[str]:
    """The next commands after `afina init`; `image`: how to get the one that is missing."""
    # The site file is searched from the working directory.
    enter = [f"cd {shlex.quote(str(folder))}"] if folder.absolute() != Path.cwd() else []
    if recipe is None:
        return [*enter, "afina doctor", "afina init"]
    # In the checkout, before entering the folder.
    build = (
        "container/build.sh --output IMAGE    # in the checkout; IMAGE is the path in site.env, or name your own there"
    )
    commands = ("doctor", "prefetch", "rehearse", "submit" if slurm else "train")
    before, pull = [build] if image == "build" else [], ["afina image pull"] if image == "pull" else []
    return [*before, *enter, *pull, *(another_command(command, recipe.name) for command in commands)]


COMMANDS = (init,)
