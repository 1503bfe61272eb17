"""Sites that differ from ours: bad nodes, hostile variables, lost answers, containers that do not start. Real jobs, no training.

The worker is a script: a run takes seconds. What follows an attempt is decided by the host's afina, or by bash alone.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from projects import LOST, ScriptedRun, give_to_user
from tests.common import program
from tests.processes import wait_until

from afina.errors import InputError, SlurmError
from afina.run.commands import container_argv, job_scripts, sbatch_argv
from afina.slurm.client import AMBIGUOUS
from afina.slurm.submit import check_not_queued, submit_sbatch


@pytest.fixture(scope="module")
def three_nodes(cluster: Cluster) -> Iterator[None]:
    cluster.restart(nodes=3)
    yield
    cluster.restart(nodes=2)


@pytest.mark.timeout(180)
def test_all_bad_nodes_are_left_out_after_a_growing_pause(
    cluster: Cluster, three_nodes: None, project: Callable[..., ScriptedRun]
) -> None:
    made = project()
    for name in ("bad.n1", "bad.n2"):
        (made.run.path / name).touch()
    first = made.submit()
    second = made.next_job(0)
    assert cluster.wait(first) == "FAILED" and cluster.job(second)["ExcNodeList"] == "n1"
    third = made.next_job(1)
    about = cluster.job(third)
    assert about["ExcNodeList"] == "n[1-2]" and about["JobState"] == "PENDING", about
    assert about["Reason"] == "BeginTime", "the second bad node in a row: a pause"
    cluster.root(["scontrol", "update", f"JobId={third}", "StartTime=now"])
    assert cluster.wait(third) == "COMPLETED", made.logs()
    assert len(made.jobs()) == 2 and made.run.outcome().outcome == "finished"  # type: ignore[union-attr]


@pytest.mark.timeout(180)
def test_what_fails_on_every_node_ends_and_the_sites_exclusion_stays(
    cluster: Cluster, three_nodes: None, project: Callable[..., ScriptedRun]
) -> None:
    extra = ("--exclude=n3",)
    made = project(sbatch_extra=extra)
    for name in ("bad.n1", "bad.n2"):
        (made.run.path / name).touch()
    first = made.submit(AFINA_SBATCH_EXTRA=extra[0])
    second = made.next_job(0)
    assert cluster.job(second)["ExcNodeList"] == "n[1,3]"
    assert {cluster.wait(job) for job in (first, second)} == {"FAILED"}
    assert "what fails on every node is not the node" in made.logs() and made.jobs() == [second]
    assert "continue with: sbatch " in made.logs()


@pytest.mark.timeout(180)
def test_bash_decides_where_the_container_does_not_start(
    cluster: Cluster, three_nodes: None, project: Callable[..., ScriptedRun]
) -> None:
    made = project()
    runtime, image = made.folder / "runtime", made.folder / "an image.sif"
    image.write_text("no image")
    program(
        made.folder,
        "runtime",
        f'[ "$SLURMD_NODENAME" != n1 ] || {{ echo "FATAL: no \\"user\\" namespaces" >&2; exit 255; }}\nexec bash {made.folder}/worker.sh "$@"\n',
    )
    made.claim(["bash", "{run}/node.sh", str(image), str(runtime), "launch", "{run}"])
    first = made.submit()
    second = made.next_job(0)
    assert cluster.wait(first) == "FAILED" and cluster.wait(second) == "COMPLETED", made.logs()
    assert cluster.job(second)["ExcNodeList"] == "n1"
    (ended,) = [e for e in made.run.lines("events.jsonl") if e["event"] == "attempt_ended"]
    assert (ended["cause"], ended["next"], ended["excluded"]) == ("node", "requeue", "n1")
    assert 'n1: FATAL: no "user" namespaces' in ended["failure"] and made.run.outcome().outcome == "finished"  # type: ignore[union-attr]


@pytest.mark.timeout(180)
def test_settings_of_apptainer_that_isolate_do_not_reach_the_worker(
    cluster: Cluster, image: Path, project: Callable[..., ScriptedRun]
) -> None:
    """A profile's CLEANENV would take the attempt's name from the worker, CONTAIN its folders."""
    made = project(image=image, runtime="apptainer")
    made.claim(
        [
            "bash",
            "{run}/node.sh",
            str(image),
            *container_argv(made.plan, ["bash", f"{made.folder}/worker.sh"], [made.folder]),
            "launch",
            "{run}",
        ]
    )
    hostile = {
        f"{name}_{setting}": "1"
        for name in ("APPTAINER", "SINGULARITY")
        for setting in ("CLEANENV", "CONTAIN", "CONTAINALL", "PID")
    }
    job = made.submit(**hostile, APPTAINER_NO_MOUNT="tmp", APPTAINER_WORKDIR="/no/such", AFINA_IMAGE=str(image))
    assert cluster.wait(job, timeout=120) == "COMPLETED", made.logs()
    seen = made.environment(job)
    assert (
        seen["AFINA_ATTEMPT"] == f"{job}.0" and seen["APPTAINER_CONTAINER"] and made.run.outcome().attempt == f"{job}.0"
    )  # type: ignore[union-attr]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("place", "remedy"), [("an image.sif", "put the image back"), ("scratch/cache/images/x-1.sif", "pulled again")]
)
def test_a_purged_image_is_named_and_not_tried_again(
    cluster: Cluster, project: Callable[..., ScriptedRun], place: str, remedy: str
) -> None:
    made = project()
    image = made.folder / place
    image.parent.mkdir(parents=True, exist_ok=True)
    program(made.folder, "runtime", f'[ -r "{image}" ] || exit 255\nexec bash {made.folder}/worker.sh "$@"\n')
    made.claim(["bash", "{run}/node.sh", str(image), str(made.folder / "runtime"), "launch", "{run}"])
    job = made.submit()
    assert cluster.wait(job) == "FAILED" and str(cluster.job(job)["ExitCode"]) == "3:0"
    outcome = made.run.outcome()
    assert outcome is not None and outcome.cause == "image" and made.jobs() == []
    assert outcome.failure is not None and f"{image} is no longer there" in outcome.failure.message
    assert remedy in outcome.failure.remedy and "afina submit" in outcome.failure.remedy


HOSTILE = {
    "SBATCH_EXPORT": "NONE",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    "SLURM_NTASKS": "7",
    "SLURM_TIMELIMIT": "1",
    "SLURM_STEP_NUM_NODES": "9",
    "SLURM_EXACT": "1",
    "SLURM_TASK_PROLOG": "/no/such/prolog",
    "SLURM_STDOUTMODE": "/dev/null",
    "SQUEUE_PARTITION": "urgent",
    "SQUEUE_FORMAT": "%i",
}


@pytest.mark.timeout(120)
def test_variables_of_a_surrounding_job_or_profile_do_not_reach_the_step(
    cluster: Cluster, project: Callable[..., ScriptedRun]
) -> None:
    made = project()
    job = made.submit(**HOSTILE)
    assert cluster.wait(job) == "COMPLETED", made.logs()
    seen = made.environment(job)
    assert {
        name: value for name, value in HOSTILE.items() if name.startswith("SLURM") and seen.get(name) == value
    } == {}
    assert seen["SLURM_NTASKS"] == "1" and seen["AFINA_DEADLINE"], "squeue answered about this job"
    assert seen["PYTHON"] == made.env["PYTHON"], "--export=ALL"


@pytest.mark.timeout(120)
def test_a_site_without_exports_and_a_step_without_variables(
    cluster: Cluster, project: Callable[..., ScriptedRun]
) -> None:
    """As where a plugin of the site makes every job `--export=NONE`: the job's srun would pass nothing on."""
    made = project()
    site = made.folder / "scratch/site.env"
    site.write_text("".join(f"{name}='{value}'\n" for name, value in made.env.items()))
    argv = [*sbatch_argv(made.plan, made.run.path)]
    argv[argv.index("--export=ALL")] = f"--export=AFINA_SITE={site}"
    job = int(cluster.run_as_user(argv, cwd=made.folder, check=True).stdout)
    assert cluster.wait(job) == "COMPLETED", made.logs()


