"""A finished run and new text -> predictions: `python -m afina.worker predict STAGE …`, reached by `afina predict`.

    plan < job.json                       look through the inputs, begin `OUT.parts/` or find out how far it is
    run PARTS [--share K/N] [--merge]     predict the chunks of a share that are missing: those with number ≡ K modulo N
    merge PARTS                           parts to the output

Every stage may be killed at any instant and repeated. `--progress` chooses what a run says meanwhile: `json`, reports
`{"rows": …}` for the host to draw (see `afina.worker.reply`); `log`, a line a minute on standard error.

Not covered: one chunk over several processes; a share's chunks are predicted one after the other by one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.errors import InputError
from afina.prediction.request import STDIN, Prediction, folder_of
from afina.worker.reply import read_question, report
from afina.worker.startup import uncollected

if TYPE_CHECKING:
    import pyarrow as pa

    from afina.worker.inference.classifier import Classifier, Encoded
    from afina.worker.inference.inputs import Inputs
    from afina.worker.inference.parts import Parts

__all__ = ["answer"]

#: The share of texts that were cut at which it is worth a word.
_TRUNCATED_SHARE = 0.01


def answer(arguments: list[str]) -> dict[str, Any]:
    """The answer of one stage."""
    parser = argparse.ArgumentParser(prog="afina.worker predict", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("plan", "run", "merge"):
        stage = stages.add_parser(name)
        if name != "plan":
            stage.add_argument("parts")
        if name == "run":
            stage.add_argument("--share", default="0/1")
            stage.add_argument("--merge", action="store_true")
            stage.add_argument("--progress", choices=("json", "log"), default="log")
    options = parser.parse_args(arguments)
    if options.stage == "plan":
        return plan(Prediction.model_validate(read_question("a prediction")))
    if options.stage == "merge":
        return merge(options.parts)
    number, _, of = options.share.partition("/")
    return run(options.parts, int(number), int(of), and_merge=options.merge, progress=options.progress)


# -- plan -------------------------------------------------------------------------------------------------------------


def plan(job: Prediction) -> dict[str, Any]:
    """Check everything that can be checked without the model, and begin; or find the same prediction begun or whole.

    Raises:
        InputError: what cannot be predicted, or an output that belongs to something else.
    """
    from afina.files import describe
    from afina.worker.inference.inputs import look_through
    from afina.worker.inference.parts import Parts, compare, made_by
    from afina.worker.model.pretrained import check_files

    config = check_files(job.model)
    _check_head(job.model, config)
    job = job.model_copy(update={"text": _text_columns(job)})
    files = [job.spool if path == STDIN and job.spool else path for path in job.inputs]
    records = [describe(path.parent, [path.name])[path.name] for path in files]
    identity = {
        "inputs": [{"name": name, **record} for name, record in zip(_names(job.inputs), records, strict=True)],
        "model": _model_identity(job),
        "options": job.model_dump(
            mode="json", include={"text", "keep", "batch_size", "max_tokens", "dtype", "chunk_rows"}
        ),
    }
    out, folder = job.out, folder_of(job.out)
    if folder.exists():
        parts = Parts(folder)
        if different := compare(parts.identity, identity):
            raise InputError(
                f"{folder}: belongs to another prediction: {'; '.join(different)}",
                "choose another output with -o, or remove that folder to begin anew",
            )
        done = parts.done()
        if out.exists() and not (folder / "merged.json").exists():
            raise _exists(out)
        return _about(parts, "resumed", done)
    if out.exists():
        made = made_by(out)
        if made is None:
            raise _exists(out)
        if different := compare(made["identity"], identity):
            raise _exists(out, f" (another prediction: {'; '.join(different)})")
        return {"state": "whole", "out": str(out), "rows": made["summary"]["rows"], "summary": made["summary"]}
    inputs = look_through(files, job.text, job.chunk_rows)
    _check_names(job, inputs, config)
    times = {str(path): path.stat().st_mtime_ns for path in files}
    return _about(Parts.begin(job, identity, times, replace(inputs, files=job.inputs)), "begun", set())


def _about(parts: Parts, state: str, done: set[int]) -> dict[str, Any]:
    rows = sum(parts.rows_of(chunk) for chunk in done)
    about = {"chunks": parts.chunks, "done": len(done), "rows": parts.inputs.rows, "rows_done": rows}
    return {"state": state, "parts": str(parts.folder), "out": str(parts.out), **about}


def _exists(out: Path, why: str = "") -> InputError:
    return InputError(
        f"{out}: exists{why}; nothing that exists is overwritten",
        "choose another output with -o, or move that file away",
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """What tells the inputs apart and does not depend on where they lie."""
    above = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return [str(path.relative_to(above)) for path in paths]


def _check_head(folder: Path, config: dict[str, Any]) -> None:
    named = [str(name) for name in config.get("architectures") or []]
    if named and not any("SequenceClassification" in name for name in named):
        raise InputError(
            f"model: {folder} is a {named[0]}, not a sequence classifier",
            "train it first (`afina train RECIPE`), and give the run directory",
        )


def _text_columns(job: Prediction) -> tuple[str, ...]:
    """The columns to predict on: as asked for, else as in training, else `text`; as many as the model reads."""
    from afina.worker.inference.export_info import note_of

    trained = job.trained_columns or tuple(note_of(job.model).get("text_columns") or ())
    asked = job.text
    if STDIN in job.inputs:
        return ("text", "text_pair") if len(asked or trained) == 2 else ("text",)
    if trained and asked and len(asked) != len(trained):
        wants = "two texts" if len(trained) == 2 else "one text"
        raise InputError(
            f"--text {','.join(asked)}: the model reads {wants} a row (in training: {', '.join(trained)})",
            "--text FIRST,SECOND" if len(trained) == 2 else "--text COLUMN",
        )
    if len(asked) > 2:
        raise InputError(f"--text {','.join(asked)}: one column, or two for pairs", "--text FIRST,SECOND")
    return asked or trained or ("text",)


def _model_identity(job: Prediction) -> str:
    from afina.worker.inference.parts import digest_of
    from afina.worker.model.pretrained import record_model

    files = record_model(job.model, job.plan.recipe)
    return digest_of({**files, "settings": {"max_length": job.max_length}})


def _check_names(job: Prediction, inputs: Inputs, config: dict[str, Any]) -> None:
    """Refuse columns that would be there twice in the output."""
    if job.keep != "all":
        return
    taken = {"prediction", *(f"score: {name}" for name in (config.get("id2label") or {}).values())}
    for name in inputs.schema.names:
        if name in taken:
            raise InputError(
                f"{inputs.files[0]}: has a column `{name}`, which the predictions need",
                "rename it, or leave the input's columns out: --keep id",
            )


# -- run --------------------------------------------------------------------------------------------------------------


def run(folder: str, number: int, of: int, *, and_merge: bool, progress: str) -> dict[str, Any]:
    """Predict what is missing of a share.

    Args:
        number, of: chunks whose number is `number` modulo `of`.
        and_merge: merge if no chunk is missing afterwards: whoever is last does.
    """
    from afina.worker.inference.parts import Parts

    parts = Parts(folder)
    parts.check_inputs()
    there = parts.done()
    missing = [chunk for chunk in range(number, parts.chunks, of) if chunk not in there]
    began = time.monotonic()
    rows = sum(parts.rows_of(chunk) for chunk in missing)
    shown = _Progress(progress, rows)
    if missing:
        _predict(parts, missing, number, shown)
    seconds = {"seconds": round(time.monotonic() - began, 3), "seconds_predicting": round(shown.seconds, 3)}
    said: dict[str, Any] = {"rows": rows, **seconds, "merged": False}
    if and_merge and len(parts.done()) == parts.chunks:
        said |= {"merged": True, "summary": merge(folder)}
    return said


def merge(folder: str) -> dict[str, Any]:
    """Merge, and say what is doubtful; another process that does the same at the same time is no error."""
    from afina.worker.inference.parts import Parts, made_by

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
        yield f"{summary['truncated']:,} texts ({share:.1%}) are longer than the model was trained for and were cut"


def _predict(parts: Parts, chunks: list[int], number: int, progress: _Progress) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(_cores()))
    with uncollected():
        import torch

        from afina.worker.compute import allocator
        from afina.worker.inference.classifier import Classifier
        from afina.worker.inference.inputs import Reader, as_texts

    job = parts.job
    if torch.cuda.is_available():
        device = f"cuda:{number % torch.cuda.device_count()}"
    else:
        device = "cpu"
        allocator.tune_malloc()
    classifier = Classifier(
        job.model,
        max_length=job.max_length,
        batch_size=job.batch_size,
        max_tokens=job.max_tokens,
        dtype=job.dtype,
        device=device,
        trust_remote_code=job.plan.recipe.trust_remote_code,
    )
    reader = Reader(parts.inputs, parts.files())

    def ahead(chunk: int) -> tuple[pa.Table, Encoded]:
        table = reader.table(chunk)
        columns = [as_texts(table.column(name)) for name in job.text]
        return table, classifier.encode(columns[0], columns[1] if len(columns) > 1 else None)

    progress.begin()
    with ThreadPoolExecutor(1) as pool:
        # While the model works on a chunk the next one is read and tokenised.
        waiting = pool.submit(ahead, chunks[0])
        for place, chunk in enumerate(chunks):
            table, encoded = waiting.result()
            if place + 1 < len(chunks):
                waiting = pool.submit(ahead, chunks[place + 1])
            _write(parts, chunk, reader, table, encoded, classifier, progress)
            del table, encoded
    progress.end()


def _write(
    parts: Parts,
    chunk: int,
    reader: Any,
    table: pa.Table,
    encoded: Encoded,
    classifier: Classifier,
    progress: _Progress,
) -> None:
    """Predict a chunk and publish its part."""
    import numpy as np
    import pyarrow as pa

    from afina.worker.model.outputs import prediction_columns

    rows, done = len(table), progress.rows
    logits = np.full((rows, int(classifier.model.config.num_labels)), np.nan, np.float32)
    logits[encoded.rows] = classifier.run(encoded, progress.advance)
    progress.advance(done + rows - progress.rows)  # blank rows too
    columns = prediction_columns(classifier.task, classifier.labels, logits)
    if parts.job.keep == "id":
        files, numbers = reader.places(chunk)
        kept = {"file": pa.array(files, pa.string()), "row": pa.array(numbers, pa.int64())}
        name = parts.job.id_column
        if name and name in table.column_names:
            kept[name] = table.column(name)
        table = pa.table(kept)
    for name, values in columns.items():
        table = table.append_column(name, values)
    blank = sorted(set(range(rows)) - set(encoded.rows.tolist())) if len(encoded.rows) < rows else []
    shown = []
    if blank:
        files, numbers = reader.places(chunk)
        shown = [f"{files[row]}, row {numbers[row]}" for row in blank[:5]]
    decided: Counter[str] = Counter()
    if classifier.task != "regression":
        chosen = columns["prediction"].drop_null()
        decided.update((chosen.flatten() if classifier.task == "multi-label" else chosen).to_pylist())
    about = {
        "rows": rows,
        "tokens": int(encoded.split.offsets[-1]),
        "blank": len(blank),
        "blank_rows": shown,
        "truncated": encoded.truncated,
        "predictions": decided,
    }
    parts.write(chunk, table, about)


class _Progress:
    """Rows that are done: as JSON lines for the host, twice a second, or in words, once a minute."""

    def __init__(self, mode: str, total: int) -> None:
        self.mode, self.total, self.rows = mode, total, 0
        self.seconds = 0.0
        self._began = self._said = time.monotonic()

    def begin(self) -> None:
        self._began = self._said = time.monotonic()
        if self.mode == "log":
            print(f"afina: predicting {self.total:,} rows", file=sys.stderr, flush=True)

    def advance(self, rows: int) -> None:
        self.rows += rows
        now = time.monotonic()
        if now - self._said < (0.5 if self.mode == "json" else 60.0):
            return
        self._said = now
        if self.mode == "json":
            report({"rows": self.rows})
            return
        rate = self.rows / (now - self._began)
        left = (self.total - self.rows) / rate / 60
        share = f"{self.rows:,} of {self.total:,} rows ({self.rows / self.total:.0%})"
        print(f"afina: {share}, {rate:,.0f} rows/s, {left:.0f} min left", file=sys.stderr, flush=True)

    def end(self) -> None:
        self.seconds = time.monotonic() - self._began
        if self.mode == "json":
            report({"rows": self.rows})
        else:
            rate = self.rows / max(self.seconds, 1e-9)
            print(f"afina: {self.rows:,} rows in {self.seconds:.0f} s, {rate:,.0f} rows/s", file=sys.stderr, flush=True)


def _cores() -> int:
    """Cores that this process may use. Where Slurm binds none, affinity shows the whole node."""
    mine = len(os.sched_getaffinity(0))
    return min(mine, int(os.environ.get("SLURM_CPUS_PER_TASK") or mine))
