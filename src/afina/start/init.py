"""From data and a machine to a recipe and a site file that fit them: what `afina init` finds out, and what it writes.

`afina.start.examine` reads the data, `afina.start.propose` writes the texts, `afina.cli.start_commands` asks. Nothing that exists is overwritten: a recipe
that is there is refused by name before anything is asked, a site file that is there is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from afina import errors
from afina.errors import DataError, EnvironmentProblem, InputError
from afina.files import write_atomic
from afina.recipe.data_files import DATA_SUFFIXES, check_format, data_files, split_of
from afina.recipe.formats import read_rows, readable_parquet
from afina.recipe.local_model import num_parameters
from afina.recipe.positions import longest_input
from afina.recipe.schema import parse_recipe
from afina.run.commands import container_argv
from afina.run.job_request import JobRequest
from afina.run.plan import Plan, make_plan
from afina.run.workers import ask_worker
from afina.site.settings import Site, cache_environment, environment, hub_token, load_site
from afina.slurm.cluster import Cluster
from afina.start import examine, propose
from afina.start.examine import Examined, Source
from afina.start.propose import Host, Model, Proposal

__all__ = [
    "SITE",
    "Found",
    "bare_plan",
    "check_new",
    "compose",
    "data_files_here",
    "doubts",
    "examine_all",
    "find_data",
    "find_host",
    "find_model",
    "usual_name",
    "write_recipe",
    "write_site",
]

SITE = "slurm/site.env"
_RECIPE = "recipe.yaml"
_SCRATCH_NAMES = ("SCRATCH", "WORK", "PSCRATCH", "SCRATCHDIR", "WORKDIR", "CSCRATCH")
_SCRATCH_FOLDERS = ("/scratch/{}", "/scratch/users/{}", "/lustre/scratch/{}", "/gpfs/scratch/{}", "/work/{}")
_LARGE = 50_000_000


@dataclasses.dataclass(frozen=True)
class Found:
    """The data as they lie: sources by part (`all`, or train, eval, test), and how the recipe names them."""

    what: str
    sources: Mapping[str, Source]
    files: Mapping[str, tuple[Path, ...]]
    hub: str | None = None
    config: str | None = None
    #: part -> split or file key.
    parts: Mapping[str, str] | None = None

    @property
    def main(self) -> Source:
        return self.sources.get("train") or next(iter(self.sources.values()))


def check_new(folder: Path) -> Path:
    """The recipe's path in `folder`, where there is none yet.

    Raises:
        InputError: there is one; it is not overwritten.
    """
    path = folder / _RECIPE
    if path.exists():
        raise InputError(
            f"{path} is there already, and is not overwritten",
            "name another folder: afina init FOLDER; or move it away",
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file", "name a folder: afina init FOLDER")
    return path


def data_files_here(folder: Path) -> list[Path]:
    """Data files in `folder` and one level below it, the largest first: what a user may mean."""
    found = []
    for path in [*folder.glob("*"), *folder.glob("data/*")]:
        if path.suffix.lower() in DATA_SUFFIXES and path.is_file() and not path.name.startswith("."):
            found.append(path)
    return sorted(found, key=lambda path: -path.stat().st_size)


# -- data -------------------------------------------------------------------------------------------------------------


def find_data(data: str, site: Site | None, config: str | None = None) -> Found:
    """A file, a folder or a Hub id. Files that are named as parts bring their sisters along.

    Raises:
        DataError, InputError: nothing of the kind is there; with the nearest name.
        EnvironmentProblem: Parquet or the Hub, and nothing here that reads it.
    """
    path = Path(os.path.expandvars(data)).expanduser()
    if not path.exists():
        local = data.startswith((".", "/", "~", "$")) or path.suffix.lower() in DATA_SUFFIXES or data.count("/") > 1
        if local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data):
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(
                f"--data {data}: no such file or folder",
                errors.nearest(path.name, siblings)
                or "give a file, a folder, or the id of a Hub data set (owner/name)",
            )
        return _find_hub(data, config, site)
    if config is not None:
        raise InputError(f"--config {config}: belongs to a Hub data set", "leave it out")
    path = path.absolute()
    if path.is_file():
        check_format(path, str(path))
        sisters = [p for p in sorted(path.parent.iterdir()) if p.suffix.lower() == path.suffix.lower() and split_of(p)]
        files = sisters if split_of(path) == "train" else [path]
    else:
        files = data_files(path, str(path))
    parts: dict[str, tuple[Path, ...]] = {}
    for file in files:
        part = split_of(file) or "all"
        parts[part] = (*parts.get(part, ()), file)
    if "all" in parts and len(parts) > 1:
        named = next(p for p in parts if p != "all")
        raise DataError(
            f"{path} holds {parts[named][0].name}, which is {named}, and {parts['all'][0].name}, which is no part",
            "put the files of the parts into a folder of their own, or give one file",
        )
    if "train" not in parts and "all" not in parts:
        parts = {"all": tuple(p for paths in parts.values() for p in paths)}
    sources = {part: _source(paths) for part, paths in parts.items()}
    return Found(str(path), sources, parts, parts=None if "all" in parts else {part: part for part in parts})


def _source(paths: Sequence[Path], name: str | None = None) -> Source:
    counted = sum(p.stat().st_size for p in paths) > _LARGE or all(p.suffix.lower() == ".parquet" for p in paths)
    total = sum(map(_count_rows, paths)) if counted else None
    name = name or ", ".join(p.name for p in paths)
    return Source(name, lambda: (row for path in paths for row in read_rows(path)), total)


def _count_rows(path: Path) -> int:
    """Rows of a Parquet file; of another one its line breaks, an estimate: those inside a quoted cell count too."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        with readable_parquet(path):
            return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 22), b""))


