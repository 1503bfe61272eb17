"""Pure: plan -> command lines. A dry run prints the same ones that a submission runs.

worker_argv       python -m afina.worker COMMAND … in the container, or here where the site has none
container_argv    apptainer exec … <worker_argv>
node_argv         bash node.sh IMAGE <container_argv>   what a run directory keeps as the command of each node
accelerate_argv   python -m accelerate.commands.launch … -m afina.worker train RUN
sbatch_argv       sbatch … finetune.sbatch RUN
sweep_argv        sbatch … --array=… finetune.sbatch SWEEP FIRST
array_argv        sbatch … --array=… SCRIPT …            any other script, as so many tasks
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from afina.errors import EnvironmentProblem, InputError
from afina.recipe.local_model import adapter_base
from afina.run.plan import Geometry, Plan
from afina.site.package import slurm_folder
from afina.site.settings import cache_environment, environment, hub_token, in_container, without_isolation

__all__ = [
    "MEET_S",
    "accelerate_argv",
    "array_argv",
    "container_argv",
    "host_environment",
    "job_scripts",
    "node_argv",
    "plain_path",
    "predict_argv",
    "sbatch_argv",
    "sbatch_options",
    "slurm_options",
    "sweep_argv",
    "worker_argv",
    "without_launcher",
    "worker_environment",
]

#: Seconds that nodes wait for each other at the start, without `ddp_timeout`: the slowest copies the data first, or mounts the image.
MEET_S = 600
_LAUNCHER = re.compile(
    "(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET|ACCELERATE|FSDP|PMI|PMIX|OMPI|MV2)_.*"
)


def worker_argv(plan: Plan, command: str, *arguments: str, binds: Iterable[Path] = ()) -> list[str]:
    """`python -m afina.worker COMMAND`, wrapped in the container where the site has one and we are not in it."""
    inner = _python(plan, command, *arguments)
    return [sys.executable, *inner[1:]] if in_container() else container_argv(plan, inner, binds)


def node_argv(plan: Plan, binds: Iterable[Path] = (), command: str = "launch") -> list[str]:
    """The command of one node's worker on the host: in the image, mounted by `slurm/node.sh`.

    `{run}` and `{run}/node.sh` are for `afina.run.new_run.claim` to fill in. The last two words are the worker's command and the run directory.
    """
    inner = container_argv(plan, _python(plan, command, "{run}"), binds)
    return inner if plan.site.runtime == "none" else ["bash", "{run}/node.sh", str(plan.site.image), *inner]


def predict_argv(plan: Plan, parts: Path, binds: Iterable[Path] = ()) -> list[str]:
    """The worker of a prediction in a job, without its share; as `node_argv` for training."""
    command = container_argv(plan, _python(plan, "predict", "run", str(parts)), binds)
    return command if plan.site.runtime == "none" else ["bash", str(parts / "node.sh"), str(plan.site.image), *command]


def container_argv(plan: Plan, inner: Sequence[str], binds: Iterable[Path] = ()) -> list[str]:
    """`inner` in the site's container, or as it is where there is none.

    The default environment passes (SLURM_*, NCCL_*, HF_*), the home does not: its `~/.local` would win over the image.
    Paths go through `--mount`, whose fields can be quoted; `--bind` cannot express a colon or a comma.
    """
    site = plan.site
    if site.runtime == "none":
        return list(inner)
    if site.image is None:
        raise EnvironmentProblem(
            f"AFINA_RUNTIME={site.runtime} and no AFINA_IMAGE",
            "set AFINA_IMAGE to an image made with container/build.sh",
        )
    folders = [site.scratch, *_model_folders(plan), *_data_folders(plan), *binds]
    if plan.recipe_file:
        folders.append(plan.recipe_file.parent)
    mounts: list[str] = []
    for folder in _outermost(folders):
        mounts += ["--mount", _mount(folder)]
    for bind in site.binds:
        mounts += ["--bind", bind]
    gpu = ["--nv"] if plan.geometry.gpus_per_node else []
    return [
        site.runtime,
        "--quiet",
        "exec",
        *gpu,
        "--no-home",
        *mounts,
        "--pwd",
        str(site.scratch),
        str(site.image),
        *inner,
    ]


def worker_environment(plan: Plan, *, offline: bool, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of every worker: caches under scratch, no user packages, and for training no network.

    Threads of torch (GNU OpenMP) that wait for each other spin, by default for milliseconds: on two cores, beside one busy
    process, a training falls to a thirtieth of its speed, with this limit to a third, and alone it costs nothing (docs/measured.md).
    """
    here = os.environ if env is None else env
    spins = {} if here.get("OMP_WAIT_POLICY") else {"GOMP_SPINCOUNT": here.get("GOMP_SPINCOUNT") or "10000"}
    return {
        **cache_environment(plan.site, env),
        **spins,
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUTF8": "1",  # names of files, whatever the locale
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        # HF_HUB_OFFLINE covers hub, transformers and datasets, but HF_DATASETS_OFFLINE=0 would override it.
        **(
            {
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
                "HF_EVALUATE_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            if offline
            else {}
        ),
    }


def without_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables of a launcher (torchrun, accelerate, MPI): a process that has them waits for others
    that do not exist. afina's own launcher sets them anew."""
    return {name: value for name, value in env.items() if not _LAUNCHER.fullmatch(name)}


def host_environment(plan: Plan, *, offline: bool) -> dict[str, str]:
    """The whole environment of a worker that is started on this host: this process's, the site's, and the worker's own.

    Args:
        offline: without network; otherwise with the Hub's token.
    """
    here = without_isolation({**os.environ, **environment(plan.site)})
    token = {} if offline else hub_token(here)
    return {**here, **worker_environment(plan, offline=offline, env=here), **token}


def accelerate_argv(
    geometry: Geometry,
    *,
    node: int,
    head: str,
    port: int,
    config: Path,
    python: str,
    command: Sequence[str],
    meet_s: int = MEET_S,
) -> list[str]:
    """`accelerate launch` for one node. `--multi_gpu` also on CPU: its `--cpu` with several processes expects MPI.

    Args:
        meet_s: seconds that the nodes wait for each other at the start.
    """
    return [
        python,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--multi_gpu",
        "--num_machines",
        str(geometry.nodes),
        "--num_processes",
        str(geometry.num_processes),
        "--machine_rank",
        str(node),
        "--main_process_ip",
        head,
        "--main_process_port",
        str(port),
        "--rdzv_backend",
        "static",
        "--rdzv_conf",
        f"timeout={meet_s}",
        "--same_network",
        "--max_restarts",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        *command,
    ]


def slurm_options(plan: Plan) -> dict[str, str | int]:
    """The options of a job, by the long names of sbatch's options; True is one without a value.

    The site's `SBATCH_*` add to it from the environment, and its spelling of GPUs, extras and omissions are in it.
    """
    resources, geometry, site = plan.recipe.resources, plan.geometry, plan.site
    options: dict[str, str | int] = {
        "job-name": plan.recipe.name,
        "nodes": geometry.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": resources.cpus_per_gpu * geometry.processes_per_node,
        "time": resources.time,
        # Over SBATCH_EXPORT, and over what a site sets: the job needs the variables of its submission.
        "export": "ALL",
    }
    if geometry.gpus_per_node:
        options |= _gpu_options(site.gpu_request, geometry.gpus_per_node)
    if resources.mem_gb:
        options["mem"] = f"{resources.mem_gb}G"
    # sbatch (22.05 to 25.05) reads no variables for these two; in the site they are named as if it did.
    for option in ("mail-type", "mail-user"):
        if value := plan.site.sbatch.get(f"SBATCH_{option.upper().replace('-', '_')}"):
            options[option] = value
    options = {name: value for name, value in options.items() if name not in site.sbatch_omit}
    for line in site.sbatch_extra:
        name, equals, value = line.removeprefix("--").partition("=")
        if name == "gres" and "gres" in options:
            value = f"{options['gres']},{value}"  # sbatch takes the last --gres alone
        options[name] = value if equals else True
    return options


def _gpu_options(request: str, count: int) -> dict[str, str | int]:
    """`gres:a100` and 2 -> `--gres=gpu:a100:2`: older Slurm, and sites that name a type, want that spelling."""
    kind, _, name = request.partition(":")
    number: str | int = f"{name}:{count}" if name else count
    if kind == "none":
        return {}
    return {"gres": f"gpu:{number}"} if kind == "gres" else {"gpus-per-node": number}


def sbatch_options(plan: Plan, changes: Mapping[str, str | int] | None = None) -> list[str]:
    """`slurm_options`, with some of them changed, as sbatch's words; an option without a value is True there."""
    options = {**slurm_options(plan), **(changes or {})}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


def sbatch_argv(plan: Plan, run: Path) -> list[str]:
    """The submission of a claimed run, with the batch script that was copied into it."""
    log = f"{plain_path(run)}/slurm-%j.out"
    return ["sbatch", "--parsable", *sbatch_options(plan), f"--output={log}", str(run / "finetune.sbatch"), str(run)]


def array_argv(plan: Plan, script: Path, arguments: Sequence[str], tasks: int, log: Path) -> list[str]:
    """The submission of a script as a job array of so many tasks, or as a plain job where one is enough.

    Args:
        log: the jobs' logs are called like this file, `.slurm-<job>` behind it.
    """
    number = "%A_%a" if tasks > 1 else "%j"
    array = [f"--array=0-{tasks - 1}"] if tasks > 1 else []
    return [
        "sbatch",
        "--parsable",
        *sbatch_options(plan),
        *array,
        f"--output={plain_path(log)}.slurm-{number}.out",
        str(script),
        *arguments,
    ]


def sweep_argv(
    plan: Plan, sweep: Path, tasks: Sequence[int], *, first: int = 0, at_once: int | None = None
) -> list[str]:
    """The submission of some of a sweep's cells as one job array.

    Args:
        tasks: the array's tasks; task n is cell `first + n`.
        at_once: how many of them may run at the same time; None is as many as Slurm lets.
    """
    array = _ranges(tasks) + (f"%{at_once}" if at_once else "")
    log = plain_path(sweep) + "/logs/%A_%a.out"
    script = [str(sweep / "finetune.sbatch"), str(sweep), *([str(first)] if first else [])]
    return ["sbatch", "--parsable", *sbatch_options(plan), f"--array={array}", f"--output={log}", *script]


def plain_path(path: Path) -> str:
    """A path in sbatch's file names, where `%` starts a pattern; a doubled one is a plain one.

    Raises:
        InputError: a backslash in it: Slurm then expands no pattern and takes backslashes away, differently in different versions.
    """
    if "\\" in str(path):
        raise InputError(
            f"{path}: Slurm cannot write a job's log into a folder with a backslash in its name",
            "choose another folder: --run DIR, or AFINA_SCRATCH; or train here with `afina train`",
        )
    return str(path).replace("%", "%%")


def job_scripts(names: Sequence[str] = ("finetune.sbatch", "job.sh", "node.sh")) -> dict[str, Path]:
    """The scripts that a job runs outside the container, by name; from the package, or from the checkout around it.

    A run directory holds copies: later edits do not reach a job that waits in the queue.

    Raises:
        EnvironmentProblem: they are in neither place.
    """
    folder = slurm_folder()
    return {name: folder / name for name in names}


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in spans)


