"""Images from a registry, pulled from a real one: whole, shared, broken off, moved, refused, without network, on a full disk, over TLS.

Not covered: the tokens of a registry with an authorisation server of its own (tests/unit/site/test_registry.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.common import ROOT, program
from tests.registry import LOGIN, RegistryServer, proxied, tiny_image

from afina.errors import AfinaError, SiteError
from afina.run.provenance.record import image_record
from afina.site import pushed
from afina.site.image import check_image, pull_image, push_image
from afina.site.pulled import newest, resolve
from afina.site.pulled import pull as pull_once
from afina.site.settings import load_site

AFINA = [sys.executable, "-m", "afina"]
SIZE = 10_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of 12 MB, `a.sif` and `b.sif`."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("a", "b"):
        tiny_image(folder / f"{name}.sif", random.Random(name).randbytes(SIZE))
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RegistryServer]:
    with RegistryServer(tmp_path / "registry") as server:
        yield server


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home, a scratch and a login of this test's own."""
    for name in [name for name in os.environ if name.startswith(("AFINA_", "SLURM_", "APPTAINER_", "DOCKER_"))]:
        monkeypatch.delenv(name)
    for name in ("home", "scratch", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AFINA_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("APPTAINER_NOHTTPS", "1")


def push(image: Path, address: str) -> str:
    """Push with Apptainer, and give the address back."""
    done = subprocess.run(["apptainer", "push", "-U", str(image), address], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return address


@dataclass(frozen=True)
class Answer:
    """The image's path, or the error; and the lines on stderr."""

    path: Path | None
    error: str
    lines: str


def pull(address: str) -> Answer:
    """`afina image pull`, in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as lines:
        try:
            return Answer(pull_image(address).path, "", lines.getvalue())
        except AfinaError as error:
            assert error.remedy and error.exit_code == 3
            return Answer(None, str(error), lines.getvalue())


def pulled(address: str) -> Path:
    path = pull(address).path
    assert path is not None
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def images(tmp_path: Path) -> list[str]:
    """Everything beside the images, without the notes."""
    return sorted(path.name for path in (tmp_path / "scratch/cache/images").iterdir() if path.suffix != ".json")


def test_an_image_is_pulled_once_and_a_tag_that_moved_is_reported(
    registry: RegistryServer, made: Path, tmp_path: Path
) -> None:
    address = push(made / "a.sif", f"oras://{registry.host}/group/tiny:1")
    first = pull(address)
    assert first.path is not None and sha256(first.path) == sha256(made / "a.sif")
    assert first.path.parent == tmp_path / "scratch/cache/images"
    assert pull(address) == Answer(first.path, "", "")
    before = registry.digest("group/tiny", "1")
    push(made / "b.sif", address)
    moved = pull(address)
    assert f"has moved: it was {before} and is {registry.digest('group/tiny', '1')}" in moved.lines
    assert moved.path is not None and sha256(moved.path) == sha256(made / "b.sif") and first.path.is_file()
    assert pull(f"oras://{registry.host}/group/tiny@{before}") == Answer(first.path, "", "")
    assert "has no such image" in pull(f"oras://{registry.host}/group/tiny:2").error


def test_a_damaged_or_purged_file_is_pulled_again(registry: RegistryServer, made: Path) -> None:
    address = push(made / "a.sif", f"oras://{registry.host}/group/tiny:1")
    path = pulled(address)
    with path.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"altered")
    assert sha256(pulled(address)) == sha256(made / "a.sif")
    path.unlink()
    assert sha256(pulled(address)) == sha256(made / "a.sif")


def test_two_pullers_transfer_it_once(registry: RegistryServer, made: Path, tmp_path: Path) -> None:
    push(made / "a.sif", f"oras://{registry.host}/group/tiny:1")
    hold = tmp_path / "go on"
    with proxied(registry, after=5_000_000, hold=hold) as proxy:
        argv = [*AFINA, "image", "pull", f"oras://{proxy.host}/group/tiny:1"]
        both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        streams = [process.stderr for process in both]
        first = [stream.readline() for stream in streams if stream]
        assert sorted(line.split()[1].rstrip(":") for line in first) == ["pulling", "waiting"], first
        hold.touch()
        outputs = [process.communicate(timeout=60) for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert outputs[0][0] == outputs[1][0] and proxy.sent < 1.5 * (made / "a.sif").stat().st_size
    assert sha256(Path(outputs[0][0].strip())) == sha256(made / "a.sif")


def test_a_broken_transfer_continues_where_it_broke_off(registry: RegistryServer, made: Path) -> None:
    push(made / "a.sif", f"oras://{registry.host}/group/tiny:1")
    size = (made / "a.sif").stat().st_size
    with proxied(registry, after=3_000_000, breaks=3) as proxy:
        done = pull(f"oras://{proxy.host}/group/tiny:1")
        assert done.path is not None and done.lines.count("broke off after") >= 2, done
        assert size <= proxy.sent < size + 1_000_000
    assert sha256(done.path) == sha256(made / "a.sif")


def test_a_registry_that_dies_is_continued_by_the_next_command(
    registry: RegistryServer, made: Path, tmp_path: Path
) -> None:
    push(made / "a.sif", f"oras://{registry.host}/group/tiny:1")
    with proxied(registry, after=5_000_000, breaks=1) as proxy:
        image = resolve(f"oras://{proxy.host}/group/tiny:1", tmp_path / "scratch/cache", os.environ)
        lines: list[str] = []

        def end_the_registry(line: str) -> None:
            lines.append(line)
            if "broke off" in line:
                registry.stop()

        with pytest.raises(SiteError, match="broke off after 5") as caught:
            pull_once(image, "apptainer", os.environ, end_the_registry, pauses=(0.1, 0.1))
        assert caught.value.remedy == "repeat the command: it continues from there"
        (left,) = images(tmp_path)
        assert left.endswith(".partial") and not image.path.exists()
        proxy.sent = 0
        registry.start()
        pull_once(image, "apptainer", os.environ, lines.append)
        assert proxy.sent < (made / "a.sif").stat().st_size - 4_000_000 and "continuing after 5" in lines[-2]
    assert sha256(image.path) == sha256(made / "a.sif") and images(tmp_path) == ["names", image.path.name]


def test_a_login_is_apptainers_and_stays_secret(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RegistryServer(tmp_path / "closed", login=True) as closed:
        login = ["apptainer", "registry", "login", "--username", LOGIN[0], "--password-stdin", f"oras://{closed.host}"]
        subprocess.run(login, input=LOGIN[1], text=True, check=True, capture_output=True)
        address = push(made / "a.sif", f"oras://{closed.host}/group/tiny:1")
        assert pull(address).path
        subprocess.run(["apptainer", "registry", "logout", f"oras://{closed.host}"], check=True, capture_output=True)
        none = pull(address)
        assert "wants a login for" in none.error and "apptainer registry login" in none.error
        monkeypatch.setenv("APPTAINER_DOCKER_USERNAME", "alice")
        monkeypatch.setenv("APPTAINER_DOCKER_PASSWORD", "mistyped-secret")
        wrong = pull(address)
        assert "does not accept your login" in wrong.error and "secret" not in wrong.error
    everything = b"".join(path.read_bytes() for path in (tmp_path / "scratch").rglob("*.json"))
    assert b"secret" not in everything and b"d29uZGVybGFuZ" not in everything


def test_without_network_the_pulled_image_is_used_and_nothing_is_guessed(registry: RegistryServer, made: Path) -> None:
    address = push(made / "a.sif", f"oras://{registry.host}/group/tiny:1")
    before = pulled(address)
    registry.stop()
    after = pull(address)
    assert after.path == before and "cannot be reached: Connection refused" in after.lines
    assert "as it was pulled before, sha256:" in after.lines
    other = pull(f"oras://{registry.host}/group/other:1")
    assert "cannot be reached" in other.error and "is there a network here?" in other.error


def test_a_full_disk(registry: RegistryServer, made: Path, tmp_path: Path) -> None:
    """Refused before the transfer, or named when it fills up meanwhile; then nothing of the image stays."""
    push(made / "a.sif", f"oras://{registry.host}/group/tiny:1")
    with proxied(registry, after=5_000_000, hold=tmp_path / "go on") as proxy:
        command = shlex.join([*AFINA, "image", "pull", f"oras://{proxy.host}/group/tiny:1"])
        script = f"""
            mount -t tmpfs -o size=40m tmpfs "$AFINA_SCRATCH"
            ! {command} 2>"$1/small"
            umount "$AFINA_SCRATCH"; mount -t tmpfs -o size=120m tmpfs "$AFINA_SCRATCH"
            {command} 2>"$1/filled" & child=$!
            until grep -q pulling "$1/filled"; do sleep 0.1; done
            sleep 0.5
            head -c 200m /dev/zero >"$AFINA_SCRATCH/other" 2>/dev/null || :
            touch "$1/go on"
            ! wait $child
            find "$AFINA_SCRATCH" -name '*tiny*'"""
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-euc", script, "sh", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, ""), done
    assert "MB free, and the image needs 7" in (tmp_path / "small").read_text()
    assert "No space left on device" in (tmp_path / "filled").read_text()
    assert "remedy: remove old runs" in (tmp_path / "filled").read_text()


def test_a_run_keeps_its_digest_when_the_tag_moves_and_scratch_is_purged(
    registry: RegistryServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = push(made / "a.sif", f"oras://{registry.host}/group/tiny:1")
    monkeypatch.setenv("AFINA_IMAGE", address)
    site = load_site()
    check_image(site)
    assert site.image is not None
    push(made / "b.sif", address)
    site.image.unlink()
    check_image(site)
    assert sha256(site.image) == sha256(made / "a.sif")
    now = load_site()
    assert now.image_digest == registry.digest("group/tiny", "1") != site.image_digest
    check_image(now)
    assert newest(address, site.cache) == now.pulled, "for jobs that name the tag"
    site.image.unlink()
    check_image(site)
    assert newest(address, site.cache) == now.pulled


def test_a_push_gives_the_address_with_its_digest(registry: RegistryServer, made: Path) -> None:
    address = f"oras://{registry.host}/group/tiny:1"
    pinned = push_image(str(made / "a.sif"), address)
    assert pinned == f"{address}@{registry.digest('group/tiny', '1')}"
    assert sha256(pulled(pinned)) == sha256(made / "a.sif")
    subprocess.run(["apptainer", "pull", "by-apptainer.sif", address], check=True, capture_output=True)
    assert sha256(Path("by-apptainer.sif")) == sha256(made / "a.sif")


def test_an_oci_image_of_the_same_files_is_converted_and_both_digests_are_recorded(
    registry: RegistryServer, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Layers that the registry has are not sent again; what comes back holds the same files."""
    address = f"docker://{registry.host}/group/tiny:1"
    pinned = push_image(str(made / "a.sif"), address)
    assert push_image(str(made / "a.sif"), address) == pinned and capfd.readouterr().err.count("is there already") == 3
    configuration = registry.configuration("group/tiny", "1")
    assert len(configuration["history"]) == len(configuration["rootfs"]["diff_ids"]) == 3, "Charliecloud wants both"
    path = pulled(address)
    record = image_record(load_site(env={**os.environ, "AFINA_IMAGE": address}))
    assert record is not None and record["digest"] == pinned.rpartition("@")[2] and record["sha256"] == sha256(path)
    for name, image in (("there", made / "a.sif"), ("back", path)):
        with pushed._unpacked(image, tmp_path / "here", "apptainer", os.environ) as root:
            root.rename(tmp_path / name)
    names = ("bin/bash", "bin/sh", "content")
    assert all((tmp_path / "there" / name).read_bytes() == (tmp_path / "back" / name).read_bytes() for name in names)
    assert (tmp_path / "back/bin/sh").is_symlink()


@pytest.mark.parametrize("scheme", ["oras", "docker"])
def test_an_authority_of_ones_own_is_named_in_the_site_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """The library's and, for `docker://`, Apptainer's connections trust it."""
    monkeypatch.delenv("APPTAINER_NOHTTPS")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with RegistryServer(tmp_path / "registry", tls=True) as secure:
        address, site = f"{scheme}://{secure.host}/group/tiny:1", Path("slurm/site.env")
        strange = pull(address)
        assert "cannot be trusted" in strange.error and "`SSL_CERT_FILE=FILE` in slurm/site.env" in strange.error
        site.parent.mkdir()
        for content, why in (("", "no certificate is in it"), (None, "No such file or directory")):
            named = tmp_path / "authority.pem"
            named.write_text(content) if content is not None else named.unlink()
            site.write_text(f"SSL_CERT_FILE='{named}'\n")
            assert f"SSL_CERT_FILE={named}: {why}" in pull(address).error
        site.write_text(f"SSL_CERT_FILE='{secure.authority}'\n")
        pinned = push_image(str(made / "a.sif"), address)
        path = pull(address).path
        assert path is not None and (scheme == "docker" or sha256(path) == sha256(made / "a.sif"))
        assert pulled(pinned) == path


def test_build_sh_pushes_the_image_and_names_what_is_left_to_do(
    registry: RegistryServer, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole script but the build itself, for which build_image.sh is there: its image is taken instead."""
    real, given = shutil.which("apptainer"), shlex.quote(str(made / "a.sif"))
    text = f"""case " $* " in *" build "*) cp {given} "${{@: -2:1}}" ;; *" exec "*) echo '[]' ;; *) exec {real} "$@" ;; esac"""
    program(tmp_path / "bin", "apptainer", text)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin")
    (tmp_path / "root").mkdir()
    output = tmp_path / "here" / "my image.sif"
    base = ("--cpu", "--torch-index", "https://r.invalid", "--base-rootfs", tmp_path / "root")
    argv = [ROOT / "container/build.sh", *base, "--output", output]
    addresses = {name: f"oras://{registry.host}/group/{name}:1" for name in ("one", "two")}

    def build() -> subprocess.CompletedProcess[str]:
        pushing = [part for address in addresses.values() for part in ("--push", address)]
        return subprocess.run([*map(str, argv), *pushing], capture_output=True, text=True, check=False)

    done = build()
    assert done.returncode == 0, done.stderr
    pinned = [f"{address}@{registry.digest(f'group/{name}', '1')}" for name, address in addresses.items()]
    assert done.stdout.splitlines()[1:] == pinned and sha256(pulled(pinned[1])) == sha256(output)
    registry.stop()
    failed = build()
    assert failed.returncode == 3 and sha256(output) == sha256(made / "a.sif")
    quoted = str(output).replace(" ", r"\ ")
    again = f"afina image push {quoted} {addresses['one']}"
    assert failed.stderr.rstrip().endswith(f"was not pushed; again with: {again}")
