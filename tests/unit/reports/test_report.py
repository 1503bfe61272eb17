"""The report: sections, charts, files; and that no text of a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from tests.bench.page import Browser
from tests.unit.conftest import Ran, tree

from afina.errors import EnvironmentProblem, Failure, InputError
from afina.recipe.schema import Recipe
from afina.reports import charts, drawing, write_report
from afina.reports import page as page_colours
from afina.reports.charts import thin
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.outcome import Outcome
from afina.run.plan import make_plan
from afina.site.settings import Site

MakeRun = Callable[..., RunDir]
EVIL = "<script>alert(1)</script> & \"quoted\" 'it' </pre>"


@pytest.fixture
def make_run(tmp_path: Path, site: Site, recipe: Callable[..., Recipe], model_folder: Path) -> MakeRun:
    """A claimed run directory, written by the code that writes real ones."""

    def make(labels: list[str] | None = None, **changes: Any) -> RunDir:
        loaded = recipe(model=str(model_folder), **changes)
        plan = make_plan(loaded, site, recipe_file=tmp_path / "re cipes, 'mine'/recipe.yaml")
        text = json.dumps(loaded.model_dump(mode="json"))
        prepared = {
            "prepared": "/scratch/prepared/1",
            "labels": labels or ["1", "2", "3"],
            "rows": {"train": 600, "eval": 200},
            "tokens": {"train": 12345, "eval": 4321},
            "warnings": ["label '3' occurs once in train"],
        }
        return claim(plan, prepared, ["python"], text, tmp_path / "run <&> 'x'")

    return make


def finish(run: RunDir, **fields: Any) -> None:
    folder = run.begin_attempt()
    (folder / "env.json").write_text(
        json.dumps({"host": "node<1>", "started": 0, "geometry": {"nodes": 2, "processes_per_node": 2}})
    )
    given: dict[str, Any] = {
        "outcome": "finished",
        "exit_code": 0,
        "attempt": folder.name,
        "global_step": 40,
        "max_steps": 40,
        "samples_per_second": 12.5,
        "labels": ["1", "2", "3"],
        "metrics": {
            "eval_loss": 0.5,
            "eval_accuracy": 0.75,
            "eval_f1_per_class": [0.11, 0.22, 0.33],
            "eval_confusion_matrix": [[5, 1, 0], [2, 6, 0], [0, 0, 0]],
        },
    }
    run.record(Outcome(**{**given, **fields}))


def log(run: RunDir, *lines: dict[str, Any]) -> None:
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


CURVE = (
    {"step": 10, "epoch": 0.5, "loss": 1.5},
    {"step": 20, "epoch": 1.0, "loss": 1.0},
    {"step": 20, "epoch": 1.0, "eval_loss": 0.9, "eval_accuracy": 0.5, "eval_f1_per_class": [0.1]},
    {"step": 40, "epoch": 2.0, "loss": 0.7},
    {"step": 40, "epoch": 2.0, "eval_loss": 0.5, "eval_accuracy": 0.75, "training_loss": 0.8125},
)


def test_simple_models_stand_beside_the_model_with_their_differences(make_run: MakeRun) -> None:
    run = make_run()
    one = {
        "metric": "accuracy",
        "first": 0.8125,
        "second": 0.75,
        "low": -0.1,
        "high": 0.02,
        "p": 0.21,
        "test": "McNemar",
    }
    tfidf = {"name": "TF-IDF and logistic regression", "rows": 500, "of": 600, "seconds": 1.0}
    models = [
        {**about, "scores": {"accuracy": [0.8125, 0.7, 0.9]}, "differences": [one]}
        for about in ({"name": "most"}, tfidf)
    ]
    embedded = {
        **models[1],
        "name": "frozen embeddings and logistic regression",
        "features": "over vectors",
        "compared": [40, 600],
    }
    left_out = {"name": "frozen embeddings", "left_out": "no memory", "scores": {}, "differences": []}
    finish(run, baselines={"eval": [*models, embedded]})
    text = Page(write_report(run.path)).text
    assert (
        "frozen embeddings and logistic regression over vectors, texts cut" in text
        and "; compared on a sample of 40 of 600 rows." in text
    )
    assert "over vectors, 500 rows of train) had accuracy 0.8125 on 40 rows of eval, this model 0.75." in text
    finish(run, baselines={"eval": [*models, left_out]})
    text = Page(write_report(run.path)).text
    assert "frozen embeddings: left out: no memory" in text
    assert "0.8125" in text and "-0.0625" in text and "-0.1000" in text and "a sample of 500 of 600 rows" in text
    assert (
        text.count("the model is not better than TF-IDF and logistic regression: accuracy on eval 0.75 against 0.8125")
        == 1
    )
    assert "had accuracy 0.8125 on eval, this model 0.75." in text, "in Methods"
    finish(run)
    assert "TF-IDF" not in Page(write_report(run.path)).text


def test_fitted_decisions_have_a_section_with_what_they_change(make_run: MakeRun) -> None:
    run = make_run()
    f1 = {
        "metric": "f1",
        "first": 0.5,
        "second": 0.625,
        "low": 0.03125,
        "high": 0.25,
        "p": 0.01,
        "test": "paired bootstrap",
    }
    record = {"temperature": 2.5, "thresholds": {"1": 0.25}, "notes": ["2: the threshold is 0.5: few"], "rows": 200}
    finish(
        run,
        decisions={
            **record,
            "measured_on": "eval",
            "cross_fitted": True,
            "calibration_error": [0.25, 0.125],
            "differences": [f1],
        },
    )
    text = Page(write_report(run.path)).text
    for shown in (
        "-0.1250",
        "+0.1250",
        "+0.0312",
        "+0.2500",
        "0.010",
        "2: the threshold is 0.5: few",
        "each fifth of its rows",
    ):
        assert shown in text, shown
    assert (
        "Temperature 2.5, fitted on eval; on eval, each fifth of its rows by what was fitted on the others" in text
    ), "Methods"
    finish(
        run,
        decisions={"temperature": None, "thresholds": {}, "notes": ["no temperature: there are 3 rows, 50 are needed"]},
    )
    text = Page(write_report(run.path)).text
    assert "Nothing was fitted." in text and "there are 3 rows" in text and "--plain leaves them out" not in text
    finish(run)
    assert "Fitted decisions" not in Page(write_report(run.path)).text


SHARED = "12 of 200 rows of eval are in train too, as the model reads them: b.csv, row 1 = a.csv, row 5"


def test_a_warning_about_the_data_stands_beside_the_numbers_that_it_spoils(make_run: MakeRun) -> None:
    run = make_run()
    finish(run, warnings=[SHARED, "the model gives every text the label '1'"])
    log(run, *CURVE)
    about = json.loads((run.path / "prepared.json").read_text())
    (run.path / "prepared.json").write_text(json.dumps({**about, "spoiled": {"eval": [SHARED], "test": ["none here"]}}))
    text = Page(write_report(run.path)).text
    assert text.count(SHARED) == 3, "at the top, epochs, classes"
    assert text.count("the model gives every text") == 1 and "none here" not in text
    # As an older afina recorded it.
    old = "3 of 200 rows of eval are in train too, word for word: b.csv, row 1 = a.csv, row 5"
    (run.path / "prepared.json").write_text(json.dumps({**about, "warnings": [old]}))
    assert Page(write_report(run.path)).text.count(old) == 4


class Page(HTMLParser):
    """The page as a tree walk: every element closed in order, its texts, its tables."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "wbr"})

    #: The page without its own script, and that script.
    OURS = (Path(charts.__file__).parent / "page.js").read_text("utf-8")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        assert self.source.count(f"<script>{self.OURS}</script>") == 1
        self.source = self.source.replace(f"<script>{self.OURS}</script>", "")
        self.open: list[str] = []
        self.names: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        values = dict(attrs)
        self.ids += [i for i in [values.get("id")] if i]
        assert not {"src", "onload", "onclick"} & values.keys(), "the page fetches or runs something"
        self.links += [v for v in [values.get("href")] if v is not None and tag == "a"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def svgs(self) -> dict[str, ElementTree.Element]:
        """By key."""
        parts = re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)
        found = [ElementTree.fromstring(s.replace("xlink:href", "href")) for s in parts]
        return {str(svg.get("aria-labelledby")).split()[0].removesuffix("-title"): svg for svg in found}


