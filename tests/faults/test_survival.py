"""The suite of faults at its smallest: each case that needs no cluster once, and twenty random kills.

Three runs side by side: two cores take them, for a run often waits. AFINA_FAULTS_SEED repeats the choices of an earlier
session; what they meet differs, for the machine decides it. A strike that comes too late proves nothing and is tried
again once. Cases that need root (small disks, networks of their own) are left out without it.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.faults import stories
from tests.faults.cases import CASES, Case
from tests.faults.live import Setting
from tests.faults.run import KILLS_PER_RUN, Suite, here_suite, main
from tests.faults.stories import Story

SEED = os.environ.get("AFINA_FAULTS_SEED") or str(random.randrange(10**6))
KILLS = 20
_SOAKS = [f"soak-{number}" for number in range(-(-KILLS // KILLS_PER_RUN))]
_BY_NAME = {fault.name: fault for fault in CASES if "here" in fault.where and not fault.slow}

Tell = Callable[[str], Story]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("it's a place")


@pytest.fixture(scope="module")
def suites(place: Path) -> dict[int, Suite]:
    return {n: here_suite(place, Setting(per_node=n)) for n in (1, 2)}


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest, suites: dict[int, Suite]) -> Iterator[Tell]:
    """The story of a case, or of a run of the soak. All that are selected run in a pool, in the order of the tests."""
    names: list[str] = []
    for item in request.session.items:
        if (call := getattr(item, "callspec", None)) and "story" in call.params:
            names.append(call.params["story"])
        elif item.name == test_twenty_random_kills_change_nothing.__name__:
            names += _SOAKS
    with ThreadPoolExecutor(3) as pool:
        told = {name: pool.submit(_story, suites, name) for name in names}
        yield lambda name: told[name].result()
        for future in told.values():
            future.cancel()


def _story(suites: dict[int, Suite], name: str) -> Story:
    if name.startswith("soak-"):
        return suites[1].soak(SEED, int(name.removeprefix("soak-")), KILLS_PER_RUN)
    fault = _BY_NAME[name]
    suite = suites[fault.num_processes]
    story = suite.tell(fault, SEED)
    return story if story.struck else suite.tell(fault, SEED + "/again")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("story", _BY_NAME)
def test_a_run_survives(suites: dict[int, Suite], tell: Tell, story: str) -> None:
    fault: Case = _BY_NAME[story]
    if reason := suites[fault.num_processes].applies(fault):
        pytest.skip(reason)
    told = tell(story)
    print(f"AFINA_FAULTS_SEED={SEED}\n{stories.table([told])}\n{told.difference}")
    assert not told.broken
    assert told.struck


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_random_kills_change_nothing(suites: dict[int, Suite], tell: Tell) -> None:
    told = [tell(name) for name in _SOAKS]
    while (missing := KILLS - sum(story.kills for story in told)) > 0:  # one that came too late is made up for
        told.append(suites[1].soak(SEED, len(told), min(missing, KILLS_PER_RUN)))
    print(f"AFINA_FAULTS_SEED={SEED}\n{stories.table(told)}\n" + "\n".join(story.difference for story in told))
    assert not [story.broken for story in told if story.broken]


def test_the_command_says_what_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [fault.name for fault in CASES]
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python tests/faults/run.py --kills 200" in capsys.readouterr().out


def test_several_calls_become_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(case: str, setting: str, **changes: object) -> str:
        texts = {"case": case, "setting": setting, "seed": "1", "difference": "", "run": ""}
        lists: dict[str, object] = {"happened": [], "endings": [], "broken": []}
        zeros = dict.fromkeys(("attempts", "by_hand", "overlooked", "seconds", "seconds_lost", "kills"), 0)
        flags = dict.fromkeys(("refused", "lost", "silent", "hung"), False)
        equal = {"weights_equal": True, "metrics_equal": True, "struck": True, "repeated": 7}
        return json.dumps({**texts, **lists, **zeros, **flags, **equal, **changes}) + "\n"

    (tmp_path / "1").write_text(told("kill-all", "here 1") + told("scancel", "here 1", struck=False))
    (tmp_path / "2").write_text(told("kill-all", "here 2", broken=["lost"]))
    assert main(["--show", str(tmp_path / "1"), str(tmp_path / "2")]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.strip("| ").split(" | ") for row in rows if "-:" not in row] == [
        ["case", "here 1", "here 2"],
        ["kill-all", "7", "BROKEN"],
        ["scancel", "too late", "–"],
    ]
