"""`train.arguments` in the environment that trains: TrainingArguments, optimizer and schedule are built before the queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from afina.errors import RecipeError
from afina.recipe.keys.train_keys import Train
from afina.worker.model.check_arguments import check_arguments

WSD = {"lr_scheduler_type": "warmup_stable_decay"}
MIN = {"lr_scheduler_type": "cosine_with_min_lr"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_epsilon": 1e-6, "warmup_steps": 0.06},
        {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1, "adam_beta1": 0.9},
        {"optim": "adafactor", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5000},
        {**WSD, "lr_scheduler_kwargs": {"num_decay_steps": 3}},
        {**MIN, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycles": 3}'},
        {"bf16": True, "tf32": True, "torch_compile_mode": "max-autotune"},  # the compute node tells
    ],
)
def test_arguments_that_work(arguments: dict[str, Any], tmp_path: Path) -> None:
    assert check_arguments(Train(arguments=arguments), tmp_path / "pins") == []
    assert [path.suffix for path in (tmp_path / "pins").iterdir()] == [".json"], "only the record that it passed"


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        ({"wieght_decay": 0.1}, "wieght_decay: TrainingArguments of transformers", "did you mean `weight_decay`?"),
        ({"weight_decay": "a lot"}, "'a lot' is a text; it must be float", "correct the value"),
        ({"bf16": "yes"}, "'yes' is a text; it must be bool", "correct the value"),
        ({"lr_scheduler_type": "linaer"}, "lr_scheduler_type: transformers", "correct the value"),
        ({"optim": "adam"}, "optim: transformers", "correct the value"),
        (MIN, "cosine_with_min_lr cannot be built: One of min_lr or min_lr_rate", "`lr_scheduler_kwargs`"),
        (WSD, "warmup_stable_decay cannot be built", "`lr_scheduler_kwargs`"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "linear cannot be built", "`lr_scheduler_kwargs`"),
        ({"lr_scheduler_type": "polynomial"}, "lr_end (1e-07) must be smaller than initial lr", "`lr_scheduler_kwargs`"),
        ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, "needs a package", "container/lock.sh"),
        ({"optim": "adamw_torch_xla"}, "adamw_torch_xla cannot be built", "use `adamw_torch`"),
        ({"optim": "sgd", "optim_args": "momentum"}, "sgd cannot be built", "correct the value"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1: the optimizer sgd does not use it", "leave it out"),
        ({"optim_args": "momentum=0.9"}, "optim_args: the optimizer adamw_torch_fused does not use it", "leave it out"),
        ({"optim_target_modules": ["query"]}, "optim_target_modules: the optimizer adamw", "leave it out"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 9}, "the schedule constant does not use it", "constant_with_warmup"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str, remedy: str, tmp_path: Path) -> None:
    rate = 1e-8 if "polynomial" in arguments.values() else 5e-5
    with pytest.raises(RecipeError) as caught:
        check_arguments(Train(arguments=arguments, learning_rate=rate), tmp_path / "pins")
    assert message in caught.value.message and remedy in caught.value.remedy
    assert not (tmp_path / "pins").exists() and list(Path.cwd().iterdir()) == []


def test_an_optimizer_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.trainer_optimizer as optimizers

    monkeypatch.setattr(optimizers, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(RecipeError, match="adamw_bnb_8bit needs a package that is not installed here"):
        check_arguments(Train(arguments={"optim": "adamw_bnb_8bit"}), tmp_path)


def test_a_schedule_that_fails_at_the_length_of_this_training_is_refused(tmp_path: Path) -> None:
    """Transformers divides by the steps behind the warmup, at the end of the run."""
    train = Train(max_steps=1, arguments={"lr_scheduler_type": "polynomial", "warmup_steps": 0.3})
    assert check_arguments(train, tmp_path / "pins", 40) == []
    with pytest.raises(
        RecipeError, match=r"polynomial fails in a training of 1 step with 1 of warmup: .*zero"
    ) as refused:
        check_arguments(train, tmp_path / "pins", 1)
    assert "more steps" in refused.value.remedy


def test_a_warmup_that_takes_all_of_the_training_is_said(tmp_path: Path) -> None:
    def remarks(warmup: float, steps: int | None) -> list[str]:
        return check_arguments(Train(arguments={"warmup_steps": warmup}), tmp_path / "pins", steps)

    assert remarks(100, 101) == remarks(0.1, 10) == remarks(100, None) == []
    (remark,) = remarks(100, 100)
    assert "warmup_steps: 100 steps, and the training has 100: the learning rate never reaches 5e-05" in remark
