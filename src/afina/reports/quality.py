"""Sections about the model: each class, the confusion matrix, calibration, the worst mistakes. Pure: facts in, HTML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from afina.reports.charts import Chart
from afina.reports.facts import Facts
from afina.reports.page import note, number, pairs, scroll, table
from afina.statistics.predictions import Predictions
from afina.statistics.scores import Interval, Scores, calibrate, mistakes

__all__ = ["calibration", "classes", "confusion", "confusion_of", "overall", "worst"]

#: More labels than this make a table that nobody can read: then the most frequent confusions are listed.
_MOST_LABELS = 30
_MOST_CONFUSIONS = 30
_MOST_MISTAKES = 20
_MOST_TEXT = 300
_MOST_DOTS = 2000


def overall(facts: Facts) -> str:
    """Scores of the model in model/ with their intervals."""
    parts = []
    for part, scores in facts.scores.items():
        rows = [[name, _digits(i.value), _digits(i.low), _digits(i.high)] for name, i in scores.overall.items()]
        parts.append(table(["score", "value", "95 % from", "to"], rows, f"On {part}, the model in model/"))
    return _why_not(facts) + "".join(parts) + (_about_intervals(facts) if parts else "")


def _about_intervals(facts: Facts) -> str:
    draws = max(scores.draws for scores in facts.scores.values())
    return note(
        f"Intervals: percentiles of {draws:,} bootstrap samples of the rows, with a fixed seed. They tell how much the choice of rows "
        "matters, not how much another seed of the training would."
    )


def _why_not(facts: Facts) -> str:
    """In the place of what needs the predictions: why it is not there."""
    reasons = dict.fromkeys(found for found in facts.predictions.values() if isinstance(found, str))
    return "".join(note(reason) for reason in reasons)


def classes(facts: Facts) -> str:
    metrics = facts.outcome.metrics if facts.outcome else {}
    return "".join(
        _classes_scored(facts.scores[part], facts.predictions[part], part)
        if part in facts.scores and facts.scores[part].per_class
        else _classes_logged(metrics, part, facts.labels)
        for part in ("eval", "test")
    )


def _classes_scored(scores: Scores, predictions: Predictions | str, part: str) -> str:
    assert isinstance(predictions, Predictions)
    names = ("precision", "recall", "f1")
    rows = [
        [label, scores.support[k], *(_interval(scores.per_class[name][k]) for name in names)]
        for k, label in enumerate(predictions.labels)
    ]
    return table(["class", "rows", *names], rows, f"On {part}, the model in model/; in brackets 95 % intervals")


def _interval(found: Interval | None) -> str | None:
    return None if found is None else f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})"


def _classes_logged(metrics: Mapping[str, Any], part: str, labels: Sequence[str]) -> str:
    """As the run logged it, where there are no predictions to compute from."""
    columns = {
        name: metrics[f"{part}_{name}_per_class"]
        for name in ("f1", "precision", "recall")
        if isinstance(metrics.get(f"{part}_{name}_per_class"), list)
    }
    if not columns:
        return ""
    rows = [
        [_label(labels, i), *(values[i] for values in columns.values())]
        for i in range(min(len(v) for v in columns.values()))
    ]
    return table(["class", *columns], rows, f"On {part}, the model in model/")


def confusion_of(facts: Facts, part: str) -> tuple[list[list[int]], list[str]] | None:
    """Counts (truth × prediction) and label names, from the metrics or else the predictions; None where neither has them."""
    metrics = facts.outcome.metrics if facts.outcome else {}
    matrix = metrics.get(f"{part}_confusion_matrix")
    if isinstance(matrix, list) and matrix:
        return matrix, [_label(facts.labels, i) for i in range(len(matrix))]
    found = facts.predictions.get(part)
    if not isinstance(found, Predictions) or found.task != "single-label":
        return None
    import numpy as np

    width = len(found.labels)
    counts = np.bincount(found.truth * width + found.predicted, minlength=width * width).reshape(width, width)
    return counts.tolist(), list(found.labels)


def confusion(facts: Facts) -> str:
    parts = []
    for part in ("eval", "test"):
        found = confusion_of(facts, part)
        if found is not None:
            parts.append((_matrix if len(found[1]) <= _MOST_LABELS else _confusions)(*found, part))
    return "".join(parts)


def _matrix(matrix: Sequence[Sequence[int]], labels: Sequence[str], part: str) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in labels)
    rows = []
    for name, row in zip(labels, matrix, strict=True):
        total = sum(row) or 1
        cells = "".join(f'<td style="background: rgba(var(--cell), {0.5 * n / total:.3f})">{n:d}</td>' for n in row)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    caption = f"On {part}: rows are the labels, columns the predictions; darker is a larger share of the row"
    whole = (
        f'<table class="numbers matrix"><caption>{caption}</caption><thead><tr><th scope="col">label</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return scroll(whole, f"Confusion matrix on {part}")


def _confusions(matrix: Sequence[Sequence[int]], labels: Sequence[str], part: str) -> str:
    found = [
        (n, sum(row), labels[i], labels[j]) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j
    ]
    found.sort(key=lambda entry: -entry[0])
    rows = [[true, said, n, f"{n / total:.1%}"] for n, total, true, said in found[:_MOST_CONFUSIONS]]
    caption = f"On {part}: the {len(rows)} most frequent of {len(found)} confusions among {len(labels)} labels"
    return table(["label", "predicted as", "rows", "share of the label"], rows, caption)


def calibration(facts: Facts) -> tuple[str, list[Chart]]:
    """HTML without its charts, and the charts: reliability, or for regression what was said against what is true."""
    html, charts = "", []
    for part, found in facts.predictions.items():
        if isinstance(found, str) or not len(found):
            continue
        if found.task == "regression":
            charts.append(_scatter(found, part))
            continue
        how = calibrate(found)
        assert how is not None
        bars = [(low, high, share) for low, high, _, _, share, *_ in how.bins]
        charts.append(
            Chart(
                f"calibration-{part}",
                f"Reliability on {part}",
                x=how.what,
                y="share that was right",
                bars={"share right": bars},
                whiskers=[((low + high) / 2, least, most) for low, high, _, _, _, least, most in how.bins],
                diagonal=True,
                frame=((0.0, 1.0), (0.0, 1.0)),
                said="; ".join(
                    f"confidence {sure:.2f}: {share:.2f} right of {n}" for _, _, n, sure, share, *_ in how.bins
                )
                + ".",
            )
        )
        html += pairs(
            {
                f"expected calibration error on {part}": f"{how.error:.4f} ({len(how.bins)} of 15 equal bins hold rows)",
                f"Brier score on {part}": number(how.brier),
            }
        )
    if html:
        html += note(
            "On the dotted line a model is right as often as it says. Whiskers: 95 % intervals of the share (Wilson). "
            "The error depends on the number of bins and is never below 0 by chance: compare it only between equal sets."
        )
    return html, charts


def _scatter(found: Predictions, part: str) -> Chart:
    step = max(1, -(-len(found) // _MOST_DOTS))
    points = [(float(x), float(y)) for x, y in zip(found.truth[::step], found.predicted[::step], strict=True)]
    shown = f"{len(points):,} of {len(found):,} rows" if step > 1 else f"{len(points):,} rows"
    bias = float((found.predicted - found.truth).mean())
    ends = [v for point in points for v in point]
    both = (min(ends), max(ends)) if max(ends) > min(ends) else (ends[0] - 0.5, ends[0] + 0.5)
    return Chart(
        f"scatter-{part}",
        f"Predicted against true values on {part}",
        x="true value",
        y="predicted",
        dots=points,
        diagonal=True,
        frame=(both, both),
        said=f"{shown}; predictions are {bias:+.4g} off on average.",
    )


def worst(facts: Facts, *, texts: bool = True) -> str:
    """The mistakes that the model was surest of. `texts`: show them; without, row and id only."""
    parts = []
    for part, found in facts.predictions.items():
        if isinstance(found, str):
            continue
        listed = mistakes(found, _MOST_MISTAKES)
        if not listed:
            continue
        what = (
            "off by"
            if found.task == "regression"
            else "confidence"
            if found.task == "single-label"
            else "probability off by"
        )
        with_id, pair = "id" in found.table.column_names, "text_pair" in found.table.column_names
        heads = ["row", *(["id"] if with_id else []), "label", "predicted", what, *(["text"] if texts else [])]
        rows = []
        for index, bad in listed:
            about = found.about(index)
            text = " ⏐ ".join(str(about[name]) for name in ("text", *(["text_pair"] if pair else [])) if name in about)
            rows.append(
                [
                    about.get("row"),
                    *([about.get("id")] if with_id else []),
                    _said(found, found.truth, index),
                    _said(found, found.predicted, index),
                    f"{bad:.3f}",
                    *([_cut(text)] if texts else []),
                ]
            )
        files = sorted({str(found.about(index).get("file")) for index, _ in listed if found.about(index).get("file")})
        caption = f"On {part}, the {len(rows)} worst; row as in predictions{'' if part == 'eval' else '_test'}.parquet"
        parts.append(table(heads, rows, caption, kind="text") + (note(f"Rows of {', '.join(files)}") if files else ""))
    return "".join(parts)


def _said(found: Predictions, values: Any, index: int) -> str:
    if found.task == "regression":
        return f"{values[index]:.4g}"
    if found.task == "single-label":
        return found.labels[int(values[index])]
    return ", ".join(name for name, flag in zip(found.labels, values[index], strict=True) if flag) or "–"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"


def _digits(value: float) -> str:
    return f"{value:.4f}" if value == value else "–"


def _label(labels: Sequence[str], index: int) -> str:
    return str(labels[index]) if index < len(labels) else str(index)
