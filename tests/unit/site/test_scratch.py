"""AFINA_SCRATCH: refused where it cannot be used."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.unit.conftest import private_mounts, sif_bytes
from tests.unit.site.site_files import env, refused, written


def test_scratch_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    assert "AFINA_SCRATCH is not set" in refused().message
    assert "slurm/site.example.env" in refused().remedy
    assert "is not an absolute path" in refused(AFINA_SCRATCH="relative/path").message
    assert "does not exist" in refused(AFINA_SCRATCH=tmp_path / "absent").message
    assert "is not a folder" in refused(AFINA_SCRATCH=file).message
    assert not (tmp_path / "absent").exists()
    named = written(tmp_path, f"AFINA_SCRATCH='{tmp_path}/absent too'\n")
    assert f"set AFINA_SCRATCH in {named}" in refused(named).remedy


PYTHON = shlex.quote(sys.executable)
LOAD = f"exec {PYTHON} -c 'import sys\nfrom afina.site.settings import load_site\nfrom afina.errors import AfinaError\ntry: print(load_site())\nexcept AfinaError as e: print(e); sys.exit(e.exit_code)'"


def test_scratch_that_is_read_only(scratch: Path) -> None:
    done = private_mounts(
        f'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; export AFINA_SCRATCH="$1"; {LOAD}', scratch
    )
    assert done.returncode == 3, done
    assert f"AFINA_SCRATCH={scratch} is not writable by you" in done.stdout
    assert "remedy: choose a folder of your own" in done.stdout
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("options", "fill"), [("size=1m", ":"), ("size=20m", 'head -c 10000000 /dev/zero >"$1/x"')])
def test_scratch_that_is_full(scratch: Path, options: str, fill: str) -> None:
    done = private_mounts(f'mount -t tmpfs -o {options} tmpfs "$1"; {fill}; export AFINA_SCRATCH="$1"; {LOAD}', scratch)
    assert done.returncode == 3 and "is full: " in done.stdout and "inodes are free" in done.stdout, done
    assert "remedy: remove old runs and caches" in done.stdout


def test_scratch_without_inodes(scratch: Path) -> None:
    done = private_mounts(
        f'mount -t tmpfs -o size=100m,nr_inodes=2 tmpfs "$1"; touch "$1/x"; export AFINA_SCRATCH="$1"; {LOAD}', scratch
    )
    assert done.returncode == 3 and "0 inodes are free" in done.stdout, done


AS_NOBODY = """
import os, sys
from afina.errors import AfinaError
from afina.site.settings import load_site
import pydantic
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    print(load_site())
except AfinaError as error:
    print(error); sys.exit(error.exit_code)
"""


def as_nobody(variables: Mapping[str, str | Path]) -> subprocess.CompletedProcess[str]:
    if os.geteuid():
        pytest.skip("needs root to become somebody else")
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY], env=env(**variables), capture_output=True, text=True, check=False
    )


@pytest.fixture
def open_folder() -> Path:
    """A folder that another user may enter; pytest's own is closed."""
    folder = Path(tempfile.mkdtemp(prefix="afina's "))
    folder.chmod(0o777)
    return folder


def test_another_user_may_not_write_or_read(open_folder: Path) -> None:
    closed, scratch, image = open_folder / "closed", open_folder / "scratch", open_folder / "image.sif"
    try:
        closed.mkdir(mode=0o755)
        done = as_nobody({"AFINA_SCRATCH": closed})
        assert done.returncode == 3 and "is not writable by you" in done.stdout, done
        scratch.mkdir()
        scratch.chmod(0o777)
        image.write_bytes(sif_bytes())
        image.chmod(0o600)
        done = as_nobody({"AFINA_SCRATCH": scratch, "AFINA_IMAGE": image})
        assert done.returncode == 3 and "cannot be read by you" in done.stdout and "chmod a+r" in done.stdout, done
        closed.chmod(0o700)
        for name, value in (("AFINA_SCRATCH", closed / "below"), ("AFINA_IMAGE", closed / "image.sif")):
            done = as_nobody({"AFINA_SCRATCH": scratch, name: value})
            assert done.returncode == 3 and "Traceback" not in done.stderr, done
            assert name in done.stdout
    finally:
        shutil.rmtree(open_folder)
