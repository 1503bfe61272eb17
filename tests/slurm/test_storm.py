"""A storm: many runs at once, faults drawn at random, Slurm's own commands failing one time in ten, slurmctld restarted twice, nodes lost.

None is lost, none trains twice at a time, none goes on without end, and each ends with the weights of an undisturbed run. AFINA_STORM_RUNS and
AFINA_STORM_SEED choose another storm.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from projects import ScriptedRun, give_to_user
from tests.common import program

from afina.errors import InputError, SlurmError
from afina.slurm.submit import check_not_queued, submit_sbatch

STEPS = 8
#: A training of eight steps, whose weights are a chain of digests. The first line of `faults` strikes before the first step or after two.
BODY = """
exec 9>"$2/lock"; flock --nonblock 9 || echo "$AFINA_ATTEMPT" >>"$2/doubled"
fault=$(head -n 1 "$2/faults"); sed -i 1d "$2/faults"
strike() {
  echo "$fault" >>"$2/struck"
  case $fault in
    kill | early) exit 137 ;;
    bad) printf '{"exit_code": 3, "failure": {"kind": "EnvironmentProblem", "message": "no driver", "cause": "node", "nodes": ["%s"]}}' \
        "$SLURMD_NODENAME" >"$folder/failed.node0.json"; exit 3 ;;
    stop) printf '{"outcome": "stopped", "exit_code": 75, "attempt": "%s", "cause": "signal"}' "$AFINA_ATTEMPT" >"$2/outcome.json"
        echo 75 >"$folder/exit"; exit 75 ;;
    memory) echo "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0" >&2; exit 137 ;;
    disk) exit 120 ;;
    image) mv "$2/image" "$2/purged"; exit 1 ;;
    limit) /usr/bin/scontrol update JobId="$SLURM_JOB_ID" TimeLimit=0:01; sleep 120 9>&- ;;
  esac
}
case $fault in early | bad | disk) strike "$@" ;; esac
mkdir -p "$2/checkpoints"
last=$(ls "$2/checkpoints" | sed -n 's/^step-//p' | sort -n | tail -n 1)
printf '{"time": 0, "event": "training", "attempt": "%s", "step": %s}\\n' "$AFINA_ATTEMPT" "${last:-0}" >>"$2/events.jsonl"
for ((step = ${last:-0} + 1; step <= STEPS; step++)); do
  part="$2/checkpoints/.$step.$AFINA_ATTEMPT"; mkdir "$part"
  echo "$(cat "$2/checkpoints/step-$((step - 1))/weights" 2>/dev/null) $step" | sha256sum >"$part/weights"; echo {} >"$part/manifest.json"
  sleep 0.1 9>&-; mv -T "$part" "$2/checkpoints/step-$step"
  [ "$step" != "$((${last:-0} + 2))" ] || strike "$@"
done
"""
#: The real command, but for one call in ten whose request or whose answer is lost.
FLAKY = """
echo >>"$0.calls"; number=$((($(wc -l <"$0.calls") * 7 + {seed}) % 20))
lost() {{ echo "${{0##*/}}: error: Socket timed out on send/recv operation" >&2; exit 1; }}
[ "$number" != 3 ] || lost
if [ "$number" = 11 ]; then /usr/bin/"${{0##*/}}" "$@" >/dev/null 2>&1; lost; fi
exec /usr/bin/"${{0##*/}}" "$@"
"""
#: Runs the worker only while the image is there.
RUNTIME = '[ -r "{image}" ] || exit 255\nexec bash {worker} "$@"\n'
#: Faults after which a user has to submit the run again: nothing that afina could do would help.
BY_HAND = ("memory", "disk", "image", "limit")


class StormRun(ScriptedRun):
    """A run, the faults that its attempts meet one after another, and an image that can be purged."""

    def __init__(self, cluster: Cluster, folder: Path, python: Path, faults: list[str]) -> None:
        super().__init__(cluster, folder, python, {})
        self.image, self.faults = self.run.path / "image", faults
        runtime = program(folder, "runtime", RUNTIME.format(image=self.image, worker=folder / "worker.sh"))
        self.claim(["bash", "{run}/node.sh", str(self.image), str(runtime), "launch", "{run}"])
        self.image.touch()
        (self.run.path / "faults").write_text("".join(f"{fault}\n" for fault in faults))

    @property
    def finished(self) -> bool:
        outcome = self.run.outcome()
        return outcome is not None and outcome.outcome == "finished"

    def submit_again(self) -> bool:
        """As a user does: `afina submit RUN`, which refuses while a job is, or may be, in the queue."""
        with contextlib.suppress(SlurmError, InputError):
            check_not_queued(self.run)
            if self.finished:
                return False
            with contextlib.suppress(FileNotFoundError):
                (self.run.path / "purged").rename(self.image)
            submit_sbatch(self.plan, self.run)
            return True
        return False


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("AFINA_STORM_SEED", "20"))


@pytest.fixture
def storm(
    cluster: Cluster, folder: Path, host: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[StormRun]]:
    """Runs with their faults, and Slurm's commands that fail now and then, here and in the jobs."""
    for name in ("sbatch", "squeue", "scontrol"):
        program(folder / "bin", name, FLAKY.format(seed=seed))
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")
    monkeypatch.setattr("afina.slurm.submit._PAUSES_S", (0.3, 0.3))
    monkeypatch.setattr("afina.slurm.submit._LATE_S", 5.0)
    drawn = random.Random(seed)
    made = []
    for number in range(int(os.environ.get("AFINA_STORM_RUNS", "20"))):
        (folder / f"{number}").mkdir()
        faults = [
            *drawn.choices(("kill", "early", "stop"), k=drawn.randint(0, 1)),
            *drawn.choices(BY_HAND, (3, 3, 3, 1), k=drawn.random() < 0.3),
            *(["bad"] if drawn.random() < 0.3 else []),
        ]
        drawn.shuffle(faults)
        made.append(StormRun(cluster, folder / f"{number}", host / "python", faults))
    give_to_user(folder, cluster)
    for name, value in {**made[0].env, "BODY": BODY, "STEPS": str(STEPS)}.items():
        monkeypatch.setenv(name, value)
    yield made
    cluster.cancel_all()