def _python(plan: Plan, command: str, *arguments: str) -> list[str]:
    here = plan.site.runtime == "none"
    # -P: files beside the recipe (datasets.py, evaluate.py) are not imported in place of libraries. The image's Python is 3.12.
    safe = ["-P"] if not here or sys.version_info >= (3, 11) else []
    return [sys.executable if here else "python", *safe, "-m", "afina.worker", command, *arguments]


def _data_folders(plan: Plan) -> list[Path]:
    """Folders of the data files, and of what they are links to."""
    files = [path for paths in plan.files.values() for path in paths]
    return [folder for path in files for folder in (path.parent, path.resolve().parent)]


def _model_folders(plan: Plan) -> list[Path]:
    """The model folder, that of an adapter's base, and the folders of what their files are links to (a Hub cache is made of links)."""
    if plan.model_folder is None:
        return []
    base = adapter_base(plan.model_folder)
    folders = [plan.model_folder, *([Path(base[0])] if base and Path(base[0]).is_dir() else [])]
    linked = [p.resolve().parent for folder in folders if folder.is_dir() for p in folder.iterdir() if p.is_symlink()]
    return [*folders, *(folder.resolve() for folder in folders), *linked]


def _outermost(folders: Iterable[Path]) -> list[Path]:
    """Each folder once, none inside another."""
    kept: list[Path] = []
    for folder in sorted({f.absolute() for f in folders}, key=lambda f: (len(f.parts), str(f))):
        if not any(folder.is_relative_to(outer) for outer in kept):
            kept.append(folder)
    return kept


def _mount(folder: Path) -> str:
    """One `--mount` value: comma-separated fields, each quoted as in CSV."""
    fields = ("type=bind", f"src={folder}", f"dst={folder}")
    return ",".join('"' + field.replace('"', '""') + '"' for field in fields)
