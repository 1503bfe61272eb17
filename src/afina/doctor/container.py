"""Checks of the container: image and key, what starts it, what mounts it, further folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from afina.doctor.target import ANSWER_S, Target, answer_of
from afina.run.commands import container_argv
from afina.site.finding import Finding
from afina.site.image import check_image
from afina.site.settings import in_container
from afina.version import __version__

__all__ = ["check_binds", "check_image_file", "check_runtime"]


def check_image_file(target: Target) -> list[Finding]:
    assert target.site is not None and target.where is not None
    if target.site.image is None or target.site.runtime == "none":
        return [Finding("image", "ok", f"none: jobs run {sys.executable}, which every node must see")]
    size = target.site.image.stat().st_size / 1e9 if target.site.image.exists() else 0.0
    found = [Finding("image", "ok", f"{target.site.image}: whole, {size:.2f} GB")]
    if target.site.image_key:
        check_image(target.site)
        found.append(Finding("image key", "ok", f"signed by {target.site.image_key}"))
    argv = container_argv(target.where, ["afina", "--version"])
    try:
        done = subprocess.run(
            argv,
            env=target.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [*found, Finding("container", "failed", f"cannot be started: {error}", "load its module in site.env")]
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [
            *found,
            Finding(
                "container",
                "failed",
                f"{target.site.runtime} cannot start the image here: {why}",
                "see `runtime` and `fuse` below; on a login node user namespaces may be forbidden: try --job",
            ),
        ]
    version = done.stdout.strip().rpartition(" ")[2]
    if version != __version__:
        found.append(
            Finding(
                "container",
                "warning",
                f"the image has afina {version}, this is {__version__}",
                "build the image again, or install the same version here",
            )
        )
    else:
        found.append(Finding("container", "ok", f"the image starts, with afina {version}"))
    return found


def check_runtime(target: Target) -> list[Finding]:
    assert target.site is not None
    if target.site.runtime == "none" or in_container():
        return []
    path = shutil.which(target.site.runtime, path=target.env.get("PATH"))
    if path is None:
        return [
            Finding(
                "runtime",
                "failed",
                f"{target.site.runtime} is not on PATH",
                "load its module in site.env, or set AFINA_RUNTIME",
            )
        ]
    version = (answer_of([target.site.runtime, "--version"], target.env) or "").strip() or target.site.runtime
    setuid = _setuid(target)
    spaces = _user_namespaces(target.env)
    if not setuid and not spaces:
        return [
            Finding(
                "runtime",
                "failed",
                f"{version} is not installed setuid, and user namespaces are forbidden here",
                "on nodes it may be allowed (--job tells); else ask your administrators",
            )
        ]
    how = "setuid" if setuid else "with user namespaces"
    found = [Finding("runtime", "ok", f"{version}, {how}")]
    if setuid:
        found.append(
            Finding(
                "fuse",
                "warning",
                "a setuid installation mounts the image itself: node.sh cannot shield it from signals",
                "nothing to do, where the cluster signals only the batch script; see docs/stopping.md",
            )
        )
        return found
    missing = [
        " or ".join(names)
        for names in (("squashfuse_ll", "squashfuse"), ("fusermount3", "fusermount"))
        if not _anywhere(names, target.env)
    ]
    fuse = Path("/dev/fuse")
    if not (fuse.exists() and os.access(fuse, os.R_OK | os.W_OK)):
        missing.append("/dev/fuse, readable and writable")
    if missing:
        found.append(
            Finding(
                "fuse",
                "warning",
                f"not here: {', '.join(missing)}: images are unpacked, and not shielded from signals",
                "ask for it to be installed on the nodes, or run from an unpacked image on a node's disk",
            )
        )
    else:
        found.append(Finding("fuse", "ok", "images can be mounted, out of reach of signals"))
    return found


def _anywhere(names: Sequence[str], env: Mapping[str, str]) -> bool:
    """On PATH, or where Apptainer keeps what it brings."""
    places = [
        "/usr/libexec/apptainer/bin",
        "/usr/lib/x86_64-linux-gnu/apptainer/bin",
        "/usr/local/libexec/apptainer/bin",
    ]
    path = os.pathsep.join([env.get("PATH", ""), "/usr/sbin", "/sbin", *places])
    return any(shutil.which(name, path=path) for name in names)


def _setuid(target: Target) -> bool:
    assert target.site is not None
    said = answer_of([target.site.runtime, "buildcfg"], target.env) or ""
    folder = re.search(r"(?m)^LIBEXECDIR=(.+)$", said)
    starter = Path(folder[1]) / target.site.runtime / "bin/starter-suid" if folder else None
    return starter is not None and starter.exists() and bool(starter.stat().st_mode & 0o4000)


def _user_namespaces(env: Mapping[str, str]) -> bool:
    """Tried, in a process of its own."""
    code = "import ctypes,sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000) != 0)"
    return subprocess.run([sys.executable, "-c", code], env=dict(env), timeout=ANSWER_S, check=False).returncode == 0


def check_binds(target: Target) -> list[Finding]:
    assert target.site is not None
    sources = [bind.partition(":")[0] for bind in target.site.binds]
    missing = [s for s in sources if not Path(s).exists()]
    if missing:
        return [
            Finding(
                "binds",
                "failed",
                f"AFINA_BIND names what is not here: {', '.join(missing)}",
                "correct AFINA_BIND in the site file",
            )
        ]
    return [Finding("binds", "ok", ", ".join(sources))] if sources else []
