from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import ROOT, program
from tests.unit.conftest import recipe_dict

from afina.errors import EnvironmentProblem
from afina.recipe.schema import Recipe
from afina.run.commands import (
    accelerate_argv,
    container_argv,
    job_scripts,
    node_argv,
    sbatch_argv,
    slurm_options,
    worker_argv,
    worker_environment,
)
from afina.run.new_run import claim
from afina.run.plan import Geometry, Plan, make_plan
from afina.site.settings import Site

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str, text: str) -> None:
    """Compare with `golden/NAME`; AFINA_ACCEPT_GOLDEN=1 writes it instead."""
    path = GOLDEN / name
    if ACCEPT:
        path.write_text(text, encoding="utf-8")
    accepted = path.read_text(encoding="utf-8") if path.exists() else ""
    assert text == accepted, (
        f"{path.relative_to(ROOT)} differs; if the change is meant, accept it with\n"
        f"  AFINA_ACCEPT_GOLDEN=1 python -m pytest {Path(__file__).relative_to(ROOT)}"
    )


# Read at import: the hostile environment of each test has no AFINA_ variables.
ACCEPT = os.environ.get("AFINA_ACCEPT_GOLDEN") == "1"


def shown(argv: list[str]) -> str:
    """One word per line, as bash would write it."""
    return "\n".join(shlex.quote(word) for word in argv) + "\n"


def plan_with(site: Site, files: dict[str, tuple[Path, ...]] | None = None, **changes: Any) -> Plan:
    """A plan of paths that need not exist."""
    loaded = Recipe.model_validate(recipe_dict(data__files=DROP, data__hub="owner/data", **changes))
    plan = make_plan(loaded, site)
    return plan.model_copy(update={"files": files or {}})


DROP = "<drop this key>"


def site_with(scratch: str = "/scratch/me/afina", **changes: Any) -> Site:
    given = {"image": Path("/images/afina.sif"), "runtime": "apptainer", **changes}
    return Site(scratch=Path(scratch), **given)


# -- sbatch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "resources"),
    [
        ("1x1", {"time": "1:30:00"}),
        ("2x2", {"nodes": 2, "gpus_per_node": 2, "cpus_per_gpu": 3, "mem_gb": 64, "time": "1-0"}),
        ("cpu", {"gpus_per_node": 0, "cpus_per_gpu": 2}),
    ],
)
def test_sbatch_argv(name: str, resources: dict[str, Any]) -> None:
    plan = plan_with(site_with(), resources=resources)
    golden(f"sbatch-{name}.txt", shown(sbatch_argv(plan, Path("/runs/r-1"))))


def test_sbatch_argv_of_nasty_names() -> None:
    plan = plan_with(site_with(), name="it's; a $(name) ☃")
    argv = sbatch_argv(plan, Path("/runs/100% it's $(r) ☃"))
    golden("sbatch-nasty.txt", shown(argv))


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("gres", {"gpu_request": "gres"}),
        (
            "gres-type",
            {"gpu_request": "gres:a100", "sbatch_extra": ("--gres=nvme:100", "--constraint=ib&gpu", "--exclusive")},
        ),
        ("gpus-type", {"gpu_request": "gpus-per-node:h100"}),
        ("gpus-none", {"gpu_request": "none", "sbatch_extra": ("--partition=a100", "--comment=it's; $(no) 2 words")}),
        ("omit", {"sbatch_omit": ("ntasks-per-node", "mem", "cpus-per-task", "requeue")}),
    ],
)
def test_sbatch_argv_of_other_clusters(name: str, site: dict[str, Any]) -> None:
    plan = plan_with(site_with(**site), resources={"nodes": 2, "gpus_per_node": 2, "mem_gb": 64})
    golden(f"sbatch-{name}.txt", shown(sbatch_argv(plan, Path("/runs/r-1"))))


def test_what_is_left_out_is_not_in_the_script_either(tmp_path: Path) -> None:
    """The command line cannot take back what a header of the batch script says."""
    plan = plan_with(site_with(sbatch_omit=("requeue", "signal", "time", "mem")))
    run = claim(plan, {}, ["x"], "", tmp_path / "r", scripts=job_scripts())
    whole = (ROOT / "slurm/finetune.sbatch").read_text().splitlines()
    kept = (run.path / "finetune.sbatch").read_text().splitlines()
    gone = ("#SBATCH --requeue", "#SBATCH --signal=", "#SBATCH --time=")
    assert kept == [line for line in whole if not line.startswith(gone)] and len(whole) - len(kept) == 3
    assert (run.path / "job.sh").read_bytes() == (ROOT / "slurm/job.sh").read_bytes()
    assert subprocess.run(["bash", "-n", run.path / "finetune.sbatch"], check=False).returncode == 0


def test_site_variables_are_not_repeated_as_options() -> None:
    plan = plan_with(site_with(sbatch={"SBATCH_ACCOUNT": "x"}))
    assert not [word for word in sbatch_argv(plan, Path("/r")) if "account" in word]
    assert set(slurm_options(plan)) == {
        "job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "export", "gpus-per-node",
    }  # fmt: skip


