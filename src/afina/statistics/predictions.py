"""`predictions.parquet` of a run as arrays: labels, predictions and probabilities of each row; those of several runs for the same rows, aligned.

Reads what `afina.worker.training.results.write_predictions` wrote. Texts stay in the table until one is needed. NumPy and pyarrow are imported inside the
functions: `afina --help` needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.errors import DataError, first_line
from afina.formats.columnar import is_list
from afina.statistics.entities import count_rows

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Predictions", "align", "aligned", "averaged", "predicted_in_labels_of", "read_predictions"]

Array = Any

_SCORE = "score: "
#: Columns that identify a row; the others are its label, the prediction and the scores.
_IDENTITY = ("row", "file", "id", "text", "text_pair")


@dataclass(frozen=True)
class Predictions:
    """The predictions for one split (eval or test), in the order of the prepared data.

    Attributes:
        task: single-label, multi-label, regression or token-classification.
        labels: the label names in the order of the model's outputs; none for regression; types of entities.
        truth: int64 (N,) single-label; bool (N, L) multi-label; float64 (N,) regression; int64 (N, 2 L), see
            `afina.statistics.entities.count_rows`.
        predicted: as `truth`.
        scores: float64 (N, L), probabilities; None for regression and token classification.
        table: the pyarrow table, for row, file, id and text.
    """

    task: str
    labels: tuple[str, ...]
    truth: np.ndarray[Any, Any]
    predicted: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any] | None
    table: Any

    def __len__(self) -> int:
        return len(self.truth)

    def about(self, index: int) -> dict[str, Any]:
        """Row, file, id and texts of one example, as far as the file has them."""
        names = [name for name in _IDENTITY if name in self.table.column_names]
        return {name: self.table.column(name)[index].as_py() for name in names}


def read_predictions(path: Path, *, texts: bool = True) -> Predictions:
    """Read one `predictions*.parquet`, with or without the texts.

    Raises:
        DataError: the file is missing, damaged or not what a run writes.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "`afina resume RUN` on a finished run does not write it again; start the run anew with `afina rerun RUN`"
    try:
        names = None if texts else [name for name in pq.read_schema(path).names if name not in ("text", "text_pair")]
        table = pq.read_table(path, columns=names)
        labels = tuple(name.removeprefix(_SCORE) for name in table.column_names if name.startswith(_SCORE))
        truth, predicted = table.column("label"), table.column("prediction")
        several = is_list(truth.type)
        if several and pa.types.is_struct(truth.type.value_type):
            return _of_entities(table)
        if not labels:
            values = [np.asarray(column.to_numpy(), np.float64) for column in (truth, predicted)]
            return Predictions("regression", (), values[0], values[1], None, table)
        scores = np.stack([np.asarray(table.column(_SCORE + name).to_numpy(), np.float64) for name in labels], axis=1)
        values = [(_flags if several else _numbers)(column, labels) for column in (truth, predicted)]
    except FileNotFoundError:
        raise DataError(f"{path}: is missing", "a run writes it when it finishes") from None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = first_line(error)
        raise DataError(f"{path}: cannot be read as predictions: {reason}", remedy) from None
    return Predictions("multi-label" if several else "single-label", labels, values[0], values[1], scores, table)


def align(first: Predictions, second: Predictions) -> Array:
    """Indices in `second` of the rows of `first`, int64 (N,).

    Rows are the same if texts and labels are. Rows in another order are matched by text, label and the number of earlier
    occurrences of both.

    Raises:
        DataError: the rows, the labels or the tasks differ; the message says how.
    """
    import numpy as np

    remedy = "compare runs whose recipes choose the same eval rows (data.eval, its seed, the same files)"
    if first.task != second.task:
        raise DataError(f"one run is {first.task}, the other {second.task}", remedy)
    if set(first.labels) != set(second.labels):
        raise DataError(
            f"the labels differ: {', '.join(sorted(set(first.labels) ^ set(second.labels)))} are not in both", remedy
        )
    if first.table is second.table:  # another model's predictions for the rows of one file
        return np.arange(len(first))
    left, right = _identity(first), _identity(second)
    if left == right:
        return np.arange(len(left))
    index = {key: number for number, key in enumerate(right)}
    common = sum(key in index for key in left)
    if common != len(left) or len(left) != len(right):
        raise DataError(f"the eval rows differ: {len(left)} and {len(right)}, {common} of them in both", remedy)
    return np.array([index[key] for key in left], np.int64)


