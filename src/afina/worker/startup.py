"""What starting up does without: imports that are not needed, and the garbage collector's looks at what stays.

Transformers imports `datasets` (and with it pandas and pyarrow) for isinstance checks, and SciPy for the loss of object detection,
wherever they are installed: a quarter of the modules that a run would load before its first step. afina reads its prepared
data itself, and imports SciPy with the first evaluation that needs it.

Importing makes hundreds of thousands of objects that are kept, and the collector looks through all of them again and again while
they come: 0.7 of the 3.5 s of processor time that a training process's imports take.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Iterator

__all__ = ["uncollected", "without"]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """What is made inside is not looked through for garbage until the end: for imports and for building a model."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def without(*packages: str) -> Iterator[None]:
    """For what is imported inside, Transformers takes `packages` for not installed; a version that asks otherwise is left alone.

    Nor does the garbage collector look at it.
    """
    with uncollected():
        utils = importlib.import_module("transformers.utils")
        names = [f"is_{package}_available" for package in packages]
        known = {name: getattr(utils, name) for name in names if hasattr(utils, name)}
        for name in known:
            setattr(utils, name, lambda: False)
        try:
            yield
        finally:
            for name, asked in known.items():
                setattr(utils, name, asked)