def _find_hub(hub: str, config: str | None, site: Site | None) -> Found:
    if site is None:
        raise EnvironmentProblem(
            f"--data {hub}: a data set from the Hub is fetched to scratch, and there is no site file yet",
            "write one first: afina init --site-only; then run this again",
        )
    files = _fetch_hub({"hub": hub, "config": config, "site": site.model_dump(mode="json")}, site)
    sources = {
        split: _source([Path(path)], f"{hub}/{split}" if len(files) > 1 else hub) for split, path in files.items()
    }
    names = {split_of(Path(split)) or split: split for split in sources}
    if "train" not in names and "all" not in names:
        names = {"train": next(iter(sources)), **{k: v for k, v in names.items() if k in ("eval", "test")}}
    parts: dict[str, str] = {part: names[part] for part in ("train", "eval", "test") if part in names}
    kept = {part: sources[split] for part, split in parts.items()}
    return Found(hub, kept, {}, hub=hub, config=config, parts=parts if len(parts) > 1 else None)


def _fetch_hub(question: Mapping[str, Any], site: Site) -> dict[str, str]:
    """Fetch a data set by a worker; its files by split."""
    argv = [sys.executable, "-m", "afina.worker", "peek"]
    here = {**os.environ, **environment(site)}
    env = {**here, **cache_environment(site, here), **hub_token(here)}
    if importlib.util.find_spec("datasets") is None:
        if site.image is None:
            raise EnvironmentProblem(
                f"{question['hub']}: neither the package `datasets` nor an image is here to fetch it",
                "build the image (container/build.sh) and name it in site.env, or `pip install 'afina[train]'`",
            )
        argv = container_argv(bare_plan(site), ["python", *argv[1:]], [])
    answer = ask_worker(argv, env, question, name="the fetch of the data set")
    return dict(answer["files"])


def bare_plan(site: Site, *, nodes: int = 1, gpus_per_node: int = 0) -> Plan:
    """A plan that only says where: for a container, or a job, without a recipe."""
    text = "{name: afina, model: none, data: {hub: none, text: text, label: label}, resources: {cpus_per_gpu: 1}}"
    processes = nodes * max(1, gpus_per_node)
    recipe = parse_recipe(text, [f"train.batch_size={processes}"])
    return make_plan(recipe, site, JobRequest(nodes=nodes, gpus_per_node=gpus_per_node))


# -- model, machine ---------------------------------------------------------------------------------------------------