def weights_of_an_undisturbed_run() -> str:
    line = ""
    for step in range(1, STEPS + 1):
        line = hashlib.sha256(f"{line} {step}\n".encode()).hexdigest() + "  -"
    return line


class Weather:
    """What happens to the cluster, as a fraction of the runs has finished: a node loses power, urgent jobs take a node."""

    def __init__(self, cluster: Cluster, runs: int) -> None:
        self.cluster, self.disturbed = cluster, 0
        self.events = {
            round(runs * share): kind
            for share, kind in ((0.2, self.power_cut), (0.45, self.preempt), (0.7, self.power_cut))
        }

    def pass_over(self, finished: int) -> None:
        for due in [number for number in self.events if number <= finished]:
            self.disturbed += len(self.cluster.root(["squeue", "--noheader", "--states=running"]).stdout.splitlines())
            self.events.pop(due)()

    def power_cut(self) -> None:
        self.cluster.fail_node("n2")
        time.sleep(2)
        self.cluster.start_slurmd("n2")

    def preempt(self) -> None:
        self.cluster.sbatch(
            "--partition=urgent", "--nodes=1", "--exclusive", "--output=/dev/null", script="#!/bin/bash\nsleep 2\n"
        )


def restart_slurmctld(cluster: Cluster) -> None:
    cluster._stop("slurmctld")
    cluster._daemon("slurmctld", ["slurmctld"])


@pytest.mark.timeout(7200)
def test_a_storm_loses_nothing_doubles_nothing_and_ends(cluster: Cluster, storm: list[StormRun], seed: int) -> None:
    restarts, weather = [len(storm) // 3, 2 * len(storm) // 3], Weather(cluster, len(storm))
    by_hand, ends = 0, time.monotonic() + max(900, 25 * len(storm))
    for number, project in enumerate(storm):
        if number in restarts:
            restart_slurmctld(cluster)
        with contextlib.suppress(SlurmError):
            submit_sbatch(project.plan, project.run)
    while left := [project for project in storm if not project.finished]:
        assert time.monotonic() < ends, f"seed {seed}: " + "\n".join(project.logs() for project in left)
        time.sleep(2)
        weather.pass_over(len(storm) - len(left))
        by_hand += sum(project.submit_again() for project in left)
    jobs = [len(set(project.jobs())) for project in storm]
    struck = Counter(fault for project in storm for fault in (project.run.path / "struck").read_text().split())
    least = len(storm) + sum(struck[fault] for fault in (*BY_HAND, "bad"))
    attempts = sum(len(project.run.attempt_names()) for project in storm)
    print(
        f"seed {seed}: {len(storm)} runs, faults {dict(struck)}, {sum(jobs)} jobs, at least {least}; {attempts} attempts"
    )
    print(f"{by_hand} submitted by hand; {weather.disturbed} jobs ran when a node was lost or taken")
    assert not [project.folder for project in storm if (project.run.path / "doubled").exists()], (
        "two attempts at a time"
    )
    last = weights_of_an_undisturbed_run()
    assert all((p.run.path / f"checkpoints/step-{STEPS}/weights").read_text().strip() == last for p in storm)
    ends = [
        event
        for project in storm
        for event in project.run.lines("events.jsonl")
        if event.get("event") == "attempt_ended"
    ]
    assert {e["next"] for e in ends if e["cause"] in ("host-memory", "disk", "image")} <= {"end"}, "tried again in vain"
    assert {e["next"] for e in ends if e["cause"] == "node"} <= {"requeue"}
    assert attempts <= len(storm) + struck.total() + struck["image"] + by_hand + weather.disturbed, "tried without end"
    recorded = {job for project in storm for job in project.jobs()}
    lines = cluster.root(["squeue", "--noheader", "--states=all", "--format=%A|%o"]).stdout.splitlines()
    queued = {int(line.partition("|")[0]) for line in lines if f"|{storm[0].folder.parent}/" in line}
    assert queued <= recorded and queued, "a job that no run knows of"
    assert sum(jobs) <= len(storm) + struck["bad"] + by_hand + weather.disturbed, "a job was queued twice"
