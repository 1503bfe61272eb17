"""Once per node, inside the container: read the plan and the allocation, become the training processes.

One process becomes Python itself; several become `accelerate launch` with every option given (it would otherwise read a
file in the user's cache) and the static rendezvous at the head node. The node's number is read from SLURM_NODEID here, in
the task: expanded in the batch script every node would be number 0.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

from afina.errors import AfinaError, EnvironmentProblem
from afina.files import write_atomic
from afina.run.commands import accelerate_argv, worker_environment
from afina.run.directory import RunDir
from afina.run.plan import Geometry, Plan, check_cores, geometry_for
from afina.site.gpus import DRIVER_FILE, driver_version, mig_slices, visible
from afina.version import __version__
from afina.worker.compute.cpu import processor
from afina.worker.data.stage_in import stage

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Replace this process by the node's training processes; returns only on an error."""
    run = RunDir(argv[0])
    attempt = os.environ.get("AFINA_ATTEMPT") or "local-1"
    node = _node()
    try:
        plan = run.plan()
        geometry = _geometry(plan)
        folder = run.begin_attempt(attempt)
        os.environ.update(worker_environment(plan, offline=True))
        # That a worker began here: a node of the allocation that has none is a broken one.
        write_atomic(folder / f"node{node}.json", json.dumps({"host": platform.node()}) + "\n")
        devices = _devices()
        if node == 0:
            write_atomic(folder / "env.json", json.dumps(_facts(geometry), indent=2) + "\n")
            run.event(
                "attempt_started",
                attempt=attempt,
                nodes=geometry.nodes,
                processes=geometry.num_processes,
                devices=devices,
            )
        if _in_slurm() and (told := stage(run.prepared(), os.environ, attempt)):
            print(f"afina: {_node_name()}: {told}", flush=True)
        command = _command(run, geometry, node, devices)
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if run.attempts.is_dir():
            with contextlib.suppress(AfinaError):
                run.report_failure(attempt, f"node{node}", error.failure)
                if node == 0:
                    run.record_failure(attempt, error.failure)
        return error.exit_code
    sys.stdout.flush()
    os.execv(command[0], command)


def _in_slurm() -> bool:
    return os.environ.get("AFINA_LAUNCH") == "slurm" and "SLURM_JOB_ID" in os.environ


def _node() -> int:
    return int(os.environ.get("SLURM_NODEID", "0")) if _in_slurm() else 0


def _node_name() -> str:
    """As Slurm knows this node."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _geometry(plan: Plan) -> Geometry:
    """The plan's geometry, or that of the allocation where it is another one (then the global batch must still divide)."""
    if not _in_slurm():
        if asked := os.environ.get("AFINA_PROCESSES"):
            return geometry_for(plan.recipe, int(asked), nodes=1)
        check_cores(plan.geometry.processes_per_node)
        if plan.geometry.nodes > 1:
            raise EnvironmentProblem(
                f"the plan is for {plan.geometry.nodes} nodes and this is one machine",
                "submit it, or start anew with --num-processes",
            )
        return plan.geometry
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1)
    gpus = _allocated_gpus()
    per_node = gpus or (1 if plan.geometry.gpus_per_node else plan.geometry.processes_per_node)
    if (nodes, per_node) == (plan.geometry.nodes, plan.geometry.processes_per_node):
        return plan.geometry
    return geometry_for(plan.recipe, per_node, nodes=nodes)


def _allocated_gpus() -> int:
    on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isdigit():
        return int(on_node)
    return len(visible(os.environ) or ())


