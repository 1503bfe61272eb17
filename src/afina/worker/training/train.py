"""One run on every rank, from top to bottom: build, resume, train, evaluate, save, record.

Reached as `python -m afina.worker train RUN_DIR`, once per process, by `afina.worker.node.launch`. Training itself is
`transformers.Trainer`; this module gives it the batches, the checkpoints, the moment to stop, and writes down what came
out. Runs on CPU (gloo) and on GPUs (NCCL) through the same code; it was tried on one GPU (tests/gpu), never on several.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from afina.errors import EXIT_FINISHED, EXIT_STOPPED, AfinaError, EnvironmentProblem, InputError, TrainingError
from afina.recipe.metrics import METRICS, default_metrics, selection_metric
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.run.plan import Geometry, Plan, geometry_for
from afina.worker.data import stage_in
from afina.worker.startup import uncollected, without
from afina.worker.survival.lease import Lease
from afina.worker.survival.stop import StopRequest
from afina.worker.training.log import introduce, say, table, utilisation
from afina.worker.training.log_marks import mark_lines

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Train the run of `argv[0]`; the exit code is also in `attempts/<id>/exit` (accelerate hides it)."""
    run = RunDir(argv[0])
    attempt = os.environ.get("AFINA_ATTEMPT") or "local-1"
    rank = int(os.environ.get("RANK", "0"))
    mark_lines(rank)
    stop = StopRequest(run)
    lease = Lease(run, attempt)
    try:
        if rank == 0:
            lease.take()
        code = _train(run, attempt, rank, stop, lease)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            stage_in.remove(os.environ)
        if rank == 0:
            lease.release()
        return code
    except Exception as error:
        _fail(run, attempt, rank, error)


def _fail(run: RunDir, attempt: str, rank: int, error: Exception) -> NoReturn:
    """Say and record how this rank failed, and leave without waiting for the others: they may hang in a collective.

    Every rank may fail, and the first to write says why; the supervisor makes the outcome of it. On a full disk nothing can
    be recorded: then the exit code alone says it.
    """
    known = _explained(error)
    if not isinstance(error, (AfinaError, OSError)):
        traceback.print_exc()
    print(f"error: rank {rank}: {known}", file=sys.stderr, flush=True)
    try:
        run.report_failure(attempt, f"rank{rank}", known.failure)
        if rank == 0 and known.cause != "claimed":
            run.record_failure(attempt, known.failure, seconds=_seconds(run, attempt))
    except (AfinaError, OSError) as another:
        print(f"error: rank {rank}: this could not be recorded: {another}", file=sys.stderr, flush=True)
    finally:
        os._exit(known.exit_code)


def _explained(error: Exception) -> AfinaError:
    """The error as a user meets it; what afina did not foresee keeps its name."""
    if isinstance(error, AfinaError):
        return error
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        remedy = "free space or quota on the run directory's file system, then `afina resume`"
        return EnvironmentProblem(said, remedy, cause="disk")
    if isinstance(error, MemoryError) or "out of memory" in said.lower():
        remedy = "set train.max_batch_per_device lower; the global batch and the result stay the same"
        return TrainingError(said, remedy, cause="memory")
    remedy = "see the lines above; the newest checkpoint is kept: `afina resume` continues from it"
    return TrainingError(said, remedy, cause=type(error).__name__)


