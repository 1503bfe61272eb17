"""Project folders of the cluster's ordinary user: site.env, a tiny model, reviews, a recipe; scratch below."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster import Cluster
from tests.common import ROOT, program
from tests.processes import wait_until

from afina.recipe.schema import Recipe
from afina.run.commands import job_scripts, sbatch_argv
from afina.run.new_run import claim
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site

__all__ = ["LOST", "ScriptedRun", "give_to_user", "host_programs", "project_folder", "write_recipe"]


def give_to_user(path: Path, cluster: Cluster) -> None:
    """Let the ordinary user own `path` and everything in it."""
    for name in (path, *path.rglob("*")):
        shutil.chown(name, cluster.user, cluster.user)


@contextlib.contextmanager
def host_programs() -> Iterator[Path]:
    """`bin` of a virtual environment that the ordinary user can read, with afina's host side only: as on a login node.

    Half a minute of one core: the processes of a test session share it, and the last one removes it.
    """
    folder = Path(f"/tmp/afina-host-{os.environ.get('PYTEST_XDIST_TESTRUNUID') or os.getpid()}")
    folder.mkdir(mode=0o755, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not (folder / "complete").exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "complete").exists():
                _install_host_side(folder)
                (folder / "complete").touch()
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield folder / "venv/bin"
    finally:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        os.close(lock)


def _install_host_side(folder: Path) -> None:
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--clear", str(folder / "venv")], check=True)
    lock = (ROOT / "tests/requirements.txt").read_text()
    (folder / "constraints.txt").write_text("\n".join(re.findall(r"^[A-Za-z0-9._-]+==[^\\\n]+", lock, re.M)))
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "Apptainer.def", "container", "docs", "src", "slurm"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    pip = [str(folder / "venv/bin/pip"), "install", "--quiet", "-c", str(folder / "constraints.txt"), str(source)]
    subprocess.run(pip, check=True)


def write_recipe(folder: Path, name: str, **resources: Any) -> Recipe:
    """Two reviews in `folder`, and a recipe for them whose model is never loaded; resources beside one core and five minutes."""
    (folder / "reviews.csv").write_text("text,stars\ngood,5\nbad,1\n")
    part = {"fraction": 0.5, "seed": 1}
    data = {
        "files": {"all": str(folder / "reviews.csv")},
        "text": "text",
        "label": "stars",
        "train": part,
        "eval": part,
    }
    resources = {"cpus_per_gpu": 1, "time": 5, **resources}
    return Recipe.model_validate({"name": name, "model": "owner/model", "data": data, "resources": resources})


@contextlib.contextmanager
def project_folder(
    cluster: Cluster, prefix: str, image: Path | None = None, recipe: dict[str, Any] | None = None
) -> Iterator[Path]:
    """An empty project folder in /tmp; pytest's own folders are readable by root only. Removed at the end.

    Args:
        prefix: of the folder's name.
        image: with it the folder has a site.env.
        recipe: with it the folder has recipe.yaml.
    """
    path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    (path / "scratch").mkdir()
    if image:
        (path / "slurm").mkdir()
        scratch, sif = shlex.quote(str(path / "scratch")), shlex.quote(str(image))
        (path / "slurm/site.env").write_text(f"AFINA_SCRATCH={scratch}\nAFINA_IMAGE={sif}\n")
    if recipe:
        (path / "recipe.yaml").write_text(json.dumps(recipe))
    give_to_user(path, cluster)
    try:
        yield path
    finally:
        shutil.rmtree(path)


#: `bash worker.sh COMMAND RUN …`. A node with a file `bad.NODE` in the run reports that it is broken; the others finish.
WORKER = """
folder="$2/attempts/$AFINA_ATTEMPT"
case $1 in
  launch)
    env -0 >"$2/env.$AFINA_ATTEMPT.$SLURM_NODEID"
    echo {} >"$folder/node$SLURM_NODEID.json"
    if [ -e "$2/bad.$SLURMD_NODENAME" ]; then
      printf '{"exit_code": 3, "failure": {"kind": "EnvironmentProblem", "message": "%s: no driver", "cause": "node", "nodes": ["%s"]}}' \
        "$SLURMD_NODENAME" "$SLURMD_NODENAME" >"$folder/failed.node$SLURM_NODEID.json"
      exit 3
    fi
    eval "${BODY:-:}"
    echo '{"outcome": "finished", "exit_code": 0, "attempt": "'"$AFINA_ATTEMPT"'"}' >"$2/outcome.json"
    echo 0 >"$folder/exit"
    ;;
  finish) exec "$PYTHON" -m afina.worker finish "$2" "$3" "$4" ;;
esac
"""


LOST = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2\nexit 1\n'


class ScriptedRun:
    """A claimed run of the ordinary user, whose worker is a script; a site and resources as they are given."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        python: Path,
        site: dict[str, Any],
        worker: str = WORKER,
        **resources: Any,
    ) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "scratch/runs").mkdir(parents=True)
        (folder / "worker.sh").write_text(worker)
        recipe = write_recipe(folder, "other", **{"gpus_per_node": 0, **resources})
        self.plan: Plan = make_plan(recipe, Site(scratch=folder / "scratch", **site))
        self.env = {"AFINA_SCRATCH": str(folder / "scratch"), "AFINA_RUNTIME": "none", "PYTHON": str(python)}
        self.claim(["bash", str(folder / "worker.sh"), "launch", "{run}"])

    def claim(self, argv: list[str]) -> None:
        shutil.rmtree(self.folder / "scratch/runs/it's 1", ignore_errors=True)
        self.run = claim(self.plan, {}, argv, "", self.folder / "scratch/runs/it's 1", scripts=job_scripts())
        give_to_user(self.folder, self.cluster)

    def submit(self, *options: str, **env: str) -> int:
        argv = sbatch_argv(self.plan, self.run.path)
        argv = [*argv[:-2], *options, *argv[-2:]]  # after the plan's own: the last one counts
        given = {**self.env, **env}
        return int(self.cluster.run_as_user(argv, env=given, cwd=self.folder, check=True).stdout.split(";")[0])

    def lose_answers(self) -> None:
        """From now on sbatch's answer is lost here; its jobs are queued, and held."""
        program(self.folder / "bin", "sbatch", f'/usr/bin/sbatch --hold "$@" >/dev/null\n{LOST}')

    def run_slurm_as_user(self) -> None:
        """From now on Slurm's commands of this process are the ordinary user's: root has no limits."""
        for name in ("sbatch", "squeue", "scancel"):
            user = f"setpriv --reuid {self.cluster.user} --regid {self.cluster.user} --init-groups"
            program(self.folder / "bin", name, f'exec {user} /usr/bin/{name} "$@"\n')

    def jobs(self) -> list[int]:
        return [int(line["job_id"].partition(";")[0]) for line in self.run.lines("submissions.jsonl")]

    def next_job(self, known: int) -> int:
        wait_until(lambda: len(self.jobs()) > known, failure=self.logs)
        return self.jobs()[known]

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.run.path.glob("slurm-*.out")))

    def environment(self, job: int, restart: int = 0, node: int = 0) -> dict[str, str]:
        text = (self.run.path / f"env.{job}.{restart}.{node}").read_text(errors="replace")
        return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)
