"""`afina doctor`: every kind of trouble is a line with a remedy, and a healthy machine has none. tests/slurm has the real job."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.common import program
from tests.unit.conftest import Ran, sif_bytes, tree

from afina import __version__
from afina.ahead import doctor
from afina.diagnosis import CHECKS, disk, examine
from afina.diagnosis.target import Target
from afina.files import permission_remedy
from afina.recipe.schema import Recipe
from afina.run.plan import make_plan
from afina.site.finding import Finding
from afina.site.settings import Site
from afina.slurm.cluster import Cluster, parse_associations, parse_config, parse_partitions
from afina.version import INTERFACE
from afina.worker.checks import environment

SINFO = "gpu*|up|1-00:00:00|1-4|2|8|64000|gpu:2|idle\nold|down|1:00:00|1-4|2|8|64000|(null)|down*\n"


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A healthy small cluster, first on PATH."""
    folder = tmp_path / "fake bin"
    program(folder, "sinfo", f"printf '{SINFO}'\n")
    program(folder, "scontrol", 'date "+Configuration data as of %Y-%m-%dT%H:%M:%S"; echo "KillWait = 30 sec"\n')
    for name in ("sbatch", "squeue", "scancel", "srun", "sacct", "sacctmgr"):
        program(folder, name, "exit 0\n")
    for name in ("quota", "lfs", "apptainer", "singularity"):
        program(folder, name, "exit 1\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def target(site: Site, cluster: Cluster | None = None, **more: object) -> Target:
    return Target(dict(os.environ), cluster or Cluster(parse_partitions(SINFO)), site, **more)  # type: ignore[arg-type]


def found(p: Target, check: str) -> list[Finding]:
    return [f for f in examine(p) if f.check == check]


def test_a_local_disk_is_a_doubt_until_a_job_looks(bin: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_file_system", lambda path: "ext4")
    for limit in ("_FEW_GB", "_FEW_INODES"):  # the tests' own disk may be nearly full
        monkeypatch.setattr(disk, limit, 0)
    assert [f.remedy for f in found(target(site), "scratch")][1:] == ["`afina doctor --job` checks it"]
    assert [f.level for f in found(target(site, with_job=True), "scratch")] == ["ok"]


def test_a_healthy_machine_has_no_failures_and_stays_as_it_was(bin: Path, site: Site) -> None:
    before = tree(site.scratch)
    findings = list(examine(target(site)))
    assert [f for f in findings if f.level == "failed"] == []
    assert {
        "site",
        "scratch",
        "quota",
        "locks",
        "rename",
        "caches",
        "token",
        "clock",
        "image",
        "slurm",
        "partition",
    } <= {f.check for f in findings}
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


@pytest.mark.parametrize(
    ("line", "level", "said"),
    [
        ("/scratch 500 1000 1200 0 10 0 0 0", "ok", "500 of 1,200 KB"),
        ("/scratch 1150* 1000 1200 0 10 0 0 0", "warning", "1,150 of 1,200 KB"),
        ("/scratch 1300* 1000 1200 0 10 0 0 0", "failed", "1,300 of 1,200 KB"),
        ("/scratch 5 0 0 0 99 100 100 0", "warning", "99 of 100 files"),
        ("/scratch 5 0 0 0 99 0 0 0", "ok", "no quota is set"),
    ],
)
def test_quotas(bin: Path, site: Site, line: str, level: str, said: str) -> None:
    program(bin, "quota", f"echo 'Disk quotas for user me (uid 1):'; echo '{line}'\n")
    (finding,) = found(target(site), "quota")
    assert finding.level == level and said in finding.message


def test_locks_that_lock_nobody_out(bin: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = found(target(site), "locks")
    assert finding.level == "ok"
    monkeypatch.setattr(disk.fcntl, "flock", lambda *_: None)  # as on a file system mounted with `localflock`
    (finding,) = found(target(site), "locks")
    assert finding.level == "warning" and "does not exclude another process" in finding.message

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    (finding,) = found(target(site), "locks")
    assert finding.level == "warning" and "Function not implemented" in finding.message


def test_a_replacement_that_is_seen_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(source: Path, target: Path) -> None:
        raw = Path(source).read_bytes()
        with Path(target).open("r+b") as file:
            file.write(raw[:2048])
            file.flush()
            time.sleep(0.02)
            file.write(raw[2048:])

    monkeypatch.setattr(disk.os, "replace", torn)
    finding = disk._try_rename(tmp_path, rounds=60)
    assert finding.level == "failed" and "a reader saw part of a file" in finding.message


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


# -- the container -----------------------------------------------------------------------------------------------------


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


# -- inside ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="here is an NVIDIA driver")
@pytest.mark.parametrize(("allocated", "level"), [("2", "warning"), ("0", "ok"), (None, "ok")])
def test_allocated_gpus_without_a_driver_are_a_warning(
    allocated: str | None, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if allocated is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", allocated)
    (finding,) = environment._cuda()
    assert (finding.check, finding.level) == ("cuda", level)
    assert ("train on the CPU" in finding.message) == (level == "warning")


@pytest.mark.parametrize(
    ("cuda", "driver", "level", "words"),
    [
        ("12.6", "525.60.9", "failed", "needs driver 525.60.13 or newer, this is 525.60.9"),
        ("13.0", "570.10", "failed", "needs driver 580.65.06 or newer"),
        ("12.6", "535.104.05", "failed", "driver 535.104.05 is there, and torch cannot use it"),
        (None, "535.104.05", "warning", "there is an NVIDIA driver"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_the_driver_is_held_against_the_one_table(
    cuda: str | None, driver: str, level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    file = tmp_path / "version"
    file.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Aug 19 01:15:15 UTC 2023\n")
    (finding,) = environment._cuda(file)
    assert finding.level == level and words in finding.message


@pytest.mark.slow
def test_the_inside_is_whole_here_and_a_broken_package_is_found(tmp_path: Path) -> None:
    """Without a site too: the image's own test calls it so. In Python as by the command."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "evaluate.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')\n")
    argv = [sys.executable, "-m", "afina.cli", "doctor", "--inside", "--json"]
    both = [
        subprocess.Popen(argv, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for env in ({}, {"PYTHONPATH": str(broken)})
    ]
    (out, err), (broken_out, _) = (process.communicate(timeout=200) for process in both)
    said = json.loads(out)
    assert both[0].returncode == 0 and said["failed"] == 0, out + err
    by_check = {f["check"]: f for f in said["findings"]}
    assert "torch 2" in by_check["packages"]["message"] and "without network" in by_check["metrics"]["message"]
    assert {"python", "packages", "cuda", "metrics", "room", "compiler", "rdma"} <= set(by_check)
    assert [(f.check, f.level) for f in doctor(in_image=True)] == [(f["check"], f["level"]) for f in said["findings"]]
    with pytest.raises(TypeError, match="nods"):
        doctor(nods=2)  # type: ignore[call-arg]
    assert both[1].returncode == 3
    failed = [f for f in json.loads(broken_out)["findings"] if f["level"] == "failed"]
    assert any("evaluate cannot be imported: libfoo.so.1" in f["message"] for f in failed)


def test_a_job_is_not_tried_where_it_cannot_be(bin: Path, command: Callable[..., Ran], scratch: Path) -> None:
    program(bin, "sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1\n")
    done = command("doctor", "--job", "--json")
    said = json.loads(done.stdout)
    (refused,) = [f for f in said["findings"] if f["level"] == "failed"]
    assert done.returncode == 3 and refused["check"] == "sbatch" and "SBATCH_ACCOUNT" in refused["remedy"]
    assert list(scratch.iterdir()) == []


# -- a scratch that a group shares -------------------------------------------------------------------------------------


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """This process as another user; root can come back."""
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def shared(site: Site) -> Iterator[Site]:
    """A scratch that every user reaches: pytest's own folders are closed."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield site.model_copy(update={"scratch": folder})
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("mode", "umask", "level", "words"),
    [
        (0o755, 0o077, None, ""),
        (0o2775, 0o077, "warning", "umask 007 in the site file"),
        (0o2775, 0o022, "warning", "your umask 022 keeps the group out"),
        (0o775, 0o007, "warning", "chmod g+s"),
        (0o2775, 0o007, "ok", "is shared by its group"),
    ],
)
def test_a_scratch_that_a_group_shares(shared: Site, mode: int, umask: int, level: str | None, words: str) -> None:
    shared.scratch.chmod(mode)
    before = os.umask(umask)
    try:
        findings = list(disk.check_sharing(target(shared)))
    finally:
        os.umask(before)
    assert [finding.level for finding in findings] == ([level] if level else [])
    assert all(words in f"{finding.message} {finding.remedy}" for finding in findings)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_caches_of_another_user_that_are_closed_are_named_with_their_owner(shared: Site) -> None:
    closed = shared.scratch / "cache/hub"
    closed.mkdir(parents=True)
    closed.chmod(0o700)
    assert list(disk.check_sharing(target(shared))) == [], "one's own"
    with nobody():
        (finding,) = disk.check_sharing(target(shared))
        below, own = permission_remedy(closed / "models/token"), permission_remedy(Path("/proc/self/no such"))
    assert (finding.check, finding.level, finding.message) == ("sharing", "failed", f"{closed}: permission denied")
    assert finding.remedy == permission_of(closed) == below
    assert "belongs to" not in own, "one's own folder"


def permission_of(folder: Path) -> str:
    return (
        f"{folder} belongs to root, whose umask keeps others out: ask for `chmod -R g+rwX {folder}` and for `umask 007` in the site "
        "file, or set AFINA_SCRATCH to a folder of your own"
    )
