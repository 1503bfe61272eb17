"""A storm: many runs at once, faults drawn at random, Slurm's own commands failing one time in ten, slurmctld restarted twice.

None is lost, none trains twice at a time, none goes on without end. AFINA_STORM_RUNS and AFINA_STORM_SEED choose another storm.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from projects import give_to_user
from test_other_sites import Project
from tests.common import program

from afina.errors import InputError, SlurmError
from afina.run.directory import RunDir
from afina.slurm.submit import check_not_queued, submit_sbatch

#: One fault of the file `faults` for each attempt; then it finishes.
BODY = """
mkdir "$2/running" || echo "$AFINA_ATTEMPT" >>"$2/doubled"
fault=$(head -n 1 "$2/faults"); sed -i 1d "$2/faults"; sleep 0.5; rmdir "$2/running"
case $fault in
  kill) exit 137 ;;
  bad) printf '{"exit_code": 3, "failure": {"kind": "EnvironmentProblem", "message": "no driver", "cause": "node", "nodes": ["%s"]}}' \
      "$SLURMD_NODENAME" >"$folder/failed.node0.json"; exit 3 ;;
  stop) printf '{"outcome": "stopped", "exit_code": 75, "attempt": "%s", "cause": "signal"}' "$AFINA_ATTEMPT" >"$2/outcome.json"
      echo 75 >"$folder/exit"; exit 75 ;;
esac
"""
#: The real command, but for one call in ten whose request or whose answer is lost. The first word is the command, NUMBER counts calls.
FLAKY = """
echo >>"$0.calls"; number=$((($(wc -l <"$0.calls") * 7 + {seed}) % 20))
lost() {{ echo "${{0##*/}}: error: Socket timed out on send/recv operation" >&2; exit 1; }}
[ "$number" != 3 ] || lost
if [ "$number" = 11 ]; then /usr/bin/"${{0##*/}}" "$@" >/dev/null 2>&1; lost; fi
exec /usr/bin/"${{0##*/}}" "$@"
"""


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("AFINA_STORM_SEED", "20"))


@pytest.fixture
def storm(
    cluster: Cluster, folder: Path, host: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Project]]:
    """Runs with their faults, and Slurm's commands that fail now and then, here and in the jobs."""
    for name in ("sbatch", "squeue"):
        program(folder / "bin", name, FLAKY.format(seed=seed))
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")
    monkeypatch.setattr("afina.slurm.submit._PAUSES_S", (0.3, 0.3))
    monkeypatch.setattr("afina.slurm.submit._LATE_S", 5.0)
    drawn = random.Random(seed)
    made = []
    for number in range(int(os.environ.get("AFINA_STORM_RUNS", "20"))):
        (folder / f"{number}").mkdir()
        project = Project(cluster, folder / f"{number}", host / "python", {})
        faults = [*drawn.choices(("kill", "stop"), k=drawn.randint(0, 1)), *(["bad"] if drawn.random() < 0.4 else [])]
        drawn.shuffle(faults)
        (project.run.path / "faults").write_text("".join(f"{fault}\n" for fault in faults))
        made.append(project)
    give_to_user(folder, cluster)
    for name, value in {**made[0].env, "BODY": BODY}.items():
        monkeypatch.setenv(name, value)
    yield made
    cluster.cancel_all()


def _finished(run: RunDir) -> bool:
    outcome = run.outcome()
    return outcome is not None and outcome.outcome == "finished"


@pytest.mark.timeout(900)
def test_a_storm_loses_nothing_doubles_nothing_and_ends(cluster: Cluster, storm: list[Project], seed: int) -> None:
    needed = [(project.run.path / "faults").read_text().split() for project in storm]
    restarts = [len(storm) // 3, 2 * len(storm) // 3]
    by_hand, ends = 0, time.monotonic() + 600
    for number, project in enumerate(storm):
        if number in restarts:
            cluster._stop("slurmctld")
            cluster._daemon("slurmctld", ["slurmctld"])
        with contextlib.suppress(SlurmError):
            submit_sbatch(project.plan, project.run)
    while not all(_finished(project.run) for project in storm):
        assert time.monotonic() < ends, f"seed {seed}: " + "\n".join(p.logs() for p in storm if not _finished(p.run))
        time.sleep(2)
        for project in storm:
            if _finished(project.run):
                continue
            # As a user does: `afina submit RUN`, which refuses while a job is, or may be, in the queue.
            with contextlib.suppress(SlurmError, InputError):
                check_not_queued(project.run)
                if not _finished(project.run):
                    submit_sbatch(project.plan, project.run)
                    by_hand += 1
    jobs = [len(set(project.jobs())) for project in storm]
    least = [1 + faults.count("bad") for faults in needed]
    print(f"seed {seed}: {len(storm)} runs, {sum(jobs)} jobs, at least {sum(least)}; {by_hand} submitted again by hand")
    assert not [project for project in storm if (project.run.path / "doubled").exists()], "two attempts at a time"
    attempts = [len(project.run.attempt_names()) for project in storm]
    assert (
        all(a >= 1 + len(f) for a, f in zip(attempts, needed, strict=True))
        and sum(attempts) <= sum(1 + len(f) for f in needed) + by_hand
    )
    assert sum(jobs) <= sum(least) + by_hand, "a job was queued twice"
