"""Model-FLOP utilisation (MFU): the FLOPs of a model for a text, and the peak FLOP/s of a device.

MFU as in PaLM (Chowdhery et al. 2022, appendix B): the floating-point operations of the model's own matrix products, forward
and backward, for real tokens only, over what the hardware does at its peak in the same time. Padding and recomputation count as
nothing. Work that an implementation leaves out still counts: packed batches compute most of the last layer for first tokens
only (`afina.worker.compute.packed_model`) and are credited with all of it, a seventh of a model of six layers.

A multiplication and an addition are 2 operations. Per layer and token of a text of L tokens, with H the width and I that of the
feed-forward network, forward: 8 H² for queries, keys, values and output, 4 H I for the network (6 H I where it is gated), 4 H
for each attended token. Per text: 2 H² + 2 H K for the head. Decoders: queries and output as wide as their heads, keys and values as wide
as theirs, which may be fewer; a token attends to those before it, within the layer's window; the head is 2 H K. Backward is twice forward. Element-wise work,
embeddings and the optimizer are left out.

Not covered: the GPUs in the table were not measured. A peak that is measured while others use the same cores is too low.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from afina.text import plural

__all__ = ["DATASHEET", "Peak", "forward_flops", "flops_formula", "device_peak"]

Array = np.ndarray[Any, Any]

#: Encoders with BERT's matrix products, by `model_type`.
_BERTS = ("bert", "electra", "roberta", "xlm-roberta", "camembert", "mpnet")

#: Decoders by `model_type`, and matrices of their feed-forward networks: three where these are gated.
_DECODERS = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3"), 3),
    "gpt2": 2,
}

#: Dense TFLOP/s of NVIDIA's data sheets and architecture white papers (A100, H100, H200, V100, T4, A30, A40, L4, L40S, RTX …;
#: where a sheet gives tensor cores with sparsity only, half of it; GeForce: with accumulation in float32). float32 without
#: tensor cores; None: the GPU lacks the format.
DATASHEET: dict[str, dict[str, float | None]] = {
    "V100": {"float32": 14.0, "tf32": None, "float16": 112.0, "bfloat16": None},
    "V100-SXM2": {"float32": 15.7, "tf32": None, "float16": 125.0, "bfloat16": None},
    "V100-SXM3": {"float32": 15.7, "tf32": None, "float16": 125.0, "bfloat16": None},
    "T4": {"float32": 8.1, "tf32": None, "float16": 65.0, "bfloat16": None},
    "A100": {"float32": 19.5, "tf32": 156.0, "float16": 312.0, "bfloat16": 312.0},
    "A30": {"float32": 10.3, "tf32": 82.0, "float16": 165.0, "bfloat16": 165.0},
    "A40": {"float32": 37.4, "tf32": 74.8, "float16": 149.7, "bfloat16": 149.7},
    "A10": {"float32": 31.2, "tf32": 62.5, "float16": 125.0, "bfloat16": 125.0},
    "A10G": {"float32": 31.5, "tf32": 35.0, "float16": 70.0, "bfloat16": 70.0},
    "RTX A6000": {"float32": 38.7, "tf32": 77.4, "float16": 154.8, "bfloat16": 154.8},
    "L4": {"float32": 30.3, "tf32": 60.0, "float16": 121.0, "bfloat16": 121.0},
    "L40": {"float32": 90.5, "tf32": 90.5, "float16": 181.0, "bfloat16": 181.0},
    "L40S": {"float32": 91.6, "tf32": 183.0, "float16": 362.0, "bfloat16": 362.0},
    "RTX 6000 Ada": {"float32": 91.1, "tf32": 182.1, "float16": 364.2, "bfloat16": 364.2},
    "H100": {"float32": 66.9, "tf32": 494.7, "float16": 989.4, "bfloat16": 989.4},
    "H100 PCIe": {"float32": 51.2, "tf32": 378.0, "float16": 756.0, "bfloat16": 756.0},
    "H100 NVL": {"float32": 60.0, "tf32": 417.5, "float16": 835.5, "bfloat16": 835.5},
    "GH200": {"float32": 66.9, "tf32": 494.7, "float16": 989.4, "bfloat16": 989.4},
    "H200": {"float32": 66.9, "tf32": 494.7, "float16": 989.4, "bfloat16": 989.4},
    "H200 NVL": {"float32": 60.0, "tf32": 417.5, "float16": 835.5, "bfloat16": 835.5},
    "RTX 2080 Ti": {"float32": 13.4, "tf32": None, "float16": 53.8, "bfloat16": None},
    "RTX 3080": {"float32": 29.8, "tf32": 29.8, "float16": 59.5, "bfloat16": 59.5},
    "RTX 3090": {"float32": 35.6, "tf32": 35.6, "float16": 71.0, "bfloat16": 71.0},
    "RTX 4090": {"float32": 82.6, "tf32": 82.6, "float16": 165.2, "bfloat16": 165.2},
}

#: A name that continues like this is another device, or a part of one.
_OTHER = r"(?![A-Za-z0-9]| (?:Ti|D|SUPER|Laptop|Max-Q|Mobile)\b|.*\bMIG\b)"

#: Sides of the square matrices for measuring a peak, and seconds for each.
_SIDES, _SECONDS = (512, 1024, 1536), 0.08


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of one process's device, and the source of the figure."""

    flops: float
    source: str


