"""Shards: the parts of model and optimizer that the processes hold, in files that any number of processes can read.

Each process writes `shard-<rank>-….safetensors` with torch.distributed.checkpoint; a file's header says where each of its tensors
lies in the whole, so that reading takes the slices that a process needs from whichever files have them. No pickle is executed.

    model.NAME               weights and buffers
    optimizer.NUMBER.NAME    optimizer state of the parameter of that number, in the order of the optimizer's groups

What is as large as the parameter it belongs to is sharded as it is; the rest of the optimizer's state (step counters, learning rates)
is alike in all processes and stays in `optimizer.pt`.

Source: torch.distributed.checkpoint.hf_storage (torch 2.13). Not covered: optimizers whose state depends on more than one number of
a weight at a time.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

__all__ = ["host_copy", "read_optimizer", "read_weights", "split_state", "whole", "write"]

#: The largest file, which is in memory twice more while it is written.
_FILE_BYTES = 1_000_000_000
_MODEL, _OPTIMIZER = "model.", "optimizer."


def split_state(
    weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of shards by their keys, and what is left of the optimizer's `state_dict`."""
    tensors = {f"{_MODEL}{name}": weight for name, weight in weights.items()}
    left: dict[int, dict[str, Any]] = {}
    for number, state in optimizer["state"].items():
        left[number] = {name: value for name, value in state.items() if not _is_sharded(value)}
        tensors |= {f"{_OPTIMIZER}{number}.{name}": value for name, value in state.items() if _is_sharded(value)}
    return tensors, {"state": left, "param_groups": optimizer["param_groups"]}


def _is_sharded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def host_copy(tensors: Mapping[str, torch.Tensor], mesh: Any) -> dict[str, torch.Tensor]:
    """A copy in host memory, of shards as shards of `mesh`; later training steps do not change it."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach().to("cpu", copy=True)
        shard = tensor.to_local().detach().to("cpu", copy=True)
        shape, stride = tensor.shape, tensor.stride()
        return DTensor.from_local(shard, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)

    return {key: copied(tensor) for key, tensor in tensors.items()}


def write(folder: Path, tensors: Mapping[str, torch.Tensor], mesh: Any) -> None:
    """Write this process's shards, and flush them to the disk. Collective over `mesh`, or alone if it is None.

    Raises:
        OSError, …: what a process met, in all of them.
    """
    files, size = {}, 0
    for key, tensor in tensors.items():
        files[key] = 1 + size // (_FILE_BYTES * (mesh.size() if mesh else 1))
        size += tensor.numel() * tensor.element_size()
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    if mesh is not None:
        distributed.barrier(mesh.get_group())  # the first one has made the folder
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(dict(tensors), storage_writer=writer, process_group=mesh and mesh.get_group(), no_dist=mesh is None)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def read_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Fill `weights`, whole or sharded over any number of processes, from the shards in `folder`."""
    _read(folder, {f"{_MODEL}{name}": weight for name, weight in weights.items()})


def read_optimizer(folder: Path, left: Mapping[str, Any], optimizer: Any) -> None:
    """Restore an optimizer from the shards in `folder`.

    Args:
        left: what `split_state` left of its `state_dict`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {number: dict(values) for number, values in left["state"].items()}
    tensors = {}
    for key in _keys(folder):
        if key.startswith(_OPTIMIZER):
            number, name = key.removeprefix(_OPTIMIZER).split(".", 1)
            tensors[key] = state[int(number)][name] = torch.zeros_like(parameters[int(number)], requires_grad=False)
    _read(folder, tensors)
    optimizer.load_state_dict({"state": state, "param_groups": left["param_groups"]})


def _keys(folder: Path) -> Iterable[str]:
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def _read(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Each process reads for itself: none waits for another, and an error is that of its process."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def whole(tensors: Mapping[str, torch.Tensor], folder: Path, *, keep: bool) -> dict[str, torch.Tensor]:
    """The whole tensors, gathered one at a time into files of `folder` that are mapped into memory, not held in it. Collective.

    Args:
        keep: on this process; on the others the result is empty.
    """
    gathered = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep and full.numel():
            gathered[name] = _on_disk(full.detach(), folder)
        elif keep:
            gathered[name] = full.detach()
    return gathered


def _on_disk(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # its space is free when the last process that maps it ends
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # where the disk is full, an error instead of a signal
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        return mapped.copy_(tensor)
