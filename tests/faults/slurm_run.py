"""A run as a batch job in the image, on the test cluster of tests/slurm: `sbatch finetune.sbatch`, or `afina.submit` in Python, and
Slurm's commands.

Both nodes of that cluster are this machine, so a rank is found by its command line on either node.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.common import ROOT
from tests.faults.live_run import LiveRun, Setting, TooLate, freeze, records
from tests.faults.project import overrides
from tests.processes import environ, pids, signal_all

sys.path.insert(0, str(ROOT / "tests/slurm"))  # its modules name each other without a package
import slurm_machine as machine
from cluster import TERMINAL, Cluster, ClusterError
from projects import host_programs

__all__ = ["Cluster", "ClusterError", "SlurmRun", "give_to_user", "host_programs"]

#: A user's session in Python: new runs from a recipe, or a run again; `submit` refuses what cannot be.
_SUBMIT = """
import json, sys
import afina
what, options = json.loads(sys.argv[1])
run = afina.submit(what, via="submitit", **options)
print(run.job_id)
"""
#: Seconds in an end state before a job counts as ended: one that requeues itself passes through such a state.
_ENDED_S = 3.0


def give_to_user(place: Path, image: Path, cluster: Cluster) -> None:
    """Give a project folder to the cluster's user: site.env, the batch scripts, ownership of every file."""
    (place / "slurm").mkdir(exist_ok=True)
    for script in (*(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "slurm").glob("*.sh")):
        shutil.copy(script, place / "slurm" / script.name)
    scratch = shlex.quote(str(place / "scratch"))
    (place / "slurm/site.env").write_text(f"AFINA_SCRATCH={scratch}\nAFINA_IMAGE={shlex.quote(str(image))}\n")
    (place / "scratch/runs").mkdir(exist_ok=True)
    for path in (place, *place.rglob("*")):
        shutil.chown(path, cluster.user, cluster.user)
    place.chmod(0o755)


