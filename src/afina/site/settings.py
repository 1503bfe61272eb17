"""Where to train: this cluster, this account. One file that bash sources and Python reads through bash.

A site file is shell (`module load apptainer`, `: "${AFINA_SCRATCH:=/scratch/$USER}"`), so it is read by bash itself and
the environment that it leaves is compared with the one it found. Without a site file the environment is the site.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from afina.errors import SiteError, nearest
from afina.site.sif import declared_size

__all__ = [
    "CACHE_VARIABLES",
    "Site",
    "cache_environment",
    "environment",
    "find_site_file",
    "hub_token",
    "image_key",
    "in_container",
    "load_site",
    "scratch_of",
    "site_image",
]

#: Bytes that must be free on scratch before anything is begun there.
_LEAST_FREE = 16_000_000

Runtime = Literal["apptainer", "singularity", "none"]

#: What bash sets for itself.
_SHELLS_OWN = ("_", "SHLVL", "PWD", "OLDPWD", "BASHOPTS", "SHELLOPTS")

_KNOWN = (
    "AFINA_SCRATCH",
    "AFINA_IMAGE",
    "AFINA_IMAGE_KEY",
    "AFINA_BIND",
    "AFINA_RUNTIME",
    "AFINA_GPU_REQUEST",
    "AFINA_SBATCH_EXTRA",
    "AFINA_SBATCH_OMIT",
    "AFINA_STAGE",
    "AFINA_SITE",
)

#: What AFINA_SBATCH_OMIT may leave out: options of afina's own that some clusters refuse.
OMITTABLE = ("job-name", "ntasks-per-node", "cpus-per-task", "time", "mem", "requeue", "open-mode", "signal")

#: Options of sbatch that AFINA_SBATCH_EXTRA may not hold, and where to say it instead.
_TAKEN = {
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
    "chdir": "leave it out: relative paths would be other ones",
    "output": "leave it out: logs are in the run directory",
    "error": "leave it out: logs are in the run directory",
    "export": "leave it out: the job needs the environment of its submission",
    "parsable": "leave it out",
    "wrap": "leave it out",
    "requeue": "leave it out; AFINA_SBATCH_OMIT=requeue, where it is forbidden",
    "signal": "leave it out: afina asks for the signal it hears",
    "open-mode": "leave it out: logs are appended to",
}

#: Where each cache goes, under the folder of caches. Left alone, most of them land in HOME and its quota.
CACHE_VARIABLES: dict[str, str] = {
    "HF_HOME": "huggingface",
    "HF_XET_CACHE": "huggingface/xet",
    "HF_MODULES_CACHE": "huggingface/modules",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "MPLCONFIGDIR": "matplotlib",
}


class Site(BaseModel):
    """The site as a frozen value. Paths are absolute.

    Attributes:
        scratch: shared folder for caches, prepared data and runs.
        image: the Apptainer image, or None where jobs run in the surrounding environment.
        image_key: who must have signed the image: the path of a PEM public key, or a PGP fingerprint of 40 hex digits.
        runtime: what starts the container on a compute node.
        binds: `SRC[:DST[:OPTIONS]]` each, beside scratch, recipe and data.
        gpu_request: how GPUs are asked for: `gpus-per-node`, `gres` (each with `:TYPE`, if one is to be named) or `none`.
        sbatch_extra: further options of sbatch, `--name=value` or `--name` each.
        sbatch_omit: options of afina's own that this cluster refuses, by name; of `OMITTABLE`.
        stage: copy model and prepared data to each node first: its local folder, or `1` for the node's own temporary one.
        sbatch: Slurm's own `SBATCH_*` variables; they are passed to sbatch as they are.
        setup: variables that the site file set beside the known ones (NCCL settings, proxies, …); names only.
        file: the site file, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scratch: Path
    image: Path | None = None
    image_key: str | None = None
    runtime: Runtime = "none"
    binds: tuple[str, ...] = ()
    gpu_request: str = "gpus-per-node"
    sbatch_extra: tuple[str, ...] = ()
    sbatch_omit: tuple[str, ...] = ()
    stage: str | None = None
    sbatch: dict[str, str] = {}
    setup: tuple[str, ...] = ()
    file: Path | None = None

    @property
    def cache(self) -> Path:
        return self.scratch / "cache"

    @property
    def prepared(self) -> Path:
        return self.scratch / "prepared"

    @property
    def runs(self) -> Path:
        return self.scratch / "runs"


