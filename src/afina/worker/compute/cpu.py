"""The CPU of this machine: its processor, as /proc/cpuinfo describes it (proc(5)), and glibc's malloc tuned for training steps.

Not covered: other C libraries than glibc, where the tuning has no effect.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Processor", "processor", "tune_malloc"]

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


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
