"""The same faults against plain `Trainer`, `Trainer` with `enable_jit_checkpoint`, and afina.

Each peer trains the same model on the same reviews, first undisturbed, then once per fault; after a fault it is restarted with its own
command, at most three times. A run is `finished` if the last start exits with 0, all steps are logged and the model is there; its weights
are `equal` if the SHA-256 of the saved model is that of the same peer's undisturbed run. `silent`: finished with other weights, without a
warning in the output. `hung`: nothing written for `--patience` seconds. Instants are drawn from a seed. A run that resumes only after a
folder has been deleted by hand is not finished. A tiny model spends a larger share of its time in saves than a large one, so that more
random kills hit a save.

    python tests/bench/peers_faults.py [--csv reviews.csv --model FOLDER] [--faults term,skew] [--json found.json]

`--where slurm` brings up the test cluster and compares submitit's own requeue with afina (peers_slurm.py).

Not covered: GPUs, more than one node. `full` needs to mount a tmpfs. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from peer_runs import PEERS, Case, Row, Work, digest, tiny_work

__all__ = ["FAULTS", "compare", "table"]

_TMPFS = 4 << 30  # bytes at most: pages are taken as they are written


# The faults. Each starts the run, harms it, and returns when no process is left.


def _at(case: Case, low: float, high: float) -> bool:
    """Wait for a random step between two shares of the run, and a random moment more."""
    step = case.rng.randint(int(low * case.work.steps), int(high * case.work.steps))
    reached = case.until(lambda: case.step() >= step)
    time.sleep(case.rng.uniform(0, 0.05))
    return reached


def _killed(case: Case) -> None:
    """SIGKILL three times, at random instants of the first, second and last third."""
    case.start()
    for third in range(3):
        if third:
            case.restart()
        _at(case, third / 3 + 0.05, third / 3 + 0.3)
        case.strike()
        if third:
            case.count()


def _killed_in_save(case: Case) -> None:
    """SIGKILL while a checkpoint is written, after a random number of its files."""
    case.start()
    case.until(lambda: case.step() >= 2.5 * case.work.save_every)
    wanted = case.rng.randint(0, 9)
    known = {path.name for path in case.checkpoints.iterdir()}
    seen: list[str] = []

    def being_written() -> bool:
        for path in case.checkpoints.iterdir():
            if path.name not in known and path.is_dir() and path.name != "model":
                with contextlib.suppress(FileNotFoundError):
                    seen[:] = [p.name for p in path.iterdir()]
                    return len(seen) >= wanted
        return bool(seen)  # it is complete and has its final name

    case.until(being_written, pause=0)
    case.strike()
    case.notes.append(f"killed with {len(seen)} files there")


def _damage(harm: Callable[[Path], None], pattern: str) -> Callable[[Case], None]:
    def fault(case: Case) -> None:
        case.start()
        case.until(lambda: case.step() >= 3.5 * case.work.save_every)
        case.strike()
        newest = case.newest()
        harmed = [path for path in newest.iterdir() if re.match(pattern, path.name)]
        if not harmed:
            raise RuntimeError(f"{newest}: no file is called {pattern}: the fault would prove nothing")
        for path in harmed:
            harm(path)

    return fault


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    """One bit of a weight: the second highest of an exponent, in the middle of the file."""
    with path.open("r+b") as file:
        place = path.stat().st_size // 2 // 4 * 4 + 3
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x20]))


def _term(case: Case) -> None:
    """SIGTERM to every process, without a time limit."""
    case.start()
    _at(case, 0.1, 0.4)
    case.signal(signal.SIGTERM)
    case.wait()


def _skew(case: Case) -> None:
    """SIGTERM to the first of two ranks, and one second later to the second."""
    case.start()
    _at(case, 0.1, 0.3)
    ranks = case.ranks()
    if len(ranks) != case.processes:
        raise RuntimeError(f"{case.run}: {len(ranks)} ranks were found: the fault would prove nothing")
    for index, pid in enumerate(ranks):
        if index:
            time.sleep(1.0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    case.wait()


def _full(case: Case) -> None:
    """The file system fills up before a save, and has space again at the restart."""
    case.start()
    case.until(lambda: case.step() >= 2.5 * case.work.save_every)
    size = sum(path.stat().st_size for path in case.newest().rglob("*") if path.is_file())
    room = os.statvfs(case.run)
    _resize(case.run.parent, (room.f_blocks - room.f_bfree) * room.f_frsize + size // 2)
    case.wait()
    _resize(case.run.parent, _TMPFS)


def _resize(place: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


#: Name -> title in the table, the fault, number of processes.
FAULTS: dict[str, tuple[str, Callable[[Case], None], int]] = {
    "kill": ("SIGKILL at 3 random instants", _killed, 1),
    "save": ("SIGKILL during a save", _killed_in_save, 1),
    "truncated": ("optimizer.pt cut in half", _damage(_truncate, r"optimizer\."), 1),
    "optimizer": ("optimizer.pt missing", _damage(Path.unlink, r"optimizer\."), 1),
    "rng": ("random number state missing", _damage(Path.unlink, r"(rng_state.*|ranks)\.(pth|pt)$"), 1),
    "flip": ("a bit flipped in model.safetensors", _damage(_flip, r"model\.safetensors$"), 1),
    "term": ("SIGTERM", _term, 1),
    "skew": ("SIGTERM to 2 ranks, 1 s apart", _skew, 2),
    "full": ("file system full during a save", _full, 1),
}


def compare(
    work: Work, *, peers: Sequence[str] = PEERS, faults: Sequence[str] = tuple(FAULTS), tries: int = 1, seed: int = 1
) -> list[Row]:
    """Every fault against every peer, in turn; `kill` and `save` `tries` times, at other instants."""
    rows: list[Row] = []
    undisturbed: dict[tuple[str, int], str | None] = {}
    for processes in sorted({FAULTS[fault][2] for fault in faults}):
        for peer in peers:
            case = Case(work, peer, work.folder / f"{peer}-whole{processes}", random.Random(seed), processes)
            began = time.monotonic()
            case.start()
            case.wait()
            if not case.complete():
                raise RuntimeError(f"{peer}: the undisturbed run failed:\n{case.output()[-3000:]}")
            undisturbed[peer, processes] = digest(case.weights)
            name = "none" if processes == 1 else f"none, {processes} processes"
            rows.append(_tell(case.row(name, undisturbed[peer, processes], began)))
    for fault in faults:
        title, harm, processes = FAULTS[fault]
        for number in range(tries if fault in ("kill", "save") else 1):
            for peer in peers:
                # The same draws for every peer.
                rng = random.Random(f"{seed} {fault} {number}")
                name = f"{peer}-{fault}{number}"
                with _place(work, fault, name) as place:
                    if place is None:
                        rows.append(_tell(Row(peer, title, notes="not run: no tmpfs can be mounted here")))
                        continue
                    case = Case(work, peer, place / name, rng, processes)
                    began = time.monotonic()
                    try:
                        harm(case)
                        case.finish()
                    finally:
                        if case.process is not None and case.process.poll() is None:
                            case.kill()
                    rows.append(_tell(case.row(title, undisturbed[peer, processes], began)))
    return rows


def table(rows: Sequence[Row]) -> str:
    head = (
        "| fault | peer | finished | weights equal | silent loss | steps repeated | hung | doubled log lines | notes |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    order = list(dict.fromkeys(row.fault for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row.fault)):
        word = {True: "yes", False: "no", None: "–"}
        cells = [row.fault, row.peer, word[row.finished], word[row.equal], word[row.silent], str(row.steps_repeated)]
        cells += [word[row.hung], str(row.doubled_lines), row.notes.replace("|", "\\|").replace("\n", " ")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@contextlib.contextmanager
def _place(work: Work, fault: str, name: str) -> Iterator[Path | None]:
    """The folder for a run: `work.folder`, or a small file system of its own; None if it cannot be mounted."""
    if fault != "full":
        yield work.folder
        return
    place = work.folder / f"{name}.tmpfs"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_TMPFS}", "tmpfs", str(place)], capture_output=True)
    try:
        yield place if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def _tell(row: Row) -> Row:
    print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--csv", type=Path, help="real reviews, columns `text` and --label; by default tiny synthetic ones"
    )
    parser.add_argument("--model", help="a model folder; by default a tiny one")
    parser.add_argument("--label", default="stars")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--save-every", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--where", choices=["here", "slurm"], default="here", help="slurm: faults from a real Slurm")
    parser.add_argument("--image", type=Path, help="with --where slurm: submitit also in this image")
    parser.add_argument("--python", default=sys.executable, help="with --where slurm: that the ordinary user may start")
    parser.add_argument("--peers", help=f"by default {','.join(PEERS)}")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--tries", type=int, default=4, help="repetitions of the faults at random instants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=60)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--keep", type=Path, help="keep runs and outputs in this new folder")
    options = parser.parse_args(arguments)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="peers-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        work = tiny_work(
            folder.absolute(),
            csv=options.csv,
            model=options.model,
            label=options.label,
            steps=options.steps,
            save_every=options.save_every,
            learning_rate=options.learning_rate,
            patience=options.patience,
        )
        chosen = {"peers": options.peers.split(",")} if options.peers else {}
        print(f"seed {options.seed}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
        if options.where == "slurm":
            from peers_slurm import compare_on_slurm

            given = {"image": options.image, "python": options.python, "seed": options.seed}
            rows = compare_on_slurm(work, tell=_tell, **given, **chosen)
        else:
            rows = compare(work, faults=options.faults.split(","), tries=options.tries, seed=options.seed, **chosen)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
