from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.common import NASTY, ROOT, program
from tests.unit.conftest import sif_bytes
from tests.unit.site.site_files import env, refused, written

from afina.errors import SiteError
from afina.site.settings import CACHE_VARIABLES, Site, cache_environment, find_site_file, load_site, without_isolation

# -- without a file ----------------------------------------------------------------------------------------------------


def test_the_environment_is_the_site_where_there_is_no_file(scratch: Path) -> None:
    site = load_site(env=env(AFINA_SCRATCH=scratch, SBATCH_ACCOUNT="proj x", AFINA_BIND="/a:/b:ro,/c"))
    assert site == Site(scratch=scratch, binds=("/a:/b:ro", "/c"), sbatch={"SBATCH_ACCOUNT": "proj x"})
    assert (site.cache, site.prepared, site.runs) == (scratch / "cache", scratch / "prepared", scratch / "runs")


def test_json_both_ways(scratch: Path, sif: Path) -> None:
    site = load_site(env=env(AFINA_SCRATCH=scratch, AFINA_IMAGE=sif, SBATCH_QOS="é\n"))
    assert site.runtime == "apptainer" and Site.model_validate_json(site.model_dump_json()) == site


def test_nasty_scratch(tmp_path: Path, nasty: str) -> None:
    folder = tmp_path / nasty
    folder.mkdir()
    assert load_site(env=env(AFINA_SCRATCH=folder)).scratch == folder


# -- the file is bash --------------------------------------------------------------------------------------------------


def test_defaults_that_the_environment_wins_over(tmp_path: Path, scratch: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = f': "${{AFINA_SCRATCH:={other}}}"\nSBATCH_PARTITION=gpu\n'
    file = written(tmp_path / "s", text)
    assert load_site(file, env()).scratch == other
    assert load_site(file, env(AFINA_SCRATCH=scratch)).scratch == scratch


def test_functions_quotes_spaces_and_line_breaks(tmp_path: Path, scratch: Path) -> None:
    file = written(
        tmp_path / "it's a site",
        """\
# a comment
module() { if [ "$2" = apptainer ]; then export LOADED="$1 $2"; fi; }
module load apptainer
AFINA_SCRATCH="$MY_SCRATCH"
export SBATCH_COMMENT='two
lines and a "quote"'
SBATCH_ACCOUNT=$(printf 'from %s' 'a command')
declare NCCL_SOCKET_IFNAME=ib0
lower=1
echo AFINA_SCRATCH=/not/this
printf 'SBATCH_EVIL=1\\0'
""",
    )
    site = load_site(file, env(MY_SCRATCH=scratch))
    assert site.scratch == scratch and site.file == file
    assert site.sbatch == {"SBATCH_COMMENT": 'two\nlines and a "quote"', "SBATCH_ACCOUNT": "from a command"}
    assert site.setup == ("LOADED", "NCCL_SOCKET_IFNAME", "lower")


def test_values_of_setup_are_not_kept(tmp_path: Path, scratch: Path) -> None:
    file = written(tmp_path, "AFINA_SCRATCH=$S; HF_TOKEN=hf_secret\n")
    site = load_site(file, env(S=scratch))
    assert site.setup == ("HF_TOKEN",) and "hf_secret" not in site.model_dump_json()


def test_the_file_does_not_read_our_standard_input(tmp_path: Path, scratch: Path) -> None:
    file = written(tmp_path, "read -r line || true\nAFINA_SCRATCH=$S\n")
    assert load_site(file, env(S=scratch)).scratch == scratch


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("exit 3\n", "it ended bash with exit code 3"),
        ("exit 0\n", "it calls `exit`"),
        ("AFINA_SCRATCH=/tmp\nfalse\n", "its last command failed"),
        ("set -e\nls /not/there\n", "its last command failed: ls: "),
        ("set -u\n: $NOT_SET_ANYWHERE\n", "NOT_SET_ANYWHERE: unbound variable"),
        ("if then\n", "syntax error"),
        ("no_such_command_anywhere\n", "no_such_command_anywhere: command not found"),
        ("echo 'the module is gone' >&2; return 4\n", "its last command failed: the module is gone"),
    ],
)
def test_files_that_fail(tmp_path: Path, text: str, what: str) -> None:
    file = written(tmp_path / "it's", text)
    error = refused(file)
    assert error.message.startswith(f"site file {file}: ") and what in error.message
    if "bash -xc" in error.remedy:  # the remedy is a command that can be pasted
        command = error.remedy.removeprefix("try: ")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert "No such file" not in done.stderr or "not/there" in done.stderr


