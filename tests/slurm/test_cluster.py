"""The test cluster itself: what the other tests rely on, proved by counting."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, ClusterError
from tests.processes import alive, wait_until

SRUN = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]


def lines(path: Path) -> list[str]:
    """The lines of a file that a job writes; none before it exists."""
    return path.read_text().splitlines() if path.exists() else []


def wait_for_lines(path: Path, count: int) -> list[str]:
    return wait_until(lambda: len(lines(path)) >= count and lines(path), 20, failure=lambda: f"{path}: {lines(path)}")


def _wait_for_accounting(answer: Callable[[], object], expected: object) -> None:
    """slurmctld tells slurmdbd seconds later."""
    wait_until(lambda: answer() == expected, 30, failure=lambda: f"{answer()}, not {expected}")


def test_two_nodes_run_two_tasks_as_the_ordinary_user(cluster: Cluster) -> None:
    task = 'echo "$(id -un) $SLURM_NODEID $SLURMD_NODENAME $SLURM_CPUS_PER_TASK"'
    result = cluster.run_as_user([*SRUN, "-N2", "--cpus-per-task=3", "bash", "-c", task], check=True)
    assert sorted(result.stdout.splitlines()) == [f"{cluster.user} 0 n1 3", f"{cluster.user} 1 n2 3"]


def test_accounting_knows_the_state(cluster: Cluster, folder: Path) -> None:
    good = cluster.sbatch("-o", "out", script="#!/bin/bash\nsrun true", cwd=folder)
    bad = cluster.sbatch("-o", "out", script="#!/bin/bash\nexit 3", cwd=folder)
    assert (cluster.wait(good), cluster.wait(bad)) == ("COMPLETED", "FAILED")
    steps = [(str(good), "COMPLETED"), (f"{good}.batch", "COMPLETED"), (f"{good}.0", "COMPLETED")]
    failed = {"JobID": str(bad), "State": "FAILED", "ExitCode": "3:0", "NodeList": "n1"}
    _wait_for_accounting(lambda: [(step["JobID"], step["State"]) for step in cluster.sacct(good)], steps)
    _wait_for_accounting(lambda: cluster.sacct(bad)[:1], [failed])


def test_an_urgent_job_preempts_and_the_other_starts_again(cluster: Cluster, folder: Path) -> None:
    script = "#!/bin/bash\necho low >> order; [[ -n ${SLURM_RESTART_COUNT:-} ]] || sleep 60"
    low = cluster.sbatch("-N2", "--exclusive", "--requeue", "-o", "out", script=script, cwd=folder)
    wait_for_lines(folder / "order", 1)
    script = "#!/bin/bash\necho urgent >> order"
    urgent = cluster.sbatch("-p", "urgent", "-N2", "--exclusive", "-o", "out", script=script, cwd=folder)
    assert cluster.wait(urgent) == "COMPLETED"
    assert cluster.wait(low, restarts=1) == "COMPLETED"
    assert lines(folder / "order") == ["low", "urgent", "low"]
    argv = ["sacct", "--duplicates", "-X", "-j", str(low), "--parsable2", "--noheader", "--format=State"]
    _wait_for_accounting(
        lambda: sorted(cluster.run_as_user(argv, check=True).stdout.split()), ["COMPLETED", "PREEMPTED"]
    )


def test_a_node_that_loses_power_gives_its_job_back(cluster: Cluster, folder: Path) -> None:
    script = "#!/bin/bash\necho $$ >> attempts; [[ -n ${SLURM_RESTART_COUNT:-} ]] || sleep 60"
    job = cluster.sbatch("-w", "n2", "--requeue", "-o", "out", script=script, cwd=folder)
    (pid,) = wait_for_lines(folder / "attempts", 1)
    cluster.fail_node("n2")
    try:
        assert not alive(int(pid))
        assert cluster.node_state("n2").startswith("down")
        with pytest.raises(ClusterError, match="not running"):
            cluster.kill_slurmd("n2")
    finally:
        cluster.start_slurmd("n2")
    assert cluster.wait(job, restarts=1) == "COMPLETED"
    assert len(lines(folder / "attempts")) == 2


PROCESS = """
trap "echo $1 >> term" TERM
echo "$1 $$" >> pids
if [[ $1 == child ]]; then
    setsid bash process.sh grandchild < /dev/null > /dev/null 2>&1 &
    (setsid bash process.sh orphan < /dev/null > /dev/null 2>&1 &)
