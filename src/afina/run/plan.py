"""The plan: recipe + site -> one frozen value that holds all that can be known before the allocation.

Making a plan reads the disk (the files in a folder of data, the weights in a model folder) and changes nothing. The recipe states the *global* batch; the plan derives the batch per device and the accumulation and refuses a
remainder, so that one recipe means the same training on one process and on two nodes of four.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pydantic import Field, ValidationError

from afina.errors import InputError, RecipeError, first_line
from afina.frozen import FrozenModel
from afina.recipe.data_files import check_utf8, find_files
from afina.recipe.keys.resource_keys import Resources
from afina.recipe.keys.train_keys import AS_RECORDED
from afina.recipe.local_model import find_model_folder, with_stored_adapter
from afina.recipe.metrics import own_metric
from afina.recipe.parse import parse_recipe
from afina.recipe.schema import Recipe
from afina.run.job_request import JobRequest
from afina.site.settings import Site, in_container
from afina.version import __version__

__all__ = ["Geometry", "Plan", "bare_plan", "check_cores", "geometry_for", "load_plan", "make_plan"]


class Geometry(FrozenModel):
    """How the processes are laid out, and how the global batch falls on them.

    `batch_per_device * accumulation * num_processes == global_batch`, examples per optimizer step.
    """

    nodes: int
    processes_per_node: int
    gpus_per_node: int
    cpus_per_process: int
    global_batch: int
    batch_per_device: int
    accumulation: int

    @property
    def num_processes(self) -> int:
        return self.nodes * self.processes_per_node


class Plan(FrozenModel):
    """Recipe, site and geometry, with every path absolute. JSON both ways."""

    afina_version: str
    recipe: Recipe
    site: Site
    geometry: Geometry
    recipe_file: Path | None = None
    files: dict[str, tuple[Path, ...]] = Field(default_factory=dict)
    model_folder: Path | None = None
    #: Modules of the user's own metrics, name -> text: a job reads no file beside the recipe.
    metric_code: dict[str, str] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of what is trained: the recipe and its files, not the site, the geometry or where records go."""
        what = self.recipe.digested(exclude=("resources", "name", "trackers", "baselines"))
        files = {part: [str(p) for p in paths] for part, paths in self.files.items()}
        code = [self.metric_code] if self.metric_code else []
        return hashlib.sha256(json.dumps([what, files, *code], sort_keys=True).encode()).hexdigest()

    def with_time(self, minutes: int | None) -> Plan:
        """The plan with another time limit of its job; the same one for None."""
        if minutes is None:
            return self
        resources = self.recipe.resources.model_copy(update={"time": minutes})
        return self.model_copy(update={"recipe": self.recipe.model_copy(update={"resources": resources})})

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def make_plan(
    recipe: Recipe, site: Site, request: JobRequest = JobRequest(), *, recipe_file: str | Path | None = None
) -> Plan:
    """Compose a plan.

    Args:
        recipe, site: as they were loaded with the request's overrides and site file.
        request: its resources override the recipe's; with `num_processes` the plan is for this machine alone.
        recipe_file: where relative paths start; by default the file that the recipe was read from.

    Raises:
        RecipeError: a global batch that does not divide.
        DataError: data files that are missing or of an unknown format.
        InputError: a model folder without weights or tokenizer; an adapter, and no section `adapter` to train it on with.
    """
    try:
        resources = Resources.model_validate({**recipe.resources.model_dump(), **request.resources()})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"resources.{first['loc'][0]}: {first['msg']}, found {first['input']!r}", "correct the number"
        ) from None
    recipe_file = recipe_file or recipe.file
    recipe = recipe.model_copy(update={"resources": resources})
    geometry = geometry_for(recipe, request.num_processes or max(1, resources.gpus_per_node))
    _check_precision(recipe, resources.gpus_per_node)
    bind = "; a path outside the container must be listed in AFINA_BIND" if in_container() else ""
    base = Path(recipe_file).absolute().parent if recipe_file else Path.cwd()
    for path in (site.scratch, site.image, recipe_file):
        check_utf8(path)
    files = find_files(recipe.data.files or {}, base, bind)
    model_folder = find_model_folder(recipe.model, base)
    if model_folder is not None and (adapter := with_stored_adapter(recipe.adapter, model_folder)) != recipe.adapter:
        recipe = recipe.model_copy(update={"adapter": adapter})
    recipe.data.reading.check_used((path for paths in files.values() for path in paths), "data.{}".format)
    return Plan(
        afina_version=__version__,
        recipe=recipe,
        site=site,
        geometry=geometry,
        recipe_file=Path(recipe_file).absolute() if recipe_file else None,
        files=files,
        model_folder=model_folder,
        metric_code=_metric_code(recipe, base),
    )


