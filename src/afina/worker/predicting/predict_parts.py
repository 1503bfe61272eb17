"""Predict the chunks of one share, a part each, and merge the parts.

Not covered: one chunk over several processes; one process predicts a share's chunks one after the other.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from afina.prediction.request import Prediction, folder_of
from afina.run.allocation import Allocation
from afina.text import plural
from afina.worker.progress import Progress
from afina.worker.reply import report
from afina.worker.startup import NOT_NEEDED, hide_packages

if TYPE_CHECKING:
    from afina.worker.inference.classifier import EncodedTexts
    from afina.worker.inference.classifier_ensemble import EncodedForAll
    from afina.worker.predicting.inputs import Chunk
    from afina.worker.predicting.parts import Parts

__all__ = ["merge", "run"]

#: The share of truncated texts above which a warning is printed.
_TRUNCATED_SHARE = 0.01


def run(folder: str, number: int, of: int, *, and_merge: bool, progress: str) -> dict[str, Any]:
    """Predict the missing chunks of a share.

    Args:
        number, of: the share: chunks whose number is `number` modulo `of`.
        and_merge: merge if no chunk is missing afterwards; the last process to finish does.
        progress: json or log.
    """
    from afina.worker.predicting.parts import Parts

    parts = Parts(folder)
    parts.check_inputs()
    done = parts.done()
    missing = [chunk for chunk in range(number, parts.chunks, of) if chunk not in done]
    began = time.monotonic()
    rows = sum(parts.inputs.chunks[chunk] for chunk in missing)
    predicting = _predict(parts, missing, number, rows, progress) if missing else 0.0
    seconds = {"seconds": round(time.monotonic() - began, 3), "seconds_predicting": round(predicting, 3)}
    result: dict[str, Any] = {"rows": rows, **seconds, "merged": False}
    if and_merge and len(parts.done()) == parts.chunks:
        result |= {"merged": True, "summary": merge(folder)}
    return result


def merge(folder: str) -> dict[str, Any]:
    """Merge the parts and print warnings; another process that does the same at the same time is harmless."""
    from afina.worker.predicting.parts import Parts, made_by

    parts = Parts(folder)
    try:
        summary = parts.merge()
    except FileNotFoundError:
        if folder_of(parts.out).exists() or not parts.out.exists():
            raise
        return (made_by(parts.out) or {"summary": {}})["summary"]  # type: ignore[no-any-return]
    for line in _warnings(summary):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    return summary


def _warnings(summary: dict[str, Any]) -> Iterator[str]:
    if summary["blank"]:
        shown = "; ".join(summary["blank_rows"])
        yield f"{summary['blank']:,} of {summary['rows']:,} rows have no text and so no prediction: {shown}" + (
            ", …" if summary["blank"] > len(summary["blank_rows"]) else ""
        )
    if summary["truncated"] > _TRUNCATED_SHARE * summary["rows"]:
        share = summary["truncated"] / summary["rows"]
        yield f"cut, as longer than the model was trained for: {plural(summary['truncated'], 'text')} ({share:.1%})"
    if summary.get("words_cut"):
        of = f"{summary['words_cut']:,} of {summary['words']:,} words"
        yield f"{of} lie behind the end of texts that were cut: no entity is predicted there; split long texts"


def _predict(parts: Parts, chunks: Sequence[int], number: int, rows: int, progress: str) -> float:
    """Predict `chunks`, which have `rows` rows; returns the seconds without loading the model."""
    classifier = _load(parts.job, number)
    if number == 0 and classifier.tokens.windows is not None:
        _say(f"texts are cut {classifier.tokens.cut}, as in training")
    from afina.worker.predicting.inputs import read_chunks

    source = read_chunks(parts.inputs, parts.files(), set(chunks))

    def encode_next() -> tuple[Chunk, EncodedTexts | EncodedForAll] | None:
        chunk = next(source, None)
        return (chunk, classifier.encode(chunk.texts, chunk.divided)) if chunk is not None else None

    # A run has checked its model; of another folder nobody knows whether its rows may share a batch.
    unchecked = not parts.job.trained and parts.job.dtype == "float32"
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool, _progress(progress, rows) as advance:
        # While the model works on a chunk the next one is read and tokenised.
        waiting = pool.submit(encode_next)
        while (ready := waiting.result()) is not None:
            waiting = pool.submit(encode_next)
            if unchecked and len(ready[1].rows):
                _say(classifier.check_rows(ready[1]))
                unchecked = False
            _write(parts, *ready, classifier, advance)
            del ready
    seconds = time.monotonic() - began
    if progress == "log":
        _say(f"{plural(rows, 'row')} in {seconds:.0f} s, {rows / max(seconds, 1e-9):,.0f} rows/s")
    return seconds


def _load(job: Prediction, number: int) -> Any:
    """The classifier (or those of an ensemble) of share `number`: on its own GPU, else on all cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(Allocation.from_env().cores()))
    with hide_packages(*NOT_NEEDED):
        import torch

        from afina.worker.compute import cpu, products
        from afina.worker.inference.classifier import Classifier
        from afina.worker.inference.classifier_ensemble import ClassifierEnsemble

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        cpu.tune_malloc()

    one: Any = (job.model, job.tokens, job.plan.recipe.trust_remote_code)
    loaded = [
        Classifier(
            model,
            tokens=tokens,
            batch_size=job.batch_size,
            max_tokens=job.max_tokens,
            dtype=job.dtype,
            device=f"cuda:{number % torch.cuda.device_count()}" if on_gpu else "cpu",
            trust_remote_code=trusted,
        )
        for model, tokens, trusted in [(m.model, m.tokens, m.trust_remote_code) for m in job.members] or [one]
    ]
    decided = loaded if job.plain else [classifier.as_fitted() for classifier in loaded]
    classifier = ClassifierEnsemble(decided) if job.members else decided[0]
    if not on_gpu:
        products.use_onednn(job.plan.recipe.train.onednn and classifier.batching == "packed")
    return classifier