def _train(run: RunDir, attempt: str, rank: int, stop: StopRequest, lease: Lease) -> int:
    plan, prepared = run.plan(), stage_in.staged(run.prepared(), os.environ)
    geometry = _geometry(plan)

    with without("datasets", "scipy"):
        import torch
        import transformers

        from afina.worker.compute import precision
        from afina.worker.data import prepared as store
        from afina.worker.model.pretrained import verify_model
        from afina.worker.survival import checkpoint as checkpoints
        from afina.worker.survival import preflight
        from afina.worker.training import results
        from afina.worker.training.build import build_arguments, build_model
        from afina.worker.training.evaluation import EvaluationAbandoned
        from afina.worker.training.tracking import track
        from afina.worker.training.trainer import RunTrainer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(prepared["prepared"])
    manifest = store.load_manifest(folder)
    if rank == 0:
        store.verify(folder)
        verify_model(prepared)
    task, labels = manifest["task"], manifest["labels"]
    metric_names = _metric_names(plan, task)
    best = selection_metric(task, plan.recipe.train.best_metric)
    if best not in metric_names:
        metric_names = [*metric_names, best]
    splits = {part: store.open_split(folder, part) for part in manifest["splits"]}

    choice = precision.choose_for_run(run, plan.recipe.train)
    arguments = build_arguments(plan, geometry, run, best, task, choice)
    resume, notes = checkpoints.newest(run.checkpoints) if rank == 0 else (None, [])
    resume = _from_rank_zero(resume)
    transformers.set_seed(plan.recipe.train.seed)
    with uncollected():
        model = build_model(plan, prepared["model_folder"], task, labels, manifest["num_labels"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    gc.freeze()  # what has been imported stays: no later look at it either
    trainer = RunTrainer(
        run=run,
        attempt=attempt,
        plan=plan,
        geometry=geometry,
        task=task,
        labels=labels,
        metric_names=metric_names,
        pad_token_id=manifest["pad_token_id"],
        splits=splits,
        choice=choice,
        stop=stop,
        lease=lease,
        model=model,
        args=arguments,
        processing_class=tokenizer,
        callbacks=track(run, plan, checkpoints.manifest(resume)["step"] if resume else 0) if rank == 0 else [],
    )
    trainer.watchdog.start()
    if rank == 0:
        lease.expect(lambda: trainer.watchdog.limit_s)
    found = preflight.check_ranks(trainer.args.device, geometry.processes_per_node)
    trainer.find_peak()
    attention = getattr(trainer.model.config, "_attn_implementation", None) or "the model's own"
    say(*precision.announce(run, attempt, choice, attention))
    if rank == 0:
        found |= preflight.check_room(run, trainer.state_bytes, plan.recipe.train.keep_checkpoints)
        run.event("preflight", attempt=attempt, **found)
        for note in notes:
            run.event("checkpoint_damaged", attempt=attempt, note=note)
        say(*notes, *(f"WARNING: {warning}" for warning in found["warnings"]))
        introduce(plan, geometry, manifest, trainer.args.device, resume)
        if "AFINA_LAUNCH" not in os.environ:
            # Whoever launches an attempt clears the way first; a stop that was asked for since then is meant.
            run.stop_file.unlink(missing_ok=True)

    if resume:
        _check_origin(plan, checkpoints.manifest(resume), resume)
    try:
        if resume and checkpoints.manifest(resume)["step"] >= trainer.schedule.total_steps:
            trainer.restore(resume)
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except EvaluationAbandoned as abandoned:  # one that an earlier attempt left over: nothing has changed since
        trainer.stopped = abandoned.cause
    trainer.meter.enter("saving")
    trainer.saver.finish()
    # Again: whatever else used the cores at the start made it too low (one run in fourteen, by half).
    trainer.find_peak()

    step = trainer.state.global_step
    if trainer.stopped:
        trainer.agree_on_memory()
        if rank == 0:
            run.record(_outcome(run, attempt, trainer, "stopped", EXIT_STOPPED, {}))
            say(
                f"stopped at step {step} of {trainer.state.max_steps} ({trainer.stopped}); a checkpoint is committed",
                f"continue with: afina resume '{run.path}'",
            )
        _leave(torch)
        return EXIT_STOPPED

    metrics = results.conclude(trainer)
    trainer.agree_on_memory()
    if rank == 0:
        outcome = _outcome(run, attempt, trainer, "finished", EXIT_FINISHED, metrics)
        run.record(outcome)
        run.event("finished", attempt=attempt, step=step)
        print(table(run, metric_names), flush=True)
        say(*utilisation(outcome), f"finished: {step} steps, model in {run.model}")
    _leave(torch)
    return EXIT_FINISHED


def _check_origin(plan: Plan, made: dict[str, Any], checkpoint: Path) -> None:
    if made["plan"] != plan.digest:
        raise InputError(
            f"{checkpoint}: was made by another plan ({made['plan'][:8]}; this run is {plan.digest[:8]})",
            "checkpoints belong to the run that made them: move this folder away",
        )


def _geometry(plan: Plan) -> Geometry:
    """The plan's geometry, or that of the processes that are really here."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world == plan.geometry.num_processes:
        return plan.geometry
    return geometry_for(plan.recipe, local, nodes=world // local)


def _from_rank_zero(value: Any) -> Any:
    """Rank 0's value on every rank; the process group is there once TrainingArguments has been built."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _metric_names(plan: Plan, task: str) -> list[str]:
    names = list(default_metrics(task, plan.recipe.metrics))
    for name in [*names, *([plan.recipe.train.best_metric] if plan.recipe.train.best_metric else [])]:
        if name not in METRICS[task]:
            raise TrainingError(
                f"metric `{name}` does not fit the task {task}", f"choose from: {', '.join(METRICS[task])}"
            )
    return names


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


def _outcome(run: RunDir, attempt: str, trainer: Any, kind: Any, code: int, metrics: dict[str, Any]) -> Outcome:
    meter = trainer.meter
    return Outcome(
        outcome=kind,
        exit_code=code,
        attempt=attempt,
        global_step=trainer.state.global_step,
        metrics=metrics,
        cause=trainer.stopped or None,
        samples_per_second=round(meter.examples / meter.training_s, 3) if meter.training_s else None,
        utilisation=meter.summary(trainer.state.global_step),
        seconds=_seconds(run, attempt),
        attempts=len(run.attempt_names()),
        max_steps=trainer.state.max_steps,
        task=trainer.task,
        labels=trainer.labels,
        best_step=trainer.state.best_global_step,
        model_step=trainer.model_step,
        world_size=trainer.geometry.num_processes,
        global_batch=trainer.geometry.global_batch,
        device=trainer.args.device.type,
    )


def _leave(torch: Any) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
