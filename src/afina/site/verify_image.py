"""Checks of an image: that it is whole, signed, starts, and fits this afina and this machine."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from afina.errors import SiteError
from afina.files import sha256
from afina.processes import run_captured
from afina.site.finding import Finding
from afina.site.gpus import driver_version, fits_driver
from afina.site.image import BUILD_AGAIN, Image, check_signature, last_line, other_interface, summary
from afina.version import __version__

__all__ = ["check_fit", "verify"]

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "386": "i686"}
_PATIENCE_S = 300


def check_fit(image: Image, driver: str | None = None) -> Iterator[Finding]:
    """Compare the image with this afina and this machine; `driver` is the NVIDIA driver's version, None without one."""
    about = summary(image)
    inside = about["version"]
    other = other_interface(image.labels)
    if other and inside:
        yield Finding("version", "failed", other, BUILD_AGAIN)
    elif not inside:
        yield Finding("version", "unknown", "the image has no version label", "build it with container/build.sh")
    elif inside == __version__:
        yield Finding("version", "ok", f"afina {inside} is inside, as here")
    else:
        yield Finding("version", "warning", f"afina {inside} is inside, and {__version__} here", BUILD_AGAIN)
    wanted, here = _MACHINES.get(about["architecture"] or ""), platform.machine()
    if wanted is not None and wanted != here:
        message = f"the image is for {wanted}, and this machine is {here}"
        yield Finding("machine", "failed", message, "build it on such a machine")
    yield from _check_driver(about, driver)


def _check_driver(about: Mapping[str, Any], driver: str | None) -> Iterator[Finding]:
    cuda, minimum = about["cuda"], about["minimum_driver"]
    if cuda is None and "+cpu" in (about["torch"] or "+cpu"):
        if driver is not None:
            message = f"its PyTorch is for the CPU, and this machine has an NVIDIA driver ({driver})"
            yield Finding("driver", "warning", message, "build it without --cpu to train on the GPU")
    elif minimum is None:
        yield Finding("driver", "unknown", f"the driver that CUDA {cuda or '?'} needs is not known here")
    elif driver is None:
        message = f"driver {minimum} or newer is needed, and this machine has none: check on a GPU node"
        yield Finding("driver", "unknown", message)
    elif fits_driver(driver, minimum):
        yield Finding("driver", "ok", f"driver {driver}; {minimum} or newer is needed")
    else:
        message = f"driver {driver} is too old: CUDA {cuda} needs {minimum} or newer"
        remedy = "build the image for an older CUDA: container/build.sh --torch-index, see docs/image.md"
        yield Finding("driver", "failed", message, remedy)


def verify(image: Image, key: str | None, runtime: str, env: Mapping[str, str]) -> Iterator[Finding]:
    """All checks, one after the other: whole, checksum, signature, start, fit.

    Args:
        key: the key that must have signed it, as in `Site.image_key`.
    """
    yield _check_whole(image)
    yield from _check_checksum(image)
    yield _check_signed(image, key, runtime, env)
    yield _check_start(image, runtime, env)
    yield from check_fit(image, driver_version())


def _check_whole(image: Image) -> Finding:
    size, declared = image.size_bytes, image.declared_bytes
    if size is None or declared is None:
        return Finding("whole", "unknown", "a folder: nothing says what must be in it")
    if size < declared:
        remedy = "copy or build it again (a full disk or a broken transfer ends like this)"
        return Finding("whole", "failed", f"cut off: {size} of {declared} bytes", remedy)
    return Finding("whole", "ok", f"all {declared} bytes that its header declares")


def _check_checksum(image: Image) -> Iterator[Finding]:
    """Against `IMAGE.sha256`, which build.sh writes beside it; nothing where there is none."""
    beside = image.path.with_name(image.path.name + ".sha256")
    try:
        expected = " ".join(beside.read_text(errors="replace").split()[:1])
    except OSError:
        return
    digest = sha256(image.path)
    if expected == digest:
        yield Finding("checksum", "ok", f"sha256 {digest[:16]}… as in {beside.name}")
    else:
        message = f"sha256 is {digest}, and {beside.name} has {expected or 'none'}"
        yield Finding("checksum", "failed", message, "copy it again; signing an image changes its checksum")


def _check_signed(image: Image, key: str | None, runtime: str, env: Mapping[str, str]) -> Finding:
    if key is None:
        message = "signed, and AFINA_IMAGE_KEY names no key to check it with" if image.signatures else "not signed"
        return Finding("signature", "unknown", message, "see docs/image.md: signed images")
    try:
        check_signature(image.path, key, runtime, env)
    except SiteError as error:
        return Finding("signature", "failed", error.message, error.remedy)
    return Finding("signature", "ok", f"all of it is signed by {key}")


def _check_start(image: Image, runtime: str, env: Mapping[str, str]) -> Finding:
    """Start its runscript for the version, as `apptainer run` does."""
    argv = [runtime, "--quiet", "run", "--no-home", str(image.path), "--version"]
    attempt = f"try: {shlex.join(argv)}"
    try:
        done = run_captured(argv, env, _PATIENCE_S)
    except OSError as error:
        return Finding("starts", "failed", f"{runtime}: {error.strerror}", "load its module in site.env")
    except subprocess.TimeoutExpired:
        return Finding("starts", "failed", f"no answer for {_PATIENCE_S} s", attempt)
    answer = (done.stdout.strip() or last_line(done.stderr)).splitlines()[-1:] or ["no output"]
    version = re.fullmatch(r"afina, version (\S+)", answer[0])
    if done.returncode or version is None:
        return Finding("starts", "failed", f"exit code {done.returncode}: {answer[0]}", attempt)
    label = summary(image)["version"]
    if label is not None and version[1] != label:
        message = f"it prints version {version[1]}, and its label is {label}"
        return Finding("starts", "failed", message, "build it again")
    return Finding("starts", "ok", answer[0])
