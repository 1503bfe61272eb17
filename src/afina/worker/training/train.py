"""Train one run, in each of its processes: build, check, resume, train, export, record.

Reached as `python -m afina.worker train RUN_DIR`, once per process, through `afina.worker.node.launcher`. The same code runs on
CPUs (gloo) and on GPUs (NCCL). Not measured: several GPUs; one was (tests/gpu).
"""

from __future__ import annotations

import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from afina.errors import (
    EXIT_FINISHED,
    EXIT_STOPPED,
    AfinaError,
    EnvironmentProblem,
    InputError,
    TrainingError,
    is_out_of_memory,
)
from afina.files import sync_file
from afina.recipe.metrics import metric_name
from afina.run.allocation import Allocation
from afina.run.directory import RunDir
from afina.run.outcome import Outcome, data_warnings
from afina.run.plan import Geometry, Plan, geometry_for
from afina.run.prune import prune
from afina.statistics.decision_rule import described
from afina.text import plural
from afina.worker.data import stage_in
from afina.worker.disk_errors import disk_problem
from afina.worker.startup import NOT_NEEDED, gc_paused, hide_packages
from afina.worker.survival.lease import Lease
from afina.worker.survival.stop import StopRequest
from afina.worker.training.log import introduction, mark_lines, metrics_table, say, usage_lines

if TYPE_CHECKING:  # torch is imported after signals are caught and the lease is taken
    from afina.worker.training.attempt import Attempt
    from afina.worker.training.results.export_results import Results
    from afina.worker.training.trainer import RunTrainer

__all__ = ["explain_failure", "main"]


def main(argv: list[str]) -> int:
    """Train the run of `argv[0]`; returns the exit code, which `attempts/<id>/exit` holds too (accelerate hides it)."""
    run, allocation = RunDir(argv[0]), Allocation.from_env()
    rank = int(os.environ.get("RANK", "0"))
    mark_lines(rank)
    stop = StopRequest(run, allocation.deadline)
    lease = Lease(run, allocation.attempt)
    try:
        if rank == 0:
            lease.take()
        if finished := _finished(run):
            if rank == 0:  # a job that is requeued after its end
                say("nothing to do: this run has finished")
                run.record(finished.model_copy(update={"attempt": allocation.attempt}))
            code = EXIT_FINISHED
        else:
            code = _train(run, allocation, stop, lease)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            stage_in.remove(os.environ)
        if rank == 0:
            lease.release()
        return code
    except Exception as error:
        _fail(run, allocation.attempt, rank, error)


def _finished(run: RunDir) -> Outcome | None:
    """The outcome of a run that has finished, and whose model is there: its checkpoints may have been removed."""
    outcome = run.outcome()
    done = outcome is not None and outcome.outcome == "finished" and any(run.model.glob("*.safetensors"))
    return outcome if done else None


def _fail(run: RunDir, attempt: str, rank: int, error: Exception) -> NoReturn:
    """Print and record the failure of this rank, and exit without waiting for the others: they may hang in a collective.

    Every rank may fail; the supervisor makes the outcome from the first record. On a full disk nothing can be recorded: then
    only the exit code tells.
    """
    explained = explain_failure(error, run, attempt)
    if not isinstance(error, (AfinaError, OSError)):
        traceback.print_exc()
    print(f"error: rank {rank}: {explained}", file=sys.stderr, flush=True)
    try:
        run.report_failure(attempt, f"rank{rank}", explained.failure)
        if rank == 0 and explained.cause != "claimed":
            run.record_failure(attempt, explained.failure, seconds=_seconds(run, attempt))
    except (AfinaError, OSError) as another:
        print(f"error: rank {rank}: this cannot be recorded: {another}", file=sys.stderr, flush=True)
    finally:
        os._exit(explained.exit_code)


#: Errors of a program or its input: another attempt meets them again.
_OF_CODE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)
#: Words of errors between processes and devices, which may not come again.
_PASSING = ("nccl", "gloo", "connection", "socket", "timed out", "timeout", "cuda error", "ecc")