def cache_environment(site: Site, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that move every cache under scratch; one that the user has set stays as it is."""
    env = os.environ if env is None else env
    return {name: env.get(name) or str(site.cache / sub) for name, sub in CACHE_VARIABLES.items()}


def environment(site: Site) -> dict[str, str]:
    """What the site file changes in the environment (modules, proxies, HF_HOME, NCCL settings): for processes on this host."""
    if site.file is None or in_container():
        return {}
    return {k: v for k, v in _source(site.file, os.environ).items() if os.environ.get(k) != v and k not in _SHELLS_OWN}


def find_site_file(given: str | Path | None = None, env: Mapping[str, str] | None = None) -> Path | None:
    """`--site`, else `AFINA_SITE`, else `slurm/site.env` here, else `~/.config/afina/site.env`, else None.

    Raises:
        SiteError: a file that was named does not exist.
    """
    env = os.environ if env is None else env
    named = given or env.get("AFINA_SITE")
    if named:
        path = Path(named).expanduser().absolute()
        if not _may(path.is_file):
            raise SiteError(
                f"site file {path}: no such file",
                "give --site FILE or AFINA_SITE the path of your site.env (see slurm/site.example.env)",
            )
        return path
    home = env.get("HOME")
    for candidate in (Path("slurm/site.env"), *([Path(home) / ".config/afina/site.env"] if home else [])):
        if _may(candidate.is_file):
            return candidate.absolute()
    return None


def hub_token(env: Mapping[str, str]) -> dict[str, str]:
    """The token that `hf auth login` left in the home, which the container does not see and the caches have moved from."""
    if env.get("HF_TOKEN"):
        return {}
    home = Path(env.get("HF_HOME") or Path(env.get("HOME", "/")) / ".cache/huggingface")
    try:
        return {"HF_TOKEN": Path(env.get("HF_TOKEN_PATH") or home / "token").read_text().strip()}
    except OSError:
        return {}


def in_container(env: Mapping[str, str] | None = None) -> bool:
    env = os.environ if env is None else env
    return bool(env.get("APPTAINER_CONTAINER") or env.get("SINGULARITY_CONTAINER"))


def load_site(given: str | Path | None = None, env: Mapping[str, str] | None = None, *, job: bool = False) -> Site:
    """Read the site and check that its scratch can be used.

    Args:
        job: called by the batch script, in the container, after bash has sourced the site file: the environment is the
            site, and the image, which is not visible from within itself, is what the host said it is.

    Raises:
        SiteError: no scratch, scratch that is missing or not writable, an image that cannot be read, a site file that fails.
    """
    env = dict(os.environ if env is None else env)
    # A site file is for the host: `module load` means nothing in the container, where the environment has come along.
    file = None if job or (in_container(env) and env.get("AFINA_SCRATCH") and not given) else find_site_file(given, env)
    found = _source(file, env) if file else env
    for name in found:
        if name.startswith("AFINA_") and name not in _KNOWN and name not in env and file:
            hint = nearest(name, _KNOWN)
            raise SiteError(
                f"site file {file}: unknown variable {name}", f"{hint} known: {', '.join(_KNOWN[:-1])}".strip()
            )
    setup = (
        tuple(
            sorted(k for k, v in found.items() if env.get(k) != v and not k.startswith(("AFINA_", "SBATCH_", "BASH")))
        )
        if file
        else ()
    )
    named = found.get("AFINA_IMAGE", "")
    image = (Path(named) if named else None) if job or in_container(env) else _image(named, file)
    return Site(
        scratch=_scratch(found.get("AFINA_SCRATCH", ""), file),
        image=image,
        image_key=image_key(found.get("AFINA_IMAGE_KEY", ""), file, visible=not (job or in_container(env))),
        runtime=_runtime(found.get("AFINA_RUNTIME", ""), image, found, job=job),
        binds=tuple(b for b in found.get("AFINA_BIND", "").split(",") if b),
        gpu_request=_gpu_request(found.get("AFINA_GPU_REQUEST", "")),
        sbatch_extra=_sbatch_extra(found.get("AFINA_SBATCH_EXTRA", "")),
        sbatch_omit=_sbatch_omit(found.get("AFINA_SBATCH_OMIT", "")),
        stage=_stage(found.get("AFINA_STAGE", "")),
        sbatch={k: v for k, v in sorted(found.items()) if k.startswith("SBATCH_")},
        setup=tuple(k for k in setup if k not in _SHELLS_OWN),
        file=file,
    )


def scratch_of(given: str | Path | None = None, env: Mapping[str, str] | None = None) -> Path:
    """Only where scratch is, to look at what is there: it may be full, or closed for writing.

    Raises:
        SiteError: none is named, or it is not there; a site file that fails.
    """
    env = dict(os.environ if env is None else env)
    file = None if in_container(env) and env.get("AFINA_SCRATCH") and not given else find_site_file(given, env)
    return _existing_scratch((_source(file, env) if file else env).get("AFINA_SCRATCH", ""), file)[0]


def site_image(
    given: str | Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[str, str | None, Runtime, dict[str, str]]:
    """AFINA_IMAGE as it is written, its key, the runtime and the environment of the site, wherever scratch may be.

    Raises:
        SiteError: the site file fails, or the key is neither a file nor a fingerprint.
    """
    env = dict(os.environ if env is None else env)
    file = find_site_file(given, env)
    found = _source(file, env) if file else env
    named = found.get("AFINA_IMAGE", "")
    key = image_key(found.get("AFINA_IMAGE_KEY", ""), file)
    return named, key, _runtime(found.get("AFINA_RUNTIME", ""), Path(named or "afina.sif"), found, job=False), found


def _may(question: Callable[[], bool]) -> bool:
    """The answer about a path; no, where it cannot be asked (a folder above is closed, a name is too long)."""
    try:
        return question()
    except OSError:
        return False


def _source(file: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The environment after bash has sourced `file`; its standard output is not ours to read."""
    script = 'set -a; source "$1" >&2 || exit 97; env -0'
    try:
        done = subprocess.run(
            ["bash", "-c", script, "afina-site", str(file)],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
        )
    except FileNotFoundError:
        raise SiteError("bash is not on PATH", "afina reads site files through bash: install it") from None
    except subprocess.TimeoutExpired:
        raise SiteError(
            f"site file {file}: still running after 120 s", "it must only set variables and load modules"
        ) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        # bash repeats the line under a syntax error.
        last = next((line for line in said if "syntax error" in line), said[-1] if said else "")
        how = "its last command failed" if done.returncode == 97 else f"it ended bash with exit code {done.returncode}"
        raise SiteError(
            f"site file {file}: {how}{f': {last}' if last else ''}",
            f"try: bash -xc {shlex.quote(f'source {shlex.quote(str(file))}')}",
        )
    if not done.stdout:
        raise SiteError(f"site file {file}: it calls `exit`", "it is sourced: leave `exit` out, or use `return`")
    pairs = (entry.partition("=") for entry in done.stdout.decode(errors="surrogateescape").split("\0") if "=" in entry)
    return {k: v for k, _, v in pairs}


def _existing_scratch(value: str, file: Path | None) -> tuple[Path, str]:
    """The folder, and what to say of where it is named."""
    where = (
        f"set AFINA_SCRATCH in {file}"
        if file
        else "export AFINA_SCRATCH=/path/on/shared/scratch, or write it into slurm/site.env (see slurm/site.example.env)"
    )
    if not value:
        raise SiteError(
            "AFINA_SCRATCH is not set: caches, prepared data and runs need a folder on shared scratch", where
        )
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise SiteError(f"AFINA_SCRATCH={value} is not an absolute path", where)
    if not _may(path.is_dir):
        what = "is not a folder" if _may(path.exists) else "does not exist, or a folder above it is closed to you"
        raise SiteError(
            f"AFINA_SCRATCH={value} {what}", f"mkdir -p '{value}' (a mistyped path is never made for you), or {where}"
        )
    return path, where


def _scratch(value: str, file: Path | None) -> Path:
    path, _ = _existing_scratch(value, file)
    space = os.statvfs(path)
    if not os.access(path, os.W_OK | os.X_OK) or space.f_flag & os.ST_RDONLY:
        raise SiteError(
            f"AFINA_SCRATCH={value} is not writable by you", "choose a folder of your own or your group's on scratch"
        )
    if space.f_bavail * space.f_frsize < _LEAST_FREE or (space.f_files and space.f_favail == 0):
        free = f"{space.f_bavail * space.f_frsize / 1e6:.0f} MB and {space.f_favail} inodes are free"
        raise SiteError(
            f"AFINA_SCRATCH={value} is full: {free}",
            "remove what is not needed (old runs, caches), or choose another folder",
        )
    return path


def _image(value: str, file: Path | None) -> Path | None:
    if not value:
        return None
    path = Path(value).expanduser()
    if not path.is_absolute():
        path = path.absolute()
    if not _may(path.exists):
        raise SiteError(
            f"AFINA_IMAGE={value}: no such image, or a folder above it is closed to you",
            "build it with container/build.sh, or correct AFINA_IMAGE" + (f" in {file}" if file else ""),
        )
    if not os.access(path, os.R_OK):
        raise SiteError(
            f"AFINA_IMAGE={value} cannot be read by you", f"chmod a+r '{value}', or copy it where you can read it"
        )
    if path.is_file():
        declared, size = declared_size(path), path.stat().st_size
        if declared is None:
            raise SiteError(
                f"AFINA_IMAGE={value} is not an Apptainer image (SIF)",
                "build it with container/build.sh; a broken download looks the same",
            )
        if size < declared:
            raise SiteError(
                f"AFINA_IMAGE={value} is cut off: {size} of {declared} bytes are there",
                "copy or build it again (a full disk or a broken transfer ends like this)",
            )
    return path


def image_key(value: str, file: Path | None = None, *, visible: bool = True) -> str | None:
    """The key as it is kept: an absolute path, or a fingerprint in lower case. In the container its file may not be seen."""
    if not value:
        return None
    fingerprint = "".join(value.split()).lower()
    if re.fullmatch("(0x)?[0-9a-f]{40}", fingerprint):
        return fingerprint.removeprefix("0x")
    path = Path(value).expanduser().absolute()
    if visible and not (_may(path.is_file) and os.access(path, os.R_OK)):
        raise SiteError(
            f"AFINA_IMAGE_KEY={value} is neither a key file that you can read nor a PGP fingerprint of 40 hex digits",
            "give the path of a PEM public key that every node sees, or the fingerprint that `apptainer key list` shows"
            + (f", in {file}" if file else ""),
        )
    return str(path)


def _runtime(value: str, image: Path | None, env: Mapping[str, str], *, job: bool) -> Runtime:
    if value in ("apptainer", "singularity"):
        return "apptainer" if value == "apptainer" else "singularity"
    if value == "none":
        return "none"
    if value:
        raise SiteError(f"AFINA_RUNTIME={value} is not known", "one of: apptainer, singularity, none")
    if image is None or (in_container(env) and not job):
        return "none"
    if in_container(env):
        return "apptainer" if env.get("APPTAINER_CONTAINER") else "singularity"
    if not shutil.which("apptainer", path=env.get("PATH")) and shutil.which("singularity", path=env.get("PATH")):
        return "singularity"
    return "apptainer"


def _gpu_request(value: str) -> str:
    if value and not re.fullmatch(r"(gpus-per-node|gres)(:[\w.-]+)?|none", value):
        raise SiteError(
            f"AFINA_GPU_REQUEST={value} is not known",
            "one of: gpus-per-node, gpus-per-node:TYPE, gres, gres:TYPE, none; `sinfo -o '%P %G'` shows the types there are",
        )
    return value or "gpus-per-node"


def _sbatch_extra(value: str) -> tuple[str, ...]:
    """One option a line: nothing is split at spaces, and bash reads the same."""
    lines = tuple(line.strip() for line in value.splitlines() if line.strip())
    for line in lines:
        if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", line):
            raise SiteError(
                f"AFINA_SBATCH_EXTRA: {line!r} is no option of sbatch as it is wanted here",
                "write each on a line of its own, in its long form with `=`: --constraint=a100, or --exclusive",
            )
        name = line[2:].partition("=")[0]
        if name in _TAKEN:
            raise SiteError(f"AFINA_SBATCH_EXTRA: --{name} is not the site's to set", _TAKEN[name])
    return lines


def _sbatch_omit(value: str) -> tuple[str, ...]:
    names = tuple(name.removeprefix("--") for name in value.replace(",", " ").split())
    for name in names:
        if name not in OMITTABLE:
            hint = nearest(name, OMITTABLE)
            raise SiteError(
                f"AFINA_SBATCH_OMIT: {name} cannot be left out",
                f"{hint} these can: {', '.join(OMITTABLE)}; GPUs with AFINA_GPU_REQUEST=none".strip(),
            )
    return names


def _stage(value: str) -> str | None:
    if value in ("", "0"):
        return None
    if value != "1" and (not value.startswith("/") or re.search(r"[,:\n]", value)):
        raise SiteError(
            f"AFINA_STAGE={value} is neither 1 nor the absolute path of a folder on the nodes",
            "1 takes $SLURM_TMPDIR, else $TMPDIR, else /tmp; a path may hold no comma, colon or line break",
        )
    return value
