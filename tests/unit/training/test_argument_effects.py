"""Each argument that the table calls effective changes a training: its weights, or what is named here. A few steps in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.training.in_process import STEPS, lines, weights

from afina.recipe.keys.training_arguments import EFFECTIVE

pytestmark = pytest.mark.filterwarnings("ignore")

#: Arguments, and those that the training to compare with has; without any, the recipe alone.
WEIGHTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lr_scheduler_type": ({"lr_scheduler_type": "constant"}, {}),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}},
        {"lr_scheduler_type": "polynomial"},
    ),
    "warmup_steps": ({"warmup_steps": 0.5}, {}),
    "optim": ({"optim": "sgd"}, {}),
    "optim_args": ({"optim": "sgd", "optim_args": "momentum=0.9"}, {"optim": "sgd"}),
    "weight_decay": ({"weight_decay": 0.5}, {}),
    "adam_beta1": ({"adam_beta1": 0.5}, {}),
    "adam_beta2": ({"adam_beta2": 0.5}, {}),
    "adam_epsilon": ({"adam_epsilon": 0.1}, {}),
    "max_grad_norm": ({"max_grad_norm": 0.001, "optim": "sgd"}, {"max_grad_norm": 0, "optim": "sgd"}),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 5}, {}),
}
#: They need a device, or a package, that is not here.
ELSEWHERE = {
    "fp16": "tests/gpu",
    "tf32": "tests/gpu",
    "optim_target_modules": "GaLore and APOLLO are not installed; refused with any other optimizer (test_check_arguments)",
}


def test_every_effective_argument_is_shown() -> None:
    here = Path(__file__).read_text()
    assert set(WEIGHTS) | set(ELSEWHERE) <= set(EFFECTIVE)
    missing = [name for name in EFFECTIVE if f'"{name}"' not in here]
    assert not missing, f"show in this file what they do: {missing}"


@pytest.mark.parametrize("name", WEIGHTS)
def test_it_changes_the_weights(build: Callable[..., Any], name: str) -> None:
    import torch

    with_it, without = WEIGHTS[name]
    first, second = weights(build(with_it)), weights(build(without))
    assert torch.isfinite(first).all()
    assert not torch.equal(first, second), f"{name} has no effect"


def test_the_same_arguments_are_the_same_weights(build: Callable[..., Any]) -> None:
    """Else a difference would show nothing. And no clipping is no clipping."""
    import torch

    assert torch.equal(weights(build({})), weights(build({})))
    assert torch.equal(weights(build({"max_grad_norm": 0})), weights(build({"max_grad_norm": 1e9})))


def test_bf16_is_another_precision(build: Callable[..., Any]) -> None:
    import torch

    first, second = weights(build({"bf16": True})), weights(build({}, "train.precision=fp32"))
    assert not torch.equal(first, second) and torch.allclose(first, second, atol=0.1)


def test_neftune_is_that_of_batches_that_are_not_packed(build: Callable[..., Any]) -> None:
    import torch

    noisy, grouped = (build({"neftune_noise_alpha": 5}, *words) for words in ((), ("tokens.batching=grouped",)))
    assert noisy.attempt.batching == "grouped" and torch.equal(weights(noisy), weights(grouped))


@pytest.mark.parametrize("kind", ["activation_checkpointing", "gradient_checkpointing"])
def test_activations_are_recomputed(build: Callable[..., Any], kind: str) -> None:
    """Also "activation_checkpointing_kwargs" and "gradient_checkpointing_kwargs"."""
    for reentrant in (True, False):
        trainer = build({kind: True, f"{kind}_kwargs": {"use_reentrant": reentrant}})
        layers = [m for m in trainer.model.modules() if getattr(m, "gradient_checkpointing", False)]
        assert layers and layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant


@pytest.mark.parametrize(
    "arguments",
    [{"torch_compile": True}, {"torch_compile_backend": "eager"}, {"torch_compile_mode": "reduce-overhead"}],
)
def test_the_model_is_compiled(
    build: Callable[..., Any], arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "cc")  # whether there is a compiler is tested elsewhere
    trainer = build(arguments, train=False)
    plugin = trainer.accelerator.state.dynamo_plugin
    assert trainer.attempt.precision.compile and trainer.attempt.batching == "grouped"
    assert plugin.backend.value.lower() == arguments.get("torch_compile_backend", "inductor")
    assert plugin.mode == arguments.get("torch_compile_mode", "default")


def test_memory_is_returned(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.trainer

    calls: list[int] = []
    monkeypatch.setattr(transformers.trainer, "clear_device_cache", lambda *_, **__: calls.append(1))
    build({"torch_empty_cache_steps": 2})
    assert 1 <= len(calls) <= STEPS // 2 + 1


def test_the_first_step_is_logged(build: Callable[..., Any]) -> None:
    for first, steps in ((False, [3, 4]), (True, [1, 3, 4])):
        trainer = build({"logging_first_step": first}, "train.log_every=3")
        assert [line["step"] for line in lines(trainer) if "loss" in line] == steps


def test_transformers_own_messages(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    build({"log_level": "info", "log_level_replica": "debug"}, train=False)
    assert transformers.logging.get_verbosity() == transformers.logging.INFO
    given = build({"log_level_replica": "debug"}, train=False).args
    monkeypatch.setattr(type(given), "local_process_index", property(lambda self: 1))
    assert given.get_process_log_level() == transformers.logging.DEBUG


def test_settings_that_reach_torch(build: Callable[..., Any]) -> None:
    import torch

    given = {
        "ddp_find_unused_parameters": True,
        "ddp_bucket_cap_mb": 3,
        "ddp_broadcast_buffers": False,
        "ddp_timeout": 77,
    }
    trainer = build({**given, "full_determinism": True, "dataloader_pin_memory": True, "run_name": "mine"}, train=False)
    handler = trainer.accelerator.ddp_handler
    assert (handler.find_unused_parameters, handler.bucket_cap_mb, handler.broadcast_buffers) == (True, 3, False)
    assert trainer.args.ddp_timeout_delta.total_seconds() == 77
    assert torch.are_deterministic_algorithms_enabled()
    assert trainer.args.dataloader_pin_memory is False, "Transformers: only on GPUs"
    trainer.args.dataloader_pin_memory = True
    assert trainer.get_train_dataloader().pin_memory is True
    assert trainer.args.run_name == "mine"  # which the trackers' callbacks read


def test_the_module_of_an_overflow_is_named(build: Callable[..., Any]) -> None:
    broken = ("train.learning_rate=1e20", "train.arguments.max_grad_norm=0")
    with pytest.raises(ValueError, match="DebugUnderflowOverflow"):
        build({"debug": "underflow_overflow"}, *broken)