def test_unknown_variables_name_the_nearest(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "AFINA_SCRACH=/tmp\n"))
    assert "unknown variable AFINA_SCRACH" in error.message and "did you mean `AFINA_SCRATCH`?" in error.remedy
    error = refused(written(tmp_path, "AFINA_ZZZZ=1\n"))
    assert "known: AFINA_SCRATCH, AFINA_IMAGE" in error.remedy


def test_variables_that_would_change_a_submission(tmp_path: Path, scratch: Path) -> None:
    """Inherited they are left out; a site file is told."""
    given = env(AFINA_SCRATCH=scratch, SBATCH_EXPORT="NONE", SBATCH_ARRAY_INX="1-9", SBATCH_QOS="q")
    assert load_site(env=given).sbatch == {"SBATCH_QOS": "q"}
    error = refused(written(tmp_path, "SBATCH_SIGNAL=B:USR1@9\n"), AFINA_SCRATCH=scratch)
    assert error.message == "SBATCH_SIGNAL cannot be set by the site"
    assert (
        "SBATCH_COMMENT holds bytes that are not UTF-8"
        in refused(AFINA_SCRATCH=scratch, SBATCH_COMMENT="\udce9").message
    )


def test_settings_that_isolate_a_container_are_left_out_everywhere() -> None:
    """The lists of node.sh, of the batch script and of Python are one list."""
    names = "CLEANENV CONTAIN CONTAINALL COMPAT NO_MOUNT HOME PWD CWD WORKDIR SCRATCH PID NET"
    for script in ("node.sh", "finetune.sbatch"):
        assert f" in {names}; do unset" in (ROOT / "slurm" / script).read_text(), script
    given = {f"{runtime}_{name}": "1" for runtime in ("APPTAINER", "SINGULARITY") for name in names.split()}
    kept = {"APPTAINER_BIND": "/a", "APPTAINERENV_X": "1", "PATH": "/bin"}
    assert without_isolation(given | kept) == kept


def test_the_example_loads(scratch: Path, sif: Path) -> None:
    file = ROOT / "slurm/site.example.env"
    site = load_site(file, env(AFINA_SCRATCH=scratch, AFINA_IMAGE=sif))
    assert (site.scratch, site.image, site.sbatch, site.setup) == (scratch, sif, {}, ())


# -- the key of the image ----------------------------------------------------------------------------------------------

FINGERPRINT = "8115a56a6a9775aa2a8bd22621007ed762ca3c2d"


def test_no_key_by_default(scratch: Path, sif: Path) -> None:
    assert load_site(env=env(AFINA_SCRATCH=scratch, AFINA_IMAGE=sif)).image_key is None
    assert load_site(env=env(AFINA_SCRATCH=scratch, AFINA_IMAGE=sif, AFINA_IMAGE_KEY="")).image_key is None


@pytest.mark.parametrize(
    "written",
    [FINGERPRINT, FINGERPRINT.upper(), f"0x{FINGERPRINT}", "8115 A56A 6A97 75AA 2A8B  D226 2100 7ED7 62CA 3C2D"],
)
def test_a_fingerprint_in_any_spelling(scratch: Path, sif: Path, written: str) -> None:
    site = load_site(env=env(AFINA_SCRATCH=scratch, AFINA_IMAGE=sif, AFINA_IMAGE_KEY=written))
    assert site.image_key == FINGERPRINT


def test_a_key_file(tmp_path: Path, scratch: Path, sif: Path, nasty: str) -> None:
    key = tmp_path / f"{nasty}.pem"
    key.write_text("-----BEGIN PUBLIC KEY-----\n")
    assert load_site(env=env(AFINA_SCRATCH=scratch, AFINA_IMAGE=sif, AFINA_IMAGE_KEY=key)).image_key == str(key)
    Path("here.pem").write_text("")
    relative = load_site(env=env(AFINA_SCRATCH=scratch, AFINA_IMAGE=sif, AFINA_IMAGE_KEY="here.pem"))
    assert relative.image_key == str(Path.cwd() / "here.pem")