def aligned(first: Predictions, second: Predictions) -> Predictions:
    """`second` with the rows and the labels of `first` in their order.

    Raises:
        DataError: see `align`.
    """
    rows, predicted, scores = align(first, second), predicted_in_labels_of(first, second), second.scores
    if scores is not None:
        scores = scores[rows][:, [second.labels.index(name) for name in first.labels]]
    return replace(first, predicted=predicted[rows], scores=scores)


def averaged(members: Sequence[Predictions]) -> Predictions:
    """The mean probabilities of aligned predictions, and the decisions by them; of regressions the mean values."""
    import numpy as np

    if members[0].scores is None:
        return replace(members[0], predicted=np.mean([m.predicted for m in members], axis=0))
    scores = np.mean([m.scores for m in members if m.scores is not None], axis=0)
    decided = scores.argmax(-1) if members[0].task == "single-label" else scores > 0.5
    return replace(members[0], scores=scores, predicted=decided)


def _identity(predictions: Predictions) -> list[tuple[Any, ...]]:
    """A key per example that is the same in another run: texts, label, number of the occurrence."""
    table = predictions.table
    names = [name for name in ("text", "text_pair") if name in table.column_names] or ["file", "row"]
    labels = table.column("label").to_pylist()
    columns = [table.column(name).to_pylist() for name in names]
    seen: dict[tuple[Any, ...], int] = {}
    keys = []
    for label, *texts in zip(labels, *columns, strict=True):
        key = (*texts, tuple(sorted(map(str, label))) if isinstance(label, list) else label)
        seen[key] = seen.get(key, 0) + 1
        keys.append((*key, seen[key]))
    return keys


def predicted_in_labels_of(first: Predictions, second: Predictions) -> Array:
    """`second.predicted` with the label indices of `first`."""
    import numpy as np

    if not first.labels or first.labels == second.labels:
        return second.predicted
    if second.task == "single-label":
        return np.array([first.labels.index(name) for name in second.labels])[second.predicted]
    order = [second.labels.index(name) for name in first.labels]
    if second.task == "token-classification":
        order += [len(order) + place for place in order]
    return second.predicted[:, order]


def _of_entities(table: Any) -> Predictions:
    import numpy as np
    import pyarrow.compute as pc

    columns = [table.column(name).combine_chunks() for name in ("label", "prediction")]
    names = sorted({name for column in columns for name in column.flatten().field("label").to_pylist()})
    entities = []
    for column in columns:
        flat = column.flatten()
        row = np.repeat(
            np.arange(len(column)), pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        )
        spans = [flat.field(name).to_numpy(zero_copy_only=False) for name in ("start", "end")]
        kinds = np.array([names.index(name) for name in flat.field("label").to_pylist()], np.int64)
        entities.append(np.stack([row, *spans, kinds], axis=1).astype(np.int64))
    truth, predicted = count_rows(entities[0], entities[1], len(table), len(names))
    return Predictions("token-classification", tuple(names), truth, predicted, None, table)


def _numbers(column: Any, labels: Sequence[str]) -> Any:
    """Label names as indices into `labels`, int64 (N,)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    indices = pc.index_in(column, value_set=pa.array(labels, column.type))
    if indices.null_count:
        row = int(np.argmax(np.asarray(indices.is_null().to_numpy())))
        raise ValueError(f"label {column[row].as_py()!r} in row {row} has no column of scores")
    return np.asarray(indices.to_numpy(), np.int64)


def _flags(column: Any, labels: Sequence[str]) -> Any:
    """Lists of label names as bool (N, L)."""
    import numpy as np
    import pyarrow.compute as pc

    whole = column.combine_chunks()
    lengths = np.asarray(pc.list_value_length(whole).to_numpy(zero_copy_only=False), np.int64)
    flags = np.zeros((len(whole), len(labels)), bool)
    if lengths.sum():
        flags[np.repeat(np.arange(len(whole)), lengths), _numbers(whole.flatten(), labels)] = True
    return flags
