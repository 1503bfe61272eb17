"""Resource usage from a real sacct: a requeued job, array tasks, and no accounting."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cluster import Cluster

from afina.slurm.accounting import job_usage
from afina.slurm.client import version

_BUSY = "#!/bin/bash\nsrun python3 -c 'import time\nbegan = time.process_time()\nwhile time.process_time() - began < 2: pass'\nsleep 1\n"


def test_usage_of_a_requeued_job_and_an_array(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    script = folder / "busy.sh"
    script.write_text(_BUSY)
    options = ["sbatch", "--parsable", "--time=5", "--mem=500M", f"--output={folder}/log"]
    plain = [*options, "--requeue", "--cpus-per-task=2", "--gpus-per-node=2", "--partition=gpu", str(script)]
    job = cluster.run_as_user(plain).stdout.strip()
    array = cluster.run_as_user([*options, "--array=1-2", str(script)]).stdout.strip()
    cluster.wait(job, states=("RUNNING",))
    cluster.root(["scontrol", "requeue", job])
    for each in (job, f"{array}_1", f"{array}_2"):
        assert cluster.wait(each) == "COMPLETED"
    deadline = time.monotonic() + 30
    while True:  # slurmctld sends its records to accounting later, in parts
        usage = job_usage([job])
        assert usage is not None
        first, second = usage
        if (second.state == "COMPLETED" and second.limit_min is not None) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert (first.state, second.state) == ("REQUEUED", "COMPLETED") and first.job == second.job == job
    assert (second.cpus, second.gpus, second.nodes, second.limit_min) == (2, 2, 1, 5.0)
    assert second.asked_memory_bytes == 500 * 2**20
    assert second.cpu_s is not None and 1.5 < second.cpu_s < 6 and second.elapsed_s >= 3
    assert second.cpu_share is not None and 0 < second.cpu_share <= 1 and second.energy_j is None
    tasks = job_usage([f"{array}_1", f"{array}_2"]) or []
    assert sorted(task.job for task in tasks) == [f"{array}_1", f"{array}_2"]
    assert str(version()).startswith("slurm")


def test_without_accounting_there_is_no_usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert job_usage(["1"]) is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert job_usage(["1"]) is None and version() is None and job_usage([]) is None
