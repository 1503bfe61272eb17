"""A search: trials are asked for by the tasks of an array, told, pruned, replaced and repeated."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.conftest import tree
from tests.unit.sweeps.conftest import SEARCH, array_of, ask, end, queue

from afina.errors import InputError
from afina.files import read_json
from afina.sweeps.sweep import Sweep


def study(made: Sweep) -> list[Any]:
    from afina.worker.node import trial

    search = made.record.search
    assert search is not None
    found: list[Any] = trial.open_study(made.dir, search).get_trials(deepcopy=False)
    return found


def test_a_search_asks_tells_and_replaces(
    sweep: Callable[..., Sweep], submitted: Callable[[], list[list[str]]], prepared: list[Any], bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    made = sweep(search=SEARCH, trials=4, max_parallel=2, directory="search it's")
    # Both ends of the searched arguments were checked, and no run is claimed before its task starts.
    assert [plan.recipe.train.arguments["weight_decay"] for plan in prepared] == [0.0, 0.1]
    assert made.runs == [] and array_of(submitted()[0]) == "0-3%2"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    first = ask(made, 0)
    plan = first.plan()
    assert 1e-5 <= plan.recipe.train.learning_rate <= 1e-1 and plan.recipe.train.epochs in range(1, 10)
    assert plan.recipe.train.arguments["weight_decay"] in (0.0, 0.1)
    assert first.prepared()["prepared"] == "/prepared/256" and (first.path / "job.sh").is_file()
    assert first.worker_argv()[-1] == str(first.path)
    assert [line["job_id"] for line in first.lines("submissions.jsonl")] == ["100_0"]
    # Put back into the queue: the same trial.
    before = tree(first.path)
    assert ask(made, 0).path == first.path and tree(first.path) == before and len(study(made)) == 1
    second, third = ask(made, 1), ask(made, 2)
    end(first, "finished", 0.75)
    end(second, "failed", code=4, cause="loss", next="end")
    end(third, "failed", code=4, cause="killed", next="requeue")
    ask(made, 3)
    assert [(trial.state.name, trial.value) for trial in study(made)] == [
        ("COMPLETE", 0.75), ("FAIL", None), ("RUNNING", None), ("RUNNING", None),
    ]  # fmt: skip
    # The same command: what failed by its own fault is replaced, what was killed goes on, what waits is left alone.
    queue(bin, "100_3 RUNNING")
    again = sweep(search=SEARCH, trials=4, max_parallel=2, directory="search it's")
    assert array_of(submitted()[-1]) == "2,4%1" and again.record.cells[-1].name == "trial-004"
    assert len(prepared) == 2
    table = again.table()
    assert table.rows[0].point == "trial-000" and table.best is not None
    assert float(table.best.overrides["train.learning_rate"]) == pytest.approx(
        plan.recipe.train.learning_rate, rel=1e-5
    )
    assert "Best of 1 finished: trial-000" in str(table)
    with pytest.raises(InputError, match="is a search of another space"):
        sweep(search=SEARCH[:1], trials=4, directory="search it's")


def test_a_search_that_prunes(sweep: Callable[..., Sweep], prepared: list[Any]) -> None:
    """Each trial gets what it is compared by; a pruned one counts with its value. What prunes nothing is refused."""
    rates = ["train.learning_rate=1e-5..1e-1:log"]
    options = {"search": rates, "trials": 3, "directory": "pruned", "prune": True}
    with pytest.raises(InputError, match=r"`train\.epochs` is searched, and trials of different lengths"):
        sweep(**{**options, "search": SEARCH})
    with pytest.raises(InputError, match="each is evaluated once, at its end"):
        sweep(**options)
    options["overrides"] = ["train.epochs=3"]
    made = sweep(**options)
    run = ask(made, 0)
    assert read_json(run.path / "pruning.json") == {"metric": "eval_accuracy", "lower": False}
    end(run, "finished", 0.25, pruned=True)
    end(ask(made, 1), "finished", 0.75)
    ask(made, 2)
    assert [(t.state.name, t.value) for t in study(made)][:2] == [("COMPLETE", 0.25), ("COMPLETE", 0.75)]
    table = made.table()
    assert "Best of 2 finished, 1 of them pruned: trial-001" in str(table)
    shown = {line.split()[0]: line.split()[-1] for line in str(table).splitlines() if line.startswith("trial-")}
    assert (shown["trial-000"], shown["trial-001"]) == ("pruned", "finished")
    assert [row.get("pruned", False) for row in table.to_dict()["rows"]] == [False, True, False]
    with pytest.raises(InputError, match="was made with --prune"):
        sweep(**{**options, "prune": False})


def test_a_search_with_a_seed_is_repeatable_and_learns(sweep: Callable[..., Sweep]) -> None:
    """Trials one after another try the same values again, other ones with another seed; and come near the best."""
    tried: dict[str, list[float]] = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = sweep(search=["train.learning_rate=1e-6..1e-1:log"], trials=25, directory=name, search_seed=seed)
        rates = tried[name] = []
        for number in range(25 if name == "a" else 4):
            run = ask(made, number)
            rates.append(run.plan().recipe.train.learning_rate)
            off = abs(math.log10(rates[-1]) + 3)  # best at 1e-3
            end(run, "finished", 1 - off / 5)
    assert tried["a"][:4] == tried["b"] and tried["a"][:4] != tried["c"]
    assert len(set(tried["a"])) == 25

    def mean_distance(rates: list[float]) -> float:
        return sum(abs(math.log10(rate) + 3) for rate in rates) / len(rates)

    assert mean_distance(tried["a"][15:]) < 0.6 * mean_distance(tried["a"][:10]), tried["a"]


def test_a_search_survives_what_a_kill_leaves(sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn last line in the journal; a trial that was asked for and never claimed; one that makes no run."""
    from afina.worker.node import trial

    made = sweep(search=SEARCH[:1], trials=3, directory="s")
    with monkeypatch.context() as patch:
        patch.setattr(trial, "_claim", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ask(made, 0)
    with made.dir.journal.open("ab") as journal:
        journal.write(b'{"op_code":4,"worker_')
    lost = study(made)[0].params
    run = ask(made, 0)
    assert run.plan().recipe.train.learning_rate == lost["train.learning_rate"] and len(study(made)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(trial, "geometry_for", lambda *_, **__: (_ for _ in ()).throw(InputError("does not divide", "")))
        with pytest.raises(InputError):
            trial.answer([str(made.dir.run("trial-001").path)])
    assert [t.state.name for t in study(made)] == ["RUNNING", "FAIL"] and not made.dir.run("trial-001").path.exists()
    ask(made, 1)
    assert len(study(made)) == 3


def test_many_ask_at_once(sweep: Callable[..., Sweep]) -> None:
    """Processes that ask at the same moment get trials of their own."""
    made = sweep(search=SEARCH[:1], trials=4, directory="s")
    argv = [os.fsdecode(word) for word in (made.path / "trial.argv").read_bytes().split(b"\0")[:-1]]
    runs = [made.dir.run(cell.name) for cell in made.record.cells]
    asking = [subprocess.Popen([*argv, str(run.path)], stdout=subprocess.DEVNULL) for run in runs]
    assert [process.wait(timeout=120) for process in asking] == [0] * 4
    assert len({run.plan().recipe.train.learning_rate for run in runs}) == 4
    assert sorted(t.user_attrs["cell"] for t in study(made)) == [run.path.name for run in runs]
