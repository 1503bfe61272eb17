"""Prediction with a finished run: on this machine, in the site's container or without one; as a Slurm job or a job array.

This module composes the request (`afina.prediction.request`) and starts the workers (`afina.worker.predicting.stages`). Everything may
be killed and repeated: the same call continues with the missing chunks.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from afina.api import visible_gpus
from afina.errors import AfinaError, DataError, InputError, SiteError, check_argument
from afina.files import encode_words, write_atomic
from afina.formats.read_options import ReadOptions
from afina.prediction.ensemble import members_of
from afina.prediction.request import (
    OUTPUTS,
    STDIN,
    Prediction,
    PredictOptions,
    PredictRequest,
    find_inputs,
    find_model,
    folder_of,
    plan_of,
    reading_for,
    result_name,
)
from afina.recipe.local_model import adapter_base
from afina.run.commands import array_argv, host_environment, job_scripts, predict_argv, worker_argv
from afina.run.directory import RunDir, task_of
from afina.run.job_request import JobRequest, accepts
from afina.run.plan import Plan, check_cores
from afina.run.workers import ask_worker, ask_workers
from afina.site.image import check_image
from afina.site.settings import Site, find_site_file, load_site
from afina.slurm.client import AMBIGUOUS, need_slurm, of_cluster
from afina.slurm.query import query
from afina.slurm.submit import forget, recover, submitted
from afina.text import can_draw, plural
from afina.watch.find import resolve_folder

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Model = TypeVar("_Model", bound=BaseModel)

__all__ = ["compose", "predict", "predict_here", "site_for", "submission", "submit_prediction", "worker_env"]


def compose(
    run: str | os.PathLike[str],
    inputs: Sequence[str | Path],
    out: str | Path | None = None,
    request: PredictRequest = PredictRequest(),
) -> Prediction:
    """The prediction as a value. Reads the disk and changes nothing.

    Raises:
        InputError, DataError: no such run, model, input; an output that cannot be written.
    """
    check_argument("out", out, (str, Path), "a path")
    ensemble = members_of(resolve_folder(run))
    directory, model = find_model(ensemble[0].path if ensemble else resolve_folder(run))
    files = find_inputs(inputs)
    target = result_name(files) if out is None else Path(out).expanduser().absolute()
    # The output of an earlier call may lie among the files of a folder: it is not an input.
    kept = tuple(path for path in files if path != target)
    _check_out(target, files, [Path(name).absolute() for name in inputs])
    if not kept:
        raise DataError(f"{', '.join(map(str, inputs))}: no data file but the output itself", "name another output: -o")
    job = request.job
    plan = plan_of(directory, model, kept, site_for(directory, job.site), gpus=job.gpus_per_node, time_min=job.time_min)
    texts = [Path("-.txt") if path == STDIN else path for path in kept]
    reading = reading_for(directory, texts, _validated(ReadOptions, request.reading, "reading"))
    if reading is not None and reading != request.reading:
        _say(f"reading as in training: {', '.join(f'{key} {value!r}' for key, value in reading.given().items())}")
    fixed = {
        "plan": plan, "trained": directory is not None, "model": model, "members": ensemble[1] if ensemble else (), "inputs": kept, "out": target, "reading": reading
    }  # fmt: skip
    return _validated(Prediction, {**fixed, **request.options()})


def _validated(kind: type[_Model], values: object, above: str = "") -> _Model:
    """The model of these values; a key that is wrong is named, below the argument `above`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(filter(None, [above, *map(str, first["loc"])]))
        raise InputError(f"{name}: {first['msg']}, found {first['input']!r}", "correct the argument") from None


@accepts(PredictOptions, PredictRequest, JobRequest)
def predict(
    run: str | os.PathLike[str],
    inputs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    stdin: IO[bytes] | None = None,
    **options: Unpack[PredictOptions],
) -> dict[str, Any]:
    """Predict on files, on this machine; returns a summary. The same call again continues one that was killed.

    Args:
        run: a run directory, a model folder, or an ensemble.
        inputs: CSV, TSV, JSON, Parquet, Arrow files, folders, patterns; `-` is `stdin`, a text a line.
        out: `.parquet`, `.csv`, `.tsv` or `.jsonl`; by default `<input>.predictions.parquet` in the working directory.
        options: of `PredictRequest`, and of `JobRequest`: site, and num_processes (by default one per GPU, or one).

    Returns: out, rows, seconds, rows_per_s, chunks, `predictions` (how often each label), blank and truncated texts; `decisions`: the temperature and
        the thresholds that were used, if there are any.

    Raises:
        AfinaError: as the command.
    """
    of_request: dict[str, Any] = dict(options)
    job = JobRequest(**{name: of_request.pop(name) for name in ("site", "num_processes") if name in of_request})
    named = [inputs] if isinstance(inputs, str | Path) else inputs
    check_argument("inputs", named or None, (list, tuple), "a path, or a list of paths", of=(str, Path), required=True)
    return predict_here(compose(run, named, out, PredictRequest(**of_request, job=job)), job.num_processes, stdin=stdin)


