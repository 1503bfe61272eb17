"""The section `resources`: nodes, GPUs, memory and time of a job."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from afina.recipe.keys.section import Section, shown
from afina.recipe.time_limit import parse_seconds

__all__ = ["Resources"]


def _slurm_time(value: Any) -> Any:
    """Minutes, rounded up."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    seconds = parse_seconds(value) if isinstance(value, str) and "." not in value else None
    if seconds is None:
        raise ValueError(f"{shown(value)} is not a time limit: write minutes (90), `HH:MM:SS` or `D-HH:MM:SS`")
    return math.ceil(seconds / 60)


#: At most Slurm's own limit of about a year.
Minutes = Annotated[int, BeforeValidator(_slurm_time), Field(ge=1, le=600_000)]


class Resources(Section):
    """The resources of a job. `time` is in minutes once read."""

    nodes: Annotated[int, Field(ge=1, le=100_000)] = 1
    gpus_per_node: Annotated[int, Field(ge=0, le=1000)] = 1
    cpus_per_gpu: Annotated[int, Field(ge=1, le=10_000)] = 4
    mem_gb: Annotated[int, Field(ge=1, le=10**6)] | None = None
    time: Minutes = 60

    @property
    def num_processes(self) -> int:
        """One process per GPU; one per node without GPUs."""
        return self.nodes * max(1, self.gpus_per_node)