def _check_precision(recipe: Recipe, gpus_per_node: int) -> None:
    """Refuse a precision that needs a GPU where none is asked for. What a GPU of the job supports is known when it runs.

    Raises:
        RecipeError: with the precision.
    """
    train = recipe.train
    precisions = {f"train.arguments.{name}": name for name in ("fp16", "tf32") if train.arguments.get(name)}
    if train.precision in ("fp16", "tf32"):
        precisions["train.precision"] = train.precision
    for key, precision in precisions.items():
        if not gpus_per_node:
            raise RecipeError(
                f"{key}: {precision} needs a GPU, and the run has none (gpus_per_node is 0)",
                "set train.precision: auto, or ask for GPUs: resources.gpus_per_node, --gpus-per-node",
            )


def _metric_code(recipe: Recipe, base: Path) -> dict[str, str]:
    """The text of the modules of the user's own metrics that lie beside the recipe."""
    code: dict[str, str] = {}
    for own in filter(None, map(own_metric, recipe.metric_texts)):
        file = base / f"{own.module}.py"
        if file.is_file():
            try:
                code[own.module] = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(
                    f"metrics: {file}: {first_line(error)}", "the file must be readable, in UTF-8"
                ) from None
    return code


def bare_plan(site: Site, *, nodes: int = 1, gpus_per_node: int = 0) -> Plan:
    """A plan without a recipe, for a container or a job that trains nothing."""
    text = "{name: afina, model: none, data: {hub: none, text: text, label: label}, resources: {cpus_per_gpu: 1}}"
    recipe = parse_recipe(text, [f"train.batch_size={nodes * max(1, gpus_per_node)}"])
    return make_plan(recipe, site, JobRequest(nodes=nodes, gpus_per_node=gpus_per_node))


def load_plan(path: str | Path) -> Plan:
    """Read a plan that was written with `Plan.to_json`.

    Raises:
        InputError: the file is missing, damaged or of a version that this afina does not read.
    """
    file = Path(path)
    try:
        return Plan.model_validate_json(file.read_text(encoding="utf-8"), context=AS_RECORDED)
    except FileNotFoundError:
        raise InputError(
            f"{file.parent}: not a run directory, it has no {file.name}",
            "give the folder that `afina train` or `afina submit` named",
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{file}: not a plan of afina {__version__}: {reason}",
            "use the afina that made the run, or start a new one",
        ) from None


def geometry_for(recipe: Recipe, processes_per_node: int, *, nodes: int | None = None) -> Geometry:
    """How the recipe's global batch falls on `nodes` (the recipe's own, if None) of `processes_per_node` each.

    Raises:
        RecipeError: the batch does not divide; with the sizes that would.
    """
    resources, train = recipe.resources, recipe.train
    nodes = nodes or resources.nodes
    processes = nodes * processes_per_node
    if train.batch_size % processes:
        below, above = train.batch_size // processes * processes, -(-train.batch_size // processes) * processes
        sizes = " or ".join(str(s) for s in (below, above) if s)
        raise RecipeError(
            f"train.batch_size: {train.batch_size} is the global batch and does not divide over {processes} processes "
            f"({nodes} nodes × {processes_per_node})",
            f"set train.batch_size to {sizes}, or run on another number of processes",
        )
    share = train.batch_size // processes
    limit = train.max_batch_per_device or share
    accumulation = next(k for k in range(1, share + 1) if share % k == 0 and share // k <= limit)
    return Geometry(
        nodes=nodes,
        processes_per_node=processes_per_node,
        gpus_per_node=resources.gpus_per_node,
        cpus_per_process=resources.cpus_per_gpu,
        global_batch=train.batch_size,
        batch_per_device=share // accumulation,
        accumulation=accumulation,
    )


def check_cores(num_processes: int) -> None:
    """Refuse more processes on this machine than it has cores for this process.

    Raises:
        InputError: with the number that would do.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_processes > cores:
        raise InputError(
            f"{num_processes} processes on {cores} cores: each needs one of its own",
            f"use --num-processes {cores} or fewer",
        )
