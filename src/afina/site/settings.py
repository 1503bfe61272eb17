"""The site: this cluster, this account. One file that bash sources and Python reads through bash.

A site file is shell (`module load apptainer`, `: "${AFINA_SCRATCH:=/scratch/$USER}"`), so bash reads it, and the environment
after it is compared with the one before. Without a site file the environment is the site.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast, get_args

from pydantic import Field

from afina.errors import SiteError, nearest
from afina.frozen import FrozenModel
from afina.site import variables
from afina.site.pulled import Pulled, newest, resolve, source_of
from afina.site.references import is_reference

__all__ = [
    "CACHE_VARIABLES",
    "Site",
    "cache_environment",
    "environment",
    "find_site_file",
    "hub_token",
    "in_container",
    "load_site",
    "scratch_of",
    "site_image",
    "without_isolation",
]

Runtime = Literal["apptainer", "singularity", "none"]

#: Settings of the container's runtime that isolate it.
_ISOLATION = tuple(
    f"{runtime}_{name}"
    for runtime in ("APPTAINER", "SINGULARITY")
    for name in [
        "CLEANENV",
        "CONTAIN",
        "CONTAINALL",
        "COMPAT",
        "NO_MOUNT",
        "HOME",
        "PWD",
        "CWD",
        "WORKDIR",
        "SCRATCH",
        "PID",
        "NET",
    ]
)

#: Variables that bash sets for itself.
_OF_BASH = ("_", "SHLVL", "PWD", "OLDPWD", "BASHOPTS", "SHELLOPTS")

#: The folder of each cache, under the folder of caches. By default most of them are in HOME and count against its quota.
CACHE_VARIABLES: dict[str, str] = {
    "HF_HOME": "huggingface",
    "HF_XET_CACHE": "huggingface/xet",
    "HF_MODULES_CACHE": "huggingface/modules",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "MPLCONFIGDIR": "matplotlib",
}


class Site(FrozenModel):
    """The site as a frozen value. Paths are absolute.

    Attributes:
        scratch: shared folder for caches, prepared data and runs.
        image: the Apptainer image, or None where jobs run in the surrounding environment.
        image_address, image_digest: of an image from a registry, `oras://…` or `docker://…` as it was written and the digest of its manifest;
            `image` is then on scratch, where `afina.site.image.check_image` puts it.
        image_key: the key that must have signed the image: the path of a PEM public key, or a PGP fingerprint of 40 hex digits.
        runtime: the program that starts the container on a compute node.
        binds: `SRC[:DST[:OPTIONS]]` each, beside scratch, recipe and data.
        gpu_request: how to request GPUs: `gpus-per-node`, `gres` (each may have `:TYPE`) or `none`.
        sbatch_extra: further options of sbatch, `--name=value` or `--name` each.
        sbatch_omit: names of afina's own options that this cluster refuses.
        stage: copy model and prepared data to each node first: its local folder, or `1` for the node's own temporary one.
        sbatch: Slurm's own `SBATCH_*` variables; they are passed to sbatch unchanged.
        setup: names of the other variables that the site file set (NCCL settings, proxies, …).
        file: the site file, or None.
    """

    scratch: Path
    image: Path | None = None
    image_address: str | None = None
    image_digest: str | None = None
    image_key: str | None = None
    runtime: Runtime = "none"
    binds: tuple[str, ...] = ()
    gpu_request: str = "gpus-per-node"
    sbatch_extra: tuple[str, ...] = ()
    sbatch_omit: tuple[str, ...] = ()
    stage: str | None = None
    sbatch: dict[str, str] = Field(default_factory=dict)
    setup: tuple[str, ...] = ()
    file: Path | None = None

    @property
    def cache(self) -> Path:
        return self.scratch / "cache"

    @property
    def pulled(self) -> Pulled | None:
        """The image as one of a registry; None for a file of the user's."""
        if self.image_address is None or self.image_digest is None:
            return None
        return Pulled(self.image_address, self.image_digest, self.cache / "images")

    @property
    def prepared(self) -> Path:
        return self.scratch / "prepared"

    @property
    def runs(self) -> Path:
        return self.scratch / "runs"


