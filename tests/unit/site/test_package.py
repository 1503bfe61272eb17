"""afina from a wheel, in an empty folder with an empty HOME: what it brings, what it trains, and what it says where it cannot.

The wheel is built here; its virtual environment sees this one's packages (all, or without those of the extra `train`) but not its afina.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests import tiny
from tests.common import ROOT

from afina.errors import SiteError
from afina.site import python
from afina.site.image import check_image
from afina.site.package import build_folder, copy_slurm_files
from afina.site.settings import Site

pytestmark = pytest.mark.series

Ran = subprocess.CompletedProcess[str]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
#: What the image is built from, beside src and slurm.
BUILD = ("Apptainer.def", "container/build.sh", "container/pip_settings.py", "container/prune.sh", "container/requirements.txt", "pyproject.toml", "README.md", "LICENSE")  # fmt: skip


def build_wheel(source: Path, folder: Path) -> Path:
    argv = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(argv, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if "dist-info" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel alone."""
    folder = tmp_path_factory.mktemp("venv") / "it's new"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin/python"),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return folder


@pytest.fixture
def run(venv: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Run a program of the venv in an empty folder with an empty HOME; `packages` is a folder of further ones; `variables` are added."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def call(*argv: str, packages: Path = SITE_PACKAGES, **variables: str) -> Ran:
        (place,) = (venv / "lib").glob("python*/site-packages")
        (place / "more.pth").write_text(f"{packages}\n")
        words = [str(venv / "bin" / argv[0]), *argv[1:]]
        return subprocess.run(
            words,
            cwd=tmp_path / "here",
            env=env | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return call


def files_below(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_brings_the_batch_scripts_recipes_and_sites(run: Callable[..., Ran], tmp_path: Path) -> None:
    assert run("afina", "--help").returncode == 0
    done = run("afina", "init", "--files", "project")
    assert done.returncode == 0, done
    expected = {name: text for name, text in files_below(ROOT / "slurm").items() if name != "site.env"}
    assert files_below(tmp_path / "here/project/slurm") == expected
    assert run("afina", "init", "--files", "project").returncode == 0, "the same files stay"
    (tmp_path / "here/project/slurm/job.sh").write_text("mine")
    again = run("afina", "init", "--files", "project")
    assert again.returncode == 2 and "job.sh exists already and differs" in again.stderr


def test_a_wheel_builds_the_image_from_what_the_checkout_has(
    run: Callable[..., Ran], wheel: Path, tmp_path: Path
) -> None:
    help_text = run("afina", "image", "build", "--help")
    assert help_text.returncode == 0 and help_text.stdout.startswith("usage: container/build.sh")
    refused = run("afina", "image", "build", "--compress", "lzma")
    assert refused.returncode == 2 and "build: --compress lzma" in refused.stderr
    code = "import shutil, sys\nfrom afina.site.package import build_folder\nwith build_folder() as folder: shutil.copytree(folder, sys.argv[1])"
    made = tmp_path / "made"
    assert run("python", "-c", code, str(made)).returncode == 0
    assert {name: (made / name).read_bytes() for name in BUILD} == {name: (ROOT / name).read_bytes() for name in BUILD}
    assert contents(build_wheel(made, tmp_path / "again")) == contents(wheel), "the image gets the same afina"


def test_a_wheel_brings_the_pages_that_messages_name(run: Callable[..., Ran], tmp_path: Path) -> None:
    """All that the code names; an error names the page by its path."""
    (tmp_path / "here/recipe.yaml").write_text("a: 1\n")
    done = run("afina", "train", "recipe.yaml")
    page = re.search(r"`afina recipe keys` and (/.*/_docs/recipe\.md) list", done.stderr)
    assert done.returncode == 2 and page, done
    assert Path(page[1]).read_bytes() == (ROOT / "docs/recipe.md").read_bytes()
    assert f"Documentation: {Path(page[1]).parent}\n" in run("afina", "--help").stdout
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "slurm").glob("*.s*")]
    named = {name for path in sources for name in re.findall(r"docs/([a-z-]+\.md)", path.read_text("utf-8"))}
    assert {"recipe.md", "image.md", "stopping.md"} <= named <= {path.name for path in Path(page[1]).parent.iterdir()}


def test_a_wheel_trains_here(run: Callable[..., Ran], tmp_path: Path) -> None:
    """…and predicts. Neither waits for the import of packages that this run does not use."""
    tiny.write_project(tmp_path / "data", rows=60)
    data, scratch = tmp_path / "data", tmp_path / "scratch"
    words = ["--data", str(data / "reviews.csv"), "--model", str(data / "model"), "--scratch", str(scratch), "--yes"]
    first = run("afina", "init", ".", *words)
    assert first.returncode == 0, first
    options = ["--set", "train.epochs=1", "--set", "tokens.max_length=32", "--set", "baselines=false"]
    done = run("afina", "train", "recipe.yaml", *options, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (finished,) = scratch.glob("runs/*/outcome.json")
    assert '"finished"' in finished.read_text()
    for name in ("finetune.sbatch", "job.sh", "node.sh"):
        assert (finished.parent / name).read_bytes() == (ROOT / "slurm" / name).read_bytes()
    predict = ["predict", finished.parent.name, str(data / "reviews.csv"), "-o", "out.parquet"]
    predicted = run("afina", *predict, PYTHONPROFILEIMPORTTIME="1")
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    for output in (done.stdout + done.stderr, predicted.stdout + predicted.stderr):
        imported = set(re.findall(r"^import time:.*\| +(\w+)$", output, re.MULTILINE))
        assert {"torch", "afina"} <= imported
        assert imported & {"peft", "bitsandbytes", "optuna", "matplotlib", "submitit"} == set()


def test_a_python_that_cannot_train_is_refused_before_anything_is_done(run: Callable[..., Ran], tmp_path: Path) -> None:
    """`pip install .` without `[train]`, and no image."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in SITE_PACKAGES.iterdir():
        if not entry.name.lower().startswith(
            ("torch", "transformers", "datasets", "evaluate", "accelerate", "afina", "_afina")
        ):
            (packages / entry.name).symlink_to(entry)
    tiny.write_project(tmp_path / "here")
    (tmp_path / "here/slurm").mkdir()
    (tmp_path / "here/slurm/site.env").write_text(f"AFINA_SCRATCH='{tmp_path}/here/scratch'\n")
    for argv in (("train", "recipe.yaml"), ("prefetch", "recipe.yaml"), ("doctor", "recipe.yaml")):
        done = run("afina", *argv, packages=packages)
        output = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == 3 and "Traceback" not in output, done
        assert "cannot train: it lacks accelerate>=" in output and "torch>=" in output, done
        assert "pip install '.[train]'" in output and "AFINA_IMAGE" in output
    assert not (tmp_path / "here/scratch/runs").exists()


def test_versions_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that exists is not asked: its jobs use the Python that made it."""
    assert python.lacking() == []
    check_image(Site(scratch=tmp_path))
    required = [
        "click>=8",
        "torch>=999.1; extra == 'train'",
        "nothere>=1; extra == 'train'",
        "optuna>=99; extra == 'train'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: required)
    missing = python.lacking()
    assert missing[0].startswith("torch>=999.1 (2.") and missing[1:] == ["nothere>=1"]
    with pytest.raises(SiteError, match="cannot train: it lacks torch>=999"):
        check_image(Site(scratch=tmp_path))
    check_image(Site(scratch=tmp_path), resumed=True)


def test_in_a_checkout_the_files_are_the_checkouts(tmp_path: Path) -> None:
    with build_folder() as folder:
        assert folder == ROOT
    assert tmp_path / "slurm/recipes/yelp.yaml" in copy_slurm_files(tmp_path)
