"""The image's file system survives Slurm's signals: slurm/node.sh in a real job step, under both process trackers.

tests/apptainer/test_mount.py sends the signals itself, in more cases, and shows what happens without node.sh.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from tests.common import ROOT
from tests.processes import wait_until

#: Records signals; once the file `go` exists it imports modules it has not read yet.
WORKER = """
import json, os, signal, sys, time
received = set()
for name in ("TERM", "USR1"):
    signal.signal(getattr(signal, "SIG" + name), lambda number, frame: received.add(signal.Signals(number).name[3:]))
def publish(name, value):
    with open(name + ".part", "w") as file:
        json.dump(value, file)
    os.rename(name + ".part", name)
publish("ready", os.environ["APPTAINER_CONTAINER"])
while not received:
    time.sleep(0.05)
publish("received", sorted(received))
while not os.path.exists("go"):
    time.sleep(0.05)
try:
    import sqlite3, sklearn.metrics
    publish("result", "imported")
except Exception as error:
    publish("result", repr(error))
"""

#: The batch shell receives the step's signals too, and waits until the step has ended.
JOB = """#!/bin/bash
trap : TERM USR1
[ -z "${SLURM_RESTART_COUNT:-}" ] || exit 0
srun bash "$PWD/node.sh" "$IMAGE" apptainer --quiet exec --no-home "$IMAGE" "$@" &
while kill -0 $! 2>/dev/null; do wait $!; done
"""


class Step:
    """A folder with node.sh, the worker and a TMPDIR of its own, and the jobs that run there."""

    def __init__(self, cluster: Cluster, folder: Path, image: Path) -> None:
        self.cluster, self.folder, self.tmp = cluster, folder, folder / "tmp"
        self.env = {"IMAGE": str(image), "TMPDIR": str(self.tmp)}
        self.tmp.mkdir()
        shutil.chown(self.tmp, cluster.user, cluster.user)
        shutil.copy(ROOT / "slurm/node.sh", folder / "node.sh")
        (folder / "job.sh").write_text(JOB)
        (folder / "worker.py").write_text(WORKER)

    def submit(self, *command: str) -> int:
        return self.cluster.sbatch("-w", "n1", "-o", "out", "job.sh", *command, env=self.env, cwd=self.folder)

    def published(self, name: str) -> Any:
        file = self.folder / name
        self.until(file.exists)
        return json.loads(file.read_text())

    def until(self, reached: Callable[[], bool]) -> None:
        wait_until(reached, 60, failure=lambda: (self.folder / "out").read_text())

    def start(self) -> int:
        """Start a job and wait until its worker runs in the image that node.sh has mounted."""
        job = self.submit("python", "worker.py")
        root = Path(self.published("ready"))
        assert root.is_relative_to(self.tmp) and self.mounted() == [str(root)]
        return job

    def mounted(self) -> list[str]:
        points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        return [point for point in points if point.startswith(f"{self.tmp}/")]

    def clean(self) -> bool:
        return not self.mounted() and list(self.tmp.iterdir()) == []


@pytest.fixture
def step(cluster: Cluster, tracker: str, folder: Path, image: Path) -> Iterator[Step]:
    made = Step(cluster, folder, image)
    yield made
    cluster.cancel_all()
    made.until(made.clean)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_after_a_signal_to_the_whole_job_it_still_imports(cluster: Cluster, step: Step, name: str) -> None:
    """USR1 to batch shell, srun and step; TERM to the step: srun would kill the step on it."""
    job = step.start()
    target = ["--full", str(job)] if name == "USR1" else [f"{job}.0"]
    for _ in range(3):
        cluster.run_as_user(["scancel", f"--signal={name}", *target], check=True)
    assert step.published("received") == [name]
    (step.folder / "go").touch()
    assert step.published("result") == "imported"
    assert cluster.wait(job) == "COMPLETED"
    assert step.clean()


@pytest.mark.timeout(300)
def test_after_a_preemption_it_still_imports(cluster: Cluster, step: Step) -> None:
    cluster.restart(grace_s=30)
    try:
        step.start()
        script = "#!/bin/bash\necho urgent >> order"
        urgent = cluster.sbatch("-p", "urgent", "-N2", "--exclusive", "-o", "out-2", script=script, cwd=step.folder)
        assert step.published("received") == ["TERM"]
        (step.folder / "go").touch()
        assert step.published("result") == "imported"
        assert cluster.wait(urgent, timeout=90) == "COMPLETED"
        step.until(step.clean)
    finally:
        cluster.restart(grace_s=0)


@pytest.mark.timeout(180)
def test_a_killed_step_leaves_nothing_after_the_next_start(cluster: Cluster, tracker: str, step: Step) -> None:
    """linuxproc: the watcher outlives the step. cgroup: it does not, and the next start on the node unmounts."""
    job = step.start()
    cluster.run_as_user(["scancel", "--signal=KILL", "--full", str(job)], check=True)
    cluster.wait(job)
    if tracker == "linuxproc":
        step.until(step.clean)
        return
    assert len(step.mounted()) == 1
    assert cluster.wait(step.submit("true")) == "COMPLETED"
    assert "cleared the dead mount point" in (step.folder / "out").read_text()
    assert step.clean()
