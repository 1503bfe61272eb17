"""Fault scenarios: which faults are injected into a run, where a scenario applies, and what the run must do.

`SCENARIOS` is the list; the faults themselves are in `inject.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.faults import inject
from tests.faults.live_run import STAGES
from tests.faults.local_run import NO_NETWORK, OWN_NETWORK

__all__ = ["ADAPTER", "ENTITIES", "FSDP", "SCENARIOS", "Scenario", "find_scenario"]

#: Recipe keys of a run that trains an adapter and the head alone.
ADAPTER: dict[str, Any] = {"adapter": "{rank: 4, dropout: 0.1}"}
#: Of one whose model is sharded over two processes.
FSDP: dict[str, Any] = {"train.sharding": "fsdp"}

#: Of one that finds entities.
ENTITIES: dict[str, Any] = {
    "task": "token-classification",
    "data.files": "{all: tags.conll}",
    "data.text": "tokens",
    "data.label": "ner_tags",
    "metrics": "[f1]",
}

#: Recipe keys of a run that ends before its planned steps.
EARLY: dict[str, Any] = {"train.early_stopping": "{patience: 12, min_delta: 10}", "train.evaluate": 20}

LOCAL, SLURM = "local", "slurm"


@dataclass(frozen=True)
class Scenario:
    """One scenario: `faults[i]` is injected into attempt i; `repairs[i]` follows its end, before the user resumes the run.

    Attributes:
        sentence: what happens, in one sentence.
        where: `local`, `slurm` or both.
        num_processes: the fewest processes it applies to.
        changes: recipe keys it sets; those that change the training need an undisturbed run of their own.
        disk: puts the run directory on a small `tmpfs` or `ext4`.
        network: prefix of the command: a network namespace of its own, or one without interfaces.
        unattended: the run must finish without a manual resume.
        graceful: the run is asked to stop, so no step may be repeated.
        refused: a resume must be refused once before the repair.
        exclusive: it affects the whole cluster: nothing else may run at the same time.
        limit_min: the job's time limit in minutes; by default the recipe's, which it does not reach.
        slow: takes minutes; runs only when named or with `--slow`.
    """

    name: str
    sentence: str
    faults: tuple[inject.Action, ...]
    repairs: tuple[inject.Action, ...] = ()
    where: frozenset[str] = frozenset((LOCAL, SLURM))
    num_processes: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)
    disk: str = ""
    network: tuple[str, ...] = ()
    unattended: bool = False
    graceful: bool = False
    refused: bool = False
    exclusive: bool = False
    limit_min: int = 0
    slow: bool = False


def _scenarios() -> list[Scenario]:
    only_local, only_slurm = frozenset((LOCAL,)), frozenset((SLURM,))
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
        Scenario("kill-rank", "One rank is killed.", (inject.kill_rank,)),
        Scenario("kill-all", "Every process is killed at once.", (inject.kill_all,)),
        Scenario(
            "kill-again",
            "Every process is killed, in three attempts.",
            (inject.kill_all, inject.kill_starting, inject.kill_all),
        ),
        Scenario(
            "adapter-kill",
            "Every process of a training with an adapter is killed.",
            (inject.kill_all,),
            changes=ADAPTER,
        ),
        Scenario(
            "adapter-stop",
            "SIGTERM reaches every process of a training with an adapter.",
            (inject.signal_step(signal.SIGTERM),),
            changes=ADAPTER,
            graceful=True,
        ),
        Scenario(
            "early-kill",
            "Every process of a training that stops early is killed, in three attempts.",
            (inject.kill_all, inject.kill_starting, inject.kill_all),
            changes=EARLY,
        ),
        Scenario(
            "fsdp-kill",
            "Every process of a training whose model is sharded is killed.",
            (inject.kill_all,),
            num_processes=2,
            changes=FSDP,
        ),
        Scenario(
            "fsdp-stop",
            "SIGTERM reaches every process of a training whose model is sharded.",
            (inject.signal_step(signal.SIGTERM),),
            num_processes=2,
            changes=FSDP,
            graceful=True,
        ),
        Scenario(
            "entities-kill",
            "Every process of a training that finds entities is killed, in two attempts.",
            (inject.kill_all, inject.kill_all),
            changes=ENTITIES,
        ),
        Scenario("kill-host", "The host process is killed; the training may continue.", (inject.kill_host,)),
        Scenario("kill-starting", "Killed during start-up.", (inject.kill_starting,)),
        Scenario("kill-ending", "Killed while the finished model is written.", (inject.kill_ending,)),
        *(Scenario(f"kill-save-{stage}", sentence, (inject.kill_at(stage),)) for stage, sentence in at_save.items()),
        Scenario(
            "term-step",
            "SIGTERM reaches every process of the step.",
            (inject.signal_step(signal.SIGTERM),),
            graceful=True,
        ),
        Scenario("term-rank", "SIGTERM reaches one rank alone.", (inject.term_rank,), graceful=True),
        Scenario(
            "term-skewed",
            "SIGTERM reaches the ranks seconds apart.",
            (inject.term_skewed,),
            num_processes=2,
            graceful=True,
        ),
        Scenario(
            "term-host", "SIGTERM reaches the host process.", (inject.signal_host(signal.SIGTERM),), graceful=True
        ),
        Scenario(
            "usr1-step",
            "SIGUSR1 reaches every process of the step.",
            (inject.signal_step(signal.SIGUSR1),),
            graceful=True,
        ),
        Scenario(
            "usr1-host", "SIGUSR1 reaches the host process.", (inject.signal_host(signal.SIGUSR1),), graceful=True
        ),
        Scenario(
            "stop-file",
            "The stop file is touched, in two attempts.",
            (inject.touch_stop, inject.touch_stop),
            graceful=True,
        ),
        Scenario(
            "full-in-save",
            "The disk is full during a save.",
            (inject.fill_disk(65536),),
            (inject.free_disk,),
            disk="tmpfs",
        ),
        Scenario(
            "full-in-log",
            "The disk is full when the metrics log is written.",
            (inject.fill_disk(0),),
            (inject.free_disk,),
            disk="tmpfs",
            changes={"train.save_every": 100},
        ),
        Scenario(
            "io-error",
            "The disk answers EIO.",
            (inject.fail_disk,),
            (inject.mount_again,),
            disk="ext4",
            where=only_local,
        ),
        Scenario(
            "power-cut",
            "The machine loses power.",
            (inject.cut_power,),
            (inject.mount_again,),
            disk="ext4",
            where=only_local,
        ),
        Scenario(
            "power-cut-finished",
            "The machine loses power when the run is called finished.",
            (inject.cut_power_when_finished,),
            (inject.mount_again_whole,),
            disk="ext4",
            where=only_local,
        ),
        *(
            Scenario(
                f"checkpoint-{how}",
                f"A file of the newest checkpoint is {how}.",
                (inject.kill_all_saved,),
                (inject.damage(how),),
            )
            for how in ("truncated", "bit-flipped", "missing")
        ),
        *(
            Scenario(
                f"no-{what}",
                f"{file} is missing in the newest checkpoint.",
                (inject.kill_all_saved,),
                (inject.damage("missing", file),),
            )
            for what, file in (("optimizer", "optimizer.pt"), ("manifest", "manifest.json"))
        ),
        Scenario(
            "all-damaged",
            "Every checkpoint is damaged; the run is refused until they are restored.",
            (inject.kill_all_saved,),
            (inject.damage_all, inject.restore_all),
            refused=True,
        ),
        Scenario("stopped-rank", "A rank is halted for seconds.", (inject.stop_rank,), unattended=True),
        Scenario("stopped-for-good", "A rank is halted for ever.", (inject.stop_rank_for_good,), changes=watched),
        Scenario(
            "no-network",
            "There is no network at all.",
            (inject.nothing,),
            network=NO_NETWORK,
            where=only_local,
            unattended=True,
        ),
        Scenario(
            "cut-network",
            "The network between the ranks fails for seconds.",
            (inject.cut_network,),
            network=OWN_NETWORK,
            num_processes=2,
            where=only_local,
        ),
        Scenario(
            "cut-for-good",
            "The network between the ranks fails for good.",
            (inject.cut_network_for_good,),
            network=OWN_NETWORK,
            num_processes=2,
            where=only_local,
            changes=watched,
        ),
        Scenario("two-at-once", "The run is started twice.", (inject.second_start,)),
        Scenario(
            "two-resumes", "After a kill it is resumed twice at the same time.", (inject.kill_all, inject.second_start)
        ),
        Scenario("scancel", "The job is cancelled.", (inject.scancel,), where=only_slurm),
        Scenario("requeue", "The job is requeued by hand.", (inject.requeue,), where=only_slurm, unattended=True),
        Scenario(
            "preempt",
            "A job of a higher partition preempts it.",
            (inject.preempt,),
            where=only_slurm,
            unattended=True,
            exclusive=True,
        ),
        Scenario(
            "node-fail", "A node loses power.", (inject.fail_node,), where=only_slurm, unattended=True, exclusive=True
        ),
        Scenario(
            "time-limit",
            "The job reaches its time limit.",
            (inject.wait_for_limit,),
            where=only_slurm,
            changes={"train.max_steps": 12000, "train.evaluate": 3000, "train.save_every": 1000},
            unattended=True,
            limit_min=1,
            slow=True,
        ),
    ]


SCENARIOS = _scenarios()


def find_scenario(name: str) -> Scenario:
    return next(scenario for scenario in SCENARIOS if scenario.name == name)
