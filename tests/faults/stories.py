"""What became of a run under a fault: lead it from its start to its end, watch it, compare it with the undisturbed one.

`tell` runs a case, `soak` many random kills; both give `Story`s, which are a table (`table`) and JSON lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.cases import Case
from tests.faults.disks import Disk
from tests.faults.live import Live, Missed, complete_steps
from tests.faults.strikes import Scene, random_kill

__all__ = ["Make", "Reference", "Story", "as_record", "from_record", "grid", "references", "soak_run", "table", "tell"]

#: So many times a user goes on with a run before it is given up as lost.
MOST_RESUMES = 8
#: An attempt that shows no end for so long hangs. Everything here takes seconds, Slurm's requeue included.
HANG_S = {"here": 150, "slurm": 300}
#: Keys of the recipe that change how a run is kept safe, not what is trained.
_SAFETY = {"train.stall_minutes", "train.save_every", "train.save_minutes"}
_CODES = {"0", "2", "3", "4", "75"}
_WEIGHTS = Path("model/model.safetensors")
_REQUEUED = "requeued"
#: The name that a run of the soak has in the table.
RANDOM = "random kills"


@dataclass(frozen=True)
class Reference:
    """The undisturbed run: digests of its weights and its metrics log, and its wall time from its claim on."""

    weights: str
    metrics: str
    seconds: float
    log_lines: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """Attributes:
    happened: what was done to the run, in order.
    endings: how each attempt ended, as far as somebody saw it.
    attempts: folders in attempts/.
    by_hand: how often somebody had to go on with the run.
    repeated: steps that were done and logged, and then done again.
    overlooked: committed steps that an attempt did not start from, though they were there.
    weights_equal, metrics_equal: to the undisturbed run's, byte for byte.
    seconds, seconds_lost: wall time from the claim to the end; what it is above the undisturbed run's.
    struck: whether every strike came in time; without it the story proves nothing.
    refused: an attempt to go on was refused.
    lost: it did not finish. silent: it began at step 0 with a committed checkpoint there. hung: it had to be killed.
    kills: strikes that came in time.
    broken: what of the promise did not hold, in words; empty if all did.
    difference: where the log differs from the undisturbed run's, or why the run failed.
    """

    case: str
    setting: str
    seed: str
    happened: tuple[str, ...]
    endings: tuple[str, ...]
    attempts: int
    by_hand: int
    repeated: int
    overlooked: int
    weights_equal: bool
    metrics_equal: bool
    seconds: float
    seconds_lost: float
    struck: bool
    refused: bool
    lost: bool
    silent: bool
    hung: bool
    kills: int = 0
    difference: str = ""
    run: str = ""
    broken: tuple[str, ...] = ()


Make = Callable[[str, Disk | None, Sequence[str]], Live]


class _Watch:
    """Looks at a run all the while: steps done twice, checkpoints that were overlooked, starts from nothing."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.live = scene, scene.live
        self.repeated = self.overlooked = 0
        self.silent = False
        self._peak = self._committed = self._read = self._starts = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # a disk that fails is part of the play
            events = self.live.events()
            for event in events[self._read :]:
                if event.get("event") == "first_step":
                    self._began(int(event["step"]) - 1)
            self._read = len(events)
            self._peak = max(self._peak, self.live.step())
            # What a damaged folder holds is not committed any more, whatever its name says.
            known = [] if self.scene.damaged else [self._committed, *complete_steps(self.live.run)]
            self._committed = max(known, default=0)

    def _began(self, at: int) -> None:
        self._starts += 1
        if self._starts > 1:
            self.repeated += max(0, self._peak - at)
            self.overlooked += max(0, self._committed - at)
            self.silent |= at == 0 and (self._committed > 0 or self.scene.damaged)
        self._peak = at

    def _keep(self) -> None:
        while not self._over.wait(0.02):
            self.look()


def references(make: Make) -> Callable[[Mapping[str, Any]], Reference]:
    """A function that runs the undisturbed run once for each set of changes that makes another training."""
    known: dict[str, Reference] = {}
    lock = threading.Lock()

    def reference(changes: Mapping[str, Any]) -> Reference:
        training = {key: value for key, value in changes.items() if key not in _SAFETY}
        name = f"undisturbed-{len(known)}"
        with lock:
            if str(training) not in known:
                known[str(training)] = _undisturbed(make(name, None, ()), training)
        return known[str(training)]

    return reference


