"""The fault suite without a cluster: each scenario once, and random kills.

`make test` runs one scenario of each kind (`ONE_OF_EACH_KIND`), `make test-series` some of the others on each day and five kills;
with AFINA_LONG=1 all of them and fifty.

Three runs at a time: a run often waits, so two cores suffice. AFINA_FAULTS_SEED repeats the choices of an earlier session;
their effect depends on the machine. A fault that comes too late proves nothing, and its scenario is run once more.
Scenarios that need root (small disks, network namespaces) are skipped without it.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.common import LONG, some_of
from tests.faults import results
from tests.faults.live_run import Setting
from tests.faults.results import Result
from tests.faults.run import KILLS_PER_RUN, Suite, local_suite, main
from tests.faults.scenarios import ADAPTER, FSDP, SCENARIOS
from tests.unit.forks import ForkedWorkers, serve_forks

SEED = os.environ.get("AFINA_FAULTS_SEED") or str(random.randrange(10**6))
#: Runs that are killed at random: processes, changes of the recipe, kills.
KILLED: dict[str, tuple[int, dict[str, Any], int]] = {
    "all weights": (1, {}, 50 if LONG else 5),
    "an adapter": (2, ADAPTER, 25 if LONG else 3),
    "shards": (2, FSDP, 25 if LONG else 3),
    **({"an adapter on one process": (1, ADAPTER, 25)} if LONG else {}),
}
#: Killed, stopped on request, a full disk, damaged checkpoints; killed and stopped with an adapter.
ONE_OF_EACH_KIND = ("kill-all", "term-step", "full-in-save", "checkpoint-bit-flipped", "adapter-kill", "adapter-stop")
_BY_NAME = {scenario.name: scenario for scenario in SCENARIOS if "local" in scenario.where and not scenario.slow}
_OTHERS = [name for name in _BY_NAME if name not in ONE_OF_EACH_KIND]

ResultOf = Callable[[str], Result]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("it's a place")


@pytest.fixture(scope="module")
def suites(place: Path) -> dict[int, Suite]:
    serve_forks()
    return {n: local_suite(place, Setting(per_node=n), ForkedWorkers) for n in (1, 2)}


@pytest.fixture(scope="module")
def result_of(request: pytest.FixtureRequest, suites: dict[int, Suite]) -> Iterator[ResultOf]:
    """The result of a scenario, or of a run with random kills. All that are selected run in a pool, in the tests' order."""
    names: list[str] = []
    for item in request.session.items:
        params = getattr(item, "callspec", None) and item.callspec.params
        names += [params["scenario"]] if params and "scenario" in params else []
        names += _runs(params["kind"]) if params and "kind" in params else []
    with ThreadPoolExecutor(3) as pool:
        pool.submit(suites[1].reference, {})
        futures = {name: pool.submit(_run, suites, name) for name in names}
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


def _runs(kind: str) -> list[str]:
    """Names of the runs with this kind's kills: `an adapter/0`, ..."""
    return [f"{kind}/{number}" for number in range(-(-KILLED[kind][2] // KILLS_PER_RUN))]


def _run(suites: dict[int, Suite], name: str) -> Result:
    kind, _, number = name.partition("/")
    if number:
        processes, changes, kills = KILLED[kind]
        kills = min(KILLS_PER_RUN, kills - int(number) * KILLS_PER_RUN)
        return suites[processes].random_kills(f"{SEED}/{kind}", int(number), kills, changes)
    scenario = _BY_NAME[name]
    suite = suites[scenario.num_processes]
    result = suite.run(scenario, SEED)
    return result if result.injected else suite.run(scenario, SEED + "/again")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "scenario",
    [
        *ONE_OF_EACH_KIND,
        *(pytest.param(name, marks=pytest.mark.series) for name in some_of(_OTHERS, 10)),
    ],
)
def test_a_run_survives(suites: dict[int, Suite], result_of: ResultOf, scenario: str) -> None:
    if reason := suites[_BY_NAME[scenario].num_processes].applies(_BY_NAME[scenario]):
        pytest.skip(reason)
    result = result_of(scenario)
    print(f"AFINA_FAULTS_SEED={SEED}\n{results.table([result])}\n{result.difference}")
    assert not result.broken
    assert result.injected


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KILLED)
def test_random_kills_change_nothing(suites: dict[int, Suite], result_of: ResultOf, kind: str) -> None:
    processes, changes, kills = KILLED[kind]
    runs = [result_of(name) for name in _runs(kind)]
    while (missing := kills - sum(result.kills for result in runs)) > 0:  # replaces kills that came too late
        again = suites[processes].random_kills(f"{SEED}/{kind}", len(runs), min(missing, KILLS_PER_RUN), changes)
        runs.append(again)
    print(f"AFINA_FAULTS_SEED={SEED}\n{results.table(runs)}\n" + "\n".join(result.difference for result in runs))
    assert not [result.broken for result in runs if result.broken]


def test_the_command_lists_the_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [scenario.name for scenario in SCENARIOS]
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python tests/faults/run.py --kills 200" in capsys.readouterr().out


def test_several_calls_become_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def record(scenario: str, setting: str, **changes: object) -> str:
        texts = {"scenario": scenario, "setting": setting, "seed": "1", "difference": "", "run": ""}
        lists: dict[str, object] = {"faults": [], "endings": [], "broken": []}
        zeros = dict.fromkeys(("attempts", "by_hand", "overlooked", "seconds", "seconds_lost", "kills"), 0)
        flags = dict.fromkeys(("refused", "lost", "silent", "hung"), False)
        equal = {"weights_equal": True, "metrics_equal": True, "injected": True, "repeated": 7}
        return json.dumps({**texts, **lists, **zeros, **flags, **equal, **changes}) + "\n"

    (tmp_path / "1").write_text(record("kill-all", "local 1") + record("scancel", "local 1", injected=False))
    (tmp_path / "2").write_text(record("kill-all", "local 2", broken=["lost"]))
    assert main(["--show", str(tmp_path / "1"), str(tmp_path / "2")]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.strip("| ").split(" | ") for row in rows if "-:" not in row] == [
        ["scenario", "local 1", "local 2"],
        ["kill-all", "7", "BROKEN"],
        ["scancel", "too late", "–"],
    ]