@pytest.mark.timeout(120)
def test_the_step_has_the_allocations_cores(cluster: Cluster, project: Callable[..., ScriptedRun]) -> None:
    made = project(sbatch_omit=("cpus-per-task",), sbatch_extra=("--exclusive",))
    job = made.submit()
    assert cluster.wait(job) == "COMPLETED", made.logs()
    assert made.environment(job)["SLURM_CPUS_PER_TASK"] == str(cluster.cpus)


@pytest.mark.timeout(120)
def test_a_site_file_may_read_variables_that_are_not_set(cluster: Cluster, project: Callable[..., ScriptedRun]) -> None:
    """As /etc/bashrc and Lmod do."""
    made = project()
    site = made.folder / "site.env"
    site.write_text('[ -n "$BASHRCSOURCED" ] || NCCL_DEBUG=WARN$LMOD_VERSION\n')
    job = made.submit(AFINA_SITE=str(site))
    assert cluster.wait(job) == "COMPLETED" and made.environment(job)["NCCL_DEBUG"] == "WARN", made.logs()


@pytest.mark.timeout(120)
def test_a_new_job_keeps_what_its_owner_gave_to_sbatch(cluster: Cluster, project: Callable[..., ScriptedRun]) -> None:
    """Without a site file that says it again: a requeue is forbidden, and Slurm knows the options."""
    cluster.restart(job_requeue=0)
    try:
        made = project(sbatch_omit=("requeue",))
        once = f'[ -e "{made.folder}/once" ] || {{ touch "{made.folder}/once"; exit 137; }}'
        first = made.submit("--nice=9", "--comment=two words, 'quoted'", "--exclude=n1", BODY=once)
        second = made.next_job(0)
        assert cluster.wait(second) == "COMPLETED", made.logs()
        one, two = cluster.job(first), cluster.job(second)
        assert two["Nice"] == "9" and one["ExcNodeList"] == two["ExcNodeList"] == "n1"
        assert two["Comment"].startswith("two words, 'quoted' afina:"), two
    finally:
        cluster.restart(job_requeue=1)


