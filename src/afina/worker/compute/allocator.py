"""glibc's malloc, tuned to keep the memory that a training step frees for the next step.

By default glibc returns large blocks to the system at once and every step maps them again, page by page: 15,000 page
faults a step for the word embeddings' gradient alone, a tenth of a step of short texts on the CPU.

Not covered: other C libraries, where this has no effect; GPU memory, which torch caches itself.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["tune_malloc"]

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def tune_malloc() -> bool:
    """Keep freed memory in this process; returns whether the C library does. A `MALLOC_…` variable in the environment takes precedence."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
