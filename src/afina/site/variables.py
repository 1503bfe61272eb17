"""The variables of a site: each one parsed, checked, and refused with a remedy. `file` in a message is the site file, if there is one."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from afina.errors import SiteError, nearest
from afina.text import size_in_words

__all__ = [
    "KNOWN",
    "RESERVED_OPTIONS",
    "UNWANTED_SBATCH",
    "declared_size",
    "existing_scratch",
    "gpu_request",
    "image_file",
    "image_key",
    "path_test",
    "sbatch_extra",
    "sbatch_omit",
    "sbatch_variables",
    "stage_folder",
    "usable_scratch",
]

KNOWN = (
    "AFINA_SCRATCH",
    "AFINA_IMAGE",
    "AFINA_IMAGE_KEY",
    "AFINA_BIND",
    "AFINA_RUNTIME",
    "AFINA_GPU_REQUEST",
    "AFINA_SBATCH_EXTRA",
    "AFINA_SBATCH_OMIT",
    "AFINA_STAGE",
)

#: Bytes of an image's header.
_HEADER_BYTES = 128

#: Bytes that must be free on scratch.
_LEAST_FREE = 16_000_000

#: Options of afina that AFINA_SBATCH_OMIT may leave out, because some clusters refuse them.
_OMITTABLE = ("job-name", "ntasks-per-node", "cpus-per-task", "time", "mem", "requeue", "open-mode", "signal")

#: Slurm's variables that would change what a submission is: an array, one that waits, without the signal or the environment.
UNWANTED_SBATCH = (
    "SBATCH_ARRAY_INX",
    "SBATCH_EXPORT",
    "SBATCH_GET_USER_ENV",
    "SBATCH_NO_REQUEUE",
    "SBATCH_OPEN_MODE",
    "SBATCH_REQUEUE",
    "SBATCH_SIGNAL",
    "SBATCH_WAIT",
)

#: Options of sbatch that AFINA_SBATCH_EXTRA may not hold, and what to do instead.
RESERVED_OPTIONS = {
    "nodes": "set resources.nodes in the recipe",
    "gpus-per-node": "set resources.gpus_per_node in the recipe, and its spelling in AFINA_GPU_REQUEST",
    "gpus": "set resources.gpus_per_node in the recipe",
    "ntasks": "leave it out: one task starts on each node",
    "ntasks-per-node": "leave it out: one task starts on each node",
    "cpus-per-task": "set resources.cpus_per_gpu in the recipe",
    "cpus-per-gpu": "set resources.cpus_per_gpu in the recipe",
    "mem": "set resources.mem_gb in the recipe",
    "time": "set resources.time in the recipe",
    "job-name": "set name in the recipe",
    "array": "leave it out: afina makes the arrays of a sweep",
    "chdir": "leave it out: it would change relative paths",
    "output": "leave it out: logs are in the run directory",
    "error": "leave it out: logs are in the run directory",
    "export": "leave it out: the job needs the environment of its submission",
    "parsable": "leave it out",
    "wrap": "leave it out",
    "requeue": "leave it out; AFINA_SBATCH_OMIT=requeue where it is forbidden",
    "signal": "leave it out: afina requests the signal that it handles",
    "open-mode": "leave it out: logs are appended to",
}


def path_test(test: Callable[[], bool]) -> bool:
    """The result of a test of a path; False where the test fails (a folder above is closed, a name is too long)."""
    try:
        return test()
    except OSError:
        return False


def existing_scratch(value: str, file: Path | None) -> Path:
    """AFINA_SCRATCH, an absolute path of a folder that exists; it may be full or read-only."""
    where = (
        f"set AFINA_SCRATCH in {file}"
        if file
        else "where `afina init` wrote slurm/site.env, run the command in that folder; or export AFINA_SCRATCH=/path/on/shared/scratch, see slurm/site.example.env"
    )
    if not value:
        raise SiteError(
            "AFINA_SCRATCH is not set: caches, prepared data and runs need a folder on shared scratch", where
        )
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise SiteError(f"AFINA_SCRATCH={value} is not an absolute path", where)
    if not path_test(path.is_dir):
        exists = path_test(path.exists)
        why = "is not a folder" if exists else "does not exist, or a folder above it is closed to you"
        remedy = f"{shlex.join(['mkdir', '-p', value])} (afina never creates it: the path may be mistyped), or {where}"
        raise SiteError(f"AFINA_SCRATCH={value} {why}", remedy)
    return path


def usable_scratch(value: str, file: Path | None) -> Path:
    """AFINA_SCRATCH, writable and not full."""
    path = existing_scratch(value, file)
    space = os.statvfs(path)
    if not os.access(path, os.W_OK | os.X_OK) or space.f_flag & os.ST_RDONLY:
        remedy = "choose a folder of your own or your group's on scratch"
        raise SiteError(f"AFINA_SCRATCH={value} is not writable by you", remedy)
    if space.f_bavail * space.f_frsize < _LEAST_FREE or (space.f_files and space.f_favail == 0):
        free = f"{size_in_words(space.f_bavail * space.f_frsize)} and {space.f_favail} inodes are free"
        remedy = "remove old runs and caches, or choose another folder"
        raise SiteError(f"AFINA_SCRATCH={value} is full: {free}", remedy)
    return path


def image_file(value: str, file: Path | None) -> Path | None:
    """AFINA_IMAGE, a readable image that is not cut off, or an unpacked one."""
    if not value:
        return None
    path = Path(value).expanduser().absolute()
    if not path_test(path.exists):
        remedy = "build it with container/build.sh, or correct AFINA_IMAGE" + (f" in {file}" if file else "")
        raise SiteError(f"AFINA_IMAGE={value}: no such image, or a folder above it is closed to you", remedy)
    if not os.access(path, os.R_OK):
        remedy = f"{shlex.join(['chmod', 'a+r', value])}, or copy it where you can read it"
        raise SiteError(f"AFINA_IMAGE={value} cannot be read by you", remedy)
    if path.is_file():
        declared, size = declared_size(path), path.stat().st_size
        if declared is None:
            remedy = "build it with container/build.sh; a broken download looks the same"
            raise SiteError(f"AFINA_IMAGE={value} is not an Apptainer image (SIF)", remedy)
        if size < declared:
            remedy = "copy or build it again (a full disk or a broken transfer ends like this)"
            raise SiteError(f"AFINA_IMAGE={value} is cut off: {size} of {declared} bytes are there", remedy)
    return path


def declared_size(path: Path) -> int | None:
    """Bytes that an image must have at least, by its header; None where it is not an Apptainer image (SIF).

    Read without Apptainer, which notices that a file is cut off only when it reads that far. The header ends with the offset and the size of the data, two little-endian 64-bit numbers, signatures included
    (https://github.com/apptainer/sif, pkg/sif).

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or header[32:42] != b"SIF_MAGIC\0":
        return None
    return sum(int.from_bytes(header[place : place + 8], "little", signed=True) for place in (112, 120))


def image_key(value: str, file: Path | None = None, *, visible: bool = True) -> str | None:
    """AFINA_IMAGE_KEY as an absolute path, or as a fingerprint in lower case.

    Args:
        visible: the key file must be readable; in the container it need not be.
    """
    if not value:
        return None
    fingerprint = "".join(value.split()).lower()
    if re.fullmatch("(0x)?[0-9a-f]{40}", fingerprint):
        return fingerprint.removeprefix("0x")
    path = Path(value).expanduser().absolute()
    if visible and not (path_test(path.is_file) and os.access(path, os.R_OK)):
        raise SiteError(
            f"AFINA_IMAGE_KEY={value} is neither a key file that you can read nor a PGP fingerprint of 40 hex digits",
            "give the path of a PEM public key that every node sees, or the fingerprint that `apptainer key list` shows"
            + (f", in {file}" if file else ""),
        )
    return str(path)


def gpu_request(value: str) -> str:
    if value and not re.fullmatch(r"(gpus-per-node|gres)(:[\w.-]+)?|none", value):
        raise SiteError(
            f"AFINA_GPU_REQUEST={value} is not known",
            "one of: gpus-per-node, gpus-per-node:TYPE, gres, gres:TYPE, none; `sinfo -o '%P %G'` shows the types",
        )
    return value or "gpus-per-node"


def sbatch_extra(value: str, name: str = "AFINA_SBATCH_EXTRA") -> tuple[str, ...]:
    """Options of sbatch, one a line: nothing is split at spaces, and slurm/job.sh reads the same. `name` is for messages."""
    lines = tuple(line.strip() for line in value.splitlines() if line.strip())
    for line in lines:
        if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", line):
            raise SiteError(
                f"{name}: {line!r} is not an option of sbatch in its long form",
                "write each in its long form with `=`, on a line of its own: --constraint=a100, or --exclusive",
            )
        option = line[2:].partition("=")[0]
        if option in RESERVED_OPTIONS:
            raise SiteError(f"{name}: --{option} cannot be set by the site", RESERVED_OPTIONS[option])
    return lines


def sbatch_variables(values: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, str]:
    """The `SBATCH_*` for a submission. Those that would change what it is are refused in a site file, and not inherited."""
    for name in UNWANTED_SBATCH:
        if name in values and values[name] != inherited.get(name):
            raise SiteError(
                f"{name} cannot be set by the site",
                "leave it out: afina sets this itself; AFINA_SBATCH_OMIT=requeue where requeueing is forbidden",
            )
    kept = {n: text for n, text in sorted(values.items()) if n.startswith("SBATCH_") and n not in UNWANTED_SBATCH}
    for name, text in kept.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SiteError(f"{name} holds bytes that are not UTF-8", "write it in UTF-8, or unset it") from None
    return kept


def sbatch_omit(value: str) -> tuple[str, ...]:
    names = tuple(name.removeprefix("--") for name in value.replace(",", " ").split())
    for name in names:
        if name not in _OMITTABLE:
            raise SiteError(
                f"AFINA_SBATCH_OMIT: {name} cannot be left out",
                f"{nearest(name, _OMITTABLE)} these can: {', '.join(_OMITTABLE)}; GPUs with AFINA_GPU_REQUEST=none".strip(),
            )
    return names


def stage_folder(value: str) -> str | None:
    """AFINA_STAGE: `1` for the node's own temporary folder, or an absolute path; None where nothing is staged."""
    if value in ("", "0"):
        return None
    if value != "1" and (not value.startswith("/") or re.search(r"[,:\n]", value)):
        raise SiteError(
            f"AFINA_STAGE={value} is neither 1 nor the absolute path of a folder on the nodes",
            "1 takes $SLURM_TMPDIR, else $TMPDIR, else /tmp; a path may hold no comma, colon or line break",
        )
    return value
