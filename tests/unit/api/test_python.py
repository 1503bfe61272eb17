"""The Python API over runs that are there: as docs/python.md says it, in notebooks, with and without pandas."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests import tiny
from tests.common import ROOT

import afina
from afina.errors import InputError
from afina.recipe.schema import Recipe
from afina.run.new_run import claim
from afina.run.outcome import Outcome
from afina.run.plan import make_plan
from afina.site.settings import Site

LINES = [
    {"step": 10, "epoch": 0.5, "loss": 0.9, "learning_rate": 5e-5},
    {"step": 20, "epoch": 1.0, "loss": 0.7, "learning_rate": 4e-5},
    {"step": 20, "epoch": 1.0, "eval_loss": 0.8, "eval_accuracy": 0.75, "eval_f1_per_class": [0.5, 1.0]},
]


@pytest.fixture
def run(
    recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site, monkeypatch: pytest.MonkeyPatch
) -> afina.Run:
    monkeypatch.setenv("AFINA_SCRATCH", str(site.scratch))
    plan = make_plan(recipe(name="a <b>stars"), site, recipe_file=recipe_file())
    directory = claim(plan, {"rows": {"train": 160}}, ["false"], "")
    folder = directory.begin_attempt("local-1")
    directory.event("attempt_started", attempt="local-1")
    (folder / "node0.log").write_text("".join(f"line {n}\n" for n in range(9)))
    directory.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    directory.model.mkdir()
    directory.record(
        Outcome(outcome="finished", exit_code=0, attempt="local-1", global_step=20, metrics={"eval_accuracy": 0.75})
    )
    return afina.Run(directory.path)


def test_metrics_are_a_frame_by_step(run: afina.Run) -> None:
    pandas = pytest.importorskip("pandas")
    frame = run.metrics()
    assert list(frame.index) == [10, 20] and frame.index.name == "step"
    assert set(frame.columns) == {"epoch", "loss", "learning_rate", "eval_loss", "eval_accuracy"}
    assert frame.loc[20, "eval_accuracy"] == 0.75 and pandas.isna(frame.loc[10, "eval_loss"])
    assert run.records() == LINES
    run.dir.metrics_file.unlink()
    assert run.metrics().empty and run.records() == []


def test_without_pandas_there_are_records(run: afina.Run, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pandas'] = None\n"
        "import afina; run = afina.Run(sys.argv[1])\n"
        "print(len(run.records()), run.summary.best_value, len(afina.runs()), '<td>' in run._repr_html_())\n"
        "run.metrics()\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(run.path)], capture_output=True, text=True)
    assert done.stdout == "3 0.75 1 True\n"
    assert "EnvironmentProblem: pandas is not installed here" in done.stderr and "Run.records()" in done.stderr


def test_runs_below_a_folder(run: afina.Run, tmp_path: Path) -> None:
    assert [found.path for found in afina.runs()] == [run.path]
    assert [found.path for found in afina.runs(run.path.parent)] == [run.path]
    assert [found.path for found in afina.runs(run.path)] == [run.path]
    with pytest.raises(InputError, match="none below it"):
        afina.runs(tmp_path / "working 'here'")
    run.dir.plan_file.unlink()
    assert afina.runs() == []
    with pytest.raises(InputError, match="not a run directory"):
        afina.Run(run.path)


def test_a_table_of_runs(run: afina.Run) -> None:
    pytest.importorskip("pandas")
    table = afina.runs().table()
    assert (table.loc[0, "state"], table.loc[0, "best_value"], table.loc[0, "step"]) == ("FINISHED", 0.75, 20)


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_notebook_shows_a_table_and_runs_nothing(run: afina.Run) -> None:
    for shown in (run._repr_html_(), afina.runs()._repr_html_()):
        cells = Cells()
        cells.feed(shown)
        assert set(cells.tags) == {"table", "thead", "tbody", "tr", "th", "td"}, "a name is text, not HTML"
        assert "FINISHED" in cells.text and "0.75" in cells.text and run.path.name in cells.text


def test_the_log_is_text(run: afina.Run) -> None:
    assert run.log(last=2) == "line 7\nline 8\n"
    assert run.log(attempt="local-1", rank=0).count("\n") == 9
    with pytest.raises(InputError, match="no attempt"):
        run.log(attempt="local-2")


def test_the_examples_of_the_page_run(
    run: afina.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the first, which submits: that is done on a real cluster, in tests/slurm; and the last, which needs a model."""
    pytest.importorskip("pandas")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 5 and "afina.submit(" in blocks[0] and "afina.predict(" in blocks[4]
    Path("runs").mkdir()
    Path("runs/first").symlink_to(run.path)
    shutil.copytree(run.path, "runs/second")
    for block in blocks[1:4]:
        exec(compile(block, "docs/python.md", "exec"), {})
    said = capsys.readouterr().out
    assert "FINISHED 20 None\n0.7\n" in said and "line 8\n" in said and "nothing to cancel: it has finished" in said
    assert f"{run.path}/report/index.html" in said or "runs/first/report/index.html" in said
    assert "{'accuracy': [0.75, 0.75]}" in said and "predictions.parquet" in said


