"""This Python, where jobs run without an image: has it what training needs?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys

from afina.errors import SiteError

__all__ = ["check_python", "lacking"]

#: The module of a distribution, where it has another name.
_MODULES = {"scikit-learn": "sklearn"}
#: Of the extra `train`: only a search, and only figures, need these.
_OPTIONAL = ("matplotlib", "optuna")


def lacking() -> list[str]:
    """Requirements of the extra `train` that this Python does not meet: `torch>=2.6`, `transformers>=5.17 (4.40.1 is here)`. Imports nothing."""
    try:
        required = importlib.metadata.requires("afina") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source
        required = ["torch; extra == 'train'", "transformers; extra == 'train'"]
    missing = []
    for line in required:
        match = re.fullmatch(r"([\w.-]+)(?:>=([\d.]+))?\s*;\s*extra == ['\"]train['\"]", line)
        if match is None or match[1] in _OPTIONAL:
            continue
        name, least = match[1], match[2] or "0"
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # A module of the cluster may bring it without its metadata.
            if importlib.util.find_spec(_MODULES.get(name, name)) is None:
                missing.append(f"{name}>={least}")
            continue
        if _numbers(here) < _numbers(least):
            missing.append(f"{name}>={least} ({here} is here)")
    return missing


def check_python() -> None:
    """Refuse to run without an image where this Python cannot train.

    Raises:
        SiteError: with the packages that it lacks.
    """
    if missing := lacking():
        raise SiteError(
            f"no image is named, and {sys.executable} cannot train: it lacks {', '.join(missing)}",
            "set AFINA_IMAGE to an image (afina image build, afina image pull), or install afina with them, in the checkout: "
            "pip install '.[train]'",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].strip(".").split(".") if part)  # type: ignore[index]