def test_the_scripts_are_those_of_the_repository() -> None:
    names = ("finetune.sbatch", "job.sh", "node.sh")
    assert {name: path.parent for name, path in job_scripts().items()} == dict.fromkeys(names, ROOT / "slurm")


# -- container ---------------------------------------------------------------------------------------------------------

#: What keeps files beside the recipe from being imported; Python 3.10 has no such option, and the door takes the folder off the path.
SAFE = ["-P"] if sys.version_info >= (3, 11) else []
INNER = ["python", "-P", "-m", "afina.worker", "launch", "{run}"]


def test_container_argv() -> None:
    plan = plan_with(
        site_with(binds=("/data:/data:ro", "/opt")), {"train": (Path("/proj/a.csv"), Path("/proj/deep/b.csv"))}
    )
    plan = plan.model_copy(update={"model_folder": Path("/models/bert"), "recipe_file": Path("/home/me/r/recipe.yaml")})
    golden("container.txt", shown(container_argv(plan, INNER, [Path("/elsewhere/runs")])))


def test_container_argv_of_nasty_names() -> None:
    plan = plan_with(
        site_with('/scra tch/a:b,c "d" it\'s', image=Path("/ima ge's.sif"), runtime="singularity"),
        {"all": (Path("/da,ta:ro/☃/x.csv"),)},
        resources={"gpus_per_node": 0},
    )
    golden("container-nasty.txt", shown(container_argv(plan, INNER)))


def test_every_mount_reads_back_as_csv(nasty: str) -> None:
    """Apptainer reads --mount with Go's CSV reader; Python's reads the same quoting."""
    folder = Path("/scratch") / nasty / 'x,y="z"'
    argv = container_argv(plan_with(site_with(str(folder))), INNER)
    value = argv[argv.index("--mount") + 1]
    (fields,) = (
        csv.reader([value], strict=True) if "\n" not in value else csv.reader(value.splitlines(True), strict=True)
    )
    assert fields == ["type=bind", f"src={folder}", f"dst={folder}"]


def test_folders_inside_others_are_bound_once() -> None:
    plan = plan_with(site_with("/s"), {"all": (Path("/s/data/x.csv"), Path("/data/one.csv"), Path("/data/two.csv"))})
    argv = container_argv(plan, INNER, [Path("/s/runs"), Path("/data-2")])
    mounted = [argv[i + 1].split("dst=")[1].rstrip('"') for i, word in enumerate(argv) if word == "--mount"]
    assert sorted(mounted) == ["/data", "/data-2", "/s"]


def test_without_a_container_the_command_is_as_it_is(site: Site, recipe_file: Callable[..., Path]) -> None:
    plan = plan_with(site)
    assert container_argv(plan, INNER) == INNER
    assert worker_argv(plan, "prepare", "x y") == [sys.executable, *SAFE, "-m", "afina.worker", "prepare", "x y"]


def test_worker_argv_inside_and_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_with(site_with())
    argv = worker_argv(plan, "prepare")
    assert argv[0] == "apptainer" and "exec" in argv[:3]
    assert worker_argv(plan, "prepare")[-5:] == ["python", "-P", "-m", "afina.worker", "prepare"]
    monkeypatch.setenv("APPTAINER_CONTAINER", "/x.sif")
    assert worker_argv(plan, "prepare")[0] == sys.executable


def test_node_argv() -> None:
    plan = plan_with(site_with(image=Path("/ima ge's/$(i).sif")), {"all": (Path("/proj/a.csv"),)})
    golden("node.txt", shown(node_argv(plan, [Path("/elsewhere")])))