def flops_formula(config: Any) -> str:
    """The formula that `forward_flops` uses for this configuration, in words."""
    kind = getattr(config, "model_type", "")
    if kind in (*_BERTS, *_DECODERS, "distilbert", "modernbert"):
        return f"matrix products of {kind} from its configuration"
    return (
        "2 × parameters × tokens forward, embeddings left out (Kaplan et al. 2020): an approximation, without attention"
    )


def forward_flops(config: Any, lengths: Array, matrix_parameters: int = 0) -> Array:
    """Floating-point operations of one forward pass for each text, float64 (N,); a training step is three times that.

    Args:
        config: a Transformers configuration.
        lengths: tokens of each text, (N,).
        matrix_parameters: parameters of the model without embeddings; used for architectures without a formula here.
    """
    each = np.asarray(lengths, np.float64)
    kind = getattr(config, "model_type", "")
    if kind == "distilbert":
        return _encoder(each, config.dim, config.hidden_dim, config.n_layers, config.num_labels)
    if kind in _DECODERS:
        return _decoder(each, config, _DECODERS[kind])
    if kind not in (*_BERTS, "modernbert"):
        return np.asarray(2.0 * matrix_parameters * each)
    width, layers = config.hidden_size, config.num_hidden_layers
    if kind == "modernbert":
        local = sum(layer == "sliding_attention" for layer in config.layer_types)
        whole = _encoder(each, width, 1.5 * config.intermediate_size, layers, config.num_labels)
        unseen = each**2 - _near_pairs(each, config.sliding_window)
        return np.asarray(whole - 4 * width * local * unseen)
    narrow = getattr(config, "embedding_size", width)
    widened = 0 if narrow == width else 2 * narrow * width * each
    return np.asarray(_encoder(each, width, config.intermediate_size, layers, config.num_labels) + widened)


def _encoder(lengths: Array, width: int, inner: float, layers: int, labels: int) -> Array:
    layer = (8 * width**2 + 4 * width * inner) * lengths + 4 * width * lengths**2
    return np.asarray(layers * layer + 2 * width**2 + 2 * width * labels)


def _decoder(lengths: Array, config: Any, matrices: int) -> Array:
    width, heads = config.hidden_size, config.num_attention_heads
    wide = (getattr(config, "head_dim", None) or width // heads) * heads
    both = wide + wide // heads * (getattr(config, "num_key_value_heads", None) or heads)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    total = (
        2 * width * config.num_labels + config.num_hidden_layers * 2 * width * (2 * both + matrices * inner) * lengths
    )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [window and "sliding_attention"] * config.num_hidden_layers
    for kind in kinds:
        seen = np.minimum(lengths, window) if kind == "sliding_attention" and window else lengths
        total = total + 4 * wide * (seen * (seen + 1) / 2 + seen * (lengths - seen))
    return np.asarray(total)


def _near_pairs(lengths: Array, window: int) -> Array:
    """Number of token pairs of each text at a distance of at most `window`."""
    far = np.maximum(lengths - 1 - window, 0)
    return np.asarray(lengths**2 - far * (far + 1))


def device_peak(device: torch.device, precision: str) -> Peak:
    """The peak of this process's device: the data sheet's for a known GPU, else measured in less than a second.

    Args:
        precision: of the matrix products: float32, tf32, float16 or bfloat16.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = _on_the_sheet(name)
        teraflops = DATASHEET[known][precision] if known else None
        if teraflops is not None:
            return Peak(teraflops * 1e12, f"NVIDIA's data sheet for {known}, {precision}, dense; {name}")
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    about = plural(torch.get_num_threads(), "thread") if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Peak(_measured(device, dtype), f"best torch.mm of this run, {precision}, {about}")


def _on_the_sheet(name: str) -> str | None:
    """The entry of `DATASHEET` for a device of this name."""
    matches = [known for known in DATASHEET if re.search(rf"(?<![A-Za-z0-9]){re.escape(known)}{_OTHER}", name)]
    return max(matches, key=len, default=None)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of torch.mm over a few sizes, in FLOP/s; draws no random numbers."""
    best = 0.0
    for side in _SIDES:
        left, right = (torch.full((side, side), value, dtype=dtype, device=device) for value in (0.5, 0.25))
        out = torch.empty_like(left)
        ends, fastest = time.perf_counter() + _SECONDS, math.inf
        for number in itertools.count():
            began = time.perf_counter()
            torch.mm(left, right, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            over = time.perf_counter()
            if number or over > ends:  # the first one warms up
                fastest = min(fastest, over - began)
            if over > ends:
                break
        best = max(best, 2.0 * side**3 / fastest)
        if fastest > _SECONDS:  # bfloat16 without instructions for it: larger ones take many seconds
            break
    return best
