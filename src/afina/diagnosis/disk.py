"""Checks of the site (its file, scratch and its file system, quotas, caches, clocks) and of a recipe's inputs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from afina.diagnosis.target import ANSWER_S, Target, answer_of
from afina.errors import EnvironmentProblem
from afina.files import permission_remedy
from afina.site.finding import Finding, Level
from afina.site.settings import CACHE_VARIABLES, Site, cache_environment
from afina.slurm.cluster import read_config
from afina.text import plural, size_in_words

__all__ = [
    "check_caches",
    "check_clock",
    "check_locks",
    "check_quota",
    "check_recipe",
    "check_scratch",
    "check_sharing",
    "check_site",
    "check_token",
]

#: Below the first a warning, below the second a failure.
_FEW_BYTES, _FEWEST_BYTES = 20e9, 1e9
_FEW_INODES, _FEWEST_INODES = 20_000, 200
_SKEW_S = 5.0
#: File systems that are not shared between machines.
_LOCAL = ("tmpfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs", "ramfs")


def check_site(target: Target) -> Iterator[Finding]:
    if target.site is None:
        error = target.error or EnvironmentProblem("no site", "")
        yield Finding("site", "failed", error.message, error.remedy or "write one: afina init --site-only")
    elif target.site.file is None:
        yield Finding("site", "ok", "no site file: the environment is the site")
    else:
        names = ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS")
        chosen = [f"{name}={value}" for name, value in target.site.sbatch.items() if name in names]
        yield Finding("site", "ok", ", ".join([str(target.site.file), *chosen]))


def check_recipe(target: Target) -> Iterator[Finding]:
    """The recipe, its data files, and whether a Hub model or data set has been fetched."""
    if target.plan is None:
        if target.error and target.site:
            yield Finding("recipe", "failed", target.error.message, target.error.remedy)
        return
    if not target.has_recipe:
        return
    assert target.site is not None
    recipe, count = target.plan.recipe, sum(map(len, target.plan.files.values()))
    data = f"{plural(count, 'data file')}" if target.plan.files else f"data set {recipe.data.hub}"
    yield Finding("recipe", "ok", f"{recipe.name}: {data}")
    wanted = [] if target.plan.model_folder else [("model", recipe.model)]
    wanted += [("dataset", recipe.data.hub)] if recipe.data.hub else []
    for kind, name in wanted:
        pins = _pins(target.site, kind, name)
        if pins:
            yield Finding("offline", "ok", f"{kind} {name} is pinned at {pins[-1][:12]}")
        else:
            remedy = "run `afina prefetch RECIPE` where there is internet"
            yield Finding("offline", "warning", f"{kind} {name} has not been fetched", remedy)


def _pins(site: Site, kind: str, name: str) -> list[str]:
    """The commits that a name was pinned to (`afina.worker.hub.pins`)."""
    commits = []
    for path in sorted((site.scratch / "pins").glob(f"{kind}-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            pin = json.loads(path.read_text(encoding="utf-8"))
            if pin["asked"] == name:
                commits.append(str(pin["commit"]))
    return commits


def check_scratch(target: Target) -> Iterator[Finding]:
    assert target.site is not None
    scratch = target.site.scratch
    space = os.statvfs(scratch)
    free, kind = space.f_bavail * space.f_frsize, _file_system(scratch)
    inodes = space.f_favail if space.f_files else None
    message = f"{scratch} ({kind}): {size_in_words(free)} free" + ("" if inodes is None else f", {inodes:,} inodes")
    if free < _FEWEST_BYTES or (inodes is not None and inodes < _FEWEST_INODES):
        remedy = "free space there (old runs, caches), or point AFINA_SCRATCH elsewhere"
        yield Finding("scratch", "failed", message, remedy)
        return
    if free < _FEW_BYTES or (inodes is not None and inodes < _FEW_INODES):
        remedy = "too little for checkpoints of a large model: remove old runs and caches"
        yield Finding("scratch", "warning", message, remedy)
    else:
        yield Finding("scratch", "ok", message)
    if target.has_slurm and kind in _LOCAL and not target.with_job:
        message = f"{kind} is usually the disk of one machine: do all nodes see {scratch}?"
        yield Finding("scratch", "warning", message, "`afina doctor --job` checks it")


def check_sharing(target: Target) -> Iterator[Finding]:
    """Caches and prepared data that other users made, and whether this user's umask lets a group share them."""
    assert target.site is not None
    scratch = target.site.scratch
    folders = [folder for name in ("cache", "prepared", "pins") for folder in _two_levels(scratch / name)]
    for folder in folders:
        if folder.lstat().st_uid != os.getuid() and not os.access(
            folder, os.R_OK | (os.X_OK if folder.is_dir() else 0)
        ):
            yield Finding("sharing", "failed", f"{folder}: permission denied", permission_remedy(folder))
            return
    mode = scratch.stat().st_mode
    if not mode & stat.S_IWGRP:
        return
    umask = int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:"))[6:], 8
    )
    if umask & 0o070:
        message = (
            f"{scratch} is shared by its group, and your umask {umask:03o} keeps the group out of caches that you make"
        )
        yield Finding("sharing", "warning", message, "umask 007 in the site file, or a scratch folder of your own")
    elif not mode & stat.S_ISGID:
        message = f"{scratch} is shared by its group, and what is made in it belongs to your own group: the wrong quota may be charged"
        yield Finding("sharing", "warning", message, shlex.join(["chmod", "g+s", str(scratch)]))
    else:
        yield Finding("sharing", "ok", f"{scratch} is shared by its group")


