"""Reports: `<folder>/report/index.html`, one self-contained page about one run or about many.

A missing or damaged file leaves its section out: a run that failed or is still training has a page too. The page fetches nothing; its
script is an enhancement. Its charts lie beside it as files. The site's account and the environment are left out, so that the page can be
shared; texts of mistakes can be left out.

    facts      everything that is read         sections, quality, mistakes, work   facts -> HTML
    charts     a chart as a value              page                                the frame, tables
    drawing    charts as SVG and PNG           collection                          many runs on one page
    compare    runs side by side, tests
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path, PosixPath

from afina.errors import EnvironmentProblem, InputError
from afina.files import write_atomic
from afina.reports import mistakes, quality, sections, work
from afina.reports.charts import Chart
from afina.reports.collection import collection_page, comparison_page
from afina.reports.compare import Comparison, Verdict
from afina.reports.drawing import write_figures
from afina.reports.facts import RunFacts, read_facts
from afina.reports.page import document, figures
from afina.run.directory import RunDir, is_run_dir
from afina.watch.find import find_runs, known_runs, resolve_folder

__all__ = ["ReportPage", "write_comparison", "write_report"]

#: Sections that are closed until someone opens them.
_FOLDED = ("Outcome", "Requested and used", "Plan", "Attempts", "Record", "Recipe", "Run it again")


class ReportPage(PosixPath):
    """The path of a page; a notebook shows the page itself."""

    def _repr_html_(self) -> str:
        page = escape(self.read_text(encoding="utf-8"), quote=True)
        return f'<iframe title="{escape(str(self))}" sandbox="allow-scripts" style="width:100%;height:48rem;border:0" srcdoc="{page}"></iframe>'


def write_report(
    path: str | os.PathLike[str] | None = None,
    *,
    png: bool = False,
    texts: bool = True,
    each: bool = False,
    output: str | Path | None = None,
) -> ReportPage:
    """Write the page of a run, or of the runs below a folder (a sweep), over an older page; returns its path.

    Args:
        path: by default the newest run on scratch.
        png: also write the charts as PNG files.
        texts: show the texts of mistakes and of doubtful labels.
        each: for a folder, also write the page of every run in it.
        output: the folder of the page; by default `report` in `path`.

    Raises:
        InputError: the path is no run directory and has none below it, or a plan cannot be read.
        EnvironmentProblem: the page cannot be written.
    """
    path = _newest_run() if path is None else resolve_folder(path)
    if is_run_dir(path):
        run = RunDir(path)
        return ReportPage(_write_run(read_facts(run), Path(output or run.path / "report"), png=png, texts=texts))
    runs = find_runs([path])
    if each:
        for found in runs:
            write_report(found, png=png, texts=texts)
    folder = _made(Path(output or path.absolute() / "report"))
    charts, html = collection_page(path.absolute(), runs, folder, texts=texts)
    write_atomic(folder / "index.html", html(write_figures(folder, charts, png=png)))
    return ReportPage(folder / "index.html")


def write_comparison(
    comparison: Comparison, tests: Sequence[Verdict] | None, output: str | Path, looked: str = ""
) -> Path:
    """Write the page of a comparison, with its charts beside it, into the folder `output`; returns its path.

    Args:
        looked: how often the test split was looked at.

    Raises:
        EnvironmentProblem: it cannot be written.
    """
    folder = _made(Path(output))
    charts, html = comparison_page(comparison, tests, looked)
    write_atomic(folder / "index.html", html(write_figures(folder, charts)))
    return folder / "index.html"


def _newest_run() -> Path:
    """The run on scratch that was claimed last.

    Raises:
        InputError: there is none.
        SiteError: AFINA_SCRATCH is not set or does not exist.
    """
    runs = known_runs()
    if not runs:
        raise InputError("there is no run on scratch yet", "name a run directory, or make one: afina train RECIPE")
    return max(runs, key=lambda run: (run / "plan.json").stat().st_mtime)


def _write_run(facts: RunFacts, folder: Path, *, png: bool, texts: bool) -> Path:
    curves, classes = sections.curves(facts), quality.class_intervals(facts)
    score, thresholds = quality.score_chart(facts), quality.thresholds(facts)
    calibration, reliability = quality.calibration(facts)
    answered, shares = quality.answered(facts)
    lengths, histogram = work.lengths(facts)
    speed, pace = work.speed(facts)
    drawings = write_figures(
        _made(folder),
        [*score, *curves, *classes, *mistakes.matrices(facts), *thresholds, *reliability, *shares, *histogram, *pace],
        png=png,
    )

    def shown(charts: Sequence[Chart]) -> str:
        return figures(charts, drawings)

    body = [
        ("What happened", sections.happened(facts)),
        ("Scores", shown(score) + quality.overall(facts)),
        ("Beside simple models", quality.beside_simple(facts)),
        ("Learning curves", shown(curves) + sections.epochs(facts)),
        ("Each class", quality.classes(facts) + shown(classes)),
        ("Confusion matrix", mistakes.confusion(facts)),
        ("Mistakes", mistakes.worst(facts, texts=texts)),
        ("Thresholds", shown(thresholds)),
        (
            "Predicted and true values" if facts.task == "regression" else "Calibration",
            shown(reliability) + calibration,
        ),
        ("Confidence and coverage", shown(shares) + answered),
        ("Fitted decisions", quality.fitted(facts)),
        ("Methods", sections.methods(facts)),
        ("Data", sections.data(facts)),
        ("Lengths and padding", lengths + shown(histogram)),
        ("Speed", speed + shown(pace)),
        ("Time", work.time_spent(facts)),
        ("Requested and used", work.requested_and_used(facts)),
        ("Outcome", sections.outcome(facts)),
        ("Plan", sections.plan(facts)),
        ("Attempts", sections.attempts(facts)),
        ("Record", sections.record(facts)),
        ("Recipe", sections.recipe(facts)),
        ("Run it again", sections.rerun(facts)),
    ]
    recipe = facts.plan.recipe
    about = f"{recipe.model}, afina {facts.plan.afina_version}"
    write_atomic(folder / "index.html", document(recipe.name, about, sections.summary(facts), body, _FOLDED))
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
