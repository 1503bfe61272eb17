"""Two steps of training on this machine, from a model and reviews made up on the spot: does what is installed work together?

`python -m afina.worker selftest`: the image's %test runs it. Everything is in a temporary folder and goes away; no network, no
GPU, no site of the caller's. It says nothing about speed or about what a model learns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["main"]

_WORDS = ("good", "bad", "the", "a", "book", "was", "is", "very", "not", "chair")
_STEPS = 2


def main(argv: list[str]) -> int:
    """Print the two losses; the exit code of `afina train`, or 4 where it trained and left something out."""
    with tempfile.TemporaryDirectory(prefix="afina-selftest-") as name:
        folder = Path(name)
        recipe = _write(folder)
        # The caller's site, allocation and caches are not what is tested.
        env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("AFINA_", "SLURM_", "SBATCH_", "HF_", "CUDA_VISIBLE"))
        }
        env |= {"AFINA_SCRATCH": str(folder), "AFINA_RUNTIME": "none", "HOME": name, "CUDA_VISIBLE_DEVICES": ""}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        argv = [
            sys.executable,
            "-m",
            "afina",
            "train",
            str(recipe),
            "--run",
            str(folder / "run"),
            "--num-processes",
            "1",
        ]
        done = subprocess.run(
            argv, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            print(done.stdout, end="", file=sys.stderr)
            return done.returncode
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        if len(losses) != _STEPS or not (folder / "run/model/model.safetensors").is_file():
            print(f"{done.stdout}\nselftest: no model, or not {_STEPS} losses: {losses}", file=sys.stderr)
            return 4
        print(f"selftest: {_STEPS} steps trained on the CPU, losses {' '.join(f'{loss:.4f}' for loss in losses)}")
    return 0


def _write(folder: Path) -> Path:
    """A BERT of two layers with random weights, eight reviews, and the recipe."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    transformers.logging.disable_progress_bar()
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    ids = {word: i for i, word in enumerate((*special, *_WORDS))}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **names).save_pretrained(folder / "model")
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(ids), max_position_embeddings=32, pad_token_id=0, **shape)
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    rows = [f"the {thing} was {how},{how}" for thing in ("book", "chair") for how in ("good", "bad")]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows, *rows]) + "\n")
    part = {"fraction": 0.5, "seed": 1}
    recipe = {
        "name": "selftest",
        "model": "model",
        "data": {"files": {"all": "reviews.csv"}, "text": "text", "label": "label", "train": part, "eval": part},
        "tokens": {"max_length": 16},
        "train": {"batch_size": 2, "max_steps": _STEPS, "log_every": 1, "evaluate": _STEPS, "keep": "last"},
        "resources": {"gpus_per_node": 0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"