def find_model(model: str, sample: Sequence[str], pieces: Callable[[str], int]) -> Model:
    """What a model folder says of itself; of a Hub id only what its name says.

    With the package `tokenizers` at hand, the tokens of a sample of texts are counted with the folder's own tokenizer.
    """
    folder = Path(os.path.expandvars(model)).expanduser()
    if not (folder / "config.json").is_file():
        guess = 335e6 if "large" in model.lower() else 33e6 if re.search("mini|small|tiny", model.lower()) else 110e6
        return Model(model, parameters=int(guess))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parameters = num_parameters(folder) or 110_000_000
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--model {model}: cannot be read: {error}", "give a whole model folder, or a Hub id"
        ) from None
    limit = config.get("max_position_embeddings") if config.get("position_biased_input") is not False else None
    positions = longest_input(str(config.get("model_type")), limit, config.get("pad_token_id"))
    return Model(
        str(folder.absolute()),
        parameters=parameters,
        positions=min(8192, positions) if positions is not None and positions > 0 else 512,
        known=True,
        tokens_per_piece=_measured(folder / "tokenizer.json", sample, pieces),
    )


def _measured(tokenizer: Path, sample: Sequence[str], pieces: Callable[[str], int]) -> float | None:
    """Tokens by words and marks, in a sample; None where it cannot be counted here."""
    if not sample or not tokenizer.is_file() or importlib.util.find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(tokenizer))
    except Exception:  # the package raises no type of its own
        return None
    loaded.no_truncation()
    loaded.no_padding()
    tokens = sum(len(e.ids) for e in loaded.encode_batch(list(sample), add_special_tokens=False))
    return tokens / max(1, sum(map(pieces, sample)))


def find_host(folder: Path, env: Mapping[str, str], scratch: str | None = None, image: str | None = None) -> Host:
    """Where scratch and the image are on this machine, and what starts it. `scratch` and `image`: the user's own words."""
    where, why = (scratch, "Shared scratch, as given.") if scratch else _scratch(folder, env)
    return _runtime(str(Path(where).expanduser().absolute()), why, folder, env, image)


def _scratch(folder: Path, env: Mapping[str, str]) -> tuple[str, str]:
    user = env.get("USER") or env.get("LOGNAME") or "me"
    if env.get("AFINA_SCRATCH"):
        return env["AFINA_SCRATCH"], "Shared scratch: $AFINA_SCRATCH, as it was set."
    places = [(env[name], f"${name}") for name in _SCRATCH_NAMES if env.get(name)]
    places += [(pattern.format(user), pattern.format("$USER")) for pattern in _SCRATCH_FOLDERS]
    for place, name in places:
        with contextlib.suppress(OSError):
            if Path(place).is_dir() and os.access(place, os.W_OK | os.X_OK):
                return (
                    f"{place.rstrip('/')}/afina",
                    f"Shared scratch: {name} of this cluster. Every node must see it at this path.",
                )
    return (
        str(folder.absolute() / "scratch"),
        "No scratch was found ($SCRATCH, $WORK, /scratch/$USER, …): a folder here. On a cluster name one that every node sees.",
    )


def _runtime(scratch: str, scratch_why: str, folder: Path, env: Mapping[str, str], image: str | None) -> Host:
    path = env.get("PATH")
    runtime = next((name for name in ("apptainer", "singularity") if shutil.which(name, path=path)), None)
    module = None if runtime else _module()
    given = image or env.get("AFINA_IMAGE")
    places = [given] if given else [f"{scratch}/afina.sif", str(folder / "afina.sif"), "afina.sif"]
    there = next((str(Path(p).expanduser().absolute()) for p in places if Path(p).expanduser().is_file()), None)
    if there:
        return Host(scratch, scratch_why, there, "The image.", runtime or _named(module), module)
    if not given and importlib.util.find_spec("torch") is not None:
        why = "No image was found: jobs use the afina of this environment, which has PyTorch; the nodes must see it at the same path."
        return Host(scratch, scratch_why, None, why, "none")
    target = str(Path(given).expanduser().absolute()) if given else f"{scratch}/afina.sif"
    why = "The image that container/build.sh makes; it is not there yet."
    return Host(scratch, scratch_why, target, why, runtime or _named(module), module)


def _named(module: str | None) -> str:
    return "singularity" if module and module.startswith("singularity") else "apptainer"


