"""Handles: what a run that did not finish raises, waiting together, wrong arguments, and what leaks into this process."""

from __future__ import annotations

import asyncio
import inspect
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import tiny
from tests.common import ROOT, program
from tests.unit.conftest import recipe_dict

import afina
from afina.api import plan_for
from afina.errors import AfinaError, EnvironmentProblem, Failure, InputError, RecipeError, SlurmError
from afina.recipe.schema import Recipe
from afina.run import new_run
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest
from afina.run.outcome import Outcome
from afina.run.plan import make_plan
from afina.site.settings import Site


def failure(kind: str, cause: str) -> Failure:
    return Failure(kind, "what went wrong", "mend it", cause)


@pytest.mark.parametrize(
    ("more", "kind", "code", "remedy"),
    [
        ({"outcome": "stopped", "cause": "limit"}, afina.Stopped, 75, "run.submit(), or `afina submit"),
        ({"outcome": "stopped", "cause": "asked"}, afina.Cancelled, 75, "run.submit(), or `afina submit"),
        ({"outcome": "failed", "failure": failure("TrainingError", "disk")}, afina.Failed, 4, "mend it; then run.submit()"),
        ({"outcome": "failed", "failure": failure("TrainingError", "loss")}, afina.Failed, 4, "mend it"),
        ({"outcome": "failed", "exit_code": 2, "failure": failure("DataError", "")}, afina.Failed, 2, "mend it; then run"),
        ({"outcome": "failed", "failure": Failure("TrainingError", "killed")}, afina.Failed, 4, "run.submit(), or `afina"),
    ],
)  # fmt: skip
def test_a_run_that_did_not_finish_raises_what_it_is(
    claim: Callable[..., RunDir], squeue: Path, more: dict[str, Any], kind: type[AfinaError], code: int, remedy: str
) -> None:
    run = afina.Run(claim(job="7", **more).path)
    assert run.done()
    with pytest.raises(kind) as caught:
        run.result()
    assert (caught.value.exit_code, isinstance(caught.value, AfinaError)) == (code, True)
    assert caught.value.remedy.startswith(remedy), caught.value.remedy
    assert type(run.exception()) is kind


def test_a_run_that_finished_and_one_that_was_never_submitted(claim: Callable[..., RunDir], squeue: Path) -> None:
    run = afina.Run(claim("a", outcome="finished", metrics={"eval_x": 1.0}).path)
    assert run.result().metrics == {"eval_x": 1.0} and run.exception() is None

    async def awaited() -> Outcome:
        return await run

    assert asyncio.run(awaited()) == run.outcome
    with pytest.raises(InputError, match="was never submitted"):
        afina.Run(claim("b").path).result()


def test_a_cancelled_await_ends_at_once(claim: Callable[..., RunDir], squeue: Path) -> None:
    """No thread goes on waiting, which asyncio would wait for at its end."""
    runs = [afina.Run(claim(name, job=job).path) for name, job in (("a", "1"), ("b", "2"))]
    squeue.write_text("1|1|RUNNING|1:00|N/A|n1|\n2|2|RUNNING|1:00|N/A|n1|\n")

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*runs), 0.5)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 20


def test_a_forked_child_waits_while_a_thread_of_its_parent_asks_slurm(
    claim: Callable[..., RunDir], squeue: Path
) -> None:
    """multiprocessing forks by default up to Python 3.13; the lock of the poller is not the parent's."""
    from afina.watch.wait import _POLLER

    run = afina.Run(claim(outcome="finished").path)
    with _POLLER._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
        if (pid := os.fork()) == 0:
            os._exit(0 if run.wait() == "FINISHED" else 1)
        end = time.monotonic() + 30
        while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.05)
        if status == (0, 0):
            os.kill(pid, signal.SIGKILL)
    assert status == (pid, 0)


def test_waiting_has_a_limit_of_its_own_kind(claim: Callable[..., RunDir], squeue: Path) -> None:
    run = afina.Run(claim(job="7").path)
    squeue.write_text("7|7|PENDING|1:00|N/A||Resources\n")
    for error in (TimeoutError, AfinaError, afina.WaitTimeout):
        with pytest.raises(error, match="still queued or running"):
            run.result(timeout=0.2)
    with pytest.raises(afina.WaitTimeout):
        run.wait(timeout_s=0.2)
    assert not run.done()


def test_without_squeue_nothing_is_waited_for(
    claim: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="squeue is not on PATH"):
        afina.Run(claim(job="7").path).result()


