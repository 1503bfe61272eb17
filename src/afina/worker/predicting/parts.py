"""Parts of an unfinished prediction, and how they become one file.

    OUT.parts/
        job.json                the request, as the host sent it
        manifest.json           identity (digests of inputs and model, options), schema, rows of each chunk
        stdin.txt               a copy of standard input, where that is the input
        part-000000.parquet     the rows of a chunk with their predictions; written aside, then renamed
        merged.json             size and SHA-256 of the output, from before it is renamed until this folder is removed

The folder appears complete, by rename. A part depends on its chunk, the model and the options alone: two processes may make the
same one, and the merged file is the same however often the work was killed. It is written in the folder and renamed to OUT;
then the folder is removed. Tokens are not kept: making them again costs a hundredth of predicting.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from afina.errors import EnvironmentProblem, InputError
from afina.files import difference, name_aside, sha256, sync_file, sync_folder, write_atomic
from afina.prediction.request import OUTPUTS, STDIN, Prediction, folder_of
from afina.publish import rename_new
from afina.recipe.keys.train_keys import AS_RECORDED
from afina.worker.predicting.inputs import Inputs

__all__ = ["Parts", "compare", "digest_of", "made_by", "summary_of"]

#: 2: chunks are numbers of rows. 1, of older afinas: also the bytes of the files.
FORMAT = 2
#: Key of our own record in the metadata of a Parquet file.
_KEY = b"afina"
_SUMMED = ("rows", "tokens", "blank", "truncated", "unanswered", "words", "words_cut")


class Parts:
    """The folder of an unfinished prediction; `Parts.begin` makes it, `Parts(folder)` opens it."""

    def __init__(self, folder: str | Path) -> None:
        """Raises:
        InputError: the folder holds no prediction, or one of another format.
        """
        self.folder = Path(folder).absolute()
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise InputError(
                    f"{self.folder}: made by {'an older' if manifest['format'] == 1 else 'another'} afina",
                    "remove that folder to begin anew, or finish with the afina that began it",
                )
            self.job = Prediction.model_validate_json((self.folder / "job.json").read_bytes(), context=AS_RECORDED)
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename}: is missing, so {self.folder} is not an unfinished prediction",
                "choose another output with -o, or remove that folder",
            ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{self.folder}: cannot be read: {error}", "remove that folder to begin anew") from None
        self.identity: dict[str, Any] = manifest["identity"]
        self.times: dict[str, int] = manifest["times"]
        self.inputs = Inputs.from_json(manifest["inputs"])
        self.out = self.job.out

    @classmethod
    def begin(cls, job: Prediction, identity: Mapping[str, Any], times: Mapping[str, int], inputs: Inputs) -> Parts:
        """Make the folder.

        Raises:
            InputError: another process has just made it.
        """
        final = folder_of(job.out)
        aside = name_aside(final)
        aside.mkdir()
        try:
            if job.spool:
                shutil.copyfile(job.spool, aside / "stdin.txt")
            manifest = {"format": FORMAT, "identity": identity, "times": times, "inputs": inputs.to_json()}
            write_atomic(aside / "job.json", job.model_copy(update={"spool": None}).model_dump_json(indent=1))
            write_atomic(aside / "manifest.json", json.dumps(manifest))
            if not rename_new(aside, final):
                raise InputError(
                    f"{final}: another process has just begun this", "run the same command again to continue it"
                )
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return cls(final)

    @property
    def chunks(self) -> int:
        return len(self.inputs.chunks)

    def path(self, chunk: int) -> Path:
        return self.folder / f"part-{chunk:06}.parquet"

    def files(self) -> tuple[Path, ...]:
        """Where the inputs are read: standard input was copied into the folder."""
        return tuple(self.folder / "stdin.txt" if path == STDIN else path for path in self.inputs.files)

    def done(self) -> set[int]:
        """Chunks that have a part; damaged parts are removed."""
        complete_chunks = set()
        for chunk in range(self.chunks):
            path = self.path(chunk)
            if not path.exists():
                continue
            try:
                complete = pq.read_metadata(path).num_rows == self.inputs.chunks[chunk]
            except (OSError, pa.ArrowInvalid):
                complete = False
            if complete:
                complete_chunks.add(chunk)
            else:
                path.unlink(missing_ok=True)
        return complete_chunks

    def write(self, chunk: int, table: pa.Table, summary: Mapping[str, Any]) -> None:
        """Publish a part; `summary_of` adds the summaries up."""
        path = self.path(chunk)
        aside = name_aside(path)
        try:
            pq.write_table(
                table.replace_schema_metadata({_KEY: json.dumps(summary)}),
                aside,
                compression="zstd",
                row_group_size=1 << 20,
            )
            sync_file(aside)
            os.replace(aside, path)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()

    def check_inputs(self) -> None:
        """Compare the inputs with those of the plan; content is read only where size or modification time differ.

        Raises:
            InputError: one is missing or has changed.
        """
        for record, path in zip(self.identity["inputs"], self.inputs.files, strict=True):
            if path == STDIN:
                continue
            try:
                stat = path.stat()
            except OSError as error:
                raise InputError(
                    f"{path}: {error.strerror}", "put the file back, and run the same command again"
                ) from None
            same = stat.st_size == record["size"] and stat.st_mtime_ns == self.times.get(str(path))
            if not same and (wrong := difference(path.parent, {path.name: record})):
                raise InputError(wrong, "put the file back, or predict it into another output: -o")

    def merge(self) -> dict[str, Any]:
        """Write the output from all parts and remove the folder; returns the summary. Two processes may do it at once.

        Raises:
            InputError: another file has the output's name.
            EnvironmentProblem: a part is damaged.
        """
        marker = self.folder / "merged.json"
        if self.out.exists():
            wrong = "there is another file" if not marker.exists() else None
            if wrong is None:
                merged = json.loads(marker.read_text())
                wrong = difference(self.out.parent, {self.out.name: merged["file"]})
            if wrong:
                raise InputError(
                    f"{self.out}: exists ({wrong}); nothing that exists is overwritten",
                    "move it away and run the same command again, or choose another output: -o",
                )
            self._remove()
            return dict(merged["summary"])
        summary = summary_of(self._summaries())
        aside = self.folder / f".merged.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            _WRITERS[OUTPUTS[self.out.suffix.lower()]](aside, self._tables(), self.schema(summary))
            sync_file(aside)
            file = {"size": aside.stat().st_size, "sha256": sha256(aside)}
            write_atomic(marker, json.dumps({"file": file, "summary": summary}))
            os.replace(aside, self.out)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()
        sync_folder(self.out.parent)
        self._remove()
        return summary

    def schema(self, summary: Mapping[str, Any]) -> pa.Schema:
        """The output's schema: that of the parts, with identity and summary; nothing that depends on place or time."""
        record = {"identity": self.identity, "summary": summary}
        return pq.read_schema(self.path(0)).with_metadata({_KEY: json.dumps(record, sort_keys=True)})

    def _summaries(self) -> Iterator[dict[str, Any]]:
        for chunk in range(self.chunks):
            yield json.loads(pq.read_schema(self.path(chunk)).metadata[_KEY])

    def _tables(self) -> Iterator[pa.Table]:
        for chunk in range(self.chunks):
            try:
                yield pq.read_table(self.path(chunk), partitioning=None, use_threads=False)
            except pa.ArrowInvalid as error:
                self.path(chunk).unlink(missing_ok=True)
                raise EnvironmentProblem(
                    f"{self.path(chunk)}: was damaged and has been removed: {str(error).splitlines()[0]}",
                    "run the same command again: it predicts this part anew",
                ) from None

    def _remove(self) -> None:
        """Renamed first, so that a half-removed folder never looks like an unfinished prediction."""
        gone = name_aside(self.folder)
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def made_by(out: Path) -> dict[str, Any] | None:
    """Identity and summary of a Parquet file that `merge` wrote; None of any other file."""
    try:
        return dict(json.loads((pq.read_schema(out).metadata or {})[_KEY]))
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences between two identities, in words."""
    changes = []
    old, new = ({entry["name"]: entry for entry in side["inputs"]} for side in (before, now))
    changes += [f"input {name} was not there" for name in new if name not in old]
    changes += [f"input {name} is not given" for name in old if name not in new]
    changes += [f"input {name} has changed" for name in new if name in old and new[name] != old[name]]
    if not changes and list(old) != list(new):
        changes.append("the inputs are in another order")
    if before["model"] != now["model"]:
        changes.append("the model is a different one")
    keys = [*before["options"], *(key for key in now["options"] if key not in before["options"])]
    for key in keys:
        old_value, new_value = before["options"].get(key), now["options"].get(key)
        if old_value != new_value:
            changes.append(
                f"{key} was {json.dumps(old_value, ensure_ascii=False)}, is {json.dumps(new_value, ensure_ascii=False)}"
            )
    return changes


def digest_of(files: Mapping[str, Any]) -> str:
    """One SHA-256 over the records of many files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def summary_of(summaries: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the parts: rows, tokens, blank, cut and unanswered texts, words and those cut off, and how often each label was predicted."""
    sums: Counter[str] = Counter()
    predictions: Counter[str] = Counter()
    blank: list[str] = []
    for part in summaries:
        sums.update({key: part[key] for key in _SUMMED if key in part})
        predictions.update(part["predictions"])
        blank += part["blank_rows"]
    return {**sums, "blank_rows": blank[:5], "predictions": dict(sorted(predictions.items()))}


# -- outputs ----------------------------------------------------------------------------------------------------------


def _write_parquet(path: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def _write_delimited(delimiter: str) -> Callable[[Path, Iterator[pa.Table], pa.Schema], None]:
    def write(path: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
        from pyarrow import csv as pa_csv

        flat = pa.schema([(f.name, pa.string() if pa.types.is_nested(f.type) else f.type) for f in schema])
        options = pa_csv.WriteOptions(delimiter=delimiter)
        with pa_csv.CSVWriter(path, flat, write_options=options) as writer:
            for table in tables:
                columns = [_json_texts(c) if pa.types.is_nested(c.type) else c for c in table.columns]
                writer.write_table(pa.table(columns, schema=flat))

    return write


def _write_json(path: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            columns = [_shortest(c) if pa.types.is_floating(c.type) else c.to_pylist() for c in table.columns]
            for row in zip(*columns, strict=True):
                record = dict(zip(schema.names, row, strict=True))
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def _json_texts(column: pa.ChunkedArray) -> pa.Array:
    texts = [None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in column.to_pylist()]
    return pa.array(texts, pa.string())


def _shortest(column: pa.ChunkedArray) -> Sequence[float | None]:
    """Numbers with the fewest digits that identify them in their own width: 0.9, not 0.8999999761581421. Where JSON has no word, null."""
    texts = column.cast(pa.string()).to_pylist()
    return [None if text in (None, "nan", "inf", "-inf") else float(text) for text in texts]


_WRITERS: dict[str, Callable[[Path, Iterator[pa.Table], pa.Schema], None]] = {
    "parquet": _write_parquet,
    "csv": _write_delimited(","),
    "tsv": _write_delimited("\t"),
    "jsonl": _write_json,
}
