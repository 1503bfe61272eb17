"""Small file systems that can fill up, fail and lose power. Needs root.

`tmpfs` has a size limit; `ext4` lies in a file behind a loop device. ext4 can be shut down (EXT4_IOC_SHUTDOWN, the ioctl
that xfstests uses): from then on every operation fails with EIO, as on a lost disk, and what was not in the journal or
on the disk is lost, as after a power cut. Mounting it again restores it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from pathlib import Path

__all__ = ["Disk"]

# _IOR('X', 125, __u32), and flags: flush the journal first, or do not.
_SHUTDOWN = 0x8004587D
_FLUSH, _NO_FLUSH = 1, 2


class Disk:
    """A mounted file system of `size_mb`; `folder` is world-writable, as /tmp is."""

    def __init__(self, folder: Path, kind: str, size_mb: int = 48) -> None:
        self.folder, self.kind, self.size_mb = folder, kind, size_mb
        self.image = folder.with_name(f"{folder.name}.ext4")
        self.filler = folder / "filler"

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "ext4":
            with self.image.open("wb") as file:
                file.truncate(self.size_mb << 20)
            subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(self.image)], check=True)
        self.mount()
        self.folder.chmod(0o1777)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=False)
        self.image.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def mount(self) -> None:
        if self.kind == "tmpfs":
            what = ["-t", "tmpfs", "-o", f"size={self.size_mb}m", "tmpfs"]
        else:
            what = ["-o", "loop", str(self.image)]
        subprocess.run(["mount", *what, str(self.folder)], check=True)

    def fill(self, leave: int = 0) -> None:
        """Write until the disk is full, then free `leave` bytes."""
        descriptor = os.open(self.filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1 << 20, 1 << 12):
                block = b"\0" * size
                with contextlib.suppress(OSError):
                    while os.write(descriptor, block) == size:
                        pass
            if leave:
                os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - leave))
        finally:
            os.close(descriptor)

    def free(self) -> None:
        self.filler.unlink()

    def fail(self, *, power_cut: bool = False) -> None:
        """Let every operation fail with EIO; with `power_cut` unflushed data is lost."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _NO_FLUSH if power_cut else _FLUSH))
        finally:
            os.close(descriptor)

    def mount_again(self, patience_s: float = 30) -> None:
        """Mount it again, which replays the journal, once killed processes have closed their files on it.

        Raises:
            RuntimeError: a process still has a file on it open; names it.
        """
        until = time.monotonic() + patience_s
        while True:
            if not subprocess.run(["umount", str(self.folder)], capture_output=True, check=False).returncode:
                self.mount()
                if self._works():
                    return
            if time.monotonic() > until:
                raise RuntimeError(f"{self.folder} is still in use after {patience_s:g} s, by {self._holders()}")
            time.sleep(0.1)

    def _works(self) -> bool:
        """False where a container that started meanwhile has a copy of the old mount: the new one then shares its failure."""
        try:
            (self.folder / ".probe").write_bytes(b"1")
            (self.folder / ".probe").unlink()
        except OSError:
            return False
        return True

    def _holders(self) -> list[str]:
        """Processes with an open file, folder or mapping on it."""
        holders = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                links = [
                    process / "cwd",
                    process / "root",
                    *(process / "fd").iterdir(),
                    *(process / "map_files").iterdir(),
                ]
                if any(str(link.readlink()).startswith(f"{self.folder}/") for link in links):
                    holders.append(f"{process.name} {(process / 'cmdline').read_bytes()[:200]!r}")
        return holders