def load_site(given: str | Path | None = None, env: Mapping[str, str] | None = None, *, job: bool = False) -> Site:
    """Read the site and check that its scratch can be used.

    Args:
        job: for the batch script, in the container, after bash has sourced the site file: the environment is the site, and
            the image, which cannot be seen from inside itself, is the one that the host named.

    Raises:
        SiteError: no scratch, scratch that is missing or not writable, an image that cannot be read or is not in its registry, a site file that fails.
    """
    env = dict(os.environ if env is None else env)
    inside = job or in_container(env)
    file = None if job else _host_file(given, env)
    sourced = _source(file, env) if file else env
    _refuse_unknown(sourced, env, file)

    def value(name: str) -> str:
        return sourced.get(f"AFINA_{name}", "")

    scratch = variables.usable_scratch(value("SCRATCH"), file)
    image, pulled = _image(value("IMAGE"), scratch / "cache", sourced, file, inside=inside)
    return Site(
        scratch=scratch,
        image=image,
        image_address=pulled.address if pulled else None,
        image_digest=pulled.digest if pulled else None,
        image_key=variables.image_key(value("IMAGE_KEY"), file, visible=not inside),
        runtime=_runtime(value("RUNTIME"), image, sourced, job=job),
        binds=tuple(bind for bind in value("BIND").split(",") if bind),
        gpu_request=variables.gpu_request(value("GPU_REQUEST")),
        sbatch_extra=variables.sbatch_extra(value("SBATCH_EXTRA")),
        sbatch_omit=variables.sbatch_omit(value("SBATCH_OMIT")),
        stage=variables.stage_folder(value("STAGE")),
        sbatch=variables.sbatch_variables(sourced, env),
        setup=tuple(sorted(n for n in _changes(sourced, env) if not n.startswith(("AFINA_", "SBATCH_", "BASH")))),
        file=file,
    )


def scratch_of(given: str | Path | None = None, env: Mapping[str, str] | None = None) -> Path:
    """The folder of scratch alone, for reading: it may be full or read-only.

    Raises:
        SiteError: none is named, or it does not exist; a site file that fails.
    """
    env = dict(os.environ if env is None else env)
    file = _host_file(given, env)
    sourced = _source(file, env) if file else env
    return variables.existing_scratch(sourced.get("AFINA_SCRATCH", ""), file)


