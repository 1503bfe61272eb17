"""Submissions from Python, on a real cluster: what follows an attempt, Slurm's state and the exit code are those of sbatch.

The worker is a script, as in test_variants: each attempt ends with the next of the codes that the test wants.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from projects import give_to_user, project_folder
from tests import tiny
from tests.common import ROOT
from tests.processes import environ, pids, signal_all, wait_until

from afina.recipe.parse import any_recipe
from afina.run.commands import job_scripts
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.plan import make_plan
from afina.site.settings import Site

#: `bash worker.sh COMMAND RUN …`. The file `codes` has a line for each attempt: the exit code, what comes next, the outcome.
WORKER = """
case $1 in
  launch)
    read -r code next outcome <"$2/codes"
    sed -i 1d "$2/codes"
    env -0 >"$2/env.$AFINA_ATTEMPT"
    echo "attempt $AFINA_ATTEMPT ends with $code"
    printf '%s' "$outcome" | sed "s/ATTEMPT/$AFINA_ATTEMPT/" >"$2/outcome.json"
    echo "$code" >"$2/attempts/$AFINA_ATTEMPT/exit"
    printf '%s\\n\\nas the test wants\\n' "$next" >"$2/attempts/$AFINA_ATTEMPT/next"
    exit "$code"
    ;;
esac
"""
STOPPED = ("stopped", 75, {"cause": "limit"})
FINISHED = ("finished", 0, {"metrics": {"eval_accuracy": 0.75}})
FAILED = (
    "failed",
    4,
    {
        "failure": {
            "kind": "TrainingError",
            "message": "the loss is not finite",
            "remedy": "a smaller rate",
            "cause": "loss",
        }
    },
)

SUBMIT = """
import json, os, sys
import afina
before = dict(os.environ)
run = afina.Run(sys.argv[1]).submit(via=sys.argv[2])
after = afina.Run(sys.argv[3]).submit(via=sys.argv[2]) if len(sys.argv) > 3 else None
error = run.exception(timeout=100)
answer = {"job": run.job_id, "state": run.state, "environ": dict(os.environ) == before, "error": type(error).__name__}
answer["code"] = error.exit_code if error else 0
answer["text"] = str(error)
if sys.argv[2] == "submitit":
    import submitit
    answer["result"] = submitit.SlurmJob(folder=run.path / "submitit", job_id=run.job_id, tasks=[0]).result()
