"""What the test cluster needs of the machine: process details, mounts, ports, cgroups; nothing of Slurm."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path

__all__ = [
    "comm",
    "first_free_block",
    "listens",
    "make_host_name_resolve",
    "mounts_below",
    "open_files",
    "remove_empty_folders",
    "short_host_name",
]


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def open_files(pid: int) -> list[str]:
    names = []
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                names.append(str(entry.readlink()))
    return names


def mounts_below(folder: Path) -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    points = [re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), point) for point in points]
    return [point for point in points if Path(point).is_relative_to(folder)]


def remove_empty_folders(top: Path) -> None:
    """Slurm leaves its cgroups behind; one with processes (another cluster's) cannot be removed."""
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def first_free_block(first: int, size: int, blocks: int) -> int | None:
    """The first port of the first of `blocks` blocks of `size` ports that are all free."""
    for start in range(first, first + blocks * size, size):
        if not any(map(listens, range(start, start + size))):
            return start
    return None


def short_host_name() -> str:
    return socket.gethostname().split(".")[0]


def make_host_name_resolve() -> None:
    """slurmctld and srun resolve the machine's short name; where it does not resolve, add it to /etc/hosts."""
    try:
        socket.gethostbyname(short_host_name())
    except OSError:
        with Path("/etc/hosts").open("a") as hosts:
            hosts.write(f"127.0.0.1 {short_host_name()}\n")