def test_many_waiting_handles_ask_slurm_as_often_as_one(claim: Callable[..., RunDir], squeue: Path) -> None:
    runs = afina.Runs(afina.Run(claim(f"run {n}", job=str(n)).path) for n in range(1, 21))
    squeue.write_text("".join(f"{n}|{n}|RUNNING|1:00|N/A|n1|\n" for n in range(1, 21)))
    threads = [threading.Thread(target=run.wait) for run in runs]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    time.sleep(2.5)
    for n, run in enumerate(runs, start=1):
        run.dir.begin_attempt(f"{n}.0")
        run.dir.record(Outcome(outcome="finished", exit_code=0, attempt=f"{n}.0"))
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    asked = (squeue.parent / "questions").read_text().split()
    assert len(asked) <= 4 + (time.monotonic() - began) / 0.5, asked
    (squeue.parent / "questions").unlink()
    assert [run.path for run in afina.wait(runs)] == [run.path for run in runs]
    assert not (squeue.parent / "questions").exists(), "finished runs need no question"


def test_runs_are_cancelled_with_one_command(claim: Callable[..., RunDir], squeue: Path) -> None:
    runs = afina.Runs(afina.Run(claim(f"run {n}", job=str(n)).path) for n in range(1, 6))
    squeue.write_text("".join(f"{n}|{n}|PENDING|1:00|N/A||Resources\n" for n in range(1, 6)))
    assert [one.did for one in runs.cancel()] == ["cancelled"] * 5
    assert (squeue.parent / "questions").read_text().split() == ["squeue", "scancel"]
    squeue.write_text("")
    for run in runs:
        assert isinstance(run.exception(timeout=10), afina.Cancelled)