@pytest.mark.parametrize("written", ["/no/such.pem", FINGERPRINT[:16], "/", FINGERPRINT + "0"])
def test_neither_a_key_nor_a_fingerprint(scratch: Path, sif: Path, written: str) -> None:
    error = refused(AFINA_SCRATCH=scratch, AFINA_IMAGE=sif, AFINA_IMAGE_KEY=written)
    assert error.message.startswith(f"AFINA_IMAGE_KEY={written} is neither a key file") and "PEM" in error.remedy


def test_in_the_job_the_key_need_not_be_seen(scratch: Path) -> None:
    given = env(
        AFINA_SCRATCH=scratch, AFINA_IMAGE="/i.sif", AFINA_IMAGE_KEY="/host/only.pem", APPTAINER_CONTAINER="/i.sif"
    )
    assert load_site(env=given, job=True).image_key == "/host/only.pem"


# -- which file --------------------------------------------------------------------------------------------------------


def test_precedence(tmp_path: Path) -> None:
    home = Path(os.environ["HOME"])
    assert find_site_file() is None
    config = written(home / ".config/afina", "")
    assert find_site_file() == config
    here = written(Path("slurm"), "").absolute()
    assert find_site_file() == here
    named = written(tmp_path / "named", "")
    assert find_site_file(env=env(AFINA_SITE=named)) == named
    given = written(tmp_path / "given", "")
    assert find_site_file(given, env(AFINA_SITE=named)) == given
    assert find_site_file(env=env(AFINA_SITE="")) == here


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    for named in (tmp_path / "absent.env", tmp_path):
        assert "no such file" in refused(named).message
        assert "no such file" in refused(AFINA_SITE=named).message


# -- image and runtime -------------------------------------------------------------------------------------------------


def test_images(tmp_path: Path, scratch: Path, sif: Path) -> None:
    def with_image(path: Path) -> SiteError:
        return refused(AFINA_SCRATCH=scratch, AFINA_IMAGE=path)

    assert load_site(env=env(AFINA_SCRATCH=scratch, AFINA_IMAGE=sif)).image == sif
    sandbox = tmp_path / "sandbox"
    sandbox.mkdir()
    assert load_site(env=env(AFINA_SCRATCH=scratch, AFINA_IMAGE=sandbox)).image == sandbox
    assert "no such image" in with_image(tmp_path / "absent.sif").message
    other = tmp_path / "other.sif"
    for content in (b"", b"hello", b"\0" * 4096, b"hsqs" + bytes(4096), b"<html>404 run-singularity</html>" * 20):
        other.write_bytes(content)
        assert "is not an Apptainer image (SIF)" in with_image(other).message
    other.write_bytes(sif_bytes()[:-1])
    error = with_image(other)
    assert "is cut off: 639 of 640 bytes are there" in error.message and "copy or build it again" in error.remedy


def test_the_image_is_absolute(scratch: Path) -> None:
    Path("here.sif").write_bytes(sif_bytes())
    assert load_site(env=env(AFINA_SCRATCH=scratch, AFINA_IMAGE="here.sif")).image == Path("here.sif").absolute()


def test_runtimes(tmp_path: Path, scratch: Path, sif: Path) -> None:
    base = {"AFINA_SCRATCH": scratch, "AFINA_IMAGE": sif}
    assert load_site(env=env(AFINA_SCRATCH=scratch)).runtime == "none"
    for runtime in ("apptainer", "singularity", "none"):
        assert load_site(env=env(**base, AFINA_RUNTIME=runtime)).runtime == runtime
    error = refused(**base, AFINA_RUNTIME="docker")
    assert "AFINA_RUNTIME=docker is not known" in error.message and "apptainer, singularity" in error.remedy
    program(tmp_path / "bin", "singularity", "exit 0\n")
    bash = program(tmp_path / "bin", "bash", 'exec /bin/bash "$@"\n')
    assert load_site(env=env(**base, PATH=bash.parent)).runtime == "singularity"
    program(tmp_path / "bin", "apptainer", "exit 0\n")
    assert load_site(env=env(**base, PATH=bash.parent)).runtime == "apptainer"


def test_inside_a_container_there_is_no_further_one(tmp_path: Path, scratch: Path) -> None:
    inside = {"AFINA_SCRATCH": scratch, "AFINA_IMAGE": tmp_path / "not visible here.sif", "APPTAINER_CONTAINER": "/x"}
    assert load_site(env=env(**inside)).runtime == "none"
    assert load_site(env=env(**inside, AFINA_RUNTIME="apptainer")).runtime == "none"
    job = load_site(env=env(**inside), job=True)
    assert (job.runtime, job.image) == ("apptainer", tmp_path / "not visible here.sif")
    # `module load` of a site file means nothing in there.
    written(Path("slurm"), "exit 9\n")
    assert load_site(env=env(**inside)).file is None


