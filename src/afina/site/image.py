"""Is the image the one that was signed, is it whole, does it start, does it fit? What `afina image` and every job ask.

`AFINA_IMAGE_KEY` names who must have signed it; without it any image will do. `apptainer verify` does that work: it hashes
the whole file (0.4 s for 550 MB that are in memory) and refuses an object that no signature covers as well as one that
was altered. Checked before anything is queued, by submitit's batch script (`python -m afina.run.image_check RUN`), and by
`slurm/finetune.sbatch` in bash. Not covered: an image that is exchanged after the check, and, with a PGP key, a keyring that
somebody else can write to. What an image says of itself is read from the file (`afina.sif`), without running it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from afina.errors import InputError, SiteError
from afina.site.finding import Finding
from afina.site.gpus import driver_version, fits_driver, minimum_driver
from afina.site.settings import Site, environment, in_container, site_image
from afina.site.sif import Image, read_image
from afina.version import __version__

__all__ = ["check_image", "fit", "image_of", "summary", "verify"]

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "386": "i686"}
_BLOCK = 1 << 22


def check_image(site: Site) -> None:
    """Nothing, where the site asks for no signature or runs no image, and in the container, whose host has looked.

    Raises:
        SiteError: the image is not signed, not by this key, or was altered since; or it cannot be told.
    """
    if site.image_key is None or site.image is None or site.runtime == "none" or in_container():
        return
    _check_signature(site.image, site.image_key, site.runtime, {**os.environ, **environment(site)})


def _check_signature(image: Path, key: str, runtime: str, env: Mapping[str, str]) -> None:
    pem = Path(key).is_absolute()
    how = ["--key", key] if pem else ["--local", "--json"]
    argv = [runtime, "verify", *how, str(image)]
    try:
        done = subprocess.run(
            argv,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise SiteError(
            f"AFINA_IMAGE_KEY is set, and {runtime} cannot be run to check the image: {error.strerror}",
            "load its module in site.env, or submit from a node that has it",
        ) from None
    if done.returncode:
        raise _refused(image, key, _why(done.stderr) or f"{runtime} verify ended with {done.returncode}", argv)
    if not pem and (others := _signers(done.stdout) - {key}) != set():
        raise _refused(image, key, f"signed by {', '.join(sorted(others))}", argv)


def _signers(said: str) -> set[str]:
    """The fingerprints of all signatures that `verify --json` lists; a signer without one is an empty name."""
    try:
        listed = json.loads(said)["SignerKeys"]
        return {str(entry["Signer"]["Fingerprint"]).lower() or "an unknown key" for entry in listed} or {"nobody"}
    except (ValueError, KeyError, TypeError):
        return {"an unknown key"}


def _why(said: str) -> str:
    """The last line of what Apptainer said, without its label and colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines() if line.strip()]
    return lines[-1].removeprefix("FATAL:").strip() if lines else ""


def _refused(image: Path, key: str, why: str, argv: list[str]) -> SiteError:
    return SiteError(
        f"AFINA_IMAGE={image} is not the image that AFINA_IMAGE_KEY={key} signed: {why}",
        "fetch the image again from its signer, or sign your own (`apptainer sign --key PRIVATE.pem IMAGE`) and name "
        f"its public key in AFINA_IMAGE_KEY; see also: {shlex.join(argv)}",
    )


def image_of(given: str | None, site: str | None = None) -> tuple[Image, str | None, str, dict[str, str]]:
    """The image that is meant, who must have signed it, the runtime, and the environment to run it in.

    Args:
        given: a path; without one the site's AFINA_IMAGE, and in a container the image that is running.

    Raises:
        InputError: no image is named anywhere, or it is none.
        SiteError: the site file fails, or its key is neither a file nor a fingerprint.
    """
    if given is None and in_container():
        return read_image("/"), None, "none", dict(os.environ)
    named, key, runtime, env = site_image(site)
    if given is None and not named:
        raise InputError(
            "no image is named: AFINA_IMAGE is not set",
            "give its path, or set AFINA_IMAGE (see slurm/site.example.env)",
        )
    return read_image(given or named), key, runtime, env


