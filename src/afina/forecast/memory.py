"""Memory of a run, from a rehearsal or from earlier runs. Pure: numbers in, numbers out. Memory on GPUs was not measured."""

from __future__ import annotations

from collections.abc import Sequence

from afina.forecast.measurements import Earlier, Measured, Workload
from afina.run.plan import Plan
from afina.sizes import Sizes

__all__ = ["GB", "memory_bytes", "shares"]

GB = 1e9
#: Python, torch, transformers and their libraries before a model is loaded: 0.37 GB, measured on a CPU.
_BASE_BYTES = 0.45e9
#: The process that starts several of them on a node: 0.23 GB.
_LAUNCHER_BYTES = 0.25e9
#: The process that trains simple models on frozen embeddings, without the weights of the model: 0.47 to 0.74 GB.
_SIMPLE_BYTES = 0.75e9
#: CUDA context, cuBLAS and NCCL buffers, which PyTorch's own count leaves out. From documentation, not measured.
_CUDA_BYTES = 1.0e9


def memory_bytes(
    plan: Plan, work: Workload, rehearsed: Measured | None, alike: Sequence[Earlier]
) -> tuple[float | None, float | None]:
    """Bytes of the busiest node, and of each GPU."""
    one = gpu = None
    peaks = [run.peak_gb * GB for run in alike if run.peak_gb]
    if rehearsed is not None:
        one = float(rehearsed.peak_bytes) + _growth(rehearsed, work.sizes)
        gpu = rehearsed.gpu_peak_bytes and rehearsed.gpu_peak_bytes + _CUDA_BYTES
    elif peaks and plan.geometry.gpus_per_node:
        gpu = max(peaks) + _CUDA_BYTES
    elif peaks:
        one = max(peaks)
    if one is None:
        return None, gpu
    # It is trained when the run's processes have ended their work, and have not given their memory back.
    beside = _SIMPLE_BYTES + (work.sizes.weights if work.sizes else 0) if work.simple_models else 0
    beside += _LAUNCHER_BYTES if plan.geometry.num_processes > 1 else 0
    if rehearsed is not None and shares(plan) > 1 and work.sizes:
        host, gpu = _sharded_memory(plan, work.sizes, one, gpu)
        return host + beside, gpu
    if rehearsed is not None and plan.recipe.train.keep == "best" and work.sizes:
        one += work.sizes.exported  # the best weights are read beside the last ones
    # The first process of a run holds a copy of its state while a checkpoint is written.
    other = max(one - (work.sizes.checkpoint if work.sizes else 0), _BASE_BYTES)
    return one + (plan.geometry.processes_per_node - 1) * other + beside, gpu


def _growth(rehearsed: Measured, sizes: Sizes | None) -> float:
    """The memory that further steps take on a CPU, where batches of other lengths fragment the heap: as much again as the activations of the rehearsal.

    Measured on five runs, from a tiny model to BERT base: 0.7 to 1.0 times.
    """
    kept = sizes.state + sizes.checkpoint if sizes else 0
    return max(0, rehearsed.peak_bytes - rehearsed.base_bytes - kept) if rehearsed.device == "cpu" else 0


def shares(plan: Plan) -> int:
    """Among how many processes weights, gradients and optimizer state are divided."""
    return plan.geometry.num_processes if plan.recipe.train.sharding != "none" else 1


def _sharded_memory(plan: Plan, sizes: Sizes, host: float, gpu: float | None) -> tuple[float, float | None]:
    """Of the busiest node and of each GPU, from that of a rehearsal, whose process held the whole model: computed, not measured.

    Each process reads the whole model into host memory before it keeps its share.
    """
    elsewhere = 1 - 1 / shares(plan)
    state, copy = sizes.state * elsewhere, sizes.checkpoint * elsewhere
    one = max(host - copy - (0 if gpu else state), _BASE_BYTES + sizes.weights)
    return plan.geometry.processes_per_node * one, gpu and max(gpu - state, _CUDA_BYTES)