def _devices() -> str:
    """`cuda` or `cpu`. GPUs that were allocated and cannot be used are a broken node, where there is a driver.

    Without a driver there is no GPU to lose: then it is the CPU, said aloud. Not measured on a GPU.

    Raises:
        EnvironmentProblem: the node has an NVIDIA driver and torch cannot use it.
    """
    if DRIVER_FILE.exists():
        import torch

        if torch.cuda.is_available():
            return "cuda"
        raise EnvironmentProblem(
            f"{_node_name()}: there is an NVIDIA driver ({driver_version() or 'version unknown'}), and torch {torch.__version__} "
            f"(CUDA {torch.version.cuda}) cannot use it",
            "use an image whose CUDA fits the driver (afina image info), start it with --nv, or exclude this node",
            cause="node",
            nodes=(_node_name(),),
        )
    if _allocated_gpus() and _node() == 0:
        print(
            "afina: WARNING: GPUs were allocated, and this node has no NVIDIA driver: training on the CPU",
            file=sys.stderr,
            flush=True,
        )
    return "cpu"


def _command(run: RunDir, geometry: Geometry, node: int, devices: str) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    if _in_slurm():
        # Where Slurm binds no cores, affinity shows the whole node.
        cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK") or cores))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // geometry.processes_per_node)))
    train = ["-m", "afina.worker", "train", str(run.path)]
    if geometry.num_processes > 1 and devices == "cuda" and (slices := mig_slices(os.environ)):
        # A process sees the first slice that is named to it and no other, and NCCL joins no slices. Read, not measured.
        raise EnvironmentProblem(
            f"{_node_name()}: {geometry.num_processes} processes on slices of GPUs (MIG: {', '.join(slices)}), which cannot work together",
            "ask for one slice (resources.gpus_per_node: 1), or for whole GPUs (AFINA_GPU_REQUEST=gres:TYPE)",
        )
    if geometry.num_processes == 1:
        if devices == "cuda":
            # Plain Python that sees several GPUs would silently use nn.DataParallel.
            os.environ["CUDA_VISIBLE_DEVICES"] = (visible(os.environ) or ("0",))[0]
        return [sys.executable, *train]
    head, port = os.environ.get("AFINA_HEAD", ""), os.environ.get("AFINA_PORT", "")
    if geometry.nodes > 1 and not head:
        raise EnvironmentProblem(
            "AFINA_HEAD is not set: the other nodes cannot be told where to meet",
            "start multi-node runs through slurm/finetune.sbatch or afina submit",
        )
    if devices == "cpu":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each rank would warn about find_unused_parameters
    # torchrun sends USR1 to its own death unless it is told to pass it on.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2")
    # It kills its processes 30 seconds after the signal, which may be in the middle of a save.
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", "300")
    config = run.attempts / os.environ.get("AFINA_ATTEMPT", "local-1") / f"accelerate.node{node}.yaml"
    write_atomic(config, "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\n")
    return accelerate_argv(
        geometry,
        node=node,
        head=head or "127.0.0.1",
        port=int(port or _free_port()),
        config=config,
        python=sys.executable,
        command=train,
    )


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _facts(geometry: Geometry) -> dict[str, object]:
    """What a reader of the run needs to know of the machine. No value of the environment but Slurm's own."""
    slurm = {
        k: v
        for k, v in os.environ.items()
        if k.startswith("SLURM_JOB") or k in ("SLURM_NNODES", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT")
    }
    return {
        "afina": __version__,
        "started": time.time(),
        "host": platform.node(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": _versions(),
        "hardware": _hardware(),
        "image": os.environ.get("AFINA_IMAGE"),
        "container": os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"),
        "geometry": geometry.model_dump(),
        "slurm": slurm,
    }


def _versions() -> dict[str, str]:
    """What is installed, without importing it."""
    found = {}
    for name in ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hardware() -> dict[str, object]:
    """Processor, memory, GPUs and their driver, as Linux and NVIDIA's driver write them under /proc. GPUs: not measured on one."""
    memory = re.search(r"(?m)^MemTotal:\s*(\d+) kB", _proc("/proc/meminfo"))
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [match[1] for card in cards if (match := re.search(r"(?m)^Model:\s*(.+)$", _proc(str(card))))]
    return {
        "cpu": processor().name,
        "memory_gb": round(int(memory[1]) / 1024**2, 1) if memory else None,
        "gpus": models,
        "driver": driver_version(),
    }


def _proc(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
