"""The page of a run: its sections, files and refusals; and that no text of a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.conftest import Ran, tree
from tests.unit.reports.conftest import CURVE, EVIL, MakeRun, finish, log
from tests.unit.reports.pages import Page

from afina.errors import EnvironmentProblem, Failure, InputError
from afina.reports import drawing, write_report
from afina.run.outcome import Outcome
from afina.run.provenance.methods import methods


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
        "8 examples per step, 1 epoch (40 steps), seed 1. Loss: cross entropy. It was",
        "trained in bf16 with 4 processes on NVIDIA H200 (Python 3.12.1, PyTorch 2.13, Transformers 5.17)",
        "The checkpoint with the highest f1 on eval was kept (step 20), so that scores on eval are a little too kind.",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("task", "train", "words"),
    [
        ("single-label", {"class_weights": "balanced", "label_smoothing": 0.1}, "cross entropy; class weights (balanced); label smoothing 0.1"),
        ("single-label", {"loss": "focal", "class_weights": {"1": 2, "3": 0.5}}, "focal loss (γ 2); class weights (1: 2, 3: 0.5)"),
        ("multi-label", {"loss": "focal", "focal_gamma": 1.5, "pos_weight": {"1": 3}}, "focal loss of each label (γ 1.5); weights of positives (1: 3)"),
        ("token-classification", {}, "cross entropy of each word"),
        ("regression", {}, "squared error"),
    ],
)  # fmt: skip
def test_methods_name_the_loss(make_run: MakeRun, task: str, train: dict[str, Any], words: str) -> None:
    run = make_run(**{f"train__{key}": value for key, value in train.items()}, data__weight="weight")
    prepared = {"task": task, "labels": ["1", "2", "3"]}
    assert f" Loss: {words}; rows weighted by column weight." in methods(run.plan(), None, prepared, {}, {})


def test_methods_name_the_number_format_of_a_frozen_base(make_run: MakeRun) -> None:
    run = make_run(adapter={"rank": 4}, train__base_dtype="nf4")
    assert "all other weights were frozen and stored in nf4. Optimizer:" in methods(run.plan(), None, {}, {}, {})