class SlurmRun(LiveRun):
    def __init__(self, place: Path, name: str, setting: Setting, cluster: Cluster, host: Path | None = None) -> None:
        """`host` is the folder of the user's Python with afina, which submits where `setting.via` is submitit."""
        self.place, self.name, self.setting, self.cluster, self.host = place, name, setting, cluster, host
        self.run = place / "scratch/runs" / name  # replaced by its full name once the job has claimed it
        self.jobs: list[int] = []
        self._ended_since: float | None = None
        self._asked = 0.0
        self._answer: str | None = None

    @property
    def job(self) -> int:
        return self.jobs[-1]

    def start(self, changes: Mapping[str, Any], limit_min: int = 0) -> None:
        self._submit("recipe.yaml", {"name": self.name, **changes}, limit_min)
        runs = self.place / "scratch/runs"
        found = self.until(lambda: list(runs.glob(f"{self.name}-*/plan.json")), "the run directory", pause_s=0.1)
        self.run = found[0].parent

    def resume(self) -> None:
        self.mark()
        self._submit(str(self.run))

    def ended(self) -> str | None:
        """Asks Slurm twice a second at most, and repeats the last answer in between."""
        if time.monotonic() - self._asked >= 0.5:
            self._asked = time.monotonic()
            self._answer = self._ended()
        return self._answer

    def _ended(self) -> str | None:
        job = self.cluster.job(self.job)
        if job["JobState"] not in TERMINAL:
            self._ended_since = None
            return None
        self._ended_since = self._ended_since or self._asked
        if self._asked - self._ended_since < _ENDED_S or self._follow():
            return None
        return f"job {job['JobState']} ({job['ExitCode']}, {job['Restarts']} restarts)"

    def _follow(self) -> bool:
        """Whether the job has submitted another one that resumes the run, where no requeue was possible."""
        for record in records(self.run / "submissions.jsonl"):
            job = int(record["job_id"]) if str(record.get("job_id")).isdigit() else 0
            if job and job not in self.jobs:
                self.jobs.append(job)
                self._ended_since = None
                return True
        return False

    def second(self) -> str:
        before = list(self.jobs)
        try:
            self._submit(str(self.run))
        except ClusterError as error:
            if self.setting.via == "submitit" and "nothing to submit" in str(error):
                return "the second submission was refused"
            raise
        job = self.job
        self.jobs = [job, *before]  # known, but not the current one
        try:
            state = self.cluster.wait(job, timeout=300)
        except ClusterError as error:
            self._user("scancel", str(job))
            return f"the second job hung: {error}"
        log = self.place / f"slurm-{job}.out"
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]
        return f"the second job ended {state}" + (f" ({errors[0]})" if errors else "")

    def signal_host(self, number: signal.Signals) -> None:
        if number == signal.SIGKILL:
            signal_all([self._batch_shell()], number)
        else:
            self._user("scancel", "--batch", f"--signal={number.name.removeprefix('SIG')}", str(self.job))

    def signal_step(self, number: signal.Signals) -> None:
        self._user("scancel", f"--signal={number.name.removeprefix('SIG')}", str(self.job))

    def kill_everything(self) -> None:
        """Every process with the job's id, the image's file system included; slurmstepd survives and reports the end."""
        pids = self._job_processes()
        if not pids:
            raise TooLate("nothing runs")
        freeze(pids)
        signal_all(pids, signal.SIGKILL)

    def clean_up(self) -> None:
        if self.jobs:
            self._user("scancel", *map(str, self.jobs))
            for job in self.jobs:
                with contextlib.suppress(ClusterError):
                    self.cluster.wait(job, timeout=60)

    # Slurm's own faults

    def scancel(self) -> None:
        self._user("scancel", str(self.job))

    def requeue(self) -> None:
        self._user("scontrol", "requeue", str(self.job))

    def preempt(self) -> None:
        argv = ["--partition=urgent", f"--nodes={self.cluster.nodes}", "--exclusive", "--output=/dev/null"]
        urgent = self.cluster.sbatch(*argv, script="#!/bin/bash\nsleep 1\n", cwd=self.place)
        self.cluster.wait(urgent, timeout=180)

    def nodes(self) -> list[str]:
        names = self.cluster.job(self.job)["NodeList"]
        return self.cluster.root(["scontrol", "show", "hostnames", names]).stdout.split()

    def fail_node(self, node: str) -> None:
        """The node comes back at once: where every node is needed nothing could resume otherwise."""
        try:
            self.cluster.fail_node(node)
        finally:
            self.cluster.start_slurmd(node)

    def _submit(self, what: str, changes: Mapping[str, Any] | None = None, limit_min: int = 0) -> None:
        """Submit a recipe, with changed keys, or a run again."""
        nodes, per_node = self.setting.nodes, self.setting.per_node
        if self.setting.via == "submitit":
            assert self.host is not None
            given = (
                {"nodes": nodes, "gpus_per_node": per_node, "overrides": overrides(changes)[1::2]} if changes else {}
            )
            words = json.dumps([what, given | ({"time_min": limit_min} if limit_min else {})])
            argv = [self.host / "python", "-c", _SUBMIT, words]
            done = self.cluster.run_as_user(argv, cwd=self.place, timeout=300, check=True)
            self.jobs.append(int(done.stdout.split()[-1]))
        else:
            limit = [f"--time={limit_min}"] if limit_min else []
            geometry = [f"--nodes={nodes}", f"--gpus-per-node={per_node}", f"--cpus-per-task={per_node}", *limit]
            script = ["slurm/finetune.sbatch", what, *overrides(changes or {})]
            self.jobs.append(self.cluster.sbatch(*geometry, *script, cwd=self.place))
        self._ended_since = self._answer = None

    def _user(self, *argv: str) -> None:
        self.cluster.run_as_user(argv, cwd=self.place)

    def _job_processes(self) -> list[int]:
        number = str(self.job)
        return [
            pid
            for pid in pids()
            if environ(pid).get("SLURM_JOB_ID") == number
            and environ(pid).get("SLURM_CONF") == str(self.cluster.conf)
            and not machine.comm(pid).startswith("slurmstepd")
        ]

    def _batch_shell(self) -> int:
        for pid in self._job_processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if len(words) > 1 and words[1].endswith(b"slurm_script"):
                    return pid
        raise TooLate("the batch script does not run")
