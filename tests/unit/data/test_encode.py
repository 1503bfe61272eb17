"""Pairs of long texts: the tokens of Transformers' own truncation, without all that it cuts off."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import tiny

from afina.recipe.keys.train_keys import Tokens
from afina.worker.data.tokens.encode import Encoder


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pairs_of_long_texts_are_cut_as_transformers_cuts_them(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.tiny_model(tmp_path / "model", arch=kind))
    words = " ".join(row["text"] for row in tiny.tiny_reviews(60, 3)).split()
    texts = [" ".join(words[:count]) for count in (3, 9, 40, 150, 300)]
    pairs = [(a, b) for a in texts for b in texts]
    encoder = Encoder(tokenizer, Tokens(max_length=24))
    ((_, batch),) = encoder.encode([(None, list(zip(*pairs, strict=True)))])
    _, _, parts = encoder._call(list(zip(*pairs, strict=True)))
    assert max(len(encoding.overflowing) for encoding in parts) < 100, "of 300 words each there would be 200 and more"
    wanted = tokenizer([a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=24)["input_ids"]
    assert batch.tokens.tolist() == [token for row in wanted for token in row]
    whole = tokenizer([a for a, _ in pairs], [b for _, b in pairs])["input_ids"]
    assert batch.cut.tolist() == [len(row) > 24 for row in whole]
