"""Checks in the image: has it all that a run needs, and do the processes of a job reach each other?

    python -m afina.worker doctor                       the checks of this environment, each reported as it ends
    python -m afina.worker check-node FOLDER COUNT      one node of a job: its checks, then COUNT processes that meet the others

`check-node` writes its findings into FOLDER, one file of lines a node, for `afina.diagnosis.job`; its exit code is 3 if something
failed. The checks of GPUs, NCCL and InfiniBand follow the documentation and were not run on such hardware.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from afina.run.allocation import Allocation, socket_interface
from afina.site.finding import Finding, Level
from afina.site.gpus import DRIVER_FILE, driver_version, fits_driver, minimum_driver
from afina.site.settings import CACHE_VARIABLES, in_container
from afina.text import plural, size_in_words
from afina.version import __version__
from afina.worker.reply import report

__all__ = ["CHECKS", "ON_NODE", "answer", "main"]

_NEEDED = (
    "torch",
    "transformers",
    "datasets",
    "evaluate",
    "accelerate",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "sklearn",
    "scipy",
    "submitit",
)
_MEET_S = 180


def answer(arguments: list[str]) -> dict[str, Any]:
    """Report each finding; the answer counts them."""
    levels = []
    for finding in _run_checks(CHECKS):
        report(finding.to_json())
        levels.append(finding.level)
    return {"checks": len(levels), "failed": levels.count("failed")}


def main(arguments: list[str]) -> int:
    """A node of the doctor's job: `check-node FOLDER COUNT` checks it and starts COUNT processes, each `check-node rank FOLDER`."""
    if arguments[0] == "rank":
        return _rank(Path(arguments[1]))
    folder, count = Path(arguments[0]), int(arguments[1])
    findings = list(_run_checks(ON_NODE))
    gpus = next((finding.message for finding in findings if finding.check == "cuda"), "")
    summary = Finding("inside", "ok", f"{plural(len(findings), 'check')} in the image; {gpus}")
    _write(folder, [_of_node(finding) for finding in findings if finding.level != "ok"] or [_of_node(summary)])
    return _ranks(folder, count)


def _run_checks(checks: Sequence[Callable[[], Iterator[Finding]]]) -> Iterator[Finding]:
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a broken installation may raise anything
            message = f"{type(error).__name__}: {error}"
            yield Finding(check.__name__.strip("_"), "failed", message, "build the image again")


def _python() -> Iterator[Finding]:
    where = "in the image" if in_container() else "not in a container"
    yield Finding("python", "ok", f"{sys.version.split()[0]}, afina {__version__}, {where}")
    home = os.path.realpath(Path("~/.local").expanduser())
    if any(os.path.realpath(p).startswith(home + os.sep) for p in sys.path):
        message = "packages in ~/.local are visible and may be imported instead"
        yield Finding("python", "warning", message, "set PYTHONNOUSERSITE=1")


def _packages() -> Iterator[Finding]:
    versions = []
    for name in _NEEDED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except Exception as error:
            remedy = "build the image again from container/requirements.txt"
            yield Finding("packages", "failed", f"{name} cannot be imported: {error}", remedy)
        else:
            versions.append(f"{name} {getattr(module, '__version__', '?')}")
    yield Finding("packages", "ok", ", ".join(versions))


def _cuda(driver_file: Path = DRIVER_FILE) -> Iterator[Finding]:
    import torch

    built = torch.version.cuda
    driver, minimum = driver_version(driver_file), minimum_driver(built)
    version = f"torch {torch.__version__}, built for {f'CUDA {built}' if built else 'the CPU'}"
    if driver is None and Allocation.from_env().gpus:
        message = f"{version}; GPUs were allocated, and this node has no NVIDIA driver: a run would train on the CPU"
        remedy = "request none (--gpus-per-node 0), or a partition whose nodes have GPUs"
        yield Finding("cuda", "warning", message, remedy)
    elif driver is None:
        yield Finding("cuda", "ok", f"{version}; no NVIDIA driver here")
    elif built is None:
        remedy = "build the image with a CUDA build of PyTorch to use the GPUs"
        yield Finding("cuda", "warning", f"{version}, and there is an NVIDIA driver", remedy)
    elif minimum is not None and not fits_driver(driver, minimum):
        message = f"{version} needs driver {minimum} or newer, this is {driver}"
        yield Finding("cuda", "failed", message, "build the image for an older CUDA (Apptainer.def, TORCH_INDEX)")
    elif not torch.cuda.is_available():
        remedy = "start the image with --nv (resources.gpus_per_node above 0 does), or exclude this node"
        yield Finding("cuda", "failed", f"{version}: driver {driver} is there, and torch cannot use it", remedy)
    else:
        for number in range(torch.cuda.device_count()):
            yield _gpu(number, driver)


