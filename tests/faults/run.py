"""The fault suite: runs that are killed, halted, starved and damaged, compared with an undisturbed run.

Examples:
  python tests/faults/run.py                                       every scenario, on this machine, one process
  python tests/faults/run.py --scenario kill-rank --processes 2    one scenario, two processes
  python tests/faults/run.py --kills 200 --seed 7 --json kills.jsonl
                                                                   200 random kills; the same command again resumes
                                                                   where it was interrupted
  python tests/faults/run.py --kills 50 --processes 2 --set train.sharding=fsdp
                                                                   of runs whose model is sharded
  python tests/faults/run.py --where slurm --tracker cgroup --processes 2x2 --image afina.sif
                                                                   in the image, on a test cluster of its own (as root)
  python tests/faults/run.py --show one.jsonl two.jsonl            results of several --json files, as one table
  python tests/faults/run.py --list                                the scenarios

Progress goes to standard error, the table (Markdown) to standard output. Exit code 1: a run was lost, hung, restarted
silently or differs from the undisturbed one; 2: the fault of a scenario came too late and proves nothing (instead of random
kills that come too late there are others).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults import results
from tests.faults.disks import Disk
from tests.faults.experiment import MakeRun, references, run_random_kills, run_scenario
from tests.faults.live_run import LiveRun, Setting
from tests.faults.local_run import LocalRun, needs_root
from tests.faults.project import prefetch, write_project
from tests.faults.results import Result
from tests.faults.scenarios import SCENARIOS, Scenario, find_scenario
from tests.faults.slurm_run import Cluster, SlurmRun, give_to_user, host_programs

__all__ = ["Suite", "local_suite", "main", "python_suite", "slurm_suite"]

KILLS_PER_RUN = 5


class Suite:
    """A prepared project folder, a way to make runs in it, and the undisturbed run."""

    def __init__(self, place: Path, setting: Setting, make: MakeRun, like: Suite | None = None) -> None:
        """With `like` the runs are compared with that suite's undisturbed one, in the same place."""
        self.place, self.setting, self.make = place, setting, make
        self.reference = like.reference if like else references(make, f"undisturbed-{setting.geometry}")

    def applies(self, scenario: Scenario) -> str | None:
        """Why a scenario does not apply to this setting, or None."""
        if self.setting.where not in scenario.where:
            return f"not {self.setting.where}"
        if self.setting.processes < scenario.num_processes:
            return f"needs {scenario.num_processes} processes"
        if scenario.disk and (reason := needs_root("mount")):
            return reason
        if scenario.network and (reason := needs_root("unshare")):
            return reason
        return None

    def run(self, scenario: Scenario, seed: int | str) -> Result:
        folder = self.place / ("scratch/runs" if self.setting.where == "slurm" else f"disk-{scenario.name}")
        reference = partial(self.reference, scenario.changes)
        return run_scenario(scenario, self.make, reference, f"{seed}/{scenario.name}", folder)

    def random_kills(self, seed: int | str, number: int, kills: int, changes: Mapping[str, Any] = {}) -> Result:
        return run_random_kills(self.make, partial(self.reference, changes), f"{seed}/{number}", kills, changes)


def local_suite(place: Path, setting: Setting, popen: type[subprocess.Popen[bytes]] = subprocess.Popen) -> Suite:
    """`popen` starts the runs' commands."""
    write_project(place)
    prefetch(place)

    def make(name: str, disk: Disk | None, network: Sequence[str]) -> LiveRun:
        return LocalRun(place, _free(disk.folder if disk else place, name), setting, network, popen)

    return Suite(place, setting, make)


def slurm_suite(place: Path, setting: Setting, cluster: Cluster, image: Path) -> Suite:
    write_project(place)
    give_to_user(place, image, cluster)

    def make(name: str, disk: Disk | None, network: Sequence[str]) -> LiveRun:
        return SlurmRun(place, _free(place / "scratch/runs", name).name, setting, cluster)

    return Suite(place, setting, make)


def python_suite(like: Suite, cluster: Cluster, host: Path) -> Suite:
    """The suite whose jobs the Python in `host` submits, through submitit; compared with the undisturbed run through sbatch."""
    setting = dataclasses.replace(like.setting, via="submitit")

    def make(name: str, disk: Disk | None, network: Sequence[str]) -> LiveRun:
        return SlurmRun(like.place, _free(like.place / "scratch/runs", name).name, setting, cluster, host)

    return Suite(like.place, setting, make, like)


def _free(folder: Path, name: str) -> Path:
    number = 1
    while list(folder.glob(f"{name}-{number}*")):
        number += 1
    return folder / f"{name}-{number}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:24}{'/'.join(sorted(scenario.where)):12} {scenario.sentence}")
        return 0
    if options.show:
        print(results.grid(result for path in options.show for result in _read(path)))
        return 0
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    _progress(f"seed {seed}")
    done: list[Result] = []
    with _suite(options) as suite, ThreadPoolExecutor(options.jobs) as pool:
        for batch in _random_kills(suite, options, seed, done) if options.kills else _scenarios(suite, options, seed):
            for result in pool.map(lambda work: work(), batch):
                done.append(result)
                _progress(_line(result))
    text = results.table(done)
    print(text)
    if options.table:
        options.table.write_text(text + "\n", encoding="utf-8")
    if any(result.broken for result in done):
        return 1
    return 0 if options.kills or all(result.injected for result in done) else 2


Work = Callable[[], Result]


