"""`afina doctor` about the container: an image that starts, and every way in which it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import program
from tests.unit.conftest import Ran, sif_bytes
from tests.unit.doctor.conftest import found, target

from afina import __version__
from afina.diagnosis.target import Target
from afina.recipe.schema import Recipe
from afina.run.plan import make_plan
from afina.site.finding import Finding
from afina.site.settings import Site
from afina.version import INTERFACE


@pytest.fixture
def contained(bin: Path, site: Site, sif: Path) -> Target:
    """A site with an image, and an apptainer that starts it."""
    body = (
        f'case "$*" in --version) echo "apptainer version 1.4.5";; *exec*) echo "afina, version {__version__}";; esac\n'
    )
    program(bin, "apptainer", body)
    return target(site.model_copy(update={"image": sif, "runtime": "apptainer"}))


def test_a_container_that_starts(contained: Target) -> None:
    assert [f.level for f in found(contained, "image")] == ["ok"]
    (finding,) = found(contained, "container")
    assert finding == Finding("container", "ok", f"the image starts, with afina {__version__}")
    assert "apptainer version 1.4.5" in found(contained, "runtime")[0].message


@pytest.mark.parametrize(("gpus", "levels"), [(2, ["ok", "warning"]), (0, ["ok"])])
def test_gpus_for_an_image_of_the_cpu(
    contained: Target, recipe: Callable[..., Recipe], tmp_path: Path, gpus: int, levels: list[str]
) -> None:
    labels = {"org.opencontainers.image.title": "afina", "afina.interface": str(INTERFACE), "afina.device": "cpu"}
    (tmp_path / "unpacked/.singularity.d").mkdir(parents=True)
    (tmp_path / "unpacked/.singularity.d/labels.json").write_text(json.dumps(labels))
    assert contained.site is not None
    site = contained.site.model_copy(update={"image": tmp_path / "unpacked"})
    plan = make_plan(recipe(resources={"gpus_per_node": gpus}), site)
    found_here = found(target(site, plan=plan), "image")
    assert [f.level for f in found_here] == levels
    assert gpus == 0 or "built for the CPU, and the recipe requests 2 GPUs per node" in found_here[1].message


def test_a_container_with_another_afina(contained: Target, bin: Path) -> None:
    program(bin, "apptainer", "echo afina, version 0.0.1\n")
    (finding,) = found(contained, "container")
    assert finding.level == "warning" and "the image has afina 0.0.1" in finding.message


def test_a_container_that_does_not_start(contained: Target, bin: Path) -> None:
    program(bin, "apptainer", "echo 'INFO: so' >&2; echo 'FATAL: user namespaces are disabled' >&2; exit 255\n")
    (finding,) = found(contained, "container")
    assert finding.level == "failed" and "user namespaces are disabled" in finding.message


def test_an_image_that_is_cut_off_is_a_finding_of_the_site(
    bin: Path, command: Callable[..., Ran], tmp_path: Path
) -> None:
    image = tmp_path / "half.sif"
    image.write_bytes(sif_bytes()[:300])
    done = command("doctor", env={"AFINA_IMAGE": str(image)})
    assert done.returncode == 3 and "is cut off: 300 of 640 bytes are there" in done.stdout


def test_a_setuid_installation_is_told_from_another(contained: Target, bin: Path, tmp_path: Path) -> None:
    starter = tmp_path / "lib exec/apptainer/bin/starter-suid"
    starter.parent.mkdir(parents=True)
    starter.write_text("")
    program(
        bin, "apptainer", f"case $1 in buildcfg) echo 'LIBEXECDIR={tmp_path}/lib exec';; --version) echo v;; esac\n"
    )
    assert "setuid" not in found(contained, "runtime")[0].message
    starter.chmod(0o4755)
    assert "setuid" in found(contained, "runtime")[0].message
    assert found(contained, "fuse")[0].level == "warning"


def test_binds(contained: Target, tmp_path: Path) -> None:
    assert contained.site is not None
    binds = (f"{tmp_path}:/data:ro", f"{tmp_path}/nowhere")
    broken = target(contained.site.model_copy(update={"binds": binds}))
    (finding,) = found(broken, "binds")
    assert finding.level == "failed" and f"{tmp_path}/nowhere" in finding.message and ":/data" not in finding.message
