"""The image: its labels and its signature. Used by every job and by `afina image`.

`AFINA_IMAGE_KEY` names the key that must have signed the image; without it any image is accepted. `apptainer verify` checks it:
it hashes the whole file (0.4 s for 550 MB in the page cache) and refuses an object that no signature covers as well as one
that was altered. Images are checked before anything is queued, and again in the job, by `slurm/job.sh` in bash.

Labels and signatures are read by `apptainer inspect` and `apptainer sif list`, which start nothing. Not covered: an image that
is replaced after the check, and, with a PGP key, a keyring that somebody else can write to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import InputError, SiteError
from afina.processes import run_captured
from afina.site.gpus import minimum_driver
from afina.site.pulled import Pulled, newest, pull, resolve
from afina.site.python import check_python
from afina.site.references import is_reference
from afina.site.settings import Site, environment, in_container, scratch_of, site_image
from afina.site.variables import declared_size
from afina.version import INTERFACE, __version__

__all__ = [
    "BUILD_AGAIN",
    "Image",
    "check_image",
    "check_signature",
    "last_line",
    "other_interface",
    "pull_image",
    "push_image",
    "read_image",
    "select_image",
    "summary",
]

BUILD_AGAIN = (
    "build or pull the image again (`container/build.sh --update IMAGE` installs this afina in it), or install the afina of "
    "the image here"
)


@dataclass(frozen=True)
class Image:
    """An image file, or an unpacked one: then sizes are None and signatures 0.

    A file of fewer than `declared_bytes` is cut off. `signatures` counts them; only `apptainer verify` tells whether they hold.
    """

    path: Path
    labels: dict[str, str]
    size_bytes: int | None = None
    declared_bytes: int | None = None
    signatures: int = 0


def check_image(site: Site, *, resumed: bool = False) -> None:
    """Have the site's image here, pulled if it comes from a registry, and check its signature if the site names a key.

    Where the site runs no image, this Python must be able to train. In the container nothing is checked: the host has done it.

    Args:
        resumed: for a run that exists: without an image it keeps the Python that it was made with, which need not be this one.

    Raises:
        SiteError: this Python cannot train; the image cannot be pulled; its afina reads other plans; it is not signed, not by this key, or was altered since; or it cannot be checked.
    """
    pulled = site.pulled
    if site.runtime == "none" and not in_container() and not resumed:
        check_python()
    if site.image is None or site.runtime == "none" or in_container():
        return
    env = {**os.environ, **environment(site)}
    if pulled is not None:
        pull(pulled, site.runtime, env)
    if site.image_key is not None:
        check_signature(site.image, site.image_key, site.runtime, env)
    _check_interface(site.image, site.runtime, env)


def _check_interface(image: Path, runtime: str, env: Mapping[str, str]) -> None:
    """Refuse an image whose afina reads other plans; one that cannot be read, or is not of afina, is for others to refuse."""
    with contextlib.suppress(OSError):
        labels = _read_labels(image, runtime, env)
        if labels.get("org.opencontainers.image.title") == "afina" and (other := other_interface(labels)):
            raise SiteError(f"AFINA_IMAGE={image}: {other}", BUILD_AGAIN)


def other_interface(labels: Mapping[str, str]) -> str | None:
    """The failure of an image with another interface than this afina's; None where it is the same."""
    inside = labels.get("afina.interface", "none")
    if inside == str(INTERFACE):
        return None
    version = labels.get("org.opencontainers.image.version", "?")
    return f"holds an afina ({version}, interface {inside}) that does not fit this one ({__version__}, interface {INTERFACE})"


