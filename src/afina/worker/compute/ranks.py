"""Collectives of the training processes. Each is the identity where there is only one process.

Not covered: failures. A rank that dies makes the others wait; the watchdog and the supervisor end them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

__all__ = ["barrier", "count", "everyone", "from_rank_zero", "leave", "maximum", "on_rank_zero", "rank", "total"]


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
