"""The network interface that leads to another node, from the kernel's own routes; nothing is sent."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping

from afina.run.allocation import Allocation

__all__ = ["interface_to", "is_loopback", "socket_interface"]

_SIOCGIFADDR = 0x8915  # netdevice(7)


def socket_interface(allocation: Allocation, env: Mapping[str, str]) -> dict[str, str]:
    """The network interface to the other nodes, where this node's own name is its loopback address (127.0.1.1, as Debian writes).

    Of several nodes. gloo listens on the address of the host's name, which is then reachable from nowhere; NCCL gets the same interface. What the site
    has set stays.
    """
    if env.get("GLOO_SOCKET_IFNAME") or not is_loopback(socket.gethostname()):
        return {}
    others = [allocation.head, *(name for name in allocation.node_names if name != allocation.node_name)]
    name = next((found for other in others if other and (found := interface_to(other))), None)
    if name is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": env.get("NCCL_SOCKET_IFNAME") or name}


def is_loopback(host: str) -> bool:
    """True where every IPv4 address of the name is this machine's loopback."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        return False
    return bool(addresses) and all(address.startswith("127.") for address in addresses)


def interface_to(host: str) -> str | None:
    """The interface through which packets to `host` leave; None for the loopback, and where there is no route.

    Not covered: IPv6 alone, several addresses of one interface beside its first.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket: only looks up the route
            address = probe.getsockname()[0]
            if address.startswith("127."):
                return None
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    except OSError:
        return None
    return None