print(json.dumps(answer))
"""


@pytest.fixture
def claimed(cluster: Cluster, folder: Path) -> Iterator[Callable[..., RunDir]]:
    """Claims a run of the ordinary user whose attempts end one after another as they are given."""
    (folder / "scratch").mkdir()
    (folder / "worker.sh").write_text(WORKER)
    (folder / "reviews.csv").write_text("text,stars\ngood,5\nbad,1\n")

    def with_attempts(*attempts: tuple[str, int, dict[str, Any]], name: str = "run it's 100%u %x") -> RunDir:
        resources = {"gpus_per_node": 0, "cpus_per_gpu": 1, "time": 5}
        data = {"files": str(folder / "reviews.csv"), "text": "text", "label": "stars"}
        recipe = any_recipe({"name": name, "model": "owner/model", "data": data, "resources": resources})
        plan = make_plan(recipe, Site(scratch=folder / "scratch"))
        argv = ["bash", str(folder / "worker.sh"), "launch", "{run}"]
        run = claim(plan, {}, argv, "", folder / name, scripts=job_scripts())
        lines = []
        for outcome, code, more in attempts:
            about = {"outcome": outcome, "exit_code": code, "attempt": "ATTEMPT", **more}
            lines.append(f"{code} {'requeue' if code == 75 else 'end'} {json.dumps(about)}\n")
        (run.path / "codes").write_text("".join(lines))
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, cluster.user, cluster.user)
        return run

    yield with_attempts
    cluster.cancel_all()


def submitted(cluster: Cluster, host: Path, run: RunDir, via: str, *more: str) -> dict[str, Any]:
    argv = [str(host / "python"), "-c", SUBMIT, str(run.path), via, *more]
    env = {"AFINA_SCRATCH": str(run.path.parent / "scratch"), "AFINA_RUNTIME": "none", "RANK": "3", "WORLD_SIZE": "8"}
    done = cluster.run_as_user(argv, env=env, cwd=run.path.parent, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.timeout(240)
@pytest.mark.parametrize("via", ["submitit", "sbatch"])
def test_a_time_limit_requeues_and_finishes(
    cluster: Cluster, host: Path, claimed: Callable[..., RunDir], via: str
) -> None:
    run = claimed(STOPPED, STOPPED, FINISHED)
    answer = submitted(cluster, host, run, via)
    job = answer["job"]
    assert (answer["state"], answer["error"], answer["environ"]) == ("FINISHED", "NoneType", True), answer
    assert run.attempt_names() == [f"{job}.0", f"{job}.1", f"{job}.2"]
    assert cluster.wait(job) == "COMPLETED"
    assert [line["via"] for line in run.lines("submissions.jsonl")] == [via]
    if via == "submitit":
        assert answer["result"]["outcome"] == "finished" and answer["result"]["attempt"] == f"{job}.2"
        log = (run.path / f"submitit/{job}_0_log.out").read_text()
    else:
        log = (run.path / f"slurm-{job}.out").read_text()
    assert f"attempt {job}.2 ends with 0" in log


@pytest.mark.timeout(240)
@pytest.mark.parametrize("via", ["submitit", "sbatch"])
def test_slurms_state_and_code_are_the_outcomes(
    cluster: Cluster, host: Path, claimed: Callable[..., RunDir], via: str
) -> None:
    run = claimed(FAILED)
    answer = submitted(cluster, host, run, via)
    assert (answer["state"], answer["error"], answer["code"]) == ("FAILED", "Failed", 4), answer
    assert "the loss is not finite" in answer["text"] and "a smaller rate" in answer["text"]
    assert "run.submit()" not in answer["text"], "another attempt would fail the same way"
    assert cluster.wait(answer["job"]) == "FAILED"
    assert cluster.job(answer["job"])["ExitCode"] == "4:0"


@pytest.mark.timeout(240)
def test_a_run_after_another_starts_only_if_that_finished(
    cluster: Cluster, host: Path, claimed: Callable[..., RunDir], folder: Path
) -> None:
    first = claimed(FAILED)
    code = (
        "import afina, json, sys; from afina import api; from afina.run.job_request import JobRequest\n"
        "first, second = map(afina.Run, sys.argv[1:])\n"
        "first.submit()\n"
        "plan = api._with_options(second.dir.plan(), JobRequest(after=[first], slurm={'nice': 7}))\n"
        "from afina.slurm.submit import submit_sbatch\n"
        "print(json.dumps([first.job_id, submit_sbatch(plan, second.dir)]))\n"
    )
    second = claimed(FINISHED, name="second")
    argv = [str(host / "python"), "-c", code, str(first.path), str(second.path)]
    env = {"AFINA_SCRATCH": str(folder / "scratch"), "AFINA_RUNTIME": "none"}
    done = cluster.run_as_user(argv, env=env, cwd=folder, timeout=100, check=True)
    job, waiting = json.loads(done.stdout.splitlines()[-1])
    assert cluster.wait(job) == "FAILED"
    about = cluster.job(waiting)
    assert about["JobState"] == "PENDING" and about["Nice"] == "7" and f"afterok:{job}" in about["Dependency"], about


DELETED = """
import sys, shutil
from pathlib import Path
import afina
from afina.slurm.submit import submit_array, submit_sbatch
from afina.slurm.submitit_job import submit_submitit
one, two, kept, gone = runs = [afina.Run(path) for path in sys.argv[1:]]
plan = one.dir.plan()
plan = plan.model_copy(update={"site": plan.site.model_copy(update={"sbatch_extra": ("--hold",)})})
submit_submitit(plan, one.dir)
submit_sbatch(plan, two.dir)
array = submit_array(plan, [kept.dir, gone.dir], one.path.parent / "scratch/arrays/it's one")
for run in (one, two, gone):
    shutil.rmtree(run.path)
