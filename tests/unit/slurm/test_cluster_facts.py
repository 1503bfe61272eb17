"""Facts about a cluster from its commands' answers, and the jobs that it will never run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.common import program
from tests.unit.conftest import Ran, tree

from afina.slurm.cluster import Cluster, Qos, parse_associations, parse_config, parse_partitions, read_cluster
from afina.slurm.job_limits import JobSize, limit_of, refusal

#: As sinfo 22.05 and 23.11 print it: two kinds of nodes, a drained one, types, sockets, no GPUs, a limit on nodes.
SINFO = """\
gpu*|up|1-00:00:00|1-4|2|64|512000|gpu:a100:4(S:0-1)|idle
gpu*|up|1-00:00:00|1-4|1|64|256000|gpu:a100:2,gpu:v100:2,mps:200|drained*
cpu|up|infinite|1-infinite|100|48|190000|(null)|allocated
debug|up|30:00|1-1|1|8|16000|gpu:1|idle
old|inact|4:00:00|1-infinite|0|16|64000|(null)|n/a
not a line
"""
CONFIG = """\
Configuration data as of 2026-11-25T17:54:01
ClusterName             = elk
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = REQUEUE
"""


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(parse_partitions(SINFO), parse_config(CONFIG))


def test_partitions_are_read_with_all_their_kinds_of_nodes(cluster: Cluster) -> None:
    assert [p.name for p in cluster.partitions] == ["gpu", "cpu", "debug", "old"]
    gpu, cpu, debug, old = cluster.partitions
    assert cluster.default is gpu and (gpu.max_minutes, gpu.max_nodes, gpu.num_nodes) == (1440, 4, 3)
    assert [(k.count, k.gpus, k.gpu_types, k.away) for k in gpu.nodes] == [
        (2, 4, ("a100",), False),
        (1, 4, ("a100", "v100"), True),
    ]
    assert (cpu.max_minutes, cpu.max_nodes, cpu.gpus_per_node) == (None, None, 0)
    assert (debug.max_minutes, debug.gpus_per_node) == (30, 1)
    assert not old.up and old.nodes == ()
    assert cluster.config["KillWait"] == "30 sec" and cluster.config["AsOf"] == "2026-11-25T17:54:01"
    assert cluster.name == "elk"


USUAL = JobSize(nodes=1, gpus=1, cpus=8, mem_gb=64, minutes=60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"minutes": 1440}, None),
        ({"minutes": 1441}, "24 h 1 min are more than the 24 h that partition gpu allows"),
        ({"gpus": 4}, None),
        ({"gpus": 5}, "5 GPUs per node are requested, and no node of partition gpu has more than 4 GPUs"),
        ({"cpus": 65}, "65 cores per node"),
        ({"mem_gb": 501}, "no node of partition gpu has more than 500 GB of memory"),
        ({"nodes": 5}, "5 nodes are more than the 4"),
        ({"nodes": 3, "mem_gb": 300}, "partition gpu has 2 of them"),
        ({"partitions": ("cpu",)}, "no node of partition cpu has more than no GPUs"),
        ({"partitions": ("cpu", "gpu")}, None),
        ({"partitions": ("gqu",)}, "this cluster has no such partition"),
        ({"partitions": ("debug",), "minutes": 31}, "the 30 min that partition debug allows"),
        # A QOS that is not known may lift the limits of a partition; what a node has it cannot lift.
        ({"qos": "long", "minutes": 5000}, None),
        ({"qos": "long", "gpus": 5}, "5 GPUs"),
    ],
)
def test_what_no_partition_will_run_is_refused(
    cluster: Cluster, changes: dict[str, object], message: str | None
) -> None:
    refused = refusal(replace(USUAL, **changes), cluster)  # type: ignore[arg-type]
    if message is None:
        assert refused is None
    else:
        assert refused is not None and message in refused[0] and refused[1]


def test_remedies_name_what_there_is(cluster: Cluster) -> None:
    assert "did you mean `gpu`?" in (refusal(replace(USUAL, partitions=("gqu",)), cluster) or ("", ""))[1]
    long = refusal(replace(USUAL, gpus=0, mem_gb=100, minutes=3000), cluster)
    assert long is not None and "--time 1440" in long[1] and "SBATCH_PARTITION=cpu" in long[1]


def test_a_qos_with_a_limit_of_its_own(cluster: Cluster) -> None:
    short = replace(cluster, qos=(Qos("short", 20), Qos("long", 9000, ("PartitionTimeLimit",)), Qos("plain")))
    assert "QOS short allows" in (refusal(replace(USUAL, qos="short"), short) or ("", ""))[0]
    assert refusal(replace(USUAL, qos="long", minutes=5000), short) is None
    assert refusal(replace(USUAL, qos="plain", minutes=5000), short) is not None


def test_nothing_is_refused_where_nothing_is_known() -> None:
    assert refusal(replace(USUAL, gpus=99), Cluster()) is None
    blank = Cluster(parse_partitions("x*|up|n/a|n/a|1|?|?|gpu:?|unknown\n"))
    assert refusal(replace(USUAL, gpus=1, minutes=10**6), blank) is None
    assert limit_of(USUAL, Cluster()) is None


def test_the_limit_is_that_of_the_partitions_asked_for(cluster: Cluster) -> None:
    assert limit_of(USUAL, cluster) == 1440
    assert limit_of(replace(USUAL, partitions=("debug", "gpu")), cluster) == 1440
    assert limit_of(replace(USUAL, partitions=("debug", "cpu")), cluster) is None


def test_accounts_of_other_clusters_are_not_ours() -> None:
    answer = "elk|physics||normal,long|normal|2-00:00:00\nmoose|zoo||normal||\nelk|maths|gpu|||\nelk|||||\n"
    found = parse_associations(answer, "elk")
    assert [(a.account, a.partition, a.qos, a.max_minutes) for a in found] == [
        ("physics", "", ("normal", "long"), 2880),
        ("maths", "gpu", (), None),
    ]
    assert {a.account for a in parse_associations(answer, None)} == {"physics", "zoo", "maths"}


# -- through the commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "fake bin"
    (tmp_path / "answer").write_text(SINFO)
    program(folder, "sinfo", f'[ "$1" = --exact ] && cat "{tmp_path}/answer"\n')
    program(folder, "scontrol", f"cat <<'END'\n{CONFIG}END\n")
    for name in ("sacctmgr", "sbatch", "squeue", "sacct", "scancel", "srun"):
        program(folder, name, f'echo "{name}: not here" >&2; exit 1\n')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_cluster_without_accounting_is_known_without_accounts(bin: Path) -> None:
    found = read_cluster()
    assert len(found.partitions) == 4 and found.name == "elk"
    assert found.associations == () and found.qos == ()
    program(bin, "sinfo", "exit 1\n")
    assert read_cluster() == Cluster()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("submit", ["--time", "2-0"], "partition gpu allows"),
        ("submit", ["--gpus-per-node", "8"], "8 GPUs per node"),
        ("submit", ["--set", "resources.mem_gb=600"], "600 GB of memory per node"),
        ("sweep", ["--seeds", "2", "--gpus-per-node", "8"], "8 GPUs per node"),
    ],
)
def test_a_submission_that_cannot_succeed_leaves_nothing(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], bin: Path, scratch: Path, model_folder: Path,
    name: str, options: list[str], message: str,
) -> None:  # fmt: skip
    """And it is refused before anything is prepared."""
    file = recipe_file(model=str(model_folder))
    before = tree(scratch)
    done = command(name, file, *options)
    assert done.returncode == 3 and message in done.stderr and "remedy: " in done.stderr, done
    assert tree(scratch) == before


def test_the_partition_of_the_site_counts(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], bin: Path, scratch: Path, model_folder: Path
) -> None:
    done = command("submit", recipe_file(model=str(model_folder)), env={"SBATCH_PARTITION": "cpu"})
    assert done.returncode == 3 and "no node of partition cpu has more than no GPUs" in done.stderr
    assert "SBATCH_PARTITION=gpu, which has it" in done.stderr