def check_signature(image: Path, key: str, runtime: str, env: Mapping[str, str]) -> None:
    is_file = Path(key).is_absolute()
    argv = [runtime, "verify", *(["--key", key] if is_file else ["--local", "--json"]), str(image)]
    try:
        done = run_captured(argv, env)
    except OSError as error:
        raise SiteError(
            f"AFINA_IMAGE_KEY is set, and {runtime} cannot be run to check the image: {error.strerror}",
            "load its module in site.env, or submit from a node that has it",
        ) from None
    if done.returncode:
        raise _refused(image, key, last_line(done.stderr) or f"{runtime} verify ended with {done.returncode}", argv)
    if not is_file and (others := _signers(done.stdout) - {key}):
        raise _refused(image, key, f"signed by {', '.join(sorted(others))}", argv)


def _signers(output: str) -> set[str]:
    """The fingerprints of all signatures that `verify --json` lists; a signer without one is unknown."""
    try:
        listed = json.loads(output)["SignerKeys"]
        return {str(entry["Signer"]["Fingerprint"]).lower() or "an unknown key" for entry in listed} or {"nobody"}
    except (ValueError, KeyError, TypeError):
        return {"an unknown key"}


def _refused(image: Path, key: str, why: str, argv: list[str]) -> SiteError:
    return SiteError(
        f"AFINA_IMAGE={image} is not the image that AFINA_IMAGE_KEY={key} signed: {why}",
        "fetch the image again from its signer, or sign your own (`apptainer sign --key PRIVATE.pem IMAGE`) and name "
        f"its public key in AFINA_IMAGE_KEY; see also: {shlex.join(argv)}",
    )