def summary(image: Image) -> dict[str, Any]:
    """What an image is, as plain values for JSON; what it does not say is None. Sizes in bytes."""
    labels, opencontainers = image.labels, "org.opencontainers.image."
    system = image.file_system
    cuda = labels.get("afina.cuda") or None
    return {
        "image": str(image.path),
        "version": labels.get(f"{opencontainers}version"),
        "revision": labels.get(f"{opencontainers}revision"),
        "lock": labels.get("afina.lock"),
        "torch": labels.get("afina.torch"),
        "device": labels.get("afina.device"),
        "cuda": cuda,
        "minimum_driver": labels.get("afina.driver") or minimum_driver(cuda),
        "python": labels.get("afina.python"),
        "base": labels.get(f"{opencontainers}base.name"),
        "base_digest": labels.get(f"{opencontainers}base.digest"),
        "contents": labels.get("afina.contents"),
        "built_with": labels.get("org.label-schema.usage.apptainer.version"),
        "built": None
        if image.created is None
        else datetime.fromtimestamp(image.created, timezone.utc).isoformat(timespec="seconds"),
        "architecture": image.architecture or labels.get("org.label-schema.build-arch"),
        "identity": image.identity,
        "size_bytes": image.size_bytes,
        "compression": system.compression if system else None,
        "files": system.files if system else None,
        "signatures": [asdict(signature) for signature in image.signatures],
    }


def fit(image: Image, driver: str | None = None) -> list[Finding]:
    """Does the image fit this afina and this machine? `driver` is the NVIDIA driver's version, None where there is none."""
    about = summary(image)
    return [*_fit_version(about), *_fit_machine(about), *_fit_driver(about, driver)]


def _fit_version(about: Mapping[str, Any]) -> Iterator[Finding]:
    inside = about["version"]
    if inside is None:
        yield Finding("version", "unknown", "it has no label that says what it is", "build it with container/build.sh")
    elif inside == __version__:
        yield Finding("version", "ok", f"afina {inside} is inside, as here")
    else:
        yield Finding(
            "version",
            "warning",
            f"afina {inside} is inside, and {__version__} here: a run's plan may not be read there",
            "container/build.sh --update IMAGE installs this afina in it",
        )


def _fit_machine(about: Mapping[str, Any]) -> Iterator[Finding]:
    wanted, here = _MACHINES.get(about["architecture"] or ""), platform.machine()
    if wanted is not None and wanted != here:
        yield Finding(
            "machine", "failed", f"it is for {wanted}, and this machine is {here}", "build it on such a machine"
        )


def _fit_driver(about: Mapping[str, Any], driver: str | None) -> Iterator[Finding]:
    cuda, minimum = about["cuda"], about["minimum_driver"]
    if cuda is None and "+cpu" in (about["torch"] or "+cpu"):
        if driver is not None:
            yield Finding(
                "driver",
                "warning",
                f"PyTorch in it is for the CPU, and this machine has an NVIDIA driver ({driver})",
                "build it without --cpu to train on the GPU",
            )
        return
    if minimum is None:
        yield Finding("driver", "unknown", f"which driver CUDA {cuda or '?'} needs is not known here")
    elif driver is None:
        yield Finding(
            "driver", "unknown", f"driver {minimum} or newer is needed, and this machine has none: ask on a GPU node"
        )
    elif fits_driver(driver, minimum):
        yield Finding("driver", "ok", f"driver {driver}; {minimum} or newer is needed")
    else:
        yield Finding(
            "driver",
            "failed",
            f"driver {driver} is too old: CUDA {cuda} needs {minimum} or newer",
            "build the image for an older CUDA: container/build.sh --torch-index, see docs/image.md",
        )


