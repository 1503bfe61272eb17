"""Sections about the model: scores, classes, the confusion matrix, calibration, the worst mistakes. Pure: facts -> HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from afina.recipe.metrics import metric_name, own_metric
from afina.reports.charts import Chart
from afina.reports.facts import RunFacts
from afina.reports.page import note, number, pairs, scroll, table, warnings
from afina.statistics.calibration import calibrate
from afina.statistics.predictions import Predictions
from afina.statistics.scores import Interval, Scores, mistakes

__all__ = ["calibration", "classes", "confusion", "matrices", "overall", "worst"]

#: With more labels than this, the most frequent confusions are listed instead of the matrix.
_MOST_LABELS = 30
_MOST_CONFUSIONS = 30
_MOST_MISTAKES = 20
_MOST_TEXT = 300
_MOST_DOTS = 2000


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
            [name, *map(_digits, (i.value, i.low, i.high))]
            for name, i in scores.overall.items()
            if name not in left_out
        ]
        metrics = facts.outcome.metrics if facts.outcome else {}
        rows += [[name, number(metrics.get(f"{split}_{name}")), None, None] for name in own]
        parts.append(table(["score", "value", "95 % from", "to"], rows, f"On {split}, the model in model/"))
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
        if scores.majority is not None:
            parts.append(
                note(f"Always the most frequent label would have the accuracy {scores.majority:.4f} on {split}.")
            )
        if split == "test" and facts.looks:
            times = f"{facts.looks} time{'s' * (facts.looks > 1)}"
            parts.append(
                note(
                    f"compare and sweep have looked at test {times}; each look that led to a choice makes it too kind."
                )
            )
    return _why_not(facts) + "".join(parts) + (_about_intervals(facts) if parts else "")


def _about_intervals(facts: RunFacts) -> str:
    draws = max(scores.draws for scores in facts.scores.values())
    return note(
        f"Intervals: Wilson's for shares, else {draws:,} bootstrap samples of the rows with a fixed seed, areas and correlations by "
        "formula (docs/report.md). They cover the sampling of rows, not randomness in training. Averages over classes (macro) go over "
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
    return table(["class", "rows", *names], rows, f"On {split}, the model in model/; in brackets 95 % intervals")


def _interval(score: Interval | None) -> str | None:
    return None if score is None else f"{score.value:.3f} ({score.low:.3f}–{score.high:.3f})"


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
        [_label(labels, i), *(values[i] for values in columns.values())]
        for i in range(min(len(v) for v in columns.values()))
    ]
    return table(["class", *columns], rows, f"On {split}, the model in model/")


def _confusion_of(facts: RunFacts, split: str) -> tuple[list[list[int]], list[str]] | None:
    """Counts (truth × prediction) and label names, from the metrics or else the predictions; None if neither has them."""
    metrics = facts.outcome.metrics if facts.outcome else {}
    matrix = metrics.get(f"{split}_confusion_matrix")
    if isinstance(matrix, list) and matrix:
        return matrix, [_label(facts.labels, i) for i in range(len(matrix))]
    predictions = facts.predictions.get(split)
    if not isinstance(predictions, Predictions) or predictions.task != "single-label":
        return None
    import numpy as np

    width = len(predictions.labels)
    pairs = predictions.truth * width + predictions.predicted
    counts = np.bincount(pairs, minlength=width * width).reshape(width, width)
    return counts.tolist(), list(predictions.labels)


def confusion(facts: RunFacts) -> str:
    """The confusion matrix of each split as a table."""
    html = ""
    for split in ("eval", "test"):
        if (matrix := _confusion_of(facts, split)) is not None:
            html += (_matrix if len(matrix[1]) <= _MOST_LABELS else _confusions)(*matrix, split)
    return html


def matrices(facts: RunFacts) -> list[Chart]:
    """The confusion matrix of each split as a chart, for the files; the page has the table."""
    charts = []
    for split in ("eval", "test"):
        if (matrix := _confusion_of(facts, split)) is not None:
            title = f"Confusion matrix on {split}"
            rows = (f"{name}: {', '.join(map(str, row))}" for row, name in zip(*matrix, strict=True))
            description = f"Rows are the labels, columns the predictions in the same order. {'; '.join(rows)}."
            charts.append(
                Chart(
                    f"confusion-{split}",
                    title,
                    x="predicted",
                    y="label",
                    matrix=matrix[0],
                    names=matrix[1],
                    description=description,
                )
            )
    return charts


def _matrix(matrix: Sequence[Sequence[int]], labels: Sequence[str], split: str) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in labels)
    rows = []
    for name, row in zip(labels, matrix, strict=True):
        total = sum(row) or 1
        cells = "".join(f'<td style="background: rgba(var(--cell), {0.5 * n / total:.3f})">{n:d}</td>' for n in row)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    caption = f"On {split}: rows are the labels, columns the predictions; darker is a larger share of the row"
    whole = (
        f'<table class="numbers matrix"><caption>{caption}</caption><thead><tr><th scope="col">label</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return scroll(whole, f"Confusion matrix on {split}")


def _confusions(matrix: Sequence[Sequence[int]], labels: Sequence[str], split: str) -> str:
    pairs = [
        (n, sum(row), labels[i], labels[j]) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j
    ]
    pairs.sort(key=lambda pair: -pair[0])
    rows = [[label, predicted, n, f"{n / total:.1%}"] for n, total, label, predicted in pairs[:_MOST_CONFUSIONS]]
    caption = f"On {split}: the {len(rows)} most frequent of {len(pairs)} confusions among {len(labels)} labels"
    return table(["label", "predicted as", "rows", "share of the label"], rows, caption)


def calibration(facts: RunFacts) -> tuple[str, list[Chart]]:
    """HTML without its charts, and the charts: reliability, or for regression predicted against true values."""
    html, charts = "", []
    for split, predictions in facts.predictions.items():
        if isinstance(predictions, str) or not len(predictions):
            continue
        if predictions.task == "regression":
            charts.append(_scatter(predictions, split))
            continue
        how = calibrate(predictions)
        assert how is not None
        bars = [(low, high, share) for low, high, _, _, share, *_ in how.bins]
        charts.append(
            Chart(
                f"calibration-{split}",
                f"Reliability on {split}",
                x=how.what,
                y="share correct",
                bars={"share correct": bars},
                whiskers=[((low + high) / 2, least, most) for low, high, _, _, _, least, most in how.bins],
                diagonal=True,
                frame=((0.0, 1.0), (0.0, 1.0)),
                description="; ".join(
                    f"confidence {confidence:.2f}: {share:.2f} correct of {n}"
                    for _, _, n, confidence, share, *_ in how.bins
                )
                + ".",
            )
        )
        html += pairs(
            {
                f"expected calibration error on {split}": f"{how.error:.4f} ({len(how.bins)} of 15 equal bins hold rows)",
                f"Brier score on {split}": number(how.brier),
            }
        )
    if html:
        html += note(
            "On the dotted line, confidence equals accuracy. Whiskers: 95 % intervals of the share (Wilson). The error depends on the "
            "number of bins and of rows: compare it only between equal sets of rows."
        )
    return html, charts


def _scatter(predictions: Predictions, split: str) -> Chart:
    step = max(1, -(-len(predictions) // _MOST_DOTS))
    points = [
        (float(x), float(y)) for x, y in zip(predictions.truth[::step], predictions.predicted[::step], strict=True)
    ]
    shown = f"{len(points):,} of {len(predictions):,} rows" if step > 1 else f"{len(points):,} rows"
    bias = float((predictions.predicted - predictions.truth).mean())
    values = [value for point in points for value in point]
    low, high = min(values), max(values)
    both = (low, high) if high > low else (low - 0.5, high + 0.5)
    return Chart(
        f"scatter-{split}",
        f"Predicted against true values on {split}",
        x="true value",
        y="predicted",
        dots=points,
        diagonal=True,
        frame=(both, both),
        description=f"{shown}; predictions are {bias:+.4g} off on average.",
    )


#: By task, the column that says how large a mistake is.
_MISTAKE = {"regression": "off by", "single-label": "confidence", "multi-label": "probability off by"}


def worst(facts: RunFacts, *, texts: bool = True) -> str:
    """The worst mistakes, with their texts or with row and id only."""
    html = ""
    for split, predictions in facts.predictions.items():
        if isinstance(predictions, str) or not (listed := mistakes(predictions, _MOST_MISTAKES)):
            continue
        ids = ["id"] if "id" in predictions.table.column_names else []
        heads = ["row", *ids, "label", "predicted", _MISTAKE[predictions.task], *(["text"] if texts else [])]
        rows, files = [], set()
        for index, size in listed:
            about = predictions.about(index)
            text = " ⏐ ".join(str(about[name]) for name in ("text", "text_pair") if name in about)
            labels = [_label_of(predictions, values, index) for values in (predictions.truth, predictions.predicted)]
            identity = [about.get(name) for name in ("row", *ids)]
            rows.append([*identity, *labels, f"{size:.3f}", *([_cut(text)] if texts else [])])
            files |= {str(about["file"])} if about.get("file") else set()
        name = f"predictions{'' if split == 'eval' else '_test'}.parquet"
        html += table(heads, rows, f"On {split}, the {len(rows)} worst; row as in {name}", kind="text")
        html += note(f"Rows of {', '.join(sorted(files))}") if files else ""
    return html


def _label_of(predictions: Predictions, values: Any, index: int) -> str:
    if predictions.task == "regression":
        return f"{values[index]:.4g}"
    if predictions.task == "single-label":
        return predictions.labels[int(values[index])]
    return ", ".join(name for name, flag in zip(predictions.labels, values[index], strict=True) if flag) or "–"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def _digits(value: float) -> str:
    return f"{value:.4f}" if value == value else "–"


def _label(labels: Sequence[str], index: int) -> str:
    return str(labels[index]) if index < len(labels) else str(index)