def predict_here(
    job: Prediction, num_processes: int | None = None, *, stdin: IO[bytes] | None = None
) -> dict[str, Any]:
    """`predict` for a composed prediction."""
    processes = num_processes if num_processes is not None else max(1, visible_gpus())
    check_cores(processes)
    began = time.monotonic()
    about = _begin(job, stdin)
    if about["state"] == "whole":
        summary = _flat(about["summary"])
        return {**_of_plan_stage(about), **summary, "seconds": 0.0, "rows_done_before": about["rows"]}
    _check_queue(Path(about["parts"]))
    summary, predicting = _run_workers(job, about, min(processes, max(1, about["chunks"] - about["done"])))
    seconds = time.monotonic() - began
    fresh = about["rows"] - about["rows_done"]
    return {
        **_of_plan_stage(about),
        **_flat(summary),
        "chunks": about["chunks"],
        "rows_done_before": about["rows_done"],
        "seconds": round(seconds, 3),
        "seconds_predicting": predicting,  # without examining the inputs, loading and merging
        "rows_per_s": round(fresh / seconds, 1),
    }


def _run_workers(job: Prediction, about: dict[str, Any], processes: int) -> tuple[dict[str, Any], float]:
    """Predict the missing chunks and merge them; the summary, and the longest seconds of a worker."""
    parts, binds, env = about["parts"], _binds(job), worker_env(job.plan)
    if processes > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    common = ("run", parts, "--merge", "--progress", "json")
    argvs = [
        worker_argv(job.plan, "predict", *common, "--share", f"{k}/{processes}", binds=binds) for k in range(processes)
    ]
    answers: list[dict[str, Any]] = []
    if about["done"] < about["chunks"]:
        with _RowsBar(about["rows"], about["rows_done"]) as bar:
            answers = ask_workers(argvs, [env] * processes, name="the prediction", on_progress=bar.update)
    summary = next((answer["summary"] for answer in answers if answer["merged"]), None)
    if summary is None:
        argv = worker_argv(job.plan, "predict", "merge", parts, binds=binds)
        summary = ask_worker(argv, env, name="merging the prediction")
    return summary, max((answer["seconds_predicting"] for answer in answers), default=0.0)


def submit_prediction(job: Prediction, *, array: int = 1, stdin: IO[bytes] | None = None) -> dict[str, Any]:
    """Examine the inputs here and submit the missing chunks to Slurm, as a job or as an array of `array` tasks.

    Raises:
        AfinaError: requests that would fail in the queue are refused here.
    """
    need_slurm()
    about = _begin(job, stdin)
    if about["state"] == "whole" or about["done"] == about["chunks"]:
        raise InputError(f"{job.out}: nothing is left to predict", "the same command without --submit merges the parts")
    parts = Path(about["parts"])
    _check_queue(parts)
    tasks = min(array, about["chunks"] - about["done"])
    scripts = job_scripts(("predict.sbatch", "job.sh", "node.sh"))
    try:
        for name, script in scripts.items():
            write_atomic(parts / name, script.read_bytes())
        words = predict_argv(job.plan, parts, _binds(job))
        write_atomic(parts / "worker.argv", encode_words(words))
        argv = submission(job, tasks)
        with submitted(job.plan, argv, {parts: {"tasks": tasks}}) as job_id:
            RunDir(parts).append("submissions.jsonl", {"job_id": job_id, "tasks": tasks, "argv": argv})
    except AfinaError as error:
        if about["state"] == "begun" and error.cause != AMBIGUOUS:  # a moment ago, for this submission
            shutil.rmtree(parts)
        raise
    return {"job_id": job_id, "tasks": tasks, **about}


def submission(job: Prediction, tasks: int) -> list[str]:
    """The command that submits a prediction as a job, or as an array of `tasks`."""
    parts = folder_of(job.out)
    return array_argv(job.plan, parts / "predict.sbatch", [str(parts), str(tasks)], tasks, job.out)


def worker_env(plan: Plan) -> dict[str, str]:
    """The environment of a worker on this host: no network, and tokenizers on all cores."""
    return {**host_environment(plan, offline=True), "TOKENIZERS_PARALLELISM": "true"}


def _begin(job: Prediction, stdin: IO[bytes] | None) -> dict[str, Any]:
    """The plan stage: checks everything and makes the folder of parts, or finds it."""
    check_image(job.plan.site)
    what = str(job.inputs[0]) if len(job.inputs) == 1 else f"{len(job.inputs):,} files"
    _say(f"examining {'standard input' if STDIN in job.inputs else what}")
    with _spooled(job, stdin) as ready:
        argv = worker_argv(ready.plan, "predict", "plan", binds=_binds(ready))
        return ask_worker(argv, worker_env(ready.plan), ready.model_dump(mode="json"), name="the prediction")