def data_of(svg: ElementTree.Element, part: str) -> list[list[tuple[float, float]]]:
    """The values that are drawn as `part` (`d0`, `m1`, …), read back from the drawing as the page's script does it."""
    x0, y0, x1, y1 = map(float, str(svg.get("data-box")).split())
    left, right, low, high = map(float, str(svg.get("data-limits")).split())
    key = str(svg.get("aria-labelledby")).split()[0].removesuffix("title")
    paths = []
    for group in svg.iter():
        if group.get("id") == key + part:
            for path in group.iter("path"):
                numbers = list(map(float, re.findall(r"-?[\d.]+", str(path.get("d")))))
                if path.get("id") is None:
                    points = zip(numbers[::2], numbers[1::2], strict=True)
                    paths.append(
                        [
                            (left + (x - x0) / (x1 - x0) * (right - left), high - (y - y0) / (y1 - y0) * (high - low))
                            for x, y in points
                        ]
                    )
    return paths


def test_a_finished_run_has_every_section(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    path = write_report(run.path)
    assert path == run.path / "report/index.html"
    page = Page(path)
    assert page.headings == [
        "amazon-stars",
        *("Scores", "Learning curves", "Each class", "Confusion matrix", "Methods", "Data", "Warnings", "Speed"),
        *("Outcome", "Plan", "Attempts", "Record", "Recipe", "Run it again"),
    ]
    assert page.names.count("h1") == 1 and page.names.count("html") == page.names.count("main") == 1
    assert ["1", "20", "1.0000", "0.9000", "0.5000"] in page.rows
    assert ["2", "40", "0.8125", "0.5000", "0.7500"] in page.rows, (
        "the mean since the evaluation before, as the log has it"
    )
    assert ["eval_accuracy", "0.7500"] in page.rows
    assert ["outcome", "finished"] in page.rows and ["steps", "40 of 40"] in page.rows
    assert ["2", "0.2200"] in page.rows, "F1 of the second class"
    assert ["2", "2", "6", "0"] in page.rows, "the second row of the confusion matrix"
    assert ["train", "600", "12,345"] in page.rows
    assert ["local-1", "1970-01-01 00:00:00 UTC", "node<1>", "4", "–", "0"] in page.rows
    assert "label '3' occurs once in train" in page.text


def test_the_page_is_self_contained_and_has_a_dark_mode(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    page = Page(write_report(run.path))
    assert "prefers-color-scheme: dark" in page.source and 'lang="en"' in page.source
    assert not re.search(r"https?://|url\((?!#)|@import|<link|<img", page.source)
    digest = base64.b64encode(hashlib.sha256(Page.OURS.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in page.source
    assert not any(colour in page.source.partition("</style>")[2] for colour in drawing.LIGHT.values())
    assert len(page.ids) == len(set(page.ids))
    assert len(page.links) == 13 and {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert page.names.count("details") == 6, "plan, attempts and record are folded away"


def test_colours_have_the_contrast_that_wcag_wants() -> None:
    """WCAG 2.2, 1.4.3 and 1.4.11: 4.5 for text, 3 for the lines of charts, on the page and on its cards, light and dark."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colours in ({**drawing.LIGHT, **page_colours._PAGE}, page_colours._DARK):
        lines = dict.fromkeys((name for name in colours if name.startswith("line")), 3.0)
        for name, least in {"text": 4.5, "soft": 4.5, **lines}.items():
            for behind in ("page", "card"):
                darker, lighter = sorted((luminance(colours[name]), luminance(colours[behind])))
                assert (lighter + 0.05) / (darker + 0.05) >= least, (name, behind)


def test_charts_have_a_description_in_words_and_hold_their_values(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    svgs = Page(write_report(run.path)).svgs()
    assert list(svgs) == ["loss", "metrics"]
    for svg, title in zip(svgs.values(), ("Loss by step", "Metrics by step"), strict=True):
        assert svg.get("role") == "img"
        named = [svg.find(f"*[@id='{i}']") for i in str(svg.get("aria-labelledby")).split()]
        assert [n.tag for n in named if n is not None] == ["title", "desc"] and named[0] is not None
        assert named[0].text == title
    desc = svgs["loss"].find("desc")
    assert desc is not None
    assert desc.text == "training: 1.5 at step 10, 0.7 at step 40; validation: 0.9 at step 20, 0.5 at step 40."
    assert json.loads(str(svgs["loss"].get("data-names"))) == ["training", "validation"]
    for part, points in (("d0", [(10, 1.5), (20, 1.0), (40, 0.7)]), ("d1", [(20, 0.9), (40, 0.5)])):
        assert [pytest.approx(point, rel=2e-3) for point in points] == data_of(svgs["loss"], part)[0]
    dashes = [
        re.search(r"stroke-dasharray: ([\d., ]+)", ElementTree.tostring(g, "unicode"))
        for g in svgs["loss"].iter("g")
        if str(g.get("id")).startswith("loss-d")
    ]
    assert [dash is None for dash in dashes] == [True, False], "colour is not the only sign"
    assert "best: 0.7500 at step 40" in str(svgs["metrics"].find("desc").text)  # type: ignore[union-attr]


def test_a_long_curve_is_smoothed_and_its_values_stay_visible(make_run: MakeRun) -> None:
    run = make_run()
    loss = [2 - i / 10_000 + (-1) ** i / 10 for i in range(10_000)]
    log(run, *({"step": i, "loss": value} for i, value in enumerate(loss, start=1)), {"step": 10_000, "eval_loss": 1.0})
    path = write_report(run.path)
    page = Page(path)
    svg = page.svgs()["loss"]
    (line,), (pale,) = data_of(svg, "d0"), data_of(svg, "f0")
    assert max(abs(y - (2 - x / 10_000)) for x, y in line[50:]) < 0.03 and max(y for _, y in pale) > 2.05
    assert re.search(
        r"Strong line: moving average over about 400 values of training; pale: the values themselves\. 8\d\d of 20,001 points are drawn",
        page.text,
    )
    assert path.stat().st_size < 150_000


def test_a_single_evaluation_a_flat_line_and_missing_values_are_drawn(make_run: MakeRun) -> None:
    run = make_run()
    log(
        run,
        {"step": 5, "epoch": 1, "eval_loss": 0.5, "eval_pearson": None, "eval_mse": 0.0, "eval_mae": float("nan")},
    )
    svgs = Page(write_report(run.path)).svgs()
    for svg in svgs.values():
        assert not re.search(r"\bnan|\binf\b", ElementTree.tostring(svg, "unicode"), re.IGNORECASE)
    assert list(svgs) == ["loss", "errors"]


def test_no_text_of_a_run_becomes_markup(make_run: MakeRun) -> None:
    run = make_run([EVIL, "a", "b"], name=EVIL.replace("/", ""), data__label=EVIL)
    finish(run, labels=[EVIL, "a", "b"], outcome="failed", exit_code=4, error=EVIL, device=EVIL)
    prepared = json.loads((run.path / "prepared.json").read_text())
    (run.path / "prepared.json").write_text(json.dumps({**prepared, "warnings": [EVIL], "rows": {EVIL: 1}}))
    log(run, *CURVE, {"step": 41, "epoch": 3, "eval_loss": 1.0, f"eval_{EVIL}": 0.5})
    page = Page(write_report(run.path))
    assert "script" not in page.names
    assert page.text.count(EVIL) >= 6
    for svg in page.svgs().values():
        assert svg.find(".//script") is None


def test_a_run_that_has_not_finished_says_what_happened_and_what_to_type(make_run: MakeRun) -> None:
    run = make_run()
    where = shlex.quote(str(run.path))
    page = Page(write_report(run.path))
    assert "Planned" in page.text and "No outcome is recorded" in page.text and f"afina submit {where}" in page.text
    name = run.begin_attempt().name
    run.record_failure(name, Failure("TrainingError", "the loss is nan at step 3", "lower the learning rate"))
    page = Page(write_report(run.path))
    assert page.headings[:3] == ["amazon-stars", "What happened", "What to do next"]
    assert "the loss is nan at step 3" in page.text and "Learning curves" not in page.headings and not page.svgs()
    assert f"lower the learning rate; then: afina resume {where}" in page.text
    assert f"afina logs {where}" in page.text and f"\nafina resume {where}" in page.text
    assert "We fine-tuned" not in page.text
    run.record(Outcome(outcome="stopped", exit_code=75, attempt=name, cause="limit", global_step=20, max_steps=40))
    log(run, *CURVE[:3])
    page = Page(write_report(run.path))
    assert "Stopped at step 20 of 40: at the time limit" in page.text and "What failed" not in page.source
    assert list(page.svgs()) == ["loss", "metrics"] and f"afina resume {where}" in page.text


def test_damaged_files_leave_their_section_out(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    (run.path / "prepared.json").write_text('{"rows": ')
    (run.attempts / "local-1/env.json").write_text("[]")
    (run.path / "recipe.yaml").unlink()
    run.metrics_file.write_text(json.dumps(CURVE[2]) + '\n{"step": 41, "eva')
    page = Page(write_report(run.path))
    assert "Data" not in page.headings and "Learning curves" in page.headings
    assert "recipe.yaml is missing: the recipe is taken from plan.json" in page.text
    assert ["local-1", "–", "–", "–", "–", "0"] in page.rows


def test_the_account_and_the_environment_are_left_out(tmp_path: Path, scratch: Path, make_run: MakeRun) -> None:
    run = make_run()
    plan = json.loads(run.plan_file.read_text())
    plan["site"]["sbatch"] = {"SBATCH_ACCOUNT": "secret-project"}
    plan["site"]["setup"] = ["MY_SETTING"]
    run.plan_file.write_text(json.dumps(plan))
    finish(run)
    source = write_report(run.path).read_text("utf-8")
    assert "secret-project" not in source and "MY_SETTING" not in source


def test_nothing_but_the_page_and_its_figures_is_written_and_a_second_one_replaces_it(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    before = tree(run.path)
    first = write_report(run.path).read_text("utf-8")
    assert write_report(run.path).read_text("utf-8") == first
    after = tree(run.path)
    new = {
        str(run.path / "report"),
        *(
            str(run.path / "report" / n)
            for n in ("index.html", *(f"{key}.svg" for key in ("loss", "metrics", "confusion-eval")))
        ),
    }
    assert after.keys() - before.keys() == new
    assert {k: v for k, v in after.items() if k not in new} == before


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_page_that_cannot_be_written_is_an_error(make_run: MakeRun) -> None:
    run = make_run()
    (run.path / "report").write_text("in the way")
    with pytest.raises(EnvironmentProblem):
        write_report(run.path)


def test_the_command_prints_the_page(make_run: MakeRun, command: Callable[..., Ran]) -> None:
    run = make_run()
    assert command("report", run.path).stdout == f"{run.path / 'report/index.html'}\n"


def test_without_a_name_it_is_about_the_newest_run(
    make_run: MakeRun, command: Callable[..., Ran], scratch: Path
) -> None:
    refused = command("report")
    assert refused.returncode == 2 and "there is no run on scratch yet" in refused.stderr
    for at, where in enumerate(("runs/old", "sweeps/rates/runs/new", "runs/middle")):
        run = make_run()
        (scratch / where).parent.mkdir(parents=True, exist_ok=True)
        run.path.rename(scratch / where)
        os.utime(scratch / where / "plan.json", (0, (1, 3, 2)[at]))
    done = command("report")
    assert done.stdout == f"{scratch / 'sweeps/rates/runs/new/report/index.html'}\n", done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.timeout(200)
def test_values_zoom_and_sorting_in_a_browser(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    page = write_report(run.path)
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        browser.call("Page.navigate", url=page.as_uri())
        browser.wait_for("Page.loadEventFired")
        place = "(() => { const s = document.querySelector('svg[data-box]'); s.scrollIntoView(); const r = s.getBoundingClientRect(); "
        x, y, width, height = browser.evaluate(place + "return [r.left, r.top, r.width, r.height] })()")

        def mouse(kind: str, across: float, down: float, count: int = 0) -> None:
            button: Any = {"button": "left", "buttons": 1, "clickCount": count} if count else {}
            where = {"x": x + across * width, "y": y + down * height}
            browser.call("Input.dispatchMouseEvent", type=f"mouse{kind}", **where, **button)

        mouse("Moved", 0.97, 0.5)
        shown = browser.evaluate("document.getElementById('value').textContent")
        assert re.fullmatch(
            r"step (40|39\.99\d*|40\.00\d*)\ntraining: 0\.[67]\d*\nvalidation: 0\.(5|49|50)\d*", shown
        ), shown
        ticks = "[...document.querySelector('svg[data-box]').querySelectorAll('.tick-x text')].map(t => +t.textContent)"
        before = browser.evaluate(ticks)
        mouse("Pressed", 0.4, 0.3, 1)
        mouse("Moved", 0.6, 0.6, 1)
        mouse("Released", 0.6, 0.6, 1)
        after = browser.evaluate(ticks)
        assert max(after) - min(after) < 0.4 * (max(before) - min(before))
        for count in (1, 2):
            mouse("Pressed", 0.5, 0.5, count)
            mouse("Released", 0.5, 0.5, count)
        assert browser.evaluate(ticks) == before
        column = "[...[...document.querySelectorAll('table.sortable')].find(t => t.caption.textContent.startsWith('One row per evaluation')).tBodies[0].rows].map(r => r.cells[1].textContent)"
        assert browser.evaluate(column) == ["20", "40"]
        browser.evaluate("[...document.querySelectorAll('th button')].find(b => b.textContent === 'step').click()")
        assert browser.evaluate(column) == ["40", "20"]
        assert [e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")] == []
    finally:
        browser.close()


def test_the_page_can_lie_elsewhere_and_a_refusal_names_the_permission(
    make_run: MakeRun, command: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    before = tree(run.path)
    done = command("report", run.path, "-o", tmp_path / "else where/page")
    assert done.stdout == f"{tmp_path / 'else where/page/index.html'}\n" and tree(run.path) == before
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(EnvironmentProblem, match="no permission to write") as caught:
        write_report(run.path)
    assert "-o FOLDER" in caught.value.remedy and "quota" not in caught.value.remedy


def test_the_recipe_is_that_of_the_plan(make_run: MakeRun) -> None:
    run = make_run(train__learning_rate=1e-4)
    (run.path / "recipe.yaml").write_text("name: x\ntrain: {learning_rate: 9.0e-9}\n")
    page = Page(write_report(run.path))
    assert '"learning_rate": 0.0001' in page.text and "9.0e-9" not in page.text
    assert "do not give the recipe that was run" in page.text


def test_a_methods_paragraph_can_be_quoted(make_run: MakeRun, model_folder: Path) -> None:
    run = make_run(train__best_metric="f1", train__arguments={"weight_decay": 0.05, "lr_scheduler_type": "cosine"})
    prepared = json.loads((run.path / "prepared.json").read_text())
    (run.path / "prepared.json").write_text(json.dumps({**prepared, "task": "single-label", "digest": "ab12"}))
    finish(run, task="single-label", model_step=20, world_size=4, device="cuda")
    env = {
        "python": "3.12.1",
        "versions": {"torch": "2.13", "transformers": "5.17"},
        "hardware": {"gpus": ["NVIDIA H200"]},
    }
    (run.attempts / "local-1/env.json").write_text(json.dumps(env))
    run.event(
        "precision", attempt="local-1", precision="bf16", compile=False, device={"kind": "cuda", "name": "NVIDIA H200"}
    )
    text = Page(write_report(run.path)).text
    for part in (
        f"We fine-tuned {model_folder.name}",
        "for single-label classification (3 labels) on reviews.csv; the prepared data has the SHA-256 ab12, with afina",
        "train 600 rows (a fraction of 0.8, by a hash of the text, seed 42, a sample of 600 by a hash of the text, seed 42)",
        "AdamW (β1 0.9, β2 0.999, ε 1e-08, weight decay 0.05, gradients clipped at 1); learning rate 5e-05, cosine schedule",
        "8 examples per step, 1 epochs (40 steps), seed 1",
        "trained in bf16 with 4 processes on NVIDIA H200 (Python 3.12.1, PyTorch 2.13, Transformers 5.17)",
        "The checkpoint with the highest f1 on eval was kept (step 20), so that scores on eval are a little too kind.",
    ):
        assert part in text, part


def test_models_of_no_use_are_called_so(make_run: MakeRun) -> None:
    """By the run, or where it is older than that by what its predictions say."""
    run = make_run()
    finish(run)
    predict(run)
    table = pq.read_table(run.predictions)
    same = table.set_column(table.column_names.index("prediction"), "prediction", pa.array(["2"] * len(table)))
    pq.write_table(same, run.predictions)
    assert "the model predicts '2' for every row of eval" in Page(write_report(run.path)).text
    outcome = json.loads(run.outcome_file.read_text())
    run.outcome_file.write_text(json.dumps({**outcome, "warnings": ["the loss diverged"]}))
    text = Page(write_report(run.path)).text
    assert "the loss diverged" in text and "for every row" not in text


def test_metrics_of_ones_own_and_undefined_ones_are_shown(make_run: MakeRun) -> None:
    run = make_run(metrics=["accuracy", "costs:total:lower", "auroc"], train__best_metric="total")
    undefined = {"total": "costs.total returned None"}
    metrics = {"eval_total": 1.25, "test_total": None, "test_undefined": undefined, "test_loss": 0.5}
    finish(run, metrics=metrics, task="single-label")
    predict(run)
    predict(run, part="_test")
    page = Page(write_report(run.path))
    assert ["total", "1.2500", "–", "–", "–"] in page.rows and "total on eval" in page.text
    assert "total: no interval; a metric of one's own is computed once, on all rows" in page.text
    assert "total is not defined on test: costs.total returned None." in page.text
    assert sum(row[0] == "auroc" for row in page.rows) == 2 and "kappa_quadratic" not in page.text


# -- what needs predictions, events, records, accounting ---------------------------------------------------------------


def predict(run: RunDir, *, texts: list[str] | None = None, part: str = "") -> None:
    """Predictions of 90 rows: label 1 always right, 2 half, 3 never; the confidence grows with the row."""
    truth = [1 + i % 3 for i in range(90)]
    predicted = [1 if t == 1 or t == 3 or i % 2 else 2 for i, t in enumerate(truth)]
    sure = [0.5 + i / 200 for i in range(90)]
    table = {
        "row": list(range(90)),
        "file": ["some where/reviews.csv"] * 90,
        "id": [f"r{i}" for i in range(90)],
        "text": texts or [f"text number {i} " + "long " * 100 for i in range(90)],
        "label": list(map(str, truth)),
        "prediction": list(map(str, predicted)),
        **{
            f"score: {k}": [s if p == k else (1 - s) / 2 for p, s in zip(predicted, sure, strict=True)]
            for k in (1, 2, 3)
        },
    }
    pq.write_table(pa.table(table), run.path / f"predictions{part}.parquet")


def test_predictions_give_intervals_calibration_and_mistakes(make_run: MakeRun) -> None:
    run = make_run()
    finish(run, metrics={"eval_loss": 0.5})
    predict(run)
    page = Page(write_report(run.path))
    assert next(row for row in page.rows if row[:1] == ["1"] and "(" in row[-1])[:2] == ["1", "30"]
    first, second, third = (next(r for r in page.rows if r[0] == k and "(" in r[-1]) for k in "123")
    assert first[3] == "1.0000 (0.8587–1.0000)" and re.fullmatch(r"0\.5000 \(0\.3\d+–0\.6\d+\)", second[3]), second
    assert third[2] == "–", "never predicted: precision is not defined"
    assert all(re.fullmatch(r"0\.0000 \(0\.0000–0\.[12]\d+\)", cell) for cell in third[3:]), third
    assert ["2", "15", "15", "0"] in page.rows, "the confusion matrix, from the predictions"
    assert ["3", "1", "30", "100.0%"] in page.rows and ["2", "1", "15", "50.0%"] in page.rows, "its confusions"
    assert "expected calibration error on eval" in page.text and "of 15 equal bins" in page.text
    assert page.headings[page.headings.index("Mistakes") :][1:3] == [
        "3 predicted as 1: 30 rows, 100.0% of the label",
        "2 predicted as 1: 15 rows, 50.0% of the label",
    ]
    mistakes = [row for row in page.rows if len(row) == 4 and row[1].startswith("r")]
    assert len(mistakes) == 10 and mistakes[0][:3] == ["89", "r89", "0.9450"]
    assert all(len(row[3]) == 300 and row[3].endswith("…") for row in mistakes)
    assert "Rows of some where/reviews.csv" in page.text
    assert re.search(
        r"accuracy on eval0\.500095 % interval 0\.[34]\d+ to 0\.6\d+; 0\.3333 by the simplest model",
        page.text,
    )
    svgs = page.svgs()
    bars = [
        group for group in svgs["calibration-eval"].iter("g") if str(group.get("id")).startswith("calibration-eval-b")
    ]
    counts = [row for row in page.rows if re.fullmatch(r"0\.\d\d–[01]\.\d\d", row[0])]
    assert len(bars) == len(counts) == len(re.findall("confidence", str(svgs["calibration-eval"].find("desc").text)))  # type: ignore[union-attr]
    assert sum(int(row[1]) for row in counts) == 90
    assert {"pr-eval", "roc-eval", "score", "classes-eval"} <= svgs.keys()


def test_texts_are_escaped_and_can_be_left_out(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    predict(run, texts=[EVIL + "\n\x00 two lines"] * 90)
    page = Page(write_report(run.path))
    assert "script" not in page.names and page.text.count(EVIL) == 10
    page = Page(write_report(run.path, texts=False))
    assert EVIL not in page.text and "r89" in page.text


def test_many_labels_become_the_most_frequent_confusions(make_run: MakeRun) -> None:
    run = make_run()
    names = [f"label {i}" for i in range(80)]
    matrix = [[10 if i == j else 3 if j == i + 1 else 0 for j in range(80)] for i in range(80)]
    finish(run, labels=names, metrics={"eval_confusion_matrix": matrix})
    page = Page(write_report(run.path))
    assert ["label 0", "label 1", "3", "23.1%"] in page.rows and "30 most frequent of 79 confusions" in page.text
    assert len(page.source) < 90_000


def test_damaged_predictions_are_reported_in_their_place(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    (run.path / "predictions.parquet").write_bytes(b"PAR1 and no more")
    page = Page(write_report(run.path))
    assert "predictions.parquet: cannot be read as predictions" in page.text and "Confusion matrix" in page.headings


def attempts(run: RunDir) -> None:
    """Three attempts as the worker and the requeue write them; the second was killed."""
    events: list[dict[str, Any]] = []
    for number, (name, step, start) in enumerate((("7.0", 0, 1000.0), ("7.1", 20, 2000.0), ("7.2", 30, 3000.0))):
        (run.attempts / name).mkdir()
        facts = {
            "host": "n1",
            "started": start,
            "slurm": {"SLURM_JOB_ID": "7"},
            "cores": 4,
            "versions": {"torch": "2.13"},
        }
        (run.attempts / name / "env.json").write_text(json.dumps(facts))
        events += [
            {"time": start, "event": "attempt_started", "attempt": name},
            {"time": start + 10, "event": "training", "attempt": name, "step": step, "max_steps": 40},
            {"time": start + 12, "event": "first_step", "attempt": name, "step": step + 1},
            {
                "time": start + 50,
                "event": "pace",
                "attempt": name,
                "step": step + 9,
                "tokens_per_s": 900.0 + number,
                "memory_gb": 1.5,
            },
            {
                "time": start + 90,
                "event": "checkpoint",
                "attempt": name,
                "step": step + 10,
                "seconds": 4.0,
                "stall_s": 0.5,
                "bytes": 9,
            },
        ]
    text = "".join(json.dumps(event) + "\n" for event in events) + '{"event": "torn'
    (run.path / "events.jsonl").write_text(text)


def test_attempts_are_marked_and_their_times_are_shown(make_run: MakeRun) -> None:
    run = make_run()
    attempts(run)
    finish(run, attempt="7.2")
    log(run, *CURVE)
    page = Page(write_report(run.path))
    loss = page.svgs()["loss"]
    assert [data_of(loss, part)[0][0][0] for part in ("m0", "m1")] == pytest.approx([20, 30], rel=1e-3)
    assert {"attempt 2", "attempt 3"} <= {text.text for text in loss.iter("text")}
    assert "attempt 3 at step 30" in str(loss.find("desc").text)  # type: ignore[union-attr]
    assert ["7.1", "1:30 min", "10 s", "2 s", "20", "30", "1", "4 s", "0.5 s"] in page.rows
    assert "Tokens per second by step" in page.source and "Memory of the first process in GB by step" in page.source
    assert ["torch", "2.13"] in page.rows
    outcome = json.loads(run.outcome_file.read_text())
    used = {"real_token_share": 0.5, "mfu": 0.25, "peak_flops": 2e12, "peak_source": "measured", "peak_memory_gb": 3.5}
    used["seconds_by_part"] = {"input": 1.0, "forward_backward": 3.0}  # type: ignore[assignment]
    run.outcome_file.write_text(json.dumps({**outcome, "utilisation": used}))
    page = Page(write_report(run.path))
    assert ["model FLOP utilisation", "25.0%"] in page.rows and ["of a peak of", "2 TFLOP/s (measured)"] in page.rows
    assert ["forward and backward", "3 s", "75.0%"] in page.rows
    assert next(row for row in page.rows if row[0].startswith("memory per node"))[2] == "3.5 GB"


SACCT = """#!/bin/bash
[ "$1" = --duplicates ] && [ "$2" = --noheader ] && [ "$3" = --parsable2 ] || exit 9
echo "$@" >>"$0.calls"
cat <<'ROWS'
7|REQUEUED|90|60|00:01:30|4|1|8G||0|billing=4,cpu=4,gres/gpu=2,mem=8G,node=1
7.batch|COMPLETED|90||00:01:30|4|1||1048576K|0|cpu=4
7|COMPLETED|1000|60|50:00.500|4|1|8G||7200000|billing=4,cpu=4,gres/gpu=2,mem=8G,node=1
7.batch|COMPLETED|1000||00:00:01|4|1||512M|3600000|cpu=4
7.0|COMPLETED|1000||50:00|4|1||4G|3600000|cpu=4
ROWS
"""


def test_requested_and_used_resources(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sacct").write_text(SACCT)
    (folder / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    run = make_run(resources={"nodes": 1, "mem_gb": 16, "time": 60})
    attempts(run)
    finish(run, attempt="7.2")
    page = Page(write_report(run.path))
    assert (
        len((folder / "sacct.calls").read_text().splitlines()) == 1
        and "--jobs=7" in (folder / "sacct.calls").read_text()
    )
    assert ["memory per node, largest task", "16 GB", "4 GB", "25%"] in page.rows
    assert ["time of the longest attempt", "60 min", "1:30 min", "2%"] in page.rows
    used = next(row for row in page.rows if row[0] == "processor time")
    assert used[3] == f"{3090.5 / (1090 * 4):.0%}"
    assert ["7", "COMPLETED", "16:40 min", "60", "1", "4", "2", "75.0%", "4", "7.2e+06"] in page.rows
    assert "2 kWh (7,200,000 J)" in page.text
    (folder / "sacct").write_text("#!/bin/bash\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    page = Page(write_report(run.path))
    assert "No accounting from Slurm (sacct)" in page.text
    assert ["memory per node, largest process", "16 GB", "1.5 GB", "9%"] in page.rows, "from the run's own events"
    run.record(Outcome.model_validate({**json.loads(run.outcome_file.read_text()), "device": "cuda"}))
    page = Page(write_report(run.path))
    assert not any(row[0].startswith("memory per node") for row in page.rows), (
        "that of a GPU is not what the recipe requests"
    )
    assert "Memory of the first GPU in GB by step" in page.source


def test_figures_are_files_too(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    predict(run)
    log(run, *CURVE, {"step": 40, "epoch": 2.0, "loss": 0.7, "learning_rate": 1e-5})
    folder = write_report(run.path, png=True).parent
    names = {p.name for p in folder.iterdir()}
    keys = (
        "score",
        "classes-eval",
        "loss",
        "metrics",
        "learning-rate",
        "calibration-eval",
        "answered-eval",
        "confusion-eval",
        "pr-eval",
        "roc-eval",
    )
    assert names == {"index.html", *(f"{k}.{s}" for k in keys for s in ("svg", "png"))}
    for key in keys:
        root = ElementTree.parse(folder / f"{key}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("style") == "background: #fff"
        raw = (folder / f"{key}.png").read_bytes()
        assert raw.startswith(b"\x89PNG") and len(raw) > 4000
    first = (folder / "loss.png").read_bytes()
    write_report(run.path, png=True)
    assert (folder / "loss.png").read_bytes() == first


def test_many_points_are_thinned_and_no_spike_is_lost() -> None:
    points = [(float(i), 1.0) for i in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    points[5] = (5.0, -3.0)
    kept = thin(points)
    assert len(kept) <= 700 and points[77_777] in kept and points[5] in kept
    assert kept[0] == points[0] and kept[-1] == points[-1] and kept == sorted(kept)


def test_many_runs_have_one_page(make_run: MakeRun, tmp_path: Path) -> None:
    for number, (rate, accuracy) in enumerate(((1e-5, 0.5), (2e-5, 0.9), (3e-5, None)), start=1):
        run = make_run(train__learning_rate=rate)
        if accuracy is not None:
            finish(run, metrics={"eval_accuracy": accuracy}, task="single-label", seconds=60.0)
        (tmp_path / "sw eep/runs").mkdir(parents=True, exist_ok=True)
        run.path.rename(tmp_path / f"sw eep/runs/cell {number}")
    (tmp_path / "sw eep/sweep.json").write_text(
        json.dumps({"grid": {"train.learning_rate": ["1e-5", "2e-5"]}, "seeds": [1, 2], "plan": {"a": "b"}})
    )
    page = Page(write_report(tmp_path / "sw eep"))
    table = [row for row in page.rows if row[0].startswith("cell")]
    assert [row[:4] for row in table] == [
        ["cell 2", "2e-05", "finished", "0.9000"],
        ["cell 1", "1e-05", "finished", "0.5000"],
        ["cell 3", "3e-05", "no outcome", "–"],
    ]
    assert "3 of the runs have no page" in page.text and not any("cell" in link for link in page.links)
    assert ["train.learning_rate", "1e-5, 2e-5"] in page.rows and ["seeds", "1, 2"] in page.rows
    page = Page(write_report(tmp_path / "sw eep", each=True))
    linked = [link for link in page.links if not link.startswith("#")]
    assert linked[0] == "../runs/cell%202/report/index.html" and len(linked) == 3
    assert all((tmp_path / "sw eep/report" / unquote(link)).is_file() for link in linked)


def test_a_sweep_is_headed_by_the_mean_of_its_best_point(make_run: MakeRun, tmp_path: Path) -> None:
    """Not by its luckiest seed; Student's interval as SciPy gives it."""
    values = {1e-5: (0.80, 0.82, 0.90), 2e-5: (0.85, 0.86, 0.87), 3e-5: (0.99,)}
    for rate, accuracies in values.items():
        for seed, accuracy in enumerate((*accuracies, *[None] * (3 - len(accuracies)))):
            run = make_run(train__learning_rate=rate, train__seed=seed)
            if accuracy is not None:
                finish(run, metrics={"eval_accuracy": accuracy}, task="single-label")
            (tmp_path / "sweep/runs").mkdir(parents=True, exist_ok=True)
            run.path.rename(tmp_path / f"sweep/runs/{rate},{seed}")
    page = Page(write_report(tmp_path / "sweep", output=tmp_path / "page"))
    low, high = stats.t.interval(0.95, 2, loc=0.86, scale=stats.sem(values[2e-5]))
    assert ["learning_rate=2e-05", "0.8600", f"{low:.4f}–{high:.4f}", "3/3", "best", "–"] in page.rows
    test = stats.ttest_rel(values[1e-5], values[2e-5])
    limits, difference = test.confidence_interval(), sum(values[1e-5]) / 3 - 0.86
    assert page.rows[page.rows.index(next(r for r in page.rows if r[0] == "learning_rate=1e-05"))][4:] == [
        f"{difference:+.4f} ({limits.low:+.4f} to {limits.high:+.4f})",
        f"{test.pvalue:.3f}",
    ]
    assert "It is NOT distinguishable from the next (learning_rate=1e-05): paired over 3 seeds" in page.text
    effect = page.svgs()["effect-train.learning_rate"]
    assert effect.get("data-scale") == "linear" and "2e-05: mean 0.8600" in str(effect.find("desc").text)  # type: ignore[union-attr]
    assert f"learning_rate=2e-05: mean of 3 seeds, 95 % interval {low:.4f} to {high:.4f}" in page.text
    first = [row[0] for row in page.rows if row[0].startswith("learning_rate=")]
    assert first == ["learning_rate=2e-05", "learning_rate=3e-05", "learning_rate=1e-05"], (
        "by their means, as the sweep's own table; but one seed of three does not win"
    )
