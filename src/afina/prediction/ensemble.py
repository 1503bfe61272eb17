"""Ensembles: the mean of the probabilities of finished runs, scored on rows that all of them were evaluated on; nothing is trained.

    FOLDER/ensemble.json      the members by their run directories, and the scores; `afina predict FOLDER new.csv` averages the members' predictions

A member is where it was, or where it is beside the ensemble's folder, so that both can be moved together. The folds of one cross-validation have no
common eval rows: each row was trained on by some of them. Their ensemble has scores of test, or none.

The probabilities of a member are those after its temperature, where one was fitted. The most probable class is chosen, or the labels above one
half: thresholds of the members are not used, since they are of other probabilities. Not covered: weights of the members.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from afina.errors import DataError, InputError
from afina.files import name_aside, read_json, write_atomic
from afina.prediction.request import ENSEMBLE, Member, find_model
from afina.publish import rename_new
from afina.recipe.metrics import METRICS, lower_is_better, metric_name, selection_metric
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir, is_run_dir
from afina.run.outcome import Outcome, data_warnings
from afina.statistics.decision_rule import DecisionRule, read_rule, revised
from afina.statistics.measures import compute
from afina.statistics.paired import compare_paired, compare_with_mean
from afina.statistics.predictions import Predictions, aligned, averaged, read_predictions
from afina.statistics.scores import score
from afina.text import finite
from afina.version import __version__
from afina.watch.find import find_runs, short_names

__all__ = ["make_ensemble", "members_of"]


def make_ensemble(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], out: str | Path) -> dict[str, Any]:
    """Score the ensemble of these runs and write it into a new folder; returns what `ensemble.json` holds.

    Args:
        paths: run directories; a folder stands for the runs below it.

    Returns: `task`, `labels`, `metric` (by which the best member is chosen), `members`, `notes`; `splits`: split -> rows, best (its name), scores with
        limits, and the paired differences of the ensemble from the best member and from the mean of the members.

    Raises:
        InputError: fewer than two runs, one that has not finished, other tasks, labels or texts, no common rows (but folds); `out` exists.
    """
    target = Path(out).expanduser().absolute()
    if target.exists():
        raise InputError(f"-o {target}: exists; nothing that exists is overwritten", "choose another folder with -o")
    folders = list(dict.fromkeys(path.absolute() for path in find_runs(paths)))
    if len(folders) < 2:
        raise InputError(
            "an ensemble needs more than one run", "give two run directories or more, or the folder of a sweep"
        )
    runs, names = [RunDir(folder) for folder in folders], short_names(folders)
    recipe, outcome = _check_alike(runs, names)
    task, labels = outcome.task or "single-label", list(outcome.labels or ())
    metric = metric_name(recipe.train.best_metric or selection_metric(task))
    metric = metric if metric in METRICS[task] and metric != "confusion_matrix" else METRICS[task][0]
    asked = [name for name in (*METRICS[task][:2], "log_loss", *(recipe.metrics or ())) if name in METRICS[task]]
    metrics = [name for name in dict.fromkeys([metric, *asked]) if name != "confusion_matrix"]
    read, notes = _common_rows(runs, metric)
    chosen = _best(next(iter(read.values())), metric) if read else 0
    splits = {split: _scored(members, chosen, names, metrics) for split, members in read.items()}
    about = [
        {
            "run": str(run.path),
            "beside": os.path.relpath(run.path, target),
            "name": name,
            "temperature": _rule(run, task, labels).temperature,
        }
        for run, name in zip(runs, names, strict=True)
    ]
    record: dict[str, Any] = finite(
        {
            "afina": __version__,
            "task": task,
            "labels": labels,
            "metric": metric,
            "members": about,
            "splits": splits,
            "notes": notes,
        }
    )
    _publish(target, record)
    return record


def members_of(path: str | os.PathLike[str]) -> tuple[RunDir, tuple[Member, ...]] | None:
    """The first run of an ensemble, and all members; None of anything else.

    Raises:
        InputError: it cannot be read, or a member is gone.
    """
    file = Path(path).expanduser() / ENSEMBLE
    if not file.is_file():
        return None
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["members"]
        folders = [_where(Path(each["run"]), each.get("beside"), file.parent.absolute()) for each in listed]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be read: {error}", "make the ensemble again: afina ensemble RUN… -o FOLDER"
        ) from None
    members: list[Member] = []
    for folder in folders:
        run, model = find_model(folder) if is_run_dir(folder) else (None, folder)
        if run is None:
            raise InputError(
                f"{folder}: a member of {file.parent}, is not a run directory any more",
                "put it back, or make the ensemble again of the others: afina ensemble RUN… -o FOLDER",
            )
        recipe = run.plan().recipe
        members.append(Member(model=model, tokens=recipe.tokens, trust_remote_code=recipe.trust_remote_code))
    return RunDir(folders[0]), tuple(members)


def _where(run: Path, beside: str | None, folder: Path) -> Path:
    """Where a member is: where it was, or as it lay beside the ensemble's folder."""
    moved = Path(os.path.normpath(folder / beside)) if beside else run
    return run if is_run_dir(run) or not is_run_dir(moved) else moved


