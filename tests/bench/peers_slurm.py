"""Faults from a real Slurm, against submitit's own requeue of a plain `Trainer` and against afina.

Brings up the test cluster of tests/slurm in a folder of its own and takes it down (root, see there); the jobs belong to an ordinary user.
Called by `peers_faults.py --where slurm`. The peers:

    submitit         peer_submitit.py, Python of the host
    submitit-image   the same with `apptainer exec IMAGE python`, where an image is given
    afina            `afina submit`: in the image, or with Python of the host if there is none

A job that ends unfinished is not submitted again: only requeues by the peer itself count. The ordinary user's Python has the packages
of the Python that runs this. Not covered: several nodes, accounting, GPUs.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from peer_runs import Case, Row, Work, digest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "slurm"))  # its modules name each other without a package
from cluster import TERMINAL, Cluster, missing_programs

__all__ = ["SLURM_FAULTS", "SLURM_PEERS", "compare_on_slurm"]

SLURM_PEERS = ("submitit", "submitit-image", "afina")
_HERE = Path(__file__).resolve().parent
#: Seconds until an ended job counts as ended: one that requeues itself looks ended for a moment.
_SETTLED_S = 4.0


class Job(Case):
    """One run of one peer as a batch job."""

    def __init__(
        self, work: Work, peer: str, run: Path, rng: random.Random, cluster: Cluster, image: Path | None, python: str
    ) -> None:
        super().__init__(work, "afina" if peer == "afina" else "trainer", run, rng)
        self.called, self.cluster, self.python = peer, cluster, python
        self.image = image if peer != "submitit" else None
        self.job = ""

    def start(self) -> None:
        """Submit as the ordinary user."""
        import afina

        paths = [str(Path(afina.__file__).parents[1]), sysconfig.get_paths()["purelib"]]
        keep = ("AFINA_SCRATCH", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
        env = {name: value for name, value in self.work.environment().items() if name in keep}
        env |= {"PYTHONPATH": os.pathsep.join(paths), "PEER_RUN": str(self.run)}
        env |= {"AFINA_IMAGE": str(self.image)} if self.image else {"AFINA_RUNTIME": "none"}
        argv = self._afina() if self.called == "afina" else self._submitit()
        done = self.cluster.run_as_user([self.python, *argv], env=env, cwd=self.work.folder)
        jobs = re.findall(r"(?:submitted job |^)(\d+)", done.stdout, re.MULTILINE)
        if done.returncode or not jobs:
            raise RuntimeError(f"{self.called}: cannot be submitted: {done.stdout}{done.stderr}")
        self.job = jobs[-1]

    def _submitit(self) -> list[str]:
        options = self.work.command("trainer", self.run, 1, False)[2:]
        for name in ("peer.py", "peer_submitit.py"):  # a folder that the user and the image can read
            shutil.copy(_HERE / name, self.work.folder)
        argv = ["peer_submitit.py", "--folder", f"{self.run}.jobs", "--script", str(self.work.folder / "peer.py")]
        if self.image:
            words = ["apptainer", "exec", "--bind", str(self.work.folder), str(self.image), "python"]
            argv += ["--python", shlex.join(words)]
        return [*argv, "--", *options]

    def _afina(self) -> list[str]:
        recipe = self.work.recipe() | {"resources": {"gpus_per_node": 0, "cpus_per_gpu": 1, "time": 30}}
        file = self.run.with_name(f"{self.run.name}.yaml")
        file.write_text(json.dumps(recipe))
        file.chmod(0o644)
        return ["-m", "afina", "submit", str(file), "--run", str(self.run)]

    def until(self, reached: Callable[[], bool], pause: float = 0.01) -> bool:
        """Wait for `reached`; False if the job ended before, or hung."""
        changed, before, checked, over = time.monotonic(), -1, 0.0, 0.0
        while not reached():
            now = time.monotonic()
            step = self.step()
            if self.peer == "afina" and step < self._before:  # a resumed run removes lines
                self.repeated += self._before - self._began_at()
            self._before = step
            if now - checked > 0.5:
                checked = now
                ended = self.cluster.job(self.job)["JobState"] in TERMINAL
                over = (over or now) if ended else 0.0
                if over and now - over > _SETTLED_S:
                    return False
            if (size := self.log.stat().st_size if self.log.exists() else 0) != before:
                changed, before = now, size
            if now - changed > self.work.patience:
                self.hung = True
                self.notes.append(f"hung at step {self.step()}")
                return False
            time.sleep(pause)
        return True

    def wait(self) -> int:
        self.until(lambda: False, pause=0.1)
        job = self.cluster.job(self.job)
        self.cluster.root(["scancel", self.job], check=False)
        self.notes.append(f"job {job['JobState']}, {job['Restarts']} restarts")
        logs = self.run / "attempts" if self.peer == "afina" else Path(f"{self.run}.jobs")
        self.outputs = sorted([*logs.rglob("*.log"), *logs.rglob("*log.out"), *logs.rglob("*log.err")])
        self.codes.append(0 if job["JobState"] == "COMPLETED" else 1)
        return self.codes[-1]

    def _began_at(self) -> int:
        """The step from which afina's last attempt resumed."""
        events = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return int([event["step"] for event in events if event["event"] == "training"][-1])

    def strike_between(self, low: float, high: float, harm: Callable[[Job], None]) -> None:
        """Harm the job at a random step."""
        step = self.rng.randint(int(low * self.work.steps), int(high * self.work.steps))
        if self.until(lambda: self.step() >= step):
            harm(self)
        else:
            self.notes.append("over before the fault")