def verify(
    image: Image,
    key: str | None,
    runtime: str,
    env: Mapping[str, str],
    *,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Finding]:
    """Ask, one after the other: is the file whole, is its checksum right, who signed it, does it start, does it fit?

    Args:
        key: who must have signed it, as in `Site.image_key`.
        progress: is told how many bytes of the file have been read for the checksum.
    """
    yield _whole(image)
    yield from _checksum(image, progress)
    yield _signed(image, key, runtime, env)
    yield _starts(image, runtime, env)
    yield from fit(image, driver_version())


def _whole(image: Image) -> Finding:
    if image.size_bytes is None or image.promised_bytes is None:
        return Finding("whole", "unknown", "a folder, not a file: nothing says what must be in it")
    if image.size_bytes < image.promised_bytes:
        return Finding(
            "whole",
            "failed",
            f"cut off: {image.size_bytes} of {image.promised_bytes} bytes are there",
            "copy or build it again (a full disk or a broken transfer ends like this)",
        )
    if image.file_system is None:
        return Finding("whole", "unknown", "its root is no squashfs: encrypted, or of another kind")
    return Finding("whole", "ok", f"all {image.promised_bytes} bytes that its header speaks of are there")


def _checksum(image: Image, progress: Callable[[int], None] | None) -> Iterator[Finding]:
    """Against `IMAGE.sha256`, which build.sh writes beside it; nothing where there is none."""
    beside = image.path.with_name(image.path.name + ".sha256")
    try:
        expected = beside.read_text(errors="replace").split()[:1]
    except OSError:
        return
    digest = hashlib.sha256()
    with image.path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if progress is not None:
                progress(file.tell())
    if expected == [digest.hexdigest()]:
        yield Finding("checksum", "ok", f"sha256 {digest.hexdigest()[:16]}… as in {beside.name}")
    else:
        yield Finding(
            "checksum",
            "failed",
            f"sha256 is {digest.hexdigest()}, and {beside.name} says {' '.join(expected) or 'nothing'}",
            "copy it again; signing an image changes its checksum",
        )


def _signed(image: Image, key: str | None, runtime: str, env: Mapping[str, str]) -> Finding:
    who = ", ".join(signature.by or "a PEM key" for signature in image.signatures)
    if key is None:
        said = f"signed by {who}, and AFINA_IMAGE_KEY names nobody to check it against" if who else "not signed"
        return Finding("signature", "unknown", said, "see docs/image.md: signed images")
    try:
        _check_signature(image.path, key, runtime if runtime != "none" else "apptainer", env)
    except SiteError as error:
        return Finding("signature", "failed", error.message, error.remedy)
    return Finding("signature", "ok", f"all of it is signed by {key}")


def _starts(image: Image, runtime: str, env: Mapping[str, str]) -> Finding:
    """Its runscript, asked for the version, as `apptainer run` does."""
    argv = [runtime if runtime != "none" else "apptainer", "--quiet", "run", "--no-home", str(image.path), "--version"]
    try:
        done = subprocess.run(
            argv,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
        )
    except OSError as error:
        return Finding(
            "starts",
            "failed",
            f"{argv[0]}: {error.strerror}",
            "load its module in site.env, or ask where it is installed",
        )
    except subprocess.TimeoutExpired:
        return Finding("starts", "failed", "no answer for 300 s", f"try: {shlex.join(argv)}")
    said = (done.stdout.strip() or _why(done.stderr)).splitlines()[-1:] or ["nothing"]
    version = re.fullmatch(r"afina, version (\S+)", said[0])
    if done.returncode or version is None:
        return Finding("starts", "failed", f"exit code {done.returncode}: {said[0]}", f"try: {shlex.join(argv)}")
    label = summary(image)["version"]
    if label is not None and version[1] != label:
        return Finding("starts", "failed", f"it says {version[1]}, and its label {label}", "build it again")
    return Finding("starts", "ok", said[0])
