"""Everything of a prediction that can be checked without the model, before anything waits in a queue; then the folder of its parts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.errors import InputError
from afina.formats.read_options import PLAIN
from afina.prediction.request import STDIN, Prediction, folder_of

if TYPE_CHECKING:
    from afina.worker.predicting.parts import Parts

__all__ = ["plan"]


def plan(job: Prediction) -> dict[str, Any]:
    """Check everything that can be checked without the model, and make the folder of parts; or resume the same prediction.

    Raises:
        InputError: what cannot be predicted, or an output that belongs to something else.
    """
    from afina.worker.model.model_files import check_files
    from afina.worker.predicting.inputs import check_columns, examine
    from afina.worker.predicting.parts import Parts, compare
    from afina.worker.task.tasks import labels_words

    config = check_files(job.model)
    _check_head(job.model, config)
    for member in job.members[1:]:
        check_files(member.model)
    job = job.model_copy(update={"text": _text_columns(job)})
    files = [job.spool if path == STDIN and job.spool else path for path in job.inputs]
    reading = job.reading or PLAIN
    check_columns(files, job.text, _output_columns(job, config) if job.keep == "all" else (), reading)
    identity = _identity(job, files, _rule(job, config))
    folder = folder_of(job.out)
    if folder.exists():
        parts = Parts(folder)
        if different := compare(parts.identity, identity):
            raise InputError(
                f"{folder}: belongs to another prediction: {'; '.join(different)}",
                "choose another output with -o, or remove that folder to begin anew",
            )
        done = parts.done()
        if job.out.exists() and not (folder / "merged.json").exists():
            raise _exists(job.out)
        return _report(parts, "resumed", done)
    if job.out.exists():
        return _check_complete(job.out, identity)
    id_column = [job.id_column] if job.id_column else []
    words = labels_words(config.get("architectures"))
    inputs = examine(files, job.text, None if job.keep == "all" else id_column, job.chunk_rows, reading, words=words)
    for warning in inputs.warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    times = {str(path): path.stat().st_mtime_ns for path in files}
    return _report(Parts.begin(job, identity, times, replace(inputs, files=job.inputs)), "begun", set())


def _identity(job: Prediction, files: Sequence[Path], decisions: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the output: digests of inputs and model, options."""
    from afina.files import describe
    from afina.worker.model.model_files import record_model
    from afina.worker.predicting.parts import digest_of

    records = [describe(path.parent, [path.name])[path.name] for path in files]
    settings = job.tokens.encoding if job.tokens else {"max_length": None}
    models = [(member.model, member.tokens.encoding) for member in job.members] or [(job.model, settings)]
    digests = [digest_of({**record_model(model, job.plan.recipe), "settings": encoding}) for model, encoding in models]
    return {
        "inputs": [{"name": name, **record} for name, record in zip(_names(job.inputs), records, strict=True)],
        "model": digests if job.members else digests[0],
        "options": {
            **job.model_dump(mode="json", include={"text", "keep", "batch_size", "max_tokens", "dtype", "chunk_rows"}),
            **({"plain": True} if job.plain else {}),
            **({"abstain_below": job.abstain_below} if job.abstain_below is not None else {}),
            **(job.reading.given() if job.reading else {}),
        },
        **({"decisions": decisions} if decisions else {}),
    }


def _rule(job: Prediction, config: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature and thresholds that were fitted for the model; empty without them."""
    from afina.statistics.decision_rule import read_rule
    from afina.worker.task.tasks import TASKS, labels_words

    labels = [str(name) for _, name in sorted((config.get("id2label") or {}).items(), key=lambda pair: int(pair[0]))]
    kind = config.get("problem_type") or TASKS["single-label"].problem_type
    task = next((name for name, row in TASKS.items() if row.problem_type == kind), "single-label")
    if labels_words(config.get("architectures")):
        task = "token-classification"
    if task in ("regression", "token-classification") and job.abstain_below is not None:
        remedy = "leave it out" if task == "regression" else "leave it out: each entity has a score"
        raise InputError(f"--abstain-below: a {task.replace('-', ' ')} has no confidence", remedy)
    if job.members:
        return {"members": len(job.members)}
    rule = None if job.plain else read_rule(job.model, task, labels)
    return {} if rule is None else {"temperature": rule.temperature, "thresholds": rule.named_thresholds(labels)}


def _check_complete(out: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The report on an output that the same prediction has written; any other one is refused."""
    from afina.worker.predicting.parts import compare, made_by

    existing = made_by(out)
    if existing is None:
        raise _exists(out)
    if different := compare(existing["identity"], identity):
        raise _exists(out, f" (another prediction: {'; '.join(different)})")
    about = {"state": "whole", "out": str(out), "decisions": identity.get("decisions", {})}
    return {**about, "rows": existing["summary"]["rows"], "summary": existing["summary"]}


def _report(parts: Parts, state: str, done: set[int]) -> dict[str, Any]:
    rows = sum(parts.inputs.chunks[chunk] for chunk in done)
    counts = {"chunks": parts.chunks, "done": len(done), "rows": parts.inputs.rows, "rows_done": rows}
    decisions = parts.identity.get("decisions", {})
    return {"state": state, "parts": str(parts.folder), "out": str(parts.out), "decisions": decisions, **counts}


def _exists(out: Path, why: str = "") -> InputError:
    return InputError(
        f"{out}: exists{why}; nothing that exists is overwritten",
        "choose another output with -o, or move that file away",
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Paths relative to their common folder, so that they do not depend on where the inputs lie."""
    above = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return [str(path.relative_to(above)) for path in paths]


def _check_head(folder: Path, config: dict[str, Any]) -> None:
    named = [str(name) for name in config.get("architectures") or []]
    if named and not any("SequenceClassification" in name or "TokenClassification" in name for name in named):
        raise InputError(
            f"model: {folder} is a {named[0]}, not a classifier",
            "train it first (`afina train RECIPE`), and give the run directory",
        )


def _text_columns(job: Prediction) -> tuple[str, ...]:
    """The columns of texts: as asked for, else as in training, else `text`; as many as the model reads."""
    from afina.worker.inference.model_folder import export_info

    trained = job.trained_columns or tuple(export_info(job.model).get("text_columns") or ())
    columns = job.text
    if STDIN in job.inputs:
        return ("text", "text_pair", *(f"text_{n}" for n in range(3, 100)))[: max(1, len(columns or trained))]
    if trained and columns and len(columns) != len(trained):
        needs = "one text" if len(trained) == 1 else "two texts" if len(trained) == 2 else f"{len(trained)} texts"
        raise InputError(
            f"--text {','.join(columns)}: the model reads {needs} a row (in training: {', '.join(trained)})",
            "--text COLUMN" if len(trained) == 1 else f"name {len(trained)} columns: --text FIRST,SECOND",
        )
    return columns or trained or ("text",)


def _output_columns(job: Prediction, config: Mapping[str, Any]) -> set[str]:
    """Names of the columns that a prediction adds."""
    from afina.worker.task.tasks import labels_words

    more = ["confidence"] if job.abstain_below is not None else []
    if labels_words(config.get("architectures")):
        return {"prediction"}
    return {"prediction", *more, *(f"score: {name}" for name in (config.get("id2label") or {}).values())}
