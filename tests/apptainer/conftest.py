"""Fixtures of the tests that need the real image: the image, a home of the ordinary user, Apptainer run as that user.

AFINA_TEST_IMAGE names the image that `tests/apptainer/build_image.sh OUT.sif` made. Without it, or without Apptainer,
these tests are skipped with the reason; AFINA_REQUIRE_CLUSTER=1 makes that a failure. As root they run as
AFINA_TEST_USER (researcher), otherwise as the caller.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Apptainer = Callable[..., subprocess.CompletedProcess[str]]


def _unavailable(reason: str) -> None:
    if os.environ.get("AFINA_REQUIRE_CLUSTER") == "1":
        pytest.fail(f"AFINA_REQUIRE_CLUSTER=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def image() -> Path:
    """The image file, readable by the ordinary user."""
    if shutil.which("apptainer") is None:
        _unavailable("Apptainer is not installed: run tests/apptainer/install.sh")
    path = os.environ.get("AFINA_TEST_IMAGE")
    if not path:
        _unavailable("AFINA_TEST_IMAGE names no image: run tests/apptainer/build_image.sh OUT.sif")
    if not Path(str(path)).is_file():
        _unavailable(f"there is no image {path}: run tests/apptainer/build_image.sh {path}")
    return Path(str(path)).resolve()


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty folder that belongs to the ordinary user, with a space in its name; pytest's own is readable by root only."""
    path = Path(tempfile.mkdtemp(prefix="afina home ", dir="/tmp"))
    if os.geteuid() == 0:
        shutil.chown(path, _user())
    yield path
    shutil.rmtree(path)


@pytest.fixture
def apptainer(image: Path, home: Path) -> Apptainer:
    """``apptainer("exec", image, "python", …, environment={…})`` as the ordinary user, in a strange environment.

    Only what is listed here and in ``environment`` is set: a host locale that the image does not have, a time zone
    that is not the host's, and ``home`` as HOME and current folder.
    """

    def run(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(argument) for argument in ("apptainer", "--quiet", *arguments)]
        if os.geteuid() == 0:
            command = ["runuser", "-u", _user(), "--", *command]
        strange = {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(home),
            "LC_ALL": "tr_TR.UTF-8",
            "TZ": "Asia/Kathmandu",
        }
        return subprocess.run(
            command,
            cwd=home,
            env={**strange, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    return run


def _user() -> str:
    name = os.environ.get("AFINA_TEST_USER", "researcher")
    try:
        return pwd.getpwnam(name).pw_name
    except KeyError:
        return str(pytest.fail(f"there is no user {name}: run tests/apptainer/install.sh", pytrace=False))
