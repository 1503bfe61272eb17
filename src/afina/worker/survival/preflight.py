"""Preflight checks: enough disk space, ranks that reach each other, clocks that agree. They precede the first step.

Not covered: a quota that `statvfs` does not show (Lustre, GPFS). Not measured: GPUs and InfiniBand, where the same code runs
over NCCL.
"""

from __future__ import annotations

import datetime
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from afina.errors import EnvironmentProblem, TrainingError
from afina.recipe.keys.train_keys import Train
from afina.run.directory import RunDir
from afina.sizes import Sizes
from afina.text import plural, size_in_words
from afina.worker.compute import ranks

__all__ = ["check_ranks", "check_room"]

#: How long the ranks wait for each other once all have started.
_MEET = datetime.timedelta(minutes=5)
#: With a larger difference of clocks (seconds) times in logs and the remaining time are wrong.
_SKEW_S = 5.0
_FEW_INODES = 200
_SMALL_SHM = 64_000_000


def check_room(run: RunDir, sizes: Sizes, train: Train) -> dict[str, Any]:
    """Check the space for all that exists at the same time: the kept checkpoints, the best, the one being written, the model.

    Raises:
        EnvironmentProblem: too few bytes or inodes are free, or files may not be so large (`ulimit -f`).
    """
    present = sum(f.stat().st_size for f in Path(run.checkpoints).glob("step-*/*") if f.is_file())
    keep, one, best = train.keep_checkpoints, sizes.checkpoint, train.keep == "best"
    needed = max(one + sizes.exported, sizes.of_run(keep, best=best) - present)
    space = os.statvfs(run.path)
    free = space.f_bavail * space.f_frsize
    if free < needed:
        what = f"{plural(keep, 'checkpoint')}, one that is written{', the best one' * best} and the model"
        raise EnvironmentProblem(
            f"{run.path}: {what} need {size_in_words(needed)}, {size_in_words(free)} are free",
            "free space (old runs, caches), lower train.keep_checkpoints, or choose another --run DIR",
            cause="disk",
        )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < sizes.exported:  # the weights alone
        raise EnvironmentProblem(
            f"files may have {limit:,} bytes here (ulimit -f), and a checkpoint has {one:,}",
            "raise the limit in the site file, or ask your administrators",
            cause="disk",
        )
    if space.f_files and space.f_favail < _FEW_INODES:
        raise EnvironmentProblem(
            f"{run.path}: only {space.f_favail} inodes are free",
            "remove small files (old runs, caches), or choose another --run DIR",
        )
    return {"needed_gb": round(needed / 1e9, 3), "free_gb": round(free / 1e9, 3)}


def check_ranks(device: torch.device, local_world: int) -> dict[str, Any]:
    """Let all ranks exchange a message and compare clocks; an error names the missing ranks. Collective.

    Args:
        device: of this rank.
        local_world: processes on this node.

    Returns:
        allreduce_gb_per_s: bytes of one vector of 16 MB over the time of one all-reduce; clock_skew_s; hosts; warnings.

    Raises:
        TrainingError: not all ranks answered within five minutes.
    """
    if ranks.count() == 1:
        return {"warnings": []}
    side = dist.new_group(backend="gloo", timeout=_MEET)
    try:
        dist.monitored_barrier(group=side, timeout=_MEET, wait_all_ranks=True)
    except RuntimeError as error:
        raise TrainingError(
            f"the processes cannot reach each other: {str(error).splitlines()[0]} ({local_world} ranks on each node)",
            "exclude the node of those ranks, and check NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and firewalls",
        ) from None
    names = ranks.everyone((platform.node(), time.time()))
    vector = torch.ones(4_000_000, device=device)
    dist.all_reduce(vector)  # the first call opens connections
    _synchronize(device)
    began = time.perf_counter()
    dist.all_reduce(vector)
    _synchronize(device)
    seconds = time.perf_counter() - began
    dist.destroy_process_group(side)
    clocks = [when for _, when in names]
    skew = max(clocks) - min(clocks)
    warnings = []
    if skew > _SKEW_S:
        late = names[clocks.index(max(clocks))][0], names[clocks.index(min(clocks))][0]
        warnings.append(
            f"the clocks of {late[0]} and {late[1]} differ by {skew:.1f} s: ask the administrators to synchronise them"
        )
    shm = Path("/dev/shm")
    if (
        ranks.rank() == 0
        and local_world > 1
        and shm.is_dir()
        and (room := os.statvfs(shm)).f_bavail * room.f_frsize < _SMALL_SHM
    ):
        warnings.append(
            "/dev/shm has less than 64 MB: NCCL may fail between GPUs of a node; do not start the container with --contain"
        )
    return {
        "allreduce_gb_per_s": round(vector.numel() * 4 / seconds / 1e9, 3),
        "clock_skew_s": round(skew, 3),
        "hosts": sorted({host for host, _ in names}),
        "warnings": warnings,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
