"""Ten things that sites and their wrappers do and no manual names, on the real Slurm; a scripted worker makes runs of seconds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable

import pytest
from cluster import Cluster
from projects import LOST, ScriptedRun
from tests.common import program
from tests.processes import wait_until

from afina.errors import SlurmError
from afina.run.commands import sbatch_argv
from afina.slurm.submit import check_not_queued, submit_sbatch
from afina.watch.overview import summary_of

pytestmark = pytest.mark.timeout(600)
#: A submission of ten minutes ago: whether its job is in the queue is known, with accounting or without.
LONG_AGO = {"via": "sbatch", "time": time.time() - 600}
#: The first attempt fails, the second finishes.
ONCE = '[ -e "$2/once" ] || { touch "$2/once"; exit 137; }'


def lead(made: ScriptedRun, monkeypatch: pytest.MonkeyPatch, **env: str) -> None:
    """The variables of the run's job, for a submission from this process."""
    for name, value in {**made.env, **env}.items():
        monkeypatch.setenv(name, value)


def until(reached: Callable[[], bool], made: ScriptedRun) -> None:
    wait_until(reached, 60, pause_s=0.3, failure=lambda: f"{summary_of(made.run.path)}\n{made.logs()}")


def test_wrappers_that_greet(cluster: Cluster, here: ScriptedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch drops --parsable and adds a line behind its answer; squeue and scontrol begin with one."""
    greet = 'echo "Welcome to the cluster! 3 jobs of yours run."\n'
    program(
        here.folder / "bin", "sbatch", f'{greet}shift; /usr/bin/sbatch "$@" || exit; echo "Check your quota: 7 GB"\n'
    )
    for name in ("squeue", "scontrol"):
        program(here.folder / "bin", name, f'{greet}exec /usr/bin/{name} "$@"\n')
    lead(here, monkeypatch, BODY=ONCE)
    job = submit_sbatch(here.plan, here.run)
    assert cluster.wait(job, restarts=1) == "COMPLETED", here.logs()
    assert here.environment(int(job))["AFINA_DEADLINE"], "squeue's answer stands behind the greeting"
    assert here.run.outcome().outcome == "finished" and here.jobs() == [int(job)]  # type: ignore[union-attr]


def test_a_site_that_replaces_comments(cluster: Cluster, here: ScriptedRun) -> None:
    """A lost answer: the job is found by its script; an earlier one of the run is another."""
    earlier = submit_sbatch(here.plan, here.run)
    cluster.root(["scancel", earlier])
    replaced = 'words=(); for word in "$@"; do case $word in --comment=*) word=--comment=billing ;; esac; words+=("$word"); done\n'
    program(here.folder / "bin", "sbatch", f'{replaced}/usr/bin/sbatch --hold "${{words[@]}}" >/dev/null\n{LOST}')
    job = submit_sbatch(here.plan, here.run)
    assert job != earlier and cluster.job(job)["JobState"] == "PENDING" and cluster.job(job)["Comment"] == "billing"


def test_a_site_that_serves_old_answers_of_squeue(cluster: Cluster, here: ScriptedRun) -> None:
    job = cluster.sbatch("--hold", script="#!/bin/bash\n")
    here.run.append("submissions.jsonl", {"job_id": str(job), "via": "sbatch"})
    program(here.folder / "bin", "squeue", "exit 0\n")
    program(here.folder / "bin", "sacct", "exit 0\n")
    assert summary_of(here.run.path).state == "UNKNOWN"
    with pytest.raises(SlurmError, match="squeue does not show it yet"):
        check_not_queued(here.run)


def test_a_job_that_is_suspended_or_put_back_and_held(
    cluster: Cluster, here: ScriptedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    lead(here, monkeypatch, BODY='while [ ! -e "$2/go" ]; do touch "$2/moves"; sleep 0.2; done')
    moves = here.run.path / "moves"
    job = submit_sbatch(here.plan, here.run)
    until(lambda: summary_of(here.run.path).state == "RUNNING" and moves.exists(), here)
    cluster.root(["scontrol", "suspend", job])
    summary = summary_of(here.run.path)
    assert summary.state == "PENDING" and "has suspended it" in (summary.why or ""), summary

    def stands_still() -> bool:
        moves.unlink(missing_ok=True)
        time.sleep(1)
        return not moves.exists()

    # Slurm 22.05 may never end a job that is put back before its node has suspended and resumed it.
    until(stands_still, here)
    cluster.root(["scontrol", "resume", job])
    until(moves.exists, here)
    cluster.root(["scontrol", "requeuehold", "State=SpecialExit", job])
    until(lambda: "holds it" in (summary_of(here.run.path).why or ""), here)
    assert summary_of(here.run.path).remedy == f"read its log (afina logs), then: scontrol release {job}"
    (here.run.path / "go").touch()
    cluster.root(["scontrol", "release", job])
    assert cluster.wait(job, restarts=1) == "COMPLETED", here.logs()


def test_the_login_nodes_temporary_folder_is_not_on_the_nodes(
    cluster: Cluster, project: Callable[..., ScriptedRun]
) -> None:
    """sbatch passes TMPDIR on; slurmd takes /tmp in its place, and so does the copy of model and data."""
    made = project()
    runtime = program(made.folder, "runtime", f'exec bash {made.folder}/worker.sh "$@"\n')
    made.claim(["bash", "{run}/node.sh", str(runtime), str(runtime), "launch", "{run}"])
    job = made.submit(TMPDIR="/local/login/tmp.x", AFINA_STAGE="1")
    assert cluster.wait(job) == "COMPLETED", made.logs()
    seen = made.environment(job)
    assert seen["TMPDIR"] == "/tmp" == seen["AFINA_STAGE"], seen


@pytest.mark.parametrize("name", ["Überprüfung – 評価 №1", 'it\'s $(a) "job" %j', "x" * 100])
def test_names_of_jobs_come_through_a_new_job(cluster: Cluster, project: Callable[..., ScriptedRun], name: str) -> None:
    made = project()
    (made.run.path / "bad.n1").touch()
    first = made.submit(f"--job-name={name}")
    second = made.next_job(0)
    cluster.wait(first)
    cluster.wait(second, states=("PENDING", "COMPLETED"))
    shown = cluster.root(["squeue", "--noheader", "--states=all", f"--jobs={second}", "--format=%j"]).stdout.rstrip(
        "\n"
    )
    assert shown == name, made.logs()


def test_a_job_without_a_time_limit(cluster: Cluster, project: Callable[..., ScriptedRun]) -> None:
    made = project()
    (made.run.path / "bad.n1").touch()
    first = made.submit("--time=UNLIMITED")
    second = made.next_job(0)
    cluster.wait(first)
    assert cluster.job(second)["TimeLimit"] == "UNLIMITED", made.logs()
    # A newer Slurm ends such a job in a year.
    assert float(made.environment(first).get("AFINA_DEADLINE") or "inf") > time.time() + 300 * 86400
    assert summary_of(made.run.path).limit_s is None


def test_the_accounting_is_down(cluster: Cluster, here: ScriptedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    lead(here, monkeypatch, BODY="exit 1")
    cluster._stop("slurmdbd")
    try:
        job = submit_sbatch(here.plan, here.run)
        cluster.wait(job, restarts=1)
        began = time.monotonic()
        summary = summary_of(here.run.path)
        assert summary.state == "FAILED" and "the worker ended without an outcome" in (summary.error or ""), summary
        check_not_queued(here.run)
        assert time.monotonic() - began < 90
    finally:
        cluster._start_accounting()


def test_a_nodes_clock_is_an_hour_ahead(here: ScriptedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job there wrote that it submits a new one; its time says nothing on this machine."""
    monkeypatch.setattr("afina.slurm.submit._LATE_S", 2.0)
    intent = {"time": time.time() + 3600, "token": "t", "script": "/no/such", "clusters": "", "record": {}}
    (here.run.path / "intent.json").write_text(json.dumps(intent))
    with pytest.raises(SlurmError, match="its job may still come"):
        check_not_queued(here.run)
    time.sleep(2.5)
    check_not_queued(here.run)
    assert not (here.run.path / "intent.json").exists()


def test_folders_that_are_gone_when_the_job_starts(
    cluster: Cluster, here: ScriptedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the submission: the run is found all the same. That of the log: status says where to look."""
    lead(here, monkeypatch)
    place = here.folder / "place"
    place.mkdir()
    argv = sbatch_argv(here.plan, here.run.path)
    job = cluster.run_as_user([*argv[:2], "--hold", *argv[2:]], env=here.env, cwd=place, check=True).stdout.strip()
    shutil.rmtree(place)
    cluster.root(["scontrol", "release", job])
    assert cluster.wait(job) == "COMPLETED", here.logs()
    here.claim(["bash", str(here.folder / "worker.sh"), "launch", "{run}"])
    lost = [word.replace(f"{here.run.path}/slurm-", "/no/such/folder/slurm-") for word in argv]
    job = cluster.run_as_user(lost, env=here.env, cwd=here.folder, check=True).stdout.strip()
    here.run.append("submissions.jsonl", LONG_AGO | {"job_id": job})
    assert cluster.wait(job) == "FAILED"
    summary = summary_of(here.run.path)
    assert summary.state == "FAILED" and "it left no log" in (summary.why or ""), summary
    assert "do all nodes see" in (summary.remedy or "") and "afina doctor --job" in (summary.remedy or "")


def test_a_site_file_that_the_nodes_do_not_see(cluster: Cluster, here: ScriptedRun) -> None:
    """In a home that is not there: refused by the job before it trains, and status has its words."""
    job = here.submit(AFINA_SITE="/home/of/the/login/node/site.env")
    here.run.append("submissions.jsonl", LONG_AGO | {"job_id": str(job)})
    assert cluster.wait(job) == "FAILED"
    summary = summary_of(here.run.path)
    assert summary.state == "FAILED" and "AFINA_SITE=/home/of/the/login/node/site.env: no such file on" in (
        summary.why or ""
    ), summary
    assert (summary.remedy or "").startswith("put the site file where every node sees it; then: afina submit"), summary
