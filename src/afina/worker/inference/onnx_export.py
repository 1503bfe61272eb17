"""Exports a classifier to ONNX and compares it with PyTorch before it is published. Needs the extra `onnx`.

Uses `torch.onnx.export`, through torch.export and onnxscript; optimum is not needed and does not support this Transformers.
Inputs are those of the tokenizer, int64 (batch, sequence), both of any size; the output is `logits`, float32 (batch, K).

Not covered: models beyond 2 GB in one file, half precision, GPUs.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afina.errors import EnvironmentProblem, TrainingError, first_line
from afina.worker.model.padding import needs_equal_lengths, padding_side, set_pad_token
from afina.worker.model.tokenizer import give_pad_token

__all__ = ["TOLERANCE", "check_installed", "export_onnx"]

#: Largest difference of any logit from PyTorch's.
TOLERANCE = 1e-4
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
#: Rows of the batches that are compared.
_BATCHES = (1, 2, 7, 16)


def check_installed() -> None:
    """Raises:
    EnvironmentProblem: a package of the extra is missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"--onnx: {', '.join(missing)} is not installed where the export runs",
            "pip install '.[onnx]' there in a checkout of afina (in the image: build one with it), or export without --onnx",
        )


def export_onnx(
    folder: Path, target: Path, texts: Sequence[Any], max_length: int, trust_remote_code: bool = False
) -> float:
    """Write `target` from the model in `folder`, and compare the two on `texts`; returns the largest difference of a logit.

    Args:
        texts: texts, or pairs of texts; 26 or more for a whole comparison.

    Raises:
        EnvironmentProblem: the extra is missing.
        TrainingError: the exporter refuses the model, or the result differs.
    """
    check_installed()
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    from afina.worker.task.tasks import class_of_config

    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    model = (
        class_of_config(config)
        .from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code)
        .eval()
    )
    if (why := needs_equal_lengths(model)) is not None:
        raise TrainingError(f"--onnx: {why}, so a padded batch would have other scores", "export without --onnx")
    give_pad_token(tokenizer)
    tokenizer.padding_side = padding_side(model, tokenizer.padding_side)
    set_pad_token(model, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)

    def batch(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        pairs = [row[1] for row in rows] if isinstance(rows[0], (tuple, list)) else None
        first = [row[0] for row in rows] if pairs else list(rows)
        return dict(tokenizer(first, pairs, padding=True, truncation=True, max_length=max_length, return_tensors="pt"))

    target.parent.mkdir(parents=True, exist_ok=True)
    _write(model, batch(texts[:2]), target)
    return _compare(model, target, [batch(rows) for rows in _cut(texts)])


class _Positional(torch.nn.Module):
    """The model with its inputs by position, and nothing but logits out."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def _write(model: Any, example: dict[str, torch.Tensor], target: Path) -> None:
    names = list(example)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # it misses torchvision, which no text needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own internals
            program = torch.onnx.export(
                _Positional(model, names).eval(),
                tuple(example.values()),
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(tuple(axes for _ in names),),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(target)
    except Exception as error:  # whatever an operator that cannot be translated makes it raise
        reason = first_line(error)
        raise TrainingError(
            f"--onnx: torch {torch.__version__} cannot export {type(model).__name__}: {reason}", "export without --onnx"
        ) from error
    finally:
        noisy.setLevel(level)


def _cut(texts: Sequence[Any]) -> list[Sequence[Any]]:
    batches, start = [], 0
    for size in _BATCHES:
        batches.append(texts[start : start + size])
        start += size
    return [rows for rows in batches if rows]


def _compare(model: Any, target: Path, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    largest = 0.0
    for inputs in batches:
        with torch.inference_mode():
            wanted = model(**inputs).logits.numpy()
        logits = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]
        largest = max(largest, float(np.abs(logits - wanted).max()))
    if not largest <= TOLERANCE:
        raise TrainingError(
            f"--onnx: logits differ from PyTorch's by {largest:.2g}, more than {TOLERANCE:g}: not published",
            "export without --onnx",
        )
    return largest
