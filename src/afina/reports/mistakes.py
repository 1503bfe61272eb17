"""Sections about mistakes: the confusion matrix, the most frequent confusions, and their texts. Pure: facts -> HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from afina.reports.charts import Chart
from afina.reports.facts import RunFacts
from afina.reports.page import note, scroll, table
from afina.statistics.predictions import Predictions
from afina.statistics.scores import mistakes
from afina.text import number, plural

__all__ = ["confusion", "matrices", "worst"]

#: With more labels than this there is no matrix; with more than `_NAMED`, or longer names, its columns have numbers.
_MOST_LABELS, _NAMED, _SHORT = 30, 10, 9
_MOST_CONFUSIONS = 30
#: Confusions whose texts are shown, and texts of each; the worst mistakes where there are no confusions.
_GROUPS, _EACH, _WORST = 8, 5, 20
_MOST_TEXT = 300

Matrix = Sequence[Sequence[int]]


def _matrix_of(facts: RunFacts, split: str) -> tuple[Matrix, list[str]] | None:
    """Counts (truth × prediction) and label names, from the metrics or else the predictions; None if neither has them."""
    matrix = (facts.outcome.metrics if facts.outcome else {}).get(f"{split}_confusion_matrix")
    if isinstance(matrix, list) and matrix:
        names = [*facts.labels, *map(str, range(len(facts.labels), len(matrix)))]
        return matrix, names[: len(matrix)]
    predictions = facts.predictions.get(split)
    if not isinstance(predictions, Predictions) or predictions.task != "single-label":
        return None
    import numpy as np

    width = len(predictions.labels)
    pairs = predictions.truth * width + predictions.predicted
    counts = np.bincount(pairs, minlength=width * width).reshape(width, width)
    return counts.tolist(), list(predictions.labels)


def confusion(facts: RunFacts) -> str:
    """The confusion matrix of each split as a table, and the most frequent confusions beneath."""
    html = ""
    for split in ("eval", "test"):
        if (found := _matrix_of(facts, split)) is not None:
            html += (_matrix(*found, split) if len(found[1]) <= _MOST_LABELS else "") + _confusions(*found, split)
    return html


def matrices(facts: RunFacts) -> list[Chart]:
    """The confusion matrix of each split as a chart, for the files; the page has the table."""
    charts = []
    for split in ("eval", "test"):
        if (found := _matrix_of(facts, split)) is not None and len(found[1]) <= 100:
            rows = (f"{name}: {', '.join(map(str, row))}" for row, name in zip(*found, strict=True))
            words = f"Rows are the labels, columns the predictions in the same order. {'; '.join(rows)}."
            kind: Any = {"x": "predicted", "y": "label", "matrix": found[0], "names": found[1], "description": words}
            charts.append(Chart(f"confusion-{split}", f"Confusion matrix on {split}", **kind))
    return charts


def _matrix(matrix: Matrix, labels: Sequence[str], split: str) -> str:
    numbered = len(labels) > _NAMED or max(map(len, labels)) > _SHORT
    shown = [f"{i} {name}" if numbered else name for i, name in enumerate(labels, start=1)]
    heads = "".join(
        f'<th scope="col" title="{escape(name, quote=True)}">{i if numbered else escape(name)}</th>'
        for i, name in enumerate(labels, start=1)
    )
    rows = []
    for name, label, row in zip(shown, labels, matrix, strict=True):
        total = sum(row) or 1
        cells = ""
        for other, n in zip(labels, row, strict=True):
            if not n:
                cells += "<td>·</td>" if numbered else "<td>0</td>"
                continue
            hint = escape(f"{label} predicted as {other}: {n:,} ({n / total:.1%})", quote=True)
            cells += f'<td style="background: rgba(var(--cell), {0.5 * n / total:.2f})" title="{hint}">{n}</td>'
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    how = ", by their numbers" if numbered else ""
    caption = f"On {split}: rows are the labels, columns the predictions{how}; darker is a larger share of the row"
    head = f'<thead><tr><th scope="col">label</th>{heads}</tr></thead>'
    whole = f'<table class="matrix"><caption>{caption}</caption>{head}<tbody>{"".join(rows)}</tbody></table>'
    return scroll(whole, f"Confusion matrix on {split}")


def _confusions(matrix: Matrix, labels: Sequence[str], split: str) -> str:
    pairs = [
        (n, sum(row), labels[i], labels[j]) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j
    ]
    pairs.sort(key=lambda pair: -pair[0])
    most = _MOST_CONFUSIONS if len(labels) > _MOST_LABELS else 10
    rows = [[label, predicted, n, f"{n / total:.1%}"] for n, total, label, predicted in pairs[:most]]
    caption = f"On {split}: the {len(rows)} most frequent of {len(pairs)} confusions among {len(labels)} labels"
    return table(["label", "predicted as", "rows", "share of the label"], rows, caption)


#: By task, the column that says how large a mistake is.
_MISTAKE = {
    "regression": "off by",
    "single-label": "confidence",
    "multi-label": "probability off by",
    "token-classification": "wrong entities",
}


def worst(facts: RunFacts, *, texts: bool = True) -> str:
    """The mistakes with their texts, or with row and id only: by confusion where a row has one label, else the worst."""
    html = ""
    for split, predictions in facts.predictions.items():
        if isinstance(predictions, str) or not (listed := mistakes(predictions, len(predictions))):
            continue
        name = f"predictions{'' if split == 'eval' else '_test'}.parquet"
        if predictions.task == "single-label":
            html += note(f"On {split}, {plural(len(listed), 'mistake')}; the most confident first; row as in {name}.")
            html += _grouped(predictions, listed, texts)
        else:
            shown = listed[:_WORST]
            html += _listed(predictions, shown, texts, f"On {split}, the {len(shown)} worst; row as in {name}")
        indices = [index for index, _ in listed[:1000]]
        files = sorted({str(about["file"]) for index in indices if (about := predictions.about(index)).get("file")})
        html += note(f"Rows of {', '.join(files)}") if files else ""
    return html


def _grouped(predictions: Predictions, listed: Iterable[tuple[int, float]], texts: bool) -> str:
    """The most frequent confusions, each with its most confident mistakes."""
    groups: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for index, size in listed:
        pair = (int(predictions.truth[index]), int(predictions.predicted[index]))
        groups.setdefault(pair, []).append((index, size))
    html, ordered = "", sorted(groups.items(), key=lambda group: -len(group[1]))
    for (truth, predicted), members in ordered[:_GROUPS]:
        share = len(members) / int((predictions.truth == truth).sum())
        names = f"{predictions.labels[truth]} predicted as {predictions.labels[predicted]}"
        html += f"<h3>{escape(names)}: {plural(len(members), 'row')}, {share:.1%} of the label</h3>"
        html += _listed(
            predictions, members[:_EACH], texts, f"{min(_EACH, len(members))} of {len(members)}", pair=False
        )
    if len(ordered) > _GROUPS:
        html += note(f"{len(ordered) - _GROUPS} rarer confusions are left out.")
    return html


def _listed(
    predictions: Predictions, listed: Iterable[tuple[int, float]], texts: bool, caption: str, *, pair: bool = True
) -> str:
    ids = ["id"] if "id" in predictions.table.column_names else []
    heads = ["row", *ids, *(["label", "predicted"] if pair else []), _MISTAKE[predictions.task]]
    rows = []
    for index, size in listed:
        about = predictions.about(index)
        text = " ⏐ ".join(str(about[name]) for name in ("text", "text_pair") if name in about)
        values = (
            [_label_of(predictions, of, index) for of in (predictions.truth, predictions.predicted)] if pair else []
        )
        identity = [str(about.get(name)) for name in ("row", *ids)]
        shown = f"{size:,.0f}" if predictions.task == "token-classification" else number(size)
        rows.append([*identity, *values, shown, *([_cut(text)] if texts else [])])
    return table([*heads, *(["text"] if texts else [])], rows, caption, kind="text")


def _label_of(predictions: Predictions, values: Any, index: int) -> str:
    if predictions.task == "token-classification":
        column = predictions.table.column("label" if values is predictions.truth else "prediction")
        return "; ".join(f"{entity['text']} ({entity['label']})" for entity in column[index].as_py() or ()) or "–"
    if predictions.task == "regression":
        return number(float(values[index]))
    if predictions.task == "single-label":
        return predictions.labels[int(values[index])]
    return ", ".join(name for name, flag in zip(predictions.labels, values[index], strict=True) if flag) or "–"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 1] + "…"
