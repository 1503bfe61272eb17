"""Checks of the container: image and key, the runtime that starts it, the tools that mount it, further folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from afina.diagnosis.target import ANSWER_S, Target, answer_of
from afina.processes import run_captured
from afina.run.commands import container_argv
from afina.site.finding import Finding
from afina.site.image import check_image, read_image
from afina.site.settings import in_container, without_isolation
from afina.text import plural, size_in_words
from afina.version import __version__

__all__ = ["check_binds", "check_image_file", "check_runtime"]

#: What mounts an image; one of each pair.
_MOUNTING = (("squashfuse_ll", "squashfuse"), ("fusermount3", "fusermount"))
#: Where it may be, beside PATH.
_HELPERS = (
    "/usr/sbin",
    "/sbin",
    "/usr/libexec/apptainer/bin",
    "/usr/lib/x86_64-linux-gnu/apptainer/bin",
    "/usr/local/libexec/apptainer/bin",
)


def check_image_file(target: Target) -> Iterator[Finding]:
    """The image is there, signed by the site's key, and starts with this version of afina."""
    assert target.site is not None and target.where is not None
    site = target.site
    if site.image is None or site.runtime == "none":
        check_image(site)
        yield Finding("image", "ok", f"none: jobs run {sys.executable}, which can train and which every node must see")
        return
    check_image(site)
    size = size_in_words(site.image.stat().st_size if site.image.exists() else 0)
    origin = f", from {site.pulled.reference.pinned}" if site.pulled else ""
    yield Finding("image", "ok", f"{site.image}: whole, {size}{origin}")
    if site.image_key:
        yield Finding("image key", "ok", f"signed by {site.image_key}")
    gpus = target.plan.geometry.gpus_per_node if target.plan else 0
    if gpus and read_image(site.image, site.runtime, target.env).labels.get("afina.device") == "cpu":
        message = f"the image is built for the CPU, and the recipe requests {plural(gpus, 'GPU')} per node, which it cannot use"
        yield Finding("image", "warning", message, "build it without --cpu, or set resources.gpus_per_node: 0")
    try:
        done = run_captured(
            container_argv(target.where, ["afina", "--version"]), without_isolation(target.env), ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("container", "failed", f"cannot be started: {error}", "load its module in site.env")
        return
    version = done.stdout.strip().rpartition(" ")[2]
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        remedy = "see `runtime` and `fuse` below; a login node may forbid user namespaces: try --job"
        yield Finding("container", "failed", f"{site.runtime} cannot start the image here: {why}", remedy)
    elif version != __version__:
        remedy = "build the image again, or install the same version here"
        yield Finding("container", "warning", f"the image has afina {version}, this is {__version__}", remedy)
    else:
        yield Finding("container", "ok", f"the image starts, with afina {version}")


def check_runtime(target: Target) -> Iterator[Finding]:
    """Apptainer: installed setuid or with user namespaces, and what it needs to mount images."""
    assert target.site is not None
    runtime = target.site.runtime
    if runtime == "none" or in_container():
        return
    if shutil.which(runtime, path=target.env.get("PATH")) is None:
        remedy = "load its module in site.env, or set AFINA_RUNTIME"
        yield Finding("runtime", "failed", f"{runtime} is not on PATH", remedy)
        return
    version = (answer_of([runtime, "--version"], target.env) or "").strip() or runtime
    setuid = _is_setuid(runtime, target.env)
    if not setuid and not _has_user_namespaces(target.env):
        message = f"{version} is not installed setuid, and user namespaces are forbidden here"
        yield Finding("runtime", "failed", message, "nodes may allow them (try --job); else ask your administrators")
        return
    yield Finding("runtime", "ok", f"{version}, {'setuid' if setuid else 'with user namespaces'}")
    if setuid:
        message = "a setuid installation mounts the image itself: node.sh cannot protect the mount from signals"
        remedy = "none needed if the cluster signals only the batch script; see docs/stopping.md"
        yield Finding("fuse", "warning", message, remedy)
        return
    missing = [" or ".join(names) for names in _MOUNTING if not _any_on_path(names, target.env)]
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        missing.append("/dev/fuse, readable and writable")
    if missing:
        message = f"missing: {', '.join(missing)}: images are unpacked, and not protected from signals"
        remedy = "ask for it to be installed on the nodes, or run from an unpacked image on a node's disk"
        yield Finding("fuse", "warning", message, remedy)
    else:
        yield Finding("fuse", "ok", "images can be mounted so that signals do not reach the mount")


def _any_on_path(names: Sequence[str], env: Mapping[str, str]) -> bool:
    """On PATH, or in the folders of Apptainer's own helpers."""
    path = os.pathsep.join([env.get("PATH", ""), *_HELPERS])
    return any(shutil.which(name, path=path) for name in names)


def _is_setuid(runtime: str, env: Mapping[str, str]) -> bool:
    folder = re.search(r"(?m)^LIBEXECDIR=(.+)$", answer_of([runtime, "buildcfg"], env) or "")
    starter = Path(folder[1]) / runtime / "bin/starter-suid" if folder else None
    return starter is not None and starter.exists() and bool(starter.stat().st_mode & 0o4000)


def _has_user_namespaces(env: Mapping[str, str]) -> bool:
    """Tried in a process of its own."""
    code = "import ctypes,sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000) != 0)"
    return subprocess.run([sys.executable, "-c", code], env=dict(env), timeout=ANSWER_S, check=False).returncode == 0


def check_binds(target: Target) -> Iterator[Finding]:
    assert target.site is not None
    sources = [bind.partition(":")[0] for bind in target.site.binds]
    missing = [source for source in sources if not Path(source).exists()]
    if missing:
        message = f"AFINA_BIND names folders that do not exist: {', '.join(missing)}"
        yield Finding("binds", "failed", message, "correct AFINA_BIND in the site file")
    elif sources:
        yield Finding("binds", "ok", ", ".join(sources))
