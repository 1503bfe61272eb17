"""Measurements that a forecast is made from: a rehearsal, earlier runs, and the work that the prepare stage found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from afina.sizes import Sizes

__all__ = ["Earlier", "Measured", "Workload"]


class Measured(BaseModel):
    """Measurements of a rehearsal, see `afina.worker.node.rehearsal`. Bytes, seconds, costs in tokens."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    device: str
    device_name: str
    threads: int
    batching: str
    parameters: int
    costs: tuple[float, ...]
    seconds: tuple[float, ...]
    mean_cost: float
    longest_tokens: int
    train_rows: int
    eval_cost: float = 0.0
    test_cost: float = 0.0
    eval_seconds_per_cost: float | None = None
    save_seconds: float | None = None
    stall_seconds: float | None = None
    checkpoint_bytes: int | None = None
    startup_seconds: float
    base_bytes: int
    peak_bytes: int
    gpu_peak_bytes: int | None = None
    gpu_total_bytes: int | None = None
    network: str = "offline variables"


@dataclass(frozen=True)
class Workload:
    """The work of a run, as the prepare stage knows it.

    Attributes:
        rows, tokens: by split.
        simple_models: they are trained beside it.
        sizes: None where the model's files do not tell them.
    """

    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    simple_models: bool = False
    sizes: Sizes | None = None


@dataclass(frozen=True)
class Earlier:
    """A finished run of the same model, lengths and geometry.

    Attributes:
        other_seconds: evaluations, saves and the end.
        evaluated_tokens: of all evaluations and of test.
        simple_seconds: of the simple models beside it; None: it had none.
        save_seconds: of the longest save.
        peak_gb: largest memory of a process, on a GPU that of the GPU.
    """

    name: str
    device: str
    tokens_per_second: float
    startup_seconds: float
    other_seconds: float
    evaluated_tokens: int
    peak_gb: float | None = None
    simple_seconds: float | None = None
    save_seconds: float = 0.0