def _module() -> str | None:
    """A module that has Apptainer, as a login shell lists them; None where there are no modules."""
    script = "module -t avail apptainer singularity 2>&1"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(
            ["bash", "-lc", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
        ).stdout
        names = [line.strip().removesuffix("(default)").rstrip() for line in said.splitlines()]
        for kind in ("apptainer", "singularity"):
            if found := [n for n in names if re.fullmatch(rf"(\S*/)?{kind}(-\w+)?(/[\w.+-]+)?", n, re.IGNORECASE)]:
                return found[-1]
    return None


# -- writing ----------------------------------------------------------------------------------------------------------


def examine_all(
    found: Found, text: Sequence[str], label: Sequence[str], tick: Callable[[int], None] | None = None
) -> tuple[Examined, dict[str, Examined]]:
    """Text and label of the part that is trained on, and of the others."""
    main = examine.examine(found.main, text, label, tick)
    others = {
        part: examine.examine(source, text, label, tick)
        for part, source in found.sources.items()
        if source is not found.main
    }
    return main, others


def usual_name(found: Found, folder: Path) -> str:
    """A name for the run: the data's, without what a folder's name cannot hold."""
    stem = (found.hub or "").rpartition("/")[2] or Path(found.what).stem
    if split_of(Path(found.what)) and not found.hub:
        stem = Path(found.what).absolute().parent.name
    return re.sub(r"[\x00-\x1f\x7f/]+", "-", stem).strip(".- ")[:60] or "run"


def doubts(p: Proposal) -> list[str]:
    """What should be looked at before anything is run: the warnings that the recipe holds as comments."""
    return [said.removeprefix("WARNING: ") for said in propose.about_data(p) if said.startswith("WARNING")]


def compose(
    found: Found,
    name: str,
    text: Sequence[str],
    label: Sequence[str],
    row_id: str | None,
    model: Model,
    examined: tuple[Examined, Mapping[str, Examined]],
    cluster: Cluster,
    folder: Path,
) -> Proposal:
    """All that the recipe is written from. Paths below the recipe's folder are written relative to it."""
    main, others = examined
    partition = propose.usable_partition(cluster)
    node = max(partition.nodes, key=lambda kind: (kind.gpus, kind.mem_mb or 0), default=None) if partition else None
    gpus = 1 if node is not None and node.gpus else 0
    if node is None and not cluster.partitions:
        gpus = int(Path("/proc/driver/nvidia/version").exists())
    cores = node.cpus if node is not None and node.cpus else len(os.sched_getaffinity(0))
    shared = sum(len(main.digests & other.digests) for other in others.values())

    def written(path: Path) -> str:
        base = folder.absolute()
        if not path.is_relative_to(base):
            return str(path)
        inside = str(path.relative_to(base))
        return f"./{inside}" if inside.startswith("~") else inside

    return Proposal(
        name=name,
        model=model,
        text=tuple(text),
        label=tuple(label),
        examined=main,
        others=others,
        files={part: tuple(written(p) for p in paths) for part, paths in found.files.items()},
        hub=found.hub,
        config=found.config,
        parts=found.parts,
        id=row_id,
        shared=shared,
        gpus=gpus,
        cpus=max(1, min(8, cores // max(1, node.gpus if node is not None else 1))),
        node_mem_gb=node.mem_mb // 1024 if node is not None and node.mem_mb else None,
        limit_min=partition.max_minutes if partition is not None else None,
    )


def write_recipe(path: Path, proposal: Proposal, site: Site | None, found: Found) -> str:
    """Write the recipe, once it has been read back and names the files that were looked at; returns its text.

    Raises:
        InputError: the path of a data file cannot be said in a recipe.
    """
    text = propose.recipe_text(proposal)
    recipe = parse_recipe(text, source=str(path))
    if site is not None and found.files:
        path.parent.mkdir(parents=True, exist_ok=True)
        plan = make_plan(recipe, site, recipe_file=path)
        if {part: set(paths) for part, paths in plan.files.items()} != {k: set(v) for k, v in found.files.items()}:
            raise InputError(
                f"{found.what}: this path means something else in a recipe ($NAME and ~ are expanded)", "rename it"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return text


def write_site(folder: Path, host: Host, cluster: Cluster) -> tuple[Path, Site | None]:
    """Write `slurm/site.env` below `folder` and make the scratch that it names; the site as it loads, None without its image.

    Raises:
        EnvironmentProblem: scratch cannot be made.
    """
    path = folder / SITE
    if path.exists():
        raise InputError(f"{path} is there already, and is not overwritten", "use it, or move it away")
    try:
        Path(host.scratch).mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"{error.filename}: {error.strerror}", "name a folder that you can write: --scratch FOLDER"
        ) from None
    write_atomic(path, propose.site_text(host, cluster))
    with contextlib.suppress(EnvironmentProblem):
        return path, load_site(path)
    return path, None
