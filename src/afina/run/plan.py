"""The plan: recipe + site -> one frozen value that holds all that can be known before the allocation.

Making a plan looks at the disk (which files a folder of data holds, whether a model folder has weights) and changes
nothing. The recipe states the *global* batch; the plan derives the batch per device and the accumulation and refuses a
remainder, so that one recipe means the same training on one process and on two nodes of four.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from afina.errors import DataError, InputError, RecipeError, nearest
from afina.frozen import FrozenModel
from afina.recipe.schema import Recipe, Resources
from afina.site.settings import Site, in_container
from afina.version import __version__

__all__ = [
    "DATA_SUFFIXES",
    "Geometry",
    "Plan",
    "check_cores",
    "check_format",
    "data_files",
    "geometry_for",
    "load_plan",
    "make_plan",
    "part_of",
]

DATA_SUFFIXES: dict[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PART_NAMES = {
    "train": "train",
    "training": "train",
    "eval": "eval",
    "validation": "eval",
    "valid": "eval",
    "dev": "eval",
    "test": "test",
}


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


#: Keys of `train` that earlier versions had, with their defaults. Digests count them: runs keep their names and checkpoints.
_RETIRED: dict[str, Any] = {"onednn": True}


class Plan(FrozenModel):
    """Recipe, site and geometry, with every path absolute. JSON both ways.

    Attributes:
        retired: keys of `train` that this version no longer has, where an earlier version's plan set them to something else
            than their defaults.
    """

    afina_version: str
    recipe: Recipe
    site: Site
    geometry: Geometry
    recipe_file: Path | None = None
    files: dict[str, tuple[Path, ...]] = Field(default_factory=dict)
    model_folder: Path | None = None
    retired: dict[str, Any] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of what is trained: the recipe and its files, not the site, the geometry or where records go."""
        what = self.recipe.model_dump(mode="json", exclude={"resources", "name", "trackers"})
        what["train"] |= {**_RETIRED, **self.retired}
        files = {part: [str(p) for p in paths] for part, paths in self.files.items()}
        return hashlib.sha256(json.dumps([what, files], sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        empty = None if self.retired else {"retired"}
        return json.dumps(self.model_dump(mode="json", exclude=empty), indent=2, ensure_ascii=False) + "\n"


def make_plan(
    recipe: Recipe,
    site: Site,
    *,
    recipe_file: str | Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    processes_per_node: int | None = None,
    cpus_per_process: int | None = None,
    time_min: int | None = None,
) -> Plan:
    """Compose a plan; the keyword arguments overrule the recipe's resources.

    Raises:
        RecipeError: a global batch that does not divide.
        DataError: data files that are missing or of an unknown format.
        InputError: a model folder without weights or tokenizer.
    """
    changes = {"nodes": nodes, "gpus_per_node": gpus_per_node, "cpus_per_gpu": cpus_per_process, "time": time_min}
    given = {k: v for k, v in changes.items() if v is not None}
    try:
        resources = Resources.model_validate({**recipe.resources.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"resources.{first['loc'][0]}: {first['msg']}, found {first['input']!r}", "correct the number"
        ) from None
    recipe = recipe.model_copy(update={"resources": resources})
    for path in (site.scratch, site.image, recipe_file):
        _printable(path)
    base = Path(recipe_file).absolute().parent if recipe_file else Path.cwd()
    return Plan(
        afina_version=__version__,
        recipe=recipe,
        site=site,
        geometry=geometry_for(recipe, processes_per_node or max(1, resources.gpus_per_node)),
        recipe_file=Path(recipe_file).absolute() if recipe_file else None,
        files=_data_files(recipe, base),
        model_folder=_model_folder(recipe.model, base),
    )


def load_plan(path: str | Path) -> Plan:
    """Read a plan that was written with `Plan.to_json`.

    Raises:
        InputError: the file is missing, damaged or of a version that this afina does not read.
    """
    file = Path(path)
    try:
        return Plan.model_validate_json(_without_retired(file.read_text(encoding="utf-8")))
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


def _without_retired(text: str) -> str:
    """A plan's JSON with the retired keys of its recipe moved to `retired`."""
    if not any(f'"{key}"' in text for key in _RETIRED):
        return text
    try:
        value = json.loads(text)
        train = value["recipe"]["train"]
        given = {key: train.pop(key) for key in _RETIRED if key in train}
    except (ValueError, LookupError, TypeError, AttributeError):
        return text  # the validation says what is wrong
    kept = {key: v for key, v in given.items() if v != _RETIRED[key]}
    return json.dumps({**value, "retired": kept}) if given else text


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


def _find(path: str, base: Path) -> list[Path]:
    """What a path or pattern of the recipe names: absolute, else beside the recipe, else in the working directory.

    Where nothing is there, the first place where it was looked for.
    """
    given = Path(os.path.expandvars(path))
    if path.startswith("~"):
        with contextlib.suppress(RuntimeError):  # `~nobody`: then it is a name like any other
            given = given.expanduser()
    places = [Path("/")] if given.is_absolute() else [base, Path.cwd()]
    for place in places:
        # `root_dir` keeps a bracket in a folder's own name from being read as a pattern.
        whole = (place / given).absolute()
        found = [whole] if whole.exists() else sorted(place / p for p in glob.glob(str(given), root_dir=place))
        if found:
            return found
    return [(places[0] / given).absolute()]


def _printable(path: str | Path | None) -> None:
    """Refuse a path whose bytes are not UTF-8: neither the plan (JSON) nor the model's card could hold it."""
    if path is None:
        return
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{str(path)!r}: this path is not UTF-8", "rename the file or folder") from None


def _data_files(recipe: Recipe, base: Path) -> dict[str, tuple[Path, ...]]:
    given = recipe.data.files or {}
    named = {part: [p for path in paths for p in _find(path, base)] for part, paths in given.items()}
    # A file that two patterns match is read once.
    files: dict[str, tuple[Path, ...]] = {
        part: tuple(dict.fromkeys(f for p in paths for f in _expand(part, p))) for part, paths in named.items()
    }
    for path in (p for paths in files.values() for p in paths):
        _printable(path)
    if set(files) == {"all"} and len(named["all"]) == 1 and named["all"][0].is_dir():
        return _parts_of_folder(files["all"])
    return files


#: How files of other formats become files of a known one.
_CONVERT = {
    ".gz": "unpack it: gunzip -k FILE; ",
    ".bz2": "unpack it: bunzip2 -k FILE; ",
    ".xz": "unpack it: unxz -k FILE; ",
    ".zst": "unpack it: unzstd FILE; ",
    ".zip": "unpack it: unzip FILE; ",
    ".xlsx": "save the sheet as `CSV UTF-8`; ",
    ".xls": "save the sheet as `CSV UTF-8`; ",
    ".arrow": "write Parquet: datasets.Dataset.from_file(FILE).to_parquet(NEW); ",
    ".feather": "write Parquet: pandas.read_feather(FILE).to_parquet(NEW); ",
    ".pkl": "write Parquet: pandas.read_pickle(FILE).to_parquet(NEW); ",
}


def _expand(part: str, path: Path) -> list[Path]:
    where = f"data.files.{part}: {path}"
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            raise DataError(
                f"{where}: a folder of `datasets.save_to_disk`, which afina does not read",
                "write Parquet instead: datasets.load_from_disk(FOLDER)[SPLIT].to_parquet('train.parquet')",
            )
        return data_files(path, where)
    if path.is_file():
        check_format(path, where)
        if not os.access(path, os.R_OK):
            raise DataError(f"{where}: cannot be read by you", f"chmod u+r '{path}'")
        return [path]
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings)
    bind = "; a path outside the container must be listed in AFINA_BIND" if in_container() else ""
    raise DataError(
        f"{where}: no such file",
        (hint or "paths are looked up beside the recipe, then in the working directory") + bind,
    )


def data_files(folder: Path, where: str) -> list[Path]:
    """The data files in a folder, by name; hidden ones are none.

    Raises:
        DataError: there is none; `where` begins the message.
    """
    known = (p for p in folder.iterdir() if p.suffix.lower() in DATA_SUFFIXES and not p.name.startswith("."))
    found = sorted(p for p in known if p.is_file())
    if not found:
        raise DataError(f"{where}: no data file in this folder", f"known formats: {', '.join(DATA_SUFFIXES)}")
    return found


def check_format(path: Path, where: str, also: Sequence[str] = ()) -> None:
    """Refuse a file whose suffix is neither a data file's nor among `also`.

    Raises:
        DataError: how to convert it, where that is known; `where` begins the message.
    """
    suffix = path.suffix.lower()
    if suffix not in (*DATA_SUFFIXES, *also):
        raise DataError(
            f"{where}: format {path.suffix or '(no suffix)'} is not known",
            f"{_CONVERT.get(suffix, '')}known formats: {', '.join((*DATA_SUFFIXES, *also))}",
        )


def part_of(path: Path) -> str | None:
    """The part that a data file is named after (`train.csv`, `validation-00000-of-00002.parquet`, …), or None."""
    return _PART_NAMES.get(path.stem.replace("_", "-").split("-")[0].casefold())


def _parts_of_folder(paths: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """train.csv, test-00000-of-00002.parquet, … in one folder are its parts; files with other names are one whole.

    Raises:
        DataError: some are named as parts and some are not: as one whole, test rows would be trained on.
    """
    parts: dict[str, tuple[Path, ...]] = {}
    for path in paths:
        part = part_of(path) or "all"
        parts[part] = (*parts.get(part, ()), path)
    if "all" in parts and len(parts) > 1:
        part, other = next(p for p in parts if p != "all"), parts["all"][0]
        raise DataError(
            f"data.files.all: {other.parent} holds {parts[part][0].name}, which is {part}, and {other.name}, which is no part",
            "name the files of each part: `files: {train: …, eval: …, test: …}`",
        )
    return parts


def _model_folder(model: str, base: Path) -> Path | None:
    """The absolute folder of a local model, or None where `model` is a Hub id."""
    path = _find(model, base)[0]
    _printable(path)
    if not path.is_dir():
        local = model.startswith((".", "/", "~", "$")) or model.count("/") > 1
        if path.exists():
            raise InputError(f"model: {path} is a file", "give the folder that holds config.json and model.safetensors")
        if local:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise InputError(
                f"model: {path}: no such folder",
                nearest(path.name, siblings) or "give a Hub id (owner/name) or a model folder",
            )
        return None
    if not (path / "config.json").is_file():
        raise InputError(
            f"model: {path} has no config.json: it is not a Transformers model folder",
            "give the folder that `save_pretrained` wrote",
        )
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise InputError(
            f"model: {path} has no weights ({', '.join(_WEIGHTS[:2])})",
            "download the model again, or save it with `save_pretrained`",
        )
    return path
