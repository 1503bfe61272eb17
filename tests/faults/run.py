"""The suite of faults: runs that are killed, stopped, starved and damaged, beside one that is left alone.

Examples:
  python tests/faults/run.py                                       every case, here, one process
  python tests/faults/run.py --case kill-rank --processes 2        one case, two processes
  python tests/faults/run.py --kills 200 --seed 7 --json kills.jsonl
                                                                   200 random kills; the same command again goes on
                                                                   where it was cut off
  python tests/faults/run.py --where slurm --tracker cgroup --processes 2x2 --image afina.sif
                                                                   in the image, on a test cluster of its own (as root)
  python tests/faults/run.py --show one.jsonl two.jsonl            what --json kept of several calls, as one table
  python tests/faults/run.py --list                                the cases

Progress goes to standard error, the table (Markdown) to standard output. Exit code 1: a run was lost, hung, began anew
silently or is not the undisturbed one; 2: a strike came too late and proves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.faults import stories  # noqa: E402
from tests.faults.cases import CASES, Case, case  # noqa: E402
from tests.faults.disks import Disk  # noqa: E402
from tests.faults.here import HereRun, may  # noqa: E402
from tests.faults.live import Live, Setting  # noqa: E402
from tests.faults.on_slurm import Cluster, SlurmRun, hand_over  # noqa: E402
from tests.faults.place import make_place, prefetch  # noqa: E402

__all__ = ["Suite", "here_suite", "main", "slurm_suite"]

KILLS_PER_RUN = 5


class Suite:
    """A prepared project folder, a way to make runs in it, and the undisturbed run."""

    def __init__(self, place: Path, setting: Setting, make: stories.Make) -> None:
        self.place, self.setting, self.make = place, setting, make
        self.reference = stories.references(make)

    def applies(self, fault: Case) -> str | None:
        """Why a case cannot be run in this setting, or None."""
        if self.setting.where not in fault.where:
            return f"not {self.setting.where}"
        if self.setting.processes < fault.num_processes:
            return f"needs {fault.num_processes} processes"
        if fault.disk and (reason := may("mount")):
            return reason
        if fault.network and (reason := may("unshare")):
            return reason
        return None

    def tell(self, fault: Case, seed: int | str) -> stories.Story:
        folder = self.place / ("scratch/runs" if self.setting.where == "slurm" else f"disk-{fault.name}")
        reference = self.reference(fault.changes)
        return stories.tell(fault, self.make, reference, f"{seed}/{fault.name}", folder)

    def soak(self, seed: int | str, number: int, kills: int) -> stories.Story:
        return stories.soak_run(self.make, self.reference({}), f"{seed}/{number}", kills)


def here_suite(place: Path, setting: Setting) -> Suite:
    make_place(place)
    prefetch(place)

    def make(name: str, disk: Disk | None, network: Sequence[str]) -> Live:
        return HereRun(place, _free(disk.folder if disk else place, name), setting, network)

    return Suite(place, setting, make)


def slurm_suite(place: Path, setting: Setting, cluster: Cluster, image: Path) -> Suite:
    make_place(place)
    hand_over(place, image, cluster)

    def make(name: str, disk: Disk | None, network: Sequence[str]) -> Live:
        return SlurmRun(place, _free(place / "scratch/runs", name).name, setting, cluster)

    return Suite(place, setting, make)


def _free(folder: Path, name: str) -> Path:
    number = 1
    while list(folder.glob(f"{name}-{number}*")):
        number += 1
    return folder / f"{name}-{number}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        for fault in CASES:
            print(f"{fault.name:24}{'/'.join(sorted(fault.where)):12} {fault.sentence}")
        return 0
    if options.show:
        print(stories.grid(story for path in options.show for story in _read(path)))
        return 0
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    _say(f"seed {seed}")
    told: list[stories.Story] = []
    with _suite(options) as suite, ThreadPoolExecutor(options.jobs) as pool:
        for works in _soak(suite, options, seed, told) if options.kills else _cases(suite, options, seed):
            for story in pool.map(lambda work: work(), works):
                told.append(story)
                _say(_line(story))
    text = stories.table(told)
    print(text)
    if options.table:
        options.table.write_text(text + "\n", encoding="utf-8")
    if any(story.broken for story in told):
        return 1
    return 0 if all(story.struck for story in told) else 2


Work = Callable[[], stories.Story]


def _cases(suite: Suite, options: argparse.Namespace, seed: int) -> Iterator[list[Work]]:
    works: list[Work] = []
    chosen = [case(name) for name in options.case] if options.case else [f for f in CASES if options.slow or not f.slow]
    for fault in chosen:
        if reason := suite.applies(fault):
            _say(f"{fault.name}: left out: {reason}")
            continue
        work = partial(_kept, options, partial(suite.tell, fault, seed))
        if fault.exclusive:
            yield works
            yield [work]
            works = []
        else:
            works.append(work)
    yield works


def _soak(suite: Suite, options: argparse.Namespace, seed: int, told: Sequence[stories.Story]) -> Iterator[list[Work]]:
    """Runs with a few kills each, as many as are needed for N; those that `--json` holds already are not run again."""
    known = {story.seed: story for story in _read(options.json) if story.setting == str(suite.setting)}
    number = 0
    while (left := options.kills - sum(story.kills for story in told)) > 0:
        works: list[Work] = []
        for _ in range(min(options.jobs, -(-left // KILLS_PER_RUN))):
            if story := known.get(f"{seed}/{number}"):
                works.append(partial(_same, story))
            else:
                works.append(partial(_kept, options, partial(suite.soak, seed, number, KILLS_PER_RUN)))
            number += 1
        yield works


def _same(story: stories.Story) -> stories.Story:
    return story


def _kept(options: argparse.Namespace, work: Work) -> stories.Story:
    """Do it, write it down, and remove the run unless there is something to see in it."""
    story = work()
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(stories.as_record(story)) + "\n")
    if not (story.broken or options.keep):
        shutil.rmtree(story.run, ignore_errors=True)
    return story


def _read(path: Path | None) -> list[stories.Story]:
    if path is None or not path.is_file():
        return []
    return [stories.from_record(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def _suite(options: argparse.Namespace) -> Iterator[Suite]:
    nodes, _, per_node = options.processes.rpartition("x")
    setting = Setting(
        options.where, int(nodes or 1), int(per_node), options.tracker if options.where == "slurm" else ""
    )
    place = options.place or Path(tempfile.mkdtemp(prefix="afina-faults-", dir="/tmp"))
    if options.where == "here":
        yield here_suite(place, setting)
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
            yield slurm_suite(place, setting, cluster, options.image.resolve())
    if not options.place and not options.keep:
        shutil.rmtree(place, ignore_errors=True)


def _line(story: stories.Story) -> str:
    verdict = f"BROKEN ({'; '.join(story.broken)})" if story.broken else "kept"
    if not story.struck:
        verdict += ", but a strike came too late"
    said = f"{story.case} [{story.setting}, seed {story.seed}]: {verdict}: {'; '.join(story.happened)}"
    said += f"; {', '.join(story.endings)}; {story.attempts} attempts, {story.repeated} steps repeated"
    said += f", {story.seconds_lost:.0f} s lost"
    return f"{said}\n  {story.difference}\n  {story.run}" if story.broken else said


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=[c.name for c in CASES], metavar="NAME", help="only these cases")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument(
        "--show",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="steps done again, by case and setting, from files of --json",
    )
    parser.add_argument("--slow", action="store_true", help="also the cases that take minutes")
    parser.add_argument("--where", choices=["here", "slurm"], default="here")
    parser.add_argument(
        "--tracker", choices=["linuxproc", "cgroup"], default="linuxproc", help="Slurm's process tracker"
    )
    parser.add_argument("--processes", choices=["1", "2", "2x2"], default="1", help="processes, or nodes x processes")
    parser.add_argument("--kills", type=int, metavar="N", help="instead of the cases: N SIGKILLs at random instants")
    parser.add_argument("--seed", type=int, help="repeats the choices of an earlier call")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each story as a line")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--image", type=Path, help="the image, for --where slurm")
    parser.add_argument(
        "--cluster", type=Path, metavar="STATE", help="use the cluster that cluster.py brought up there"
    )
    parser.add_argument("--place", type=Path, metavar="DIR", help="the project folder; kept (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the run directories")
    return parser


if __name__ == "__main__":
    sys.exit(main())
