"""A quicker start: hide packages that Transformers and evaluate would import for nothing, and pause the garbage collector meanwhile.

Transformers imports `datasets` (and with it pandas and pyarrow) for isinstance checks, and SciPy for the loss of object detection,
wherever they are installed: a quarter of the modules that a run would load before its first step. afina reads its prepared
data itself, and imports SciPy with the first evaluation that needs it.

Importing makes hundreds of thousands of objects that stay, and the collector goes through all of them again and again while
they are made: 0.7 of the 3.5 s of processor time that a training process's imports take.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

__all__ = ["NOT_NEEDED", "gc_paused", "hide_packages", "import_evaluate", "import_peft"]

#: What Transformers would import and afina imports itself, where it is needed: peft only with an adapter.
NOT_NEEDED = ("datasets", "scipy", "peft")


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector for the block: for imports and for building a model."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def hide_packages(*packages: str) -> Iterator[None]:
    """For what the block imports, Transformers takes `packages` for not installed; the garbage collector is paused.

    A version of Transformers that asks in another way than `is_<package>_available` is left alone.
    """
    with gc_paused():
        utils = importlib.import_module("transformers.utils")
        names = [f"is_{package}_available" for package in packages]
        known = {name: getattr(utils, name) for name in names if hasattr(utils, name)}
        for name in known:
            setattr(utils, name, lambda: False)
        try:
            yield
        finally:
            for name, original in known.items():
                setattr(utils, name, original)


def import_evaluate() -> Any:
    """The package `evaluate`; its evaluators, which import SciPy's statistics for a second, only when something takes one of them."""
    late = ("evaluate.evaluator", "evaluate.evaluation_suite")
    if "evaluate" in sys.modules:
        return sys.modules["evaluate"]
    sys.modules.update({name: _Placeholder(name) for name in late})
    try:
        package: Any = importlib.import_module("evaluate")
    finally:
        for name in late:
            del sys.modules[name]
    names = [name for name, value in vars(package).items() if isinstance(value, _Placeholder)]
    for name in names:
        delattr(package, name)

    def take(name: str) -> Any:
        if name in names:
            modules = [importlib.import_module(module) for module in late]
            for each in names:
                setattr(package, each, next(getattr(m, each) for m in modules if hasattr(m, each)))
            return getattr(package, name)
        raise AttributeError(f"module 'evaluate' has no attribute {name!r}")

    package.__getattr__ = take
    return package


def import_peft() -> Any:
    """The package `peft`, without bitsandbytes, which it would import for two seconds wherever it is installed."""
    if "peft" in sys.modules or "bitsandbytes" in sys.modules:
        return importlib.import_module("peft")
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # not to be found, for the import system
    try:
        package = importlib.import_module("peft")
        package.import_utils.is_bnb_available()  # remembers the answer
    finally:
        del sys.modules["bitsandbytes"]
    return package


class _Placeholder(ModuleType):
    """A module whose every name is itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self
