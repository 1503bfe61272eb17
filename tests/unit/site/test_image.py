"""`afina.site.image` with an `apptainer` that answers as the real one does. The real one: tests/apptainer/test_image_contents.py."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.common import program
from tests.unit.conftest import Ran, sif_bytes

from afina import __version__
from afina.errors import InputError, SiteError
from afina.site.finding import Finding
from afina.site.image import Image, check_image, read_image, summary
from afina.site.settings import Site
from afina.site.variables import declared_size
from afina.site.verify_image import check_fit, verify
from afina.version import INTERFACE

LABELS = {
    "org.opencontainers.image.title": "afina",
    "afina.interface": str(INTERFACE),
    "org.opencontainers.image.version": __version__,
    "org.opencontainers.image.revision": "abc",
    "org.label-schema.build-arch": "amd64",
    "afina.torch": "2.13.0+cu130",
    "afina.cuda": "13.0",
    "afina.driver": "580.65.06",
    "afina.lock": "0123456789abcdef",
}
CPU = {"afina.cuda": "", "afina.driver": "", "afina.torch": "2.13.0+cpu"}
FINGERPRINT = "8115a56a6a9775aa2a8bd22621007ed762ca3c2d"

#: IMAGE.labels holds the labels, IMAGE.signed is there where it is signed; the rest is as Apptainer 1.4.5 prints it.
APPTAINER = """
case "$1 $2" in
  "inspect --json") [ -f "$4.labels" ] || { echo "FATAL:   Failed to open image" >&2; exit 255; }
    printf '{"data": {"attributes": {"labels": %s}}, "type": "container"}' "$(<"$4.labels")" ;;
  "sif list") echo "3    |1       |NONE    |36864-40960               |FS (Squashfs/*System/amd64)"
    [ ! -f "$3.signed" ] || echo "4    |NONE    |1   (G) |40960-42170               |Signature (SHA-256)" ;;
  "verify "*) echo "FATAL: altered" >&2; exit 255 ;;
  "--quiet run") echo "$ANSWER" ;;
esac
"""


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = program(tmp_path / "bin", "apptainer", APPTAINER)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("ANSWER", f"afina, version {__version__}")
    return path


def image_file(path: Path, labels: dict[str, str] | None = None, *, signed: bool = False) -> Path:
    path.write_bytes(sif_bytes())
    Path(f"{path}.labels").write_text(json.dumps(LABELS if labels is None else labels))
    if signed:
        Path(f"{path}.signed").touch()
    return path


def levels(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


def test_an_image_is_read(apptainer: Path, tmp_path: Path, nasty: str) -> None:
    path = image_file(tmp_path / f"x{nasty}.sif", signed=True)
    size = path.stat().st_size
    assert read_image(path) == Image(path, LABELS, size, size, signatures=1)
    assert summary(read_image(path))["architecture"] == "amd64"


def test_a_folder_is_an_unpacked_image(tmp_path: Path) -> None:
    (tmp_path / "box/.singularity.d").mkdir(parents=True)
    assert read_image(tmp_path / "box") == Image(tmp_path / "box", {})
    (tmp_path / "box/.singularity.d/labels.json").write_text(json.dumps(LABELS))
    assert read_image(tmp_path / "box").labels == LABELS
    with pytest.raises(InputError, match=r"without \.singularity\.d"):
        read_image(tmp_path)


@pytest.mark.parametrize("interface", [None, "0", str(INTERFACE + 1)])
def test_an_image_that_reads_other_plans_is_refused(apptainer: Path, tmp_path: Path, interface: str | None) -> None:
    """Older or newer, of the same version, in a file or unpacked; an image that is not afina's is not judged."""
    site = Site(scratch=tmp_path, image=image_file(tmp_path / "x.sif"), runtime="apptainer")
    check_image(site)
    labels = LABELS | {"afina.interface": interface or ""}
    if interface is None:
        del labels["afina.interface"]
    image = image_file(tmp_path / "x.sif", labels)
    box = tmp_path / "box"
    (box / ".singularity.d").mkdir(parents=True)
    (box / ".singularity.d/labels.json").write_text(json.dumps(labels))
    for path in (image, box):
        with pytest.raises(SiteError, match=f"interface {interface or 'none'}.* does not fit this one") as caught:
            check_image(site.model_copy(update={"image": path}))
        assert "build or pull the image again" in caught.value.remedy
    assert levels(check_fit(read_image(image)))["version"] == "failed"
    check_image(site.model_copy(update={"image": image_file(tmp_path / "y.sif", {"a": "b"})}))


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n" * 40, b"\0" * 127])
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.sif").write_bytes(content)
    with pytest.raises(InputError, match="not an Apptainer image") as caught:
        read_image(tmp_path / "x.sif")
    assert caught.value.remedy
    with pytest.raises(InputError, match="no such image"):
        read_image(tmp_path / "y.sif")


def test_without_apptainer_a_remedy_is_given(tmp_path: Path) -> None:
    path = image_file(tmp_path / "x.sif")
    with pytest.raises(SiteError, match="apptainer, which reads the labels of an image, cannot be run") as caught:
        read_image(path, env={"PATH": str(tmp_path)})
    assert "load its module" in caught.value.remedy


