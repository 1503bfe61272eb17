"""The report: what is on the page, what is left out, and that nothing in a run can break out of it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.unit.conftest import tree

from afina import report
from afina.errors import EnvironmentProblem, InputError
from afina.plan import make_plan
from afina.recipe import Recipe
from afina.report import write_report
from afina.rundir import Outcome, RunDir
from afina.site import Site

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
        return RunDir.claim(plan, prepared, ["python"], text, tmp_path / "run <&> 'x'")

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
    {"step": 40, "epoch": 2.0, "eval_loss": 0.5, "eval_accuracy": 0.75},
)


class Page(HTMLParser):
    """The page as a tree walk: every element closed in order, its texts, its tables."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open: list[str] = []
        self.names: list[str] = []
        self.ids: list[str] = []
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
        assert not {"src", "href", "onload", "onclick"} & values.keys(), "the page fetches or runs something"
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

    def svgs(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(s) for s in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]


def test_a_finished_run_has_every_section(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    path = write_report(run.path)
    assert path == run.path / "report/index.html"
    page = Page(path)
    assert page.headings == [
        "amazon-stars",
        *("Outcome", "Epochs", "Loss", "Metrics", "Each class", "Confusion matrix", "Data", "Warnings"),
        *("Plan", "Attempts", "Recipe"),
    ]
    assert page.names.count("h1") == 1 and page.names.count("html") == page.names.count("main") == 1
    assert ["1", "20", "1", "0.9", "0.5"] in page.rows and ["2", "40", "0.7", "0.5", "0.75"] in page.rows
    assert ["outcome", "finished"] in page.rows and ["steps", "40 of 40"] in page.rows
    assert ["2", "0.22"] in page.rows, "F1 of the second class"
    assert ["2", "2", "6", "0"] in page.rows, "the second row of the confusion matrix"
    assert ["train", "600", "12345"] in page.rows
    assert ["local-1", "1970-01-01 00:00:00 UTC", "node<1>", "4", "–", "0"] in page.rows
    assert "label '3' occurs once in train" in page.text


def test_the_page_is_self_contained_and_follows_the_reader(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    page = Page(write_report(run.path))
    assert "prefers-color-scheme: dark" in page.source and 'lang="en"' in page.source
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img", page.source)
    assert len(page.ids) == len(set(page.ids))


def test_charts_say_in_words_what_they_draw(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    loss, metrics = Page(write_report(run.path)).svgs()
    for svg, title in ((loss, "Loss by step"), (metrics, "Metrics by step")):
        assert svg.get("role") == "img"
        named = [svg.find(f"*[@id='{i}']") for i in str(svg.get("aria-labelledby")).split()]
        assert [n.tag for n in named if n is not None] == ["title", "desc"] and named[0] is not None
        assert named[0].text == title
    desc = loss.find("desc")
    assert desc is not None
    assert desc.text == "training: 1.5 at step 10, 0.7 at step 40; validation: 0.9 at step 20, 0.5 at step 40."
    lines = [line.get("points") for line in loss.iter("polyline")]
    assert [len(str(points).split()) for points in lines] == [3, 2]
    # The largest loss at the top left of the plot, the least at the bottom right.
    assert str(lines[0]).split()[0] == "64.0,34.0" and str(lines[1]).split()[-1] == "700.0,250.0"
    assert len({line.get("stroke-dasharray") for line in loss.iter("polyline")}) == 2, "colour is not the only sign"


def test_a_single_evaluation_a_flat_line_and_missing_values_are_drawn(make_run: MakeRun) -> None:
    run = make_run()
    log(
        run,
        {"step": 5, "epoch": 1, "eval_loss": 0.5, "eval_pearson": None, "eval_mse": 0.0, "eval_mae": float("nan")},
    )
    page = Page(write_report(run.path))
    for svg in page.svgs():
        assert not re.search(r"nan|inf\b", ElementTree.tostring(svg, "unicode"), re.IGNORECASE)
    assert [svg.find("title").text for svg in page.svgs()] == ["Loss by step", "Errors by step"]  # type: ignore[union-attr]


def test_nothing_in_a_run_breaks_out_of_the_page(make_run: MakeRun) -> None:
    run = make_run([EVIL, "a", "b"], name=EVIL.replace("/", ""), data__label=EVIL)
    finish(run, labels=[EVIL, "a", "b"], outcome="failed", exit_code=4, error=EVIL, device=EVIL)
    prepared = json.loads((run.path / "prepared.json").read_text())
    (run.path / "prepared.json").write_text(json.dumps({**prepared, "warnings": [EVIL], "rows": {EVIL: 1}}))
    log(run, *CURVE, {"step": 41, "epoch": 3, "eval_loss": 1.0, f"eval_{EVIL}": 0.5})
    page = Page(write_report(run.path))
    assert "script" not in page.names
    assert page.text.count(EVIL) >= 6
    for svg in page.svgs():
        assert svg.find(".//script") is None


def test_a_run_that_has_not_begun_and_one_that_failed_have_a_page(make_run: MakeRun) -> None:
    run = make_run()
    assert "No outcome is recorded" in Page(write_report(run.path)).text
    run.begin_attempt("123.0")
    run.record_failure("123.0", "the loss is nan at step 3", exit_code=4)
    page = Page(write_report(run.path))
    assert ["outcome", "failed"] in page.rows and "the loss is nan at step 3" in page.text
    assert "Epochs" not in page.headings and not page.svgs()


def test_damaged_files_leave_their_section_out(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    (run.path / "prepared.json").write_text('{"rows": ')
    (run.attempts / "local-1/env.json").write_text("[]")
    (run.path / "recipe.yaml").unlink()
    run.metrics_file.write_text(json.dumps(CURVE[2]) + '\n{"step": 41, "eva')
    page = Page(write_report(run.path))
    assert "Data" not in page.headings and "Recipe" not in page.headings and "Epochs" in page.headings
    assert ["local-1", "–", "–", "–", "–", "0"] in page.rows


def test_the_account_and_the_environment_stay_at_home(tmp_path: Path, scratch: Path, make_run: MakeRun) -> None:
    run = make_run()
    plan = json.loads(run.plan_file.read_text())
    plan["site"]["sbatch"] = {"SBATCH_ACCOUNT": "secret-project"}
    plan["site"]["setup"] = ["MY_SETTING"]
    run.plan_file.write_text(json.dumps(plan))
    finish(run)
    source = write_report(run.path).read_text("utf-8")
    assert "secret-project" not in source and "MY_SETTING" not in source


def test_nothing_but_the_page_is_written_and_a_second_one_replaces_it(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    log(run, *CURVE)
    before = tree(run.path)
    first = write_report(run.path).read_text("utf-8")
    assert write_report(run.path).read_text("utf-8") == first
    after = tree(run.path)
    new = {str(run.path / "report"), str(run.path / "report/index.html")}
    assert after.keys() - before.keys() == new
    assert {k: v for k, v in after.items() if k not in new} == before


def test_what_is_not_a_run_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)
    assert report.main([str(tmp_path)]) == 2 and "remedy:" in capsys.readouterr().err
    assert report.main([]) == 2 and "usage:" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_page_that_cannot_be_written_is_said_so(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    (run.path / "report").write_text("in the way")
    with pytest.raises(EnvironmentProblem):
        write_report(run.path)
    assert report.main([str(run.path)]) == 3


def test_the_command_prints_the_page(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    assert report.main([str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path / 'report/index.html'}\n"
