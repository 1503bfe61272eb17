"""Runs side by side: differences of recipes, scores and speed, and paired tests of their predictions.

`compare` reads plans and outcomes, a thousand runs in less than a second; `verdicts` reads predictions and tests each run against the
first (`afina.statistics.paired`). A test that is not possible (other eval rows, no predictions, another task) is a reason in words, not
an error. Two cross-validations are tested as a whole, over the folds that both have.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afina.errors import DataError, InputError
from afina.recipe.metrics import NEED_SCORES
from afina.run.directory import RunDir
from afina.run.provenance.methods import execution_of
from afina.statistics.intervals import paired_t_test
from afina.statistics.paired import Difference, Paired, compare_paired, holm
from afina.statistics.predictions import Predictions, align, read_predictions
from afina.text import finite, number, p_value
from afina.watch.find import find_runs
from afina.watch.reading import RunResult, differing, read_result

__all__ = ["Comparison", "Verdict", "compare", "names_of", "test_rows", "to_json", "verdicts"]

#: With more runs, what computed them is not read.
_MOST_EXECUTIONS = 50
#: Fields of the outcome that are compared, after the scores.
_FIELDS = ("outcome", "global_step", "samples_per_second", "seconds", "attempts", "device", "world_size")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: short, and different from each other.
        recipe: key -> one value per run (None: not set), for keys that differ.
        metrics: score -> one value per run.
        about: fields of the outcome, and what computed where that differs -> one value per run.
        split: eval or test: where the scores and predictions are from.
    """

    runs: tuple[RunResult, ...]
    names: tuple[str, ...]
    recipe: dict[str, list[Any]]
    metrics: dict[str, list[float | None]]
    about: dict[str, list[Any]]
    split: str = "eval"

    @property
    def folded(self) -> bool:
        """True if all of them are folds of cross-validations."""
        return all(run.fold is not None for run in self.runs)

    def tests(self, metric: str | None = None) -> list[Verdict]:
        """Paired tests of each run against the first; `metric` is by default what chooses the best checkpoint."""
        return verdicts(self, metric)


@dataclass(frozen=True)
class Verdict:
    """Paired tests of a run against the first one, or the reason why there are none.

    Attributes:
        p_corrected: p-value of the first difference (the chosen score), corrected by Holm's method over all tested runs.
    """

    run: str
    against: str
    paired: Paired | None
    why_not: str | None = None
    p_corrected: float | None = None


def compare(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], split: str = "eval") -> Comparison:
    """Recipes and scores of runs side by side; `.tests()` tests whether they differ. A folder stands for the runs below it.

    Raises:
        InputError: a path is no run directory and has none below it; fewer than two runs.
    """
    unique = list({path.absolute(): path for path in find_runs(paths)}.values())
    if len(unique) < 2:
        raise InputError(
            "one run alone cannot be compared", "give two run directories or more, or the folder of a sweep"
        )
    runs = [read_result(path) for path in unique]
    recipes = [run.flat_recipe() for run in runs]
    scores = [_of_split(run, split) for run in runs]
    metrics = dict.fromkeys(name for one in scores for name in one)
    ran = [execution_of(RunDir(run.path)) for run in runs] if len(runs) <= _MOST_EXECUTIONS else []
    unequal = [
        key for key in dict.fromkeys(key for one in ran for key in one) if len({one.get(key) for one in ran}) > 1
    ]
    return Comparison(
        runs=tuple(runs),
        names=tuple(names_of(unique)),
        recipe={key: [recipe.get(key) for recipe in recipes] for key in differing(recipes)},
        metrics={name: [one.get(name) for one in scores] for name in metrics},
        about={
            name: [run.outcome.get(name) for run in runs]
            for name in _FIELDS
            if any(run.outcome.get(name) is not None for run in runs)
        }
        | {key: [one.get(key) for one in ran] for key in unequal if key not in ("device", "processes")},
        split=split,
    )