def explain_failure(error: Exception, run: RunDir, attempt: str) -> AfinaError:
    """The error of an attempt with a remedy, which names the next attempt only where it helps.

    of this tree          as it is
    the disk              once there is room: resume
    a missing file        once it is back: resume
    memory                another run with smaller passes
    of code, or before    another run, with another recipe: cause `code`
      the first step
    anything else         resume: from the newest checkpoint, or from the first step where there is none
    """
    if isinstance(error, AfinaError):
        return error
    if problem := disk_problem(error, run.path, f"`{run.continue_command}`"):
        return problem
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return EnvironmentProblem(message, f"was it removed or purged? put it back; then {run.how_to_resume()}")
    if is_out_of_memory(error):
        remedy = (
            "start another run with a lower train.max_batch_per_device; the global batch and the result stay the same"
        )
        return TrainingError(message, remedy, cause="memory")
    stepped = any(e.get("event") == "first_step" and e.get("attempt") == attempt for e in run.lines("events.jsonl"))
    passing = isinstance(error, OSError) or any(word in message.lower() for word in _PASSING)
    if isinstance(error, _OF_CODE) or not (stepped or passing):
        remedy = "it would come again: correct the recipe (`train.arguments`, `model`) by the lines above, and start another run"
        return TrainingError(message, remedy, cause="code")
    return TrainingError(message, f"see the lines above; {run.how_to_resume()}", cause=type(error).__name__)


def _train(run: RunDir, allocation: Allocation, stop: StopRequest, lease: Lease) -> int:
    with hide_packages(*NOT_NEEDED):
        from afina.worker.compute import ranks
        from afina.worker.training.evaluation import EvaluationAbandoned, StoppedEarly
        from afina.worker.training.results.export_results import Results, export_results
        from afina.worker.training.results.simple_models_beside import simple_models

    trainer, resume = _build(run, allocation, stop, lease)
    attempt = trainer.attempt
    _preflight(trainer, resume)
    try:
        if resume and (_step_of(resume) >= attempt.schedule.total_steps or _stopped_early(resume)):
            trainer.restore(resume)
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except StoppedEarly:
        trainer.is_in_train = False
    except EvaluationAbandoned as abandoned:  # a pending evaluation of an earlier attempt: nothing has changed since
        stop.agreed = abandoned.cause
    attempt.meter.enter("saving")
    attempt.saver.finish()
    # Again: other load at the start makes it too low (one run in fourteen, by half).
    attempt.meter.measure_peak(attempt.device, trainer.matmul_dtype)

    results = Results(0, {}, []) if stop.agreed else export_results(trainer)
    attempt.meter.measure_memory(attempt.device)
    if attempt.rank == 0:
        with attempt.meter.within("simple_models"):
            results = results if stop.agreed else simple_models(attempt, results)
    ranks.barrier()  # launchers may end the processes that are left when the first have ended
    if attempt.rank == 0:
        _record(trainer, results)
    ranks.leave()
    return EXIT_STOPPED if stop.agreed else EXIT_FINISHED


def _build(run: RunDir, allocation: Allocation, stop: StopRequest, lease: Lease) -> tuple[RunTrainer, Path | None]:
    """The trainer of this attempt, and the checkpoint that it resumes from."""
    from afina.worker.training.attempt import open_data
    from afina.worker.training.build import build_attempt
    from afina.worker.training.tracking import track
    from afina.worker.training.trainer import RunTrainer

    plan = run.plan()
    verify = os.environ.get("RANK", "0") == "0"
    data = open_data(plan, stage_in.staged(run.prepared(), os.environ), verify=verify)
    attempt, model, arguments = build_attempt(run, allocation, _geometry(plan), data, stop, lease)
    resume = _newest_checkpoint(attempt)
    callbacks = track(run, plan, _step_of(resume)) if attempt.rank == 0 else []
    with gc_paused():
        return RunTrainer(attempt, model, arguments, callbacks), resume


def _newest_checkpoint(attempt: Attempt) -> Path | None:
    """The checkpoint to resume from, on every rank.

    Raises:
        InputError: it was made by another plan, or all checkpoints are gone.
        EnvironmentProblem: none is usable.
    """
    from afina.worker.compute import ranks
    from afina.worker.survival import checkpoint as checkpoints

    resume: Path | None = None
    if attempt.rank == 0:
        attempt.run.check_progress()
        resume, notes = checkpoints.newest(attempt.run.checkpoints)
        for note in notes:
            attempt.event("checkpoint_damaged", note=note)
        say(*notes)
    resume = ranks.from_rank_zero(resume)
    made, digest = checkpoints.manifest(resume)["plan"] if resume else None, attempt.plan.digest
    if made not in (None, digest):
        raise InputError(
            f"{resume}: was made by another plan ({made[:8]}; this run is {digest[:8]})",
            "checkpoints belong to the run that made them: move this folder away",
        )
    return resume


def _step_of(resume: Path | None) -> int:
    from afina.worker.survival import checkpoint as checkpoints

    return int(checkpoints.manifest(resume)["step"]) if resume else 0


