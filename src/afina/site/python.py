"""This Python, of the image or where jobs run without one: has it what training needs?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import sys

from afina.errors import EnvironmentProblem, SiteError
from afina.recipe.schema import Recipe
from afina.recipe.trackers import TRACKERS

__all__ = ["check_packages", "check_python", "lacking"]

#: The module of a distribution, where it has another name.
_MODULES = {"scikit-learn": "sklearn"}
#: Of the extra `train`: only weights in 4 bits, only figures, and only a search need these.
_OPTIONAL = ("bitsandbytes", "matplotlib", "optuna")


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


def check_packages(recipe: Recipe, *, trackers: bool = True) -> None:
    """Check that this Python has the packages that a recipe asks for beyond those of every training: in the prepare stage all of them, in an
    attempt, which may be in another environment, those without which nothing can be trained.

    Args:
        trackers: theirs too. An attempt goes on without a tracker, with a warning, whatever it fails of.

    Raises:
        EnvironmentProblem: one is missing.
    """
    wanted = [
        (f"trackers: {name}", TRACKERS[name], f"leave {name} out of trackers: metrics.jsonl has it all")
        for name in (recipe.trackers if trackers else ())
    ]
    if recipe.train.base_dtype == "nf4":
        wanted.append(("train.base_dtype: nf4", "bitsandbytes", "write bf16, which needs no package"))
    for key, package, otherwise in wanted:
        if importlib.util.find_spec(package) is not None:
            continue
        inside = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
        where = f"the image {inside}" if inside else f"the environment of {sys.executable}"
        remedy = (
            f"build an image that has it: add {package} to the extra `train` in pyproject.toml, then container/lock.sh and container/build.sh"
            if inside
            else f"{shlex.quote(sys.executable)} -m pip install {package}"
        )
        raise EnvironmentProblem(
            f"{key} needs the package {package}, which {where} does not have", f"{remedy}; or {otherwise}"
        )