def _warn(job: Job) -> None:
    """The warning that each requests from Slurm: submitit USR2 to the step, afina USR1 to the batch shell."""
    how = ["--batch", "--signal=USR1"] if job.peer == "afina" else ["--signal=USR2"]
    job.cluster.root(["scancel", *how, job.job])


def _requeue(job: Job) -> None:
    job.cluster.root(["scontrol", "requeue", job.job])


def _kill(job: Job) -> None:
    """SIGKILL to the process that trains, which is the largest of the job."""
    pids = job.pids()
    os.kill(max(pids, key=lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1])), signal.SIGKILL)


#: Name -> title in the table, and the fault, which strikes once between 20 and 60 % of the run.
SLURM_FAULTS: dict[str, tuple[str, Callable[[Job], None]]] = {
    "warning": ("the signal before the time limit", _warn),
    "requeue": ("scontrol requeue", _requeue),
    "kill": ("SIGKILL to the training process", _kill),
}


def compare_on_slurm(
    work: Work,
    *,
    image: Path | None,
    python: str,
    peers: Sequence[str] = SLURM_PEERS,
    tell: Callable[[Row], Row],
    faults: Sequence[str] = tuple(SLURM_FAULTS),
    seed: int,
) -> list[Row]:
    """Every fault against every peer, each first undisturbed.

    Raises:
        RuntimeError: no Slurm here, or an undisturbed run fails.
    """
    if missing := missing_programs(accounting=False):
        raise RuntimeError(f"not installed: {', '.join(missing)}; run tests/slurm/install.sh")
    rows = []
    work.folder.chmod(0o755)
    with Cluster(work.folder / "slurm", accounting=False, requeue_delay_s=5, kill_wait_s=4) as cluster:
        for path in (work.folder, *(p for p in work.folder.rglob("*") if not p.is_relative_to(cluster.state))):
            shutil.chown(path, cluster.user, cluster.user)
        for peer in (peer for peer in peers if image or peer != "submitit-image"):
            undisturbed: str | None = None
            for fault in ("none", *faults):
                rng = random.Random(f"{seed} {fault}")
                job = Job(work, peer, work.folder / f"{peer}-{fault}", rng, cluster, image, python)
                began = time.monotonic()
                job.start()
                if fault != "none":
                    job.strike_between(0.2, 0.6, SLURM_FAULTS[fault][1])
                job.wait()
                if fault == "none":
                    if not job.complete():
                        raise RuntimeError(f"{peer}: the undisturbed job failed:\n{job.output()[-3000:]}")
                    undisturbed = digest(job.weights)
                row = job.row("none, Slurm" if fault == "none" else SLURM_FAULTS[fault][0], undisturbed, began)
                row.peer = peer
                row.steps_repeated = job.repeated if peer == "afina" else row.doubled_lines
                rows.append(tell(row))
    return rows
