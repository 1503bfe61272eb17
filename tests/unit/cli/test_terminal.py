"""Tables that fit a terminal, a bar that no line tears, and answers to what is mistyped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from tests.unit.cli.terminal import AFINA, in_terminal, screen
from tests.unit.conftest import Ran

from afina.cli import SECTIONS, cli
from afina.cli.screen import short_labels
from afina.errors import Failure
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.outcome import Outcome
from afina.run.plan import make_plan
from afina.site.settings import Site


def commands() -> list[tuple[str, click.Command]]:
    def below(group: click.Group, path: str) -> list[tuple[str, click.Command]]:
        own = [(f"{path} {name}".strip(), command) for name, command in group.commands.items() if not command.hidden]
        return own + [one for name, command in own if isinstance(command, click.Group) for one in below(command, name)]

    return below(cli, "")


def test_every_command_has_its_section_and_its_line_fits() -> None:
    names = [name for section in SECTIONS.values() for name in section]
    assert sorted(names) == sorted(name for name, _ in commands() if " " not in name)
    assert all(len(text) <= 66 for section in SECTIONS.values() for text in section.values())


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_option_has_help_and_the_common_words(name: str) -> None:
    command = dict(commands())[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"afina {name} {parameter.opts[0]} has no help"
    text = command.get_help(click.Context(command, info_name=f"afina {name}", terminal_width=80))
    assert max(map(len, text.splitlines())) <= 110
    for word in ("RUN_DIR", "tries", "world_size", "samples"):
        assert word not in text


# -- mistyped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["trian"], "did you mean `train`?"),
        (["train", "r.yaml", "--learning_rate", "3e-5"], "--set train.learning_rate=VALUE"),
        (["train", "r.yaml", "--weight-decay", "0.1"], "--set train.arguments.weight_decay=VALUE"),
        (["train", "r.yaml", "--num_train_epochs", "3"], "set `train.epochs`"),
        (["submit", "r.yaml", "--per_device_train_batch_size", "8"], "set `train.batch_size`"),
        (["submit", "r.yaml", "--partition=gpu"], "set SBATCH_PARTITION=VALUE in the site file"),
        (["submit", "r.yaml", "--constraint", "ib"], "AFINA_SBATCH_EXTRA=--constraint=VALUE"),
        (["submit", "r.yaml", "--cpus-per-task=4"], "set resources.cpus_per_gpu in the recipe"),
        (["status", "--watsh"], "'--watch'"),
        (["logs"], "see afina logs --help"),
        (["recipe", "kyes"], "Did you mean 'keys'?"),
        (["recipe", "keys", "zzz"], "afina recipe keys lists all of them"),
        (["list", "--sort", "bst"], "did you mean `best`?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_mistyped_is_answered_with_what_to_type(
    command: Callable[..., Ran], words: list[str], remedy: str
) -> None:
    done = command(*words)
    assert done.returncode == 2 and done.stdout == "" and remedy in done.stderr, done
    assert done.stderr.count("error: ") == 1 and done.stderr.count("remedy: ") == 1


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site, scratch: Path) -> list[RunDir]:
    """Four finished runs of a sweep with long names, and a failed one."""
    made = []
    for rate in (1e-5, 3e-5):
        for seed in (42, 43):
            name = f"train.learning_rate={rate:g},train.seed={seed},train.arguments.warmup_steps=0.06"
            plan = make_plan(recipe(train={"learning_rate": rate, "seed": seed}), site, recipe_file=recipe_file())
            run = claim(plan, {}, ["false"], "", scratch / "sweeps/yelp-1a2b3c4d/runs" / name)
            run.begin_attempt(f"{1000 + seed}.0")
            run.append("submissions.jsonl", {"job_id": str(1000 + seed), "via": "sbatch", "time": 1.0})
            score = seed / 100 + rate
            run.record(
                Outcome(
                    outcome="finished",
                    exit_code=0,
                    attempt=f"{1000 + seed}.0",
                    global_step=7500,
                    max_steps=7500,
                    task="single-label",
                    metrics={"eval_accuracy": score, "eval_f1": 1 - score},
                    utilisation={"tokens_per_second": 12345.0},
                    samples_per_second=101.0,
                )
            )
            made.append(run)
    return made


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_table_keeps_what_matters(sweep: list[RunDir], scratch: Path, columns: int) -> None:
    env = {"AFINA_SCRATCH": str(scratch), "NO_COLOR": "1"}
    code, written = in_terminal(*AFINA, "status", "yelp", columns=columns, env=env)
    lines = screen(written)
    assert code == 0 and max(map(len, lines)) <= columns, written
    heads, *rows = lines[:5]
    runs = [row.split()[1] for row in rows]
    assert len(set(runs)) == 4, "the runs cannot be told apart"
    wanted = {40: ("accuracy",), 80: ("accuracy", "tokens/s", "job", "seed"), 120: ("learning_rate", "tokens/s", "job")}
    for head in wanted[columns]:
        assert head in heads or head[:7] + "…" in heads, heads
    assert "0.4200" in rows[0] and (columns == 40 or "12,345" in rows[0])


def test_chosen_columns_and_order(sweep: list[RunDir], command: Callable[..., Ran]) -> None:
    words = ["status", "yelp", "--columns", "learning_rate,seed,f1,examples/s", "--sort"]
    rows = [line.split() for line in command(*words, "f1").stdout.splitlines()[1:5]]
    assert [row[2] for row in rows] == sorted(row[2] for row in rows) and rows[0][3] == "101"
    rows = [line.split() for line in command(*words, "best").stdout.splitlines()[1:5]]
    assert rows[0][:2] == ["3e-05", "43"]
    whole = command("status", "yelp").stdout
    assert all(run.path.name in whole for run in sweep), "a pipe gets whole names"


def test_a_reason_that_has_no_room_moves_below(sweep: list[RunDir], scratch: Path) -> None:
    folder = sweep[0].path.parent
    failed = claim(sweep[0].plan(), {}, ["false"], "", folder / "other")
    failed.record_failure("local-1", Failure("TrainingError", "the loss is not finite at step 120", "a smaller rate"))
    code, written = in_terminal(*AFINA, "status", "yelp", env={"AFINA_SCRATCH": str(scratch)})
    assert code == 0 and "failed (1): the loss is not finite at step 120" in screen(written)
    assert "\x1b[31mFAILED\x1b[0m" in written
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in in_terminal(*AFINA, "status", "yelp", env={"AFINA_SCRATCH": str(scratch), **env})[1]


def test_compare_has_a_row_for_each_run(sweep: list[RunDir], scratch: Path) -> None:
    env = {"AFINA_SCRATCH": str(scratch), "NO_COLOR": "1"}
    code, written = in_terminal(*AFINA, "compare", "yelp", "--no-test", env=env)
    lines = screen(written)
    assert code == 0 and max(map(len, lines)) <= 80
    tables = [table.splitlines() for table in "\n".join(lines).strip().split("\n\n")]
    assert len(tables) > 1
    assert all(len(table) == 5 and table[0].startswith("run ") for table in tables)
    assert any("train.learning_rate" in table[0] for table in tables)


def test_short_labels_differ() -> None:
    names = [f"yelp-1a2b3c4d/train.learning_rate={rate},train.seed={seed},warm=1" for rate in (1, 3) for seed in (1, 2)]
    for width in range(14, 80):
        labels = short_labels([*names, "other"], width)
        assert len(set(labels)) == 5 and max(map(len, labels)) <= width, width
    assert short_labels(names, 100) == names


# -- bars --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_line_never_tears_the_bar(
    recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site, scratch: Path, term: str
) -> None:
    """A worker that draws on standard error as the training does, and prints lines meanwhile."""
    run = claim(make_plan(recipe(), site, recipe_file=recipe_file()), {}, ["false"], "", scratch / "runs/r")
    script = (
        'for i in {1..40}; do printf "\\r bar bar bar %s" $i >&2; echo "line $i of the log"; sleep 0.01; done; exit 4'
    )
    (run.path / "worker.argv").write_bytes(b"\0".join(os.fsencode(word) for word in ["bash", "-c", script, ""]))
    code, written = in_terminal(
        *AFINA, "resume", run.path, columns=60, env={"AFINA_SCRATCH": str(scratch), "TERM": term}
    )
    lines = [line for line in screen(written) if "of the log" in line and "|" not in line]
    assert code == 4 and ("\x1b" in written) is (term == "xterm")
    if term == "xterm":
        assert lines == [f"line {i} of the log" for i in range(1, 41)], lines
    assert (run.attempts / "local-1/node0.log").read_text() == "".join(f"line {i} of the log\n" for i in range(1, 41))
