"""The processor in /proc/cpuinfo, and malloc that keeps freed memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from afina.worker.compute.cpu import Processor, free_memory, processor, tune_malloc

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


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_nearest_limit_leaves(version: int, tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    job, step = (groups / ("memory" if version == 1 else "") / path for path in ("job_7", "job_7/step"))
    for folder in (proc / "self", step):
        folder.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert free_memory(proc, groups) == 8000 << 10
    (proc / "self/cgroup").write_text("3:cpu:/\n4:memory:/job_7/step\n" if version == 1 else "0::/job_7/step\n")
    assert free_memory(proc, groups) == 8000 << 10, "a system without the files"
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    for folder, most in ((job, "1000000"), (step, "9223372036854771712" if version == 1 else "max")):
        (folder / limit).write_text(most + "\n")
        (folder / used).write_text("700000\n")
    assert free_memory(proc, groups) == 300000
    prefix = "total_" if version == 1 else ""
    (job / "memory.stat").write_text(f"anon 7\n{prefix}inactive_file 100000\n{prefix}active_file 50000\n")
    assert free_memory(proc, groups) == 450000, "files are given back"


def test_memory_is_that_of_the_process_and_not_of_its_parent() -> None:
    ballast = np.ones(60_000_000)  # 480 MB
    code = "from afina.worker.compute.cpu import resident_bytes as r; print(r(), r(most=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, most = map(int, done.stdout.split())
    assert 5e6 < now <= most < 2e8 < ballast.nbytes
