"""Images from a registry: resolved to a digest, pulled once to scratch, kept under that digest.

    <scratch>/cache/images/NAME-<digest>.sif         the image: pulled aside, checked against the digest, renamed
    <scratch>/cache/images/NAME-<digest>.sif.json    where it came from, its SHA-256
    <scratch>/cache/images/names/<sha256 of AFINA_IMAGE>    name and digest of the newest; `slurm/finetune.sbatch` reads it
    <scratch>/cache/images/<key>.json                SHA-256 of an image, by path, size, times and inode

`oras://` holds an Apptainer image, whose layer's digest is its SHA-256; a broken transfer is continued. `docker://` is converted by
Apptainer, differently each time: then the manifest's digest names the source, and the SHA-256 the file. Not covered: quotas (a file that exceeds one counts as a full disk).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from afina.errors import AfinaError, SiteError
from afina.files import name_aside, read_json, sync_file, sync_folder, write_atomic
from afina.files import sha256 as sha256_of
from afina.processes import advisory_lock
from afina.publish import sweep
from afina.redact import redact
from afina.site.references import UNREACHABLE, Reference
from afina.site.variables import declared_size
from afina.text import size_in_words

if TYPE_CHECKING:
    from afina.site.registry import Layer, Manifest, Registry

__all__ = ["Pulled", "Say", "image_sha256", "newest", "pull", "resolve", "source_of", "to_stderr"]

#: Seconds before another try of a transfer that brought nothing.
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
_BLOCK = 1 << 20
#: Seconds between two lines of progress.
_REPORT_S = 5.0
#: Smaller images are hashed without a message.
_REPORT_FROM_BYTES = 200 << 20
#: Bytes that stay free beside the image.
_RESERVE = 64_000_000

Say = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Print a line of progress."""
    print(f"afina: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Pulled:
    """An image of a registry and its place on scratch, where it may not be yet.

    Attributes:
        address: AFINA_IMAGE as it was written.
        digest: `sha256:…` of its manifest, which the tag had when it was resolved.
    """

    address: str
    digest: str
    folder: Path

    @property
    def reference(self) -> Reference:
        return replace(Reference.parse(self.address), digest=self.digest)

    @property
    def path(self) -> Path:
        name = self.reference.name.rpartition("/")[2]
        return self.folder / f"{name}-{self.digest.removeprefix('sha256:')[:16]}.sif"

    @property
    def note(self) -> Path:
        """Beside the image: where it came from."""
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def pointer(self) -> Path:
        """The newest image under this address; bash computes the same name."""
        return self.folder / "names" / hashlib.sha256(os.fsencode(self.address)).hexdigest()[:32]

    def is_whole(self, say: Say) -> bool:
        """True if the file is there with the content that was pulled; it is read only if it changed since."""
        known = read_json(self.note)
        try:
            return self.path.stat().st_size == known.get("size") and known.get("sha256") == image_sha256(
                self.path, self.folder, say
            )
        except OSError:
            return False

    def point_here(self) -> None:
        self.pointer.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.pointer, f"{self.path.name}\n{self.digest}\n")


def newest(address: str, cache: Path) -> Pulled | None:
    """The image that was last pulled under this address, if it is still there."""
    folder = cache / "images"
    try:
        digest = Pulled(address, "", folder).pointer.read_text().splitlines()[1]
    except (OSError, UnicodeDecodeError, IndexError):
        return None
    known = Pulled(address, digest, folder)
    return known if known.path.is_file() else None


def resolve(address: str, cache: Path, env: Mapping[str, str], say: Say = to_stderr) -> Pulled:
    """The image that AFINA_IMAGE names now. The registry is asked unless a digest is given; a tag that moved is reported.

    Args:
        cache: the site's folder of caches.

    Raises:
        SiteError: no address, no such image, no login; or the registry cannot be reached and nothing was pulled before.
    """
    reference, before = Reference.parse(address), newest(address, cache)
    if reference.digest:
        return Pulled(address, reference.digest, cache / "images")
    from afina.site.registry import Registry  # a client of HTTP: not for every command

    try:
        now = Pulled(address, Registry(reference, env).manifest().digest, cache / "images")
    except SiteError as error:
        if error.cause != UNREACHABLE or before is None:
            raise
        say(f"{error.message}; {address} is taken as it was pulled before, {before.digest}")
        return before
    if before is not None and before.digest != now.digest:
        say(f"{address} has moved: it was {before.digest} and is {now.digest}; runs that exist keep theirs")
        if now.path.is_file():
            now.point_here()
    return now