def test_a_hundred_handles_that_wait_ten_minutes_ask_slurm_some_fifty_times(
    claim: Callable[..., RunDir], squeue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that runs 200 times as fast: pauses of 0.5 s, each 1.3 times the one before, up to 15 s, are 50 in ten minutes."""
    fast = SimpleNamespace(monotonic=lambda: 200 * time.monotonic(), sleep=lambda s: time.sleep(s / 200))
    first = claim("run 1", job="1")
    runs = [afina.Run(first.path)]
    for n in range(2, 101):
        path = Path(shutil.copytree(first.path, tmp_path / f"run {n}"))
        (path / "submissions.jsonl").write_text(f'{{"job_id": "{n}", "via": "sbatch"}}\n')
        runs.append(afina.Run(path))
    squeue.write_text("".join(f"{n}|{n}|RUNNING|1:00|N/A|n1|\n" for n in range(1, 101)))
    monkeypatch.setattr("afina.watch.wait.time", fast)
    late: list[BaseException] = []

    def wait(run: afina.Run) -> None:
        try:
            run.wait(timeout=600)
        except afina.WaitTimeout as error:
            late.append(error)

    threads = [threading.Thread(target=wait, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(late) == 100
    questions = (tmp_path / "questions").read_text().splitlines()
    assert set(questions) == {"squeue"} and 2 <= len(questions) <= 55, len(questions)


def test_a_deleted_run_directory_is_found_by_its_job(
    claim: Callable[..., RunDir], squeue: Path, tmp_path: Path
) -> None:
    """By the batch script that Slurm names; another run's job is left alone."""
    run, other = (afina.Run(claim(name, job=job).path) for name, job in (("run", "7"), ("run 2", "8")))
    squeue.write_text("7|7|PENDING|1:00|N/A||Resources\n8|8|PENDING|1:00|N/A||Resources\n")
    commands = f"7|{run.path}/submitit/7_submission.sh\n8|{other.path}/finetune.sbatch {other.path}\n"
    (tmp_path / "commands").write_text(commands)
    program(
        tmp_path / "bin",
        "squeue",
        f"case $* in *%o*) cat {shlex.quote(str(tmp_path))}/commands ;; *) cat {shlex.quote(str(squeue))} ;; esac\n",
    )
    shutil.rmtree(run.path)
    assert run.state == "PENDING" and "was deleted" in str(run.summary.why)
    cancelled = run.cancel()
    assert (cancelled.did, cancelled.job_ids, run.path.exists()) == ("cancelled", ("7",), False)
    squeue.write_text("")
    (tmp_path / "commands").write_text("")
    assert "its run directory was deleted" in str(run.exception(timeout=30)) and other.path.exists()


def test_as_completed_gives_each_when_it_has_ended(claim: Callable[..., RunDir], squeue: Path) -> None:
    first, second = (afina.Run(claim(name, job=job).path) for name, job in (("a", "1"), ("b", "2")))
    squeue.write_text("1|1|RUNNING|1:00|N/A|n1|\n2|2|RUNNING|1:00|N/A|n1|\n")

    def end(run: afina.Run) -> None:
        run.dir.record(Outcome(outcome="finished", exit_code=0, attempt=f"{run.job_id}.0"))

    threading.Timer(0.3, end, [second]).start()
    threading.Timer(1.2, end, [first]).start()
    assert [run.path for run in afina.as_completed([first, second], timeout=30)] == [second.path, first.path]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"overrides": None}, "overrides"),
        ({"overrides": "train.epochs=1"}, "overrides"),
        ({"overrides": [("train.epochs", 1)]}, "overrides"),
        ({"nodes": 0}, "nodes"),
        ({"nodes": "2"}, "nodes"),
        ({"gpus_per_node": -1}, "gpus_per_node"),
        ({"time_min": 1.5}, "time_min"),
        ({"run": 3}, "run"),
        ({"site": ["a"]}, "site"),
        ({"via": "slurm"}, "via"),
        ({"via": "sbtach"}, "via"),
        ({"slurm": "partition=gpu"}, "slurm"),
        ({"after": "7"}, "after"),
    ],
)
def test_a_wrong_argument_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError) as caught:
        afina.submit("recipe.yaml", **options)
    assert caught.value.message.startswith(f"{name}: must be ") and caught.value.remedy
    if options.get("via") == "sbtach":
        assert caught.value.remedy == "did you mean `sbatch`?"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda run: afina.Run(None), "run"),  # type: ignore[arg-type]
        (lambda run: afina.Run(7), "run"),  # type: ignore[arg-type]
        (lambda run: afina.runs(3), "run"),  # type: ignore[arg-type]
        (lambda run: afina.resume(None), "run"),  # type: ignore[arg-type]
        (lambda run: afina.load_recipe(None), "path"),  # type: ignore[arg-type]
        (lambda run: afina.load_recipe("r.yaml", overrides=None), "overrides"),  # type: ignore[arg-type]
        (lambda run: afina.load_recipe("r.yaml", overrides=[("a", 1)]), "overrides"),  # type: ignore[list-item]
        (lambda run: afina.wait(3), "runs"),  # type: ignore[arg-type]
        (lambda run: afina.wait(afina.Run(run)), "runs"),  # type: ignore[arg-type]
        (lambda run: afina.Runs([None]), "run"),  # type: ignore[list-item]
        (lambda run: afina.wait([run], timeout="1"), "timeout"),  # type: ignore[arg-type]
        (lambda run: list(afina.as_completed(str(run))), "runs"),  # type: ignore[arg-type]
        (lambda run: list(afina.as_completed([run], timeout=[1])), "timeout"),  # type: ignore[arg-type]
        (lambda run: afina.Run(run).result(timeout=float("nan")), "timeout"),
        (lambda run: afina.Run(run).exception(timeout=True), "timeout"),
        (lambda run: afina.predict(run, None), "inputs"),  # type: ignore[arg-type]
        (lambda run: afina.predict(run, []), "inputs"),
        (lambda run: afina.export(run, onnx="no"), "onnx"),  # type: ignore[arg-type]
        (lambda run: afina.export(run, site=3), "site"),  # type: ignore[arg-type]
        (lambda run: afina.submit("r.yaml", rehearse="no"), "rehearse"),  # type: ignore[call-overload]
        (lambda run: afina.predict(run, 3), "inputs"),  # type: ignore[arg-type]
        (lambda run: afina.predict(run, [None]), "inputs"),  # type: ignore[list-item]
        (lambda run: afina.predict(run, "a.csv", out=3), "out"),  # type: ignore[arg-type]
        (lambda run: afina.predict(run, "a.csv", text=3), "text"),  # type: ignore[arg-type]
        (lambda run: afina.predict(run, "a.csv", num_processes=-1), "num_processes"),
        (lambda run: afina.export(run, out=3), "out"),  # type: ignore[arg-type]
        (lambda run: afina.load(run, batch_size=0), "batch_size"),
        (lambda run: afina.load(run, dtype="int8"), "dtype"),
        (lambda run: afina.sweep("r.yaml", grid=3), "grid"),  # type: ignore[arg-type]
        (lambda run: afina.sweep("r.yaml", seeds=1.5), "seeds"),  # type: ignore[arg-type]
        (lambda run: afina.sweep("r.yaml", max_parallel=0), "max_parallel"),
        (lambda run: afina.sweep("r.yaml", nodes="2"), "nodes"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_argument_of_the_other_functions_is_named(
    claim: Callable[..., RunDir], call: Callable[[Path], Any], name: str, tmp_path: Path
) -> None:
    run = claim(outcome="finished")
    run.model.mkdir()
    (Path.cwd() / "a.csv").write_text("text\na\n")
    with pytest.raises(InputError) as caught:
        call(run.path)
    assert caught.value.message.startswith(f"{name}: must be "), caught.value.message
    with pytest.raises(InputError, match=r"^reading\.delimitr: "):
        afina.predict(run.path, "a.csv", reading={"delimitr": ";"})


def test_wrong_recipes(recipe_file: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    with pytest.raises(RecipeError, match="unknown key `modle`"):
        Recipe(**{**recipe_dict(), "modle": "x"})
    for wrong in (3, None, b"recipe.yaml"):
        with pytest.raises(InputError, match="recipe: must be a path, a mapping or a Recipe"):
            plan_for(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_processes: must be a whole number, 1 or more"):
        afina.train(recipe_file(), num_processes=-1)


def test_a_recipe_knows_its_folder_and_takes_overrides(
    recipe_file: Callable[..., Path], scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the same name in the working directory is not taken."""
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    path = recipe_file()
    (Path.cwd() / "reviews.csv").write_text("text,stars\nwrong,1\n")
    loaded = afina.load_recipe(path)
    for given in (path, str(path), loaded, loaded.model_copy(update={"name": "other"})):
        plan = plan_for(given, JobRequest(overrides=["train.epochs=2"]))
        assert plan.files == {"all": (path.parent / "reviews.csv",)} and plan.recipe_file == path
        assert plan.recipe.train.epochs == 2
    copied = plan_for(loaded.model_copy(update={"train": {"epochs": 2}}))
    assert copied.recipe.train.epochs == 2 and copied.files["all"] == (path.parent / "reviews.csv",)
    for wrong in ({"name": "a/b"}, {"modle": "x"}, {"train": {"epoch": 2}}, {"train": 3}, {"data": {"files": 3}}):
        with pytest.raises(RecipeError):
            plan_for(loaded.model_copy(update=wrong))
    plan = plan_for(recipe_dict(name="mapped"), JobRequest(overrides=["train.epochs=2"]))
    assert (plan.recipe.name, plan.recipe.train.epochs, plan.files["all"]) == (
        "mapped",
        2,
        (Path.cwd() / "reviews.csv",),
    )
    assert afina.submit(loaded, dry_run=True).files == {"all": (path.parent / "reviews.csv",)}


def test_options_of_one_submission_are_checked(
    recipe: Callable[..., Recipe], site: Site, claim: Callable[..., RunDir], squeue: Path
) -> None:
    from afina.api import _with_options
    from afina.run.commands import sbatch_argv

    plan = make_plan(recipe(), site)
    done, waiting = claim("a", outcome="finished"), claim("b", job="12")
    squeue.write_text("12|12|PENDING|1:00|N/A||Resources\n")
    asked = JobRequest(
        slurm={"partition": "gpu", "mail_type": "END"}, after=[afina.Run(done.path), afina.Run(waiting.path), "99_1"]
    )
    argv = sbatch_argv(_with_options(plan, asked), Path("/run"))
    assert {"--partition=gpu", "--mail-type=END", "--dependency=afterok:12:99_1"} <= set(argv)
    for slurm, message in (
        ({"nodes": 2}, "slurm: --nodes cannot be set"),
        ({"output": "x"}, "slurm: --output cannot be set"),
    ):
        with pytest.raises(InputError, match=message):
            _with_options(plan, JobRequest(slurm=slurm))
    with pytest.raises(InputError, match="has no job to wait for"):
        _with_options(plan, JobRequest(after=[claim("c").path]))
    with pytest.raises(InputError, match="neither a run nor a job"):
        _with_options(plan, JobRequest(after=["nonsense"]))


def test_a_run_is_found_by_its_jobs_number(
    recipe: Callable[..., Recipe], site: Site, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(site.scratch))
    plan = make_plan(recipe(), site, recipe_file=recipe_file())
    runs = [new_run.claim(plan, {}, ["true"], "") for _ in range(2)]
    for run, job in zip(runs, ("41", "42_7"), strict=True):
        run.append("submissions.jsonl", {"job_id": job, "via": "sbatch"})
    assert (afina.Run("41").path, afina.Run("42_7").path) == (runs[0].path, runs[1].path)
    with pytest.raises(InputError, match="no run or sweep of that name"):
        afina.Run("4")


def test_the_package_is_typed_and_lists_its_names() -> None:
    """Each name has one home, is imported lazily, and nothing else is public."""
    from afina import _HOMES

    assert (ROOT / "src/afina/py.typed").exists()
    assert sorted(afina.__all__) == sorted([*_HOMES, "__version__"]) and set(afina.__all__) <= set(dir(afina))
    for name in afina.__all__:
        value = getattr(afina, name)
        assert name == "__version__" or inspect.getdoc(value), name
    assert [name for name in dir(afina) if not name.startswith("_")] == sorted(set(afina.__all__) - {"__version__"})


def test_submissions_in_threads_keep_their_sites_apart(
    recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites, both ways, beside each other: each job gets its own variables, and this process keeps its own."""
    from afina.slurm.submit import submit_sbatch
    from afina.slurm.submitit_job import submit_submitit

    folder, where = tmp_path / "bin", shlex.quote(str(tmp_path))
    job = f'echo "$SBATCH_PARTITION $AFINA_SCRATCH" >{where}/seen.$$; sleep 0.1; echo $$\n'
    for name, body in (("sbatch", job), ("srun", "true\n"), ("squeue", "true\n")):
        program(folder, name, body)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    before = dict(os.environ)
    jobs: dict[str, str] = {}

    def claimed(number: int) -> RunDir:
        site = Site(scratch=tmp_path / f"scratch{number % 2}", sbatch={"SBATCH_PARTITION": f"part{number % 2}"})
        plan = make_plan(recipe(), site, recipe_file=recipe_file())
        return new_run.claim(plan, {}, ["true"], "", tmp_path / f"run {number}")

    def submit(number: int, run: RunDir) -> None:
        plan = run.plan()
        job = (submit_submitit if number % 4 < 2 else submit_sbatch)(plan, run)
        jobs[job] = f"part{number % 2} {plan.site.scratch}\n"

    threads = [threading.Thread(target=submit, args=(number, claimed(number))) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert {number: (tmp_path / f"seen.{number}").read_text() for number in jobs} == jobs and len(jobs) == 8
    assert dict(os.environ) == before


@pytest.mark.parametrize("version", ["1.4.6", "1.5.3"])
def test_a_submitit_whose_jobs_would_fail_is_refused(
    claim: Callable[..., RunDir], squeue: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """By its number; the requirement names the same one. Which fail was tried with each, see `_LOWEST`."""
    import submitit

    from afina.slurm.submitit_job import _LOWEST

    lowest = ".".join(map(str, _LOWEST))
    assert f'"submitit>={lowest}"' in (ROOT / "pyproject.toml").read_text()
    monkeypatch.setattr(submitit, "__version__", version)
    with pytest.raises(EnvironmentProblem, match=f"submitit {version}: ") as caught:
        afina.Run(claim().path).submit()
    assert f"submitit>={lowest}" in caught.value.remedy


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_users_project_is_checked_with_afinas_types(tmp_path: Path) -> None:
    mypy = pytest.importorskip("mypy.api")
    (tmp_path / "study.py").write_text(
        "import afina\n"
        "run: afina.Run = afina.submit('recipe.yaml', nodes=2, slurm={'partition': 'gpu'}, after=[])\n"
        "plan: afina.Plan = afina.submit('recipe.yaml', dry_run=True)\n"
        "error: afina.AfinaError | None = run.exception(timeout=3)\n"
        "paths = [done.path for done in afina.as_completed(afina.wait([run]))]\n"
        "trained: afina.Run = afina.train({'name': 'x'}, overrides=['train.epochs=1'], check=False).submit()\n"
        "answer = afina.predict(run, 'new.csv', 'out.csv', num_processes=1)\n"
        "model, exported = afina.load(run), afina.export(run, onnx=True)\n"
        "again: afina.Run = afina.resume(run, check=False)\n"
        "async def main() -> afina.Outcome:\n    return await run\n"
        "wrong: str = run.result()\n"
    )
    # What a login node lacks, and takes minutes to read.
    skipped = "torch.*,transformers.*,datasets.*,accelerate.*,pandas.*,numpy.*,pyarrow.*,scipy.*,sklearn.*"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\n[mypy-{skipped}]\nfollow_imports = skip\n")
    argv = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    output, errors, code = mypy.run([*argv, str(tmp_path / "study.py")])
    assert code == 1 and output.count("error:") == 1 and "study.py:12" in output, output + errors


# -- trainings here ----------------------------------------------------------------------------------------------------

LOOP = """
import sys, afina
from afina import api
seen = []
for path in sys.argv[1:]:
    try:
        afina.resume(path)
    except KeyboardInterrupt:
        print("interrupted"); break
    except SystemExit as ended:
        print("exit", ended.code); break
    except afina.AfinaError as error:
        print(type(error).__name__)
"""
#: A worker that stops when it is asked to, as a training does, and records that it did.
STOPS = """
echo up; for i in {1..400}; do [ ! -e "$1/stop" ] || break; sleep 0.05; done
printf '{"outcome": "stopped", "exit_code": 75, "attempt": "%s", "cause": "asked"}' "$AFINA_ATTEMPT" >"$1/outcome.json"; exit 75
"""


@pytest.mark.parametrize(("number", "answer"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "exit 143\n")])
def test_a_signal_ends_the_loop_that_trains_and_not_one_training(
    claim: Callable[..., RunDir], scratch: Path, number: signal.Signals, answer: str
) -> None:
    runs = [claim(name, worker=STOPS).path for name in ("a", "b")]
    argv = [sys.executable, "-c", LOOP, *map(str, runs)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert output == answer and "Traceback" not in errors
    assert not RunDir(runs[1]).attempt_names(), "the next training began"


def test_a_training_that_fails_raises_unless_told_otherwise(claim: Callable[..., RunDir]) -> None:
    with pytest.raises(afina.Failed, match="exit code 4"):
        afina.resume(claim("a", worker="exit 4").path)
    assert afina.resume(claim("b", worker="exit 4").path, check=False).state == "FAILED"


def test_a_reader_that_goes_away_does_not_stop_a_training(claim: Callable[..., RunDir]) -> None:
    """More than a pipe holds, and a sign that ASCII lacks; the log has it all."""
    worker = 'for i in {1..3000}; do echo "line $i of a long log: 3 × 4, and more of it"; done; exit 4'
    for name, ending in (("a", "| head -n 1"), ("b", ">&-"), ("c", "")):
        run = claim(name, worker=worker)
        code = f"import afina; afina.resume({str(run.path)!r}, check=False)"
        env = {**os.environ, "PYTHONIOENCODING": "ascii"}
        command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {ending}"
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        log = (run.attempts / "local-1/node0.log").read_text("utf-8")
        assert len(log.splitlines()) == 3000 and "3 × 4" in log
        assert run.outcome() is not None


def test_a_launchers_variables_do_not_reach_the_worker() -> None:
    from afina.run.commands import without_launcher

    names = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID PET_NNODES ACCELERATE_USE_FSDP OMPI_COMM_WORLD_SIZE"
    kept = {"OMP_NUM_THREADS": "1", "PATH": "/bin", "SLURM_JOB_ID": "7"}
    assert without_launcher({**dict.fromkeys(names.split(), "3"), **kept}) == kept


@pytest.mark.timeout(240)
def test_a_training_beside_files_named_like_libraries_in_a_launchers_shell(
    afina_in: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    recipe = tiny.write_project(tmp_path / "project", rows=60, train={"max_steps": 2})
    for name in ("datasets", "evaluate", "tokenizers", "accelerate", "transformers", "torch", "random", "sklearn"):
        (recipe.parent / f"{name}.py").write_text("import os; os._exit(99)\n")
    launcher = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
    env = {**launcher, "TORCHELASTIC_RUN_ID": "x", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    for processes in ("1", "2"):
        done = afina_in(recipe.parent, "train", recipe, "--num-processes", processes, env=env)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def afina_in(scratch: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the `afina` command in a folder, as a user does: the script, which does not put the folder on the path."""

    def run(folder: Path, *words: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).with_name("afina")), *map(str, words)]
        given = {**os.environ, "AFINA_SCRATCH": str(scratch), **env}
        return subprocess.run(argv, cwd=folder, env=given, capture_output=True, text=True, timeout=200, check=False)

    return run
