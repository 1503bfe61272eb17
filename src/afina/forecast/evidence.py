"""Evidence for a forecast: a rehearsal, and earlier runs like it.

`rehearse` runs a few training steps, a save and an evaluation in the image without network, in a temporary run directory. It
measures the machine it runs on: a login node tells nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, EnvironmentProblem
from afina.forecast.measurements import Earlier, Measured, Workload
from afina.run.commands import host_environment, worker_argv
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.outcome import Outcome
from afina.run.plan import Plan, geometry_for
from afina.run.workers import ask_worker
from afina.sizes import Sizes

__all__ = ["earlier_runs", "rehearse", "workload_of"]

#: How long steps are timed; the fewest and the most steps.
_SECONDS = 10.0
_LEAST_STEPS = 2
_MOST_STEPS = 60
#: How many of the newest run directories are compared.
_MOST_RUNS = 300
#: Of a run that does not record how long its start took.
_STARTUP_S = 20.0


def rehearse(plan: Plan, prepared: Mapping[str, Any], *, seconds: float = _SECONDS) -> Measured:
    """Run a few steps, timed for about `seconds`, a save and an evaluation in a temporary folder on scratch.

    Raises:
        AfinaError: what would have failed in the job.
        EnvironmentProblem: scratch cannot hold the temporary run.
    """
    share = plan.geometry.batch_per_device * plan.geometry.accumulation
    train = plan.recipe.train.model_copy(update={"batch_size": share, "epochs": None, "max_steps": _MOST_STEPS})
    recipe = plan.recipe.model_copy(update={"train": train, "trackers": ()})
    small = plan.model_copy(update={"recipe": recipe, "geometry": geometry_for(recipe, 1, nodes=1)})
    try:
        folder = Path(tempfile.mkdtemp(prefix=".rehearsal-", dir=plan.site.scratch))
    except OSError as error:
        raise EnvironmentProblem(
            f"{plan.site.scratch}: {error.strerror}", "check AFINA_SCRATCH, its permissions and quota"
        ) from None
    try:
        run = claim(small, prepared, ["true"], json.dumps(recipe.model_dump(mode="json")), folder / "run")
        threads = min(len(os.sched_getaffinity(0)), plan.geometry.cpus_per_process)
        env = host_environment(plan, offline=True)
        env["OMP_NUM_THREADS"] = env.get("OMP_NUM_THREADS") or str(threads)
        if plan.geometry.gpus_per_node:
            # Plain Python that sees several GPUs would use nn.DataParallel.
            env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        question = {"geometry": plan.geometry.model_dump(), "steps": _LEAST_STEPS, "seconds": seconds}
        answer = ask_worker(worker_argv(plan, "rehearse", str(run.path)), env, question, name="the rehearsal")
        return Measured.model_validate(answer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def workload_of(plan: Plan, prepared: Mapping[str, Any]) -> Workload:
    """The work of a run, from the answer of the prepare stage.

    Raises:
        EnvironmentProblem: it is that of another afina.
    """
    try:
        rows, tokens, task, sizes = prepared["rows"], prepared["tokens"], prepared["task"], prepared.get("sizes")
        beside = plan.recipe.has_simple_models(task, rows)
        return Workload(rows=rows, tokens=tokens, simple_models=beside, sizes=sizes and Sizes(**sizes))
    except (KeyError, TypeError) as error:
        raise EnvironmentProblem(
            f"the prepared data tell no sizes: {error}", "run `afina prefetch RECIPE` again, in an image of this afina"
        ) from None


def earlier_runs(plan: Plan) -> list[Earlier]:
    """Finished runs on scratch of the same model, lengths, precision and geometry, the newest first."""
    earlier = []
    for folder in _newest(plan.site.runs):
        with contextlib.suppress(AfinaError, KeyError, TypeError, ZeroDivisionError):
            run = RunDir(folder)
            outcome = run.outcome()
            if outcome is None or outcome.outcome != "finished" or not outcome.samples_per_second:
                continue
            other = run.plan()
            if _likeness(plan) == _likeness(other):
                earlier.append(_earlier(run, other, outcome))
    return earlier


def _newest(runs: Path) -> Iterator[Path]:
    try:
        with os.scandir(runs) as entries:
            dated = [(entry.stat().st_mtime, entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return
    for _, path in sorted(dated, reverse=True)[:_MOST_RUNS]:
        if (Path(path) / "outcome.json").exists():
            yield Path(path)


#: Arguments of a training that change neither its speed nor its memory.
_LIGHT = {
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "log_level", "log_level_replica", "logging_first_step", "run_name", "ddp_timeout",
}  # fmt: skip
#: Keys of `train` that change them; what follows from rows, steps and splits is not among them, nor is the loss.
_HEAVY = {
    "freeze", "fast_dropout", "onednn", "cuda_graphs", "sharding", "attention_dropout", "precision", "base_dtype", "compile", "eval_batch_size",
}  # fmt: skip


def _likeness(plan: Plan) -> list[Any]:
    """Settings on which speed and memory of a run depend."""
    recipe, g = plan.recipe, plan.geometry
    model = str(plan.model_folder) if plan.model_folder else recipe.model
    words = recipe.task == "token-classification"
    adapter = recipe.adapter and recipe.adapter.model_dump(exclude={"alpha", "rslora"})
    arguments = {name: value for name, value in recipe.train.arguments.items() if name not in _LIGHT}
    machine = plan.site.sbatch.get("SBATCH_PARTITION"), plan.site.gpu_request
    return [model, words, adapter, recipe.tokens, g, machine, arguments, recipe.train.model_dump(include=_HEAVY)]


def _earlier(run: RunDir, plan: Plan, outcome: Outcome) -> Earlier:
    prepared = run.prepared()
    rows, tokens = prepared["rows"], prepared["tokens"]
    # And once more for the predictions, where the best step was not the last.
    evaluations = sum("eval_loss" in line for line in run.metrics()) + (outcome.model_step != outcome.global_step)
    examples = plan.recipe.train.schedule(rows["train"], rows.get("eval", 0)).examples_after(outcome.global_step)
    speed = outcome.samples_per_second or 0.0
    by_part = outcome.utilisation.get("seconds_by_part", {})
    startup, simple = by_part.get("startup", _STARTUP_S) / outcome.attempts, by_part.get("simple_models", 0.0)
    saves = [event["seconds"] for event in run.lines("events.jsonl") if event.get("event") == "checkpoint"]
    return Earlier(
        name=run.path.name,
        device=outcome.device or "cpu",
        tokens_per_second=speed * tokens["train"] / rows["train"],
        startup_seconds=startup,
        # The rest of the wall time is evaluations, saves and the end; it grows with the texts that are evaluated.
        other_seconds=max(0.0, outcome.seconds - startup * outcome.attempts - examples / speed - simple),
        evaluated_tokens=evaluations * tokens.get("eval", 0) + tokens.get("test", 0),
        peak_gb=outcome.utilisation.get("peak_memory_gb"),
        simple_seconds=simple or None,
        save_seconds=max(saves, default=0.0),
    )
