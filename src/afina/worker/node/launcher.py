"""Start a node's training processes, inside the container: compare plan and allocation, then become them.

One process becomes Python itself; several become `accelerate launch` with every option given (it would otherwise read a
file in the user's cache) and the static rendezvous at the head node.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import sys
import time
from pathlib import Path

from afina.errors import AfinaError, EnvironmentProblem
from afina.files import write_atomic
from afina.run.allocation import Allocation, socket_interface
from afina.run.commands import MEET_S, accelerate_argv, without_launcher, worker_environment
from afina.run.directory import RunDir
from afina.run.plan import Geometry, Plan, check_cores, geometry_for
from afina.site.gpus import DRIVER_FILE, driver_version, mig_slices, visible
from afina.version import __version__
from afina.worker.compute.cpu import processor
from afina.worker.data.stage_in import VARIABLE, stage

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Replace this process by the node's training processes; returns only on an error."""
    run, allocation = RunDir(argv[0]), Allocation.from_env()
    attempt, node = allocation.attempt, _node(allocation)
    env = without_launcher(os.environ)
    try:
        plan = run.plan()
        geometry = _geometry(plan, allocation)
        folder = run.begin_attempt(attempt)
        env |= worker_environment(plan, offline=True)
        # Proof that a worker began here: a node of the allocation without one is broken.
        write_atomic(folder / f"node{node}.json", json.dumps({"host": platform.node()}) + "\n")
        devices = _devices(allocation)
        if node == 0:
            write_atomic(folder / "env.json", json.dumps(_facts(geometry, allocation), indent=2) + "\n")
            run.event(
                "attempt_started",
                attempt=attempt,
                nodes=geometry.nodes,
                processes=geometry.num_processes,
                devices=devices,
            )
        if allocation.in_job and allocation.stage is not None:
            copied = stage(run.prepared(), allocation.stage, attempt)
            print(f"afina: {allocation.node_name}: {copied.message}", flush=True)
            env |= {VARIABLE: str(copied.folder)} if copied.folder else {}
        command = _command(run, geometry, allocation, devices, env)
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if run.attempts.is_dir():
            with contextlib.suppress(AfinaError):
                run.report_failure(attempt, f"node{node}", error.failure)
                if node == 0:
                    run.record_failure(attempt, error.failure)
        return error.exit_code
    sys.stdout.flush()
    os.execve(command[0], command, env)


def _node(allocation: Allocation) -> int:
    return allocation.node if allocation.in_job else 0


def _geometry(plan: Plan, allocation: Allocation) -> Geometry:
    """The plan's geometry, or the allocation's if that differs (then the global batch must still divide)."""
    if not allocation.in_job:
        if allocation.num_processes:
            return geometry_for(plan.recipe, allocation.num_processes, nodes=1)
        check_cores(plan.geometry.processes_per_node)
        if plan.geometry.nodes > 1:
            raise EnvironmentProblem(
                f"the plan is for {plan.geometry.nodes} nodes and this is one machine",
                "submit it, or start anew with --num-processes",
            )
        return plan.geometry
    gpus = _allocated_gpus(allocation)
    per_node = gpus or (1 if plan.geometry.gpus_per_node else plan.geometry.processes_per_node)
    if (allocation.nodes, per_node) == (plan.geometry.nodes, plan.geometry.processes_per_node):
        return plan.geometry
    return geometry_for(plan.recipe, per_node, nodes=allocation.nodes)


def _allocated_gpus(allocation: Allocation) -> int:
    return len(visible(os.environ) or ()) if allocation.gpus is None else allocation.gpus