fi
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


def test_what_a_signal_reaches(cluster: Cluster, tracker: str, folder: Path) -> None:
    """TERM and KILL to a step with a task, a descendant, and an orphan.

    linuxproc follows parents and does not reach the orphan, not even with KILL. Under cgroup TERM reaches only slurmstepd's
    own child, and KILL all. Each process has a session of its own, so none is reached by its group.
    """
    (folder / "process.sh").write_text(PROCESS)
    job = cluster.sbatch("-o", "out", script="#!/bin/bash\nsrun bash process.sh child", cwd=folder)
    pids = dict(line.split() for line in wait_for_lines(folder / "pids", 3))
    assert set(pids) == {"child", "grandchild", "orphan"}
    cluster.run_as_user(["scancel", "--signal=TERM", f"{job}.0"], check=True)
    reached = {"linuxproc": {"child", "grandchild"}, "cgroup": {"child"}}[tracker]
    wait_for_lines(folder / "term", len(reached))
    time.sleep(1)
    assert set(lines(folder / "term")) == reached
    assert all(map(alive, map(int, pids.values())))
    cluster.run_as_user(["scancel", "--signal=KILL", f"{job}.0"], check=True)
    assert cluster.wait(job) == "FAILED"
    survivors = {name for name, pid in pids.items() if alive(int(pid))}
    assert survivors == {"linuxproc": {"orphan"}, "cgroup": set()}[tracker]
    for name in survivors:
        os.kill(int(pids[name]), signal.SIGKILL)


def test_a_second_cluster_comes_up_after_an_unclean_end_and_leaves_nothing(
    cluster: Cluster, folder: Path, request: pytest.FixtureRequest
) -> None:
    """Beside the first, whose job continues. The mount is what a killed job may leave on a node."""
    script = "#!/bin/bash\necho $$ >> pids; while [[ ! -e stop ]]; do sleep 0.1; done"
    bystander = cluster.sbatch("-o", "out", script=script, cwd=folder)
    (bystander_pid,) = wait_for_lines(folder / "pids", 1)
    # munged refuses a folder whose parents belong to anybody else than root.
    state = Path(tempfile.mkdtemp(prefix="afina-other-", dir="/tmp"))
    request.addfinalizer(lambda: shutil.rmtree(state))
    request.addfinalizer(Cluster(state).down)
    other = Cluster(state, accounting=False, proctrack=cluster.proctrack).up()
    other.sbatch("-o", "out", script=script, cwd=folder)
    _, pid = wait_for_lines(folder / "pids", 2)
    mount = other.state / "spool-n1"
    subprocess.run(["mount", "-t", "tmpfs", "none", mount], check=True)
    for daemon in other.daemon_pids().values():
        os.kill(daemon, signal.SIGKILL)
    with Cluster(other.state, accounting=False, proctrack=cluster.proctrack) as again:
        assert not alive(int(pid))
        assert not os.path.ismount(mount)
        assert again.run_as_user([*SRUN, "-N2", "echo", "up"], check=True).stdout.split() == ["up", "up"]
        pids = again.daemon_pids()
        assert set(pids) == {"munged", "slurmctld", "slurmd-n1", "slurmd-n2"}
    assert not any(map(alive, pids.values()))
    assert not again.daemon_pids()
    again.down()
    assert alive(int(bystander_pid))
    (folder / "stop").touch()
    assert cluster.wait(bystander) == "COMPLETED"