def _undisturbed(live: Live, changes: Mapping[str, Any]) -> Reference:
    try:
        live.start(changes)
        began = time.monotonic()
        live.until(live.ended, "its end", patience_s=900, pause_s=0.05)
        seconds = time.monotonic() - began
        if not live.finished:
            raise RuntimeError(f"the undisturbed run did not finish: {live.ended()}, {live.outcome()} in {live.run}")
        lines = (live.run / "metrics.jsonl").read_text().splitlines()
        return Reference(_digest(live.run / _WEIGHTS), _digest(live.run / "metrics.jsonl"), seconds, tuple(lines))
    finally:
        live.clean_up()


def tell(case: Case, make: Make, reference: Reference, seed: str, folder: Path) -> Story:
    """Run one case to its end. The same seed makes the same choices; what they meet depends on the machine.

    Args:
        seed: of this case alone.
        folder: an own folder of the case, for its small disk.
    """
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(Disk(folder, case.disk)) if case.disk else None
        live = make(case.name, disk, case.network)
        stack.callback(live.clean_up)
        scene = Scene(live, random.Random(seed), disk)
        story = _lead(case, scene, reference, seed)
        if disk and story.broken:  # the disk goes; what there is to see stays
            kept = shutil.copytree(live.run, folder.with_name(f"{live.run.name}.broken"), dirs_exist_ok=True)
            story = dataclasses.replace(story, run=str(kept))
        return story


def soak_run(make: Make, reference: Reference, seed: str, kills: int) -> Story:
    """One run that is killed `kills` times at random."""
    live = make(f"soak-{seed.replace('/', '-')}", None, ())
    scene = Scene(live, random.Random(seed))
    strikes = tuple(partial(random_kill, share=0.5 / kills, last=n == kills) for n in range(1, kills + 1))
    try:
        return _lead(Case(RANDOM, "Killed at random, again and again.", strikes), scene, reference, seed)
    finally:
        live.clean_up()


def _lead(case: Case, scene: Scene, reference: Reference, seed: str) -> Story:
    live, strikes, mends = scene.live, case.strikes, case.mends
    happened: list[str] = []
    endings: list[str] = []
    by_hand, kills, struck, hung, refused = 0, 0, True, False, False
    live.start(case.changes, case.limit_min)
    began = time.monotonic()
    watch = _Watch(scene)
    try:
        for attempt in range(max(len(strikes), len(mends)) + MOST_RESUMES):
            if attempt < len(strikes):
                try:
                    happened.append(strikes[attempt](scene))
                    kills += 1
                except Missed as missed:
                    happened.append(f"missed: {missed}")
                    struck = False
            # A job that puts itself back into the queue has not ended, and the next strike is for its next start.
            struck_at = live.attempts() if attempt + 1 < len(strikes) else None
            live.mark()
            try:
                patience = HANG_S[live.setting.where] * (3 if case.slow else 1)
                over = partial(_over, live, struck_at)
                endings.append(live.until(over, "its end", patience_s=patience, pause_s=0.05))
            except Missed:
                endings.append("hung")
                hung = True
                live.clean_up()
            if endings[-1] == _REQUEUED:
                continue
            watch.look()
            if attempt < len(mends):
                happened.append(mends[attempt](scene))
            if live.finished and attempt >= len(mends):
                break
            said = endings[-1]
            refused |= "exit code 2" in said or "exit code 3" in said or "(2:0" in said or "(3:0" in said
            if not live.finished:
                by_hand += 1
                # Refused, perhaps because the run lives on without its host: again, a little later.
                time.sleep(2 if refused else 0)
                live.resume()
    finally:
        watch.close()
    seconds = time.monotonic() - began
    lost = not live.finished
    weights = not lost and _digest(live.run / _WEIGHTS) == reference.weights
    metrics = not lost and _digest(live.run / "metrics.jsonl") == reference.metrics
    story = Story(
        case=case.name,
        setting=str(live.setting),
        seed=seed,
        happened=tuple(happened),
        endings=tuple(endings),
        attempts=live.attempts(),
        by_hand=by_hand,
        repeated=watch.repeated,
        overlooked=watch.overlooked,
        weights_equal=weights,
        metrics_equal=metrics,
        seconds=round(seconds, 1),
        seconds_lost=round(seconds - reference.seconds, 1),
        struck=struck or (case.name == RANDOM and kills > 0),
        refused=refused,
        lost=lost,
        silent=watch.silent,
        hung=hung,
        kills=kills,
        difference=str(live.outcome().get("error", "")) if lost else _first_difference(live.run, reference),
        run=str(live.run),
    )
    return dataclasses.replace(story, broken=tuple(_broken(case, story)))


