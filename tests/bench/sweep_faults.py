"""A sweep under faults, on a real Slurm: a run is killed with its shell, a node fails, and one command repairs it.

    python tests/bench/sweep_faults.py --image /var/tmp/afina-test/afina.sif [--values 3] [--seeds 5] [--json FILE]

Brings up the test cluster of tests/slurm in a folder of its own and takes it down (root, see there); the jobs belong to an ordinary user
and run in the image. The faults strike once every running task has a checkpoint; then the same command runs once with `--wait`. Prints
what each fault hit, what was submitted again, from which step each run resumed, and the table. Reviews and model are those of
tests/tiny.py: the accuracies mean nothing for real data.

Both nodes are this machine: a node failure is SIGKILL to a node's slurmd and all its jobs, and slurmctld learns of it at once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/slurm")]  # its modules name each other without a package
from cluster import Cluster  # noqa: E402
from tests import tiny  # noqa: E402

VALUES = ("1e-2", "5e-3", "2e-3", "1e-3", "5e-4")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--image", type=Path, required=True, help="the test image, readable by an ordinary user")
    parser.add_argument("--values", type=int, default=3, choices=range(1, len(VALUES) + 1), help="learning rates")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--max-parallel", type=int, default=4, help="the cluster has four GPUs on two nodes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="afina-sweep-", dir="/tmp"))
    try:
        place.chmod(0o755)
        with Cluster(place / "slurm", accounting=False, requeue_delay_s=5, kill_wait_s=4) as cluster:
            found = strike(cluster, place, options)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if found["finished"] == found["runs"] else 1


def strike(cluster: Cluster, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    project, afina = make_project(cluster, place, options)
    grid = f"train.learning_rate={','.join(VALUES[: options.values])}"
    command = ["sweep", "recipe.yaml", "--grid", grid, "--seeds", str(options.seeds)]
    command += ["--max-parallel", str(options.max_parallel)]

    def run(*words: str) -> dict[str, Any]:
        done = cluster.run_as_user([afina, *words, "--json"], cwd=project, timeout=3600)
        if "{" not in done.stdout:
            raise RuntimeError(done.stdout + done.stderr + cluster.diagnose())
        value: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return value

    start = time.monotonic()
    first = run(*command)
    home = Path(first["sweep"])
    runs = [home / "runs" / cell["name"] for cell in json.loads((home / "sweep.json").read_text())["cells"]]
    jobs = [f"{first['jobs'][0]}_{task}" for task in range(len(runs))]
    print(f"{len(runs)} runs in array {first['jobs'][0]}, submitted after {time.monotonic() - start:.1f} s", flush=True)

    def running() -> list[int]:
        lines = cluster.root(["squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i"]).stdout.split()
        return [number for number, job in enumerate(jobs) if job in lines]

    wanted = min(options.max_parallel, len(runs))
    until(lambda: len([n for n in running() if saved(runs[n])]) >= wanted, "no task came to a checkpoint")
    victims = running()
    killed = victims[0]
    cluster.root(["scancel", "--signal=KILL", "--batch", jobs[killed]])
    until(lambda: killed not in running(), "the killed task is still running")
    node = str(cluster.job(jobs[next(n for n in victims if n in running())])["NodeList"])
    hit = [n for n in running() if cluster.job(jobs[n])["NodeList"] == node]
    print(f"killed: {runs[killed].name}\nnode {node} down, with: {', '.join(runs[n].name for n in hit)}", flush=True)
    cluster.fail_node(node)
    states = run(*command, "--dry-run")
    missing = [cell["cell"] for cell in states["cells"] if cell["submit"]]
    print(
        f"the same command would submit: {', '.join(missing)}; the node's tasks are queued again by Slurm", flush=True
    )
    repaired = time.monotonic()
    run(*command, "--wait")
    print(f"repaired and finished {time.monotonic() - repaired:.0f} s later, on the remaining node", flush=True)
    table = cluster.run_as_user([afina, "sweep", str(home)], cwd=project, check=True).stdout
    found = {
        "runs": len(runs),
        "finished": sum(outcome(folder) == "finished" for folder in runs),
        "submitted_again": len(missing),
        "began_at_steps": {folder.name: steps for folder in runs if len(steps := began(folder)) > 1},
        "doubled_lines": {folder.name: count for folder in runs if (count := doubled(folder))},
        "seconds": round(time.monotonic() - start, 1),
        "table": table,
    }
    print(f"runs with several attempts began at the steps: {found['began_at_steps']}")
    print(f"lines doubled in metrics.jsonl: {found['doubled_lines'] or 'none'}\n\n{table}")
    return found


def make_project(cluster: Cluster, place: Path, options: argparse.Namespace) -> tuple[Path, str]:
    """A project folder of the ordinary user, and `afina` in a virtual environment with the host side only."""
    venv = place / "venv"
    subprocess.run(["/usr/bin/python3", "-m", "venv", str(venv)], check=True)
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "Apptainer.def", "container", "src", "slurm"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    subprocess.run([str(venv / "bin/pip"), "install", "--quiet", str(source)], check=True)
    project = place / "project"
    (project / "slurm").mkdir(parents=True)
    (project / "scratch").mkdir()
    tiny.tiny_model(project / "model")
    tiny.write_csv(project / "reviews.csv", tiny.tiny_reviews(600, 1))
    recipe = {
        "name": "sweep-faults",
        "baselines": False,
        "model": "model",
        "data": {
            "files": {"all": "reviews.csv"},
            "text": "text",
            "label": "stars",
            "train": {"fraction": 0.7},
            "eval": {"fraction": 0.3},
        },
        "tokens": {"max_length": 32},
        "train": {
            "batch_size": 16,
            "epochs": options.epochs,
            "seed": 1,
            "keep": "last",
            "save_every": 50,
            "evaluate": 500,
        },
        "resources": {"gpus_per_node": 1, "cpus_per_gpu": 1, "time": 60},
    }
    (project / "recipe.yaml").write_text(json.dumps(recipe))
    image = shlex.quote(str(options.image.resolve()))
    (project / "slurm/site.env").write_text(f"AFINA_SCRATCH={project / 'scratch'}\nAFINA_IMAGE={image}\n")
    for path in (project, *project.rglob("*")):
        shutil.chown(path, cluster.user, cluster.user)
    return project, str(venv / "bin/afina")


def until(reached: Callable[[], bool], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} within {seconds:g} s")
        time.sleep(0.5)


def saved(run: Path) -> bool:
    return any(run.glob("checkpoints/*/manifest.json"))


def outcome(run: Path) -> str:
    try:
        return str(json.loads((run / "outcome.json").read_text())["outcome"])
    except FileNotFoundError:
        return "none"


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def began(run: Path) -> list[int]:
    """The step from which each attempt trained."""
    return [int(event["step"]) for event in lines(run, "events.jsonl") if event["event"] == "training"]


def doubled(run: Path) -> int:
    steps = [(line["step"], "eval_loss" in line) for line in lines(run, "metrics.jsonl")]
    return len(steps) - len(set(steps))


if __name__ == "__main__":
    sys.exit(main())
