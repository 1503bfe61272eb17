"""Trackers, which receive a run's records besides the run directory: TensorBoard, Weights & Biases, MLflow.

    <run>/tracking/tensorboard/      event files
    <run>/tracking/wandb/            an offline run of the newest attempt; one id for all
    <run>/tracking/mlflow.db         an SQLite store

A job only writes files: compute nodes have no internet. The commands here upload the records to a server, or show them, where
there is internet. Imports none of the three; `afina.worker.training.tracking` writes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["TRACKERS", "sync_commands", "tracker_environment"]

#: Each tracker and the package that it needs, as pip and as Python know it.
TRACKERS: dict[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def tracker_environment(run: Path, name: str, run_id: str, env: Mapping[str, str]) -> dict[str, str]:
    """The libraries' environment variables. Those that the user has set are kept, except for paths inside the run.

    Args:
        run: the run directory.
        name: the recipe's name: runs of one recipe lie side by side.
        run_id: the run's id at Weights & Biases, the same for all attempts.
    """
    folder = run / "tracking"
    wandb_own = folder / "wandb-own"
    given = {
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": name,
        "WANDB_NAME": run.name,
        # By default its caches lie in the home, which the container does not see.
        "WANDB_CACHE_DIR": str(wandb_own),
        "WANDB_CONFIG_DIR": str(wandb_own),
        "WANDB_DATA_DIR": str(wandb_own),
        "WANDB_SILENT": "true",
        # The run's log is in the run directory already.
        "WANDB_CONSOLE": "off",
        "MLFLOW_EXPERIMENT_NAME": name,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
    }
    fixed = {
        "WANDB_DIR": str(folder),
        "WANDB_RUN_ID": run_id,
        "WANDB_RESUME": "allow",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
    }
    return {key: value for key, value in given.items() if not env.get(key)} | fixed


def sync_commands(run: Path, trackers: Iterable[str]) -> list[str]:
    """One command for each tracker that has records of this run; on a node with internet it uploads or shows them."""
    folder = run / "tracking"
    store = f"sqlite:///{folder / 'mlflow.db'}"
    commands = {
        "tensorboard": ("tensorboard", f"tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}"),
        "wandb": ("wandb", f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"),
        "mlflow": ("mlflow.db", f"mlflow ui --backend-store-uri {shlex.quote(store)}"),
    }
    return [command for name, (place, command) in commands.items() if name in trackers and (folder / place).exists()]