def test_a_notebook_shows_the_page(run: afina.Run, tmp_path: Path) -> None:
    """`afina.report` of a run; without one of the newest; the frame runs the page's own script and reaches nothing around it."""
    page = afina.report(run, output=tmp_path / "page")
    assert page == tmp_path / "page/index.html" and afina.report() == run.path / "report/index.html"
    frame = ElementTree.fromstring(page._repr_html_())
    assert (frame.tag, frame.get("sandbox")) == ("iframe", "allow-scripts")
    assert frame.get("srcdoc") == page.read_text().replace("\n", " ")  # as XML reads an attribute


@pytest.mark.series
def test_prefetch_and_rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prepares, the other finds it prepared and leaves no run."""
    tiny.write_project(tmp_path / "project")
    monkeypatch.setenv("AFINA_SCRATCH", str(tmp_path))
    recipe = tmp_path / "project/recipe.yaml"
    prepared = afina.prefetch(recipe, overrides=["train.epochs=1"])
    assert prepared["rows"]["train"] > 0 and Path(prepared["prepared"]).is_dir() and not prepared["reused"]
    seen = afina.rehearse(recipe, seconds=0.1, gpus_per_node=0, overrides=["train.epochs=1"])
    assert seen.measured.seconds and seen.forecast.basis == "rehearsal" and not list(tmp_path.glob("runs/*"))


@pytest.mark.series
def test_the_next_step_of_the_page_runs(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in its handle, its path in words: predict, load and export take both."""
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    block = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text("utf-8"), re.M | re.S)[-1]
    recipe = tiny.write_project(Path("project"), rows=60, train={"max_steps": 2})
    Path("runs").mkdir()
    tiny.write_csv(Path("new.csv"), tiny.tiny_reviews(9, 3))
    train = f"import afina; afina.train({str(recipe)!r}, run='runs/first', num_processes=1)\n"
    done = subprocess.run([sys.executable, "-c", train + block], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    answer, predicted, exported = done.stdout.splitlines()[-3:]
    assert answer.startswith("9 {") and predicted.startswith("[") and Path(exported) == Path.cwd() / "to-publish"
    assert (Path(exported) / "config.json").is_file() and Path("new.predictions.csv").is_file()


def test_the_first_example_submits_and_waits(run: afina.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a run that has finished in place of the submission."""
    block = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text("utf-8"), re.M | re.S)[0]
    call = re.search(r"afina\.submit\((.*)\)  #", block)
    assert call is not None
    words = dict(re.findall(r"(\w+)=(\w+)", call[1]))
    inspect.signature(afina.submit).bind("recipe.yaml", **words)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block.replace(call[0], "afina.Run(path)  #"), {"path": run.path})
    assert out.getvalue() == f"{run.path} FINISHED\n0.75\n"


@pytest.mark.parametrize("function", [afina.submit, afina.sweep])
def test_help_lists_the_keywords_and_an_unknown_one_is_refused(function: Callable[..., object]) -> None:
    parameters = inspect.signature(function).parameters
    assert {"overrides", "site", "nodes", "gpus_per_node", "time_min"} <= set(
        parameters
    ) and "options" not in parameters
    assert parameters["nodes"].default is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'node'"):
        function("recipe.yaml", node=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'in_job'"):
        function("recipe.yaml", in_job=True)
