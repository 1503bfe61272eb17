"""The image as its users see it: one environment that nothing on the host changes.

Runs the real image as an ordinary user. Not covered here: training in it (tests/slurm) and anything with a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.apptainer.conftest import Apptainer

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
