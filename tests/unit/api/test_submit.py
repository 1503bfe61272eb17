"""What `afina.submit` and its like are given: recipes, options, wrong arguments, jobs, sites of their own."""

from __future__ import annotations

import inspect
import os
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import ROOT, program
from tests.unit.conftest import recipe_dict

import afina
from afina.api import plan_for
from afina.errors import EnvironmentProblem, InputError, RecipeError
from afina.recipe.schema import Recipe
from afina.run import new_run
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest
from afina.run.plan import make_plan
from afina.site.settings import Site


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
    with pytest.raises(InputError, match="has had this job"):
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
