"""The interface to other nodes."""

from __future__ import annotations

import subprocess

import pytest

from afina.run import network
from afina.run.allocation import Allocation
from afina.run.network import interface_to, is_loopback, socket_interface


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
    monkeypatch.setattr(network, "is_loopback", lambda host: True)
    monkeypatch.setattr(network, "interface_to", {"head": None, "n2": "ib0"}.get)
    allocation = Allocation(head="head", node_name="n1", node_names=("n1", "n2"))
    assert socket_interface(allocation, {}) == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib0"}
    assert socket_interface(allocation, {"GLOO_SOCKET_IFNAME": "eth1"}) == {}, "the site's choice"
    monkeypatch.setattr(network, "is_loopback", lambda host: False)
    assert socket_interface(allocation, {}) == {}
