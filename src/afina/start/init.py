"""The steps of `afina init`: examine all splits, compose a proposal, write the recipe and the site file.

Nothing that exists is overwritten: an existing recipe is refused before anything is asked, an existing site file is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from afina.errors import EnvironmentProblem, InputError
from afina.files import write_atomic
from afina.recipe.parse import parse_recipe
from afina.run.plan import make_plan
from afina.site.settings import Site, load_site
from afina.slurm.cluster import Cluster
from afina.start.examine import Examined, examine
from afina.start.find_data import LabelledData
from afina.start.find_machine import Machine
from afina.start.find_model import ModelFacts
from afina.start.recipe_text import Proposal, recipe_text
from afina.start.site_text import site_text, usable_partition

__all__ = ["SITE", "Choices", "check_new", "examine_all", "propose", "write_recipe", "write_site"]

SITE = "slurm/site.env"
_RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Choices:
    """The user's choices, by option or by answer: run name, columns, model; and the columns that look like split, group and weight,
    or where nobody was asked, like another label."""

    name: str
    text: tuple[str, ...]
    label: tuple[str, ...]
    id: str | None
    model: ModelFacts
    split_column: str | None = None
    group: str | None = None
    weight: str | None = None
    other_labels: tuple[str, ...] = ()


def check_new(folder: Path) -> Path:
    """The path of a new recipe in `folder`.

    Raises:
        InputError: there is one already, or `folder` is a file.
    """
    path = folder / _RECIPE
    if path.exists():
        raise InputError(
            f"{path} exists already, and is not overwritten", "name another folder: afina init FOLDER; or move it away"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file", "name a folder: afina init FOLDER")
    return path


def examine_all(
    data: LabelledData,
    text: Sequence[str],
    label: Sequence[str],
    tick: Callable[[int], None] | None = None,
    split_column: str | None = None,
) -> tuple[Examined, dict[str, Examined]]:
    """The training split examined, and the other splits."""
    main = examine(data.main, text, label, tick, split_column)
    others = {
        split: examine(source, text, label, tick) for split, source in data.sources.items() if source is not data.main
    }
    return main, others


def propose(
    data: LabelledData,
    choices: Choices,
    examined: tuple[Examined, Mapping[str, Examined]],
    cluster: Cluster,
    folder: Path,
) -> Proposal:
    """The proposal. Paths below the recipe's folder are written relative to it."""
    main, others = examined
    partition = usable_partition(cluster)
    node = max(partition.nodes, key=lambda kind: (kind.gpus, kind.mem_mb or 0), default=None) if partition else None
    gpus = 1 if node is not None and node.gpus else 0
    if node is None and not cluster.partitions:
        gpus = int(Path("/proc/driver/nvidia/version").exists())
    cores = node.cpus if node is not None and node.cpus else len(os.sched_getaffinity(0))
    return Proposal(
        name=choices.name,
        model=choices.model,
        text=choices.text,
        label=choices.label,
        examined=main,
        files={split: tuple(_written(path, folder) for path in paths) for split, paths in data.files.items()},
        hub=data.hub,
        config=data.config,
        splits=data.splits,
        id=choices.id,
        reading=data.reading,
        guessed=data.guessed,
        others=others,
        split_column=choices.split_column if main.split_rows and None not in main.split_rows else None,
        group=choices.group,
        weight=choices.weight,
        other_labels=choices.other_labels,
        gpus=gpus,
        cpus=max(1, min(8, cores // max(1, node.gpus if node is not None else 1))),
        node_mem_gb=node.mem_mb // 1024 if node is not None and node.mem_mb else None,
        limit_min=partition.max_minutes if partition is not None else None,
    )


def _written(path: Path, folder: Path) -> str:
    base = folder.absolute()
    if not path.is_relative_to(base):
        return str(path)
    inside = str(path.relative_to(base))
    return f"./{inside}" if inside.startswith("~") else inside


def write_recipe(path: Path, proposal: Proposal, site: Site | None, data: LabelledData) -> None:
    """Write the recipe, after reading it back: it must name the files that were examined.

    Raises:
        InputError: the path of a data file cannot be written in a recipe.
    """
    text = recipe_text(proposal)
    recipe = parse_recipe(text, source=str(path))
    if site is not None and data.files:
        plan = make_plan(recipe, site, recipe_file=path)
        if {split: set(files) for split, files in plan.files.items()} != {k: set(v) for k, v in data.files.items()}:
            raise InputError(
                f"{data.origin}: this path means another one in a recipe ($NAME and ~ are expanded)", "rename it"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


def write_site(folder: Path, machine: Machine, cluster: Cluster) -> tuple[Path, Site | None]:
    """Write `slurm/site.env` below `folder` and make the scratch folder; the site, or None while its image is missing.

    Raises:
        InputError: there is a site file already.
        EnvironmentProblem: the scratch folder cannot be made.
    """
    path = folder / SITE
    if path.exists():
        raise InputError(f"{path} exists already, and is not overwritten", "use it, or move it away")
    try:
        Path(machine.scratch).mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"{error.filename}: {error.strerror}", "name a folder that you can write: --scratch FOLDER"
        ) from None
    write_atomic(path, site_text(machine, cluster))
    with contextlib.suppress(EnvironmentProblem):
        return path, load_site(path)
    return path, None
