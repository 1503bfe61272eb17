"""The CPU of this machine: its processor, as /proc/cpuinfo describes it (proc(5)), memory, and glibc's malloc tuned for training steps.

Not covered: other C libraries than glibc, where the tuning has no effect.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Processor", "free_memory", "processor", "resident_bytes", "tune_malloc"]

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Files of a cgroup's limit and use: cgroups(7), version 1 and 2.
_LIMITS = (("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current"))


@dataclass(frozen=True)
class Processor:
    """The first of the machine's processors. `vendor` and `flags` are empty where Linux does not give them (ARM, POWER)."""

    name: str
    vendor: str
    flags: frozenset[str]

    @property
    def has_bfloat16(self) -> bool:
        """It has instructions for bfloat16 products (x86: AVX512-BF16, AMX); without them they are emulated."""
        return not self.flags.isdisjoint({"avx512_bf16", "amx_bf16"})


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """The first block of the file; without one, the machine's architecture is the name."""
    try:
        block = cpuinfo.read_text().partition("\n\n")[0]
    except OSError:
        block = ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
    flags = frozenset(fields.get("flags", "").split())
    return Processor(fields.get("model name", os.uname().machine), fields.get("vendor_id", ""), flags)


def resident_bytes(*, most: bool = False) -> int:
    """Memory of this process that is in RAM; `most`: the most since it was started.

    Not getrusage(2)'s `ru_maxrss`, which begins with what the parent had: of a run started in a notebook, the notebook's.
    """
    name = "VmHWM:" if most else "VmRSS:"
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next((int(words[1]) << 10 for words in lines if words[0] == name), 0)


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that processes can still take, the page cache included: of the machine, or of a cgroup above this process if it allows fewer."""
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    free = [int(words[1]) << 10 for words in lines if words[0] == "MemAvailable:"]
    free = free or [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in (proc / "self/cgroup").read_text().splitlines() if (proc / "self/cgroup").exists() else ():
        _, controllers, path = line.split(":", 2)
        root = cgroups if not controllers else cgroups / "memory" if "memory" in controllers.split(",") else None
        below = Path(path.lstrip("/"))
        for folder in [] if root is None else [root / part for part in (below, *below.parents)]:
            limit, used = (_number(folder / name) for name in _LIMITS[not controllers])
            if limit is not None and used is not None:
                free.append(max(0, limit - used + _cache(folder)))
    return min(free)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or `max`
        return None


def _cache(cgroup: Path) -> int:
    """Bytes of files that a cgroup may give back."""
    try:
        pairs = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    kinds = ("active_file", "inactive_file")
    return sum(int(pairs.get(f"total_{kind}", pairs.get(kind, 0))) for kind in kinds)


def tune_malloc() -> bool:
    """Let malloc keep the memory that a step frees for the next step; returns whether the C library does.

    By default glibc returns large blocks to the system at once and every step maps them again, page by page: 15,000 page
    faults a step for the word embeddings' gradient alone, a tenth of a step of short texts. A `MALLOC_…` variable in the
    environment takes precedence.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
