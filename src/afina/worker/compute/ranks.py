"""Collectives of the training processes, each the identity where there is only one; and a model sharded over them (FSDP2).

Not covered: failures. A rank that dies makes the others wait; the watchdog and the supervisor end them.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from afina.worker.model.weights import input_embeddings

__all__ = [
    "barrier",
    "count",
    "everyone",
    "from_rank_zero",
    "host_mesh",
    "leave",
    "maximum",
    "on_rank_zero",
    "rank",
    "shard",
    "total",
]


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    return dist.get_rank() if _grouped() else 0


def _alone() -> bool:
    return count() == 1


def maximum(device: torch.device, *numbers: int) -> list[int]:
    """The maximum over all ranks, of each number: one all-reduce."""
    if _alone():
        return list(numbers)
    tensor = torch.tensor(numbers, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(n) for n in tensor.tolist()]


def total(device: torch.device, number: float) -> float:
    """The sum over all ranks, in float64."""
    if _alone():
        return number
    tensor = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor)


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if _alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_zero(value: Any) -> list[Any]:
    """The values of all ranks in their order, on rank 0; an empty list on the others."""
    if _alone():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def everyone(value: Any) -> list[Any]:
    """The values of all ranks in their order, on every rank."""
    if _alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if not _alone():
        dist.barrier()


def leave() -> None:
    """Close the process group."""
    if _grouped():
        dist.destroy_process_group()


def host_mesh(timeout: datetime.timedelta) -> Any:
    """A mesh of all processes over gloo and host memory, whose collectives a thread may call beside those of the training; None for one."""
    if _alone():
        return None
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(dist.new_group(backend="gloo", timeout=timeout), "cpu")


def shard(model: Any, blocks: Sequence[torch.nn.Module], device: torch.device, *, bf16: bool) -> None:
    """Shard parameters, gradients and optimizer state over all processes, in place; before the optimizer is made. Collective.

    A block's weights are gathered while it computes, as those of the token embeddings and of all the rest (the head, norms) are.
    Each process must have built the same model; its device never holds more than one block of it.

    Args:
        blocks: the transformer blocks.
        bf16: gather in bfloat16, for products in it; gradients are reduced, and weights kept, in float32.

    Source: torch.distributed.fsdp.fully_shard (FSDP2). Not accelerate's plugin, which has no CPU processes (1.15).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (count(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    embeddings = input_embeddings(model)
    for module in (*blocks, *([] if embeddings is None else [embeddings]), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