def _devices(allocation: Allocation) -> str:
    """`cuda` or `cpu`. With a driver, GPUs that were allocated and cannot be used are a broken node.

    Without a driver there is no GPU to lose: it trains on the CPU, with a warning. Not measured on a GPU.

    Raises:
        EnvironmentProblem: the node has an NVIDIA driver and torch cannot use it.
    """
    if DRIVER_FILE.exists():
        import torch

        if torch.cuda.is_available():
            return "cuda"
        raise EnvironmentProblem(
            f"{allocation.node_name}: there is an NVIDIA driver ({driver_version() or 'version unknown'}), and torch {torch.__version__} "
            f"(CUDA {torch.version.cuda}) cannot use it",
            "use an image whose CUDA fits the driver (afina image info), start it with --nv, or exclude this node",
            cause="node",
            nodes=(allocation.node_name,),
        )
    if _allocated_gpus(allocation) and _node(allocation) == 0:
        print(
            "afina: WARNING: GPUs were allocated, and this node has no NVIDIA driver: training on the CPU",
            file=sys.stderr,
            flush=True,
        )
    return "cpu"


def _command(run: RunDir, geometry: Geometry, allocation: Allocation, devices: str, env: dict[str, str]) -> list[str]:
    """The command that this process becomes; adds to its environment `env`."""
    cores = allocation.cores() if allocation.in_job else len(os.sched_getaffinity(0))
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores // geometry.processes_per_node)))
    train = ["-m", "afina.worker", "train", str(run.path)]
    if geometry.num_processes > 1 and devices == "cuda" and (slices := mig_slices(env)):
        # A process sees the first slice that is named to it and no other, and NCCL joins no slices. Read, not measured.
        raise EnvironmentProblem(
            f"{allocation.node_name}: {geometry.num_processes} processes on slices of GPUs (MIG: {', '.join(slices)}), which cannot work together",
            "ask for one slice (resources.gpus_per_node: 1), or for whole GPUs (AFINA_GPU_REQUEST=gres:TYPE)",
        )
    if geometry.num_processes == 1:
        if devices == "cuda":
            # Plain Python that sees several GPUs would silently use nn.DataParallel.
            env["CUDA_VISIBLE_DEVICES"] = (visible(env) or ("0",))[0]
        return [sys.executable, *train]
    if geometry.nodes > 1 and allocation.head is None:
        raise EnvironmentProblem(
            "AFINA_HEAD is not set: the other nodes do not know where to meet",
            "start multi-node runs through slurm/finetune.sbatch or afina submit",
        )
    if devices == "cpu":
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each rank would warn about find_unused_parameters
    # torchrun dies of USR1 unless it is asked to pass it on.
    env.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2")
    # It kills its processes 30 seconds after the signal, which may be in the middle of a save.
    env.setdefault("PET_SHUTDOWN_TIMEOUT", "300")
    node = _node(allocation)
    env |= socket_interface(allocation, env) if geometry.nodes > 1 else {}
    config = run.attempts / allocation.attempt / f"accelerate.node{node}.yaml"
    write_atomic(config, "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\n")
    return accelerate_argv(
        geometry,
        node=node,
        head=allocation.head or "127.0.0.1",
        port=allocation.port or _free_port(),
        config=config,
        python=sys.executable,
        command=train,
        meet_s=int(run.plan().recipe.train.arguments.get("ddp_timeout") or MEET_S),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _facts(geometry: Geometry, allocation: Allocation) -> dict[str, object]:
    """`env.json`: the machine, the versions and the allocation. No other value of the environment."""
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
        "slurm": dict(allocation.slurm),
        "allocation": allocation.to_json(),
    }


def _versions() -> dict[str, str]:
    """Installed versions, without importing the packages."""
    versions = {}
    for name in ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _hardware() -> dict[str, object]:
    """Processor, memory, GPUs and their driver, as Linux and NVIDIA's driver write them under /proc. GPUs: not measured on one."""
    memory = re.search(r"(?m)^MemTotal:\s*(\d+) kB", _proc("/proc/meminfo"))
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [match[1] for card in cards if (match := re.search(r"(?m)^Model:\s*(.+)$", _proc(str(card))))]
    return {
        "cpu": processor().name,
        "memory_gb": round(int(memory[1]) * 1024 / 1e9, 1) if memory else None,
        "gpus": models,
        "driver": driver_version(),
    }


def _proc(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
