"""The inputs of an image build, without a build: the locks, the translation of pip's settings, refused options."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.common import ROOT, program

CONTAINER = ROOT / "container"
LOCKS = (CONTAINER / "requirements.txt", ROOT / "tests" / "requirements.txt")


def call(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with nothing of the caller's pip configuration but what is named."""
    kept = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        [str(part) for part in command],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_locks_belong_to_pyproject() -> None:
    done = call(CONTAINER / "lock.sh", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.parent.name)
def test_every_requirement_is_pinned_and_hashed(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    requirements = re.split(r"\n(?=[a-z])", text)[1:]
    assert len(requirements) > 50
    for requirement in requirements:
        assert re.match(r"[a-z0-9-]+==[\w.]+( ; [^\n\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n?$", requirement), (
            requirement[:200]
        )
    assert "://" not in text
    assert not re.search(r"^(torch|triton|nvidia-.*|cuda-.*)==", text, re.M)


def test_both_locks_agree() -> None:
    inside, outside = (
        {
            name: set(re.findall(rf"^{name}==([\w.]+)", text, re.M))
            for name in re.findall(r"^([a-z0-9-]+)==", text, re.M)
        }
        for text in (lock.read_text(encoding="utf-8") for lock in LOCKS)
    )
    shared = inside.keys() & outside.keys()
    assert len(shared) > 50
    assert {name: inside[name] for name in shared} == {name: outside[name] for name in shared}


def test_pip_settings_reach_the_image(tmp_path: Path) -> None:
    wheels, index, stage = tmp_path / "my wheels", tmp_path / "local" / "simple", tmp_path / "stage"
    for folder in (wheels, index, stage):
        folder.mkdir(parents=True)
    authorities = tmp_path / "authorities.pem"
    authorities.write_text("authorities\n")
    done = call(
        sys.executable, CONTAINER / "pip_settings.py", "stage", stage,
        PIP_INDEX_URL="https://reader:it's@index.invalid/simple", PIP_EXTRA_INDEX_URL=f"file://{index} https://b.invalid/simple",
        PIP_FIND_LINKS=f"{tmp_path / 'gone'} {index}", PIP_DEFAULT_TIMEOUT="180", PIP_CONSTRAINT="constraints.txt",
        SSL_CERT_FILE=str(authorities), https_proxy="http://a b:$(x)@proxy.invalid:3128",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{index.parent}:/mnt/folder0:ro", f"{index}:/mnt/folder1:ro"]
    assert sorted(path.name for path in stage.iterdir()) == [
        "apt.conf",
        "ca.pem",
        "env",
        "folder0",
        "folder1",
        "pip.conf",
    ]
    assert (stage / "ca.pem").read_text() == "authorities\n"

    # Read back by pip itself and by a shell, as %post does.
    seen = call(
        sys.executable,
        "-m",
        "pip",
        "config",
        "list",
        PIP_CONFIG_FILE=str(stage / "pip.conf"),
        XDG_CONFIG_DIRS=str(tmp_path / "none"),
    ).stdout
    assert {line for line in seen.splitlines() if line.startswith("global.")} == {
        'global.index-url="https://reader:it\'s@index.invalid/simple"',
        r"global.extra-index-url='file:///mnt/folder0/simple\nhttps://b.invalid/simple'",
        "global.find-links='/mnt/folder1'",
        "global.timeout='180'",
        "global.cert='/mnt/ca.pem'",
    }
    sourced = call("sh", "-c", f'. "{stage}/env"; printf "%s\\n%s" "$https_proxy" "$SSL_CERT_FILE"').stdout
    assert sourced == "http://a b:$(x)@proxy.invalid:3128\n/mnt/ca.pem"


def test_pip_settings_reach_uv(tmp_path: Path) -> None:
    authorities = tmp_path / "authorities.pem"
    authorities.touch()
    done = call(
        sys.executable, CONTAINER / "pip_settings.py", "uv",
        PIP_INDEX_URL="https://index.invalid/simple", PIP_EXTRA_INDEX_URL="https://b.invalid/simple", PIP_CERT=str(authorities),
    )  # fmt: skip
    assert done.stdout == f"UV_DEFAULT_INDEX=https://index.invalid/simple\0SSL_CERT_FILE={authorities}\0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpus"], "unknown option --cpus"),
        (["--output"], "--output needs a value"),
        (["--output", "/nowhere/afina.sif"], "cannot write in /nowhere"),
        (["--compress", "xz"], "gzip, gzip:1 to gzip:9"),
        (["--compress", "gzip:10"], "gzip, gzip:1 to gzip:9"),
        (["--compression", "zstd:23"], "gzip, gzip:1 to gzip:9"),
        (["--sign", "/no/such.pem"], "no such key file"),
        (["--update", "nothing.sif"], "does not exist"),
        (["--torch-wheels", "."], "no torch-*.whl in"),
        (["--cpu"], "--torch-index"),
        (["--push", "registry.example.org/afina:1"], "oras://HOST/NAME:TAG"),
        (["--push", "oras://r.example.org/afina@sha256:0"], "oras://HOST/NAME:TAG"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_build_refuses(options: list[str], message: str, tmp_path: Path) -> None:
    # Every refusal comes before the build: this apptainer must not be called.
    program(tmp_path, "apptainer", "echo reached\nexit 9\n")
    where = ["--output", tmp_path / "afina.sif"] if "--output" not in options else []
    done = call(CONTAINER / "build.sh", *where, *options, PATH=f"{tmp_path}:{os.environ['PATH']}", TMPDIR=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "reached" not in done.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"apptainer", f"apptainer-cache-{os.getuid()}"}


def test_a_push_without_afinas_packages_is_refused_before_the_build(tmp_path: Path) -> None:
    program(tmp_path, "apptainer", "echo reached\nexit 9\n")
    program(tmp_path, "python3", "exit 1\n")
    argv = [CONTAINER / "build.sh", "--output", tmp_path / "afina.sif", "--push", "oras://r.example.org/afina:1"]
    done = call(*argv, PATH=f"{tmp_path}:{os.environ['PATH']}", TMPDIR=str(tmp_path))
    assert done.returncode == 3 and "afina image push IMAGE ADDRESS" in done.stderr and "reached" not in done.stdout


def test_a_disk_that_cannot_hold_a_build_is_refused(tmp_path: Path) -> None:
    for name, text in {
        "apptainer": "exit 9",
        "stat": 'if [ "$1" = --file-system ]; then echo lustre; else exec /usr/bin/stat "$@"; fi',
    }.items():
        program(tmp_path, name, f"{text}\n")
    argv = [CONTAINER / "build.sh", "--output", tmp_path / "afina.sif"]
    done = call(*argv, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_TMPDIR=str(tmp_path), TMPDIR="/nowhere")
    assert done.returncode == 3 and f"{tmp_path} is on lustre" in done.stderr


# -- contents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cuda", "same"), [("None", []), ("'13.0'", ["cuda130", "cuda132"]), ("'12.8'", ["cuda128"])])
def test_suites_of_tests_and_libraries_for_other_gpus_are_pruned(tmp_path: Path, cuda: str, same: list[str]) -> None:
    libraries = [
        f"bitsandbytes/libbitsandbytes_{n}.so"
        for n in ("cuda118", "cuda128", "cuda130", "cuda132", "rocm71", "xpu2026")
    ]
    kept = [
        *(name for name in libraries if any(one in name for one in same)),
        "bitsandbytes/libbitsandbytes_cpu.so",
        "torch/version.py",
        "numpy/testing/utils.py",
        "torch/testing/__init__.py",
        "package/test/data.txt",
        "tests/test_top.py",
        "a/latest/test_x.py",
    ]
    gone = [name for name in libraries if name not in kept]
    gone += ["numpy/tests/test_a.py", "scipy/stats/tests/data/test_b.csv", "torch/test/binary", "x/test/deep/test_c.py"]
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "torch/version.py").write_text(
        f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
    )
    done = call("sh", CONTAINER / "prune.sh", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
