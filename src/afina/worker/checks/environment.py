"""Does the inside of the image hold what a run needs? And do the processes of a job reach each other?

    python -m afina.worker doctor                       the checks of this environment, each reported as it ends
    python -m afina.worker check-node FOLDER COUNT      of a node in a job: its checks, then COUNT processes that meet the others

A line has check, level (ok, warning, failed), message and remedy. What is written in FOLDER, one file of lines a node, is read by
`afina.doctor.job`; the exit code of `check-node` is 3 where something failed. GPUs, NCCL and InfiniBand were not at hand: those lines are
written from documentation.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from afina.run.allocation import Allocation
from afina.site.gpus import DRIVER_FILE, driver_version, fits_driver, minimum_driver
from afina.site.settings import CACHE_VARIABLES, in_container
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

Line = tuple[str, str, str, str]


def answer(arguments: list[str]) -> dict[str, Any]:
    """Report each finding; the answer counts them."""
    levels = []
    for line in _run_checks(CHECKS):
        report(dict(zip(("check", "level", "message", "remedy"), line, strict=True)))
        levels.append(line[1])
    return {"checks": len(levels), "failed": levels.count("failed")}


def main(arguments: list[str]) -> int:
    """A node of the doctor's job: `check-node FOLDER COUNT` checks it and starts COUNT processes, each `check-node rank FOLDER`."""
    if arguments[0] == "rank":
        return _rank(Path(arguments[1]))
    folder, count = Path(arguments[0]), int(arguments[1])
    lines = list(_run_checks(ON_NODE))
    _write(folder, [_on_node(line) for line in lines if line[1] != "ok"] or [_on_node(_summary(lines))])
    return _ranks(folder, count)


def _run_checks(checks: Sequence[Callable[[], Iterator[Line]]]) -> Iterator[Line]:
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a broken installation may raise anything; it is what is looked for
            yield check.__name__.strip("_"), "failed", f"{type(error).__name__}: {error}", "build the image again"


def _python() -> Iterator[Line]:
    where = "in the image" if in_container() else "not in a container"
    yield "python", "ok", f"{sys.version.split()[0]}, afina {__version__}, {where}", ""
    home = os.path.realpath(Path("~/.local").expanduser())
    if any(os.path.realpath(p).startswith(home + os.sep) for p in sys.path):
        yield "python", "warning", "packages of ~/.local are visible and may win", "set PYTHONNOUSERSITE=1"


def _packages() -> Iterator[Line]:
    versions = []
    for name in _NEEDED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except Exception as error:
            yield (
                "packages",
                "failed",
                f"{name} cannot be imported: {error}",
                "build the image again from container/requirements.txt",
            )
        else:
            versions.append(f"{name} {getattr(module, '__version__', '?')}")
    yield "packages", "ok", ", ".join(versions), ""


def _cuda(driver_file: Path = DRIVER_FILE) -> Iterator[Line]:
    import torch

    built = torch.version.cuda
    driver = driver_version(driver_file)
    version = f"torch {torch.__version__}, built for {f'CUDA {built}' if built else 'the CPU'}"
    if driver is None and Allocation.from_env().gpus:
        yield (
            "cuda",
            "warning",
            f"{version}; GPUs were allocated, and this node has no NVIDIA driver: a run would train on the CPU",
            "ask for none (--gpus-per-node 0), or for a partition whose nodes have GPUs",
        )
        return
    if driver is None:
        yield "cuda", "ok", f"{version}; no NVIDIA driver here", ""
        return
    if built is None:
        yield (
            "cuda",
            "warning",
            f"{version}, and there is an NVIDIA driver",
            "build the image with a CUDA build of PyTorch to use the GPUs",
        )
        return
    minimum = minimum_driver(built)
    if minimum is not None and not fits_driver(driver, minimum):
        yield (
            "cuda",
            "failed",
            f"{version} needs driver {minimum} or newer, this is {driver}",
            "build the image for an older CUDA (Apptainer.def, TORCH_INDEX)",
        )
        return
    if not torch.cuda.is_available():
        yield (
            "cuda",
            "failed",
            f"{version}: driver {driver} is there, and torch cannot use it",
            "start the image with --nv (resources.gpus_per_node above 0 does), or exclude this node",
        )
        return
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        total = torch.cuda.get_device_properties(number).total_memory / 1e9
        ones = torch.ones(64, 64, device=f"cuda:{number}")
        works = float((ones @ ones).sum()) == 64.0**3
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        said = f"GPU {number}: {name}, {total:.0f} GB, compute capability {major}.{minor}, {bf16}, driver {driver}, CUDA {built}"
        yield (
            "cuda",
            "ok" if works else "failed",
            said,
            "" if works else "it computes wrongly: exclude this node and tell your administrators",
        )