def _two_levels(folder: Path) -> list[Path]:
    """A folder, what is in it, and what is in that, as far as they can be listed."""
    folders = [folder] * folder.exists()
    for pattern in ("*", "*/*"):
        with contextlib.suppress(OSError):
            folders += [path for path in folder.glob(pattern) if os.path.lexists(path)]
    return folders


def _file_system(path: Path) -> str:
    """The type of the mount that `path` lies on, from /proc/mounts."""
    best, kind = "", "unknown file system"
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            fields = line.split()
            mount = fields[1].replace("\\040", " ").replace("\\134", "\\")
            if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, fields[2]
    return kind


def check_quota(target: Target) -> Iterator[Finding]:
    """`lfs quota` on Lustre, else `quota`: used against limit, of bytes and of files."""
    assert target.site is not None
    argv = ["quota", "-w", "-p"]
    if _file_system(target.site.scratch) == "lustre":
        argv = ["lfs", "quota", "-q", "-u", target.env.get("USER") or str(os.getuid()), str(target.site.scratch)]
    answer = answer_of(argv, target.env)
    if answer is None:
        yield Finding("quota", "ok", f"`{argv[0]}` does not answer here: use your cluster's own command")
        return
    count = 0
    for line in answer.splitlines():
        words = line.split()
        if len(words) < 8 or not re.fullmatch(r"\d+\*?", words[1]):
            continue
        for unit, used, limits in (("KB", words[1], words[2:4]), ("files", words[5], words[6:8])):
            numbers = [int(number) for number in limits if number.isdigit() and int(number)]
            if numbers and used.rstrip("*").isdigit():
                count += 1
                yield _against_quota(words[0], unit, used, max(numbers))
    if not count:
        yield Finding("quota", "ok", "no quota is set")


def _against_quota(place: str, unit: str, used: str, limit: int) -> Finding:
    """`used` ends with a star where the soft limit is exceeded."""
    number = int(used.rstrip("*"))
    message = f"{place}: {number:,} of {limit:,} {unit} used"
    if number < limit and number <= 0.9 * limit and not used.endswith("*"):
        return Finding("quota", "ok", message)
    level: Level = "failed" if number >= limit else "warning"
    return Finding("quota", level, message, "remove old runs and caches, or ask for more")


