"""One table of shifted positions, for `afina init` and for the model check, and it is the one of transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from afina.recipe.positions import SHIFTED_POSITIONS, longest_input
from afina.start.find_model import find_model


def test_init_and_the_model_check_agree_for_every_family(tmp_path: Path) -> None:
    import transformers

    from afina.worker.model.pretrained import max_positions

    for family in sorted({*SHIFTED_POSITIONS, "bert", "distilbert", "modernbert"}):
        config = {"model_type": family, "max_position_embeddings": 130, "pad_token_id": 0 if family == "bert" else 3}
        (tmp_path / "config.json").write_text(json.dumps(config))
        proposed = find_model(str(tmp_path), []).positions
        checked = max_positions(transformers.AutoConfig.from_pretrained(tmp_path))
        assert proposed == checked == (126 if family in SHIFTED_POSITIONS else 130), family


def test_the_shifted_families_are_those_of_transformers() -> None:
    """A new version that adds one fails here."""
    from transformers import models
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as HEADS

    def counts_from_padding(family: str) -> bool:
        folder = Path(models.__file__).parent / model_type_to_module_name(family)
        return any(re.search(r"padding_idx \+ 1", path.read_text()) for path in folder.glob("modeling_*.py"))

    assert set(filter(counts_from_padding, HEADS)) == SHIFTED_POSITIONS


def test_no_limit_is_none() -> None:
    assert longest_input("roberta", None, 1) is None and longest_input("xlnet", -1, 5) is None
    assert longest_input("roberta", 514, None) == 512