def _stopped_early(resume: Path) -> bool:
    from afina.worker.survival.snapshot import read_progress

    progress = read_progress(resume)
    return bool(progress.get("early_stopping", {}).get("stopped") or progress.get("pruned"))


def _preflight(trainer: RunTrainer, resume: Path | None) -> None:
    """Check processes, machine and disk before the first step, and print what is trained. Collective."""
    from afina.worker.compute import precision
    from afina.worker.survival import preflight

    attempt, run = trainer.attempt, trainer.attempt.run
    attempt.watchdog.start()
    if attempt.rank == 0:
        attempt.lease.expect(lambda: attempt.watchdog.limit_s)
    checks = preflight.check_ranks(attempt.device, attempt.geometry.processes_per_node)
    attempt.meter.measure_peak(attempt.device, trainer.matmul_dtype)
    attention = getattr(trainer.model.config, "_attn_implementation", None) or "the model's own"
    say(*precision.announce(run, attempt.name, attempt.precision, attention))
    if attempt.rank:
        return
    checks |= preflight.check_room(run, attempt.sizes, attempt.plan.recipe.train)
    attempt.event("preflight", batching=attempt.batching, **checks)
    say(*(f"WARNING: {warning}" for warning in checks["warnings"]))
    rows = {part: len(split) for part, split in attempt.data.splits.items()}
    say(*introduction(attempt.plan, attempt.geometry, attempt.data.task, rows, attempt.device.type))
    if resume:
        say(f"resuming from {resume.name}")
    if attempt.allocation.launched_by is None:
        # A launcher removes the stop file before it starts an attempt; a later request counts.
        run.stop_file.unlink(missing_ok=True)


def _geometry(plan: Plan) -> Geometry:
    """The plan's geometry, or that of the processes that really run."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world == plan.geometry.num_processes:
        return plan.geometry
    return geometry_for(plan.recipe, local, nodes=world // local)


def _seconds(run: RunDir, attempt: str) -> float:
    """Wall seconds of all attempts up to now, each from its start to its last event."""
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    for event in run.lines("events.jsonl"):
        name = event.get("attempt")
        if name:
            started.setdefault(name, event["time"])
            ended[name] = event["time"]
    if attempt in started:
        ended[attempt] = time.time()
    return round(sum(ended[name] - started[name] for name in started), 3)


def _record(trainer: RunTrainer, results: Results) -> None:
    """Write the outcome, and print how the attempt ended."""
    attempt, state, meter = trainer.attempt, trainer.state, trainer.attempt.meter
    run, cause, step = attempt.run, attempt.stop.agreed, trainer.state.global_step
    spoiled = (line for lines in data_warnings(run.prepared()).values() for line in lines)
    warnings = list(dict.fromkeys([*results.warnings, *spoiled]))
    outcome = Outcome(
        outcome="stopped" if cause else "finished",
        exit_code=EXIT_STOPPED if cause else EXIT_FINISHED,
        attempt=attempt.name,
        global_step=step,
        metrics=results.metrics,
        cause=cause or None,
        warnings=warnings,
        samples_per_second=round(meter.examples / meter.training_s, 3) if meter.training_s else None,
        utilisation=meter.summary(step),
        seconds=_seconds(run, attempt.name),
        attempts=len(run.attempt_names()),
        max_steps=state.max_steps,
        early_stop=attempt.ended_early,
        pruned=attempt.median_stop is not None and attempt.median_stop.reason is not None,
        task=attempt.data.task,
        labels=attempt.data.labels,
        baselines=results.baselines,
        decisions=results.decisions,
        best_step=state.best_global_step,
        model_step=results.model_step,
        world_size=attempt.geometry.num_processes,
        global_batch=attempt.geometry.global_batch,
        device=attempt.device.type,
        parameters=attempt.parameters[1],
        trained_parameters=attempt.parameters[0],
    )
    if run.metrics_file.exists():
        sync_file(run.metrics_file)
    run.record(outcome)
    if cause:
        say(
            f"stopped at step {step} of {state.max_steps} ({cause}); a checkpoint is committed",
            f"continue with: {run.continue_command} {shlex.quote(str(run.path))}",
        )
        return
    attempt.event("finished", step=step)
    prune(run, attempt.plan.recipe.train.keep_after)
    print(metrics_table(run, [metric_name(text) for text in attempt.data.metric_texts]), flush=True)
    say(*(f"WARNING: {warning}" for warning in warnings))
    say(
        *described(outcome.decisions),
        *(f"decisions: {note}" for note in outcome.decisions.get("notes", [])),
        *usage_lines(outcome),
        f"finished: {plural(step, 'step')}{outcome.ended_early}, model in {run.model}",
    )
