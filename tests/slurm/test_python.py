"""Submissions from Python, on a real cluster: what follows an attempt, Slurm's state and the exit code are those of sbatch.

The worker is a script, as in test_variants: each attempt ends with the next of the codes that the test wants.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster

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
