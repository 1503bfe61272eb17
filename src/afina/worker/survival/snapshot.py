"""Snapshot: the whole state of a training at the end of one step, and the thread that writes it as a checkpoint.

Rank 0 copies model, optimizer, schedule and scaler to host memory and collects the state of the other ranks; the training
stands still for that only. A thread of rank 0 then writes and commits the copy while the training continues. One process
writes everything, so that no rank waits for another's disk. Of a sharded model each rank copies its shards, a thread of each writes
them, and that of rank 0 commits when all are written.

    model.safetensors  config.json      the weights; with an adapter adapter_model.safetensors and adapter_config.json
    shard-*.safetensors                 in their place, weights and optimizer state with `train.sharding: fsdp`
    optimizer.pt  scheduler.pt          as Trainer reads them; scaler.pt with float16
    ranks.pt                            of every rank: random state, the loss since the last log line
    trainer_state.json  progress.json   step, best metric; training time, the length of the log

Everything is loaded with `weights_only`: no pickle is executed. The copy takes as much host memory as model and
optimizer. Not measured: GPUs.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afina import files
from afina.run.directory import RunDir
from afina.worker.compute import dropout
from afina.worker.disk_errors import disk_problem
from afina.worker.survival import checkpoint as checkpoints

__all__ = [
    "PROGRESS",
    "RANKS",
    "Saver",
    "Snapshot",
    "copy_to_host",
    "random_state",
    "read_progress",
    "read_ranks",
    "set_random_state",
]

PROGRESS = "progress.json"
RANKS = "ranks.pt"


@dataclass(frozen=True)
class Snapshot:
    """A copy of the state at the end of `step`; later training steps do not change it.

    Attributes:
        write_model: writes weights and configuration; called with the staging folder and the copied weights.
        shards: of `afina.worker.survival.sharded_state`; empty where weights and optimizer are written whole.
        tensors: file name -> what `torch.save` writes.
        texts: file name -> JSON.
        about: goes into the manifest.
        protected: the step of the best evaluation, which rotation keeps.
    """

    step: int
    write_model: Callable[[Path, dict[str, torch.Tensor]], None]
    weights: dict[str, torch.Tensor]
    shards: Mapping[str, torch.Tensor]
    tensors: Mapping[str, Any]
    texts: Mapping[str, str]
    about: Mapping[str, Any]
    protected: int | None


class Saver:
    """Writes snapshots in a thread, one after the other; `begin` waits for the previous one.

    Attributes:
        seconds: the longest write so far, 0.0 before the first.
        began: start of the last write, in seconds of `time.monotonic`; before the first, the creation of this object.
    """

    def __init__(self, folder: Path, keep: int, log: Path, record: Callable[..., None], mesh: Any = None) -> None:
        """Args:
        keep: how many checkpoints to keep.
        log: the metrics log; it is flushed to disk before the checkpoint that refers to its lines.
        record: called in the thread after each commit with step, seconds, stall_s and bytes.
        mesh: of the processes that write shards, whose first commits; None: this process alone writes.
        """
        self.folder, self.keep, self.log, self.record, self.mesh = folder, keep, log, record, mesh
        self.seconds = 0.0
        self.began = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, snapshot: Snapshot, stalled_s: float) -> None:
        """Write `snapshot` in the background.

        Args:
            stalled_s: seconds that the training stood still for it.

        Raises:
            EnvironmentProblem: the previous one could not be written.
        """
        self.finish()
        self.began = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(snapshot, stalled_s), name="afina-save", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the write that is under way.

        Raises:
            EnvironmentProblem: it failed; existing checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise the error of a failed write, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot, stalled_s: float) -> None:
        staging: Path | None = None
        try:
            commits = self.mesh is None or self.mesh.get_rank() == 0
            if commits:
                staging = checkpoints.stage(self.folder, snapshot.step)
            if snapshot.shards:
                from afina.worker.survival import sharded_state

                sharded_state.write(checkpoints.staging_folder(self.folder, snapshot.step), snapshot.shards, self.mesh)
            if not commits:
                return
            assert staging is not None
            snapshot.write_model(staging, snapshot.weights)
            for name, value in snapshot.tensors.items():
                torch.save(value, staging / name)
            for name, text in snapshot.texts.items():
                (staging / name).write_text(text, encoding="utf-8")
            if self.log.exists():
                files.sync_file(self.log)
            path = checkpoints.commit(staging, snapshot.step, snapshot.about)
            checkpoints.rotate(self.folder, self.keep, snapshot.protected)
            seconds = time.monotonic() - self.began
            self.seconds = max(self.seconds, seconds)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            self.record(step=snapshot.step, seconds=round(seconds, 3), stall_s=round(stalled_s, 3), bytes=size)
        except BaseException as error:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)  # frees the space that was missing
            again = f"`{RunDir(self.folder.parent).continue_command}`: the previous checkpoint is untouched"
            problem = disk_problem(error, self.folder, again)
            self._error = error if problem is None else problem.about("a checkpoint cannot be written")


def copy_to_host(value: Any, seen: dict[Any, torch.Tensor] | None = None) -> Any:
    """A copy of `value` with every tensor in host memory; tensors that share memory share it in the copy."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device) if value.numel() else id(value)
        if key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, Mapping):
        return {k: copy_to_host(v, seen) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_host(v, seen) for v in value)
    return value


def random_state() -> dict[str, Any]:
    """Random states of this process: Python, NumPy, torch on the CPU, the fast dropout, and the GPU in use; plain values and tensors."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "cpu": torch.random.get_rng_state(),
        "dropout": dropout.state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the result of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["cpu"])
    dropout.set_state(state["dropout"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def read_progress(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def read_ranks(folder: Path) -> list[dict[str, Any]]:
    """The entries of all ranks in a checkpoint: `random` (see `random_state`), `loss` and `logged`."""
    value = torch.load(folder / RANKS, weights_only=True)
    assert isinstance(value, list)
    return value