def _write(
    parts: Parts, chunk: Chunk, encoded: EncodedTexts | EncodedForAll, classifier: Any, advance: Callable[[int], None]
) -> None:
    """Predict a chunk and publish its part."""
    import numpy as np
    import pyarrow as pa

    from afina.worker.task.tasks import abstained, prediction_columns
    from afina.worker.task.word_places import CUT

    rows, job = len(chunk), parts.job
    ours = classifier.run(encoded, advance)
    advance(rows - len(encoded.rows))
    more = {}
    if classifier.task == "token-classification":
        columns = {"prediction": classifier.entity_column(encoded, ours)}
        pieces = encoded.split.words.pieces  # type: ignore[union-attr]
        more = {"words": len(pieces), "words_cut": int((pieces == CUT).sum())}
    else:
        logits = np.full((rows, classifier.num_labels), np.nan, np.float32)
        logits[encoded.rows] = ours
        columns = prediction_columns(classifier.task, classifier.labels, logits, classifier.rule)
    if job.abstain_below is not None:
        columns, count = abstained(classifier.task, columns, job.abstain_below)
        more = {"unanswered": count}
    table = chunk.table
    if job.keep == "id":
        names = np.array([str(path) for path in parts.inputs.files], object)
        table = pa.table({"file": pa.array(names[chunk.file], pa.string()), "row": pa.array(chunk.row, pa.int64())})
        for name in chunk.table.column_names:
            table = table.append_column(name, chunk.table.column(name))
    for name, values in columns.items():
        table = table.append_column(name, values)
    blank = np.setdiff1d(np.arange(rows), encoded.rows)
    counts: Counter[str] = Counter()
    if classifier.task == "token-classification":
        counts.update(columns["prediction"].flatten().field("label").to_pylist())
    elif classifier.task != "regression":
        chosen = columns["prediction"].drop_null()
        counts.update((chosen.flatten() if classifier.task == "multi-label" else chosen).to_pylist())
    summary = {
        "rows": rows,
        "tokens": encoded.num_tokens,
        "blank": len(blank),
        "blank_rows": [chunk.where(row, parts.inputs.files) for row in blank[:5].tolist()],
        "truncated": encoded.truncated,
        **more,
        "predictions": counts,
    }
    parts.write(chunk.number, table, summary)


@contextlib.contextmanager
def _progress(mode: str, rows: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of rows done since its last call."""
    if mode == "log":
        _say(f"predicting {plural(rows, 'row')}")
        with Progress("predicting", "predicted", "rows", rows, _say) as progress:
            yield progress.advance
        return
    done, printed = 0, time.monotonic()

    def advance(count: int) -> None:
        """Report at most twice a second."""
        nonlocal done, printed
        done += count
        if time.monotonic() - printed >= 0.5:
            printed = time.monotonic()
            report({"rows": done})

    yield advance
    report({"rows": done})


def _say(line: str) -> None:
    print(f"afina: {line}", file=sys.stderr, flush=True)