def test_a_damaged_image_is_read_as_far_as_it_goes(apptainer: Path, tmp_path: Path) -> None:
    """Cut at every length, and with every byte of the header turned: never a traceback."""
    whole = sif_bytes()
    for cut in range(128, len(whole), 37):
        (tmp_path / "cut.sif").write_bytes(whole[:cut])
        assert declared_size(tmp_path / "cut.sif") == len(whole)
        image = read_image(tmp_path / "cut.sif")
        assert image.labels == {} and image.declared_bytes == len(whole)
    for place in range(42, 128):
        turned = bytearray(whole)
        turned[place] ^= 0x40
        (tmp_path / "turned.sif").write_bytes(turned)
        declared_size(tmp_path / "turned.sif")
    (tmp_path / "unreadable.sif").write_bytes(whole)
    with pytest.raises(InputError, match="Failed to open image"):
        read_image(tmp_path / "unreadable.sif")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"data": 1}', '{"data": {"attributes": {}}}'])
def test_damaged_labels_are_no_labels(tmp_path: Path, text: str) -> None:
    (tmp_path / "box/.singularity.d").mkdir(parents=True)
    (tmp_path / "box/.singularity.d/labels.json").write_text(text)
    assert read_image(tmp_path / "box").labels == {}


@pytest.mark.parametrize(
    ("changes", "driver", "expected"),
    [
        ({}, "580.65.06", {"version": "ok", "driver": "ok"}),
        ({}, "575.51.03", {"version": "ok", "driver": "failed"}),
        ({}, None, {"version": "ok", "driver": "unknown"}),
        ({"afina.cuda": "12.6", "afina.driver": ""}, "535.104.05", {"version": "ok", "driver": "ok"}),
        ({"afina.cuda": "99.0", "afina.driver": ""}, "535.104.05", {"version": "ok", "driver": "unknown"}),
        (CPU, None, {"version": "ok"}),
        (CPU, "580.1", {"version": "ok", "driver": "warning"}),
        ({"org.opencontainers.image.version": "0.0.1"}, "580.65.06", {"version": "warning", "driver": "ok"}),
        (dict.fromkeys(LABELS, ""), None, {"version": "unknown"}),
    ],
)
def test_fit(changes: dict[str, str], driver: str | None, expected: dict[str, str]) -> None:
    image = Image(Path("/x.sif"), {**LABELS, **changes})
    if platform.machine() != "x86_64" and image.labels["org.label-schema.build-arch"]:
        expected = {**expected, "machine": "failed"}
    found = list(check_fit(image, driver))
    assert levels(found) == expected
    assert all(finding.remedy for finding in found if finding.level in ("failed", "warning"))


def test_the_fit_of_an_image_without_labels_is_unknown() -> None:
    assert levels(check_fit(Image(Path("/x.sif"), {}))) == {"version": "unknown"}


def test_verify_makes_every_check(apptainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off, another checksum, a key that did not sign, a runscript that prints something else."""
    path = image_file(tmp_path / "x.sif", signed=True)
    path.write_bytes(path.read_bytes()[:-3])
    path.with_name("x.sif.sha256").write_text("00ff  x.sif\n")
    monkeypatch.setenv("ANSWER", "Python 3")
    found = levels(verify(read_image(path), FINGERPRINT, "apptainer", os.environ))
    assert [found[name] for name in ("whole", "checksum", "signature", "starts")] == ["failed"] * 4


def test_verify_finds_nothing_wrong(apptainer: Path, tmp_path: Path) -> None:
    path = image_file(tmp_path / "x.sif")
    path.with_name("x.sif.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  x.sif\n")
    found = levels(verify(read_image(path), None, "apptainer", os.environ))
    assert [found[name] for name in ("whole", "checksum", "starts", "version")] == ["ok"] * 4
    assert found["signature"] == "unknown"


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_labels(
    apptainer: Path, command: Callable[..., Ran], tmp_path: Path, nasty: str
) -> None:
    path = image_file(tmp_path / f"x{nasty}.sif", signed=True)
    done = command("image", "info", str(path), "--json")
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    assert {name: printed[name] for name in summary(read_image(path))} == summary(read_image(path))
    assert printed["minimum_driver"] == "580.65.06" and printed["signatures"] == 1


def test_the_sites_image_is_the_default(apptainer: Path, command: Callable[..., Ran], tmp_path: Path) -> None:
    path = image_file(tmp_path / "x.sif")
    (tmp_path / "site.env").write_text(f"AFINA_IMAGE='{path}'\n")
    done = command("image", "info", "--site", str(tmp_path / "site.env"))
    assert done.returncode == 0 and done.stdout.startswith(f"{path}\n") and "driver 580.65.06 or newer" in done.stdout
    done = command("image", "info")
    assert done.returncode == 2 and "AFINA_IMAGE is not set" in done.stderr and "Traceback" not in done.stderr


def test_verify_ends_with_three_where_something_is_wrong(
    apptainer: Path, command: Callable[..., Ran], tmp_path: Path
) -> None:
    path = image_file(tmp_path / "x.sif")
    path.write_bytes(path.read_bytes()[:-3])
    done = command("image", "verify", str(path), "--json")
    assert done.returncode == 3, done.stderr
    assert levels(Finding(**finding) for finding in json.loads(done.stdout)["findings"])["whole"] == "failed"
    done = command("image", "verify", str(path), "--key", "/no/such.pem")
    assert done.returncode == 3 and "neither a key file" in done.stderr


def test_an_image_cannot_be_checked_from_inside(command: Callable[..., Ran]) -> None:
    done = command("image", "verify", env={"APPTAINER_CONTAINER": "/x.sif"})
    assert done.returncode == 2 and "on the host" in done.stderr
