"""Find scratch, the image and a container runtime on this machine, for the site file."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from afina.site.references import is_reference

__all__ = ["Machine", "find_machine"]

_SCRATCH_VARIABLES = ("SCRATCH", "WORK", "PSCRATCH", "SCRATCHDIR", "WORKDIR", "CSCRATCH")
_SCRATCH_FOLDERS = ("/scratch/{}", "/scratch/users/{}", "/lustre/scratch/{}", "/gpfs/scratch/{}", "/work/{}")


@dataclass(frozen=True)
class Machine:
    """Scratch, the image (None: jobs use this Python environment), its runtime and the module to load for it.

    `scratch_why` and `image_why` become comments in the site file.
    """

    scratch: str
    scratch_why: str
    image: str | None
    image_why: str
    runtime: str
    module: str | None = None


def find_machine(folder: Path, env: Mapping[str, str], scratch: str | None = None, image: str | None = None) -> Machine:
    """The machine as it is found, with `scratch` and `image` where the user names them.

    Args:
        folder: the project, where an image may lie.
    """
    where, why = (scratch, "Shared scratch, as given.") if scratch else _scratch(folder, env)
    where = str(Path(where).expanduser().absolute())
    runtime = next((name for name in ("apptainer", "singularity") if shutil.which(name, path=env.get("PATH"))), None)
    module = None if runtime else _module()
    runtime = runtime or ("singularity" if module and module.startswith("singularity") else "apptainer")
    named = image or env.get("AFINA_IMAGE")
    candidates = [named] if named else [f"{where}/afina.sif", str(folder / "afina.sif"), "afina.sif"]
    if named and is_reference(named):
        return Machine(where, why, named, "The image, pulled to scratch once.", runtime, module)
    paths = [Path(candidate).expanduser() for candidate in candidates]
    existing = next((str(path.absolute()) for path in paths if path.is_file()), None)
    if existing:
        return Machine(where, why, existing, "The image.", runtime, module)
    if not named and importlib.util.find_spec("torch") is not None:
        image_why = "No image: jobs use the afina of this Python environment; every node must see it at the same path."
        return Machine(where, why, None, image_why, "none")
    image_why = "The image that container/build.sh makes; it does not exist yet."
    return Machine(where, why, str(paths[0].absolute()), image_why, runtime, module)


def _scratch(folder: Path, env: Mapping[str, str]) -> tuple[str, str]:
    """A scratch folder and where it was found."""
    user = env.get("USER") or env.get("LOGNAME") or "me"
    if env.get("AFINA_SCRATCH"):
        return env["AFINA_SCRATCH"], "Shared scratch: $AFINA_SCRATCH, as it was set."
    places = [(env[name], f"${name}") for name in _SCRATCH_VARIABLES if env.get(name)]
    places += [(pattern.format(user), pattern.format("$USER")) for pattern in _SCRATCH_FOLDERS]
    for place, name in places:
        with contextlib.suppress(OSError):
            if Path(place).is_dir() and os.access(place, os.W_OK | os.X_OK):
                return (
                    f"{place.rstrip('/')}/afina",
                    f"Shared scratch: {name} of this cluster. Every node must see it at this path.",
                )
    return (
        str(folder.absolute() / "scratch"),
        "No scratch found ($SCRATCH, $WORK, /scratch/$USER, …): a folder here. On a cluster choose one that every node sees.",
    )


def _module() -> str | None:
    """An environment module that has Apptainer, as a login shell lists them; None without modules."""
    script = "module -t avail apptainer singularity 2>&1"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run(
            ["bash", "-lc", script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
        ).stdout
        names = [line.strip().removesuffix("(default)").rstrip() for line in listed.splitlines()]
        for kind in ("apptainer", "singularity"):
            pattern = rf"(\S*/)?{kind}(-\w+)?(/[\w.+-]+)?"
            if matches := [name for name in names if re.fullmatch(pattern, name, re.IGNORECASE)]:
                return matches[-1]
    return None
