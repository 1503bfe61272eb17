"""`afina doctor`: every kind of trouble is a line with a remedy, and a healthy machine has none. tests/slurm has the real job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import program
from tests.unit.conftest import Ran, tree
from tests.unit.doctor.conftest import SINFO, found, target

from afina.diagnosis import CHECKS, examine
from afina.recipe.schema import Recipe
from afina.run.plan import make_plan
from afina.site.finding import Finding
from afina.site.settings import Site
from afina.slurm.cluster import Cluster, parse_associations, parse_config, parse_partitions


def test_a_healthy_machine_has_no_failures_and_stays_as_it_was(bin: Path, site: Site) -> None:
    before = tree(site.scratch)
    findings = list(examine(target(site)))
    assert [f for f in findings if f.level == "failed"] == []
    assert {
        "site", "scratch", "quota", "locks", "rename", "caches", "token", "clock", "image", "slurm", "partition",
    } <= {f.check for f in findings}  # fmt: skip
    assert all(f.remedy for f in findings if f.level != "ok"), "a warning without a remedy"
    assert tree(site.scratch) == before
    assert len(CHECKS) == len(set(CHECKS))


def test_without_a_site_the_rest_is_looked_at_all_the_same(
    bin: Path, command: Callable[..., Ran], scratch: Path
) -> None:
    done = command("doctor", "--json", env={"AFINA_SCRATCH": f"{scratch}x"})
    said = json.loads(done.stdout)
    assert done.returncode == 3 and said["failed"] == 1 and "Traceback" not in done.stderr
    by_check = {f["check"]: f for f in said["findings"]}
    assert by_check["site"]["level"] == "failed" and "mkdir -p" in by_check["site"]["remedy"]
    assert by_check["slurm"]["level"] == "ok" and by_check["sacct"]["message"] == "works"
    done = command("doctor", "--site", "no such.env")
    assert done.returncode == 3 and "failed   site " in done.stdout and "remedy: give --site FILE" in done.stdout


def test_a_recipe_is_held_against_its_partition(
    bin: Path, command: Callable[..., Ran], recipe_file: Callable[..., Path], model_folder: Path
) -> None:
    file = recipe_file(model=str(model_folder))
    done = command("doctor", file, "--json", "--set", "resources.time=2-0")
    by_check = {f["check"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 3 and "partition gpu allows" in by_check["resources"]["message"]
    assert by_check["recipe"]["level"] == "ok"
    done = command("doctor", file, "--json")
    assert done.returncode == 0, done.stdout
    done = command("doctor", file, "--set", "data.files=revews.csv")
    assert done.returncode == 3 and "did you mean `reviews.csv`?" in done.stdout


def test_what_is_not_fetched_is_said(recipe: Callable[..., Recipe], site: Site, bin: Path) -> None:
    Path("reviews.csv").write_text("text,stars\ngood,5\n")
    p = target(site, plan=make_plan(recipe(), site), has_recipe=True)
    (finding,) = found(p, "offline")
    assert finding.level == "warning" and "model owner/model has not been fetched" in finding.message
    (site.scratch / "pins").mkdir()
    (site.scratch / "pins/model-owner--model-0.json").write_text(
        json.dumps({"asked": "owner/model", "commit": "ab" * 20})
    )
    (finding,) = found(p, "offline")
    assert finding.level == "ok" and "abababababab" in finding.message


def test_no_secret_is_shown(bin: Path, command: Callable[..., Ran]) -> None:
    token = "hf_" + "s3cr3t" * 6
    done = command("doctor", env={"HF_TOKEN": token})
    assert "there is a Hugging Face token" in done.stdout and token not in done.stdout + done.stderr


def test_clocks(bin: Path, site: Site) -> None:
    (finding,) = found(target(site), "clock")
    assert finding.level == "ok" and finding.message == "agrees with the file server of scratch and slurmctld"
    program(bin, "scontrol", 'date -d "90 seconds ago" "+Configuration data as of %Y-%m-%dT%H:%M:%S"\n')
    (finding,) = found(target(site), "clock")
    assert finding.level == "warning" and "slurmctld differ by" in finding.message


def test_slurm_that_does_not_answer(bin: Path, site: Site) -> None:
    (finding,) = found(target(site, Cluster()), "slurm")
    assert finding.level == "failed" and "sinfo does not answer" in finding.message
    program(bin, "squeue", "exit 1\n")
    program(bin, "sacct", "exit 1\n")
    assert found(target(site), "squeue")[0].level == "failed"
    assert found(target(site), "sacct")[0] == Finding(
        "sacct", "ok", "does not work here; afina reads run directories instead"
    )
    for name in ("scancel", "srun"):
        (bin / name).unlink()
    if shutil.which("scancel") is None:
        assert "not on PATH: scancel, srun" in found(target(site), "slurm")[0].message


@pytest.mark.parametrize(
    ("given", "check", "level", "said"),
    [
        ({}, "partition", "ok", "gpu: 2 nodes, 2 GPUs per node at most, up to 24 h"),
        ({"SBATCH_PARTITION": "old"}, "partition", "warning", "old: 2 nodes (2 out of service), no GPUs"),
        ({"SBATCH_PARTITION": "gqu"}, "partition", "failed", "SBATCH_PARTITION=gqu: no such partition"),
        ({}, "account", "ok", "your default; you have: maths, physics"),
        ({"SBATCH_ACCOUNT": "Maths"}, "account", "ok", "Maths"),
        ({"SBATCH_ACCOUNT": "zoo"}, "account", "failed", "SBATCH_ACCOUNT=zoo is not yours"),
        ({"SBATCH_QOS": "long"}, "qos", "ok", "long"),
        ({"SBATCH_QOS": "long", "SBATCH_ACCOUNT": "maths"}, "qos", "failed", "SBATCH_QOS=long is not allowed"),
    ],
)  # fmt: skip
def test_where_jobs_go(bin: Path, site: Site, given: dict[str, str], check: str, level: str, said: str) -> None:
    accounts = parse_associations("elk|physics||normal,long|normal|\nelk|maths||normal||\n", "elk")
    cluster = Cluster(parse_partitions(SINFO), {"ClusterName": "elk"}, accounts)
    (finding,) = found(target(site.model_copy(update={"sbatch": given}), cluster), check)
    assert finding.level == level and said in finding.message


@pytest.mark.parametrize(
    ("config", "check", "level"),
    [
        ("PreemptMode = REQUEUE", "preemption", "ok"),
        ("PreemptMode = GANG,CANCEL", "preemption", "warning"),
        ("JobRequeue = 0", "requeue", "ok"),
        ("KillWait = 5 sec", "kill wait", "warning"),
        ("KillWait = 60 sec", "kill wait", "ok"),
    ],
)
def test_what_slurm_does_with_a_job_at_its_end(bin: Path, site: Site, config: str, check: str, level: str) -> None:
    cluster = Cluster(parse_partitions(SINFO), parse_config(config))
    assert found(target(site, cluster), check)[0].level == level


def test_a_job_is_not_tried_where_it_cannot_be(bin: Path, command: Callable[..., Ran], scratch: Path) -> None:
    program(bin, "sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1\n")
    done = command("doctor", "--job", "--json")
    said = json.loads(done.stdout)
    (refused,) = [f for f in said["findings"] if f["level"] == "failed"]
    assert done.returncode == 3 and refused["check"] == "sbatch" and "SBATCH_ACCOUNT" in refused["remedy"]
    assert list(scratch.iterdir()) == []
