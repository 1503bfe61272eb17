"""Decision rules: a temperature for the probabilities and thresholds for the labels, fitted on rows that the model was not trained on.

Temperature (Guo et al. 2017, "On Calibration of Modern Neural Networks"): all logits are divided by the one number that minimises the log loss. The
loss counts one wrong row more (Platt 1999), so that rows which are all right have a temperature too. It changes no decision.

Thresholds: a label is chosen where its probability is above its threshold, which maximises its F1; of two classes the second one is, and the mean of
both F1 is maximised (`f1` of `afina.recipe.metrics`). The best of few rows is best by chance, so 0.5 is kept

- where fewer than 10 rows have the label, or lack it;
- where thresholds chosen on four fifths of the rows are not better than 0.5 on the fifths that are left, taken together.

Not covered: probabilities that one temperature cannot repair, such as those of a training with class weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afina.errors import InputError
from afina.statistics.calibration import calibrate
from afina.statistics.paired import compare_paired
from afina.statistics.predictions import Predictions
from afina.text import finite, number, plural

__all__ = [
    "FILE",
    "NO_RULE",
    "DecisionRule",
    "cross_fitted",
    "described",
    "effects",
    "fit_rule",
    "logits_from",
    "probabilities",
    "read_rule",
    "revised",
]

Array = Any

#: In a model folder; Transformers ignores it.
FILE = "decisions.json"
#: Rows that a temperature needs; rows with a label that its threshold needs, and as many without. With fewer, chance costs more than is won.
_LEAST_ROWS, _LEAST_OF_LABEL = 50, 10
_PARTS, _SEED = 5, 20170706
#: Temperatures that are tried, and how exactly their logarithm is determined.
_RANGE, _EXACT = (0.05, 20.0), 1e-4
#: Rows whose log loss is computed at a time.
_BLOCK = 65_536


@dataclass(frozen=True)
class DecisionRule:
    """How logits become probabilities and decisions.

    Attributes:
        temperature: the logits are divided by it.
        thresholds: of each label; of two classes that of the second one alone; empty: the most probable class, labels above one half.
        notes: why a temperature or a threshold was not fitted.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """True if it changes any probability or decision."""
        return self.temperature != 1 or bool(self.thresholds)

    def scaled(self, logits: Array) -> Array:
        """Logits (N, K) over the temperature, of the same dtype."""
        return logits if self.temperature == 1 else logits / logits.dtype.type(self.temperature)

    def shifted(self, logits: Array) -> Array:
        """Logits (N, K) whose largest is the class that is decided for, and whose positive ones are the labels that are."""
        import numpy as np

        logits = self.scaled(logits)
        if not self.thresholds:
            return logits
        limits = np.asarray(self.thresholds, np.float64)
        shift = np.log(limits) - np.log1p(-limits)
        if len(limits) < logits.shape[1]:
            shift = np.concatenate([[0.0], shift])
        return logits - shift  # in float64

    def named_thresholds(self, labels: Sequence[str]) -> dict[str, float]:
        """The thresholds by label."""
        return dict(zip(labels[-len(self.thresholds) :], self.thresholds, strict=True)) if self.thresholds else {}

    def to_json(self, task: str, labels: Sequence[str], version: str) -> str:
        """The text of `decisions.json`."""
        record = {
            "afina": version,
            "task": task,
            "labels": list(labels),
            "temperature": self.temperature,
            "thresholds": self.named_thresholds(labels),
        }
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


NO_RULE = DecisionRule()