print([("was deleted" in run.summary.why, run.state) for run in runs])
print([len(done.job_ids) for done in afina.Runs([one, two]).cancel()], gone.cancel().job_ids == (f"{array}_1",), kept.state)
"""


@pytest.mark.timeout(240)
def test_deleted_runs_are_found_by_their_jobs(
    cluster: Cluster, host: Path, claimed: Callable[..., RunDir], folder: Path
) -> None:
    runs = [claimed(FINISHED, name=f"it's {n}").path for n in range(4)]
    env = {"AFINA_SCRATCH": str(folder / "scratch"), "AFINA_RUNTIME": "none"}
    done = cluster.run_as_user([host / "python", "-c", DELETED, *runs], env=env, cwd=folder, check=True)
    states, cancelled = done.stdout.splitlines()
    gone, waits = "(True, 'PENDING')", "(False, 'PENDING')"
    assert (states, cancelled) == (f"[{gone}, {gone}, {waits}, {gone}]", "[1, 1] True PENDING")


#: A training whose weights depend on all steps before: a checkpoint for each, a stop when it is asked for, and an end after the
#: step in the file `last`.
TRAINS = """
trap '' TERM USR1
[ "$1" = launch ] || exec PYTHON -m afina.worker "$@"
run=$2
last=$(ls "$run/checkpoints" | sed 's/step-//' | sort -n | tail -n 1)
weights=$(cat "$run/checkpoints/step-$last/manifest.json" 2>/dev/null)
event() { printf '{"event": "%s", "attempt": "%s", "step": %s}\\n' "$1" "$AFINA_ATTEMPT" "${last:-0}" >>"$run/events.jsonl"; }
event attempt_started
event training
ended() { # OUTCOME CODE CAUSE
  printf '{"outcome": "%s", "exit_code": %s, "attempt": "%s", "cause": "%s"}' "$1" "$2" "$AFINA_ATTEMPT" "$3" >"$run/outcome.json"
  echo "$2" >"$run/attempts/$AFINA_ATTEMPT/exit"
  exit "$2"
}
for ((step = ${last:-0} + 1; step <= $(cat "$run/last" 2>/dev/null || echo 9999); step++)); do
  sleep 0.2
  weights=$(printf '%s %s' "$weights" "$step" | sha256sum | cut -c -64)
  rm -rf "$run/checkpoints/.new" && mkdir -p "$run/checkpoints/.new"
  printf %s "$weights" >"$run/checkpoints/.new/manifest.json"
  mv -T "$run/checkpoints/.new" "$run/checkpoints/step-$step"
  [ ! -e "$run/stop" ] || ended stopped 75 "$(cat "$run/stop")"
