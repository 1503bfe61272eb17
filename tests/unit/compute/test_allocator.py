"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from afina.worker.compute.allocator import tune_malloc

_CODE = """
import resource
from afina.worker.compute.allocator import tune_malloc

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
