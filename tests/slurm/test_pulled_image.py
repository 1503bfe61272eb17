"""A run whose image comes from a registry: submitted, purged under the queued job, submitted again, trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cluster import Cluster
from projects import give_to_user, project_folder
from tests import tiny
from tests.registry import RegistryServer

from afina.run.directory import RunDir
from afina.site.image import push_image


@pytest.mark.timeout(900)
def test_a_pulled_image_trains_also_after_a_purge_under_the_queued_job(
    cluster: Cluster, image: Path, host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPTAINER_NOHTTPS", "1")
    resources = {"resources": {"cpus_per_gpu": 2, "time": 5}}
    with RegistryServer(tmp_path / "registry") as registry, project_folder(cluster, "afina pulled ") as folder:
        address = f"oras://{registry.host}/group/afina:1"
        digest = push_image(str(image), address).rpartition("@")[2]
        tiny.write_project(folder, **resources)
        (folder / "slurm").mkdir()
        lines = [f"AFINA_SCRATCH='{folder}/scratch'", f"AFINA_IMAGE={address}", "APPTAINER_NOHTTPS=1"]
        (folder / "slurm/site.env").write_text("\n".join(lines) + "\n")
        give_to_user(folder, cluster)

        def submit(what: str) -> tuple[RunDir, int, str]:
            argv = [str(host / "afina"), "submit", what, "--json"]
            done = cluster.run_as_user(argv, cwd=folder, timeout=400)
            assert done.returncode == 0, done.stdout + done.stderr
            answer = json.loads(done.stdout)
            return RunDir(answer["run"]), int(answer["job_id"]), done.stderr

        blocking = ["sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 900"]
        before = int(cluster.run_as_user(blocking, check=True).stdout)
        run, job, log = submit("recipe.yaml")
        path = run.plan().site.image
        record = json.loads((run.path / "record.json").read_text())["image"]
        assert path is not None and f"pulled oras://{registry.host}/group/afina@{digest}" in log
        assert (record["address"], record["digest"]) == (address, digest)
        assert record["sha256"] == Path(f"{image}.sha256").read_text().split()[0]
        path.unlink()
        cluster.root(["scancel", str(before)])
        assert cluster.wait(job) == "FAILED"
        outcome = run.outcome()
        assert outcome is not None and outcome.failure is not None and outcome.cause == "image"
        assert "is pulled again by: afina submit" in outcome.failure.remedy
        again, job, log = submit(str(run.path))
        assert again.path == run.path and "pulled " in log and path.is_file()
        assert cluster.wait(job, timeout=300) == "COMPLETED", (run.path / f"slurm-{job}.out").read_text()
        outcome = run.outcome()
        assert outcome is not None and outcome.outcome == "finished"
        (environment,) = [json.loads(file.read_text()) for file in run.path.glob("attempts/*/env.json")]
        assert (
            re.search(r"afina-image-[\w-]+/afina\.sif", environment["container"])
            or path.name in environment["container"]
        )