# -- submissions whose answer is lost ----------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_job_whose_answer_is_lost_is_found(cluster: Cluster, here: ScriptedRun) -> None:
    here.lose_answers()
    job = submit_sbatch(here.plan, here.run)
    queued = cluster.root(["squeue", "--noheader", "--name=other", "--format=%i"]).stdout.split()
    assert [job] == queued == [str(j) for j in here.jobs()] and not (here.run.path / "intent.json").exists()


@pytest.mark.timeout(120)
def test_an_ambiguous_answer_keeps_the_run_and_no_second_job_is_queued(cluster: Cluster, here: ScriptedRun) -> None:
    here.lose_answers()
    program(
        here.folder / "bin", "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    with pytest.raises(SlurmError, match="may be in the queue all the same") as caught:
        submit_sbatch(here.plan, here.run)
    assert caught.value.cause == AMBIGUOUS and "afina submit" in caught.value.remedy and here.jobs() == []
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        check_not_queued(here.run)
    (here.folder / "bin/squeue").unlink()
    with pytest.raises(InputError, match="of this run is PENDING"):
        check_not_queued(here.run)
    assert len(here.jobs()) == 1 and not (here.run.path / "intent.json").exists()


@pytest.mark.timeout(120)
def test_a_lost_answer_without_a_job_is_settled_after_a_while(here: ScriptedRun) -> None:
    program(here.folder / "bin", "sbatch", LOST)
    with pytest.raises(SlurmError):
        submit_sbatch(here.plan, here.run)
    with pytest.raises(SlurmError, match="its job may still come"):
        check_not_queued(here.run)
    os.utime(here.run.path / "intent.json", (time.time() - 300,) * 2)  # its age is that of the file
    check_not_queued(here.run)
    assert not (here.run.path / "intent.json").exists()


# -- a prediction's array ----------------------------------------------------------------------------------------------

PREDICT = """
trap 'touch "$parts/part-00000$task.parquet"; exit 75' TERM
task=${2%/*} parts=$(dirname "$0")
echo "$task ${SLURM_RESTART_COUNT:-0}" >>"$parts/starts"
[ -z "${SLURM_RESTART_COUNT:-}" ] || exit 0
for ((i = 0; i < 600; i++)); do [ ! -e "$parts/go" ] || exit 0; sleep 0.1; done
"""


@pytest.mark.timeout(180)
def test_one_task_of_a_prediction_is_requeued_alone(cluster: Cluster, folder: Path) -> None:
    """The last task to begin has the array's own number: a requeue of that number would be all tasks."""
    parts = folder / "parts"
    parts.mkdir()
    (parts / "worker.sh").write_text(PREDICT)
    (parts / "worker.argv").write_bytes(b"".join(word.encode() + b"\0" for word in ("bash", str(parts / "worker.sh"))))
    for name, path in job_scripts(("predict.sbatch", "job.sh", "node.sh")).items():
        shutil.copy(path, parts / name)
    give_to_user(folder, cluster)
    array = cluster.sbatch(
        "--array=0-1", "--time=5", "--output=log-%a", parts / "predict.sbatch", str(parts), "2", cwd=folder
    )
    starts = parts / "starts"
    wait_until(lambda: starts.exists() and len(starts.read_text().splitlines()) == 2)
    cluster.run_as_user(["scancel", "--batch", "--signal=USR1", f"{array}_1"], check=True)
    assert cluster.wait(f"{array}_1", restarts=1) == "COMPLETED"
    assert cluster.job(f"{array}_0")["JobState"] == "RUNNING", "its sibling works on"
    (parts / "go").touch()
    assert cluster.wait(f"{array}_0") == "COMPLETED"
    assert sorted(starts.read_text().splitlines()) == ["0 0", "1 0", "1 1"]
