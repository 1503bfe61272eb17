"""Everything that a page shows, read once: `read_facts` reads files, and asks Slurm about jobs that have not ended and for their accounting; the sections are pure.

A missing or damaged file leaves its split empty: a run that failed or is still training has a page too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import AfinaError
from afina.files import read_json
from afina.recipe.metrics import METRICS, metric_name
from afina.run.directory import RunDir, job_ids_of
from afina.run.outcome import Outcome, data_warnings
from afina.run.plan import Plan
from afina.run.provenance.methods import execution_of
from afina.run.provenance.record import read_record, recipe_as_run
from afina.run.provenance.split_looks import times_looked
from afina.slurm.accounting import JobUsage, job_usage
from afina.statistics.decision_rule import DecisionRule, read_rule
from afina.statistics.entities import entity_types
from afina.statistics.predictions import Predictions, read_predictions
from afina.statistics.scores import Scores, score
from afina.watch.overview import RunSummary, summary_of
from afina.watch.timeline import AttemptTimes, timeline

__all__ = ["AttemptFacts", "Lengths", "RunFacts", "read_facts"]


@dataclass(frozen=True)
class AttemptFacts:
    """One attempt: its `env.json`, its times, its exit code."""

    name: str
    environment: Mapping[str, Any]
    exit_code: str | None
    times: AttemptTimes


@dataclass(frozen=True)
class Lengths:
    """Tokens per text of one split.

    Attributes:
        cut: texts of `tokens.max_length` or more tokens.
        bars: (from, to, texts) of equal bins.
        longest_share: share of real tokens if random batches of the run's size are padded to their longest text.
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
class RunFacts:
    """A run as it is on disk.

    Attributes:
        predictions: split -> its predictions, or the reason why they cannot be read; splits without predictions are left out.
        scores: split -> scores of its predictions.
        lengths: split -> lengths of its texts, or the reason why they cannot be read.
        jobs: Slurm's accounting of the run's jobs; None without accounting.
        recipe_text, overrides, recipe_note: the recipe that was run, and a note if `recipe.yaml` is another one.
        execution: what the newest attempt computed with.
        summary: state, and what to do next, as `afina status` says it.
        looks: how often `compare` or `sweep` looked at the test split.
        rule: what was fitted on eval for the model in `model/`, if anything was.
        utilisation: of the outcome: tokens per second, memory, seconds by split, …; empty if nothing was measured.
    """

    path: Path
    plan: Plan
    outcome: Outcome | None
    prepared: Mapping[str, Any]
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    attempts: Sequence[AttemptFacts]
    recipe_text: str
    overrides: Sequence[str]
    recipe_note: str
    execution: Mapping[str, str]
    summary: RunSummary
    looks: int
    predictions: Mapping[str, Predictions | str]
    scores: Mapping[str, Scores]
    lengths: Mapping[str, Lengths | str]
    jobs: Sequence[JobUsage] | None
    rule: DecisionRule | None
    utilisation: Mapping[str, Any]

    @property
    def spoiled(self) -> dict[str, list[str]]:
        """Warnings about the data that spoil the numbers of a split, by split."""
        return data_warnings(self.prepared)

    @property
    def labels(self) -> list[str]:
        names = list((self.outcome.labels if self.outcome else None) or self.prepared.get("labels") or [])
        return entity_types(names) if self.task == "token-classification" else names

    @property
    def task(self) -> str:
        """single-label, multi-label, regression, or auto as long as the data has not been examined."""
        return str((self.outcome.task if self.outcome else None) or self.prepared.get("task") or self.plan.recipe.task)

    @property
    def metric(self) -> str:
        """The metric that chooses the best checkpoint."""
        known = [name for scores in self.scores.values() for name in scores.overall]
        known += [name[5:] for line in self.evaluations for name in line if name[:5] == "eval_" and name != "eval_loss"]
        first = METRICS.get(self.task) or known or [""]
        return metric_name(self.plan.recipe.train.best_metric or first[0])

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        return [line for line in self.metrics if "eval_loss" in line]


def read_facts(run: RunDir) -> RunFacts:
    """Read a run.

    Raises:
        InputError: its plan cannot be read.
    """
    plan = run.plan()
    events = list(_objects(run, "events.jsonl"))
    times = {attempt.name: attempt for attempt in timeline(events)}
    attempts = [
        AttemptFacts(
            name,
            read_json(run.attempts / name / "env.json"),
            _text(run.attempts / name / "exit"),
            times.get(name, AttemptTimes(name)),
        )
        for name in run.attempt_names()
    ]
    predictions = {
        split: _predictions(file) for split in ("eval", "test") if (file := run.predictions_of(split)).exists()
    }
    prepared = read_json(run.path / "prepared.json")
    recipe_text, overrides, recipe_note = recipe_as_run(run.path, plan)
    return RunFacts(
        path=run.path,
        plan=plan,
        outcome=run.outcome(),
        prepared=prepared,
        record=read_record(run.path),
        metrics=list(_objects(run, "metrics.jsonl")),
        events=events,
        attempts=attempts,
        recipe_text=recipe_text,
        overrides=overrides,
        recipe_note=recipe_note,
        execution=execution_of(run),
        summary=summary_of(run.path),
        looks=times_looked(run.path),
        predictions=predictions,
        scores={
            split: score(rows) for split, rows in predictions.items() if isinstance(rows, Predictions) and len(rows)
        },
        lengths=_lengths(prepared, plan),
        jobs=job_usage(job_ids_of(_objects(run, "submissions.jsonl"), [a.name for a in attempts])),
        rule=_rule(run, predictions.values()),
        utilisation=_utilisation(run),
    )


def _rule(run: RunDir, predictions: Iterable[Predictions | str]) -> DecisionRule | None:
    for rows in predictions:
        if isinstance(rows, Predictions):
            with contextlib.suppress(AfinaError):
                return read_rule(run.model, rows.task, rows.labels)
    return None


def _utilisation(run: RunDir) -> dict[str, Any]:
    value = read_json(run.outcome_file).get("utilisation")
    return value if isinstance(value, dict) else {}


def _objects(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [line for line in run.lines(name) if isinstance(line, dict)]


def _predictions(path: Path) -> Predictions | str:
    try:
        return read_predictions(path)
    except AfinaError as error:
        return str(error)


def _lengths(prepared: Mapping[str, Any], plan: Plan) -> dict[str, Lengths | str]:
    """Lengths of the texts, as long as the prepared data exists."""
    folder = Path(str(prepared.get("prepared") or "/nowhere"))
    files = {split: folder / f"{split}.offsets.npy" for split in prepared.get("rows") or {}}
    if plan.recipe.data.fold is not None and "train" in files:
        files["all folds"] = files.pop("train")
    return {split: _lengths_of(file, plan) for split, file in files.items() if file.is_file()}


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
