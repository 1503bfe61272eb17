"""What a run will cost, asked of a short real training, of earlier runs like it, or of the model's own numbers.

`rehearse` makes a few steps, a save and an evaluation in the image with the network cut, in a throw-away run directory. Where it is
called is where it is measured: a login node says nothing about a GPU. `afina.forecast.estimate` makes a forecast of what is found here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, EnvironmentProblem
from afina.forecast.estimate import Earlier, Measured, Shape
from afina.run.commands import worker_argv, worker_environment
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.run.plan import Plan, geometry_for
from afina.run.workers import ask_worker
from afina.site.settings import environment

__all__ = ["earlier_runs", "parameters_of", "rehearse", "shape_of"]

#: Steps are timed for so long, at least so many, so that the forecast does not hang on one of them.
_SECONDS = 10.0
_LEAST_STEPS = 2
_MOST_STEPS = 60
#: The newest so many run directories are looked at for runs of the same shape.
_LOOKED_AT = 300
#: Of a run that does not say how long its start took.
_STARTUP_S = 20.0


def rehearse(plan: Plan, prepared: Mapping[str, Any], *, seconds: float = _SECONDS) -> Measured:
    """A few steps, timed ones for about `seconds`, a save and an evaluation; nothing of it stays.

    Raises:
        AfinaError: what would have failed in the job, as the worker said it.
        EnvironmentProblem: scratch cannot hold the throw-away run.
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
        run = RunDir.claim(small, prepared, ["true"], json.dumps(recipe.model_dump(mode="json")), folder / "run")
        here = {**os.environ, **environment(plan.site)}
        threads = min(len(os.sched_getaffinity(0)), plan.geometry.cpus_per_process)
        env = {
            **here,
            **worker_environment(plan, offline=True, env=here),
            "OMP_NUM_THREADS": here.get("OMP_NUM_THREADS") or str(threads),
        }
        if plan.geometry.gpus_per_node:
            # Plain Python that sees several GPUs would use nn.DataParallel.
            env["CUDA_VISIBLE_DEVICES"] = here.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        question = {"geometry": plan.geometry.model_dump(), "steps": _LEAST_STEPS, "seconds": seconds}
        answer = ask_worker(worker_argv(plan, "rehearse", str(run.path)), env, question, name="the rehearsal")
        return Measured.model_validate(answer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def shape_of(plan: Plan, prepared: Mapping[str, Any]) -> Shape:
    """What decides about memory: the model's numbers and the longest batch, read from files.

    Raises:
        EnvironmentProblem: the model's configuration or the prepared data cannot be read.
    """
    from safetensors import SafetensorError

    try:
        model, folder = Path(prepared["model_folder"]), Path(prepared["prepared"])
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        lengths = sorted(_lengths(folder / "train.offsets.npy"), reverse=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EnvironmentProblem(
            f"model or prepared data cannot be read: {error}", "run `afina prefetch RECIPE` again"
        ) from None

    def number(*names: str, default: int) -> int:
        return next((int(config[n]) for n in names if isinstance(config.get(n), int)), default)

    hidden = number("hidden_size", "dim", "d_model", default=768)
    longest = lengths[: plan.geometry.batch_per_device]
    splits = manifest["splits"]
    return Shape(
        parameters=parameters_of(model) or number("num_parameters", default=110_000_000),
        layers=number("num_hidden_layers", "n_layers", default=12),
        hidden=hidden,
        intermediate=number("intermediate_size", "hidden_dim", "ffn_dim", default=4 * hidden),
        heads=number("num_attention_heads", "n_heads", default=12),
        longest=tuple(longest)
        if plan.recipe.tokens.batching != "padded"
        else (plan.recipe.tokens.max_length,) * len(longest),
        train_rows=splits["train"]["rows"],
        eval_rows=splits.get("eval", {}).get("rows", 0),
        test_rows=splits.get("test", {}).get("rows", 0),
        half=bool(plan.recipe.train.arguments.get("bf16") or plan.recipe.train.arguments.get("fp16")),
        attention_dropout=plan.recipe.train.attention_dropout is None
        and any(config.get(n, 0) for n in ("attention_probs_dropout_prob", "attention_dropout")),
    )


def parameters_of(model: Path) -> int | None:
    """Number of parameters in the model's safetensors files, from their headers; None: the model has no such files.

    Raises:
        SafetensorError: a file is damaged.
    """
    from safetensors import safe_open

    total = 0
    for path in sorted(model.glob("model*.safetensors")):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total or None


def _lengths(path: Path) -> list[int]:
    """Tokens of each row, from the offsets of the prepared data."""
    import numpy as np

    lengths: list[int] = np.diff(np.load(path, mmap_mode="r", allow_pickle=False)).tolist()
    return lengths


def earlier_runs(plan: Plan) -> list[Earlier]:
    """Finished runs under scratch that trained the same model on the same lengths in the same geometry; the newest first."""
    found = []
    for folder in _newest(plan.site.runs):
        with contextlib.suppress(AfinaError, KeyError, TypeError, ZeroDivisionError):
            run = RunDir(folder)
            outcome = run.outcome()
            if outcome is None or outcome.outcome != "finished" or not outcome.samples_per_second:
                continue
            other = run.plan()
            if not _alike(plan, other):
                continue
            found.append(_earlier(run, other, outcome))
    return found


def _newest(runs: Path) -> Iterator[Path]:
    try:
        with os.scandir(runs) as entries:
            dated = [(entry.stat().st_mtime, entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return
    for _, path in sorted(dated, reverse=True)[:_LOOKED_AT]:
        if (Path(path) / "outcome.json").exists():
            yield Path(path)


def _alike(plan: Plan, other: Plan) -> bool:
    def shape(p: Plan) -> list[Any]:
        train, g = p.recipe.train, p.geometry
        model = str(p.model_folder) if p.model_folder else p.recipe.model
        layout = (g.num_processes, g.gpus_per_node, g.cpus_per_process, g.batch_per_device, g.accumulation)
        numbers = (train.fast_dropout, train.attention_dropout, train.precision, train.compile)
        return [model, p.recipe.tokens, layout, train.arguments, numbers]

    return shape(plan) == shape(other)


def _earlier(run: RunDir, plan: Plan, outcome: Outcome) -> Earlier:
    rows = run.prepared()["rows"]
    evaluations = sum("eval_loss" in line for line in run.metrics())
    examples = plan.recipe.train.schedule(rows["train"], rows.get("eval", 0)).examples_after(outcome.global_step)
    speed = outcome.samples_per_second or 0.0
    startup = outcome.utilisation.get("seconds_by_part", {}).get("startup", _STARTUP_S) / outcome.attempts
    return Earlier(
        name=run.path.name,
        device=outcome.device or "cpu",
        examples_per_second=speed,
        startup_seconds=startup,
        # What is left of the wall time is evaluations, saves and the end; it grows with the rows that are evaluated.
        other_seconds=max(0.0, outcome.seconds - startup * outcome.attempts - examples / speed),
        evaluated_rows=evaluations * rows.get("eval", 0),
        peak_gb=outcome.utilisation.get("peak_memory_gb"),
    )