def check_locks(target: Target) -> Iterator[Finding]:
    """A lock on scratch between two processes, and a file that is replaced while it is read."""
    assert target.site is not None
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=target.site.scratch))
    try:
        yield _try_lock(folder)
        yield _try_rename(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _try_lock(folder: Path) -> Finding:
    remedy = (
        "afina takes no locks; other programs' caches on scratch may hang or break: let one job at a time use HF_HOME"
    )
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("locks", "warning", f"flock fails on scratch: {error.strerror}", remedy)
        code = "import fcntl,sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        argv = [sys.executable, "-c", code, str(folder / "lock")]
        other = subprocess.run(argv, stderr=subprocess.DEVNULL, timeout=ANSWER_S, check=False)
    if other.returncode == 0:
        return Finding("locks", "warning", "flock on scratch does not exclude another process", remedy)
    return Finding("locks", "ok", "flock on scratch holds between processes of this machine")


def _try_rename(folder: Path, rounds: int = 200) -> Finding:
    target, blocks = folder / "target", [bytes([n]) * 4096 for n in (65, 66)]
    target.write_bytes(blocks[0])
    code = (
        "import sys\nfrom pathlib import Path\nwhile not Path(sys.argv[2]).exists():\n"
        "    raw = Path(sys.argv[1]).read_bytes()\n    if len(raw) != 4096 or len(set(raw)) != 1: sys.exit(9)\n"
    )
    reader = subprocess.Popen([sys.executable, "-c", code, str(target), str(folder / "over")], stderr=subprocess.PIPE)
    try:
        for number in range(rounds):
            aside = folder / "aside"
            aside.write_bytes(blocks[number % 2])
            os.replace(aside, target)
    finally:
        (folder / "over").touch()
        _, errors = reader.communicate(timeout=ANSWER_S)
    if reader.returncode:
        why = "a reader saw part of a file"
        if reader.returncode != 9:
            why = errors.decode(errors="replace").strip().splitlines()[-1]
        message = f"replacing a file on scratch is not atomic: {why}"
        return Finding("rename", "failed", message, "choose another file system for AFINA_SCRATCH")
    return Finding("rename", "ok", f"{rounds} replacements on scratch, each seen whole")


def check_caches(target: Target) -> Iterator[Finding]:
    """Caches that would lie in the home and its quota."""
    assert target.site is not None
    paths = cache_environment(target.site, target.env)
    home = Path(target.env.get("HOME", "/")).resolve()
    inside = [
        f"{name}={paths[name]}"
        for name in CACHE_VARIABLES
        if target.env.get(name) and Path(target.env[name]).resolve().is_relative_to(home)
    ]
    if inside and not target.site.scratch.resolve().is_relative_to(home):
        message = f"{', '.join(inside)}: in your home and its quota"
        yield Finding("caches", "warning", message, "unset it: afina then keeps it under scratch")
    else:
        yield Finding("caches", "ok", f"Hugging Face, torch and Triton use {Path(paths['HF_HOME']).parent}")


def check_token(target: Target) -> Iterator[Finding]:
    home = Path(target.env.get("HF_HOME") or Path(target.env.get("HOME", "/")) / ".cache/huggingface")
    if target.env.get("HF_TOKEN") or Path(target.env.get("HF_TOKEN_PATH") or home / "token").is_file():
        yield Finding("token", "ok", "there is a Hugging Face token")
    else:
        yield Finding("token", "ok", "no Hugging Face token; only gated or private models need one")


def check_clock(target: Target) -> Iterator[Finding]:
    """Against the file server's, and against slurmctld's."""
    assert target.site is not None
    with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=target.site.scratch) as file:
        file.write(b"x")
        file.flush()
        skews = {"the file server of scratch": os.fstat(file.fileno()).st_mtime - time.time()}
    with contextlib.suppress(KeyError, ValueError):
        answered = time.strptime(read_config()["AsOf"], "%Y-%m-%dT%H:%M:%S")
        skews["slurmctld"] = time.mktime(answered) - time.time()
    # Slurm prints whole seconds, in this machine's time zone or in its own.
    differing = {clock: skew for clock, skew in skews.items() if _SKEW_S < abs(skew) < 1700}
    for clock, skew in differing.items():
        message = f"this machine and {clock} differ by {abs(skew):.0f} s"
        yield Finding("clock", "warning", message, "ask for time synchronisation")
    if not differing:
        yield Finding("clock", "ok", f"agrees with {' and '.join(skews)}")
