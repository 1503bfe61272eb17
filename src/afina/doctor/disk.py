"""Checks of the site: its file, scratch and what can be relied on there, quotas, caches, clocks; and of a recipe's inputs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from afina.doctor.target import ANSWER_S, Target, answer_of
from afina.errors import EnvironmentProblem
from afina.site.finding import Finding, Level
from afina.site.settings import CACHE_VARIABLES, Site, cache_environment
from afina.slurm.cluster import read_config

__all__ = [
    "check_caches",
    "check_clock",
    "check_locks",
    "check_quota",
    "check_recipe",
    "check_scratch",
    "check_site",
    "check_token",
]

_FEW_GB, _FEWEST_GB, _FEW_INODES = 20.0, 1.0, 20_000
_SKEW_S = 5.0
#: File systems that one machine has for itself.
_LOCAL = ("tmpfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs", "ramfs")


def check_site(target: Target) -> list[Finding]:
    if target.site is None:
        error = target.error or EnvironmentProblem("no site", "")
        return [Finding("site", "failed", error.message, error.remedy or "write one: afina init --site-only")]
    if target.site.file is None:
        return [Finding("site", "ok", "no site file: the environment is the site")]
    sbatch = "".join(
        f", {name}={value}"
        for name, value in target.site.sbatch.items()
        if name in ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_QOS")
    )
    return [Finding("site", "ok", f"{target.site.file}{sbatch}")]


def check_recipe(target: Target) -> list[Finding]:
    if target.plan is None:
        return (
            [Finding("recipe", "failed", target.error.message, target.error.remedy)]
            if target.error and target.site
            else []
        )
    if not target.has_recipe:
        return []
    recipe = target.plan.recipe
    count = sum(map(len, target.plan.files.values()))
    found = [
        Finding(
            "recipe",
            "ok",
            f"{recipe.name}: {count} data file{'s' * (count != 1)}"
            if target.plan.files
            else f"{recipe.name}: data set {recipe.data.hub}",
        )
    ]
    assert target.site is not None
    wanted = [] if target.plan.model_folder else [("model", recipe.model)]
    wanted += [("dataset", recipe.data.hub)] if recipe.data.hub else []
    for kind, name in wanted:
        pins = _pins(target.site, kind, name)
        if pins:
            found.append(Finding("offline", "ok", f"{kind} {name} is pinned at {pins[-1][:12]}"))
        else:
            found.append(
                Finding(
                    "offline",
                    "warning",
                    f"{kind} {name} has not been fetched",
                    "run `afina prefetch RECIPE` where there is internet",
                )
            )
    return found


def _pins(site: Site, kind: str, name: str) -> list[str]:
    """The commits that a name was pinned to (`afina.worker.hub.pins`)."""
    found = []
    for path in sorted((site.scratch / "pins").glob(f"{kind}-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            pin = json.loads(path.read_text(encoding="utf-8"))
            if pin["asked"] == name:
                found.append(str(pin["commit"]))
    return found


def check_scratch(target: Target) -> list[Finding]:
    assert target.site is not None
    scratch = target.site.scratch
    space = os.statvfs(scratch)
    free, kind = space.f_bavail * space.f_frsize / 1e9, _file_system(scratch)
    said = f"{scratch} ({kind}): {free:,.1f} GB free" + (f", {space.f_favail:,} inodes" if space.f_files else "")
    if free < _FEWEST_GB or (space.f_files and space.f_favail < 200):
        return [
            Finding("scratch", "failed", said, "free space there (old runs, caches), or point AFINA_SCRATCH elsewhere")
        ]
    found = []
    if free < _FEW_GB or (space.f_files and space.f_favail < _FEW_INODES):
        found.append(
            Finding("scratch", "warning", said, "little for checkpoints of a large model: remove old runs and caches")
        )
    else:
        found.append(Finding("scratch", "ok", said))
    if target.has_slurm and kind in _LOCAL and not target.with_job:
        found.append(
            Finding(
                "scratch",
                "warning",
                f"{kind} is usually a disk of one machine: do all nodes see {scratch}?",
                "`afina doctor --job` tells",
            )
        )
    return found


def _file_system(path: Path) -> str:
    """The type of the mount that `path` lies on, as /proc/mounts names it."""
    best, kind = "", "unknown file system"
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            fields = line.split()
            mount = fields[1].replace("\\040", " ").replace("\\134", "\\")
            if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, fields[2]
    return kind


def check_quota(target: Target) -> list[Finding]:
    """`lfs quota` on Lustre, else `quota`: used against limit, of bytes and of files."""
    assert target.site is not None
    user = target.env.get("USER") or str(os.getuid())
    argv = (
        ["lfs", "quota", "-q", "-u", user, str(target.site.scratch)]
        if _file_system(target.site.scratch) == "lustre"
        else ["quota", "-w", "-p"]
    )
    said = answer_of(argv, target.env)
    if said is None:
        return [Finding("quota", "ok", f"`{argv[0]}` does not answer here: see your cluster's own command")]
    found = []
    for line in said.splitlines():
        words = line.split()
        if len(words) < 8 or not re.fullmatch(r"\d+\*?", words[1]):
            continue
        for what, used, limits in (("KB", words[1], words[2:4]), ("files", words[5], words[6:8])):
            numbers = [int(n) for n in limits if n.isdigit() and int(n)]
            if not numbers or not used.rstrip("*").isdigit():
                continue
            share = int(used.rstrip("*")) / max(numbers)
            text = f"{words[0]}: {int(used.rstrip('*')):,} of {max(numbers):,} {what} used"
            level: Level = "failed" if share >= 1 else "warning" if share > 0.9 or used.endswith("*") else "ok"
            found.append(
                Finding("quota", level, text, "" if level == "ok" else "remove old runs and caches, or ask for more")
            )
    return found or [Finding("quota", "ok", "no quota is set")]


def check_locks(target: Target) -> list[Finding]:
    """Is what one process locks locked for another, and is a replaced file always whole? Tried on scratch."""
    assert target.site is not None
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=target.site.scratch))
    try:
        return [_try_lock(folder), _try_rename(folder)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _try_lock(folder: Path) -> Finding:
    remedy = "afina itself takes no locks; other programs' caches on scratch may hang or break: keep HF_HOME to one job at a time"
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("locks", "warning", f"flock is refused on scratch: {error.strerror}", remedy)
        code = "import fcntl,sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run(
            [sys.executable, "-c", code, str(folder / "lock")],
            stderr=subprocess.DEVNULL,
            timeout=ANSWER_S,
            check=False,
        )
    if other.returncode == 0:
        return Finding("locks", "warning", "flock on scratch locks nobody out", remedy)
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
        _, why = reader.communicate(timeout=ANSWER_S)
    if reader.returncode:
        what = (
            "a reader saw a part of it"
            if reader.returncode == 9
            else why.decode(errors="replace").strip().splitlines()[-1]
        )
        return Finding(
            "rename",
            "failed",
            f"replacing a file on scratch is not atomic: {what}",
            "choose another file system for AFINA_SCRATCH",
        )
    return Finding("rename", "ok", f"{rounds} replacements on scratch, each seen whole")


def check_caches(target: Target) -> list[Finding]:
    assert target.site is not None
    env = {**target.env}
    paths = cache_environment(target.site, env)
    home = Path(env.get("HOME", "/")).resolve()
    inside = [
        n
        for n in CACHE_VARIABLES
        if env.get(n)
        and Path(env[n]).resolve().is_relative_to(home)
        and not target.site.scratch.resolve().is_relative_to(home)
    ]
    if inside:
        return [
            Finding(
                "caches",
                "warning",
                f"{', '.join(f'{n}={paths[n]}' for n in inside)}: in your home and its quota",
                "unset it: afina then keeps it under scratch",
            )
        ]
    return [
        Finding("caches", "ok", f"Hugging Face, torch and Triton keep theirs below {Path(paths['HF_HOME']).parent}")
    ]


def check_token(target: Target) -> list[Finding]:
    home = Path(target.env.get("HF_HOME") or Path(target.env.get("HOME", "/")) / ".cache/huggingface")
    there = bool(target.env.get("HF_TOKEN")) or Path(target.env.get("HF_TOKEN_PATH") or home / "token").is_file()
    return [
        Finding(
            "token",
            "ok",
            "there is a Hugging Face token"
            if there
            else "no Hugging Face token; only gated or private models need one",
        )
    ]


def check_clock(target: Target) -> list[Finding]:
    """Against the file server's, and against slurmctld's."""
    assert target.site is not None
    found = []
    with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=target.site.scratch) as file:
        file.write(b"x")
        file.flush()
        skews = {"the file server of scratch": os.fstat(file.fileno()).st_mtime - time.time()}
    with contextlib.suppress(KeyError, ValueError):
        answered = time.strptime(read_config()["AsOf"], "%Y-%m-%dT%H:%M:%S")
        skews["slurmctld"] = time.mktime(answered) - time.time()
    for who, skew in skews.items():
        # Slurm prints whole seconds, in this machine's time zone or in its own.
        if _SKEW_S < abs(skew) < 1700:
            found.append(
                Finding(
                    "clock",
                    "warning",
                    f"this machine and {who} differ by {abs(skew):.0f} s",
                    "ask for time synchronisation",
                )
            )
    return found or [Finding("clock", "ok", f"agrees with {' and '.join(skews)}")]
