"""All that a page is made of, read once: `read_facts` touches the disk (and asks `sacct`), the sections do not.

A file that is missing or damaged leaves its part empty: a run that failed, or is still training, has a page too. What needs NumPy or pyarrow
is a line of text where they are not installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import AfinaError
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.run.plan import Plan
from afina.run.record import read_record
from afina.slurm.accounting import FIELDS, AttemptTimes, Used, job_ids, timeline, used
from afina.slurm.client import accounting
from afina.statistics.predictions import Predictions, need, read_predictions
from afina.statistics.scores import Scores, score

__all__ = ["Attempt", "Facts", "Lengths", "read_facts", "read_json"]

PARTS = {"eval": "predictions.parquet", "test": "predictions_test.parquet"}


@dataclass(frozen=True)
class Attempt:
    """One attempt: what its node wrote down (`env.json`), when it did what, how it ended."""

    name: str
    facts: Mapping[str, Any]
    exit_code: str | None
    times: AttemptTimes


@dataclass(frozen=True)
class Lengths:
    """Tokens of the texts of one part.

    Attributes:
        bars: (from, to, texts) of equal bins.
        batches: the real tokens of a batch over its width times its rows, with as many rows as the run's, for random batches.
    """

    rows: int
    shortest: int
    median: float
    mean: float
    longest: int
    cut: int
    bars: tuple[tuple[float, float, float], ...]
    longest_share: float


@dataclass(frozen=True)
class Facts:
    """A run as it lies on disk.

    Attributes:
        predictions, scores: part -> what was found, or in words why not; parts that the run has no predictions for are left out.
        lengths: part -> as above.
        jobs: what accounting says; None where there is none.
        utilisation: of the outcome: tokens per second, memory, seconds by part, …; empty where nobody measured them.
    """

    path: Path
    plan: Plan
    outcome: Outcome | None
    prepared: Mapping[str, Any]
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    attempts: Sequence[Attempt]
    recipe_text: str | None
    predictions: Mapping[str, Predictions | str]
    scores: Mapping[str, Scores]
    lengths: Mapping[str, Lengths | str]
    jobs: Sequence[Used] | None
    utilisation: Mapping[str, Any]

    @property
    def labels(self) -> list[str]:
        return list((self.outcome.labels if self.outcome else None) or self.prepared.get("labels") or [])

    @property
    def task(self) -> str:
        """single-label, multi-label, regression, or auto where nobody knows yet."""
        return str((self.outcome.task if self.outcome else None) or self.prepared.get("task") or self.plan.recipe.task)

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        return [line for line in self.metrics if "eval_loss" in line]


def read_facts(run: RunDir) -> Facts:
    """Read a run.

    Raises:
        InputError: its plan cannot be read.
    """
    plan = run.plan()
    events = list(_objects(run, "events.jsonl"))
    times = {attempt.name: attempt for attempt in timeline(events)}
    attempts = [
        Attempt(
            name,
            read_json(run.attempts / name / "env.json"),
            _text(run.attempts / name / "exit"),
            times.get(name, AttemptTimes(name)),
        )
        for name in run.attempt_names()
    ]
    predictions = {part: _predictions(run.path / name) for part, name in PARTS.items() if (run.path / name).exists()}
    prepared = read_json(run.path / "prepared.json")
    rows = accounting(job_ids(_objects(run, "submissions.jsonl"), [a.name for a in attempts]), FIELDS)
    return Facts(
        path=run.path,
        plan=plan,
        outcome=run.outcome(),
        prepared=prepared,
        record=read_record(run.path),
        metrics=list(_objects(run, "metrics.jsonl")),
        events=events,
        attempts=attempts,
        recipe_text=_text(run.path / "recipe.yaml"),
        predictions=predictions,
        scores={
            part: score(found) for part, found in predictions.items() if isinstance(found, Predictions) and len(found)
        },
        lengths=_lengths(prepared, plan),
        jobs=used(rows) if rows is not None else None,
        utilisation=_utilisation(run),
    )


def _utilisation(run: RunDir) -> dict[str, Any]:
    found = read_json(run.outcome_file).get("utilisation")
    return found if isinstance(found, dict) else {}


def _objects(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [line for line in run.lines(name) if isinstance(line, dict)]


def _predictions(path: Path) -> Predictions | str:
    try:
        return read_predictions(path)
    except AfinaError as error:
        return str(error)


def _lengths(prepared: Mapping[str, Any], plan: Plan) -> dict[str, Lengths | str]:
    """Lengths of the texts, where the prepared data is still there."""
    folder = Path(str(prepared.get("prepared") or "/nowhere"))
    parts = [part for part in prepared.get("rows") or {} if (folder / f"{part}.offsets.npy").is_file()]
    try:
        if parts:
            need("the lengths of the texts", "numpy")
        return {part: _lengths_of(folder / f"{part}.offsets.npy", plan) for part in parts}
    except AfinaError as error:
        return {part: str(error) for part in parts}


def _lengths_of(path: Path, plan: Plan) -> Lengths | str:
    import numpy as np

    try:
        lengths = np.diff(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        return f"{path.name} of the prepared data cannot be read: {str(error).splitlines()[0]}"
    if not len(lengths):
        return f"{path.name} of the prepared data is empty"
    width = max(1, -(-int(lengths.max()) // 40))
    edges = np.arange(0, int(lengths.max()) + width + 1, width)
    counts, _ = np.histogram(lengths, edges)
    size = plan.geometry.batch_per_device
    shuffled = np.random.default_rng(plan.recipe.train.seed).permutation(lengths)
    whole = shuffled[: len(shuffled) // size * size].reshape(-1, size) if len(shuffled) >= size else shuffled[None, :]
    return Lengths(
        rows=len(lengths),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        cut=int((lengths >= plan.recipe.tokens.max_length).sum()),
        bars=tuple((float(a), float(b), float(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)),
        longest_share=float(whole.sum() / (whole.max(axis=1).sum() * whole.shape[1])),
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\n")
    except OSError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing or damaged: the page shows the rest."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
