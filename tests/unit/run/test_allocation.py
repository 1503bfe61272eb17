"""What Slurm gave, read once from the environment."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
from tests.common import ROOT

from afina.run import allocation
from afina.run.allocation import Allocation, interface_to, is_loopback, socket_interface

JOB = {
    "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "2", "SLURM_NNODES": "3", "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "n2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "1", "AFINA_LAUNCH": "slurm",
    "AFINA_ATTEMPT": "42.2", "AFINA_NODES": "n1 n2 n3 ", "AFINA_HEAD": "10.0.0.1", "AFINA_PORT": "20301",
    "AFINA_DEADLINE": "1700000000", "SECRET_TOKEN": "x",
}  # fmt: skip


def test_of_a_job() -> None:
    found = Allocation.from_env(JOB)
    assert (found.job, found.attempt, found.restart, found.in_job) == ("42", "42.2", 2, True)
    assert (found.nodes, found.node, found.node_name, found.node_names) == (3, 1, "n2", ("n1", "n2", "n3"))
    assert (found.gpus, found.cpus, found.cores()) == (4, 1, 1)
    assert (found.head, found.port, found.deadline) == ("10.0.0.1", 20301, 1.7e9)
    assert found.slurm["SLURM_JOB_ID"] == "42" and "SECRET_TOKEN" not in json.dumps(found.to_json())


def test_of_a_step_that_uses_fewer_nodes() -> None:
    assert Allocation.from_env({**JOB, "SLURM_STEP_NUM_NODES": "2"}).nodes == 2


def test_of_an_arrays_task() -> None:
    """Named as `slurm/job.sh` names it: by both numbers."""
    found = Allocation.from_env({**JOB, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "7"})
    assert (found.job, found.restart) == ("40_7", 2)


def test_without_slurm() -> None:
    found = Allocation.from_env({})
    assert (found.job, found.attempt, found.in_job, found.nodes, found.node) == (None, "local-1", False, 1, 0)
    assert (found.gpus, found.deadline, found.head, found.node_name) == (None, None, None, platform.node())
    assert found.cores() == len(os.sched_getaffinity(0))
    assert not Allocation.from_env({"SLURM_JOB_ID": "42", "AFINA_LAUNCH": "local"}).in_job, "afina train inside salloc"


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({}, None),
        ({"AFINA_STAGE": "0"}, None),
        ({"AFINA_STAGE": "/local"}, "/local"),
        ({"AFINA_STAGE": "1"}, "/tmp"),
        ({"AFINA_STAGE": "1", "TMPDIR": "/t"}, "/t"),
        ({"AFINA_STAGE": "1", "TMPDIR": "/t", "SLURM_TMPDIR": "/s"}, "/s"),
    ],
)
def test_where_data_is_staged(env: dict[str, str], folder: str | None) -> None:
    assert Allocation.from_env(env).stage == (folder and Path(folder))


def test_nobody_else_reads_slurms_variables() -> None:
    reads = re.compile(r"""(environ|env)(\.get\(|\[)\s*f?["'](SLURM|AFINA_(ATTEMPT|LAUNCH|HEAD|PORT|NODES|DEADLINE))""")
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "src/afina").rglob("*.py")
        if reads.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"src/afina/run/allocation.py"}


def test_the_interface_is_that_of_the_kernels_route() -> None:
    assert interface_to("127.0.0.1") is None and interface_to("no.such.host.invalid") is None
    route = subprocess.run(["cat", "/proc/net/route"], capture_output=True, text=True, check=True).stdout.splitlines()[
        1:
    ]
    default = [line.split()[0] for line in route if line.split()[1] == "00000000"]
    if default:
        assert interface_to("192.0.2.1") == default[0], "TEST-NET-1, which only the default route leads to"


def test_a_host_name_that_is_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.1.1, as Debian writes into /etc/hosts: gloo would listen where no other node can reach it."""
    assert is_loopback("127.0.1.1") and not is_loopback("192.0.2.1") and not is_loopback("no.such.host.invalid")
    monkeypatch.setattr(allocation, "is_loopback", lambda host: True)
    monkeypatch.setattr(allocation, "interface_to", {"head": None, "n2": "ib0"}.get)
    two = Allocation(head="head", node_name="n1", node_names=("n1", "n2"))
    assert socket_interface(two, {}) == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
    assert socket_interface(two, {"GLOO_SOCKET_IFNAME": "eth1"}) == {}, "the site's choice"
    monkeypatch.setattr(allocation, "is_loopback", lambda host: False)
    assert socket_interface(two, {}) == {}