def pull(
    image: Pulled, runtime: str, env: Mapping[str, str], say: Say = to_stderr, pauses: tuple[float, ...] = _PAUSES_S
) -> None:
    """Have the image on scratch; nothing is transferred where it is whole already. One process pulls, others wait.

    Args:
        env: with HOME, logins and proxies for the registry, and PATH for Apptainer.
        pauses: seconds before each further try that follows one without a byte.

    Raises:
        SiteError: no room, no connection, no login, or the content is not what the digest says.
    """
    if image.is_whole(say):
        return
    try:
        image.folder.mkdir(parents=True, exist_ok=True)
        with advisory_lock(image.folder / f".turn-{image.path.name}", f"pulling {image.reference.pinned}", say):
            if not image.is_whole(say):
                _pull(image, runtime, env, say, pauses)
    except OSError as error:
        raise _unwritable(image.folder, error) from None


def _pull(image: Pulled, runtime: str, env: Mapping[str, str], say: Say, pauses: tuple[float, ...]) -> None:
    from afina.site.registry import Registry

    registry = Registry(image.reference, env)
    manifest = registry.manifest()
    partial = image.path.with_name(f".{image.path.name}.partial")
    aside = name_aside(image.path)
    # What a broken transfer left, unless another process continues it at this moment.
    with contextlib.suppress(FileNotFoundError):
        partial.rename(aside)
    aside.touch()
    sweep(image.folder, now=aside.stat().st_mtime)
    began = time.monotonic()
    try:
        _check_space(aside, manifest, say)
        if manifest.sif is not None:
            digest = _transfer(registry, manifest.sif, aside, say, pauses)
        else:
            digest = _convert(image.reference, aside, runtime, env, say)
        size = aside.stat().st_size
        if declared_size(aside) is None:
            raise SiteError(f"{image.reference.pinned} is not an Apptainer image (SIF)", "push one: container/build.sh")
        sync_file(aside)
        about = {"address": image.address, "digest": image.digest, "sha256": digest, "size": size}
        write_atomic(image.note, json.dumps({**about, "pulled": int(time.time())}) + "\n")
        aside.rename(image.path)
        sync_folder(image.folder)
    except SiteError as error:
        if error.cause == UNREACHABLE:
            aside.rename(partial)
        raise
    finally:
        aside.unlink(missing_ok=True)
    _remember(image.path, image.folder, digest)
    seconds = max(time.monotonic() - began, 0.001)
    say(f"pulled {image.reference.pinned}: {size_in_words(size)} in {seconds:.0f} s, {image.path}")
    # A run that is resumed may be of a tag that has moved since: then the name's newest image is another.
    with contextlib.suppress(AfinaError):
        tag = replace(image.reference, digest=None)
        if Reference.parse(image.address).digest or Registry(tag, env).manifest().digest == image.digest:
            image.point_here()


def _check_space(aside: Path, manifest: Manifest, say: Say) -> None:
    """Refuse what cannot fit. A converted image is about as large as its compressed layers."""
    space = os.statvfs(aside.parent)
    needed, free = manifest.size - aside.stat().st_size + _RESERVE, space.f_bavail * space.f_frsize
    if free < needed:
        message = f"{aside.parent} has {size_in_words(free)} free, and the image needs {size_in_words(needed)}"
        raise SiteError(message, "remove old runs and images there, or choose another AFINA_SCRATCH")
    say(f"pulling {size_in_words(manifest.size)} to {aside.parent}")


class _Transfer:
    """A blob on its way into a file, which may hold the beginning already. Every byte goes through SHA-256."""

    def __init__(self, registry: Registry, layer: Layer, file: FileIO, say: Say) -> None:
        self._registry, self._layer, self._file, self._say = registry, layer, file, say
        self._digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            self._digest.update(block)
        self._reported = time.monotonic()

    @property
    def done(self) -> int:
        return self._file.tell()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()

    def receive(self) -> str:
        """Read until the connection ends; the reason if it broke.

        Raises:
            SiteError: the registry refuses.
            OSError: the file cannot be written.
        """
        from afina.site.registry import read_block

        try:
            with self._registry.blob(self._layer.digest, self.done) as body:
                if body.status != 206:
                    self.restart()
                while block := read_block(body, _BLOCK):
                    view = memoryview(block)
                    while view:
                        view = view[self._file.write(view) :]
                    self._digest.update(block)
                    self._report()
            return "the connection was closed"
        except SiteError as error:
            if error.cause != UNREACHABLE:
                raise
            return error.message
        except ConnectionError as error:
            return str(error)

    def _report(self) -> None:
        if time.monotonic() - self._reported > _REPORT_S:
            self._reported = time.monotonic()
            self._say(f"pulled {size_in_words(self.done)} of {size_in_words(self._layer.size)}")


