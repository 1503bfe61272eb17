"""Prediction as a job array on the test cluster, in the image: the last task merges; a cancelled array is completed. Of one model, of
one that finds entities, and of an ensemble whose folder was moved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from projects import give_to_user, project_folder
from tests import tiny
from tests.processes import wait_until
from tests.unit.prediction.test_ensemble import finished_run

import afina


@pytest.fixture(scope="module")
def place(cluster: Cluster, image: Path) -> Iterator[Path]:
    """A project folder with a classifier, an ensemble, and texts."""
    with project_folder(cluster, 'afina it\'s a "prediction" ', image) as path:
        tiny.tiny_model(path / "model", num_labels=3)
        tiny.tiny_tagger(path / "tagger")
        for seed in (1, 2):
            finished_run(path / f"made here/member {seed}", seed, ["bad", "fair", "good"])
        afina.ensemble(path / "made here", path / "made here/committee")
        (path / "made here").rename(path / "moved")
        tiny.write_csv(path / "texts.csv", tiny.tiny_reviews(900, 1))
        give_to_user(path, cluster)
        yield path


def _ended(cluster: Cluster, job: str) -> None:
    argv = ["squeue", "--noheader", "--job", job]
    wait_until(lambda: not cluster.run_as_user(argv).stdout.strip(), 240, pause_s=0.5, failure=cluster.diagnose)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["model", "tagger", "moved/committee"])
def test_an_array_is_one_prediction(cluster: Cluster, place: Path, host: Path, model: str) -> None:
    name = model.rpartition("/")[2]
    command = [str(host / "afina"), "predict", model, "texts.csv", "--site", "slurm/site.env", "--chunk-rows", "100"]
    one = cluster.run_as_user([*command, "-o", f"{name}.one.csv"], cwd=place, timeout=300, env={"OMP_NUM_THREADS": "1"})
    assert one.returncode == 0, one.stdout + one.stderr
    array = ["-o", f"{name}.csv", "--submit", "--array", "3", "--time", "10", "--gpus-per-node", "0", "--json"]
    done = cluster.run_as_user([*command, *array], cwd=place, timeout=300, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["tasks"], answer["chunks"]) == (3, 9)
    _ended(cluster, answer["job_id"])
    logs = "\n".join(log.read_text(errors="replace") for log in place.glob(f"{name}.csv.slurm-*.out"))
    assert (place / f"{name}.csv").is_file(), f"{logs}\n{cluster.diagnose()}"
    assert (place / f"{name}.csv").read_bytes() == (place / f"{name}.one.csv").read_bytes()
    assert not (place / f"{name}.csv.parts").exists()
    assert len(list(place.glob(f"{name}.csv.slurm-*_*.out"))) == 3


@pytest.mark.timeout(900)
def test_the_command_completes_a_cancelled_array(cluster: Cluster, place: Path, host: Path) -> None:
    command = [str(host / "afina"), "predict", "model", "texts.csv", "-o", "completed.csv", "--chunk-rows", "100"]
    options = ["--submit", "--array", "2", "--gpus-per-node", "0", "--json"]
    done = cluster.run_as_user([*command, *options], cwd=place, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    job = json.loads(done.stdout.splitlines()[-1])["job_id"]
    refused = cluster.run_as_user(command, cwd=place, timeout=300)
    assert refused.returncode == 2 and f"job {job} is still working on this" in refused.stderr, refused.stderr
    cluster.run_as_user(["scancel", job], check=True)
    _ended(cluster, job)
    made = cluster.run_as_user(command, cwd=place, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    assert len((place / "completed.csv").read_text().splitlines()) > 900
