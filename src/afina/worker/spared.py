"""Imports that a training run does without.

Transformers imports `datasets` (and with it pandas and pyarrow) for isinstance checks, and SciPy for the loss of object detection,
wherever they are installed: a quarter of the modules that a run would load before its first step. afina reads its prepared
data itself, and imports SciPy with the first evaluation that needs it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

__all__ = ["without"]


@contextlib.contextmanager
def without(*packages: str) -> Iterator[None]:
    """For what is imported inside, Transformers takes `packages` for not installed; a version that asks otherwise is left alone."""
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
