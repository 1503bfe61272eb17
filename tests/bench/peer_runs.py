"""One run of one peer under faults: its command line, log, processes and result.

The peers are plain `Trainer` (peer.py), the same with `enable_jit_checkpoint`, and afina. Used by `peers_faults.py` and
`peers_slurm.py`. Linux only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reviews import tiny  # type: ignore[import-not-found]

__all__ = ["PEERS", "Case", "Row", "Work", "digest", "tiny_work"]

PEERS = ("trainer", "jit", "afina")
_HERE = Path(__file__).parent
_RESUMED = re.compile(r"resuming from .*(?:checkpoint|step)-(\d+)\b")
#: A line that warns of damage. Not the report of a new head, which also says `missing from the checkpoint`.
_WARNING = re.compile(
    r"(?im)^(?!.*newly initialized|resuming from)(?=.*(?:checkpoint|optimizer|rng|safetensors))"
    r".*(?:damaged|missing|corrupt|incomplete|differ|find).*$"
)
_ERROR = re.compile(r"^(?:\[rank\d\]: *)?((?:error:|[\w.]*(?:Error|Exception)\b).*)", re.MULTILINE)


@dataclass(frozen=True)
class Work:
    """The training that all peers do. `batch_size` is global; `folder` takes the runs."""

    folder: Path
    csv: Path
    model: str
    label: str = "stars"
    max_length: int = 64
    batch_size: int = 8
    steps: int = 600
    save_every: int = 40
    learning_rate: float = 1e-3
    patience: float = 60.0
    threads: int = 1

    def environment(self) -> dict[str, str]:
        own = {"AFINA_SCRATCH": str(self.folder), "HF_HOME": str(self.folder / "hf"), "HF_HUB_OFFLINE": "1"}
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false", **own}

    def command(self, peer: str, run: Path, processes: int, again: bool) -> list[str]:
        """The user's command: the same line each time for Trainer, `train` and then `resume` for afina."""
        if peer == "afina":
            number = ["--num-processes", str(processes)] if processes > 1 else []
            if again:
                return [sys.executable, "-m", "afina", "resume", str(run), *number]
            recipe = run.with_name(f"{run.name}.yaml")
            recipe.write_text(json.dumps(self.recipe()))
            return [sys.executable, "-m", "afina", "train", str(recipe), "--run", str(run), *number]
        launch = [sys.executable]
        if processes > 1:
            config = self.folder / "accelerate.yaml"
            config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\n")
            launch += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--multi_gpu"]
            launch += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
            launch += ["--dynamo_backend", "no", "--main_process_port", str(_free_port())]
        given: dict[str, Any] = {"csv": self.csv, "model": self.model, "out": run, "label": self.label}
        given |= {"max-length": self.max_length, "batch-size": self.batch_size // processes, "max-steps": self.steps}
        given |= {"save-steps": self.save_every, "learning-rate": self.learning_rate}
        options = [f"--{name}={value}" for name, value in given.items()]
        return [*launch, str(_HERE / "peer.py"), *options, *(["--jit"] if peer == "jit" else [])]

    def recipe(self) -> dict[str, Any]:
        train = {
            "batch_size": self.batch_size,
            "max_steps": self.steps,
            "save_every": self.save_every or self.steps,
            "seed": 1,
        }
        return {
            "name": "peer",
            "baselines": False,
            "model": self.model,
            "task": "single-label",
            "data": {
                "files": {"all": str(self.csv)},
                "text": "text",
                "label": self.label,
                "train": {"fraction": 0.9, "seed": 42},
                "eval": {"fraction": 0.1, "seed": 42},
            },
            "tokens": {"max_length": self.max_length},
            "train": {**train, "learning_rate": self.learning_rate, "log_every": 1, "keep": "last"},
            "metrics": ["accuracy"],
        }


@dataclass
class Row:
    """The result of one peer under one fault. `equal` and `silent` are None if the run did not finish."""

    peer: str
    fault: str
    finished: bool = False
    equal: bool | None = None
    silent: bool | None = None
    steps_repeated: int = 0
    hung: bool = False
    doubled_lines: int = 0
    exit_codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    notes: str = ""


class Case:
    """One run of one peer: start it, watch it, harm it, start it again."""

    def __init__(self, work: Work, peer: str, run: Path, rng: random.Random, processes: int = 1) -> None:
        self.work, self.peer, self.run, self.rng, self.processes = work, peer, run, rng, processes
        self.process: subprocess.Popen[bytes] | None = None
        self.outputs: list[Path] = []
        self.codes: list[int] = []
        self.notes: list[str] = []
        self.repeated = self._before = 0
        self.hung = False

    @property
    def log(self) -> Path:
        return self.run / ("metrics.jsonl" if self.peer == "afina" else "log.jsonl")

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints" if self.peer == "afina" else self.run

    @property
    def weights(self) -> Path:
        return self.run / "model/model.safetensors"

    def lines(self) -> list[dict[str, Any]]:
        """Log lines with a loss; a torn last line is left out."""
        lines = []
        for line in self.log.read_text(errors="replace").splitlines() if self.log.exists() else []:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return [line for line in lines if "loss" in line]

    def step(self) -> int:
        """The last step that was logged. Reads the end of the log only: it is called hundreds of times a second."""
        if not self.log.exists():
            return 0
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            steps = re.findall(rb'\{"step": (\d+)[^\n]*"loss"[^\n]*\}\n', file.read())
        return int(steps[-1]) if steps else 0

    def newest(self) -> Path:
        """The folder of the highest step, as `get_last_checkpoint` would take it."""
        folders = [p for p in self.checkpoints.iterdir() if re.fullmatch(r"(checkpoint|step)-\d+", p.name)]
        return max(folders, key=lambda p: int(p.name.split("-")[1]))

    def output(self, since: int = 0) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.outputs[since:])

    def start(self) -> None:
        again = bool(self.outputs) and (self.peer != "afina" or (self.run / "plan.json").exists())
        argv = self.work.command(self.peer, self.run, self.processes, again)
        self.outputs.append(self.work.folder / f"{self.run.name}.{len(self.outputs)}.out")
        with self.outputs[-1].open("wb") as out:
            env = {**self.work.environment(), "PEER_RUN": str(self.run)}
            self.process = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    def until(self, reached: Callable[[], bool], pause: float = 0.005) -> bool:
        """Wait for `reached`; False if the process ended or hung before it."""
        assert self.process is not None
        changed, before = time.monotonic(), -1
        while self.process.poll() is None:
            if reached():
                return True
            size = sum(path.stat().st_size for path in (self.log, self.outputs[-1]) if path.exists())
            if size != before:
                changed, before = time.monotonic(), size
            if time.monotonic() - changed > self.work.patience:
                self.hung = True
                self.notes.append(f"hung at step {self.step()}")
                return False
            time.sleep(pause)
        return False

    def wait(self) -> int:
        """Wait for the end of the process, or kill it if it hangs; its exit code."""
        assert self.process is not None
        self.until(lambda: False, pause=0.05)
        if self.process.poll() is not None and (left := _processes(self.run)):
            self.notes.append(f"{len(left)} processes left behind")
        self.kill()
        return self.codes[-1]

    def kill(self) -> None:
        """SIGKILL to every process of the run at once."""
        assert self.process is not None
        self.signal(signal.SIGKILL)
        self.codes.append(self.process.wait())

    def strike(self) -> None:
        """`kill` as a fault. It proves nothing about a run that has already ended, so that is noted."""
        self.kill()
        if self.codes[-1] == 0:
            self.notes.append("over before the fault")

    def signal(self, number: int) -> None:
        """A signal to every process of the run, as a batch system sends it to a step."""
        for pid in _processes(self.run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def pids(self) -> list[int]:
        return list(_processes(self.run))

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        ranks: dict[int, int] = {}
        for pid, words in sorted(_processes(self.run).items()):
            for word in words:
                if word.startswith(b"RANK="):
                    ranks.setdefault(int(word[5:]), pid)
        return [ranks[rank] for rank in sorted(ranks)]

    def complete(self) -> bool:
        return bool(self.codes) and self.codes[-1] == 0 and self.step() >= self.work.steps and self.weights.is_file()

    def finish(self) -> None:
        """Start again until the run is complete, three times at most."""
        for _ in range(3):
            if self.complete():
                return
            self.restart()
            self.wait()
            self.count()

    def restart(self) -> None:
        if self.codes and self.codes[-1] == 0 and not self.complete():
            self.notes.append(f"exit 0 and a model at step {self.step()} of {self.work.steps}")
        self._before = self.step()
        self.start()

    def count(self) -> None:
        """Add the steps that the last start repeated."""
        resumed = _RESUMED.search(self.output(len(self.outputs) - 1))
        trained = self.step() != self._before or self.codes[-1] == 0
        if trained and self._before < self.work.steps:
            self.repeated += max(0, self._before - (int(resumed[1]) if resumed else 0))

    def row(self, fault: str, undisturbed: str | None, began: float) -> Row:
        finished = self.complete()
        equal = digest(self.weights) == undisturbed if finished and undisturbed else None
        # The folder's name may hold such words.
        warnings = _WARNING.findall(self.output(1).replace(str(self.work.folder), ""))
        silent = None if equal is None else not equal and not warnings
        steps = [line["step"] for line in self.lines()]
        if self.step() > self.work.steps:
            self.notes.append(f"trained to step {self.step()} of {self.work.steps}")
        if finished:
            self.notes += [line.strip()[:160] for line in dict.fromkeys(warnings)]
        elif errors := _ERROR.findall(self.output(max(0, len(self.outputs) - 1))):
            self.notes += [errors[-1][:160]]
        return Row(
            peer=self.peer,
            fault=fault,
            finished=finished,
            equal=equal,
            silent=silent,
            steps_repeated=self.repeated,
            hung=self.hung,
            doubled_lines=len(steps) - len(set(steps)),
            exit_codes=self.codes,
            seconds=round(time.monotonic() - began, 1),
            notes="; ".join(self.notes),
        )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processes(run: Path) -> dict[int, list[bytes]]:
    """Every process of a run with its environment: also orphans. The run's name is there, or a word of the command (a fork's)."""
    processes = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, command = ((entry / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
            if b"PEER_RUN=" + os.fsencode(run) in words or os.fsencode(run) in command:
                processes[int(entry.name)] = words
    return processes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tiny_work(folder: Path, *, csv: Path | None = None, model: str | None = None, **settings: Any) -> Work:
    """`Work` in `folder`, by default with a tiny model and synthetic reviews that it can learn, which are written there."""
    csv = csv or tiny.write_csv(folder / "reviews.csv", tiny.tiny_reviews(400, 7))
    model = model or str(tiny.tiny_model(folder / "tiny", hidden=128))
    return Work(folder=folder, csv=csv.absolute(), model=model, **settings)