def test_node_argv_is_the_hosts_wherever_it_is_made(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    """A batch job claims its run inside the container; the command is for the host."""
    plan = plan_with(site_with())
    outside = node_argv(plan)
    monkeypatch.setenv("APPTAINER_CONTAINER", "/x.sif")
    assert node_argv(plan) == outside
    assert outside[:3] == ["bash", "{run}/node.sh", "/images/afina.sif"] and outside.count("/images/afina.sif") == 2
    assert outside[-6:] == ["python", "-P", "-m", "afina.worker", "launch", "{run}"]
    assert node_argv(plan_with(site)) == [sys.executable, *SAFE, "-m", "afina.worker", "launch", "{run}"]


def test_a_run_keeps_its_own_copies_of_the_scripts(site: Site, tmp_path: Path, nasty: str) -> None:
    """What waits in the queue does not run edited code, and is found wherever the run is."""
    plan = plan_with(site)
    run = claim(plan, {}, node_argv(plan_with(site_with())), "", tmp_path / nasty, scripts=job_scripts())
    argv = run.worker_argv()
    assert argv[:2] == ["bash", str(tmp_path / nasty / "node.sh")] and argv[-1] == str(tmp_path / nasty)
    assert Path(argv[1]).read_bytes() == (ROOT / "slurm/node.sh").read_bytes()
    assert not [word for word in argv if "{run}" in word and "{run}" not in nasty]


def test_a_runtime_without_an_image() -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        container_argv(plan_with(site_with(image=None)), INNER)
    assert caught.value.message == "AFINA_RUNTIME=apptainer and no AFINA_IMAGE" and "build.sh" in caught.value.remedy


def test_the_environment_of_a_worker(site: Site) -> None:
    plan = plan_with(site)
    online, offline = worker_environment(plan, offline=False, env={}), worker_environment(plan, offline=True, env={})
    assert {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"} <= offline.keys() - online.keys()
    assert online["PYTHONNOUSERSITE"] == "1" and online["HF_HOME"].startswith(str(site.scratch))
    assert not [value for value in offline.values() if not isinstance(value, str)]


def test_waiting_threads_spin_as_long_as_the_user_says(site: Site) -> None:
    plan = plan_with(site)
    assert worker_environment(plan, offline=True, env={})["GOMP_SPINCOUNT"] == "10000"
    assert worker_environment(plan, offline=True, env={"GOMP_SPINCOUNT": "5"})["GOMP_SPINCOUNT"] == "5"
    assert "GOMP_SPINCOUNT" not in worker_environment(plan, offline=True, env={"OMP_WAIT_POLICY": "active"})


# -- accelerate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "per_node", "node"), [(1, 1, 0), (1, 2, 0), (2, 2, 0), (2, 2, 1)])
def test_accelerate_argv(nodes: int, per_node: int, node: int) -> None:
    geometry = Geometry(
        nodes=nodes,
        processes_per_node=per_node,
        gpus_per_node=per_node,
        cpus_per_process=4,
        global_batch=8,
        batch_per_device=8 // (nodes * per_node),
        accumulation=1,
    )
    argv = accelerate_argv(
        geometry,
        node=node,
        head="node-01.cluster",
        port=23456,
        config=Path("/runs/it's/accelerate.yaml"),
        python="/usr/bin/python",
        command=["-m", "afina.worker", "train", "/runs/it's"],
    )
    golden(f"accelerate-{nodes}x{per_node}-node{node}.txt", shown(argv))


@pytest.mark.slow
def test_accelerate_reads_every_option(tmp_path: Path) -> None:
    """The installed accelerate takes each word of the command for what it is."""
    geometry = Geometry(
        nodes=2,
        processes_per_node=2,
        gpus_per_node=0,
        cpus_per_process=1,
        global_batch=8,
        batch_per_device=2,
        accumulation=1,
    )
    argv = accelerate_argv(
        geometry,
        node=1,
        head="10.0.0.1",
        port=23456,
        config=tmp_path / "c.yaml",
        python=sys.executable,
        command=["-m", "afina.worker", "train", "--not-an-option"],
    )
    script = (
        "import json, sys; from accelerate.commands.launch import launch_command_parser as p;"
        "print(json.dumps(vars(p().parse_args(sys.argv[1:])), default=str))"
    )
    done = subprocess.run([sys.executable, "-c", script, *argv[3:]], capture_output=True, text=True, check=True)
    read = json.loads(done.stdout.splitlines()[-1])
    assert (read["num_machines"], read["num_processes"], read["machine_rank"]) == (2, 4, 1)
    assert (read["main_process_ip"], read["main_process_port"]) == ("10.0.0.1", 23456)
    assert (read["rdzv_backend"], read["multi_gpu"], read["same_network"]) == ("static", True, True)
    assert read["module"] and read["training_script"] == "afina.worker"
    assert read["training_script_args"] == ["train", "--not-an-option"]


# -- what bash makes of it ---------------------------------------------------------------------------------------------


def test_a_dry_run_can_be_pasted_into_a_shell(tmp_path: Path, nasty: str) -> None:
    record = tmp_path / "record"
    fake = program(tmp_path / "bin", "sbatch", f'printf "%s\\0" "$@" >{shlex.quote(str(record))}\n')
    plan = plan_with(site_with(), name=nasty.replace("\n", " ").lstrip(".-"))
    if "\\" in nasty:  # refused: test_directory
        nasty = nasty.replace("\\", "_")
    argv = sbatch_argv(plan, Path("/runs") / nasty)
    subprocess.run(
        ["bash", "-c", shlex.join(argv)], env={**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}, check=True
    )
    assert record.read_bytes().split(b"\0")[:-1] == [os.fsencode(word) for word in argv[1:]]


def test_mail_of_the_site_becomes_options_of_sbatch(
    recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], scratch: Path
) -> None:
    """sbatch reads SBATCH_ACCOUNT from the environment, and has no variables for mail."""
    mail = {"SBATCH_ACCOUNT": "a", "SBATCH_MAIL_TYPE": "END,FAIL", "SBATCH_MAIL_USER": "me@example.org"}
    plan = make_plan(recipe(), Site(scratch=scratch, sbatch=mail), recipe_file=recipe_file())
    options = slurm_options(plan)
    assert (options["mail-type"], options["mail-user"]) == ("END,FAIL", "me@example.org") and "account" not in options
    argv = sbatch_argv(plan, scratch / "run")
    assert "--mail-type=END,FAIL" in argv and "--mail-user=me@example.org" in argv
    plain = make_plan(recipe(), Site(scratch=scratch), recipe_file=recipe_file())
    assert not [word for word in sbatch_argv(plain, scratch / "run") if word.startswith("--mail")]