def _over(live: Live, attempts: int | None) -> str:
    """How the attempt ended; that it was requeued if there are more attempts than `attempts`; empty while it goes on."""
    if said := live.ended():
        return said
    return _REQUEUED if attempts is not None and live.attempts() > attempts else ""


def _broken(case: Case, story: Story) -> Iterator[str]:
    """What of the promise a run did not keep."""
    if story.lost:
        yield "the run is lost"
    if story.silent:
        yield "it began anew though a checkpoint was committed"
    if story.hung:
        yield "it hung"
    if not (story.lost or story.weights_equal):
        yield "the weights differ"
    if not (story.lost or story.metrics_equal):
        yield "the metrics log differs"
    if story.overlooked:
        yield f"{story.overlooked} committed steps were overlooked"
    if case.alone and story.by_hand:
        yield "it did not go on by itself"
    if case.refused and not story.refused:
        yield "it was not refused"
    if case.graceful and story.repeated:
        yield "it was asked to stop, and steps were repeated"
    if case.graceful and story.setting.startswith("here") and story.struck and "exit code 75" not in story.endings[0]:
        yield "it was asked to stop, and did not end with 75"
    for ending in story.endings:
        word, _, code = ending.partition("exit code ")
        if not word and code not in _CODES:
            yield f"exit code {code} is not in the README"
        if "killed by" in ending and "SIGKILL" not in ending:
            yield f"it was {ending}"


def _first_difference(run: Path, reference: Reference) -> str:
    lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    for number, (one, other) in enumerate(zip(lines, reference.log_lines, strict=False), start=1):
        if one != other:
            return f"metrics.jsonl line {number}: {one[:160]} instead of {other[:160]}"
    if len(lines) != len(reference.log_lines):
        return f"metrics.jsonl has {len(lines)} lines instead of {len(reference.log_lines)}"
    return ""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(stories: Iterable[Story]) -> str:
    """Markdown, one line per story, and a line that sums up."""
    stories = list(stories)
    head = ["case", "where", "what happened", "attempts", "by hand", "steps repeated", "weights", "metrics log"]
    head += ["s lost", "lost", "silent restart", "promise"]
    rows = [head, ["---"] * 3 + ["---:"] * 3 + ["---"] * 2 + ["---:"] + ["---"] * 3]
    for story in stories:
        ends = f" ({', '.join(story.endings)})"
        rows.append(
            [
                story.case,
                story.setting,
                "; ".join(story.happened) + ends + ("; HUNG" if story.hung else ""),
                str(story.attempts),
                str(story.by_hand),
                str(story.repeated),
                "equal" if story.weights_equal else "DIFFER",
                "equal" if story.metrics_equal else "DIFFER",
                f"{story.seconds_lost:.0f}",
                "LOST" if story.lost else "no",
                "YES" if story.silent else "no",
                "BROKEN: " + "; ".join(story.broken) if story.broken else "kept" if story.struck else "not tried",
            ]
        )
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    kills = sum(s.kills for s in stories if s.case == RANDOM)
    summed = [
        f"{len(stories)} stories",
        *([f"{kills} random kills"] if kills else []),
        f"{sum(s.lost for s in stories)} runs lost",
        f"{sum(s.silent for s in stories)} silent restarts",
        f"{sum(s.hung for s in stories)} hung",
        f"{sum(s.weights_equal and s.metrics_equal for s in stories)} identical to the undisturbed run",
    ]
    return "\n".join([*lines, "", "; ".join(summed) + "."])


def grid(stories: Iterable[Story]) -> str:
    """Markdown, a line per case and a column per setting: whether the promise was kept, and the steps that were done again."""
    told: dict[str, dict[str, Story]] = {}
    for story in stories:
        told.setdefault(story.case, {})[story.setting] = story
    settings = list(dict.fromkeys(setting for cells in told.values() for setting in cells))
    rows = [["case", *settings], ["---", *["---:"] * len(settings)]]
    for name, cells in told.items():
        rows.append([name, *(_cell(cells.get(setting)) for setting in settings)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(story: Story | None) -> str:
    if story is None:
        return "–"
    return "BROKEN" if story.broken else str(story.repeated) if story.struck else "too late"


def as_record(story: Story) -> dict[str, Any]:
    return dataclasses.asdict(story)


def from_record(record: Mapping[str, Any]) -> Story:
    lists = {name: tuple(record[name]) for name in ("happened", "endings", "broken")}
    return Story(**{**record, **lists})