def _metrics() -> Iterator[Line]:
    """Every metric of every task, computed without network."""
    import numpy as np

    from afina.recipe.metrics import METRICS
    from afina.worker.model.metrics import compute_metrics
    from afina.worker.model.tasks import decisions

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(24, 3)).astype(np.float32)
    answers: dict[str, Any] = {
        "single-label": np.arange(24) % 3,
        "multi-label": (rng.random((24, 3)) > 0.5).astype(np.float32),
        "regression": rng.normal(size=24).astype(np.float32),
    }
    for task, names in METRICS.items():
        given = logits[:, :1] if task == "regression" else logits
        compute_metrics(task, list(names), decisions(task, given), answers[task], given.shape[1])
    yield "metrics", "ok", f"all {sum(map(len, METRICS.values()))} computed, without network", ""


def _offline() -> Iterator[Line]:
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    if not os.environ.get("AFINA_SCRATCH"):
        return  # the image by itself: a run sets them
    off = [name for name in names if os.environ.get(name) != "1"]
    if off:
        yield (
            "offline",
            "warning",
            f"not set: {', '.join(off)}",
            "a run sets them itself; call this as `afina doctor --inside`",
        )
    else:
        yield "offline", "ok", "Hugging Face libraries are told that there is no network", ""


def _room() -> Iterator[Line]:
    for path, least, why in (
        ("/dev/shm", 64e6, "NCCL may fail between GPUs of a node"),
        (tempfile.gettempdir(), 500e6, "compilers and caches write there"),
    ):
        try:
            space = os.statvfs(path)
        except OSError as error:
            yield "room", "warning", f"{path}: {error.strerror}", why
            continue
        free = space.f_bavail * space.f_frsize
        enough = free >= least
        yield (
            "room",
            "ok" if enough else "warning",
            f"{path}: {free / 1e9:.2f} GB free",
            "" if enough else f"{why}: do not start the container with --contain",
        )


def _caches() -> Iterator[Line]:
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
        yield (
            "caches",
            "failed",
            "; ".join(closed),
            "unset it, so that it lies under AFINA_SCRATCH, or add its folder to AFINA_BIND",
        )
    else:
        yield "caches", "ok", "can be written", ""


def _compiler() -> Iterator[Line]:
    found = next((c for c in ("cc", "gcc", "g++", "clang") if shutil.which(c)), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [what for what, there in (("a C compiler", found), (str(header), header.is_file())) if not there]
    if missing:
        yield (
            "compiler",
            "warning",
            f"not here: {', '.join(missing)}",
            "only `torch_compile: true` needs them: add them to the image (APT_PACKAGES)",
        )
    else:
        yield "compiler", "ok", f"{found} and Python's headers: torch.compile can work", ""


def _rdma() -> Iterator[Line]:
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
        level = "warning" if devices or in_container() else "ok"
        yield (
            "rdma",
            level,
            f"not here: {', '.join(missing)}",
            "between nodes NCCL would silently use TCP: add libibverbs1, ibverbs-providers and librdmacm1 to the image",
        )
    else:
        yield "rdma", "ok", f"InfiniBand libraries are here; devices: {', '.join(devices) or 'none'}", ""


CHECKS: tuple[Callable[[], Iterator[Line]], ...] = (
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


#: What may differ from node to node though the image is one.
ON_NODE = (_packages, _cuda, _room, _caches)


# -- in a job ---------------------------------------------------------------------------------------------------------


def _summary(lines: list[Line]) -> Line:
    cuda = next((said for check, _, said, _ in lines if check == "cuda"), "")
    return "inside", "ok", f"{len(lines)} checks in the image; {cuda}", ""


def _on_node(line: Line) -> Line:
    check, level, said, remedy = line
    return check, level, f"{Allocation.from_env().node_name}: {said}", remedy


def _write(folder: Path, lines: list[Line]) -> None:
    """Append to this node's file; nobody else writes into it at the same time."""
    with (folder / f"lines.{Allocation.from_env().node_name}").open("a", encoding="utf-8") as file:
        for line in lines:
            file.write("\t".join(" ".join(field.split()) for field in line) + "\n")


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
            _write(folder, [("processes", "ok", f"one process on {device.type}: nobody to meet", "")])
            return 0
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=_MEET_S))
        found = check_ranks(device, world)
        dist.destroy_process_group()
    except (AfinaError, RuntimeError) as error:
        said = first_line(error)
        if rank == 0 or local == 0:
            remedy = "look at NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and firewalls between nodes"
            _write(folder, [_on_node(("processes", "failed", f"rank {rank} of {total}: {said}", remedy))])
        return 3
    if rank == 0:
        said = f"{total} processes on {', '.join(found['hosts'])} ({device.type}): all-reduce of 16 MB at {found['allreduce_gb_per_s']} GB/s, clocks {found['clock_skew_s']} s apart"
        _write(
            folder,
            [
                ("processes", "ok", said, ""),
                *(("processes", "warning", w, "see docs/troubleshooting.md") for w in found["warnings"]),
            ],
        )
    return 0
