"""The processor of this machine, as Linux describes it in /proc/cpuinfo (proc(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Processor", "processor"]


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