def read_rule(folder: Path, task: str, labels: Sequence[str]) -> DecisionRule | None:
    """The rule that was fitted for the model in `folder`; None where there is none.

    Raises:
        InputError: it cannot be read, or belongs to a model of other labels.
    """
    path, remedy = folder / FILE, "copy the model again, or predict with --plain, which leaves this file out"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if (record["task"], record["labels"]) != (task, list(labels)):
            raise InputError(f"model: {path} is of a {record['task']} model with other labels", remedy)
        temperature, by_name = float(record["temperature"]), record["thresholds"]
        named = list(labels[-1:] if task == "single-label" else labels) if by_name else []
        thresholds = tuple(float(by_name[name]) for name in named)
        if not temperature > 0 or not all(0 < limit < 1 for limit in thresholds):
            raise ValueError("a temperature must be above 0, a threshold between 0 and 1")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"model: {path} cannot be read: {error}", remedy) from None
    return DecisionRule(temperature, thresholds)


def probabilities(task: str, logits: Array) -> Array:
    """Logits (N, K) -> probabilities (N, K) of the same dtype; for regression the values as they are. NaN stays NaN."""
    import numpy as np

    if task in ("single-label", "token-classification"):
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(-1, keepdims=True))
    if task == "multi-label":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-logits)))
    return logits


def logits_from(task: str, scores: Array) -> Array:
    """Logits (N, K) that have these probabilities; for regression the values as they are."""
    import numpy as np

    if task == "regression":
        return scores
    tiny = np.finfo(np.float64).tiny
    logits = np.log(np.maximum(scores, tiny))
    return logits - np.log(np.maximum(1 - scores, tiny)) if task == "multi-label" else logits


def revised(plain: Predictions, rule: DecisionRule) -> Predictions:
    """Predictions of a model (argmax, or labels above one half) as the rule makes them."""
    assert plain.scores is not None
    logits = logits_from(plain.task, plain.scores)
    shifted = rule.shifted(logits)
    decided = shifted > 0 if plain.task == "multi-label" else shifted.argmax(-1)
    scores = probabilities(plain.task, rule.scaled(logits)) if rule.temperature != 1 else plain.scores
    return replace(plain, scores=scores, predicted=decided if rule.thresholds else plain.predicted)


# -- what it changes ----------------------------------------------------------------------------------------------------


def effects(plain: Predictions, ruled: Predictions, metrics: Sequence[str], *, temperature: bool) -> dict[str, Any]:
    """Scores of the same rows without and with a rule, plain values for JSON.

    Args:
        metrics: of decisions, where thresholds make other ones.
        temperature: the calibration and the losses of probabilities are compared too.

    Returns: rows; `calibration_error`, without and with it; `differences` (`afina.statistics.paired.Difference`, with minus without).
    """
    names = list(dict.fromkeys([*metrics, *(["log_loss", "brier"] if temperature else [])]))
    differences = compare_paired(plain, ruled, extra=names).records(names)
    record: dict[str, Any] = {"rows": len(plain), "differences": differences}
    if temperature:
        # The most probable class, whatever a threshold makes of it.
        both = [calibrate(rows) for rows in (plain, replace(ruled, predicted=plain.predicted))]
        record["calibration_error"] = [how.error for how in both if how is not None]
    plainly: dict[str, Any] = finite(record)
    return plainly


def described(record: Mapping[str, Any]) -> list[str]:
    """`Outcome.decisions` in sentences; none of an empty record."""
    where = record.get("measured_on", "eval")
    place = "eval, each fifth of its rows by what was fitted on the others" if record.get("cross_fitted") else where
    paired = {d["metric"]: d for d in record.get("differences", [])}

    def change(name: str) -> str:
        d = paired[name]
        by, low, high = (
            f"{value:+.4f}" if value is not None else "–" for value in (d["second"] - d["first"], d["low"], d["high"])
        )
        return (
            f"{name} {number(d['first'])} without, {number(d['second'])} with (difference {by}, 95 % {low} to {high})"
        )

    lines = []
    if record.get("temperature"):
        error = record.get("calibration_error") or []
        words = [f"expected calibration error {number(error[0])} without, {number(error[1])} with"] if error else []
        words += [change("log_loss")] if "log_loss" in paired else []
        lines.append(f"Temperature {record['temperature']:g}, fitted on eval; on {place}: {'; '.join(words)}.")
    if record.get("thresholds"):
        names = [name for name in paired if name not in ("log_loss", "brier")]
        lines.append(f"Thresholds that maximise F1, fitted on eval; on {place}: {'; '.join(map(change, names))}.")
    return lines


