"""Limits that a site sets, on the real Slurm: memory that the kernel enforces, QOS, and a cluster that is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from cluster import Cluster
from projects import ScriptedRun

from afina.errors import InputError, SlurmError
from afina.slurm.client import SUBMIT_LIMIT
from afina.slurm.query import cancel, query
from afina.slurm.submit import check_not_queued, submit_sbatch
from afina.watch.overview import summary_of


@pytest.mark.timeout(600)
def test_a_job_that_the_kernel_kills_for_its_memory_names_it_and_is_not_tried_again(
    cluster: Cluster, project: Callable[..., ScriptedRun]
) -> None:
    if reason := Cluster.cgroup_unavailable("memory"):
        pytest.skip(reason)
    cluster.restart(proctrack="cgroup", constrain_memory=True)
    try:
        made = project()
        job = made.submit("--mem=300M", BODY="head -c 1G /dev/zero | tail || exit")
        assert cluster.wait(job, timeout=90) in ("OUT_OF_MEMORY", "FAILED"), made.logs()
        outcome = made.run.outcome()
        assert outcome is not None and outcome.failure is not None, made.logs()
        assert (outcome.cause, outcome.exit_code) == ("host-memory", 3), outcome.error
        assert "memory (0.29 GB per node) is used up" in outcome.failure.message
        assert "raise resources.mem_gb to 1 " in outcome.failure.remedy and "sbatch --mem=1G" in outcome.failure.remedy
        assert made.jobs() == [] and made.run.attempt_names() == [f"{job}.0"], "nothing is tried again"
        again = made.submit("--mem=3G", BODY="head -c 1G /dev/zero | tail | wc -c")
        assert cluster.wait(again, timeout=90) == "COMPLETED", made.logs()
    finally:
        cluster.restart(proctrack="linuxproc", constrain_memory=False)


@pytest.fixture
def limits(cluster: Cluster) -> Iterator[Callable[..., None]]:
    """Sets limits of the user's QOS; accounting enforces them meanwhile."""

    def sacctmgr(*words: str) -> None:
        cluster.root(["sacctmgr", "--immediate", *words])

    sacctmgr("add", "account", "science")
    sacctmgr("add", "user", cluster.user, "account=science")
    sacctmgr("add", "qos", "small", "flags=DenyOnLimit")
    sacctmgr("modify", "user", cluster.user, "set", "qos=small", "defaultqos=small")
    cluster.restart(enforce="limits,qos")
    yield lambda **limits: sacctmgr(
        "modify", "qos", "small", "set", *(f"{name}={value}" for name, value in limits.items())
    )
    sacctmgr("modify", "user", cluster.user, "set", "qos=normal", "defaultqos=normal")
    sacctmgr("delete", "qos", "small")
    cluster.restart(enforce="")


@pytest.mark.timeout(600)
def test_sbatchs_own_reason_decides_the_remedy(
    cluster: Cluster, limits: Callable[..., None], here: ScriptedRun
) -> None:
    def refusal() -> SlurmError:
        with pytest.raises(SlurmError) as caught:
            submit_sbatch(here.plan, here.run)
        assert not (here.run.path / "intent.json").exists()
        return caught.value

    here.run_slurm_as_user()
    limits(MaxSubmitJobsPerUser=1)
    blocker = cluster.sbatch("--hold", script="#!/bin/bash\n")
    error = refusal()
    assert error.cause == SUBMIT_LIMIT and "wait for some of your jobs to end" in error.remedy, error
    cluster.root(["scancel", str(blocker)])
    limits(MaxSubmitJobsPerUser=-1, MaxWall=1)
    error = refusal()
    assert "QOSMaxWallDurationPerJobLimit" in error.message and "a shorter --time" in error.remedy, error
    limits(MaxWall=-1, MaxTRESPerJob="cpu=0")
    error = refusal()
    assert "QOSMaxCpuPerJobLimit" in error.message and "ask for less" in error.remedy, error
    limits(MaxTRESPerJob="cpu=-1", MaxJobsPerUser=0)
    submit_sbatch(here.plan, here.run)
    summary = summary_of(here.run.path)
    assert summary.state == "PENDING" and "as many jobs as the limits allow" in (summary.why or ""), summary


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lost", [False, True])
def test_a_job_on_a_named_cluster_keeps_its_name(
    cluster: Cluster, here: ScriptedRun, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Slurm answers `18;afina`, whether the cluster that is named is this one or another."""
    monkeypatch.setenv("SBATCH_CLUSTERS", "afina")
    if lost:
        here.lose_answers()
    job = submit_sbatch(here.plan, here.run)
    assert job.endswith(";afina") and here.run.job_ids() == (job,)
    with pytest.raises(InputError, match=f"job {job} of this run is "):
        check_not_queued(here.run)
    cancel(job)
    assert cluster.wait(job.partition(";")[0]) == "CANCELLED"
    assert query([job])[job].state == "GONE"


@pytest.mark.timeout(600)
def test_a_new_job_after_one_on_a_named_cluster_has_its_name(
    cluster: Cluster, here: ScriptedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_CLUSTERS", "afina")
    for name, value in here.env.items():
        monkeypatch.setenv(name, value)
    (here.run.path / "bad.n1").touch()
    submit_sbatch(here.plan, here.run)
    first, second = here.next_job(0), here.next_job(1)
    assert {cluster.wait(first), cluster.wait(second)} <= {"FAILED", "COMPLETED"}, here.logs()
    assert all(job.endswith(";afina") for job in here.run.job_ids()), here.run.job_ids()
