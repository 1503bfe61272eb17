"""From an empty folder to a submitted job on the test cluster: init, doctor and its job, refusals, the rehearsal.

Runs as the ordinary user, in a folder whose name needs quotes, in the image.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Process
from projects import give_to_user, project_folder
from tests import tiny
from tests.common import readme_block

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def project(cluster: Cluster, host: Path, image: Path) -> Iterator[Path]:
    """The project that `afina init` makes of reviews and a model."""
    with project_folder(cluster, "afina it's a $(new) project ") as path:
        tiny.tiny_model(path / "model")
        tiny.write_csv(path / "reviews.csv", tiny.tiny_reviews(200, 1))
        give_to_user(path, cluster)
        given = ["--data", "reviews.csv", "--label", "stars", "--model", "./model", "--scratch", str(path / "scratch")]
        done = cluster.run_as_user([host / "afina", "init", *given, "--image", image, "--yes"], cwd=path)
        assert done.returncode == 0, done.stderr
        yield path


def _afina(cluster: Cluster, host: Path, project: Path, *arguments: str) -> Process:
    return cluster.run_as_user([host / "afina", *arguments], cwd=project, timeout=240)


def _doctor(
    cluster: Cluster, host: Path, project: Path, *arguments: str
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    done = _afina(cluster, host, project, "doctor", *arguments, "--json")
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    by_check: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        by_check.setdefault(finding["check"], []).append(finding)
    return done.returncode, by_check


def test_init_describes_this_cluster(cluster: Cluster, project: Path) -> None:
    site = (project / "slurm/site.env").read_text()
    assert "#   gpu*: no time limit; 2 × 4 cores, 15 GB, 2 GPUs" in site and "#   urgent: " in site
    recipe = (project / "recipe.yaml").read_text()
    assert "resources: {nodes: 1, gpus_per_node: 1, cpus_per_gpu: 2, " in recipe


def test_the_login_node_passes(cluster: Cluster, host: Path, project: Path) -> None:
    code, found = _doctor(cluster, host, project, "recipe.yaml")
    assert code == 0, found
    messages = {check: [f["message"] for f in findings] for check, findings in found.items()}
    assert messages["slurm"][0].startswith("cluster afina, Slurm ")
    assert messages["partition"] == ["gpu: 2 nodes, 2 GPUs per node at most, no time limit"]
    without = "does not work here; afina reads run directories instead"
    assert messages["sacct"] == ["works" if cluster.accounting else without]
    assert messages["preemption"] == ["PreemptMode=REQUEUE"]
    assert found["image"][0]["level"] == found["container"][0]["level"] == found["fuse"][0]["level"] == "ok"
    assert found["kill wait"][0]["level"] == "warning", "ten seconds, as configured"
    assert found["clock"][0]["message"].endswith("and slurmctld")


def test_a_short_job_checks_the_nodes(cluster: Cluster, host: Path, project: Path) -> None:
    before = sorted((project / "scratch").iterdir())
    code, found = _doctor(cluster, host, project, "recipe.yaml", "--job", "--nodes", "2", "--gpus-per-node", "2")
    assert code == 0, found
    nodes = {f["message"].partition(":")[0] for f in found["runtime"][1:]}
    assert nodes == set(cluster.node_names), "the runtime on the login node, then on each node"
    assert "USR1 reaches the batch script" in found["signal"][0]["message"]
    assert (
        found["processes"][0]["message"].startswith("4 processes on ")
        and "all-reduce" in found["processes"][0]["message"]
    )
    assert found["step"][0]["message"] == "srun started 2 tasks on 2 nodes"
    assert "mount" not in found, "the image could be mounted out of reach of signals"
    assert sorted((project / "scratch").iterdir()) == before


def test_an_interrupt_cancels_the_job_and_leaves_nothing(cluster: Cluster, host: Path, project: Path) -> None:
    """While the job is pending behind one that holds all nodes."""
    blocker = cluster.sbatch("--nodes=2", "--exclusive", "--partition=urgent", "--wrap=sleep 300")
    cluster.wait(blocker, states={"RUNNING"})
    before = sorted((project / "scratch").iterdir())
    argv = ["runuser", "-u", cluster.user, "--", str(host / "afina"), "doctor", "--job"]
    doctor = subprocess.Popen(
        argv, env=cluster.environment(), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        job = ""
        while not job and doctor.poll() is None:
            job = cluster.root(["squeue", "--noheader", "--name=afina-doctor", "--format=%i"]).stdout.strip()
            time.sleep(0.2)
        time.sleep(1)
        child = subprocess.run(["pgrep", "-P", str(doctor.pid)], capture_output=True, text=True, check=False).stdout
        subprocess.run(["kill", f"-{int(signal.SIGINT)}", *(child.split() or [str(doctor.pid)])], check=True)
        out, err = doctor.communicate(timeout=60)
    finally:
        doctor.kill()
        cluster.root(["scancel", str(blocker)])
    assert "is submitted" in out and "nothing incomplete is left behind" in err, out + err
    assert cluster.wait(job) == "CANCELLED"
    assert sorted((project / "scratch").iterdir()) == before


def test_a_job_that_is_pending_too_long_is_cancelled(cluster: Cluster, host: Path, project: Path) -> None:
    blocker = cluster.sbatch("--nodes=2", "--exclusive", "--partition=urgent", "--wrap=sleep 300")
    cluster.wait(blocker, states={"RUNNING"})
    try:
        code, found = _doctor(cluster, host, project, "--job", "--wait-minutes", "0.05")
    finally:
        cluster.root(["scancel", str(blocker)])
    assert code == 3 and "still waits after" in found["queue"][0]["message"]
    assert not cluster.root(["squeue", "--noheader", "--name=afina-doctor", "--format=%i"]).stdout.strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus-per-node", "4"], "no node of partition gpu has more than 2 GPUs"),
        (["--set", "resources.mem_gb=64"], "no node of partition gpu has more than 15 GB of memory"),
        (["--set", "resources.cpus_per_gpu=16"], "no node of partition gpu has more than 4 cores"),
        (["--nodes", "4"], "partition gpu has 2 of them"),
    ],
)
def test_what_cannot_succeed_is_not_queued(
    cluster: Cluster, host: Path, project: Path, options: list[str], message: str
) -> None:
    """Slurm itself accepts some of these and leaves them pending for ever."""
    done = _afina(cluster, host, project, "submit", "recipe.yaml", *options)
    assert done.returncode == 3 and message in done.stderr and "remedy: " in done.stderr
    assert not (project / "scratch/runs").exists()


def test_a_partition_with_a_limit(cluster: Cluster, host: Path, project: Path) -> None:
    cluster.root(["scontrol", "update", "PartitionName=gpu", "MaxTime=30"])
    try:
        done = _afina(cluster, host, project, "submit", "recipe.yaml", "--time", "31")
        assert done.returncode == 3 and "31 min are more than the 30 min that partition gpu allows" in done.stderr
        assert "SBATCH_PARTITION=urgent, which has it" in done.stderr
    finally:
        cluster.root(["scontrol", "update", "PartitionName=gpu", "MaxTime=UNLIMITED"])


def test_a_rehearsal_in_the_image_and_the_run_that_follows(cluster: Cluster, host: Path, project: Path) -> None:
    """On CPU cores, without the recipe's GPU. The forecast is compared with the run."""
    done = _afina(
        cluster, host, project, "submit", "recipe.yaml", "--rehearse", "--gpus-per-node", "0", "--wait", "--json",
        "--set", "train.epochs=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = Path(json.loads(done.stdout.splitlines()[-1])["run"])
    estimate = json.loads((run / "estimate.json").read_text())
    assert estimate["basis"] == "rehearsal" and estimate["measured"]["network"] == "cut"
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["outcome"] == "finished" and outcome["global_step"] == estimate["total_steps"]
    assert estimate["attempts"] == 1 and not list((project / "scratch").glob(".rehearsal-*"))


@pytest.mark.timeout(900)
def test_the_commands_for_a_cluster_in_the_readme(cluster: Cluster, host: Path, project: Path) -> None:
    """From `doctor` on, as the README spells them; test_sweep.py is about its last one."""
    lines = [line.partition("#")[0].strip() for line in readme_block("sh", "## On a cluster")]
    commands = lines[lines.index("cd project") + 1 :]
    assert [line.split()[1] for line in commands] == [
        "doctor",
        "prefetch",
        "submit",
        "submit",
        "status",
        "logs",
        "sweep",
    ]
    for line in commands[:-1]:
        newest = max((project / "scratch/runs").glob("*"), key=lambda run: run.stat().st_mtime, default=project)
        words = [newest.name if word == "RUN" else word for word in line.split()[1:]]
        done = _afina(cluster, host, project, *words)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert json.loads((newest / "outcome.json").read_text())["outcome"] == "finished"
