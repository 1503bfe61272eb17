"""The site that `afina init` writes: what the cluster and its modules say."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import tiny
from tests.common import program
from tests.unit.conftest import Ran
from tests.unit.start.conftest import reviews

from afina.recipe.parse import load_recipe
from afina.start.find_machine import find_machine


def test_the_site_says_what_the_cluster_says(command: Callable[..., Ran], no_cluster: Path, tmp_path: Path) -> None:
    sinfo = (
        "cpu*|up|2-00:00:00|1-infinite|10|48|190000|(null)|idle\nlong|up|7-00:00:00|1-4|4|64|512000|gpu:a100:4|mixed\n"
    )
    program(no_cluster, "sinfo", f"printf '{sinfo}'\n")
    program(no_cluster, "scontrol", "echo 'ClusterName = elk'\n")
    program(
        no_cluster, "sacctmgr",
        'case "$*" in *assoc*user=me*) printf "elk|physics||normal,long|normal|\\nelk|maths||normal||\\n";; esac\n',
    )  # fmt: skip
    (tmp_path / "big scratch").mkdir()
    data = tiny.write_csv(tmp_path / "r.csv", reviews(60))
    env = {"USER": "me", "SCRATCH": str(tmp_path / "big scratch"), "AFINA_SCRATCH": None}
    image = tmp_path / "afina.sif"
    from tests.unit.conftest import sif_bytes

    image.write_bytes(sif_bytes())
    done = command("init", tmp_path / "p", "--data", data, "--label", "stars", "--image", image, "--yes", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "afina submit recipe.yaml"
    site = tmp_path / "p/slurm/site.env"
    shown = subprocess.run(
        ["bash", "-c", 'set -eu; USER=me; . "$1"; printf "%s\\n" "$AFINA_SCRATCH" "$AFINA_IMAGE" "$SBATCH_PARTITION" "$SBATCH_ACCOUNT"', "x", site],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert shown == [f"{tmp_path}/big scratch/afina", str(image), "long", "physics"]
    assert (tmp_path / "big scratch/afina").is_dir()
    text = site.read_text()
    assert "cpu*: up to 2 days; 10 × 48 cores, 185 GB" in text and "long: up to 7 days; 4 × 64 cores, 500 GB, 4 GPUs (a100)" in text  # fmt: skip
    assert "Your accounts (sacctmgr): physics, maths" in text and "QOS that they allow: normal, long" in text
    resources = load_recipe(tmp_path / "p/recipe.yaml").resources
    assert (resources.gpus_per_node, resources.cpus_per_gpu) == (1, 8)


def test_a_module_is_loaded_where_apptainer_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "only these"
    for name in ("bash",):
        folder.mkdir()
        (folder / name).symlink_to(f"/bin/{name}")
    home = Path(os.environ["HOME"])
    listed = "/apps/modules:\\napptainer/1.2.5\\napptainer/1.3.4(default)\\nsingularity/3.8\\n"
    (home / ".bash_profile").write_text(f"module() {{ printf '{listed}' >&2; }}\nPATH='{folder}'\n")
    monkeypatch.setenv("PATH", str(folder))
    machine = find_machine(tmp_path, {**os.environ, "AFINA_IMAGE": "/nowhere/afina.sif"}, scratch=str(tmp_path))
    assert (machine.module, machine.runtime) == ("apptainer/1.3.4", "apptainer")
    assert machine.image == "/nowhere/afina.sif" and "does not exist yet" in machine.image_why
