"""One page about one run, or about many: `<folder>/report/index.html`, self-contained, from files of the run directories.

Reads what is there and leaves out what is not: a run that failed, or is still training, has a page too. The page fetches nothing and runs no
script; its charts are SVG with a title and a description, and lie beside it as files. Names of the site's account and the environment are
left out, so that it can be shared; texts of mistaken rows are in it unless they are left out. It compares no runs with a test
(`afina.reports.compare` does), and asks Slurm for nothing but `sacct`.

    facts      everything that is read         sections, quality, work   facts -> HTML
    charts     a chart as a value, as SVG      page                      the frame, tables
    figures    charts as files                 collection                many runs on one page
"""

from __future__ import annotations

import sys
from pathlib import Path

from afina.errors import AfinaError, EnvironmentProblem, InputError
from afina.files import write_atomic
from afina.reports import quality, sections, work
from afina.reports.charts import Chart
from afina.reports.collection import collection_page
from afina.reports.facts import Facts, read_facts
from afina.reports.figures import Matrix, write_figures
from afina.reports.page import document, figure
from afina.run.directory import RunDir, is_run_dir
from afina.statistics.predictions import need
from afina.watch.overview import find_runs, place_of

__all__ = ["main", "write_report"]


#: Where nothing is a probability.
_CALIBRATION = {"regression": "Predicted and true values"}


def write_report(path: str | Path, *, png: bool = False, texts: bool = True, each: bool = False) -> Path:
    """Write the page of a run, or of the runs below a folder (a sweep); returns its path. An older page is replaced.

    Args:
        png: also write the charts as PNG files.
        texts: show the texts of mistaken rows.
        each: for a folder, write the page of every run in it too.

    Raises:
        InputError: neither a run directory nor a folder with some in it, or a plan cannot be read.
        EnvironmentProblem: the page cannot be written, or PNG files were asked for and matplotlib is missing.
    """
    if png:
        need("PNG files", "matplotlib")
    path = place_of(path)
    if is_run_dir(path):
        run = RunDir(path)
        return _write_run(read_facts(run), run.path / "report", png=png, texts=texts)
    runs = find_runs([path])
    if each:
        for found in runs:
            write_report(found, png=png, texts=texts)
    folder = _made(path.absolute() / "report")
    page, charts = collection_page(path.absolute(), runs)
    write_figures(folder, charts, png=png)
    write_atomic(folder / "index.html", page)
    return folder / "index.html"


def _write_run(facts: Facts, folder: Path, *, png: bool, texts: bool) -> Path:
    page, charts, matrices = _page(facts, texts=texts)
    _made(folder)
    write_figures(folder, charts, matrices, png=png)
    write_atomic(folder / "index.html", page)
    return folder / "index.html"


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{folder}: {error.strerror}", "free space or correct the permissions") from None
    return folder


def _page(facts: Facts, *, texts: bool) -> tuple[str, list[Chart], list[Matrix]]:
    """The page, its charts, and its confusion matrices for figures."""
    curves = sections.curves(facts)
    calibration, reliability = quality.calibration(facts)
    lengths, histogram = work.lengths(facts)
    speed, pace = work.speed(facts)
    body = [
        ("Outcome", sections.outcome(facts)),
        ("Epochs", sections.epochs(facts)),
        *((name, _drawn(charts)) for name, charts in curves.items()),
        ("Scores", quality.overall(facts)),
        ("Each class", quality.classes(facts)),
        ("Confusion matrix", quality.confusion(facts)),
        (_CALIBRATION.get(facts.task, "Calibration"), _drawn(reliability) + calibration),
        ("Worst mistakes", quality.worst(facts, texts=texts)),
        ("Data", sections.data(facts)),
        ("Lengths and padding", lengths + _drawn(histogram)),
        ("Speed", speed + _drawn(pace)),
        ("Time", work.time_spent(facts)),
        ("Asked for and used", work.asked_and_used(facts)),
        ("Plan", sections.plan(facts)),
        ("Attempts", sections.attempts(facts)),
        ("Record", sections.record(facts)),
        ("Recipe", sections.recipe(facts)),
        ("Run it again", sections.rerun(facts)),
    ]
    recipe = facts.plan.recipe
    about = f"{recipe.model}, afina {facts.plan.afina_version}"
    charts = [*(chart for group in curves.values() for chart in group), *reliability, *histogram, *pace]
    found = {part: quality.confusion_of(facts, part) for part in ("eval", "test")}
    matrices: list[Matrix] = [
        (f"confusion-{part}", f"Confusion matrix on {part}", *m) for part, m in found.items() if m is not None
    ]
    return document(recipe.name, about, sections.summary(facts), body), charts, matrices


def _drawn(charts: list[Chart]) -> str:
    return "".join(map(figure, charts))


def main(argv: list[str] | None = None) -> int:
    """`python -m afina.report RUN_DIR`."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m afina.report RUN_DIR", file=sys.stderr)
        return InputError.exit_code
    try:
        print(write_report(arguments[0]))
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
