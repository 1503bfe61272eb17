"""Runs at a glance: what a table of a thousand runs needs of each, read without validating it.

`glance` reads plan and outcome as plain JSON, so that runs of another afina and damaged ones stay in the table. Nothing is
asked of Slurm, and no predictions are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.recipe.metrics import METRICS

__all__ = ["Glance", "differing", "glance", "names_of"]

#: Keys of a recipe that say nothing about what was trained.
_NOT_COMPARED = ("name",)


@dataclass(frozen=True)
class Glance:
    """One run.

    Attributes:
        recipe: its keys, flat: `train.learning_rate` -> value. Empty where the plan cannot be read.
        outcome: the outcome's fields; empty where there is none.
        metrics: the scores that are one number, `eval_` taken off.
        metric: the one that chooses the best checkpoint, or None.
    """

    path: Path
    recipe: Mapping[str, Any]
    outcome: Mapping[str, Any]
    metrics: Mapping[str, float]
    metric: str | None

    @property
    def state(self) -> str:
        return str(self.outcome.get("outcome") or "no outcome")


def glance(path: Path) -> Glance:
    """Read one run; what is missing or damaged is empty."""
    plan, outcome = _json(path / "plan.json"), _json(path / "outcome.json")
    recipe = plan.get("recipe")
    flat = _flat(recipe) if isinstance(recipe, dict) else {}
    found = outcome.get("metrics")
    metrics = {
        name.removeprefix("eval_"): float(value)
        for name, value in (found if isinstance(found, dict) else {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    task = str(outcome.get("task") or flat.get("task"))
    metric = flat.get("train.best_metric") or next(iter(METRICS.get(task, ())), None)
    return Glance(path, flat, outcome, metrics, metric if metric in metrics else None)


def differing(runs: Sequence[Glance]) -> list[str]:
    """Keys of the recipes that are not the same in all runs, in the order of the recipe."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe)
    missing = object()
    return [
        key
        for key in keys
        if key not in _NOT_COMPARED
        and any(run.recipe.get(key, missing) != runs[0].recipe.get(key, missing) for run in runs[1:])
    ]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that still differ: the last parts of the paths, as many as are needed."""
    whole = [path.absolute().parts for path in paths]
    for depth in range(1, max((len(parts) for parts in whole), default=1) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{path}{key}.")
        elif value not in (None, {}, []):
            flat[f"{path}{key}"] = value
    return flat


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
