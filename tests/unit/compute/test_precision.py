"""Precision of a run: the choice on described devices, and real runs in what a CPU offers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests import tiny
from tests.unit.training.in_process import train_here

from afina.errors import EnvironmentProblem
from afina.recipe.keys.train_keys import Train
from afina.run.directory import RunDir
from afina.worker.compute.cpu import Processor
from afina.worker.compute.precision import (
    Device,
    PrecisionChoice,
    announce,
    choose,
    choose_for_run,
    compare_devices,
    current_device,
    training_arguments,
)

CPU, ZEN2, ZEN4 = (
    Device("cpu", "POWER9"),
    Device("cpu", "EPYC 7742", None, False),
    Device("cpu", "EPYC 9654", None, True),
)
V100, T4 = Device("cuda", "Tesla V100", (7, 0)), Device("cuda", "Tesla T4", (7, 5))
P100, A100, H100 = Device("cuda", "Tesla P100", (6, 0)), Device("cuda", "A100", (8, 0)), Device("cuda", "H100", (9, 0))
MI250 = Device("cuda", "MI250", None)


@pytest.mark.parametrize(
    ("device", "precision", "made"),
    [
        (CPU, "fp32", {}),
        (ZEN2, "fp32", {}),
        (ZEN4, "bf16", {}),
        (P100, "fp32", {}),
        (V100, "fp16", {"fp16": True}),
        (T4, "fp16", {"fp16": True}),
        (A100, "bf16", {"bf16": True, "tf32": True}),
        (H100, "bf16", {"bf16": True, "tf32": True}),
        (MI250, "fp32", {}),
    ],
)
def test_auto_follows_the_device(device: Device, precision: str, made: dict[str, bool]) -> None:
    choice = choose(Train(), device)
    assert (choice.precision, choice.compile, training_arguments(choice)) == (precision, False, made)
    assert choice.why


@pytest.mark.parametrize(
    ("asked", "device", "made"),
    [
        ("fp32", A100, {"tf32": False}),
        ("tf32", A100, {"tf32": True}),
        ("fp16", A100, {"fp16": True, "tf32": False}),
        ("bf16", ZEN2, {}),
        ("fp32", ZEN4, {}),
        ("fp32", V100, {}),
        ("bf16", MI250, {"bf16": True}),
    ],
)
def test_what_the_recipe_asks_for(asked: Any, device: Device, made: dict[str, bool]) -> None:
    assert training_arguments(choose(Train(precision=asked), device)) == made


@pytest.mark.parametrize(
    ("asked", "device"), [("fp16", CPU), ("tf32", CPU), ("bf16", V100), ("tf32", T4), ("tf32", MI250), ("bf16", P100)]
)
def test_a_precision_that_the_device_lacks_is_refused(asked: Any, device: Device) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        choose(Train(precision=asked), device)
    assert asked in caught.value.message and device.words in caught.value.message and "auto" in caught.value.remedy


def test_a_run_keeps_its_first_precision() -> None:
    kept = choose(Train(), A100, "fp32")
    assert (kept.precision, kept.why) == ("fp32", "as in earlier attempts")
    assert choose(Train(), H100, "fp16").precision == "fp16"
    with pytest.raises(EnvironmentProblem, match="has computed in bf16 since its first attempt") as caught:
        choose(Train(), V100, "bf16")
    assert "here it would be fp16" in caught.value.remedy
    assert choose(Train(precision="fp32"), A100, "bf16").precision == "fp32"
    assert choose(Train(), ZEN4, "fp32").precision == "fp32" and choose(Train(), A100, "bf16").precision == "bf16"


@pytest.mark.parametrize("device", [ZEN2, CPU])
def test_a_run_continues_in_fp32_where_the_cpu_lacks_the_instructions(tmp_path: Path, device: Device) -> None:
    """…and in bf16 again on the next that has them: it is the first attempt that counts."""
    choice = choose(Train(), device, "bf16")
    assert choice.precision == "fp32" and choice.why.endswith("earlier attempts used bf16")
    run = RunDir(tmp_path)
    for each in (choose(Train(), ZEN4), choice):
        announce(run, "local-1", each, "eager")
    assert choose_for_run(run, Train()).precision == choose(Train(), current_device(), "bf16").precision
    assert choose_for_run(run, Train(), "deberta").precision == "fp32", "its code fails in half precision"


def test_train_arguments_set_the_precision_and_are_not_repeated() -> None:
    choice = choose(Train(arguments={"bf16": True}), CPU)
    assert (choice.precision, training_arguments(choice), choice.why) == (
        None,
        {},
        "the recipe's train.arguments (bf16)",
    )
    for clash in (
        {"precision": "fp16", "arguments": {"bf16": True}},
        {"compile": True, "arguments": {"torch_compile": False}},
    ):
        with pytest.raises(ValidationError, match=r"repeats `train\."):
            Train.model_validate(clash)


def test_compiling_needs_a_compiler(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="needs a C\\+\\+ compiler") as caught:
        choose(Train(compile=True), CPU, env={"PATH": str(tmp_path)})
    assert "--apt-packages" in caught.value.remedy
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert training_arguments(choose(Train(compile=True), CPU, env={"PATH": str(tmp_path)})) == {"torch_compile": True}
    assert choose(Train(), CPU, env={"PATH": ""}).compile is False


def test_different_gpus_are_refused_or_named() -> None:
    def chosen(*devices: Device) -> list[PrecisionChoice]:
        return [choose(Train(), device) for device in devices]

    assert compare_devices(chosen(A100, A100), ["n1", "n2"]) == []
    (warning,) = compare_devices(chosen(A100, H100), ["n1", "n2"])
    assert "A100" in warning and "H100" in warning and "on n2" in warning
    with pytest.raises(EnvironmentProblem, match="different GPUs") as caught:
        compare_devices(chosen(A100, V100), ["n1", "n2"])
    assert "AFINA_GPU_REQUEST" in caught.value.remedy
    assert compare_devices(chosen(ZEN4, ZEN4), ["n1", "n2"]) == compare_devices(chosen(ZEN2, CPU), ["n1", "n2"]) == []
    (warning,) = compare_devices(chosen(ZEN4, ZEN2), ["n1", "n2"])
    assert "bf16 on n1 (EPYC 9654); fp32 on n2 (EPYC 7742)" in warning


def test_the_setting_that_trainer_makes_can_be_read_back() -> None:
    """In a process of its own: torch keeps the setting, and refuses to be asked in the old way after it."""
    code = """
