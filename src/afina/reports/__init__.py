"""Reports: `<folder>/report/index.html`, one self-contained page about one run or about many.

A missing or damaged file leaves its section out: a run that failed or is still training has a page too. The page fetches nothing and
runs no script; its charts are SVG with a title and a description, and lie beside it as files. The site's account and the environment
are left out, so that the page can be shared; texts of mistakes can be left out. Not covered: tests between runs
(`afina.reports.compare`). Of Slurm only `sacct` is asked.

    facts      everything that is read         sections, quality, work   facts -> HTML
    charts     a chart as a value, its SVG     page                      the frame, tables
    figures    charts as SVG and PNG files     collection                many runs on one page
"""

from __future__ import annotations

import os
from pathlib import Path

from afina.errors import EnvironmentProblem
from afina.files import write_atomic
from afina.reports import quality, sections, work
from afina.reports.charts import Chart
from afina.reports.collection import collection_page
from afina.reports.facts import RunFacts, read_facts
from afina.reports.figures import need_matplotlib, write_figures
from afina.reports.page import document, figure
from afina.run.directory import RunDir, is_run_dir
from afina.watch.find import find_runs, resolve_folder

__all__ = ["write_report"]


def write_report(
    path: str | Path, *, png: bool = False, texts: bool = True, each: bool = False, output: str | Path | None = None
) -> Path:
    """Write the page of a run, or of the runs below a folder (a sweep), over an older page; returns its path.

    Args:
        png: also write the charts as PNG files.
        texts: show the texts of the worst mistakes.
        each: for a folder, also write the page of every run in it.
        output: the folder of the page; by default `report` in `path`.

    Raises:
        InputError: the path is no run directory and has none below it, or a plan cannot be read.
        EnvironmentProblem: the page cannot be written, or `png` without matplotlib.
    """
    if png:
        need_matplotlib()
    path = resolve_folder(path)
    if is_run_dir(path):
        run = RunDir(path)
        return _write_run(read_facts(run), Path(output or run.path / "report"), png=png, texts=texts)
    runs = find_runs([path])
    if each:
        for found in runs:
            write_report(found, png=png, texts=texts)
    folder = _made(Path(output or path.absolute() / "report"))
    page, charts = collection_page(path.absolute(), runs, folder)
    write_figures(folder, charts, png=png)
    write_atomic(folder / "index.html", page)
    return folder / "index.html"


def _write_run(facts: RunFacts, folder: Path, *, png: bool, texts: bool) -> Path:
    page, charts = _page(facts, texts=texts)
    _made(folder)
    write_figures(folder, charts, png=png)
    write_atomic(folder / "index.html", page)
    return folder / "index.html"


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder}: {error.strerror}", "correct the permissions, or write it elsewhere: afina report … -o FOLDER"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EnvironmentProblem(
            f"{folder}: no permission to write", "correct it, or write it elsewhere: afina report … -o FOLDER"
        )
    return folder


def _page(facts: RunFacts, *, texts: bool) -> tuple[str, list[Chart]]:
    """The page and the charts that are files."""
    curves = sections.curves(facts)
    calibration, reliability = quality.calibration(facts)
    lengths, histogram = work.lengths(facts)
    speed, pace = work.speed(facts)
    body = [
        ("Outcome", sections.outcome(facts)),
        ("Methods", sections.methods(facts)),
        ("Epochs", sections.epochs(facts)),
        *((name, _drawn(charts)) for name, charts in curves.items()),
        ("Scores", quality.overall(facts)),
        ("Each class", quality.classes(facts)),
        ("Confusion matrix", quality.confusion(facts)),
        (
            "Predicted and true values" if facts.task == "regression" else "Calibration",
            _drawn(reliability) + calibration,
        ),
        ("Worst mistakes", quality.worst(facts, texts=texts)),
        ("Data", sections.data(facts)),
        ("Lengths and padding", lengths + _drawn(histogram)),
        ("Speed", speed + _drawn(pace)),
        ("Time", work.time_spent(facts)),
        ("Requested and used", work.requested_and_used(facts)),
        ("Plan", sections.plan(facts)),
        ("Attempts", sections.attempts(facts)),
        ("Record", sections.record(facts)),
        ("Recipe", sections.recipe(facts)),
        ("Run it again", sections.rerun(facts)),
    ]
    recipe = facts.plan.recipe
    about = f"{recipe.model}, afina {facts.plan.afina_version}"
    charts = [chart for group in curves.values() for chart in group]
    charts += [*reliability, *histogram, *pace, *quality.matrices(facts)]
    return document(recipe.name, about, sections.summary(facts), body), charts


def _drawn(charts: list[Chart]) -> str:
    return "".join(map(figure, charts))