# -- caches ------------------------------------------------------------------------------------------------------------


def test_caches_go_to_scratch_unless_they_were_placed(site: Site) -> None:
    moved = cache_environment(site, {})
    assert set(moved) == set(CACHE_VARIABLES)
    assert all(Path(v).is_relative_to(site.scratch / "cache") for v in moved.values())
    assert cache_environment(site, {"HF_HOME": "/group/hf"})["HF_HOME"] == "/group/hf"
    assert not site.cache.exists()


def test_nasty_names_are_nasty() -> None:
    assert len(set(NASTY)) == len(NASTY) and all("/" not in n and "\0" not in n for n in NASTY)


# -- what clusters want and do not want --------------------------------------------------------------------------------


def test_variants_are_read(tmp_path: Path, scratch: Path) -> None:
    text = """\
AFINA_SCRATCH="$S"
AFINA_GPU_REQUEST=gres:a100_3g.20gb
AFINA_SBATCH_EXTRA="
  --constraint=a100&ib
  --comment=two words, it's \\$(not run)
--exclusive"
AFINA_SBATCH_OMIT='requeue, --mem'
AFINA_STAGE=1
"""
    site = load_site(written(tmp_path, text), env(S=scratch))
    assert site.gpu_request == "gres:a100_3g.20gb" and site.stage == "1" and site.sbatch_omit == ("requeue", "mem")
    assert site.sbatch_extra == ("--constraint=a100&ib", "--comment=two words, it's $(not run)", "--exclusive")
    assert Site.model_validate_json(site.model_dump_json()) == site
    plain = load_site(env=env(AFINA_SCRATCH=scratch, AFINA_STAGE="0", AFINA_SBATCH_EXTRA="\n"))
    assert (plain.gpu_request, plain.sbatch_extra, plain.sbatch_omit, plain.stage) == ("gpus-per-node", (), (), None)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("AFINA_GPU_REQUEST", "gpu:2", "one of: gpus-per-node"),
        ("AFINA_GPU_REQUEST", "gres:a100:2", "one of: gpus-per-node"),
        ("AFINA_GPU_REQUEST", "none:a100", "one of: gpus-per-node"),
        ("AFINA_SBATCH_EXTRA", "-A project", "in its long form"),
        ("AFINA_SBATCH_EXTRA", "--account project", "in its long form"),
        ("AFINA_SBATCH_EXTRA", "--qos=a\n--time=10", "resources.time"),
        ("AFINA_SBATCH_EXTRA", "--gpus-per-node=2", "AFINA_GPU_REQUEST"),
        ("AFINA_SBATCH_EXTRA", "--export=NONE", "the environment of its submission"),
        ("AFINA_SBATCH_OMIT", "requeu", "did you mean `requeue`?"),
        ("AFINA_SBATCH_OMIT", "gpus-per-node", "AFINA_GPU_REQUEST=none"),
        ("AFINA_SBATCH_OMIT", "nodes", "these can: job-name"),
        ("AFINA_STAGE", "yes", "$SLURM_TMPDIR"),
        ("AFINA_STAGE", "/a,b", "no comma"),
    ],
)
def test_variants_that_are_refused(scratch: Path, name: str, value: str, what: str) -> None:
    error = refused(AFINA_SCRATCH=scratch, **{name: value})
    assert name in error.message and what in error.remedy


@pytest.mark.parametrize("name", ["csc-roihu", "mila", "alliance-canada"])
def test_the_sites_that_are_only_read_about_load_and_say_so(name: str, tmp_path: Path, sif: Path) -> None:
    file = ROOT / f"slurm/sites/{name}.env"
    text = file.read_text()
    assert "Untested: " in text and "https://github.com/" in text and "read 20" in text
    asked = {"AFINA_SCRATCH": tmp_path, "AFINA_IMAGE": sif, "USER": "someone"}
    site = load_site(file, env(**asked))
    assert site.gpu_request.startswith("gres") and site.setup == ()
    assert load_site(file, env(**asked, SLURM_TMPDIR="/local")).stage == "1"


def test_every_site_is_tested() -> None:
    assert {path.stem for path in (ROOT / "slurm/sites").glob("*")} == {"csc-roihu", "mila", "alliance-canada"}