# -- fitting -----------------------------------------------------------------------------------------------------------


def fit_rule(
    task: str,
    labels: Sequence[str],
    logits: Array,
    truth: Array,
    *,
    temperature: bool,
    thresholds: bool,
    whole: Array | None = None,
) -> DecisionRule:
    """The rule for `logits` (N, K) and `truth`, class ids (N,) or 0/1 (N, K).

    Args:
        whole: the truth of all rows where these are some of them: it decides what there are enough rows for.
    """
    rule, whole = DecisionRule(), truth if whole is None else whole
    if temperature and len(whole) < _LEAST_ROWS:
        rule = DecisionRule(
            notes=(
                f"no temperature: there {'is' if len(whole) == 1 else 'are'} {plural(len(whole), 'row')}, {_LEAST_ROWS} are needed",
            )
        )
    elif temperature and (whole == whole[:1]).all():
        rule = DecisionRule(notes=("no temperature: all rows have the same label",))
    elif temperature:
        rule = _with_temperature(task, logits, truth)
    return _with_thresholds(rule, task, labels, logits, truth, whole) if thresholds else rule


def cross_fitted(
    task: str, labels: Sequence[str], logits: Array, truth: Array, *, temperature: bool, thresholds: bool
) -> tuple[Array, Array]:
    """Scaled and shifted logits (N, K) of each row by a rule that was fitted on four fifths of the rows, without it."""
    import numpy as np

    scaled, shifted = np.empty(logits.shape), np.empty(logits.shape)
    for part in _parts(truth):
        keys: Any = {"temperature": temperature, "thresholds": thresholds, "whole": truth}
        rule = fit_rule(task, labels, logits[~part], truth[~part], **keys)
        wide = np.asarray(logits[part], np.float64)
        scaled[part], shifted[part] = rule.scaled(wide), rule.shifted(wide)
    return scaled, shifted


def _parts(truth: Array) -> Iterator[Array]:
    """Five parts of the rows as masks (N,), those of each class spread evenly; of several labels, those of each number of labels."""
    import numpy as np

    kinds = truth if truth.ndim == 1 else (truth > 0).sum(axis=1)
    order = np.random.default_rng(_SEED).permutation(len(kinds))
    number = np.empty(len(kinds), np.int64)
    number[order[np.argsort(kinds[order], kind="stable")]] = np.arange(len(kinds)) % _PARTS
    return (number == part for part in range(_PARTS))


def _with_temperature(task: str, logits: Array, truth: Array) -> DecisionRule:
    import numpy as np
    from scipy.optimize import minimize_scalar

    bounds = tuple(np.log(_RANGE))  # the loss is convex in 1 / T, so it has one minimum in log T
    loss = lambda at: _smoothed_loss(task, logits, truth, float(np.exp(at)))  # noqa: E731
    least = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": _EXACT})
    found = float(f"{np.exp(least.x):.4g}")
    ends = " or ".join(f"{end:g}" for end in _RANGE)
    notes = (f"the temperature is at the end of its range ({ends})",) if not 1.01 < found / _RANGE[0] < 396 else ()
    notes = ("the temperature is 1, which changes nothing",) if found == 1 else notes
    return DecisionRule(found, notes=notes)


def _smoothed_loss(task: str, logits: Array, truth: Array, temperature: float) -> float:
    """The mean log loss at a temperature, with one wrong row more: of each row 1 / (N + 2) counts as wrong."""
    import numpy as np

    share, total = 1 / (len(truth) + 2), 0.0
    for start in range(0, len(truth), _BLOCK):
        part = np.asarray(logits[start : start + _BLOCK], np.float64) / temperature
        of = truth[start : start + _BLOCK]
        if task == "multi-label":
            signed = np.where(of > 0, part, -part)  # of the right answer, against the wrong one
            total += float((np.logaddexp(0, -signed) + share * signed).mean(axis=1).sum())
            continue
        part -= part.max(-1, keepdims=True)
        right = part[np.arange(len(of)), of]
        others = (part.sum(axis=1) - right) / (part.shape[1] - 1)
        total += float((np.log(np.exp(part).sum(axis=1)) - (1 - share) * right - share * others).sum())
    return total / len(truth)