def _transfer(registry: Registry, layer: Layer, aside: Path, say: Say, pauses: tuple[float, ...]) -> str:
    """Read the image into `aside`, from where an earlier transfer broke off; returns its SHA-256.

    Raises:
        SiteError: `UNREACHABLE` where the rest did not come; or it is not what the digest says.
    """
    size = size_in_words(layer.size)
    with aside.open("r+b", buffering=0) as file:
        transfer, tries = _Transfer(registry, layer, file, say), 0
        continued = transfer.done
        if continued:
            say(f"continuing after {size_in_words(continued)} of {size}")
        while (before := transfer.done) < layer.size:
            reason = transfer.receive()
            if transfer.done >= layer.size:
                break
            done = size_in_words(transfer.done)
            if transfer.done > before:
                tries = 0
                say(f"the transfer broke off after {done} of {size} ({reason}): continuing")
            elif tries == len(pauses):
                message = f"the transfer of {registry.reference.pinned} broke off after {done} of {size}: {reason}"
                raise SiteError(message, "repeat the command: it continues from there", cause=UNREACHABLE)
            else:
                time.sleep(pauses[tries])
                tries += 1
        if f"sha256:{transfer.sha256}" == layer.digest:
            return transfer.sha256
        wrong = f"{registry.reference.pinned}: what came is not what the digest says (sha256 {transfer.sha256[:16]}…)"
        if not continued:
            raise SiteError(wrong, "repeat the command; a proxy that alters files, or a damaged registry, does this")
        say(f"{wrong}: from the beginning")
        transfer.restart()
    return _transfer(registry, layer, aside, say, pauses)


def _convert(reference: Reference, aside: Path, runtime: str, env: Mapping[str, str], say: Say) -> str:
    """Let Apptainer make an image of a `docker://` one; returns its SHA-256. Its own messages go to stderr."""
    argv = [runtime, "pull", "--force", "--disable-cache", str(aside), reference.pinned]
    say(f"{runtime} converts {reference.pinned}; oras:// needs no conversion")
    last = ""
    try:
        # Its standard output would mix with ours, which is the path alone.
        with subprocess.Popen(
            argv,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stderr or ():
                last = redact(line.strip()) or last
                print(redact(line), end="", file=sys.stderr, flush=True)
    except OSError as error:
        remedy = "load its module in site.env, or call this where it is installed"
        raise SiteError(f"{runtime}, which converts docker://, cannot be run: {error.strerror}", remedy) from None
    if process.returncode:
        folder = env.get("APPTAINER_TMPDIR") or env.get("TMPDIR") or "/tmp"
        remedy = (
            f"repeat it by hand: {shlex.join(argv)}; it unpacks in {folder} (APPTAINER_TMPDIR), and in {aside.parent}"
        )
        raise SiteError(f"{reference.pinned} could not be converted: {last.removeprefix('FATAL:').strip()}", remedy)
    return sha256_of(aside)


def _unwritable(folder: Path, error: OSError) -> SiteError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "remove old runs and images there, or choose another AFINA_SCRATCH" if full else "correct its permissions"
    return SiteError(f"{error.filename or folder}: {error.strerror}", remedy)


# -- digests of images -------------------------------------------------------------------------------------------------


def source_of(image: Path) -> tuple[str, str] | None:
    """AFINA_IMAGE as it was written and the digest, of an image that was pulled; None of another."""
    about = read_json(image.with_name(f"{image.name}.json"))
    if not (isinstance(about.get("address"), str) and isinstance(about.get("digest"), str)):
        return None
    return about["address"], about["digest"]


def image_sha256(image: Path, folder: Path, say: Say = to_stderr) -> str:
    """SHA-256 of an image file. It is kept in `folder` by path, size, times and inode, so that an image is read once and not for every run.

    Raises:
        OSError: the image cannot be read.
    """
    known = read_json(folder / f"{_key(image)[1]}.json")
    if known.get("of") == _key(image)[0]:
        return str(known["sha256"])
    size = image.stat().st_size
    if size >= _REPORT_FROM_BYTES:
        say(f"reading {image} ({size_in_words(size)}) for its digest; kept for the next run")
    digest = sha256_of(image)
    _remember(image, folder, digest)
    return digest


def _remember(image: Path, folder: Path, digest: str) -> None:
    with contextlib.suppress(OSError, AfinaError):
        folder.mkdir(parents=True, exist_ok=True)
        about, name = _key(image)
        write_atomic(folder / f"{name}.json", json.dumps({"sha256": digest, "of": about}) + "\n")


def _key(image: Path) -> tuple[list[str | int], str]:
    about = image.stat()
    key: list[str | int] = [str(image), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    return key, hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
