"""A prediction as a job array on the test cluster, in the image: who is last merges, and a killed task's share is made up."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from tests import tiny


@pytest.fixture(scope="module")
def place(cluster: Cluster, image: Path) -> Iterator[Path]:
    """A folder of the ordinary user: a classifier, texts, site.env; scratch below it."""
    path = Path(tempfile.mkdtemp(prefix='afina it\'s a "prediction" ', dir="/tmp"))
    (path / "slurm").mkdir()
    (path / "scratch").mkdir()
    tiny.tiny_model(path / "model", num_labels=3)
    tiny.write_csv(path / "texts.csv", tiny.tiny_reviews(900, 1))
    scratch, sif = shlex.quote(str(path / "scratch")), shlex.quote(str(image))
    (path / "slurm/site.env").write_text(f"AFINA_SCRATCH={scratch}\nAFINA_IMAGE={sif}\n")
    for name in [path, *path.rglob("*")]:
        shutil.chown(name, cluster.user, cluster.user)
    yield path
    shutil.rmtree(path)


def _ended(cluster: Cluster, job: str) -> None:
    for _ in range(480):
        if not cluster.run_as_user(["squeue", "--noheader", "--job", job]).stdout.strip():
            return
        time.sleep(0.5)
    raise AssertionError(f"job {job} does not end\n{cluster.diagnose()}")


@pytest.mark.timeout(900)
def test_an_array_is_one_prediction(cluster: Cluster, place: Path, host: Path) -> None:
    afina = [str(host / "afina"), "predict", "model", "texts.csv", "--chunk-rows", "100"]
    one = cluster.run_as_user([*afina, "-o", "one.csv"], cwd=place, timeout=300, env={"OMP_NUM_THREADS": "1"})
    assert one.returncode == 0, one.stdout + one.stderr
    array = ["-o", "array.csv", "--submit", "--array", "3", "--time", "10", "--gpus-per-node", "0", "--json"]
    done = cluster.run_as_user([*afina, *array], cwd=place, timeout=300, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["tasks"], said["chunks"]) == (3, 9)
    _ended(cluster, said["job_id"])
    logs = "\n".join(log.read_text(errors="replace") for log in place.glob("array.csv.slurm-*.out"))
    assert (place / "array.csv").is_file(), f"{logs}\n{cluster.diagnose()}"
    assert (place / "array.csv").read_bytes() == (place / "one.csv").read_bytes()
    assert not (place / "array.csv.parts").exists()
    assert len(list(place.glob("array.csv.slurm-*_*.out"))) == 3


@pytest.mark.timeout(900)
def test_a_cancelled_array_is_made_up_for_by_the_command(cluster: Cluster, place: Path, host: Path) -> None:
    afina = [str(host / "afina"), "predict", "model", "texts.csv", "-o", "made up.csv", "--chunk-rows", "100"]
    options = ["--submit", "--array", "2", "--gpus-per-node", "0", "--json"]
    done = cluster.run_as_user([*afina, *options], cwd=place, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    job = json.loads(done.stdout.splitlines()[-1])["job_id"]
    refused = cluster.run_as_user(afina, cwd=place, timeout=300)
    assert refused.returncode == 2 and f"job {job} is still working on this" in refused.stderr, refused.stderr
    cluster.run_as_user(["scancel", job], check=True)
    _ended(cluster, job)
    made = cluster.run_as_user(afina, cwd=place, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    assert len((place / "made up.csv").read_text().splitlines()) > 900
