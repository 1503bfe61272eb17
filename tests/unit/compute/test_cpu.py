"""The processor in /proc/cpuinfo, and malloc that keeps freed memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from afina.worker.compute.cpu import Processor, processor, tune_malloc

_CODE = """
import resource
from afina.worker.compute.cpu import tune_malloc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(48_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), int(tune_malloc()), faults() and faults())  # after tuning, the first round maps what the second reuses
"""


def test_freed_memory_stays_with_the_process() -> None:
    """Page faults of 20 blocks of 48 MB, allocated and freed in turn."""
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    before, tuned, after = map(int, done.stdout.split())
    if not tuned:
        pytest.skip("not glibc, or MALLOC_… is set")
    assert after < 2000 < before / 10, (before, after)


def test_malloc_variables_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not tune_malloc()


CPUINFO = "processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: {name}\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nflags\t\t: amx_bf16\n"


def test_the_processor_is_the_first_of_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO.format(vendor="AuthenticAMD", name="AMD EPYC 9554", flags="avx512f avx512_bf16"))
    first = processor(file)
    assert (first.name, first.vendor) == ("AMD EPYC 9554", "AuthenticAMD")
    assert first.flags == {"fpu", "avx512f", "avx512_bf16"} and first.has_bfloat16
    file.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert processor(file) == processor(tmp_path / "absent") == Processor(os.uname().machine, "", frozenset())