def _of_split(run: RunResult, split: str) -> dict[str, float]:
    """The scores of a split; `metrics` of a result has those of eval without a prefix."""
    if split == "test":
        return {name[5:]: value for name, value in run.metrics.items() if name.startswith("test_")}
    return {name: value for name, value in run.metrics.items() if not name.startswith("test_")}


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that still differ: the last parts of the paths, as many as are needed."""
    whole = [path.absolute().parts for path in paths]
    for depth in range(1, max((len(parts) for parts in whole), default=1) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def verdicts(comparison: Comparison, metric: str | None = None) -> list[Verdict]:
    """Test each run against the first, on the predictions for the rows of the split; of folds each cross-validation.

    Args:
        metric: the score that comes first and is corrected; by default the one that chooses the best checkpoint, if it can be tested.

    Raises:
        InputError: no such score.
    """
    chosen = metric or comparison.runs[0].metric
    results = (_of_folds if comparison.folded else _of_runs)(comparison, chosen, required=metric is not None)
    known = [i for i, result in enumerate(results) if result.paired and not math.isnan(result.paired.differences[0].p)]
    corrected = dict(zip(known, holm([results[i].paired.differences[0].p for i in known]), strict=True))  # type: ignore[union-attr]
    return [Verdict(r.run, r.against, r.paired, r.why_not, corrected.get(i)) for i, r in enumerate(results)]


def _of_runs(comparison: Comparison, chosen: str | None, *, required: bool) -> list[Verdict]:
    extra = [name for name in comparison.metrics if name in (*NEED_SCORES, "spearman")]
    extra += [chosen] if chosen in (*NEED_SCORES, "spearman") and chosen not in extra else []
    files = [RunDir(run.path).predictions_of(comparison.split) for run in comparison.runs]
    names, predictions = comparison.names, [_predictions(file) for file in files]
    first = predictions[0]
    results: list[Verdict] = []
    for name, other in zip(names[1:], predictions[1:], strict=True):
        why = next((reason for reason in (first, other) if isinstance(reason, str)), None)
        paired: Paired | None = None
        if isinstance(first, Predictions) and isinstance(other, Predictions):
            try:
                paired = compare_paired(first, other, extra=extra)
            except DataError as error:
                why = error.message
        if paired is not None:
            paired = _with_first(paired, chosen, required=required)
        results.append(Verdict(name, names[0], paired, why))
    return results


def _of_folds(comparison: Comparison, chosen: str | None, *, required: bool) -> list[Verdict]:
    """Tests of each cross-validation against the first, by the scores of the folds that both have (`afina.statistics.intervals`)."""
    sweeps: dict[Path, dict[int, RunResult]] = {}
    for run in comparison.runs:
        sweeps.setdefault(run.path.absolute().parent, {})[run.fold or 0] = run
    names = names_of([folder.parent if folder.name == "runs" else folder for folder in sweeps])
    first, *others = sweeps.values()
    if not others:
        return [Verdict(names[0], names[0], None, "these are folds of one training: `afina sweep` shows their mean")]
    results = []
    for name, other in zip(names[1:], others, strict=True):
        try:
            paired = _paired_folds(first, other, comparison)
            results.append(Verdict(name, names[0], _with_first(paired, chosen, required=required)))
        except DataError as error:
            results.append(Verdict(name, names[0], None, error.message))
    return results


def _paired_folds(first: Mapping[int, RunResult], other: Mapping[int, RunResult], comparison: Comparison) -> Paired:
    """Raises: DataError: they share no finished fold, or the folds have other rows."""
    counts = {run.recipe["data"]["fold"]["of"] for run in (*first.values(), *other.values())}
    if len(counts) > 1:
        raise DataError(f"they have {' and '.join(map(str, sorted(counts)))} folds", "give both the same --folds")
    shared = [fold for fold in sorted(first.keys() & other.keys()) if first[fold].finished and other[fold].finished]
    if not shared:
        raise DataError("they share no finished fold", "wait for both, or give both the same --folds and --repeats")
    rows = 0
    for fold in shared:
        rows += len(align(*(read_predictions(runs[fold].path / "predictions.parquet") for runs in (first, other))))
    differences = []
    for metric in comparison.metrics:
        pairs = [
            tuple(_of_split(runs[fold], comparison.split).get(metric) for runs in (first, other)) for fold in shared
        ]
        values = [(a, b) for a, b in pairs if a is not None and b is not None]
        if len(values) < len(pairs):
            continue
        before, after = zip(*values, strict=True)
        test = paired_t_test(after, before, overlap=1 / (counts.copy().pop() - 1))
        low, high, p = (
            math.nan if value is None else value for value in (test.difference.low, test.difference.high, test.p)
        )
        one, two = (sum(side) / len(side) for side in (before, after))
        differences.append(Difference(metric, one, two, low, high, p, f"corrected t over {len(shared)} folds"))
    return Paired(rows, None, None, tuple(differences))


def _with_first(paired: Paired, metric: str | None, *, required: bool) -> Paired:
    named = [d for d in paired.differences if d.metric == metric]
    if required and not named:
        known = ", ".join(d.metric for d in paired.differences)
        raise InputError(f"`{metric}` is not a score that can be tested", f"choose from: {known}")
    return Paired(
        paired.rows,
        paired.only_first,
        paired.only_second,
        (*named, *(d for d in paired.differences if d.metric != metric)),
    )


def _predictions(run: Path) -> Predictions | str:
    try:
        return read_predictions(run)
    except DataError as error:
        return error.message


def test_rows(tests: Sequence[Verdict]) -> tuple[list[str], list[list[str]], list[str]]:
    """Heads and rows of the table of tests, on the terminal and in the page, and lines: which is not possible, and what the tests cover."""
    several, lines = len(tests) > 1, []
    heads = [f"against {tests[0].against}", "score", "first", "run", "difference", "95 % interval", "p"]
    heads += [*(["p (Holm)"] if several else []), "test"]
    rows = []
    for test in tests:
        if test.paired is None:
            lines.append(f"{test.run}: not possible: {test.why_not}")
            continue
        for count, d in enumerate(test.paired.differences):
            split = f" ({test.paired.only_first} : {test.paired.only_second})" if d.test.startswith("McNemar") else ""
            corrected = [p_value(test.p_corrected) if count == 0 else ""] if several else []
            rows.append(
                [
                    f"{test.run} ({test.paired.rows} rows)" if count == 0 else "",
                    d.metric,
                    number(d.first),
                    number(d.second),
                    f"{d.second - d.first:+.4f}",
                    f"{d.low:+.4f} to {d.high:+.4f}" if d.low == d.low else "–",
                    p_value(d.p),
                    *corrected,
                    d.test + split,
                ]
            )
    over = {d.test.startswith("corrected t") for test in tests if test.paired for d in test.paired.differences}
    covered = {
        False: "The tests cover sampling of rows, not randomness in training: seeds of one recipe may differ as much.",
        True: "The tests over folds cover sampling of rows, those of train too; all runs have one seed.",
    }
    return heads, rows, [*lines, "Difference: run minus the first.", *(covered[of_folds] for of_folds in sorted(over))]


def to_json(comparison: Comparison, tests: Sequence[Verdict] | None) -> dict[str, Any]:
    """The object that `afina compare --json` prints; NaN becomes None."""
    runs = [
        {
            "name": name,
            "run": str(run.path.absolute()),
            "recipe": {key: values[i] for key, values in comparison.recipe.items()},
            "metrics": dict(run.metrics),
            "warnings": list(run.warnings),
            "about": {key: values[i] for key, values in comparison.about.items()},
        }
        for i, (name, run) in enumerate(zip(comparison.names, comparison.runs, strict=True))
    ]
    answer: dict[str, Any] = {"runs": runs}
    if tests is not None:
        answer["tests"] = [asdict(test) for test in tests]
    plain: dict[str, Any] = finite(answer)
    return plain