def _with_thresholds(
    rule: DecisionRule, task: str, labels: Sequence[str], logits: Array, truth: Array, whole: Array
) -> DecisionRule:
    import numpy as np

    if task == "single-label":
        margins, flags, of_all = [logits[:, 1] - logits[:, 0]], [truth == 1], [whole == 1]
    else:
        margins, flags, of_all = list(logits.T), list(truth.T > 0), list(whole.T > 0)
    limits, notes = [], list(rule.notes)
    for name, margin, has, known in zip(labels[-len(margins) :], margins, flags, of_all, strict=True):
        best, why = _best_threshold(
            np.asarray(margin, np.float64) / rule.temperature, has, task == "single-label", known
        )
        limits.append(best)
        notes += [f"{name}: the threshold is 0.5: {why}"] if why else []
    return replace(rule, thresholds=tuple(limits) if any(limit != 0.5 for limit in limits) else (), notes=tuple(notes))


def _best_threshold(margin: Array, has: Array, both: bool, whole: Array) -> tuple[float, str]:
    """The threshold of a label's probability, and why it is one half where nothing better is known.

    Args:
        margin: the logit of the label, (N,).
        has: whether it applies, bool (N,).
        both: the mean F1 of the label and of its absence is maximised.
        whole: as `has`, of all rows.
    """
    import numpy as np

    fewest = min(int(whole.sum()), int((~whole).sum()))
    if fewest < _LEAST_OF_LABEL:
        return (
            0.5,
            f"{plural(fewest, *(('row has', 'rows have') if whole.sum() == fewest else ('row lacks', 'rows lack')))} it, {_LEAST_OF_LABEL} are needed",
        )
    decided = np.empty(len(has), bool)
    order = np.argsort(-margin, kind="stable")
    for part in _parts(has.astype(np.int64)):
        decided[part] = margin[part] > _cut(margin, has, order[~part[order]], both)
    if _f1(decided, has, both) <= _f1(margin > 0, has, both):
        return 0.5, "no other is better on rows that it was not chosen on"
    cut = min(max(_cut(margin, has, order, both), -13.0), 13.0)
    return float(f"{1 / (1 + np.exp(-cut)):.9g}"), ""


def _cut(margin: Array, has: Array, order: Array, both: bool) -> float:
    """The logit above which the rows `order`, by descending margin, have the best F1; halfway between two rows, of equally good ones the nearest to 0."""
    import numpy as np

    sorted_margin, hits = margin[order], np.cumsum(has[order])
    last = np.flatnonzero(np.append(sorted_margin[1:] != sorted_margin[:-1], True))
    chosen, right, positive, rows = last + 1, hits[last], hits[-1], len(order)
    scores = 2 * right / (chosen + positive)
    if both:
        rest = rows - chosen
        scores = scores + 2 * (rest - (positive - right)) / np.maximum(rest + rows - positive, 1)
    below = sorted_margin[np.minimum(last + 1, rows - 1)]
    cuts = (sorted_margin[last] + below) / 2
    cuts = np.where(cuts < sorted_margin[last], cuts, below)  # of neighbouring numbers nothing is halfway
    cuts[-1] = sorted_margin[-1] - 1  # all rows
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    return float(cuts[best[np.argmin(np.abs(cuts[best]))]])


def _f1(decided: Array, has: Array, both: bool) -> float:
    def of(chosen: Array, actual: Array) -> float:
        return 2 * float((chosen & actual).sum()) / max(1.0, float(chosen.sum() + actual.sum()))

    return of(decided, has) + (of(~decided, ~has) if both else 0.0)
