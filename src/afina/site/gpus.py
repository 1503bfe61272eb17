"""GPUs as the environment and the driver's files tell of them, without torch: how many, whether they are slices, which driver.

Reads `CUDA_VISIBLE_DEVICES` as CUDA does (CUDA C++ programming guide, environment variables; NVIDIA's MIG user guide) and
/proc/driver/nvidia. Not measured on a GPU: the tests give it what those texts say. ROCm is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["DRIVER_FILE", "MINIMUM_DRIVER", "driver_version", "fits_driver", "minimum_driver", "mig_slices", "visible"]

DRIVER_FILE = Path("/proc/driver/nvidia/version")

#: The oldest driver for programs of each major CUDA version (NVIDIA, "CUDA Compatibility", minor version compatibility).
MINIMUM_DRIVER: dict[int, str] = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


def visible(env: Mapping[str, str]) -> tuple[str, ...] | None:
    """The devices that `CUDA_VISIBLE_DEVICES` names, or None where it is not set.

    CUDA stops at the first entry that is no device: `0,-1,1` is one. `NoDevFiles` is how Slurm says none.
    """
    value = env.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    found: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[0-9A-Za-z/-]+", entry):
            break
        found.append(entry)
    return tuple(found)


def mig_slices(env: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the visible devices that are slices of a GPU (MIG); a process can use only the first of them."""
    return tuple(device for device in visible(env) or () if device.startswith("MIG-"))


def driver_version(file: Path = DRIVER_FILE) -> str | None:
    """The NVIDIA driver of this machine, e.g. `535.104.05`; None where there is none, or it says nothing that is a version."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", file.read_text(errors="replace"))
    except OSError:
        return None
    return found[0] if found else None


def minimum_driver(cuda: str | None) -> str | None:
    """The oldest driver that PyTorch for this CUDA (`12.6`) runs on, or None: no CUDA, or one that is not known here."""
    major = (cuda or "").partition(".")[0]
    return MINIMUM_DRIVER.get(int(major)) if major.isdigit() else None


def fits_driver(driver: str, minimum: str) -> bool:
    return _numbers(driver) >= _numbers(minimum)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
