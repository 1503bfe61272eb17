"""Precision: the number format of a run's products, and whether the model is compiled, from recipe and device, with the reason.

    fp32   weights, gradients and products in float32
    tf32   as fp32, with 10 bits of mantissa in products: NVIDIA, compute capability 8.0 and newer
    bf16   products in bfloat16, weights in float32
    fp16   products in float16, weights in float32, the loss scaled so that small gradients do not vanish

`auto` is the format that the device is fast in. On NVIDIA GPUs that is bf16 (and tf32 for what stays float32) from compute capability
8.0 on, fp16 on 7.x, fp32 before that (NVIDIA, "CUDA C++ Programming Guide", compute capabilities); on AMD GPUs it is fp32. On a CPU it
is bf16 where the CPU has instructions for it, else fp32. A run keeps the precision of its first attempt, because another device would
compute another result. One exception: a run that began in bf16 on a CPU continues in fp32 on a CPU without the instructions, which
any CPU computes well; in a queue of mixed nodes that is better than refusing. Measured on CPUs with AVX512-BF16 and on one H100
(docs/measured.md). Not covered: on other GPUs these are the same switches of Trainer, unmeasured.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from afina.errors import EnvironmentProblem
from afina.recipe.keys.train_keys import Train
from afina.run.directory import RunDir
from afina.worker.compute.cpu import processor

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = [
    "FLOAT32_ONLY",
    "PrecisionChoice",
    "Device",
    "announce",
    "training_arguments",
    "choose",
    "compare_devices",
    "current_device",
    "matmul_dtype",
    "choose_for_run",
    "tf32_enabled",
]

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

#: TrainingArguments that set the precision instead of `train.precision`.
_ARGUMENTS = ("bf16", "fp16", "tf32")

#: Each of them makes Trainer compile the model.
_COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")

#: Part of the names of the GPUs that afina was measured on.
_MEASURED = "H100"

#: Model types whose code in Transformers raises under autocast (5.23: DeBERTa fills masked scores with float32's smallest number).
FLOAT32_ONLY = frozenset({"deberta"})

_COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang")


@dataclass(frozen=True)
class Device:
    """The device of a process.

    Attributes:
        capability: NVIDIA's compute capability; None on other devices.
        bfloat16: a CPU has instructions for products in bfloat16; None where that is unknown.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    capability: tuple[int, int] | None = None
    bfloat16: bool | None = None

    @property
    def words(self) -> str:
        if self.kind == "cpu":
            return "the CPU"
        kind = f"compute capability {self.capability[0]}.{self.capability[1]}" if self.capability else "not NVIDIA's"
        return f"{self.name}, {kind}"


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision and the reason for it; `precision` is None where `train.arguments` sets it."""

    precision: Precision | None
    compile: bool
    why: str
    device: Device

    @property
    def bf16_on_cpu(self) -> bool:
        """`RunTrainer` then trains under autocast itself, because Trainer's own bf16 would evaluate in bf16 too."""
        return self.precision == "bf16" and self.device.kind == "cpu"


def current_device() -> Device:
    """The device of this process, chosen as Trainer chooses it."""
    import torch

    if not torch.cuda.is_available():
        cpu = processor()
        return Device("cpu", cpu.name, bfloat16=cpu.has_bfloat16 if cpu.flags else None)
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    capability = None if torch.version.hip else torch.cuda.get_device_capability(index)
    return Device("cuda", torch.cuda.get_device_name(index), capability)


def choose(
    train: Train, device: Device, before: Precision | None = None, env: Mapping[str, str] | None = None
) -> PrecisionChoice:
    """The precision that the recipe asks for on this device.

    Args:
        before: the precision of the run's first attempt.
        env: the environment to search for a compiler; by default this process's.

    Raises:
        EnvironmentProblem: the device does not support it, or a compiler is missing.
    """
    env = os.environ if env is None else env
    compiled = train.compile or any(train.arguments.get(name) for name in _COMPILE)
    if compiled and not (
        env.get("CC") or env.get("CXX") or any(shutil.which(c, path=env.get("PATH")) for c in _COMPILERS)
    ):
        raise EnvironmentProblem(
            "train.compile: torch.compile needs a C++ compiler, and there is none here",
            "set train.compile: false, or build the image with --apt-packages 'g++ python3-dev'",
        )
    if given := [name for name in _ARGUMENTS if train.arguments.get(name) is not None]:
        return PrecisionChoice(None, compiled, f"the recipe's train.arguments ({', '.join(given)})", device)
    if train.precision != "auto":
        if missing := _missing(train.precision, device):
            raise EnvironmentProblem(
                f"train.precision: {device.words} does not support {train.precision}: {missing}",
                "set train.precision: auto, or ask for another GPU",
            )
        return PrecisionChoice(train.precision, compiled, "the recipe asks for it", device)
    best, why = _best(device)
    if best == "fp16" and train.sharding != "none":
        best, why = "fp32", f"{why}, and float16 was not proven with train.sharding"
    if before is None or before == best:
        return PrecisionChoice(best, compiled, why, device)
    if before == "bf16" and device.kind == "cpu":  # `best` is another: this CPU lacks the instructions
        return PrecisionChoice(best, compiled, f"{why}; earlier attempts used bf16", device)
    if missing := _missing(before, device):
        raise EnvironmentProblem(
            f"this run has computed in {before} since its first attempt, which {device.words} does not support: {missing}",
            f"continue it on the kind of GPU that it began on, or start a new run (here it would be {best})",
        )
    return PrecisionChoice(before, compiled, "as in earlier attempts", device)


