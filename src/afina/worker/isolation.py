"""Cut this process and its children off from every network: what works then works on an offline node too.

A network namespace of its own has no interface but a loopback that is down. An ordinary user needs a user namespace for it,
which most clusters allow (Apptainer without setuid needs the same); root does not.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["cut_network", "interfaces"]

# <sched.h>
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def cut_network() -> bool:
    """Enter an empty network namespace for good; returns whether the kernel allowed it. Before any thread is started.

    The process keeps its user and group; files of other owners look like those of `nobody`, and stay as readable as before.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNET) == 0:
        return True
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)
    return True


def interfaces() -> list[str]:
    """Names of the network interfaces that this process sees, without the loopback."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return [name for line in lines if (name := line.partition(":")[0].strip()) != "lo"]
