"""Faults to inject into a live run and their repairs: functions of a `Scene` that describe what they did.

Each draws its moment, rank and byte from the scene's random generator, so a seed repeats the choices. What the run is
doing at that moment depends on the machine: a step takes milliseconds.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.disks import Disk
from tests.faults.live_run import STAGES, LiveRun, committed_steps, freeze
from tests.faults.local_run import LocalRun
from tests.faults.project import SAVE_EVERY, STEPS
from tests.faults.slurm_run import SlurmRun
from tests.processes import signal_all


@dataclass
class Scene:
    """What a fault or a repair acts on."""

    live: LiveRun
    rng: random.Random
    disk: Disk | None = None
    #: Checkpoints are damaged on purpose.
    damaged: bool = False
    #: Folders that a repair keeps for the next one.
    kept: dict[str, Path] = field(default_factory=dict)
    #: Contents of files before a fault.
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def local(self) -> LocalRun:
        assert isinstance(self.live, LocalRun)
        return self.live

    @property
    def slurm(self) -> SlurmRun:
        assert isinstance(self.live, SlurmRun)
        return self.live

    @property
    def small_disk(self) -> Disk:
        assert self.disk is not None
        return self.disk


Action = Callable[[Scene], str]


# Moments


def _some_step(scene: Scene, low: int = 5, high: int = STEPS // 2) -> int:
    """Wait for a random moment of a random step, early enough that a busy machine does not miss it; returns the step."""
    step = scene.live.wait_for_step(scene.rng.randint(low, high))
    time.sleep(scene.rng.uniform(0, 0.01))
    return step


def _saved_step(scene: Scene, checkpoints: int = 1) -> int:
    """Wait for a random step after that many committed checkpoints; returns the step."""
    step = _some_step(scene, (checkpoints + 1) * SAVE_EVERY, (checkpoints + 4) * SAVE_EVERY)
    scene.live.until(lambda: len(committed_steps(scene.live.run)) >= checkpoints, f"{checkpoints} checkpoint(s)")
    return step


def _some_rank(scene: Scene) -> int:
    return scene.rng.randrange(scene.live.setting.processes)


# Faults


def at_step(words: str, act: Callable[[Scene], object], saved: int = 0) -> Action:
    """Do this at a random step, of those after `saved` checkpoints; `words` say it."""

    def inject(scene: Scene) -> str:
        step = _saved_step(scene, saved) if saved else _some_step(scene)
        act(scene)
        return words.format(step=step) if "{step}" in words else f"{words} at step {step}"

    return inject


def signal_host(number: signal.Signals) -> Action:
    return at_step(f"{number.name} to the host process", lambda scene: scene.live.signal_host(number))


def signal_step(number: signal.Signals) -> Action:
    return at_step(f"{number.name} to the step", lambda scene: scene.live.signal_step(number))


kill_all = at_step("SIGKILL to every process", lambda scene: scene.live.kill_everything())
kill_all_saved = at_step(
    "SIGKILL to every process at step {step}, after two checkpoints", lambda scene: scene.live.kill_everything(), 2
)
kill_host = signal_host(signal.SIGKILL)
touch_stop = at_step("the stop file", lambda scene: (scene.live.run / "stop").touch())
cut_network_for_good = at_step(
    "no network between the ranks from step {step} on", lambda scene: scene.local.cut_network()
)
scancel = at_step("scancel", lambda scene: scene.slurm.scancel())
requeue = at_step("scontrol requeue", lambda scene: scene.slurm.requeue())
preempt = at_step("preempted by a job of a higher partition", lambda scene: scene.slurm.preempt())


def kill_rank(scene: Scene) -> str:
    rank, step = _some_rank(scene), _some_step(scene)
    signal_all([scene.live.rank(rank)], signal.SIGKILL)
    return f"SIGKILL to rank {rank} at step {step}"


def kill_starting(scene: Scene) -> str:
    pause = scene.rng.uniform(0, scene.live.start_s)
    time.sleep(pause)
    scene.live.kill_everything()
    return f"SIGKILL to every process {pause:.1f} s after the start"


def kill_ending(scene: Scene) -> str:
    """After the last step, while the model is written."""
    scene.live.wait_for_step(STEPS)
    pause = scene.rng.uniform(0, 0.1)
    time.sleep(pause)
    scene.live.kill_everything()
    return f"SIGKILL to every process {1000 * pause:.0f} ms after the last step"


def kill_at(stage: str) -> Action:
    def inject(scene: Scene) -> str:
        after = scene.rng.randrange(2 * SAVE_EVERY, STEPS // 2)
        ranks = scene.live.freeze_at(stage, after)
        one = scene.rng.random() < 0.5
        if one:
            signal_all([scene.live.rank(0)], signal.SIGKILL)
            signal_all(ranks, signal.SIGCONT)
        else:
            scene.live.kill_everything()
        return f"SIGKILL to {'rank 0' if one else 'every process'} with a save {stage}, after step {after}"

    return inject


def term_rank(scene: Scene) -> str:
    rank, step = _some_rank(scene), _some_step(scene)
    signal_all([scene.live.rank(rank)], signal.SIGTERM)
    return f"SIGTERM to rank {rank} alone at step {step}"


def term_skewed(scene: Scene) -> str:
    """The other ranks are frozen during the pause: steps take milliseconds, and the run would end before it."""
    step = _some_step(scene)
    ranks = scene.live.ranks()
    order = scene.rng.sample(sorted(ranks), len(ranks))
    pause = scene.rng.uniform(1, 3)
    signal_all([ranks[order[0]]], signal.SIGTERM)
    freeze(ranks[rank] for rank in order[1:])
    time.sleep(pause)
    signal_all([ranks[rank] for rank in order[1:]], signal.SIGTERM)
    signal_all([ranks[rank] for rank in order[1:]], signal.SIGCONT)
    return f"SIGTERM to rank {order[0]} at step {step}, to the others {pause:.1f} s later"


def fill_disk(leave: int) -> Action:
    """Fill the disk but for `leave` bytes: with 64 KiB log lines still fit and the next save does not."""
    words = f"file system full (but {leave} bytes) from step {{step}} on"
    return at_step(words, lambda scene: scene.small_disk.fill(leave), 1)


fail_disk = at_step(
    "EIO for everything on the file system from step {step} on", lambda scene: scene.small_disk.fail(), 1
)


def cut_power(scene: Scene) -> str:
    step = _saved_step(scene, 2)
    freeze(scene.live.ranks().values())
    scene.small_disk.fail(power_cut=True)
    scene.live.kill_everything()
    return f"power cut at step {step}: what was not flushed to the disk is lost"


def cut_power_when_finished(scene: Scene) -> str:
    """At the moment at which the outcome says finished; what a user then has, `mount_again_whole` compares."""
    scene.live.until(lambda: scene.live.finished, "the word finished", patience_s=600, pause_s=0.001)
    freeze(scene.live.processes())
    scene.files = _result_files(scene.live.run)
    scene.small_disk.fail(power_cut=True)
    scene.live.kill_everything()
    return f"power cut when the outcome said finished; {len(scene.files)} files were there"


def _result_files(run: Path) -> dict[str, bytes]:
    """The files of a finished run that people use, by name; events and checkpoints are not among them."""
    files = [
        *run.glob("*.json*"),
        *run.glob("*.parquet"),
        *run.glob("*.npy"),
        *run.glob("model/**/*"),
        run / "worker.argv",
    ]
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in files
        if file.is_file() and file.name not in ("events.jsonl", "lease.json")
    }


def stop_rank(scene: Scene) -> str:
    rank, step, pause = _some_rank(scene), _some_step(scene), scene.rng.uniform(2, 4)
    pid = scene.live.rank(rank)
    freeze([pid])
    time.sleep(pause)
    signal_all([pid], signal.SIGCONT)
    return f"rank {rank} was halted for {pause:.1f} s at step {step}"


def stop_rank_for_good(scene: Scene) -> str:
    rank, step = _some_rank(scene), _some_step(scene)
    freeze([scene.live.rank(rank)])
    return f"rank {rank} is halted from step {step} on"


def cut_network(scene: Scene) -> str:
    step, pause = _some_step(scene), scene.rng.uniform(2, 4)
    scene.local.cut_network()
    time.sleep(pause)
    scene.local.restore_network()
    return f"no network between the ranks for {pause:.1f} s at step {step}"


def nothing(scene: Scene) -> str:
    return "no other fault"


def second_start(scene: Scene) -> str:
    """Before the first has begun to train: without a lease both would train."""
    return f"started a second time at once: {scene.live.second()}"


def fail_node(scene: Scene) -> str:
    step = _some_step(scene)
    node = scene.rng.choice(scene.slurm.nodes())
    scene.slurm.fail_node(node)
    return f"node {node} lost power at step {step}"


def wait_for_limit(scene: Scene) -> str:
    scene.live.wait_for_training()
    return "one minute of time limit"


# Repairs


def free_disk(scene: Scene) -> str:
    scene.small_disk.free()
    return "space freed"


def mount_again(scene: Scene) -> str:
    scene.live.clean_up()
    scene.small_disk.mount_again()
    return "file system mounted again"


def mount_again_whole(scene: Scene) -> str:
    mount_again(scene)
    lost = {
        name for name, content in _result_files(scene.live.run).items() if scene.files.pop(name, content) != content
    }
    assert not lost and not scene.files, f"not on the disk, or not whole: {sorted(lost)} {sorted(scene.files)}"
    return "file system mounted again: all files are whole"


def _newest(scene: Scene) -> Path:
    return scene.live.run / "checkpoints" / f"step-{committed_steps(scene.live.run)[-1]}"


def damage(how: str, file: str = "") -> Action:
    """Damage one file of the newest checkpoint, chosen at random unless named."""

    def repair(scene: Scene) -> str:
        folder = _newest(scene)
        names = sorted(p.name for p in folder.iterdir() if p.name != "manifest.json" and p.stat().st_size)
        path = folder / (file or scene.rng.choice(names))
        _damage(path, how, scene.rng)
        scene.damaged = True
        return f"{path.name} of {folder.name} {how}"

    return repair


def _damage(path: Path, how: str, rng: random.Random) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        with path.open("r+b") as file:
            file.truncate(rng.randrange(path.stat().st_size))
    else:
        with path.open("r+b") as file:
            file.seek(rng.randrange(path.stat().st_size))
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def damage_all(scene: Scene) -> str:
    checkpoints = scene.live.run / "checkpoints"
    scene.kept["copy"] = scene.live.run.with_name(f"{scene.live.run.name}.kept")
    shutil.copytree(checkpoints, scene.kept["copy"])
    for folder in checkpoints.glob("step-*"):
        _damage(folder / "model.safetensors", "bit-flipped", scene.rng)
    scene.damaged = True
    return "every checkpoint bit-flipped"


def restore_all(scene: Scene) -> str:
    """Keep the owner: the run may belong to another user than the suite."""
    checkpoints = scene.live.run / "checkpoints"
    owner = checkpoints.stat()
    shutil.rmtree(checkpoints)
    scene.kept["copy"].rename(checkpoints)
    for path in (checkpoints, *checkpoints.rglob("*")):
        shutil.chown(path, owner.st_uid, owner.st_gid)
    scene.damaged = False
    return "checkpoints restored"


# Random kills


def random_kill(scene: Scene, share: float, last: bool) -> str:
    """SIGKILL at a random instant of an attempt (start, training, save or end) to one rank, the host process or all.

    Args:
        share: the mean part of the run that an attempt trains before it is killed in training.
        last: the last kill, which may come at the end of the run.
    """
    rng, live = scene.rng, scene.live
    moment = rng.choices(("training", "save", "start", "end"), (6, 2, 1, 3 if last else 0))[0]
    victim = rng.choices(("all", "rank", "host"), (3, 3, 1))[0]
    if moment == "start":
        pause = rng.uniform(0, 1.2 * live.start_s)
        time.sleep(pause)
        when = f"{pause:.1f} s after the start"
    elif moment == "end":
        live.wait_for_step(STEPS)
        time.sleep(rng.uniform(0, 0.1))
        when = "after the last step"
    elif moment == "save":
        first = live.wait_for_training()
        stage = rng.choice(STAGES)
        live.freeze_at(stage, first + rng.randrange(SAVE_EVERY))
        when = f"with a save {stage}"
    else:
        first = live.wait_for_training()
        step = live.wait_for_step(first + rng.randrange(max(2, int(2 * share * STEPS))))
        time.sleep(rng.uniform(0, 0.01))
        when = f"at step {step}"
    ranks = live.ranks()
    if victim == "rank" and ranks:
        number = rng.choice(sorted(ranks))
        signal_all([ranks.pop(number)], signal.SIGKILL)
        signal_all(ranks.values(), signal.SIGCONT)
        return f"rank {number} {when}"
    if victim == "host":
        live.signal_host(signal.SIGKILL)
        signal_all(ranks.values(), signal.SIGCONT)
        return f"host {when}"
    live.kill_everything()
    return f"all {when}"
