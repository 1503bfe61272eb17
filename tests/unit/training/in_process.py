"""Trainings in the process of the test, and what they left."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["STEPS", "lines", "weights"]

#: Optimizer steps of the project's recipe.
STEPS = 4


def weights(trainer: Any) -> Any:
    """All parameters as one vector."""
    import torch

    return torch.cat([p.detach().float().flatten() for p in trainer.model.parameters()])


def lines(trainer: Any) -> list[dict[str, Any]]:
    """The metrics log."""
    return [json.loads(line) for line in trainer.attempt.run.metrics_file.read_text().splitlines()]
