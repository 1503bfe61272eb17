"""AFINA_IMAGE_KEY: an image that the key did not sign is refused on the host, and again in the job.

Real signatures on copies of the real image. The keyring and the keys are made here. Not covered: certificates.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import tiny
from tests.common import ROOT, program

from afina.errors import SiteError
from afina.recipe.parse import load_recipe
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.plan import Plan, make_plan
from afina.site.image import check_image
from afina.site.settings import Site
from afina.slurm.submitit_job import submitit_script

SCRIPT = ROOT / "slurm/finetune.sbatch"


def _do(*argv: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in argv], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def signed(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the image unsigned, signed by `pem.pub`, and in three ways altered; keys and a keyring."""
    folder = tmp_path_factory.mktemp('it\'s "signed" $(no)')
    for name in ("pem", "other"):
        _do("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", name, cwd=folder)
        _do("openssl", "ec", "-in", name, "-pubout", "-out", f"{name}.pub", cwd=folder)
    (folder / "unsigned.sif").symlink_to(image)
    shutil.copy(image, folder / "signed.sif")
    _do("apptainer", "sign", "--key", "pem", "signed.sif", cwd=folder)
    shutil.copy(folder / "signed.sif", folder / "altered.sif")
    with (folder / "altered.sif").open("r+b") as file:
        file.seek(os.path.getsize(image) // 2)  # noqa: PTH202
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    shutil.copy(folder / "signed.sif", folder / "added.sif")
    (folder / "overlay").write_bytes(b"\0" * 4096)
    overlay = ("--datatype", "4", "--groupid", "2", "--partfs", "2", "--parttype", "3", "--partarch", "2")
    _do("apptainer", "sif", "add", *overlay, "added.sif", "overlay", cwd=folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def own_keyring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No site of the caller's, and the keyring of these tests."""
    for name in [name for name in os.environ if name.startswith(("AFINA_", "SLURM_"))]:
        monkeypatch.delenv(name)
    folder = request.getfixturevalue("signed")
    monkeypatch.setenv("APPTAINER_CONFIGDIR", str(folder / "configuration"))


@pytest.fixture(scope="module")
def fingerprint(signed: Path) -> str:
    """Of a PGP key that signed `pgp.sif`, in a keyring of its own; as `apptainer key list` prints it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPTAINER_CONFIGDIR", str(signed / "configuration"))
        made = ("--name", 'A "Fingerprint": "0"', "--email", "a@example.org", "--comment", "", "--password", "")
        _do("apptainer", "key", "newpair", *made, "--push=false", cwd=signed)
        shutil.copy((signed / "unsigned.sif").resolve(), signed / "pgp.sif")
        _do("apptainer", "sign", "--keyidx", "0", "pgp.sif", cwd=signed)
        listed = _do("apptainer", "key", "list", cwd=signed)
    (found,) = [
        line.split(":")[1].strip() for line in listed.splitlines() if "Fingerprint:" in line and "User:" not in line
    ]
    return found


def site(folder: Path, name: str, key: str) -> Site:
    return Site(scratch=folder, image=folder / name, image_key=key, runtime="apptainer")


def in_the_job(run: RunDir, image: Path, key: str) -> subprocess.CompletedProcess[str]:
    """finetune.sbatch of a run with this image. An accepted image reaches `afina_meet`, which ends the job with 42."""
    words = ["bash", str(run.path / "node.sh"), str(image)]
    words += ["apptainer", "exec", str(image), "python", "-m", "x", str(run.path)]
    (run.path / "worker.argv").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))
    (run.path / "job.sh").write_text((ROOT / "slurm/job.sh").read_text() + "afina_meet() { exit 42; }\n")
    env = {"AFINA_SCRATCH": str(run.path), "AFINA_IMAGE_KEY": key, "SLURM_JOB_ID": "1", "AFINA_IMAGE": str(image)}
    argv = ["bash", str(SCRIPT), str(run.path)]
    return subprocess.run(argv, env={**os.environ, **env}, cwd=run.path, capture_output=True, text=True, check=False)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "reviews.csv").write_text("text,stars\ngood,5\nbad,1\n")
    (tmp_path / "recipe.yaml").write_text(json.dumps(tiny.recipe(model="owner/model")))
    return make_plan(
        load_recipe(tmp_path / "recipe.yaml"), Site(scratch=tmp_path), recipe_file=tmp_path / "recipe.yaml"
    )


@pytest.fixture
def run(plan: Plan, tmp_path: Path) -> RunDir:
    return claim(plan, {}, ["true"], "", tmp_path / "r un")


REFUSED = [
    ("unsigned.sif", "pem.pub", "signature not found"),
    ("altered.sif", "pem.pub", "data object integrity compromised"),
    ("added.sif", "pem.pub", "signature not found for object group 2"),
    ("signed.sif", "other.pub", "accepted signatures do not match"),
    ("signed.sif", "pem", "Are you passing the correct public key?"),
]


def test_an_image_signed_by_the_key_is_accepted(signed: Path, run: RunDir) -> None:
    check_image(site(signed, "signed.sif", str(signed / "pem.pub")))
    done = in_the_job(run, signed / "signed.sif", str(signed / "pem.pub"))
    assert done.returncode == 42 and "AFINA_IMAGE_KEY" not in done.stderr


@pytest.mark.parametrize(("name", "key", "why"), REFUSED)
def test_anything_else_is_refused(signed: Path, run: RunDir, name: str, key: str, why: str) -> None:
    with pytest.raises(SiteError) as caught:
        check_image(site(signed, name, str(signed / key)))
    done = in_the_job(run, signed / name, str(signed / key))
    assert done.returncode == caught.value.exit_code == 3
    expected = f"AFINA_IMAGE={signed / name} is not the image that AFINA_IMAGE_KEY={signed / key} signed: "
    for text in (str(caught.value), done.stderr):
        assert expected in text and why in text and "remedy: fetch the image again" in text
    assert not (run.attempts / "1.0").exists()


def test_without_a_key_any_image_is_accepted(signed: Path, run: RunDir) -> None:
    check_image(site(signed, "altered.sif", "").model_copy(update={"image_key": None}))
    assert in_the_job(run, signed / "altered.sif", "").returncode == 42


def test_a_pgp_fingerprint(signed: Path, run: RunDir, fingerprint: str) -> None:
    low, spaced = fingerprint.lower(), " ".join(fingerprint[i : i + 4] for i in range(0, 40, 4))
    check_image(site(signed, "pgp.sif", low))
    for key in (low, fingerprint, spaced, f"0x{fingerprint}"):
        assert in_the_job(run, signed / "pgp.sif", key).returncode == 42
    stranger = low[:-1] + ("0" if low[-1] != "0" else "1")
    cases = [
        ("pgp.sif", stranger, f"signed by {low}"),
        ("unsigned.sif", low, "signature not found"),
        ("signed.sif", low, "key material not provided"),
        ("pgp.sif", str(signed / "pem.pub"), "key material not provided"),
    ]
    for name, key, why in cases:
        with pytest.raises(SiteError) as caught:
            check_image(site(signed, name, key))
        done = in_the_job(run, signed / name, key)
        assert why in caught.value.message and why in done.stderr and done.returncode == 3, (name, key)


def test_submitits_script_begins_with_the_one_that_checks(
    signed: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "srun"):
        program(tmp_path, name, "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = RunDir(tmp_path / "it's a run")
    asked = plan.model_copy(update={"site": site(signed, "signed.sif", str(signed / "pem.pub"))})
    lines = submitit_script(asked, run).splitlines()
    line = f". {shlex.quote(str(run.path / 'finetune.sbatch'))} {shlex.quote(str(run.path))}"
    assert lines.index(line) < next(
        i
        for i, text in enumerate(lines)
        if "submitit.core._submit" in text and "afina_result" not in text and "PYTHONSAFEPATH" not in text
    )


@pytest.mark.parametrize("command", [["train"], ["submit"], ["submit", "--via", "sbatch"]])
def test_nothing_is_prepared_claimed_or_queued(signed: Path, plan: Plan, tmp_path: Path, command: list[str]) -> None:
    programs = tmp_path / "bin"
    for name in ("sbatch", "srun"):
        program(programs, name, f'[ "$1" = --version ] || touch "{programs}/called"\n')
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {
        "AFINA_SCRATCH": str(scratch),
        "AFINA_IMAGE": str(signed / "unsigned.sif"),
        "AFINA_IMAGE_KEY": str(signed / "pem.pub"),
    }
    env["PATH"] = f"{programs}:{os.environ['PATH']}"
    argv = [sys.executable, "-m", "afina", *command, str(plan.recipe_file)]
    done = subprocess.run(argv, env={**os.environ, **env}, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "signature not found" in done.stderr, done.stdout + done.stderr
    assert not (programs / "called").exists() and list(scratch.iterdir()) == []
