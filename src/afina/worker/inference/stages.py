"""Prediction with a model folder on files: `python -m afina.worker predict STAGE …`, started by `afina predict`.

    plan < job.json                       check the inputs and make `OUT.parts/`, or report how much of it is done
    run PARTS [--share K/N] [--merge]     predict the missing chunks of a share: those with number ≡ K modulo N
    merge PARTS                           parts to the output

Every stage may be killed at any instant and repeated. `--progress json` reports `{"rows": …}` for the host's bar (see
`afina.worker.reply`); `--progress log` prints a line a minute on standard error.

Not covered: one chunk over several processes; one process predicts a share's chunks one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.errors import InputError
from afina.formats.read_options import PLAIN
from afina.prediction.request import STDIN, Prediction, folder_of
from afina.recipe.keys.train_keys import AS_RECORDED
from afina.run.allocation import Allocation
from afina.worker.progress import Progress
from afina.worker.reply import read_question, report
from afina.worker.startup import gc_paused

if TYPE_CHECKING:
    from afina.worker.inference.classifier import EncodedTexts
    from afina.worker.inference.classifier_ensemble import EncodedForAll
    from afina.worker.inference.inputs import Chunk
    from afina.worker.inference.parts import Parts

__all__ = ["answer", "merge", "plan", "run"]

#: The share of truncated texts above which a warning is printed.
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
        return plan(Prediction.model_validate(read_question("a prediction"), context=AS_RECORDED))
    if options.stage == "merge":
        return merge(options.parts)
    number, _, of = options.share.partition("/")
    return run(options.parts, int(number), int(of), and_merge=options.merge, progress=options.progress)


# -- plan -------------------------------------------------------------------------------------------------------------


def plan(job: Prediction) -> dict[str, Any]:
    """Check everything that can be checked without the model, and make the folder of parts; or resume the same prediction.

    Raises:
        InputError: what cannot be predicted, or an output that belongs to something else.
    """
    from afina.worker.inference.inputs import check_columns, examine
    from afina.worker.inference.parts import Parts, compare
    from afina.worker.model.model_files import check_files
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
    from afina.worker.inference.parts import digest_of
    from afina.worker.model.model_files import record_model

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
    from afina.worker.inference.parts import compare, made_by

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


# -- run --------------------------------------------------------------------------------------------------------------


def run(folder: str, number: int, of: int, *, and_merge: bool, progress: str) -> dict[str, Any]:
    """Predict the missing chunks of a share.

    Args:
        number, of: the share: chunks whose number is `number` modulo `of`.
        and_merge: merge if no chunk is missing afterwards; the last process to finish does.
        progress: json or log.
    """
    from afina.worker.inference.parts import Parts

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
    """Merge the parts and print warnings; another process that does the same at the same time is no error."""
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
    if summary.get("words_cut"):
        of = f"{summary['words_cut']:,} of {summary['words']:,} words"
        yield f"{of} lie behind the end of texts that were cut: no entity is predicted there; split long texts"


def _predict(parts: Parts, chunks: Sequence[int], number: int, rows: int, progress: str) -> float:
    """Predict `chunks`, which have `rows` rows; returns the seconds without loading the model."""
    classifier = _load(parts.job, number)
    if number == 0 and classifier.tokens.windows is not None:
        _say(f"texts are cut {classifier.tokens.cut}, as in training")
    from afina.worker.inference.inputs import read_chunks

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
        _say(f"{rows:,} rows in {seconds:.0f} s, {rows / max(seconds, 1e-9):,.0f} rows/s")
    return seconds


def _load(job: Prediction, number: int) -> Any:
    """The classifier (or those of an ensemble) of share `number`: on its own GPU, else on all cores."""
    os.environ.setdefault("OMP_NUM_THREADS", str(Allocation.from_env().cores()))
    with gc_paused():
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
        _say(f"predicting {rows:,} rows")
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
