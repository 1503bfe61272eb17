"""What an image says of itself, from files made here byte by byte. The real image: tests/apptainer/test_image_info.py."""

from __future__ import annotations

import json
import platform
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.conftest import Ran

from afina import __version__
from afina.errors import InputError
from afina.site.finding import Finding
from afina.site.image import fit, summary, verify
from afina.site.sif import FileSystem, Image, Signature, read_image

LABELS = {
    "org.opencontainers.image.version": __version__,
    "org.opencontainers.image.revision": "abc",
    "afina.torch": "2.13.0+cu130",
    "afina.cuda": "13.0",
    "afina.driver": "580.65.06",
    "afina.lock": "0123456789abcdef",
}
FINGERPRINT = "8115a56a6a9775aa2a8bd22621007ed762ca3c2d"


def sif(path: Path, labels: dict[str, str] | None = None, *, signatures: tuple[str, ...] = (), kind: int = 6) -> Path:
    """An image of three objects and signatures (a fingerprint, or empty for a PEM key), with a superblock and no files."""
    metadata = json.dumps({"data": {"attributes": {"labels": LABELS if labels is None else labels}}}).encode()
    system = struct.pack(
        "<5I6H4Q", 0x73717368, 4321, 1_700_000_000, 131072, 0, kind, 17, 0, 1, 4, 0, 0, 96, 0, 0
    ).ljust(200, b"x")
    objects = [(0x4001, b"", b"definition", b""), (0x4006, b"inspect-metadata.json", metadata, b"")]
    objects.append((0x4004, b"", system, struct.pack("<2i3s", 1, 2, b"02")))
    for signature in signatures:
        objects.append((0x4005, b"", b"signature", struct.pack("<i", 1) + bytes.fromhex(signature)))
    place = 128 + 585 * len(objects)
    table, data = b"", b""
    for number, (what, name, content, extra) in enumerate(objects, start=1):
        table += struct.pack("<i?III7q128s384s", what, True, number, 1, 0, place + len(data), len(content), len(content), 5, 5, 0, 0, name, extra)  # fmt: skip
        data += content
    head = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0") + b"SIF_MAGIC\0" + b"01\0" + b"02\0" + bytes(range(16))
    head += struct.pack("<8q", 1_600_000_000, 0, 0, len(objects), 128, len(table), place, len(data))
    path.write_bytes(head + table + data)
    return path


def test_an_image_is_read(tmp_path: Path, nasty: str) -> None:
    path = sif(tmp_path / f"{nasty}.sif", signatures=(FINGERPRINT, ""))
    image = read_image(path)
    assert (image.labels, image.size_bytes, image.promised_bytes) == (LABELS, path.stat().st_size, path.stat().st_size)
    assert (image.architecture, image.created) == ("amd64", 1_600_000_000)
    assert image.identity == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert image.signatures == (Signature(FINGERPRINT, "sha256"), Signature(None, "sha256"))
    assert image.file_system is not None
    assert replace(image.file_system, offset=0) == FileSystem("zstd", 131072, 4321, 1_700_000_000, 0, 96)


def test_a_folder_is_an_unpacked_image(tmp_path: Path) -> None:
    (tmp_path / "box/.singularity.d").mkdir(parents=True)
    assert read_image(tmp_path / "box") == Image(tmp_path / "box", {})
    (tmp_path / "box/.singularity.d/labels.json").write_text(json.dumps(LABELS))
    assert read_image(tmp_path / "box").labels == LABELS
    with pytest.raises(InputError, match=r"no \.singularity\.d"):
        read_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n" * 40, b"\0" * 127])
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.sif").write_bytes(content)
    with pytest.raises(InputError, match="not an Apptainer image") as caught:
        read_image(tmp_path / "x.sif")
    assert caught.value.remedy
    with pytest.raises(InputError, match="no such image"):
        read_image(tmp_path / "y.sif")


def test_a_damaged_image_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """Cut at every length, and with every byte of the header turned: never a traceback."""
    whole = sif(tmp_path / "x.sif", signatures=("",)).read_bytes()
    for cut in range(128, len(whole), 37):
        (tmp_path / "cut.sif").write_bytes(whole[:cut])
        image = read_image(tmp_path / "cut.sif")
        assert image.promised_bytes is not None and image.promised_bytes > cut
    for place in range(42, 128):
        turned = bytearray(whole)
        turned[place] ^= 0x40
        (tmp_path / "turned.sif").write_bytes(turned)
        try:
            read_image(tmp_path / "turned.sif")
        except InputError as error:
            assert error.remedy


