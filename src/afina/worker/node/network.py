"""The network interface that leads to another node, from the kernel's own routes; nothing is sent."""

from __future__ import annotations

import fcntl
import socket
import struct

__all__ = ["interface_to", "is_loopback"]

_SIOCGIFADDR = 0x8915  # netdevice(7)


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
