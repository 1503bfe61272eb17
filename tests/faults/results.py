"""The result of one run under faults; tables of results in Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.faults.scenarios import Scenario

__all__ = ["RANDOM", "Result", "as_record", "broken_promises", "from_record", "grid", "table"]

_CODES = {"0", "2", "3", "4", "75"}
#: The scenario name of a run that is killed at random.
RANDOM = "random kills"


@dataclass(frozen=True)
class Result:
    """Attributes:
    faults: what was injected and repaired, in order.
    endings: how each attempt ended, as far as it was observed.
    attempts: folders in attempts/.
    by_hand: manual resumes.
    repeated: steps that were logged, and then done again.
    overlooked: committed steps that an attempt did not start from.
    weights_equal, metrics_equal: to the undisturbed run's, byte for byte.
    seconds, seconds_lost: wall time from the claim to the end; the same less the undisturbed run's.
    injected: every fault came in time; otherwise the result proves nothing.
    refused: a resume was refused.
    lost: the run did not finish. silent: it restarted at step 0 despite a committed checkpoint. hung: it had to be killed.
    kills: faults that came in time.
    broken: broken promises, in words.
    difference: where the log differs from the undisturbed run's, or why the run failed.
    """

    scenario: str
    setting: str
    seed: str
    faults: tuple[str, ...]
    endings: tuple[str, ...]
    attempts: int
    by_hand: int
    repeated: int
    overlooked: int
    weights_equal: bool
    metrics_equal: bool
    seconds: float
    seconds_lost: float
    injected: bool
    refused: bool
    lost: bool
    silent: bool
    hung: bool
    kills: int = 0
    difference: str = ""
    run: str = ""
    broken: tuple[str, ...] = ()


def broken_promises(scenario: Scenario, result: Result) -> Iterator[str]:
    if result.lost:
        yield "the run is lost"
    if result.silent:
        yield "it restarted from step 0 despite a committed checkpoint"
    if result.hung:
        yield "it hung"
    if not (result.lost or result.weights_equal):
        yield "the weights differ"
    if not (result.lost or result.metrics_equal):
        yield "the metrics log differs"
    if result.overlooked:
        yield f"{result.overlooked} committed steps were not used"
    if scenario.unattended and result.by_hand:
        yield "it did not resume by itself"
    if scenario.refused and not result.refused:
        yield "it was not refused"
    if scenario.graceful and result.repeated:
        yield "it was asked to stop, and steps were repeated"
    asked = scenario.graceful and result.setting.startswith("local") and result.injected
    if asked and "exit code 75" not in result.endings[0]:
        yield "it was asked to stop, and did not end with 75"
    for ending in result.endings:
        word, _, code = ending.partition("exit code ")
        if not word and code not in _CODES:
            yield f"exit code {code} is not in the README"
        if "killed by" in ending and "SIGKILL" not in ending:
            yield f"it was {ending}"


def table(results: Iterable[Result]) -> str:
    """Markdown: one line per result, and a summary."""
    results = list(results)
    head = ["scenario", "where", "faults", "attempts", "by hand", "steps repeated", "weights", "metrics log"]
    head += ["s lost", "lost", "silent restart", "promise"]
    rows = [head, ["---"] * 3 + ["---:"] * 3 + ["---"] * 2 + ["---:"] + ["---"] * 3, *map(_row, results)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    kills = sum(r.kills for r in results if r.scenario == RANDOM)
    summary = [
        f"{len(results)} runs",
        *([f"{kills} random kills"] if kills else []),
        f"{sum(r.lost for r in results)} lost",
        f"{sum(r.silent for r in results)} silent restarts",
        f"{sum(r.hung for r in results)} hung",
        f"{sum(r.weights_equal and r.metrics_equal for r in results)} identical to the undisturbed run",
    ]
    return "\n".join([*lines, "", "; ".join(summary) + "."])


def _row(result: Result) -> list[str]:
    endings = f" ({', '.join(result.endings)})"
    return [
        result.scenario,
        result.setting,
        "; ".join(result.faults) + endings + ("; HUNG" if result.hung else ""),
        str(result.attempts),
        str(result.by_hand),
        str(result.repeated),
        "equal" if result.weights_equal else "DIFFER",
        "equal" if result.metrics_equal else "DIFFER",
        f"{result.seconds_lost:.0f}",
        "LOST" if result.lost else "no",
        "YES" if result.silent else "no",
        "BROKEN: " + "; ".join(result.broken) if result.broken else "kept" if result.injected else "not tested",
    ]


def grid(results: Iterable[Result]) -> str:
    """Markdown: a line per scenario, a column per setting; the steps repeated, or that a promise was broken."""
    by_scenario: dict[str, dict[str, Result]] = {}
    for result in results:
        by_scenario.setdefault(result.scenario, {})[result.setting] = result
    settings = list(dict.fromkeys(setting for cells in by_scenario.values() for setting in cells))
    rows = [["scenario", *settings], ["---", *["---:"] * len(settings)]]
    rows += [[name, *(_cell(cells.get(setting)) for setting in settings)] for name, cells in by_scenario.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(result: Result | None) -> str:
    if result is None:
        return "–"
    return "BROKEN" if result.broken else str(result.repeated) if result.injected else "too late"


def as_record(result: Result) -> dict[str, Any]:
    return dataclasses.asdict(result)


def from_record(record: Mapping[str, Any]) -> Result:
    lists = {name: tuple(record[name]) for name in ("faults", "endings", "broken")}
    return Result(**{**record, **lists})