done
printf %s "$weights" >"$run/weights"
ended finished 0 ''
"""
#: AFINA_KILLS=50 is the long series: 15 minutes.
KILLS = int(os.environ.get("AFINA_KILLS", "2"))


class BothWays:
    """One run through submitit and one through sbatch, that get the same faults."""

    def __init__(self, cluster: Cluster, jobs: dict[str, str], runs: dict[str, RunDir]) -> None:
        self.cluster, self.jobs, self.runs = cluster, jobs, runs

    def steps(self) -> dict[str, int]:
        return {
            via: max((int(path.name[5:]) for path in run.checkpoints.glob("step-*")), default=0)
            for via, run in self.runs.items()
        }

    def attempts(self) -> dict[str, int]:
        return {via: len(run.attempt_names()) for via, run in self.runs.items()}

    def wait_for_more(self, count: Callable[[], dict[str, int]], before: dict[str, int], why: str) -> None:
        def more() -> bool:
            return all(now > before[via] for via, now in count().items())

        wait_until(more, 120, failure=lambda: f"{why}: {before} -> {count()}\n{self.cluster.diagnose()}")

    def fault(self, kind: str) -> None:
        if kind == "preemption":
            urgent = self.cluster.sbatch(
                "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", script="#!/bin/bash\nsleep 1", cwd=Path("/tmp")
            )
            self.cluster.wait(urgent)
            return
        for node in {self.cluster.job(job)["BatchHost"] for job in self.jobs.values() if kind == "node failure"}:
            self.cluster.fail_node(node)
            self.cluster.start_slurmd(node)
        for via, job in self.jobs.items():
            if kind == "time limit":  # what Slurm sends two minutes before it
                self.cluster.root(["scancel", "--signal=USR1", "--batch", job])
            elif kind == "requeue":
                self.cluster.root(["scontrol", "requeue", job])
            elif kind == "kill":
                attempt = self.runs[via].attempt_names()[-1]
                of_attempt = (pid for pid in pids() if environ(pid).get("AFINA_ATTEMPT") == attempt)
                signal_all([pid for pid in of_attempt if "SLURM_PROCID" in environ(pid)], signal.SIGKILL)


@pytest.mark.timeout(1800)
def test_faults_leave_the_same_weights_and_states_both_ways(
    cluster: Cluster, host: Path, claimed: Callable[..., RunDir], folder: Path
) -> None:
    """A time limit, preemption, a node failure, a requeue, and kills at random moments."""
    (folder / "worker.sh").write_text(TRAINS.replace("PYTHON", str(host / "python")))
    seed = int(os.environ.get("AFINA_SEED") or random.randrange(10**6))
    drawn, env = random.Random(seed), {"AFINA_SCRATCH": str(folder / "scratch"), "AFINA_RUNTIME": "none"}

    def python(code: str, *words: str | Path) -> str:
        argv = [str(host / "python"), "-c", f"import afina, sys; {code}", *map(str, words)]
        return cluster.run_as_user(argv, env=env, cwd=folder, timeout=150, check=True).stdout.split()[-1]

    runs = {via: claimed(name=via) for via in ("submitit", "sbatch")}
    jobs = {
        via: python(f"print(afina.Run(sys.argv[1]).submit(via={via!r}, time_min=60).job_id)", run.path)
        for via, run in runs.items()
    }
    both = BothWays(cluster, jobs, runs)
    kinds = ["time limit", "preemption", "node failure", "requeue", *["kill"] * KILLS]
    drawn.shuffle(kinds)
    for number, kind in enumerate(kinds):
        both.wait_for_more(both.steps, both.steps(), f"a step before {kind}, seed {seed}")
        time.sleep(drawn.random())
        before = dict.fromkeys(jobs, number + 1)
        both.fault(kind)
        both.wait_for_more(both.attempts, before, f"an attempt after {kind}, seed {seed}")
    last, weights = max(both.steps().values()) + 3, ""
    for step in range(1, last + 1):
        weights = hashlib.sha256(f"{weights} {step}".encode()).hexdigest()
    for run in runs.values():
        (run.path / "last").write_text(str(last))
    for via, run in runs.items():
        assert python("print(afina.Run(sys.argv[1]).result(timeout=120).outcome)", run.path) == "finished"
        assert (run.path / "weights").read_text() == weights, f"{via}, seed {seed}"
        assert run.job_ids() == (jobs[via],) and len(run.attempt_names()) == len(kinds) + 1, run.attempt_names()
    ends = {via: (cluster.wait(job), *map(cluster.job(job).get, ("ExitCode", "Restarts"))) for via, job in jobs.items()}
    assert ends["submitit"] == ends["sbatch"] == ("COMPLETED", "0:0", str(len(kinds))), ends


@pytest.mark.timeout(1200)
def test_the_example_scripts_run(cluster: Cluster, host: Path, image: Path) -> None:
    """A prediction in a second job after the training's, and a study of three recipes in one array; in the image."""
    with project_folder(cluster, "afina examples ", image) as path:
        resources = {"gpus_per_node": 0, "cpus_per_gpu": 1, "time": 10}
        tiny.write_project(path, rows=120, train={"max_steps": 3, "batch_size": 8}, resources=resources)
        tiny.write_csv(path / "new.csv", tiny.tiny_reviews(20, 3))
        shutil.copytree(ROOT / "docs/examples", path / "examples")
        give_to_user(path, cluster)
        env = {"PATH": f"{host}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

        def rows(file: Path) -> int:
            with file.open(newline="") as text:
                return len(list(csv.reader(text)))

        def example(name: str, *words: str) -> str:
            argv = [str(host / "python"), f"examples/{name}", *words]
            done = cluster.run_as_user(argv, env=env, cwd=path, timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr + cluster.diagnose()
            return done.stdout

        said = example("train_then_predict.py", "recipe.yaml", "new.csv", "out.csv")
        job = re.search(r"trains in job (\d+); out.csv", said)
        assert job is not None, said
        shown = example("study.py", "recipe.yaml", "new.csv")
        assert shown.count("eval_loss") == 3 and rows(path / "predictions.csv") == 21, shown
        assert cluster.wait(job[1]) == "COMPLETED"
        wait_until((path / "out.csv").is_file, 300, failure=cluster.diagnose)
        assert rows(path / "out.csv") == 21