def answers(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


@pytest.mark.parametrize(
    ("changes", "driver", "expected"),
    [
        ({}, "580.65.06", {"version": "ok", "driver": "ok"}),
        ({}, "575.51.03", {"version": "ok", "driver": "failed"}),
        ({}, None, {"version": "ok", "driver": "unknown"}),
        ({"afina.cuda": "12.6", "afina.driver": ""}, "535.104.05", {"version": "ok", "driver": "ok"}),
        ({"afina.cuda": "99.0", "afina.driver": ""}, "535.104.05", {"version": "ok", "driver": "unknown"}),
        ({"afina.cuda": "", "afina.driver": "", "afina.torch": "2.13.0+cpu"}, None, {"version": "ok"}),
        (
            {"afina.cuda": "", "afina.driver": "", "afina.torch": "2.13.0+cpu"},
            "580.1",
            {"version": "ok", "driver": "warning"},
        ),
        ({"org.opencontainers.image.version": "0.0.1"}, "580.65.06", {"version": "warning", "driver": "ok"}),
    ],
)
def test_does_it_fit(tmp_path: Path, changes: dict[str, str], driver: str | None, expected: dict[str, str]) -> None:
    image = read_image(sif(tmp_path / "x.sif", {**LABELS, **changes}))
    if platform.machine() != "x86_64":
        expected = {**expected, "machine": "failed"}
    found = fit(image, driver)
    assert answers(found) == expected
    assert all(finding.remedy for finding in found if finding.level in ("failed", "warning"))


def test_an_image_without_labels_fits_nobody_knows(tmp_path: Path) -> None:
    assert answers(fit(read_image(sif(tmp_path / "x.sif", {})))) == {"version": "unknown"}


def program(folder: Path, text: str) -> dict[str, str]:
    folder.mkdir()
    (folder / "apptainer").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "apptainer").chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_verify_asks_all_and_stops_at_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off, another checksum, a key that refuses, a runscript that says something else."""
    path = sif(tmp_path / "x.sif", signatures=(FINGERPRINT,))
    path.write_bytes(path.read_bytes()[:-3])
    path.with_name("x.sif.sha256").write_text("00ff  x.sif\n")
    env = program(tmp_path / "bin", 'case $1 in verify) echo "FATAL: no" >&2; exit 255;; *) echo "Python 3";; esac')
    monkeypatch.setenv("PATH", env["PATH"])
    read: list[int] = []
    found = list(verify(read_image(path), FINGERPRINT, "apptainer", env, progress=read.append))
    assert answers(found)["starts"] == "failed"
    assert [answers(found)[name] for name in ("whole", "checksum", "signature", "starts")] == ["failed"] * 4
    assert read == [path.stat().st_size]


def test_verify_finds_nothing_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    path = sif(tmp_path / "x.sif")
    path.with_name("x.sif.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  x.sif\n")
    env = program(tmp_path / "bin", f'[ "$2" = run ] && echo "afina, version {__version__}"')
    monkeypatch.setenv("PATH", env["PATH"])
    found = list(verify(read_image(path), None, "apptainer", env))
    assert [f.level for f in found if f.check in ("whole", "checksum", "starts", "version")] == ["ok"] * 4
    assert answers(found)["signature"] == "unknown"


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_the_file_says(afina: Callable[..., Ran], tmp_path: Path, nasty: str) -> None:
    path = sif(tmp_path / f"x{nasty}.sif", signatures=(FINGERPRINT,))
    done = afina("image", "info", str(path), "--json")
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert {name: said[name] for name in summary(read_image(path))} == summary(read_image(path))
    assert said["minimum_driver"] == "580.65.06" and said["signatures"][0]["by"] == FINGERPRINT


def test_the_sites_image_is_the_default(afina: Callable[..., Ran], tmp_path: Path) -> None:
    path = sif(tmp_path / "x.sif")
    (tmp_path / "site.env").write_text(f"AFINA_IMAGE='{path}'\n")
    done = afina("image", "info", "--site", str(tmp_path / "site.env"))
    assert done.returncode == 0 and done.stdout.startswith(f"{path}\n") and "driver 580.65.06 or newer" in done.stdout
    done = afina("image", "info")
    assert done.returncode == 2 and "AFINA_IMAGE is not set" in done.stderr and "Traceback" not in done.stderr


def test_verify_ends_with_three_where_something_is_wrong(afina: Callable[..., Ran], tmp_path: Path) -> None:
    path = sif(tmp_path / "x.sif")
    path.write_bytes(path.read_bytes()[:-3])
    done = afina("image", "verify", str(path), "--json")
    assert done.returncode == 3, done.stderr
    assert answers([Finding(**f) for f in json.loads(done.stdout)["findings"]])["whole"] == "failed"
    done = afina("image", "verify", str(path), "--key", "/no/such.pem")
    assert done.returncode == 3 and "neither a key file" in done.stderr


def test_inside_the_image_it_speaks_of_itself_and_checks_nothing(afina: Callable[..., Ran]) -> None:
    done = afina("image", "verify", env={"APPTAINER_CONTAINER": "/x.sif"})
    assert done.returncode == 2 and "on the host" in done.stderr
