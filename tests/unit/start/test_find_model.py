"""The model that `afina init` proposes, and what fits it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests import tiny
from tests.unit.start.conftest import Init, reviews

from afina.recipe.parse import load_recipe
from afina.start.examine import count_words


def test_the_folder_of_an_adapter_is_trained_on(init: Init, tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "model"
    (folder / "classifier").mkdir(parents=True)
    (folder / "classifier/config.json").write_text("{}")
    config = {
        "base_model_name_or_path": str(model),
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "target_modules": ["query"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    data = tiny.write_csv(tmp_path / "reviews.csv", reviews())
    answer = init(tmp_path / "project", "--data", data, "--model", folder, "--label", "stars")
    assert answer["recipe"].model == str(folder) and answer["recipe"].adapter is not None
    assert "by the model's tokenizer" in answer["text"]  # that of its base


def test_windows_that_are_named_in_place_of_head_and_tail_fit_the_model(
    init: Init, tmp_path: Path, model: Path
) -> None:
    rows = [{"text": f"{n} " + "word " * (200 if n % 8 == 0 else 20), "label": "ab"[n % 2]} for n in range(80)]
    text = init(tmp_path / "p", "--data", tiny.write_csv(tmp_path / "r.csv", rows), "--model", model)["text"]
    (named,) = re.findall(r"`(windows: {.*?})` in its place", text)
    (tmp_path / "p/recipe.yaml").write_text(text.replace("truncation: head+tail", named))
    assert load_recipe(tmp_path / "p/recipe.yaml").tokens.windows is not None


def test_a_text_that_is_not_in_english_gets_a_model_that_reads_it(init: Init, tmp_path: Path) -> None:
    rows = [{"text": f"Очень хорошая книга номер {n}", "label": n % 2} for n in range(40)]
    assert init(tmp_path / "p", "--data", tiny.write_csv(tmp_path / "r.csv", rows))["recipe"].model == "FacebookAI/xlm-roberta-base"  # fmt: skip
    # A language without spaces has a token for each character.
    assert count_words("这本书非常好。") == 7 and count_words("It's good.") == 5
