"""The run directory as a type: everything that crosses from one process, node or attempt to the next is a file in it.

    plan.json  recipe.yaml  prepared.json   the run's inputs; written once, when the directory is claimed
    record.json                             how the run was made: versions, image digest, git commit and changes
    estimate.json                           the forecast at submission
    worker.argv                             the command of a node's worker, NUL-separated, for bash to read as it is
    finetune.sbatch  job.sh  node.sh        the scripts of a job on the host; copies, so that later edits do not reach it
    submissions.jsonl  events.jsonl         submissions and events, with times
    intent.json                             exists: a submission is under way, or its answer was lost
    attempts/<id>/                          env.json  node<k>.log  exit
    metrics.jsonl                           one line per log and evaluation; no times, so that equal runs are equal files
    checkpoints/step-<n>/
    pruning.json                            of a trial of a search that prunes: what it is compared by
    lease.json                              the attempt that works here now
    stop                                    exists: stop at the next step and leave a checkpoint
    outcome.json  model/  predictions.parquet
    trained_rows.npy                        hashes of the rows that the model was trained on, for runs that start from it

`mkdir` claims, `os.replace` publishes; nothing is edited in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from afina.errors import Failure, InputError
from afina.files import read_words, write_atomic, write_problem
from afina.run.outcome import Outcome
from afina.run.plan import Plan, load_plan

__all__ = ["PRUNING", "RunDir", "evaluations_of", "is_run_dir", "job_ids_of", "task_of"]

#: Of a trial whose search prunes: `{"metric": "eval_accuracy", "lower": false}`.
PRUNING = "pruning.json"
#: `<job>.<restart>`, or of an array's task `<array>_<task>.<restart>`.
_ATTEMPT_OF_A_JOB = re.compile(r"([0-9]+(?:_[0-9]+)?)\.[0-9]+")


def is_run_dir(path: str | Path) -> bool:
    return (Path(path) / "plan.json").is_file()


class RunDir:
    """A claimed run directory; `afina.run.new_run.claim` makes one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    # The files.
    plan_file = property(lambda self: self.path / "plan.json")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    stop_file = property(lambda self: self.path / "stop")
    outcome_file = property(lambda self: self.path / "outcome.json")
    checkpoints = property(lambda self: self.path / "checkpoints")
    attempts = property(lambda self: self.path / "attempts")
    model = property(lambda self: self.path / "model")
    predictions = property(lambda self: self.path / "predictions.parquet")

    def predictions_of(self, split: str) -> Path:
        """The predictions of `eval` or `test`."""
        return self.path / ("predictions_test.parquet" if split == "test" else "predictions.parquet")

    def plan(self) -> Plan:
        return load_plan(self.plan_file)

    def prepared(self) -> dict[str, Any]:
        return self._read_json("prepared.json")

    def check_place(self) -> None:
        """A run can be resumed only in its original place: its command and data have absolute paths.

        Raises:
            InputError: it was moved or copied.
        """
        words = self.worker_argv()
        begun = Path(words[-1]) if words and words[-1].startswith("/") else self.path
        if begun == self.path or (begun.exists() and begun.samefile(self.path)):
            return
        if begun.exists():
            raise InputError(
                f"{self.path}: is a copy of {begun}, and would write there",
                f"go on with {begun} itself, or begin a new run: afina rerun",
            )
        raise InputError(
            f"{self.path}: was begun as {begun}, and has been moved",
            f"move it back, or leave a link there: ln -s {shlex.quote(str(self.path))} {shlex.quote(str(begun))}",
        )

    def how_to_train_on(self) -> str:
        """How to train a finished run further: its plan and its schedule are over."""
        model = shlex.quote(f"model={self.model}")
        return f"to train further, start another run from its model: `afina train RECIPE --set {model}`"

    @property
    def newest_step(self) -> int:
        """The step of the newest committed checkpoint, which is not verified; 0: there is none."""
        committed = self.checkpoints.glob("step-*/manifest.json")
        steps = [match[1] for path in committed if (match := re.fullmatch(r"step-(\d+)", path.parent.name))]
        return max(map(int, steps), default=0)

    def how_to_resume(self) -> str:
        """The next attempt's action on a run that has not finished."""
        if step := self.newest_step:
            return f"`{self.continue_command}` continues from the newest checkpoint (step {step})"
        return f"`{self.continue_command}` begins at the first step: there is no checkpoint yet"

    @property
    def continue_command(self) -> str:
        """`afina submit` for a run of Slurm jobs, `afina resume` for one that was trained without them."""
        return f"afina {'submit' if job_ids_of(self.lines('submissions.jsonl'), self.attempt_names()) else 'resume'}"

    def check_progress(self) -> None:
        """A run never starts over by itself: refuse one that has made checkpoints and has none left.

        Raises:
            InputError: events, outcome or metrics record progress, and `checkpoints/` is empty.
        """
        if any(re.fullmatch(r"step-\d+", path.name) for path in self.checkpoints.glob("step-*")):
            return
        events = list(self.lines("events.jsonl"))
        saved = [int(e["step"]) for e in events if e.get("event") == "checkpoint" and "step" in e]
        outcome = self.outcome()
        if outcome is not None and outcome.outcome != "failed" and outcome.global_step:
            saved.append(outcome.global_step)
        if not any(e.get("event") == "training" for e in events):
            # Else an attempt may have been killed before its first save.
            saved += [int(line["step"]) for line in self.metrics() if "step" in line]
        if saved:
            raise InputError(
                f"{self.path}: has made {max(saved)} steps, and there is no checkpoint of them in {self.checkpoints}",
                "restore its checkpoints from a backup, or start over on purpose, in another run: "
                f"`afina rerun {shlex.quote(str(self.path))}`",
            )

    def worker_argv(self) -> list[str]:
        return read_words(self.path / "worker.argv")

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path / name}: cannot be read: {error}", "start a new run from the recipe"
            ) from None
        assert isinstance(value, dict)
        return value

    def outcome(self) -> Outcome | None:
        """The recorded outcome, or None while there is none."""
        try:
            return Outcome.model_validate_json(self.outcome_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def attempt_names(self) -> list[str]:
        """Names of all attempts, in the order in which they started."""
        if not self.attempts.is_dir():
            return []
        started = [str(e.get("attempt")) for e in self.lines("events.jsonl") if e.get("event") == "attempt_started"]
        order = {name: i for i, name in enumerate(dict.fromkeys(started))}
        names = sorted(p.name for p in self.attempts.iterdir() if p.is_dir())
        return sorted(names, key=lambda name: order.get(name, len(order)))

    def job_ids(self) -> tuple[str, ...]:
        """Slurm's jobs of the run, see `job_ids_of`."""
        return job_ids_of(list(self.lines("submissions.jsonl")), self.attempt_names())

    def begin_attempt(self, name: str | None = None) -> Path:
        """Make the folder of an attempt; without a name the next `local-<n>`.

        Raises:
            EnvironmentProblem: no space, no quota, no permission.
        """
        number = 1
        while True:
            folder = self.attempts / (name or f"local-{number}")
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                if name:
                    return Path(folder)
                number += 1
                continue
            except OSError as error:
                raise write_problem(folder, error) from None
            return Path(folder)

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one JSON line, in one write, with its time (seconds since the epoch)."""
        line = (json.dumps({"time": round(time.time(), 3), **record}, ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            # After a torn line, begin a new one: the record would be lost with it.
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def event(self, kind: str, **fields: Any) -> None:
        self.append("events.jsonl", {"event": kind, **fields})

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The records of a JSON Lines file; a torn last line is left out."""
        try:
            raw = (self.path / name).read_bytes()
        except FileNotFoundError:
            return
        for line in raw.splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def metrics(self) -> list[dict[str, Any]]:
        return list(self.lines("metrics.jsonl"))

    def record(self, outcome: Outcome) -> None:
        """Publish the outcome, and its exit code where a shell can read it."""
        write_atomic(self.outcome_file, outcome.model_dump_json(indent=2) + "\n")
        folder = self.attempts / outcome.attempt
        if folder.is_dir():
            write_atomic(folder / "exit", f"{outcome.exit_code}\n")

    def record_failure(self, attempt: str, failure: Failure, **fields: Any) -> Outcome:
        """Record that `attempt` failed, unless it recorded how it ended, or the run has finished."""
        known = self.outcome()
        if known is not None and (known.attempt == attempt or known.outcome == "finished"):
            return known
        outcome = Outcome(
            outcome="failed",
            exit_code=failure.exit_code,
            attempt=attempt,
            attempts=len(self.attempt_names()),
            failure=failure,
            **fields,
        )
        self.record(outcome)
        return outcome

    def report_failure(self, attempt: str, process: str, failure: Failure) -> None:
        """Leave the failure of one process in `attempts/<id>/failed.<process>.json`; the oldest becomes the outcome.

        Raises:
            EnvironmentProblem: no space, no quota, no permission.
        """
        record = {"exit_code": failure.exit_code, "error": str(failure), "cause": failure.cause}
        path = self.attempts / attempt / f"failed.{process}.json"
        write_atomic(path, json.dumps({**record, "failure": failure.to_dict()}))

    def reported_failures(self, attempt: str) -> list[Failure]:
        """Failures that processes reported, the oldest first; damaged files are left out."""
        paths = sorted((self.attempts / attempt).glob("failed.*.json"), key=lambda path: path.stat().st_mtime_ns)
        failures = []
        for path in paths:
            # Cut off: the disk was full, or the process was killed while it wrote.
            with contextlib.suppress(OSError, ValueError, TypeError):
                outcome = Outcome(outcome="failed", attempt=attempt, **json.loads(path.read_bytes()))
                failures += [outcome.failure] if outcome.failure else []
        return failures


def evaluations_of(logged: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float | None]]:
    """Each evaluation of a metrics log, and the mean training loss since the one before; where an older afina did not log that, the last loss."""
    loss: float | None = None
    for line in logged:
        loss = line.get("loss", loss)
        if "eval_loss" in line:
            yield line, line.get("training_loss", loss)


def job_ids_of(submissions: Iterable[Mapping[str, Any]], attempts: Sequence[str]) -> tuple[str, ...]:
    """Slurm's jobs of a run as they were submitted; of a run that was claimed inside its job, by the names of its attempts."""
    submitted = [str(s["job_id"]) for s in submissions if s.get("job_id")]
    if not submitted:
        named = (match[1] for name in attempts if (match := _ATTEMPT_OF_A_JOB.fullmatch(name)))
        submitted = sorted(named, key=lambda job: [int(number) for number in job.split("_")])
    return tuple(dict.fromkeys(submitted))


def task_of(job_id: str, task: int) -> str:
    """A task of an array: `18_3`, or `18_3;gpu` on another cluster."""
    number, semicolon, cluster = job_id.partition(";")
    return f"{number}_{task}{semicolon}{cluster}"
