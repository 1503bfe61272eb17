"""Contents of the real image: labels, list of packages, bytecode, what is left out; and `afina image`. No GPU is used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests import tiny
from tests.apptainer.conftest import Apptainer
from tests.common import ROOT, program

from afina.files import encode_words
from afina.site.image import read_image, summary
from afina.site.verify_image import check_fit
from afina.version import INTERFACE

LOCK = (ROOT / "container/requirements.txt").read_text()


def test_labels_are_what_is_inside(image: Path, apptainer: Apptainer) -> None:
    about, labels = summary(read_image(image)), read_image(image).labels
    code = "import json, platform, torch; print(json.dumps([torch.__version__, torch.version.cuda, platform.python_version()]))"
    done = apptainer("exec", image, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert [about["torch"], about["cuda"], about["python"]] == json.loads(done.stdout)
    assert about["device"] == ("cuda" if about["cuda"] else "cpu")
    assert about["base"] and about["base_digest"]
    assert [f.level for f in check_fit(read_image(image)) if f.check == "version"] == ["ok"]
    assert read_image(image).declared_bytes == image.stat().st_size
    project = dict(re.findall(r'^(\w+) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M))
    standing = [labels[f"org.opencontainers.image.{name}"] for name in ("title", "version", "licenses")]
    assert standing == ["afina", project["version"], project["license"]]
    assert labels["org.opencontainers.image.revision"] and labels["afina.interface"] == str(INTERFACE)
    assert labels["afina.lock"] == hashlib.sha256(LOCK.encode()).hexdigest()[:16]


def test_image_info_inside_and_outside_agree(image: Path, apptainer: Apptainer) -> None:
    done = apptainer("run", image, "image", "info", "--json")
    assert done.returncode == 0, done.stderr
    inside, outside = json.loads(done.stdout), summary(read_image(image))
    for name in ("version", "revision", "lock", "torch", "python", "base_digest"):
        assert inside[name] == outside[name]


def test_a_run_in_the_image_is_the_run_outside(image: Path, home: Path, apptainer: Apptainer) -> None:
    """The same recipe in the plain environment of these tests: the same metrics, byte for byte.

    Beside a site file of the host, whose image and runtime are not for a run that is in the image already.
    """
    tiny.write_project(home, 60, train={"max_steps": 4})
    (home / "scratch").mkdir(exist_ok=True)
    (home / "slurm").mkdir()
    (home / "slurm/site.env").write_text(
        f"AFINA_SCRATCH='{home}'/scratch\nAFINA_IMAGE='{image}'\nAFINA_RUNTIME=apptainer\n"
    )
    if os.geteuid() == 0:
        for path in home.rglob("*"):
            shutil.chown(path, os.environ.get("AFINA_TEST_USER", "researcher"))
    env = {"OMP_NUM_THREADS": "1"}
    command = ("train", "recipe.yaml", "--num-processes", "1", "--run")
    done = apptainer("run", image, *command, "inside", environment=env)
    assert done.returncode == 0, done.stdout + done.stderr
    argv = [sys.executable, "-m", "afina", *command, "outside"]
    here = {name: value for name, value in os.environ.items() if not name.startswith(("AFINA_", "HF_", "CUDA_VISIBLE"))}
    (home / "plain.env").write_text(f"AFINA_SCRATCH='{home}'/scratch\nAFINA_RUNTIME=none\n")
    env |= {"AFINA_SITE": str(home / "plain.env")}
    subprocess.run(argv, cwd=home, env={**here, **env}, check=True, capture_output=True)
    assert (home / "inside/metrics.jsonl").read_bytes() == (home / "outside/metrics.jsonl").read_bytes()
    # A run of the host: its command starts a container, which there is none to start in the image.
    run = home / "inside"
    words = ["no-such-runtime", "exec", str(image), "python", "-P", "-m", "afina.worker", "launch", str(run)]
    (run / "worker.argv").write_bytes(encode_words(words))
    (run / "outcome.json").unlink()
    done = apptainer("run", image, "resume", "inside", environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and (run / "outcome.json").exists(), done.stdout + done.stderr


def test_packages_are_those_of_the_lock(image: Path, home: Path, apptainer: Apptainer) -> None:
    """What is installed, the list of it in the image and beside it; the lock with its hashes; licences; Debian's packages."""
    pins = [line.removesuffix(" \\") for line in LOCK.splitlines() if re.match(r"[a-z]", line)]
    (home / "pins.json").write_text(json.dumps(pins))
    # The image's own Python evaluates markers.
    code = """
import importlib.metadata, json
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
pins = [Requirement(pin) for pin in json.load(open("pins.json"))]
wanted = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins if not pin.marker or pin.marker.evaluate()}
there = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
print(json.dumps([wanted, there]))
"""
    done = apptainer("exec", image, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    wanted, there = json.loads(done.stdout)
    assert len(wanted) > 50 and {name: there.get(name) for name in wanted} == wanted
    assert all(
        re.fullmatch(r"afina|pip|setuptools|torch|triton|nvidia-.*|cuda-.*", name)
        for name in there.keys() - wanted.keys()
    )
    inside, lock, debian = (
        apptainer("exec", image, "cat", f"/opt/afina/{name}").stdout
        for name in ("packages.json", "requirements.txt", "debian.txt")
    )
    beside = image.with_name(image.name + ".packages.json")
    assert not beside.exists() or beside.read_text() == inside
    assert lock == LOCK
    assert len(debian.splitlines()) > 50 and "libc6" in debian
    packages = {re.sub(r"[-_.]+", "-", about["name"]).lower(): about for about in json.loads(inside)}
    assert {name: about["version"] for name, about in packages.items()} == there
    for name, about in packages.items():
        assert about.get("license_expression") or about.get("license") or "License ::" in str(about["classifier"]), name


def test_bytecode_is_unchecked_and_tests_are_left_out(image: Path, apptainer: Apptainer) -> None:
    code = """
import json, pathlib, sysconfig
site = pathlib.Path(sysconfig.get_path("purelib"))
flags = {path.read_bytes()[4:8].hex() for path in site.rglob("*.pyc")}
left = [str(p) for p in site.rglob("*") if p.is_dir() and p.name in ("test", "tests") and p.parent != site and any(p.glob("test_*.py"))]
print(json.dumps([sorted(flags), left, (site / "torch/test").exists()]))
"""
    done = apptainer("exec", image, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    # PEP 552: 1 is "by hash, unchecked".
    assert json.loads(done.stdout) == [["01000000"], [], False]


def test_nothing_of_the_build_is_left(image: Path, apptainer: Apptainer) -> None:
    """No log, no cache, no source, and none of the settings of the machine that built it."""
    done = apptainer("exec", image, "sh", "-c", "ls -d /var/log/dpkg.log /var/log/apt /root/.cache /var/cache/ldconfig/aux-cache /opt/afina-source /opt/afina/pip.conf /etc/pip.conf 2>/dev/null; find / -xdev -name .git 2>/dev/null; ls -A /mnt /opt")  # fmt: skip
    assert done.stdout.split() == ["/mnt:", "/opt:", "afina"]
    settings = apptainer("exec", image, "python", "-m", "pip", "config", "list")
    assert (settings.returncode, settings.stdout.strip()) == (0, "")


# -- afina image verify ------------------------------------------------------------------------------------------------


@pytest.fixture
def as_the_user(home: Path) -> dict[str, str]:
    """An environment whose `apptainer` runs as the ordinary user: root may be unable to start a container."""
    folder = home / "bin"
    real = str(shutil.which("apptainer"))
    user = os.environ.get("AFINA_TEST_USER", "researcher")
    start = f"runuser -u {user} -- " if os.geteuid() == 0 else ""
    program(folder, "apptainer", f'exec {start}{real} "$@"\n')
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AFINA_", "APPTAINER"))}
    return {**kept, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(home)}


def verified(image: Path, env: dict[str, str], *options: str) -> tuple[int, dict[str, str]]:
    argv = [sys.executable, "-m", "afina", "image", "verify", str(image), "--json", *options]
    done = subprocess.run(argv, env=env, cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, {f["check"]: f["level"] for f in json.loads(done.stdout)["findings"]}


def test_verify_a_good_image_and_a_damaged_one(image: Path, home: Path, as_the_user: dict[str, str]) -> None:
    for make in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key"],
        ["ec", "-in", "key", "-pubout", "-out", "key.pub"],
    ):
        subprocess.run(["openssl", *make], cwd=home, check=True, capture_output=True)
    copy = home / "it's a copy.sif"
    shutil.copy(image, copy)
    subprocess.run(["apptainer", "sign", "--key", "key", str(copy)], cwd=home, check=True, capture_output=True)
    (home / "key.pub").chmod(0o644)
    copy.chmod(0o644)
    digest = subprocess.run(["sha256sum", copy.name], cwd=home, check=True, capture_output=True, text=True).stdout
    copy.with_name(copy.name + ".sha256").write_text(digest)
    assert read_image(copy).signatures == 1

    code, answers = verified(copy, as_the_user, "--key", str(home / "key.pub"))
    assert code == 0 and {answers[q] for q in ("whole", "checksum", "signature", "starts", "version")} == {"ok"}, (
        answers
    )
    with copy.open("r+b") as file:
        file.seek(copy.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    code, answers = verified(copy, as_the_user, "--key", str(home / "key.pub"))
    assert code == 3 and (answers["checksum"], answers["signature"]) == ("failed", "failed")