def _gpu(number: int, driver: str) -> Finding:
    """One GPU: its properties, and whether a product of matrices is right."""
    import torch

    about = torch.cuda.get_device_properties(number)
    ones = torch.ones(64, 64, device=f"cuda:{number}")
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    message = (
        f"GPU {number}: {about.name}, {size_in_words(about.total_memory)}, compute capability {about.major}.{about.minor}, "
        f"{bf16}, driver {driver}, CUDA {torch.version.cuda}"
    )
    if float((ones @ ones).sum()) == 64.0**3:
        return Finding("cuda", "ok", message)
    return Finding("cuda", "failed", message, "it computes wrongly: exclude this node and tell your administrators")


def _metrics() -> Iterator[Finding]:
    """Every metric that `evaluate` is asked for, computed without network; those of entities are afina's own arithmetic."""
    import numpy as np

    from afina.recipe.metrics import METRICS
    from afina.worker.task.scoring import compute_metrics
    from afina.worker.task.tasks import decisions

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(24, 3)).astype(np.float32)
    answers: dict[str, Any] = {
        "single-label": np.arange(24) % 3,
        "multi-label": (rng.random((24, 3)) > 0.5).astype(np.float32),
        "regression": rng.normal(size=24).astype(np.float32),
    }
    for task, answer in answers.items():
        outputs = logits[:, :1] if task == "regression" else logits
        compute_metrics(task, list(METRICS[task]), decisions(task, outputs), answer, outputs.shape[1])
    yield Finding("metrics", "ok", f"all {sum(len(METRICS[task]) for task in answers)} computed, without network")


def _offline() -> Iterator[Finding]:
    if not os.environ.get("AFINA_SCRATCH"):
        return  # the image by itself; a run sets the variables
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    missing = [name for name in names if os.environ.get(name) != "1"]
    if missing:
        remedy = "a run sets them; call this as `afina doctor --inside`"
        yield Finding("offline", "warning", f"not set: {', '.join(missing)}", remedy)
    else:
        yield Finding("offline", "ok", "the Hugging Face libraries are set to work without network")


def _room() -> Iterator[Finding]:
    for path, least, why in (
        ("/dev/shm", 64e6, "NCCL may fail between GPUs of a node"),
        (tempfile.gettempdir(), 500e6, "compilers and caches write there"),
    ):
        try:
            space = os.statvfs(path)
        except OSError as error:
            yield Finding("room", "warning", f"{path}: {error.strerror}", why)
            continue
        free = space.f_bavail * space.f_frsize
        message = f"{path}: {size_in_words(free)} free"
        if free >= least:
            yield Finding("room", "ok", message)
        else:
            yield Finding("room", "warning", message, f"{why}: do not start the container with --contain")


def _caches() -> Iterator[Finding]:
    if not os.environ.get("AFINA_SCRATCH"):
        return
    closed = []
    for name in CACHE_VARIABLES:
        path = Path(os.environ.get(name) or "")
        if not os.environ.get(name):
            continue
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path):
                pass
        except OSError as error:
            closed.append(f"{name}={path}: {error.strerror}")
    if closed:
        remedy = "unset it, so that it lies under AFINA_SCRATCH, or add its folder to AFINA_BIND"
        yield Finding("caches", "failed", "; ".join(closed), remedy)
    else:
        yield Finding("caches", "ok", "can be written")


