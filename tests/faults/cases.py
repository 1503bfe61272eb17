"""The faults: each one value that says what is done to a live run, where it applies, and what is promised of it.

`CASES` is the list; what the acts do is in `strikes.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.faults import strikes as do
from tests.faults.here import NO_NETWORK, OWN_NETWORK
from tests.faults.live import STAGES

__all__ = ["CASES", "Case", "case"]

HERE, SLURM = "here", "slurm"


@dataclass(frozen=True)
class Case:
    """One fault. `strikes[i]` is done to attempt i, `mends[i]` after it has ended and before the user goes on.

    Attributes:
        sentence: what happens, in one sentence.
        where: `here`, `slurm` or both.
        num_processes: the least that it makes sense with.
        changes: keys of the recipe that it needs; those that change the training need an undisturbed run of their own.
        disk: the run directory lies on a small `tmpfs` or `ext4`.
        network: words before the command: a network of its own, or none.
        alone: the run is to finish without anybody's help.
        graceful: it is asked to stop, and so no step is to be done twice.
        refused: an attempt to go on is to be refused once before the mend.
        exclusive: it strikes the whole cluster, and so nothing else may run beside it.
        limit_min: the job's time limit; by default one that it does not meet.
        slow: takes minutes; only run when named or asked for.
    """

    name: str
    sentence: str
    strikes: tuple[do.Act, ...]
    mends: tuple[do.Act, ...] = ()
    where: frozenset[str] = frozenset((HERE, SLURM))
    num_processes: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)
    disk: str = ""
    network: tuple[str, ...] = ()
    alone: bool = False
    graceful: bool = False
    refused: bool = False
    exclusive: bool = False
    limit_min: int = 0
    slow: bool = False


def _cases() -> list[Case]:
    only_here, only_slurm = frozenset((HERE,)), frozenset((SLURM,))
    watched: dict[str, Any] = {"train.stall_minutes": 0.2}
    at_save = dict(
        zip(
            STAGES,
            (
                "Killed while a save has written one file at most.",
                "Killed in the middle of a save.",
                "Killed between the manifest and the rename.",
                "Killed when a checkpoint has just been renamed.",
                "Killed while an old checkpoint is removed.",
            ),
            strict=True,
        )
    )
    return [
        Case("kill-rank", "One rank is killed.", (do.kill_rank,)),
        Case("kill-all", "Every process is killed at once.", (do.kill_all,)),
        Case("kill-again", "Every process is killed, in three attempts.", (do.kill_all, do.kill_starting, do.kill_all)),
        Case("kill-host", "The process outside the container is killed; the training may live on.", (do.kill_host,)),
        Case("kill-starting", "Killed while it starts.", (do.kill_starting,)),
        Case("kill-ending", "Killed while the finished model is written.", (do.kill_ending,)),
        *(Case(f"kill-save-{stage}", sentence, (do.kill_at(stage),)) for stage, sentence in at_save.items()),
        Case(
            "term-step", "SIGTERM reaches every process of the step.", (do.signal_step(signal.SIGTERM),), graceful=True
        ),
        Case("term-rank", "SIGTERM reaches one rank alone.", (do.term_rank,), graceful=True),
        Case(
            "term-skewed", "SIGTERM reaches the ranks seconds apart.", (do.term_skewed,), num_processes=2, graceful=True
        ),
        Case("term-host", "SIGTERM reaches the process outside.", (do.signal_host(signal.SIGTERM),), graceful=True),
        Case(
            "usr1-step", "SIGUSR1 reaches every process of the step.", (do.signal_step(signal.SIGUSR1),), graceful=True
        ),
        Case("usr1-host", "SIGUSR1 reaches the process outside.", (do.signal_host(signal.SIGUSR1),), graceful=True),
        Case("stop-file", "The stop file is touched, in two attempts.", (do.touch_stop, do.touch_stop), graceful=True),
        Case("full-in-save", "The disk is full during a save.", (do.fill_disk(65536),), (do.free_disk,), disk="tmpfs"),
        Case(
            "full-in-log",
            "The disk is full for the metrics log.",
            (do.fill_disk(0),),
            (do.free_disk,),
            disk="tmpfs",
            changes={"train.save_every": 100},
        ),
        Case("io-error", "The disk answers EIO.", (do.fail_disk,), (do.mount_again,), disk="ext4", where=only_here),
        Case("power-cut", "The machine loses power.", (do.cut_power,), (do.mount_again,), disk="ext4", where=only_here),
        *(
            Case(
                f"checkpoint-{how}",
                f"A file of the newest checkpoint is {how}.",
                (do.kill_all_saved,),
                (do.damage(how),),
            )
            for how in ("truncated", "bit-flipped", "missing")
        ),
        *(
            Case(
                f"no-{what}",
                f"{file} is missing in the newest checkpoint.",
                (do.kill_all_saved,),
                (do.damage("missing", file),),
            )
            for what, file in (("optimizer", "optimizer.pt"), ("manifest", "manifest.json"))
        ),
        Case(
            "all-damaged",
            "Every checkpoint is damaged; the run is refused until they are restored.",
            (do.kill_all_saved,),
            (do.damage_all, do.restore_all),
            refused=True,
        ),
        Case("stopped-rank", "A rank stands still for seconds.", (do.stop_rank,), alone=True),
        Case("stopped-for-good", "A rank stands still for ever.", (do.stop_rank_for_good,), changes=watched),
        Case(
            "no-network", "There is no network at all.", (do.nothing,), network=NO_NETWORK, where=only_here, alone=True
        ),
        Case(
            "cut-network",
            "The network between the ranks is away for seconds.",
            (do.cut_network,),
            network=OWN_NETWORK,
            num_processes=2,
            where=only_here,
        ),
        Case(
            "cut-for-good",
            "The network between the ranks is gone.",
            (do.cut_network_for_good,),
            network=OWN_NETWORK,
            num_processes=2,
            where=only_here,
            changes=watched,
        ),
        Case("two-at-once", "The run is started twice.", (do.second_start,)),
        Case("two-resumes", "After a kill it is resumed twice at once.", (do.kill_all, do.second_start)),
        Case("scancel", "The job is cancelled.", (do.scancel,), where=only_slurm),
        Case("requeue", "The job is requeued by hand.", (do.requeue,), where=only_slurm, alone=True),
        Case(
            "preempt", "A more urgent job takes the nodes.", (do.preempt,), where=only_slurm, alone=True, exclusive=True
        ),
        Case("node-fail", "A node loses power.", (do.fail_node,), where=only_slurm, alone=True, exclusive=True),
        Case(
            "time-limit",
            "The time limit comes, for real.",
            (do.wait_for_limit,),
            where=only_slurm,
            changes={"train.max_steps": 12000, "train.evaluate": 3000, "train.save_every": 1000},
            alone=True,
            limit_min=1,
            slow=True,
        ),
    ]


CASES = _cases()


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)
