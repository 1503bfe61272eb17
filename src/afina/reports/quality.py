"""Sections about the model: scores, classes, thresholds, calibration. Pure: facts -> HTML and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from afina.recipe.metrics import metric_name, own_metric
from afina.reports.charts import Chart, Point, thin
from afina.reports.facts import RunFacts
from afina.reports.page import note, pairs, table, warnings
from afina.run.provenance.methods import features_of
from afina.statistics.calibration import calibrate, coverage
from afina.statistics.decision_rule import revised
from afina.statistics.measures import auroc, average_precision, one_vs_rest, threshold_curves
from afina.statistics.predictions import Predictions
from afina.statistics.scores import Interval, Scores
from afina.statistics.weakness import beaten
from afina.text import number, p_value, plural

__all__ = [
    "answered",
    "beside_simple",
    "calibration",
    "class_intervals",
    "classes",
    "fitted",
    "overall",
    "score_chart",
    "thresholds",
]

_MOST_DOTS = 500
#: Curves in one chart, points of each, and classes in the chart of their F1.
_MOST_CURVES, _MOST_STEPS, _MOST_CLASSES = 5, 150, 60

#: Scores that say what others say, or need a reason to be shown: only if the recipe names them.
_ON_REQUEST = {
    "single-label": (*("f1_micro", "precision_micro", "recall_micro", "precision_weighted", "recall_weighted"), "kappa_quadratic", "brier"),
    "multi-label": ("precision_micro", "recall_micro", "precision_weighted", "recall_weighted", "brier"),
}  # fmt: skip


def overall(facts: RunFacts) -> str:
    """Scores of the model in model/, with intervals, and what they must be read with."""
    parts, texts = [], facts.plan.recipe.metric_texts
    left_out = set(_ON_REQUEST.get(facts.task, ())) - set(texts)
    own = [metric_name(text) for text in texts if own_metric(text)]
    for split, scores in facts.scores.items():
        rows: list[list[Any]] = [
            [name, *map(number, (i.value, i.low, i.high, scores.always.get(name)))]
            for name, i in scores.overall.items()
            if name not in left_out
        ]
        metrics = facts.outcome.metrics if facts.outcome else {}
        rows += [[name, number(metrics.get(f"{split}_{name}")), None, None, None] for name in own]
        heads = ["score", "value", "95 % from", "to", "simplest model"]
        cut = 5 if scores.always else 4
        parts.append(table(heads[:cut], [row[:cut] for row in rows], f"On {split}, the model in model/"))
        if scores.always:
            parts.append(note(f"The simplest model always predicts {scores.simplest}."))
        parts.append(warnings(facts.spoiled.get(split, [])))
        known = {**scores.undefined, **(metrics.get(f"{split}_undefined") or {})}
        parts += [
            note(f"{name} is not defined on {split}: {why}.") for name, why in known.items() if name not in left_out
        ]
        if scores.absent:
            parts.append(
                note(
                    f"Neither a label nor a prediction on {split}, so that averages leave it out: {', '.join(scores.absent)}."
                )
            )
        if split == "test" and facts.looks:
            times = f"{plural(facts.looks, 'time')}"
            parts.append(
                note(
                    f"compare and sweep have looked at test {times}; each look that led to a choice makes it too kind."
                )
            )
    if parts and own:
        parts.append(note(f"{', '.join(own)}: no interval; a metric of one's own is computed once, on all rows."))
    return _why_not(facts) + ("".join(parts) + _about_intervals(facts) if parts else _logged(facts))


def beside_simple(facts: RunFacts) -> str:
    """Simple models on the same splits, with the paired differences of the model in model/ from them, as the run computed them."""
    baselines = facts.outcome.baselines if facts.outcome else {}
    heads = ["model", "score", "its value", "95 % from", "to", "this model", "difference", "95 % from", "to", "p"]
    html = ""
    for split, models in baselines.items():
        rows: list[list[Any]] = []
        for model in models:
            for count, d in enumerate(model["differences"]):
                _, low, high = model["scores"].get(d["metric"], (None, None, None))
                values = map(number, (d["first"], low, high, d["second"]))
                rows.append(["" if count else model["name"], d["metric"], *values, *_paired(d)])
        html += table(heads, rows, f"On {split}, paired, on the same rows") + warnings(beaten({split: models}))
    html += "".join(note(_described(model, facts)) for model in next(iter(baselines.values()), [])[1:])
    return html + (
        note("scikit-learn's defaults, not tuned. Difference: this model minus the simple one.") if html else ""
    )


def _described(model: Mapping[str, Any], facts: RunFacts) -> str:
    """Training data and comparison of a simple model, or why there is none."""
    if why := model.get("left_out"):
        return f"{model['name']}: left out: {why}"
    sample = "" if model["rows"] == model["of"] else f", on a sample of {model['rows']:,} of {model['of']:,} rows"
    compared, of = model.get("compared", (0, 0))
    some = f"; compared on a sample of {compared:,} of {of:,} rows" if compared < of else ""
    return f"{model['name']} {features_of(model)}, texts cut {facts.plan.recipe.tokens.cut}; trained on train{sample}{some}."


def _paired(difference: Mapping[str, Any]) -> list[str | None]:
    """Cells of a paired difference in `outcome.json`: second minus first, its limits, p."""
    by = difference["second"] - difference["first"]
    values = [f"{v:+.4f}" if v is not None else None for v in (by, difference["low"], difference["high"])]
    return [*values, p_value(difference["p"]) if difference["p"] is not None else None]


def fitted(facts: RunFacts) -> str:
    """Temperature and thresholds that were fitted on eval, and what they change on other rows, as the run computed it."""
    record = facts.outcome.decisions if facts.outcome else {}
    if not record:
        return ""
    if not record.get("temperature") and not record.get("thresholds"):
        return "".join(map(note, ["Nothing was fitted.", *record.get("notes", [])]))
    on = record.get("measured_on", "eval")
    rows: list[list[Any]] = []
    if error := record.get("calibration_error"):
        rows.append(
            ["expected calibration error", *map(number, error), f"{error[1] - error[0]:+.4f}", None, None, None]
        )
    for d in record.get("differences", []):
        rows.append([d["metric"], number(d["first"]), number(d["second"]), *_paired(d)])
    heads = ["score", "without", "with", "difference", "95 % from", "to", "p"]
    known = {"temperature": f"{record['temperature']:g}"} if record.get("temperature") else {}
    html = pairs(known) + table(heads, rows, f"On {on}, paired, on the same {plural(record.get('rows', 0), 'row')}")
    if limits := record.get("thresholds"):
        html += table(
            ["label", "threshold"], [[name, number(limit)] for name, limit in limits.items()], "0.5 elsewhere"
        )
    html += "".join(map(note, record.get("notes", [])))
    how = (
        "here on eval itself: each fifth of its rows by what was fitted on the others"
        if record.get("cross_fitted")
        else f"measured on {on}"
    )
    return html + note(
        f"Fitted on eval, {how}. `afina predict` and `afina.load` use them (--plain leaves them out). All other sections, `predictions.parquet` and the "
        "run's metrics are of the model without them."
    )


def score_chart(facts: RunFacts) -> list[Chart]:
    """The score that chose the checkpoint on each split, with its interval, against the simplest model."""
    found = {split: scores.overall.get(facts.metric) for split, scores in facts.scores.items()}
    ranges = [(split, i.low, i.value, i.high) for split, i in found.items() if i is not None and i.low == i.low]
    always = {s.always[facts.metric]: "simplest model" for s in facts.scores.values() if facts.metric in s.always}
    words = "; ".join(f"{split}: {number(v)} ({number(low)} to {number(high)})" for split, low, v, high in ranges)
    title = f"{facts.metric} with its 95 % interval, against the simplest model"
    return [Chart("score", title, x=facts.metric, ranges=ranges, marks=always, description=words)]


def _logged(facts: RunFacts) -> str:
    """Scores as the run logged them, without predictions to compute from."""
    metrics = facts.outcome.metrics if facts.outcome else {}
    rows = [
        [name, number(value)]
        for name, value in metrics.items()
        if name.startswith(("eval_", "test_")) and isinstance(value, int | float)
    ]
    return table(["score", "value"], rows, "As the run logged them; without predictions there are no intervals")


def _about_intervals(facts: RunFacts) -> str:
    draws = max(scores.draws for scores in facts.scores.values())
    return note(
        f"Intervals: Wilson's for shares, else {draws:,} bootstrap samples of the rows with a fixed seed, areas and correlations by "
        "formula. They cover the sampling of rows, not randomness in training. Averages over classes (macro) go over "
        "the classes that occur in the labels or the predictions."
    )


def _why_not(facts: RunFacts) -> str:
    """The reasons why predictions cannot be shown."""
    reasons = dict.fromkeys(reason for reason in facts.predictions.values() if isinstance(reason, str))
    return "".join(note(reason) for reason in reasons)


def classes(facts: RunFacts) -> str:
    metrics = facts.outcome.metrics if facts.outcome else {}
    html = ""
    for split in ("eval", "test"):
        if split in facts.scores and facts.scores[split].per_class:
            scored = _classes_scored(facts.scores[split], facts.predictions[split], split)
        else:
            scored = _classes_logged(metrics, split, facts.labels)
        html += scored + (warnings(facts.spoiled.get(split, [])) if scored else "")
    return html


def _classes_scored(scores: Scores, predictions: Predictions | str, split: str) -> str:
    assert isinstance(predictions, Predictions)
    names = ("precision", "recall", "f1")
    rows = [
        [label, scores.support[k], *(_interval(scores.per_class[name][k]) for name in names)]
        for k, label in enumerate(predictions.labels)
    ]
    heads = ["type", "entities"] if predictions.task == "token-classification" else ["class", "rows"]
    return table([*heads, *names], rows, f"On {split}, the model in model/; in brackets 95 % intervals")


def _interval(score: Interval | None) -> str | None:
    return None if score is None else f"{score.value:.4f} ({score.low:.4f}–{score.high:.4f})"


def class_intervals(facts: RunFacts) -> list[Chart]:
    """F1 of each class with its interval, the worst first."""
    charts = []
    for split, scores in facts.scores.items():
        predictions = facts.predictions[split]
        if not isinstance(predictions, Predictions) or not 3 <= len(predictions.labels) <= _MOST_CLASSES:
            continue
        known = [(name, i) for name, i in zip(predictions.labels, scores.per_class["f1"], strict=True) if i]
        known.sort(key=lambda pair: pair[1].value)
        words = "; ".join(f"{name}: {number(i.value)}" for name, i in known)
        ranges = [(name, i.low, i.value, i.high) for name, i in known]
        title = f"F1 of each class on {split}, with 95 % intervals, the worst first"
        charts.append(Chart(f"classes-{split}", title, x="F1", ranges=ranges, description=words))
    return charts


def _classes_logged(metrics: Mapping[str, Any], split: str, labels: Sequence[str]) -> str:
    """Scores as the run logged them, without predictions to compute from."""
    columns = {
        name: metrics[f"{split}_{name}_per_class"]
        for name in ("f1", "precision", "recall")
        if isinstance(metrics.get(f"{split}_{name}_per_class"), list)
    }
    if not columns:
        return ""
    rows = [
        [labels[i] if i < len(labels) else str(i), *(number(values[i]) for values in columns.values())]
        for i in range(min(len(v) for v in columns.values()))
    ]
    return table(["class", *columns], rows, f"On {split}, the model in model/")


def thresholds(facts: RunFacts) -> list[Chart]:
    """ROC and precision-recall curves, one class against the others: of at most `_MOST_CURVES` classes, the least average precision first."""
    charts = []
    for split, predictions in facts.predictions.items():
        if isinstance(predictions, str) or predictions.scores is None or not len(predictions):
            continue
        columns = one_vs_rest(predictions.task, predictions.truth, predictions.scores)
        names = predictions.labels[-len(columns) :]
        both = [(*pair, name) for pair, name in zip(columns, names, strict=True) if 0 < pair[0].sum() < len(pair[0])]
        areas = sorted((average_precision(flags, scores), name, flags, scores) for flags, scores, name in both)
        roc: dict[str, list[Point]] = {}
        recall: dict[str, list[Point]] = {}
        for area, name, flags, scores in areas[:_MOST_CURVES]:
            wrong, right, precision = threshold_curves(flags, scores)
            roc[f"{name} {number(auroc(flags, scores))}"] = thin(
                list(zip(wrong.tolist(), right.tolist(), strict=True)), _MOST_STEPS
            )
            recall[f"{name} {number(area)}"] = thin(
                list(zip(right.tolist(), precision.tolist(), strict=True)), _MOST_STEPS
            )
        note = (
            f"The {_MOST_CURVES} classes of {len(areas)} with the least average precision."
            if len(areas) > _MOST_CURVES
            else ""
        )
        square: Any = {"frame": ((0.0, 1.0), (0.0, 1.02)), "note": note}
        words = [f"area under the curve of {', '.join(of)}" for of in (recall, roc)]
        title = f"Precision and recall on {split}, with average precision"
        charts += [
            Chart(f"pr-{split}", title, x="recall", y="precision", lines=recall, description=words[0], **square),
            Chart(
                f"roc-{split}",
                f"ROC curve on {split}, with its area",
                x="false positive rate",
                y="true positive rate",
                lines=roc,
                description=words[1],
                diagonal=True,
                **square,
            ),
        ]
    return charts


def calibration(facts: RunFacts) -> tuple[str, list[Chart]]:
    """HTML without its charts, and the charts: reliability, or for regression predicted against true values."""
    html, charts = "", []
    for split, predictions in facts.predictions.items():
        if isinstance(predictions, str) or not len(predictions):
            continue
        if predictions.task == "regression":
            charts.append(_scatter(predictions, split))
            continue
        if (how := calibrate(predictions)) is None:
            continue
        bars = {"share correct": [(low, high, share) for low, high, _, _, share, *_ in how.bins]}
        whiskers = [((low + high) / 2, least, most) for low, high, _, _, _, least, most in how.bins]
        words = [f"confidence {sure:.2f}: {share:.2f} correct of {n}" for _, _, n, sure, share, *_ in how.bins]
        unit: Any = {"diagonal": True, "frame": ((0.0, 1.0), (0.0, 1.0)), "description": "; ".join(words)}
        title = f"Reliability on {split}"
        chart = Chart(
            f"calibration-{split}", title, x=how.what, y="share correct", bars=bars, whiskers=whiskers, **unit
        )
        charts.append(chart)
        rows = [
            [f"{low:.2f}–{high:.2f}", n, number(sure), number(share), f"{least:.4f}–{most:.4f}"]
            for low, high, n, sure, share, least, most in how.bins
        ]
        html += pairs(
            {
                f"expected calibration error on {split}": f"{number(how.error)} ({len(how.bins)} of 15 equal bins hold rows)",
                f"Brier score on {split}": number(how.brier),
            }
        )
        heads = ["confidence", "rows", "mean confidence", "share correct", "95 % interval"]
        html += table(heads, rows, f"On {split}, by {how.what}")
    if html:
        html += note(
            "On the dotted line, confidence equals accuracy. Whiskers: 95 % intervals of the share (Wilson). The error depends on the "
            "number of bins and of rows: compare it only between equal sets of rows."
        )
    return html, charts


def answered(facts: RunFacts) -> tuple[str, list[Chart]]:
    """Scores by the share of rows that is answered, those first of which the model is surest: a table, and its curve as a chart."""
    html, charts = "", []
    for split, plain in facts.predictions.items():
        if isinstance(plain, str) or plain.scores is None or not len(plain):
            continue
        how = coverage(revised(plain, facts.rule) if facts.rule else plain, facts.metric)
        assert how is not None
        lines = {
            name: [(share, values[i]) for share, values in how.curve if values[i] == values[i]]
            for i, name in enumerate(how.metrics)
        }
        words = "; ".join(
            f"{share:.0%} answered: {how.metrics[0]} {number(values[0])}" for share, _, _, values, *_ in how.table
        )
        title = f"{' and '.join(how.metrics)} on {split} by the share of texts that is answered, the surest first"
        charts.append(
            Chart(f"answered-{split}", title, x="share of texts answered", y="score", lines=lines, description=words)
        )
        rows = [
            [
                f"{share:.1%}",
                count,
                f"{math.floor(sure * 1e4) / 1e4:.4f}",
                number(values[0]),
                f"{low:.4f}–{high:.4f}",
                *map(number, values[1:]),
            ]
            for share, count, sure, values, low, high in how.table
        ]
        heads = ["answered", "rows", "confidence from", how.metrics[0], "95 % interval", *how.metrics[1:]]
        html += table(heads, rows, f"On {split}: `afina predict --abstain-below` takes the third column")
        html += note(
            f"Averaged over all shares, {how.metrics[0]} on {split} is {number(how.area)}: one less the area under the risk-coverage curve."
        )
    if html and facts.rule:
        html += note(
            "With the fitted temperature and thresholds, as `afina predict` decides; on eval they have seen the rows."
        )
    return html, charts


def _scatter(predictions: Predictions, split: str) -> Chart:
    step = max(1, -(-len(predictions) // _MOST_DOTS))
    points = [
        (float(x), float(y)) for x, y in zip(predictions.truth[::step], predictions.predicted[::step], strict=True)
    ]
    shown = f"{len(points):,} of {len(predictions):,} rows" if step > 1 else f"{plural(len(points), 'row')}"
    bias = float((predictions.predicted - predictions.truth).mean())
    values = [value for point in points for value in point]
    low, high = min(values), max(values)
    room = 0.03 * (high - low) or 0.5
    both = (low - room, high + room)
    return Chart(
        f"scatter-{split}",
        f"Predicted against true values on {split}",
        x="true value",
        y="predicted",
        dots={split: points},
        diagonal=True,
        frame=(both, both),
        description=f"{shown}; predictions are {bias:+.4g} off on average.",
    )