def _scenarios(suite: Suite, options: argparse.Namespace, seed: int) -> Iterator[list[Work]]:
    batch: list[Work] = []
    chosen = (
        [find_scenario(name) for name in options.scenario]
        if options.scenario
        else [s for s in SCENARIOS if options.slow or not s.slow]
    )
    for scenario in chosen:
        if reason := suite.applies(scenario):
            _progress(f"{scenario.name}: skipped: {reason}")
            continue
        changed = dataclasses.replace(scenario, changes={**scenario.changes, **dict(options.set)})
        work = partial(_kept, options, partial(suite.run, changed, seed))
        if scenario.exclusive:
            yield batch
            yield [work]
            batch = []
        else:
            batch.append(work)
    yield batch


def _random_kills(suite: Suite, options: argparse.Namespace, seed: int, done: Sequence[Result]) -> Iterator[list[Work]]:
    """Runs with a few kills each, until there are N kills; results that `--json` already has are not run again."""
    known = {result.seed: result for result in _read(options.json) if result.setting == str(suite.setting)}
    number = 0
    while (left := options.kills - sum(result.kills for result in done)) > 0:
        batch: list[Work] = []
        for _ in range(min(options.jobs, -(-left // KILLS_PER_RUN))):
            if result := known.get(f"{seed}/{number}"):
                batch.append(partial(_same, result))
            else:
                work = partial(suite.random_kills, seed, number, KILLS_PER_RUN, dict(options.set))
                batch.append(partial(_kept, options, work))
            number += 1
        yield batch


def _same(result: Result) -> Result:
    return result


def _kept(options: argparse.Namespace, work: Work) -> Result:
    """Run it, append the result to `--json`, and remove the run unless a promise was broken."""
    result = work()
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(results.as_record(result)) + "\n")
    if not (result.broken or options.keep):
        shutil.rmtree(result.run, ignore_errors=True)
    return result


def _read(path: Path | None) -> list[Result]:
    if path is None or not path.is_file():
        return []
    return [results.from_record(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def _suite(options: argparse.Namespace) -> Iterator[Suite]:
    nodes, _, per_node = options.processes.rpartition("x")
    setting = Setting(
        options.where, int(nodes or 1), int(per_node), options.tracker if options.where == "slurm" else ""
    )
    place = options.place or Path(tempfile.mkdtemp(prefix="afina-faults-", dir="/tmp"))
    if options.where == "local":
        yield local_suite(place, setting)
    else:
        if options.image is None:
            raise SystemExit("--where slurm needs --image FILE.sif (tests/apptainer/build_image.sh makes one)")
        with contextlib.ExitStack() as stack:
            if options.cluster:
                cluster = Cluster.attach(options.cluster)
                if cluster.proctrack != options.tracker:
                    cluster.restart(proctrack=options.tracker)
            else:
                state = Path(tempfile.mkdtemp(prefix="afina-cluster-", dir="/tmp"))
                stack.callback(shutil.rmtree, state, ignore_errors=True)
                cluster = stack.enter_context(Cluster(state, proctrack=options.tracker))
            suite = slurm_suite(place, setting, cluster, options.image.resolve())
            if options.via == "submitit":
                suite = python_suite(suite, cluster, stack.enter_context(host_programs()))
            yield suite
    if not options.place and not options.keep:
        shutil.rmtree(place, ignore_errors=True)


def _line(result: Result) -> str:
    verdict = f"BROKEN ({'; '.join(result.broken)})" if result.broken else "kept"
    if not result.injected:
        verdict += ", but a fault came too late"
    text = f"{result.scenario} [{result.setting}, seed {result.seed}]: {verdict}: {'; '.join(result.faults)}"
    text += f"; {', '.join(result.endings)}; {result.attempts} attempts, {result.repeated} steps repeated"
    text += f", {result.seconds_lost:.0f} s lost"
    return f"{text}\n  {result.difference}\n  {result.run}" if result.broken else text


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scenario", nargs="+", choices=[s.name for s in SCENARIOS], metavar="NAME", help="only these scenarios"
    )
    parser.add_argument("--list", action="store_true", help="list the scenarios and exit")
    parser.add_argument(
        "--show",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="repeated steps by scenario and setting, from --json files",
    )
    parser.add_argument("--slow", action="store_true", help="also the scenarios that take minutes")
    parser.add_argument("--where", choices=["local", "slurm"], default="local")
    parser.add_argument(
        "--tracker", choices=["linuxproc", "cgroup"], default="linuxproc", help="Slurm's process tracker"
    )
    parser.add_argument(
        "--via",
        choices=["sbatch", "submitit"],
        default="sbatch",
        help="how jobs are submitted: submitit is from Python",
    )
    parser.add_argument("--processes", choices=["1", "2", "2x2"], default="1", help="processes, or nodes x processes")
    parser.add_argument(
        "--kills", type=int, metavar="N", help="instead of the scenarios: N SIGKILLs at random instants"
    )
    parser.add_argument(
        "--set",
        type=lambda word: tuple(word.split("=", 1)),
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the recipe of the runs",
    )
    parser.add_argument("--seed", type=int, help="repeat the choices of an earlier call")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each result as a line")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--image", type=Path, help="the image, for --where slurm")
    parser.add_argument(
        "--cluster", type=Path, metavar="STATE", help="use the cluster that cluster.py started in this folder"
    )
    parser.add_argument("--place", type=Path, metavar="DIR", help="the project folder; kept (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the run directories")
    return parser


if __name__ == "__main__":
    sys.exit(main())
