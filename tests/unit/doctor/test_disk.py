"""`afina doctor` about disks: quotas, locks, replacements, a scratch that a group shares."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.common import program
from tests.unit.doctor.conftest import found, target

from afina.diagnosis import disk
from afina.files import permission_remedy
from afina.site.settings import Site


def test_a_local_disk_is_a_doubt_until_a_job_looks(bin: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_file_system", lambda path: "ext4")
    for limit in ("_FEW_BYTES", "_FEW_INODES"):  # the tests' own disk may be nearly full
        monkeypatch.setattr(disk, limit, 0)
    assert [f.remedy for f in found(target(site), "scratch")][1:] == ["`afina doctor --job` checks it"]
    assert [f.level for f in found(target(site, with_job=True), "scratch")] == ["ok"]


@pytest.mark.parametrize(
    ("line", "level", "said"),
    [
        ("/scratch 500 1000 1200 0 10 0 0 0", "ok", "500 of 1,200 KB"),
        ("/scratch 1150* 1000 1200 0 10 0 0 0", "warning", "1,150 of 1,200 KB"),
        ("/scratch 1300* 1000 1200 0 10 0 0 0", "failed", "1,300 of 1,200 KB"),
        ("/scratch 5 0 0 0 99 100 100 0", "warning", "99 of 100 files"),
        ("/scratch 5 0 0 0 99 0 0 0", "ok", "no quota is set"),
    ],
)
def test_quotas(bin: Path, site: Site, line: str, level: str, said: str) -> None:
    program(bin, "quota", f"echo 'Disk quotas for user me (uid 1):'; echo '{line}'\n")
    (finding,) = found(target(site), "quota")
    assert finding.level == level and said in finding.message


def test_locks_that_lock_nobody_out(bin: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = found(target(site), "locks")
    assert finding.level == "ok"
    monkeypatch.setattr(disk.fcntl, "flock", lambda *_: None)  # as on a file system mounted with `localflock`
    (finding,) = found(target(site), "locks")
    assert finding.level == "warning" and "does not exclude another process" in finding.message

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    (finding,) = found(target(site), "locks")
    assert finding.level == "warning" and "Function not implemented" in finding.message


def test_a_replacement_that_is_seen_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(source: Path, target: Path) -> None:
        raw = Path(source).read_bytes()
        with Path(target).open("r+b") as file:
            file.write(raw[:2048])
            file.flush()
            time.sleep(0.02)
            file.write(raw[2048:])

    monkeypatch.setattr(disk.os, "replace", torn)
    finding = disk._try_rename(tmp_path, rounds=60)
    assert finding.level == "failed" and "a reader saw part of a file" in finding.message


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """This process as another user; root can come back."""
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def shared(site: Site) -> Iterator[Site]:
    """A scratch that every user reaches: pytest's own folders are closed."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield site.model_copy(update={"scratch": folder})
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("mode", "umask", "level", "words"),
    [
        (0o755, 0o077, None, ""),
        (0o2775, 0o077, "warning", "umask 007 in the site file"),
        (0o2775, 0o022, "warning", "your umask 022 keeps the group out"),
        (0o775, 0o007, "warning", "chmod g+s"),
        (0o2775, 0o007, "ok", "is shared by its group"),
    ],
)
def test_a_scratch_that_a_group_shares(shared: Site, mode: int, umask: int, level: str | None, words: str) -> None:
    shared.scratch.chmod(mode)
    before = os.umask(umask)
    try:
        findings = list(disk.check_sharing(target(shared)))
    finally:
        os.umask(before)
    assert [finding.level for finding in findings] == ([level] if level else [])
    assert all(words in f"{finding.message} {finding.remedy}" for finding in findings)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_caches_of_another_user_that_are_closed_are_named_with_their_owner(shared: Site) -> None:
    closed = shared.scratch / "cache/hub"
    closed.mkdir(parents=True)
    closed.chmod(0o700)
    assert list(disk.check_sharing(target(shared))) == [], "one's own"
    with nobody():
        (finding,) = disk.check_sharing(target(shared))
        below, own = permission_remedy(closed / "models/token"), permission_remedy(Path("/proc/self/no such"))
    assert (finding.check, finding.level, finding.message) == ("sharing", "failed", f"{closed}: permission denied")
    assert finding.remedy == permission_of(closed) == below
    assert "belongs to" not in own, "one's own folder"


def permission_of(folder: Path) -> str:
    return (
        f"{folder} belongs to root, whose umask keeps others out: ask for `chmod -R g+rwX {folder}` and for `umask 007` in the site "
        "file, or set AFINA_SCRATCH to a folder of your own"
    )
