"""The image as its users see it: one environment that nothing on the host changes.

Runs the real image as an ordinary user. Not covered here: training in it (tests/slurm) and anything with a GPU.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import ROOT

from afina.version import INTERFACE

Apptainer = Callable[..., subprocess.CompletedProcess[str]]

LOCK = ROOT / "container" / "requirements.txt"
PACKAGES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "submitit", "afina")


def test_imports_come_from_the_image(image: Path, apptainer: Apptainer) -> None:
    code = f"import sys, {', '.join(PACKAGES)}; print(sys.executable); [print(sys.modules[n].__file__) for n in {PACKAGES}]"
    done = apptainer("exec", image, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    executable, *files = done.stdout.splitlines()
    assert executable == "/opt/afina/bin/python"
    assert len(files) == len(PACKAGES)
    assert all(file.startswith("/opt/afina/lib/") for file in files), files


def test_apptainer_test_passes(image: Path, apptainer: Apptainer) -> None:
    done = apptainer("test", image)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^torch \d", done.stdout, re.M) and re.search(r"^afina ?", done.stdout, re.M), done.stdout
    assert re.search(r"^selftest: 2 steps trained on the CPU, losses \d\.\d+ \d\.\d+$", done.stdout, re.M), done.stdout


def test_run_is_afina(image: Path, apptainer: Apptainer) -> None:
    without, asked = apptainer("run", image), apptainer("run", image, "--help")
    assert (without.returncode, asked.returncode) == (0, 0), without.stderr + asked.stderr
    assert without.stdout == asked.stdout
    assert "Usage: afina" in asked.stdout


def test_arguments_and_exit_code_pass_unchanged(image: Path, home: Path, apptainer: Apptainer) -> None:
    missing = "no such 'recipe'; echo $HOME,x=1.yaml"
    done = apptainer("run", image, "train", missing)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    output = re.sub(r"\s+", "", done.stdout + done.stderr)
    assert re.sub(r"\s+", "", missing) in output
    assert "Traceback" not in output
    assert list(home.iterdir()) == []


def test_packages_of_the_host_stay_outside(image: Path, home: Path, apptainer: Apptainer) -> None:
    version = apptainer(
        "exec", image, "python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"
    ).stdout.strip()
    foreign = [home / ".local" / "lib" / f"python{version}" / "site-packages", home / "pythonpath"]
    for folder in foreign:
        (folder / "transformers").mkdir(parents=True)
        (folder / "transformers" / "__init__.py").write_text("raise SystemExit('a foreign package was imported')\n")
    host = {
        "PYTHONPATH": str(foreign[1]),
        "PYTHONSTARTUP": "/nowhere",
        "PYTHONHOME": "/usr",
        "VIRTUAL_ENV": "/nowhere",
    }
    importing = ("python", "-c", "import transformers; print(transformers.__file__)")

    done = apptainer("exec", image, *importing, environment=host)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/opt/afina/lib/")
    # The control: set inside the container, the same folder does win.
    trapped = apptainer("exec", image, "env", f"PYTHONPATH={foreign[1]}", *importing)
    assert "a foreign package was imported" in trapped.stderr


@pytest.mark.parametrize("place", ["/opt/afina/lib", "/usr/lib", "/etc"])
def test_root_is_read_only(place: str, image: Path, apptainer: Apptainer) -> None:
    done = apptainer("exec", image, "sh", "-c", f"LC_ALL=C touch {place}/written")
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr


def test_everything_is_compiled(image: Path, apptainer: Apptainer) -> None:
    code = f"import json, sqlite3, unittest.mock, {', '.join(PACKAGES)}, sklearn.metrics, pyarrow.parquet"
    done = apptainer("exec", image, "python", "-v", "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    # `python -v` names the file each module's code came from: bytecode, or the source that it had to compile.
    files = re.findall(r"^# code object from '?(/\S+?\.pyc?)'?$", done.stderr, re.M)
    compiled = [file for file in files if file.endswith(".pyc")]
    assert len(compiled) > 1000, len(compiled)
    assert [file for file in files if file.endswith(".py")] == []


def test_packages_are_those_of_the_lock(image: Path, home: Path, apptainer: Apptainer) -> None:
    pins = [line.removesuffix(" \\") for line in LOCK.read_text().splitlines() if re.match(r"[a-z]", line)]
    (home / "pins.json").write_text(json.dumps(pins))
    # The image's own Python evaluates markers.
    code = """
import importlib.metadata, json
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
pins = [Requirement(pin) for pin in json.load(open("pins.json"))]
wanted = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins if not pin.marker or pin.marker.evaluate()}
there = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
print(json.dumps({"wanted": wanted, "there": there}))
"""
    done = apptainer("exec", image, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    wanted, there = (json.loads(done.stdout)[key] for key in ("wanted", "there"))
    assert len(wanted) > 50
    assert {name: there.get(name) for name in wanted} == wanted
    beside = {name for name in there.keys() - wanted.keys() if not re.match(r"nvidia-|cuda-|triton$", name)}
    assert beside <= {"afina", "torch", "pip", "setuptools"}


def test_labels_say_what_it_is(image: Path, apptainer: Apptainer) -> None:
    done = apptainer("inspect", "--json", "--labels", image)
    assert done.returncode == 0, done.stderr
    labels = json.loads(done.stdout)["data"]["attributes"]["labels"]
    torch = apptainer("exec", image, "python", "-c", "import torch; print(torch.__version__)").stdout.strip()
    project = dict(re.findall(r'^(\w+) = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M))
    assert labels["org.opencontainers.image.title"] == "afina"
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]
    assert labels["org.opencontainers.image.revision"]
    assert labels["afina.interface"] == str(INTERFACE)
    assert labels["afina.torch"] == torch
    assert labels["afina.lock"] == hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]


def test_nothing_of_the_build_machine_is_left(image: Path, apptainer: Apptainer) -> None:
    listing = apptainer(
        "exec", image, "sh", "-c", "ls -A /mnt /opt /root/.cache /opt/afina/pip.conf /etc/pip.conf 2>/dev/null; true"
    )
    assert listing.stdout.split() == ["/mnt:", "/opt:", "afina"]
    settings = apptainer("exec", image, "python", "-m", "pip", "config", "list")
    assert (settings.returncode, settings.stdout.strip()) == (0, "")