def _best(device: Device) -> tuple[Precision, str]:
    if device.kind == "cpu":
        if device.bfloat16:
            return "bf16", "the CPU has instructions for it"
        return "fp32", "the CPU" if device.bfloat16 is None else "the CPU has no instructions for bfloat16"
    if device.capability is None:
        return "fp32", f"{device.words}: nothing else was tried there"
    if device.capability >= (8, 0):
        return "bf16", device.words
    if device.capability >= (7, 0):
        return "fp16", f"{device.words}: it has no bfloat16"
    return "fp32", f"{device.words}: it is fastest in float32"


def _missing(precision: str, device: Device) -> str:
    """The reason why the device does not support a precision; empty where it does."""
    if device.kind == "cpu":
        return {"fp16": "loss scaling needs a GPU", "tf32": "only GPUs have it"}.get(precision, "")
    if precision in ("tf32", "bf16") and device.capability is not None and device.capability < (8, 0):
        return "it needs 8.0 or newer"
    if precision == "tf32" and device.capability is None:
        return "only NVIDIA GPUs have it"
    return ""


def training_arguments(choice: PrecisionChoice) -> dict[str, Any]:
    """The choice as TrainingArguments; empty for their defaults and for `bf16_on_cpu`."""
    arguments: dict[str, Any] = {}
    if choice.compile:
        arguments["torch_compile"] = True
    if choice.precision in ("bf16", "fp16") and not choice.bf16_on_cpu:
        arguments[choice.precision] = True
    newer = choice.device.capability is not None and choice.device.capability >= (8, 0)
    if choice.precision is not None and newer:
        arguments["tf32"] = choice.precision in ("tf32", "bf16")
    return arguments


def choose_for_run(run: RunDir, train: Train, model_type: str = "") -> PrecisionChoice:
    """The choice for this process; it keeps the precision of the run's first attempt."""
    if train.precision == "auto" and model_type in FLOAT32_ONLY and not any(train.arguments.get(n) for n in _ARGUMENTS):
        plain = choose(train.model_copy(update={"precision": "fp32"}), current_device())
        return replace(plain, why=f"{model_type} of Transformers fails in half precision")
    before = [event.get("precision") for event in run.lines("events.jsonl") if event.get("event") == "precision"]
    return choose(train, current_device(), before[0] if before else None)


def tf32_enabled() -> bool:
    """True if float32 matrix products on a GPU use TF32 at present.

    `torch.get_float32_matmul_precision` raises after use of the newer setting, which Transformers uses (torch 2.13).
    """
    import torch

    matmul = torch.backends.cuda.matmul
    return bool(matmul.fp32_precision == "tf32") if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def matmul_dtype(choice: PrecisionChoice, used: TrainingArguments) -> str:
    """The dtype of training's matrix products as `afina.worker.compute.flops` names it; `used` may hold the recipe's own arguments."""
    if used.bf16 or choice.bf16_on_cpu:
        return "bfloat16"
    if used.fp16:
        return "float16"
    return "tf32" if used.device.type == "cuda" and tf32_enabled() else "float32"


def compare_devices(choices: Sequence[PrecisionChoice], hosts: Sequence[str]) -> list[str]:
    """Warnings of ranks on different devices, where they compute alike or are CPUs.

    Raises:
        EnvironmentProblem: different GPUs would compute in different precisions.
    """
    alike = len({(choice.precision, choice.compile) for choice in choices}) == 1
    if all(choice.device.kind == "cpu" for choice in choices):
        if alike:
            return []
        listed = "; ".join(
            sorted({f"{c.precision} on {h} ({c.device.name})" for c, h in zip(choices, hosts, strict=True)})
        )
        return [f"different processors in one job: {listed}; each step takes as long as the slowest of them"]
    kinds = {choice.device.words: host for choice, host in zip(choices, hosts, strict=True)}
    if len(kinds) == 1:
        return []
    listed = "; ".join(f"{words} on {host}" for words, host in sorted(kinds.items()))
    if not alike:
        raise EnvironmentProblem(
            f"the processes are on different GPUs and would not compute alike: {listed}",
            "ask for one type (AFINA_GPU_REQUEST=gres:TYPE, or a constraint), or set train.precision to one that all of them support",
        )
    return [f"different GPUs in one job: {listed}; each step takes as long as the slowest of them"]


def announce(run: RunDir, attempt: str, choice: PrecisionChoice, attention: str) -> list[str]:
    """Compare the ranks' choices (collective); on rank 0 record this one and return the lines for the log."""
    import platform

    from afina.worker.compute import ranks
    from afina.worker.compute.products import library

    answers = ranks.everyone((choice, platform.node()))
    warnings = compare_devices([each for each, _ in answers], [host for _, host in answers])
    if ranks.rank():
        return []
    gpu = choice.device.kind == "cuda"
    about = {} if gpu else {"products": library()}
    measured = not gpu or _MEASURED in choice.device.name
    run.event("precision", attempt=attempt, attention=attention, measured_here=measured, **about, **asdict(choice))
    if choice.precision == "bf16" and choice.device.bfloat16 is False:
        warnings.append(
            f"{choice.device.name} has no instructions for bfloat16: products are emulated, many times slower than fp32"
        )
    compiled = ", compiled" if choice.compile else ""
    unmeasured = "" if measured else "; afina was never measured on this GPU"
    return [
        f"precision {choice.precision or 'of train.arguments'} ({choice.why}){compiled}, attention {attention}{unmeasured}",
        *(f"WARNING: {warning}" for warning in warnings),
    ]
