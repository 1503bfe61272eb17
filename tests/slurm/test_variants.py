"""Differences between clusters: GPUs by --gres, more or fewer options, no requeue, no scontrol. Real jobs, no training.

The worker is a script that writes down what it was given and stops once, as a preempted run does; everything around it is the batch
script and the command line of a real submission.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from projects import ScriptedRun
from tests.common import ROOT

from afina.run.commands import sbatch_argv

#: `bash worker.sh COMMAND RUN …`, as `python -m afina.worker COMMAND RUN …` would be called: launch on each node, finish at the end.
WORKER = """
case $1 in
  launch)
    env -0 >"$2/env.$AFINA_ATTEMPT.${SLURM_NODEID:-0}"
    echo host >"$2/attempts/$AFINA_ATTEMPT/node$SLURM_NODEID.json"
    [ "$SLURM_NODEID" = 0 ] || exit 0
    if [ -e "$2/stopped" ]; then code=0; else touch "$2/stopped"; code=75; fi
    echo $code >"$2/attempts/$AFINA_ATTEMPT/exit"
    ;;
  finish)
    printf 'requeue\\n\\nstopped: to be continued\\n' >"$2/attempts/$3/next"
    ;;
esac
"""

#: What the batch script calls, Slurm's commands apart.
TOOLS = "bash cat cut date dirname env grep hostname mkdir mv rm sed sleep tail touch tr srun sbatch squeue"


class Variant(ScriptedRun):
    """A run of a special site, whose attempts stop once."""

    def log(self, job: int) -> str:
        return (self.run.path / f"slurm-{job}.out").read_text()

    def resumed_by(self, first: int) -> int:
        """The job that resumed the run, submitted by the first one."""
        self.cluster.wait(first)
        assert [line["via"] for line in self.run.lines("submissions.jsonl")] == ["resubmit"], self.log(first)
        (job,) = self.jobs()
        assert self.cluster.wait(job) == "COMPLETED", self.log(job)
        return job


@pytest.fixture
def variant(cluster: Cluster, folder: Path, host: Path) -> Iterator[Callable[..., Variant]]:
    yield lambda site, **resources: Variant(cluster, folder, host / "python", site, WORKER, **resources)
    cluster.cancel_all()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("request_", ["gpus-per-node", "gres"])
def test_gpus_in_either_spelling_come_back_after_a_requeue(
    cluster: Cluster, variant: Callable[..., Variant], request_: str
) -> None:
    made = variant({"gpu_request": request_}, nodes=2, gpus_per_node=2)
    job = made.submit()
    assert cluster.wait(job, restarts=1) == "COMPLETED", made.log(job)
    for restart, node in itertools.product((0, 1), (0, 1)):
        seen = made.environment(job, restart, node)
        assert (seen["SLURM_GPUS_ON_NODE"], seen["CUDA_VISIBLE_DEVICES"]) == ("2", "0,1")
        assert seen["AFINA_NODES"].split() == ["n1", "n2"]


@pytest.mark.timeout(180)
def test_a_type_of_gpu_and_no_requeue(cluster: Cluster, variant: Callable[..., Variant]) -> None:
    """Where no job may be requeued a new job resumes the run, with the same GPUs and options."""
    cluster.restart(job_requeue=0, gpu_type="a100")
    try:
        extra = ("--comment=two words, 'quoted'", "--nice=7")
        site = {"gpu_request": "gres:a100", "sbatch_extra": extra, "sbatch_omit": ("requeue", "mem")}
        made = variant(site, gpus_per_node=2, mem_gb=1)
        assert "#SBATCH --requeue" not in (made.run.path / "finetune.sbatch").read_text()
        first = made.submit(AFINA_SBATCH_EXTRA="\n".join(extra), AFINA_SBATCH_OMIT="requeue,mem")
        second = made.resumed_by(first)
        assert "no requeue" in made.log(first) and "disabled" in made.log(first)
        for job in (first, second):
            about = cluster.job(job)
            assert about["Requeue"] == "0" and about["Nice"] == "7", about
            assert about["Comment"].partition(" afina:")[0] == extra[0][10:], about
            assert about["TresPerNode"].replace("/", ":") == "gres:gpu:a100:2", about
            assert about.get("MinMemoryNode", "0") == "0", about
            assert made.environment(job)["SLURM_GPUS_ON_NODE"] == "2"
    finally:
        cluster.restart(job_requeue=1, gpu_type="")


@pytest.mark.timeout(180)
def test_no_scontrol_on_the_nodes(cluster: Cluster, variant: Callable[..., Variant]) -> None:
    made = variant({}, nodes=2, gpus_per_node=1)
    tools = made.folder / "bin"
    tools.mkdir()
    for name in TOOLS.split():
        (tools / name).symlink_to(str(shutil.which(name)))
    first = made.submit(PATH=str(tools))
    second = made.resumed_by(first)
    assert "scontrol: command not found" in made.log(first)
    for job in (first, second):
        seen = made.environment(job, node=1)
        assert (seen["AFINA_NODES"].split(), seen["AFINA_HEAD"]) == (["n1", "n2"], "n1")
        assert seen["SLURM_GPUS_ON_NODE"] == "1"


@pytest.mark.timeout(180)
def test_nothing_of_slurm_on_the_nodes_but_srun(cluster: Cluster, variant: Callable[..., Variant]) -> None:
    """Then the job cannot put itself back, and says how to go on."""
    made = variant({}, gpus_per_node=0)
    tools = made.folder / "bin"
    tools.mkdir()
    for name in TOOLS.split():
        if name not in ("sbatch", "squeue"):
            (tools / name).symlink_to(str(shutil.which(name)))
    # sbatch itself is found by the submission's own PATH, which is the job's too: by its whole name, then.
    argv = [str(shutil.which("sbatch")), *sbatch_argv(made.plan, made.run.path)[1:]]
    argv[argv.index("--export=ALL")] += f",PATH={tools}"
    job = int(cluster.run_as_user(argv, env=made.env, cwd=made.folder, check=True).stdout.split(";")[0])
    assert cluster.wait(job) == "FAILED"
    assert "continue with: sbatch" in made.log(job)
    seen = made.environment(job)
    # From Slurm 23.02 on the job knows its end without asking.
    assert seen["AFINA_DEADLINE"] == seen.get("SLURM_JOB_END_TIME", "")


@pytest.mark.timeout(60)
def test_lists_of_nodes_are_read_as_scontrol_reads_them(cluster: Cluster) -> None:
    lists = [
        "n1",
        "n[1-3,07]",
        "gpu-[08-11],login1,x[1-2]y[3,5-6]",
        "a[001-003]",
        "n[9-11]",
        "rack1gpu2,rack[10-11]gpu[7-8]",
    ]
    source = 'set -u; run=/ SLURM_JOB_ID=1; . "$0"; for list in "$@"; do afina_expand "$list"; done'
    script = ROOT / "slurm/job.sh"
    ours = subprocess.run(
        ["bash", "-c", source, str(script), *lists], capture_output=True, text=True, check=True
    ).stdout
    theirs = "".join(cluster.root(["scontrol", "show", "hostnames", names]).stdout for names in lists)
    assert ours == theirs and len(ours.split()) == 27


@pytest.mark.timeout(180)
def test_the_folder_of_a_copy_is_bound(cluster: Cluster, variant: Callable[..., Variant]) -> None:
    made = variant({"stage": "1"}, gpus_per_node=0)
    job = made.submit(AFINA_STAGE="1", TMPDIR=str(made.folder), APPTAINER_BIND="/opt")
    assert cluster.wait(job, restarts=1) == "COMPLETED", made.log(job)
    seen = made.environment(job)
    assert (seen["AFINA_STAGE"], seen["APPTAINER_BIND"]) == (str(made.folder), f"/opt,{made.folder}")
    assert os.environ.get("AFINA_STAGE") is None
