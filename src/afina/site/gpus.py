"""GPUs and NVIDIA's driver, without torch: visible devices, MIG slices, the driver's version and the oldest that a CUDA needs.

Reads `CUDA_VISIBLE_DEVICES` as CUDA does (CUDA C++ programming guide, environment variables; NVIDIA's MIG user guide) and
/proc/driver/nvidia. The tests follow those texts; no GPU was at hand. Not covered: ROCm.
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

    CUDA stops at the first invalid entry: `0,-1,1` is one device. Slurm writes `NoDevFiles` for none.
    """
    value = env.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    devices: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[0-9A-Za-z/-]+", entry):
            break
        devices.append(entry)
    return tuple(devices)


def mig_slices(env: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the visible devices that are slices of a GPU (MIG); a process can use only the first of them."""
    return tuple(device for device in visible(env) or () if device.startswith("MIG-"))


def driver_version(file: Path = DRIVER_FILE) -> str | None:
    """The NVIDIA driver of this machine, e.g. `535.104.05`; None where there is none, or its file holds no version."""
    try:
        match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", file.read_text(errors="replace"))
    except OSError:
        return None
    return match[0] if match else None


def minimum_driver(cuda: str | None) -> str | None:
    """The oldest driver for PyTorch with this CUDA (`12.6`); None without CUDA, or for an unknown one."""
    major = (cuda or "").partition(".")[0]
    return MINIMUM_DRIVER.get(int(major)) if major.isdigit() else None


def fits_driver(driver: str, minimum: str) -> bool:
    return _numbers(driver) >= _numbers(minimum)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