def _check_alike(runs: Sequence[RunDir], names: Sequence[str]) -> tuple[Recipe, Outcome]:
    """Recipe and outcome of the first run; the others have its task, labels and texts."""
    outcomes = [run.outcome() for run in runs]
    for run, name, outcome in zip(runs, names, outcomes, strict=True):
        if outcome is None or outcome.outcome != "finished" or not run.model.is_dir():
            how = f"it is {outcome.outcome}" if outcome else "it has not finished"
            raise InputError(f"{name}: has no model: {how}", f"`afina resume {name}` continues it; or leave it out")
    recipes = [run.plan().recipe for run in runs]
    remedy = "an ensemble is of runs on the same data with the same labels: of other seeds, or of a sweep"
    if outcomes[0] is not None and outcomes[0].task == "token-classification":
        raise InputError(
            f"{names[0]}: finds entities, of which several models have no mean", "use the best run: `afina compare`"
        )
    for name, recipe, outcome in zip(names[1:], recipes[1:], outcomes[1:], strict=True):
        first = outcomes[0]
        assert first is not None and outcome is not None
        if outcome.task != first.task:
            raise InputError(f"{name}: is {outcome.task}, {names[0]} is {first.task}", remedy)
        if different := sorted(set(outcome.labels or ()) ^ set(first.labels or ())):
            raise InputError(
                f"{name}: has other labels than {names[0]}: {', '.join(different[:5])} are not in both", remedy
            )
        if recipe.data.text != recipes[0].data.text:
            raise InputError(
                f"{name}: reads {', '.join(recipe.data.text)}, {names[0]} reads {', '.join(recipes[0].data.text)}",
                remedy,
            )
    assert outcomes[0] is not None
    return recipes[0], outcomes[0]


def _common_rows(runs: Sequence[RunDir], metric: str) -> tuple[dict[str, list[Predictions]], list[str]]:
    """Split -> the predictions of all runs, with their temperatures, row by row; and why a split is left out, or spoilt."""
    read: dict[str, list[Predictions]] = {}
    notes: list[str] = []
    for split in ("eval", "test"):
        if all(run.predictions_of(split).is_file() for run in runs):
            try:
                read[split] = [_with_temperature(run, read_predictions(run.predictions_of(split))) for run in runs]
                read[split] = [aligned(read[split][0], rows) for rows in read[split]]
            except DataError as error:
                read.pop(split, None)
                notes.append(f"{split} is not scored: {error.message}")
    prepared = [read_json(run.path / "prepared.json") for run in runs]
    folds = (
        all(run.plan().recipe.data.fold is not None for run in runs) and len({p.get("digest") for p in prepared}) == 1
    )
    if folds and "eval" not in read:
        notes = [_of_folds(runs, metric), *([] if read else ["A test split would score the ensemble."])]
    elif not read:
        why = "; ".join(notes) or "no split has predictions of all of them"
        raise InputError(
            f"these runs have no common rows: {why}",
            "give runs that were evaluated on the same rows: of other seeds, or with one test split",
        )
    spoilt = [line for each in map(data_warnings, prepared) for split in read for line in each.get(split, ())]
    return read, [*notes, *dict.fromkeys(f"Warning: {line}" for line in spoilt)]


def _of_folds(runs: Sequence[RunDir], metric: str) -> str:
    """Figures of an ensemble of folds: the scores of its members on the rows that they were not trained on."""
    outcomes = [outcome for run in runs if (outcome := run.outcome()) is not None]
    values = [value for o in outcomes if isinstance(value := o.metrics.get(f"eval_{metric}"), int | float)]
    mean = f": {metric} {sum(values) / len(values):.4f} in the mean, each on its own fold" if values else ""
    return (
        "The members are folds: each row of eval was trained on by others of them, so that the ensemble has no score there. "
        f"How one of them does alone is known{mean}."
    )


def _rule(run: RunDir, task: str, labels: Sequence[str]) -> DecisionRule:
    rule = read_rule(run.model, task, labels) if labels else None
    return DecisionRule(rule.temperature if rule else 1.0)


def _with_temperature(run: RunDir, rows: Predictions) -> Predictions:
    return revised(rows, _rule(run, rows.task, rows.labels)) if rows.scores is not None else rows


def _best(members: Sequence[Predictions], metric: str) -> int:
    """The number of the member with the best value."""
    values = [compute(m.task, [metric], m.truth, m.predicted, m.scores, len(m.labels))[0][metric] for m in members]
    known = [i for i, value in enumerate(values) if value is not None]
    if not known:
        return 0
    return (min if lower_is_better(metric) else max)(known, key=lambda i: values[i])


def _scored(members: Sequence[Predictions], best: int, names: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    ensemble = averaged(members)
    overall = score(ensemble, names=metrics).overall
    return {
        "rows": len(ensemble),
        "best": names[best],
        "scores": {name: [i.value, i.low, i.high] for name, i in overall.items()},
        "against_best": compare_paired(members[best], ensemble, extra=metrics).records(metrics),
        "against_mean": [asdict(d) for d in compare_with_mean(members, ensemble, metrics)],
    }


def _publish(target: Path, record: Mapping[str, Any]) -> None:
    aside = name_aside(target)
    try:
        aside.mkdir()
    except FileNotFoundError:
        raise InputError(f"-o {target}: there is no folder {target.parent}", f"mkdir -p {target.parent}") from None
    write_atomic(aside / ENSEMBLE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if not rename_new(aside, target):
        raise InputError(f"-o {target}: exists; nothing that exists is overwritten", "choose another folder with -o")
