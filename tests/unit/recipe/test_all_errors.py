"""All errors of a recipe at once, each with its line, and warnings of values that are hardly meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.conftest import Ran
from tests.unit.recipe.refusals import refused

from afina.recipe.parse import parse_recipe

_WRONG = """name: bad/name
modle: bert
data: {files: a.csv, text: text, label: text, config: x}
train: {epochs: 3, max_steps: 4, loss: focal, label_smoothing: 0.1, learning_rate: -1, focal_gama: 2}
metrics: [f1, foo]
task: single-label
tokens: {max_length: 1}
"""


def test_all_errors_at_once_each_with_its_line() -> None:
    text = str(refused(_WRONG, "resources.nodes=0", "train"))
    assert text.startswith("r.yaml: 12 errors\n")
    for line in (
        "r.yaml:1: `name`: 'bad/name' is not usable",
        "r.yaml:2: unknown key `modle`",
        "r.yaml:3: `data.label`: column `text` is the text too",
        "r.yaml:3: `data.config`: belongs to a Hub data set",
        "r.yaml:4: unknown key `train.focal_gama`",
        "r.yaml:4: `train.learning_rate`: must be more than 0",
        "r.yaml:4: `train`: give `epochs` or `max_steps`, not both",
        "r.yaml:4: `train.label_smoothing`: has no definition",
        "r.yaml:5: `metrics.1`: `foo` is not a metric of a single-label task",
        "r.yaml:7: `tokens.max_length`: must be 2 or more",
        "--set resources.nodes: must be 1 or more",
        "--set train: not of the form",
    ):
        assert f"\n  {line}" in text, text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("{name: x, model: a, data: {hub: a, text: t, label: l}, train: {loss: fokal, focal_gamma: 2}}", 1),
        ("{name: x, model: a, data: {hub: a, text: t, label: l}, trust_remote_code: true, revision: 3}", 1),
        ("{name: x, model: a, data: {hub: a, text: t, label: l}, task: regressoin, train: {pos_weight: balanced}}", 1),
        ("{name: x, data: {text: t, label: l}}", 2),
        ("{}", 3),
    ],
)
def test_what_only_follows_from_an_error_is_not_another_one(text: str, count: int) -> None:
    lines = str(refused(text)).splitlines()
    assert lines[0] == f"r.yaml: {count} errors" if count > 1 else not lines[0].endswith("errors"), lines


def test_a_value_that_is_hardly_meant_is_a_warning(
    command: Callable[..., Ran], recipe_file: Callable[..., Path]
) -> None:
    path = recipe_file(train={"learning_rate": 5e5, "epochs": 1000, "arguments": {"weight_decay": 3}})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "learning_rate" in text)
    done = command("submit", path, "--dry-run", "--set", "train.batch_size=1000000")
    assert done.returncode == 0 and done.stderr.count("warning: ") == 4, done
    assert f"afina: warning: {path}:{line}: `train.learning_rate`: 500000.0 is hardly meant" in done.stderr
    assert "--set train.batch_size: `train.batch_size`: 1000000 is hardly meant" in done.stderr
    assert command("submit", recipe_file(), "--dry-run").stderr == ""


def test_warmup_longer_than_the_run() -> None:
    text = (
        "{name: x, model: a, data: {hub: a, text: t, label: l}, train: {max_steps: 9, arguments: {warmup_steps: 10}}}"
    )
    (warning,) = parse_recipe(text).warnings
    assert "the learning rate never reaches its value" in warning


@pytest.mark.parametrize(
    ("data", "unused"),
    [
        ("files: {train: a.csv, eval: b.csv, test: c.csv}", "`data.files.test`: no row of it is read: `data.test: {}` would"),
        ("files: {all: a.csv, eval: b.csv, train: c.csv}", "`data.files.all`: no row of it is read: a part with `split` would"),
        ("files: {train: a.csv, eval: b.csv, test: c.csv}, test: {}", ""),
        ("files: {train: a.csv, test: c.csv}, eval: {split: test}", ""),
        ("files: {train: a.csv}", ""),
        ("files: a.csv, split_column: s", ""),
    ],
)  # fmt: skip
def test_a_file_that_no_part_is_read_from_is_a_warning(data: str, unused: str) -> None:
    warnings = parse_recipe(f"{{name: x, model: a, data: {{{data}, text: t, label: l}}}}").warnings
    assert [warning.partition(": ")[2] for warning in warnings] == ([unused] if unused else []), warnings