def _compiler() -> Iterator[Finding]:
    compiler = next((c for c in ("cc", "gcc", "g++", "clang") if shutil.which(c)), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [name for name, there in (("a C compiler", compiler), (str(header), header.is_file())) if not there]
    if missing:
        remedy = "only `torch_compile: true` needs them: add them to the image (APT_PACKAGES)"
        yield Finding("compiler", "warning", f"missing: {', '.join(missing)}", remedy)
    else:
        yield Finding("compiler", "ok", f"{compiler} and Python's headers: torch.compile can work")


def _rdma() -> Iterator[Finding]:
    missing = []
    for library in ("libibverbs.so.1", "librdmacm.so.1"):
        try:
            ctypes.CDLL(library)
        except OSError:
            missing.append(library)
    devices = (
        sorted(p.name for p in Path("/dev/infiniband").glob("uverbs*")) if Path("/dev/infiniband").is_dir() else []
    )
    if missing:
        remedy = (
            "NCCL would silently use TCP between nodes: add libibverbs1, ibverbs-providers and librdmacm1 to the image"
        )
        level: Level = "warning" if devices or in_container() else "ok"
        yield Finding("rdma", level, f"missing: {', '.join(missing)}", remedy)
    else:
        yield Finding("rdma", "ok", f"InfiniBand libraries are here; devices: {', '.join(devices) or 'none'}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _cuda,
    _metrics,
    _offline,
    _room,
    _caches,
    _compiler,
    _rdma,
)


#: Checks that may differ between nodes with the same image.
ON_NODE = (_packages, _cuda, _room, _caches)


# -- in a job ---------------------------------------------------------------------------------------------------------


def _of_node(finding: Finding) -> Finding:
    return replace(finding, message=f"{Allocation.from_env().node_name}: {finding.message}")


def _write(folder: Path, findings: list[Finding]) -> None:
    """Append to this node's file; no other process writes into it at the same time."""
    with (folder / f"lines.{Allocation.from_env().node_name}").open("a", encoding="utf-8") as file:
        for finding in findings:
            file.write("\t".join(" ".join(field.split()) for field in astuple(finding)) + "\n")


def _ranks(folder: Path, count: int) -> int:
    """Start this node's processes, as many as a run has, and wait for them."""
    allocation = Allocation.from_env()
    env = {
        **os.environ,
        "WORLD_SIZE": str(allocation.nodes * count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": allocation.head or "127.0.0.1",
        "MASTER_PORT": str(allocation.port or 29400),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if allocation.nodes > 1 and (chosen := socket_interface(allocation, env)):
        env |= chosen
        message = f"{socket.gethostname()} is a loopback address here: gloo and NCCL use {chosen['GLOO_SOCKET_IFNAME']}, as in a run"
        _write(folder, [_of_node(Finding("interface", "ok", message))])
    argv = [sys.executable, "-m", "afina.worker", "check-node", "rank", str(folder)]
    processes = [
        subprocess.Popen(
            argv, env={**env, "LOCAL_RANK": str(i), "RANK": str(allocation.node * count + i)}, stdin=subprocess.DEVNULL
        )
        for i in range(count)
    ]
    try:
        codes = [process.wait(timeout=_MEET_S + 60) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [1]
    finally:
        for process in processes:
            with contextlib.suppress(OSError):
                process.kill()
    return 3 if any(codes) else 0


def _rank(folder: Path) -> int:
    """Meet the other processes, exchange a vector, compare clocks."""
    import datetime

    import torch
    import torch.distributed as dist

    from afina.errors import AfinaError, first_line
    from afina.worker.survival.preflight import check_ranks

    rank, local, world = (int(os.environ[n]) for n in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    total = int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= world
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    try:
        if total == 1:
            _write(folder, [Finding("processes", "ok", f"one process on {device.type}: no other to meet")])
            return 0
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=_MEET_S))
        measured = check_ranks(device, world)
        dist.destroy_process_group()
    except (AfinaError, RuntimeError) as error:
        why = first_line(error)
        if rank == 0 or local == 0:
            remedy = "check NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and firewalls between nodes"
            _write(folder, [_of_node(Finding("processes", "failed", f"rank {rank} of {total}: {why}", remedy))])
        return 3
    if rank == 0:
        message = (
            f"{total} processes on {', '.join(measured['hosts'])} ({device.type}): all-reduce of 16 MB at "
            f"{measured['allreduce_gb_per_s']} GB/s, clocks {measured['clock_skew_s']} s apart"
        )
        warned = [Finding("processes", "warning", text, "see docs/troubleshooting.md") for text in measured["warnings"]]
        _write(folder, [Finding("processes", "ok", message), *warned])
    return 0