def site_image(
    given: str | Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[str, str | None, Runtime, dict[str, str]]:
    """AFINA_IMAGE as written, its key, the runtime and the environment of the site; scratch is not checked.

    Raises:
        SiteError: the site file fails, or the key is neither a file nor a fingerprint.
    """
    env = dict(os.environ if env is None else env)
    file = find_site_file(given, env)
    sourced = _source(file, env) if file else env
    named = sourced.get("AFINA_IMAGE", "")
    key = variables.image_key(sourced.get("AFINA_IMAGE_KEY", ""), file)
    return (
        named,
        key,
        _runtime(sourced.get("AFINA_RUNTIME", ""), Path(named or "afina.sif"), sourced, job=False),
        sourced,
    )


def environment(site: Site) -> dict[str, str]:
    """The variables that the site file changes (modules, proxies, HF_HOME, NCCL settings), for processes on this host."""
    if site.file is None or in_container():
        return {}
    return _changes(_source(site.file, os.environ), os.environ)


def cache_environment(site: Site, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that move every cache under scratch; those that the user has set keep their values."""
    env = os.environ if env is None else env
    return {name: env.get(name) or str(site.cache / sub) for name, sub in CACHE_VARIABLES.items()}


def without_isolation(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without settings that would keep variables or folders out of the container (`slurm/node.sh` has the same list).

    A site's or a user's profile may set `APPTAINER_CLEANENV`, `SINGULARITY_CONTAIN`, …: for other programs, not for a worker that
    lives on the job's variables and on bound folders.
    """
    return {name: value for name, value in env.items() if name not in _ISOLATION}


def hub_token(env: Mapping[str, str]) -> dict[str, str]:
    """The token that `hf auth login` stored in the home, which the container does not see and the caches are not in."""
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


def find_site_file(given: str | Path | None = None, env: Mapping[str, str] | None = None) -> Path | None:
    """`--site`, else `AFINA_SITE`, else `slurm/site.env` here, else `~/.config/afina/site.env`, else None.

    Raises:
        SiteError: a file that was named does not exist.
    """
    env = os.environ if env is None else env
    named = given or env.get("AFINA_SITE")
    if named:
        path = Path(named).expanduser().absolute()
        if not variables.path_test(path.is_file):
            raise SiteError(
                f"site file {path}: no such file",
                "give --site FILE or AFINA_SITE the path of your site.env (see slurm/site.example.env)",
            )
        return path
    home = env.get("HOME")
    for candidate in (Path("slurm/site.env"), *([Path(home) / ".config/afina/site.env"] if home else [])):
        if variables.path_test(candidate.is_file):
            return candidate.absolute()
    return None


def _host_file(given: str | Path | None, env: Mapping[str, str]) -> Path | None:
    """The site file, which is for the host: in the container `module load` means nothing, and the environment is inherited."""
    return None if in_container(env) and env.get("AFINA_SCRATCH") and not given else find_site_file(given, env)


def _source(file: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The environment after bash has sourced `file`; what the file prints is discarded."""
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
        remedy = "it must only set variables and load modules"
        raise SiteError(f"site file {file}: still running after 120 s", remedy) from None
    if done.returncode:
        errors = done.stderr.decode(errors="replace").strip().splitlines()
        # bash repeats the line under a syntax error.
        last = next((line for line in errors if "syntax error" in line), errors[-1] if errors else "")
        how = "its last command failed" if done.returncode == 97 else f"it ended bash with exit code {done.returncode}"
        raise SiteError(
            f"site file {file}: {how}{f': {last}' if last else ''}",
            f"try: bash -xc {shlex.quote(f'source {shlex.quote(str(file))}')}",
        )
    if not done.stdout:
        raise SiteError(f"site file {file}: it calls `exit`", "it is sourced: leave `exit` out, or use `return`")
    pairs = (entry.partition("=") for entry in done.stdout.decode(errors="surrogateescape").split("\0") if "=" in entry)
    return {name: value for name, _, value in pairs}


def _changes(sourced: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sourced.items() if env.get(name) != value and name not in _OF_BASH}


def _refuse_unknown(sourced: Mapping[str, str], env: Mapping[str, str], file: Path | None) -> None:
    """A misspelt variable in the site file; the environment may hold other variables of that prefix."""
    for name in sourced if file else ():
        if name.startswith("AFINA_") and name not in (*variables.KNOWN, "AFINA_SITE") and name not in env:
            remedy = f"{nearest(name, variables.KNOWN)} known: {', '.join(variables.KNOWN)}".strip()
            raise SiteError(f"site file {file}: unknown variable {name}", remedy)


def _image(
    named: str, cache: Path, env: Mapping[str, str], file: Path | None, *, inside: bool
) -> tuple[Path | None, Pulled | None]:
    """AFINA_IMAGE as a file, and as what it is in a registry, if it came from one. Inside a container the registry is not asked."""
    if is_reference(named):
        if env.get("AFINA_RUNTIME") == "none":
            return None, None
        pulled = newest(named, cache) if inside else resolve(named, cache, env)
        return (pulled.path if pulled else None), pulled
    path = (Path(named) if named else None) if inside else variables.image_file(named, file)
    source = source_of(path) if path else None
    pulled = Pulled(*source, cache / "images") if source else None
    return path, pulled if pulled and pulled.path == path else None


def _runtime(value: str, image: Path | None, env: Mapping[str, str], *, job: bool) -> Runtime:
    if value and value not in get_args(Runtime):
        raise SiteError(f"AFINA_RUNTIME={value} is not known", "one of: apptainer, singularity, none")
    if in_container(env) and not job:
        return "none"  # we are in it; the site file names the host's
    if value:
        return cast(Runtime, value)
    if image is None:
        return "none"
    if in_container(env):
        return "apptainer" if env.get("APPTAINER_CONTAINER") else "singularity"
    if not shutil.which("apptainer", path=env.get("PATH")) and shutil.which("singularity", path=env.get("PATH")):
        return "singularity"
    return "apptainer"