from transformers.utils.import_utils import enable_tf32
from afina.worker.compute.precision import tf32_enabled
states = [tf32_enabled()]
for on in (True, False):
    enable_tf32(on)
    states.append(tf32_enabled())
print(states)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[False, True, False]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("precision")
    tiny.write_project(place, 80, tokens={"batching": "grouped"}, train={"max_steps": 4, "keep": "last"})
    # Without dropout, whose masks a compiled model draws in another order; grouped, as a compiled run is.
    config = json.loads((place / "model/config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (place / "model/config.json").write_text(json.dumps(config))
    return place


def trained(place: Path, name: str, *settings: str) -> tuple[Path, str]:
    """A run of one process, and its log."""
    run = train_here(place / "recipe.yaml", place / name, *settings, env={"AFINA_SCRATCH": str(place / "scratch")})
    return run, (run / "attempts/local-1/node0.log").read_text()


def losses(run: Path) -> list[float]:
    return [
        line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]


def recorded(run: Path) -> dict[str, Any]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    (event,) = [event for event in events if event["event"] == "precision"]
    return dict(event)


def test_bfloat16_without_instructions_for_it_is_warned_of(tmp_path: Path) -> None:
    run = RunDir(tmp_path)

    def notes(precision: Any, device: Device) -> list[str]:
        return announce(run, "local-1", PrecisionChoice(precision, False, "", device), "eager")[1:]

    assert "EPYC 7742 has no instructions for bfloat16" in notes("bf16", ZEN2)[0]
    assert notes("bf16", ZEN4) == notes("fp32", ZEN2) == notes("bf16", CPU) == []
    assert choose(Train(), CPU).why == "the CPU"
    assert choose(Train(), ZEN2).why == "the CPU has no instructions for bfloat16"


@pytest.mark.slow
def test_bfloat16_is_close_to_float32_and_a_compiled_run_is_the_same(place: Path) -> None:
    plain, log = trained(place, "plain", "train.precision=fp32")
    assert "afina: precision fp32 (the recipe asks for it)" in log
    about = recorded(plain)
    assert (about["precision"], about["measured_here"], about["device"]["kind"]) == ("fp32", True, "cpu")
    half, log = trained(place, "half", "train.precision=bf16")
    assert "afina: precision bf16 (the recipe asks for it)" in log and recorded(half)["precision"] == "bf16"
    assert losses(half) != losses(plain)
    assert losses(half) == pytest.approx(losses(plain), rel=0.02)
    # Through dynamo and autograd; without inductor, whose C++ takes minutes to compile for a model of this size.
    backend = "train.arguments.torch_compile_backend=aot_eager"
    compiled, log = trained(place, "compiled", "train.compile=true", "train.precision=fp32", backend)
    assert ", compiled" in log and recorded(compiled)["compile"] is True
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert (compiled / "model/model.safetensors").is_file()


def unlike() -> Processor:
    """Another processor for each rank."""
    rank = int(os.environ["LOCAL_RANK"])
    flags = frozenset(("avx512_bf16", "avx2")[rank : rank + 1])
    return Processor(("EPYC 9654", "EPYC 7742")[rank], "AuthenticAMD", flags)


def test_processes_on_unlike_processors_train_together_with_a_warning(place: Path) -> None:
    processors = {f"afina.worker.compute.{module}.processor": unlike for module in ("precision", "products")}
    env = {"AFINA_SCRATCH": str(place / "scratch")}
    run = train_here(place / "recipe.yaml", place / "unlike", num_processes=2, env=env, constants=processors)
    log = (run / "attempts/local-1/node0.log").read_text()
    assert "afina: precision bf16 (the CPU has instructions for it)" in log
    host = os.uname().nodename
    listed = f"bf16 on {host} (EPYC 9654); fp32 on {host} (EPYC 7742)"
    assert f"afina: WARNING: different processors in one job: {listed}; each step takes" in log
    assert json.loads((run / "outcome.json").read_text())["outcome"] == "finished"