@contextlib.contextmanager
def _spooled(job: Prediction, stdin: IO[bytes] | None) -> Iterator[Prediction]:
    """Standard input as a temporary file beside the output: it can be read only once, and is read twice."""
    if STDIN not in job.inputs:
        yield job
        return
    with tempfile.NamedTemporaryFile(dir=job.out.parent, prefix=f".{job.out.name}.", suffix=".txt") as spool:
        shutil.copyfileobj(stdin or sys.stdin.buffer, spool, 1 << 20)
        spool.flush()
        if not spool.tell():
            raise DataError(
                "standard input is empty",
                "give a text a line, for example: printf 'good\\nbad\\n' | afina predict RUN -",
            )
        yield job.model_copy(update={"spool": Path(spool.name)})


def site_for(directory: RunDir | None, given: str | Path | None) -> Site:
    """The given site, else the run's own, else this machine's; without any, no container is used."""
    if given is not None:
        return load_site(given)
    if directory is not None:
        site = directory.plan().site
        fetched = site.pulled is not None and site.scratch.is_dir()  # it is pulled again where it was purged
        if site.runtime != "none" and site.image is not None and not (site.image.exists() or fetched):
            raise SiteError(
                f"{site.image}: the image of this run is not on this machine",
                "name the site of this machine: --site FILE",
            )
        return site
    if os.environ.get("AFINA_SCRATCH") or find_site_file():
        return load_site()
    return Site(scratch=Path(tempfile.gettempdir()))


def _check_out(out: Path, files: Sequence[Path], named: Sequence[Path]) -> None:
    if out.suffix.lower() not in OUTPUTS:
        raise InputError(
            f"-o {out}: format {out.suffix or '(no suffix)'} is not known",
            f"end its name with one of: {', '.join(OUTPUTS)}",
        )
    if out.is_dir():
        raise InputError(f"-o {out}: is a folder", f"name a file in it: {out / 'predictions.parquet'}")
    if out in named or (len(files) == 1 and files[0] == out):
        raise InputError(f"-o {out}: is an input", "name another output; nothing that exists is overwritten")
    if not out.parent.is_dir():
        raise InputError(f"-o {out}: there is no folder {out.parent}", shlex.join(["mkdir", "-p", str(out.parent)]))
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"-o {out}: you may not write into {out.parent}", "choose a folder of your own")


def _binds(job: Prediction) -> list[Path]:
    bases = [adapter_base(member.model) for member in job.members]
    return [
        job.out.parent,
        *(m.model for m in job.members),
        *(Path(base[0]) for base in bases if base and Path(base[0]).is_dir()),
    ]


def _check_queue(parts: Path) -> None:
    """Refuse a prediction that a job in the queue is working on."""
    if (recovered := recover(parts)) is not None:
        RunDir(parts).append("submissions.jsonl", {"job_id": recovered[0], "tasks": 1, **recovered[1]})
        forget(parts)
    for submission in RunDir(parts).lines("submissions.jsonl"):
        job_id, tasks = str(submission["job_id"]), int(submission["tasks"])
        ids = [job_id] if tasks == 1 else [task_of(job_id, task) for task in range(tasks)]
        jobs = query(ids, account=()).values()
        number = " ".join([*of_cluster(job_id)[1], of_cluster(job_id)[0]])
        if any(job.state in ("PENDING", "RUNNING") for job in jobs):
            raise InputError(
                f"{parts}: job {of_cluster(job_id)[0]} is still working on this",
                f"wait for it (`squeue --me`), or cancel it (`scancel {number}`) and run the same command again",
            )


def _of_plan_stage(about: dict[str, Any]) -> dict[str, Any]:
    """The summary's part of the plan stage's answer."""
    return {name: about[name] for name in ("out", "state", "decisions")}


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "blank_rows"}


class _RowsBar:
    """A bar on a terminal, else a line a minute. Counts the rows of all processes together."""

    def __init__(self, rows: int, before: int) -> None:
        self.rows, self.before = rows, before
        self._done: dict[int, int] = {}
        self._lock = threading.Lock()
        self._began: float | None = None
        self._first = 0
        self._printed = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _RowsBar:
        if self.before:
            _say(f"resuming: {self.before:,} of {self.rows:,} rows are done")
        if not can_draw(sys.stderr):
            _say(f"loading the model, to predict {plural(self.rows - self.before, 'row')}")
            return self
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.add_task("loading the model", total=self.rows, completed=self.before, rate="")
        self._bar.start()
        return self

    def update(self, number: int, progress: dict[str, Any]) -> None:
        """The rows that worker `number` has done; called from several threads."""
        now = time.monotonic()
        with self._lock:
            self._done[number] = int(progress.get("rows", 0))
            done = sum(self._done.values())
            if self._began is None:
                self._began, self._first = now, done
            rate = (done - self._first) / (now - self._began) if now > self._began else 0.0
            completed = self.before + done
            if self._bar is not None:
                shown = f"{rate:,.0f} rows/s" if rate else ""
                self._bar.update(self._bar.task_ids[0], description="predicting", completed=completed, rate=shown)
            elif now - self._printed >= 60.0 and rate:
                self._printed = now
                left = (self.rows - completed) / rate / 60
                share = f"{completed:,} of {self.rows:,} rows ({completed / self.rows:.0%})"
                _say(f"{share}, {rate:,.0f} rows/s, {left:.0f} min left")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _say(line: str) -> None:
    print(f"afina: {line}", file=sys.stderr, flush=True)
