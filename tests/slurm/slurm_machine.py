"""What the test cluster asks of the machine: processes, mounts, ports, cgroups. It knows nothing of Slurm."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "alive",
    "comm",
    "environ",
    "first_free_block",
    "kill",
    "listens",
    "make_host_name_resolve",
    "mounts_below",
    "open_files",
    "pids",
    "remove_empty_folders",
    "short_host_name",
]


def pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def environ(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


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
    """Slurm leaves its cgroups behind; one that still holds processes (another cluster's) refuses to go."""
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def first_free_block(first: int, size: int, blocks: int) -> int | None:
    """The first port of the first of `blocks` blocks of `size` ports on which nobody listens."""
    for start in range(first, first + blocks * size, size):
        if not any(map(listens, range(start, start + size))):
            return start
    return None


def short_host_name() -> str:
    return socket.gethostname().split(".")[0]


def make_host_name_resolve() -> None:
    """slurmctld and srun look up the machine's short name; where it does not resolve, /etc/hosts gets a line."""
    try:
        socket.gethostbyname(short_host_name())
    except OSError:
        with Path("/etc/hosts").open("a") as hosts:
            hosts.write(f"127.0.0.1 {short_host_name()}\n")