def last_line(output: str) -> str:
    """The last line of Apptainer's output, without its label and colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines() if line.strip()]
    return lines[-1].removeprefix("FATAL:").strip() if lines else ""


# -- what an image is --------------------------------------------------------------------------------------------------


def select_image(given: str | None, site: str | None = None) -> tuple[Image, str | None, str, dict[str, str]]:
    """The image, the key that must have signed it, the runtime, and the environment to run it in.

    Args:
        given: a path, or the address of one that was pulled; without one the site's AFINA_IMAGE, and in a container the image that is running.

    Raises:
        InputError: no image is named, it was not pulled, or the path is not an image.
        SiteError: the site file fails, its key is neither a file nor a fingerprint, or Apptainer is missing.
    """
    if given is None and in_container():
        return read_image("/"), None, "none", dict(os.environ)
    named, key, runtime, env = site_image(site)
    if given is None and not named:
        raise InputError(
            "no image is named: AFINA_IMAGE is not set",
            "give its path or address, or set AFINA_IMAGE (see slurm/site.example.env)",
        )
    runtime = "apptainer" if runtime == "none" else runtime
    wanted = given or named
    if is_reference(wanted):
        pulled = newest(wanted, Path(env.get("AFINA_SCRATCH") or "/") / "cache")
        if pulled is None:
            raise InputError(f"{wanted} is not on scratch", f"afina image pull {shlex.quote(wanted)}")
        wanted = str(pulled.path)
    return read_image(wanted, runtime, env), key, runtime, env


def pull_image(given: str | None, site: str | None = None) -> Pulled:
    """Pull the image of an address, by default the site's AFINA_IMAGE, and check the site's key.

    Raises:
        InputError: there is no address.
        SiteError: as `check_image`.
    """
    if in_container():
        raise InputError("an image cannot be pulled in a container, which has no Apptainer", "run this on the host")
    named, key, runtime, env = site_image(site)
    address = given or named
    if not is_reference(address):
        raise InputError(f"{address or 'AFINA_IMAGE'} is not an address in a registry", "give oras://… or docker://…")
    pulled = resolve(address, scratch_of(site) / "cache", env)
    pull(pulled, "apptainer" if runtime == "none" else runtime, env)
    if key is not None:
        check_signature(pulled.path, key, runtime, env)
    return pulled


def push_image(given: str, address: str) -> str:
    """Push an image, a file or a folder; returns its address by digest.

    Raises:
        InputError: no such image, or no address.
        SiteError: the registry refuses, or cannot be reached; the site file fails, whose proxy, login and authorities count.
    """
    from afina.site.pushed import push

    if not is_reference(address):
        raise InputError(f"{address} is not an address in a registry", "give oras://… or docker://…")
    image = Path(given).expanduser().absolute()
    if not image.exists():
        raise InputError(f"{image}: no such image", "give the path of a .sif that container/build.sh made")
    _, _, runtime, env = site_image()
    return push(image, address, "apptainer" if runtime == "none" else runtime, env)


def read_image(path: str | Path, runtime: str = "apptainer", env: Mapping[str, str] | None = None) -> Image:
    """The image's labels and sizes; nothing is started from it. What a cut-off file has lost is empty.

    Raises:
        InputError: there is no such file or folder, it cannot be read, or it is not an image.
        SiteError: the runtime, which reads a file's labels, is missing.
    """
    path = Path(path).expanduser().absolute()
    try:
        if path.is_dir():
            return _unpacked(path)
        declared = declared_size(path)
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"{path}: no such image", "give the path of a .sif that container/build.sh made") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "check the path and its permissions") from None
    if declared is None:
        raise InputError(
            f"{path}: not an Apptainer image (SIF)",
            "build one with container/build.sh; a broken download looks the same",
        )
    env = os.environ if env is None else env
    try:
        about = _inspect(path, runtime, env)
        objects = run_captured([runtime, "sif", "list", str(path)], env)
    except OSError as error:
        raise SiteError(
            f"{runtime}, which reads the labels of an image, cannot be run: {error.strerror}",
            "load its module in site.env, or call this where it is installed",
        ) from None
    if about.returncode and size >= declared:
        raise InputError(f"{path}: {last_line(about.stderr)}", "build or copy the image again")
    return Image(path, _labels(about.stdout), size, declared, objects.stdout.count("|Signature"))


def _unpacked(path: Path) -> Image:
    if not (path / ".singularity.d").is_dir():
        raise InputError(f"{path}: a folder without .singularity.d is not an unpacked image", "give the .sif file")
    return Image(path, _labels_of_folder(path))


def _read_labels(path: Path, runtime: str, env: Mapping[str, str]) -> dict[str, str]:
    return _labels_of_folder(path) if path.is_dir() else _labels(_inspect(path, runtime, env).stdout)


def _labels_of_folder(path: Path) -> dict[str, str]:
    labels = path / ".singularity.d/labels.json"
    return _labels(labels.read_text(errors="replace")) if labels.is_file() else {}


def _inspect(path: Path, runtime: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return run_captured([runtime, "inspect", "--json", "--labels", str(path)], env)


def _labels(text: str) -> dict[str, str]:
    """From `inspect --json --labels`, or from `labels.json`; empty where the text is damaged."""
    try:
        value: Any = json.loads(text)
        if "data" in value:
            value = value["data"]["attributes"].get("labels") or {}
        return {str(name): str(label) for name, label in value.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def summary(image: Image) -> dict[str, Any]:
    """The image as plain values for JSON; None where it has no such label. Sizes in bytes."""
    labels, opencontainers = image.labels, "org.opencontainers.image."
    cuda = labels.get("afina.cuda") or None
    return {
        "image": str(image.path),
        "version": labels.get(f"{opencontainers}version"),
        "revision": labels.get(f"{opencontainers}revision"),
        "interface": labels.get("afina.interface"),
        "lock": labels.get("afina.lock"),
        "torch": labels.get("afina.torch"),
        "device": labels.get("afina.device"),
        "cuda": cuda,
        "minimum_driver": labels.get("afina.driver") or minimum_driver(cuda),
        "python": labels.get("afina.python"),
        "base": labels.get(f"{opencontainers}base.name"),
        "base_digest": labels.get(f"{opencontainers}base.digest"),
        "built_with": labels.get("org.label-schema.usage.apptainer.version"),
        "built": labels.get("org.label-schema.build-date", "").replace("_", " ") or None,
        "architecture": labels.get("org.label-schema.build-arch"),
        "size_bytes": image.size_bytes,
        "signatures": image.signatures,
    }
