"""AFINA_IMAGE_KEY in the batch scripts: one check, in job.sh. A fake `apptainer` answers; real ones: tests/apptainer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.common import ROOT, program

from afina.errors import SiteError
from afina.site.image import check_image
from afina.site.settings import Site

FINGERPRINT = "8115a56a6a9775aa2a8bd22621007ed762ca3c2d"
SIGNED = f'{{"SignerKeys": [{{"Signer": {{\n"Fingerprint": "{FINGERPRINT.upper()}",\n"DataCheck": true}}}}]}}'
SCRIPTS = ("finetune.sbatch", "predict.sbatch")


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`apptainer verify` prints the file `answer` and ends with the code in the file `code`."""
    program(tmp_path / "bin", "apptainer", f'cat "{tmp_path}/answer"\nexit "$(cat "{tmp_path}/code")"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def run(script: str, folder: Path, key: str, *, here: Path) -> subprocess.CompletedProcess[str]:
    """A batch script whose worker prints `started`, if it comes to that."""
    node = folder / "node.sh"
    node.write_text('echo "started ${SLURM_CPU_BIND-clean}" >&2; exit 9\n')
    words = ["bash", str(node), str(folder / "i.sif"), "apptainer", "exec", str(folder)]
    (folder / "worker.argv").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))
    (folder / "plan.json").touch()
    program(folder.parent / "bin", "srun", 'while [ "$1" != bash ]; do shift; done\n"$@"\n')
    env = {
        **os.environ,
        "SLURM_JOB_ID": "1",
        "AFINA_SCRATCH": str(folder),
        "AFINA_IMAGE_KEY": key,
        "SLURM_CPU_BIND": "x",
    }
    argv = ["bash", str(ROOT / "slurm" / script), str(folder), *(["1"] if script == "predict.sbatch" else [])]
    return subprocess.run(argv, env=env, cwd=here, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("key", "code", "answer", "why"),
    [
        ("/key.pem", 0, "", None),
        ("/key.pem", 255, "INFO: x\nFATAL: not signed", "not signed"),
        (FINGERPRINT, 0, SIGNED, None),
        (f"0x{FINGERPRINT.upper()}", 0, SIGNED, None),
        (FINGERPRINT, 0, SIGNED.replace("8", "9"), "signed by 9115a56a"),
        (FINGERPRINT, 0, SIGNED + SIGNED.replace("8", "9"), f"signed by {FINGERPRINT} 9115a56a"),
        (FINGERPRINT, 0, "{}", "signed by an unknown key"),
        (FINGERPRINT, 255, "FATAL: altered", "altered"),
    ],
)
def test_an_image_starts_only_if_the_key_signed_it(
    script: str, key: str, code: int, answer: str, why: str | None, apptainer: Path, tmp_path: Path
) -> None:
    (tmp_path / "answer").write_text(answer)
    (tmp_path / "code").write_text(str(code))
    folder = tmp_path / "it's a run"
    folder.mkdir()
    (folder / "job.sh").write_text((ROOT / "slurm/job.sh").read_text() + "afina_meet() { :; }\n")
    done = run(script, folder, key, here=tmp_path)
    log = done.stderr + "".join(path.read_text() for path in folder.rglob("*.log"))
    if why is None:
        assert "started clean" in log, "variables of a surrounding job are gone"
        assert "AFINA_IMAGE_KEY" not in log, done
    else:
        assert done.returncode == 3 and "started" not in log
        assert f"is not the image that AFINA_IMAGE_KEY={key} signed: " in log and why in log and "remedy: fetch" in log
        assert not (folder / "attempts").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_finds_no_check_starts_nothing(script: str, apptainer: Path, tmp_path: Path) -> None:
    """A run of an older afina, whose job.sh has no check, and a folder without any."""
    folder = tmp_path / "run"
    folder.mkdir()
    if script == "finetune.sbatch":
        (folder / "job.sh").write_text("afina_say() { :; }\n")
    done = run(script, folder, "/key.pem", here=tmp_path)
    assert done.returncode == 3 and "job.sh" in done.stderr and "remedy:" in done.stderr
    assert "started" not in done.stderr


def test_an_older_run_is_checked_by_the_script_of_the_checkout(apptainer: Path, tmp_path: Path) -> None:
    (tmp_path / "answer").write_text("FATAL: altered")
    (tmp_path / "code").write_text("255")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "job.sh").write_text("afina_say() { :; }\n")
    done = run("finetune.sbatch", folder, "/key.pem", here=ROOT)
    assert done.returncode == 3 and "signed: FATAL: altered" in done.stderr


def test_the_check_stands_once() -> None:
    scripts = [path.read_text() for path in (ROOT / "slurm").iterdir() if path.is_file()]
    assert sum(text.count("Fingerprint") for text in scripts) == 1


def test_python_decides_as_the_scripts_do(apptainer: Path, tmp_path: Path, site: Site) -> None:
    there = site.model_copy(update={"image": tmp_path / "i.sif", "image_key": FINGERPRINT, "runtime": "apptainer"})
    (tmp_path / "code").write_text("0")
    (tmp_path / "answer").write_text(SIGNED)
    check_image(there)
    (tmp_path / "answer").write_text(SIGNED.replace("8", "9"))
    with pytest.raises(SiteError, match="signed by 9115a56a"):
        check_image(there)
