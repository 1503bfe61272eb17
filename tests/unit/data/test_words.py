"""Words, tags and spans: schemes, refusals with their rows, and the first token of each word as Transformers finds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from tests import tiny
from tests.unit.data.stage import prepare_here, refused_here

from afina.errors import DataError
from afina.formats.conll import read_conll
from afina.formats.read_options import ReadOptions
from afina.recipe.keys.train_keys import Tokens
from afina.run.plan import Plan
from afina.worker.data.prepared import load_manifest, open_split
from afina.worker.data.tables.words import find_pieces, join_words, read_row, spans_of_text
from afina.worker.data.tokens.encode import EncodedBatch, Encoder
from afina.worker.task.word_places import CUT, REMOVED, SHARED, WordPlaces, word_labels

TASK: dict[str, Any] = {"task": "token-classification", "metrics": ["f1"]}
WORDS = {"text": "tokens", "label": "ner_tags"}


@pytest.fixture
def tagged(plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Plan]:
    """The plan of a token classification on `conll` sentences: (words, tags)."""

    def make(rows: list[tuple[str, str]] | None = None, data: dict[str, Any] | None = None, **recipe: Any) -> Plan:
        if rows is not None:
            split = [(words.split(), tags.split()) for words, tags in rows]
            path = tiny.write_conll(tmp_path / "tags.conll", split)
            data = {"files": {"train": str(path), "eval": str(path)}, **WORDS, **(data or {})}
        return plan(data=data, **{**TASK, **recipe})

    return make


def test_every_form_of_the_same_data_prepares_the_same(tagged: Callable[..., Plan], tmp_path: Path) -> None:
    rows = tiny.tagged_sentences(30, seed=3)
    names = ["O", "I-WEAK", "B-WEAK", "B-STRONG", "I-STRONG"]
    lists = [{"tokens": words, "ner_tags": tags} for words, tags in rows]
    spans = []
    for words, tags in rows:
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        each: list[dict[str, Any]] = []
        for word, tag, end in zip(words, tags, ends.tolist(), strict=True):
            if tag.startswith("B"):
                each.append({"start": end - len(word), "end": end, "label": tag[2:]})
            elif tag.startswith("I"):
                each[-1]["end"] = end
        spans.append({"text": " ".join(words), "spans": each})
    numbered = pa.table(
        {
            "tokens": [row["tokens"] for row in lists],
            "ner_tags": [[names.index(tag) for tag in row["ner_tags"]] for row in lists],
        }
    )
    feature = {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "Sequence"}
    metadata = {"info": {"features": {"ner_tags": feature}}}
    import json

    pq.write_table(
        numbered.replace_schema_metadata({"huggingface": json.dumps(metadata)}), tmp_path / "numbered.parquet"
    )
    files = {
        "conll": (tiny.write_conll(tmp_path / "a.conll", rows), WORDS),
        "lists": (tiny.write_jsonl(tmp_path / "lists.jsonl", lists), WORDS),
        "spans": (tiny.write_jsonl(tmp_path / "spans.jsonl", spans), {"text": "text", "label": "spans"}),
        "numbers": (tmp_path / "numbered.parquet", WORDS),
    }
    results = {}
    for name, (path, columns) in files.items():
        result = prepare_here(tagged(data={"files": {"all": str(path)}, **columns, "eval": {"fraction": 0.5}}))
        assert result["labels"] == ["O", "B-STRONG", "I-STRONG", "B-WEAK", "I-WEAK"]
        results[name] = [open_split(result["prepared"], split) for split in ("train", "eval")]
        assert load_manifest(result["prepared"])["word_units"] == ("letters" if name == "spans" else "spaces")
    for name, splits in results.items():
        for split, first in zip(splits, results["conll"], strict=True):
            assert split.words is not None and first.words is not None
            assert np.array_equal(split.tokens, first.tokens) and np.array_equal(split.labels, first.labels), name
            assert np.array_equal(split.words.spans, first.words.spans), name
            assert np.array_equal(split.words.pieces, first.words.pieces), name
    whole = sum(len(split.labels) for split in results["conll"])
    assert whole == sum(len(words) for words, _ in rows)


@pytest.mark.parametrize(
    ("tags", "iob2", "scheme"),
    [
        ("B-A I-A O B-A B-A B-B", "B-A I-A O B-A B-A B-B", ""),
        ("I-A I-A O I-A B-A I-B", "B-A I-A O B-A B-A B-B", "are in IOB1"),
        ("B-A E-A O S-A S-A S-B", "B-A I-A O B-A B-A B-B", "are in BIOES"),
        ("B-A L-A O U-A U-A U-B", "B-A I-A O B-A B-A B-B", "are in BIOES"),
        ("A A O A A B", "B-A I-A O B-A I-A B-B", "have no prefix"),
        ("B I O B B B", "B-entity I-entity O B-entity B-entity B-entity", ""),
        ("B E O S S S", "B-entity I-entity O B-entity B-entity B-entity", "are in BIOES"),
    ],
)
def test_schemes_become_iob2(tagged: Callable[..., Plan], tags: str, iob2: str, scheme: str) -> None:
    # A second row that begins with the type that the first ends with: an entity ends with its row.
    result = prepare_here(tagged([("good the best food was fine", tags), ("food the best", tags.split()[3] + " O O")]))
    split = open_split(result["prepared"], "train")
    assert [result["labels"][label] for label in split.labels] == [*iob2.split(), iob2.split()[0], "O", "O"]
    told = [line for line in result["warnings"] if "converted to IOB2" in line]
    assert bool(told) == bool(scheme) and all(scheme in line for line in told)


def test_labels_of_spans_that_are_tags_are_said(plan: Callable[..., Plan], tmp_path: Path) -> None:
    spans = [[0, 3, "B-LOC"], [4, 8, "I-LOC"], [9, 13, "O"], [14, 18, "I-95"]]
    rows = [{"text": "New York good food", "spans": spans}] * 2
    path = tiny.write_jsonl(tmp_path / "all.jsonl", rows)
    result = prepare_here(
        plan(data={"files": {"train": str(path), "eval": str(path)}, "text": "text", "label": "spans"}, **TASK)
    )
    assert result["labels"] == ["O", *(f"{p}-{t}" for t in ("B-LOC", "I-95", "I-LOC", "O") for p in "BI")]
    assert any(
        "types of entities are called as tags are: B-LOC, I-95, I-LOC, O: a span" in line for line in result["warnings"]
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a good food", "O B-A I-A"), ("good the food", "I-A O O")], "line 7, word 1: I-A begins an entity"),
        ([("a good food", "O B-A E-A"), ("good the food", "O E-A O")], "line 7, word 2: E-A continues no entity"),
        ([("a good food", "S-A I-A O")], "line 3, word 2: I-A continues no entity, as BIOES has it (1 such word)"),
        ([("a good food", "B-A E-A I-A")], "word 3: I-A continues no entity"),
        ([("a good food", "B-A I-B E-B")], "word 2: I-B continues no entity, as BIOES has it (1 such word)"),
        ([("a good food", "S-A B-A O")], "word 2: B-A has no last word (E-) behind it"),
        ([("a good food", "O B-A I-A"), ("good the food", "E-A S-A O")], "word 1: E-A continues no entity"),
        ([("a good food", "O B-A I-A"), ("good the food", "S-A O O")], "word 3: I-A has no last word (E-) behind it"),
        ([("a good food", "B-A B-A E-A")], "word 1: B-A has no last word (E-) behind it"),
        ([("a good food", "O B-A A")], "'A' has no prefix"),
        ([("a good food", "DT JJ NN")], "no word is outside of all entities"),
        ([("a good food", "O B-A L-A"), ("good the food", "O M-A X-A")], "tag 'X-A'"),
        ([("a good food", "O O O")], "there is nothing to learn"),
        ([("a good food", "O b-X i-X")], "word 2: tag 'b-X' is of no known scheme"),
        ([("a good food", "O X-B X-I")], "word 2: tag 'X-B' is of no known scheme"),
    ],
)
def test_tags_of_no_scheme_are_refused_with_their_place(
    tagged: Callable[..., Plan], rows: list[tuple[str, str]], message: str
) -> None:
    assert message in refused_here(tagged(rows))


@pytest.mark.parametrize(
    ("text", "tags", "message"),
    [
        (["a", "b"], ["O"], "2 words and 1 tag"),
        (["a", " "], ["O", "O"], "word 2: ' ' is not a word"),
        (["a", "b"], ["O", 3], "word 2: 3 is not a tag"),
        ("New York", [[0, 8, "LOC"], {"start": 4, "end": 8, "label": "LOC"}], "span 4 to 8 ('York') overlaps"),
        (
            "Kochtopf",
            [[0, 4, "X"], [4, 8, "X"]],
            "span 4 to 8 ('topf') is in one word ('Kochtopf') with the one before it",
        ),
        ("New York", [[4, 9, "LOC"]], "span 4 to 9 is not inside the text of 8 characters"),
        ("New York", [[3, 4, "LOC"]], "holds no word"),
        ("New York", [[0, "8", "LOC"]], "is not a span"),
        ("New York", "LOC", "a tag for each word, or spans"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(text: Any, tags: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 7") as refused:
        read_row("a.jsonl, line 7", text, tags)
    assert message in refused.value.message and refused.value.remedy


def test_spans_take_the_words_that_they_touch() -> None:
    spans, tags, widened = read_row("", "In New-Yorks bars", [[3, 11, "LOC"]])
    assert [("In New-Yorks bars"[a:b]) for a, b in spans] == ["In", "New", "-", "Yorks", "bars"]
    assert tags == ["O", "B-LOC", "I-LOC", "I-LOC", "O"] and widened
    assert not read_row("", "In New-York bars", [[3, 12, "LOC"]])[2]  # white space at its end is no word


@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_first_tokens_are_those_of_transformers(models: Callable[..., Path], arch: str) -> None:
    """`word_ids` of a call with words, which is what Transformers' own examples align with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models(arch), add_prefix_space=True)
    rows = [
        ["the", "zebra's", "U.S.", "food", "☃", "naïve"],
        ["(", "best", ")", "..."],
        ["one"],
        ["❤", "\ufe0f", "food", "\u200b"],
    ]
    texts = [join_words(words) for words in rows]
    encoder = Encoder(tokenizer, Tokens(max_length=24), spans=True)
    batch = EncodedBatch.joined([each for _, each in encoder.encode([(None, [texts])])])
    assert batch.spans is not None
    words = [spans_of_text(text, "spaces") for text in texts if text]
    offsets = np.cumsum([0, *map(len, words)])
    ends = np.cumsum([0, *batch.lengths])
    pieces = find_pieces(offsets, np.concatenate(words), ends, batch.spans, batch.cut)
    theirs = tokenizer(rows, is_split_into_words=True, truncation=True, max_length=24)
    for row, sentence in enumerate(rows):
        assert list(batch.tokens[ends[row] : ends[row + 1]]) == theirs["input_ids"][row]
        ids = theirs.word_ids(row)
        lost = CUT if batch.cut[row] else REMOVED
        first = [ids.index(word) if word in ids else lost for word in range(len(sentence))]
        assert pieces[offsets[row] : offsets[row + 1]].tolist() == first
    assert (CUT if arch == "roberta" else REMOVED) in pieces


@pytest.mark.parametrize(
    ("text", "units", "words"),
    [
        ("हिन्दी cafe\u0301s, ❤\ufe0f!", "letters", ["हिन्दी", "cafe\u0301s", ",", "❤\ufe0f", "!"]),
        ("我在北京, 서울에서 東京タワー กรุ ok", "letters", [*"我在北京,서울에서東京タワー", "ก", "รุ", "ok"]),
        ("(我在北京), 서울에서 ok.", "spaces", [*"(我在北京),", "서울에서", "ok", "."]),
        ("it's U.S.", "letters", ["it", "'", "s", "U", ".", "S", "."]),
        ('In ("Paris"), J. and e.g. U.S., :) ...', "spaces", ["In", "(", '"', "Paris", '"', ")", ",", "J.", "and", "e.g.", "U.S.", ",", ":)", "..."]),
        ("@user: #tag! http://a.b/c. ❤\ufe0f 👩\u200d👧", "spaces", ["@user", ":", "#tag", "!", "http://a.b/c", ".", "❤\ufe0f", "👩\u200d👧"]),
    ],
)  # fmt: skip
def test_words_of_a_text(text: str, units: Any, words: list[str]) -> None:
    assert [text[start:end] for start, end in spans_of_text(text, units).tolist()] == words


def test_words_without_a_token_of_their_own_have_labels_all_the_same() -> None:
    """One within the token of another shares it, one that the tokenizer removes is in an entity where both its neighbours are, one cut off is outside."""
    words = np.array([[0, 2], [2, 3], [3, 4], [5, 7]])
    places = np.array([[-1, -1], [0, 3], [3, 4], [-1, -1]])
    for cut, end in ((True, CUT), (False, REMOVED)):
        pieces = find_pieces(np.array([0, 4]), words, np.array([0, 4]), places, np.array([cut]))
        assert pieces.tolist() == [1, SHARED, 2, end]
    pieces = np.array([1, REMOVED, REMOVED, 2, REMOVED, 3, 1, SHARED, REMOVED, 1, CUT, CUT])
    where = WordPlaces(np.array([0, 6, 9, 12]), np.zeros((12, 2)), pieces)
    decided = np.array([1, 9, 9, 2, 9, 0, 1, 9, 9, 2, 9, 9])
    assert word_labels(decided, where).tolist() == [1, 2, 2, 2, 0, 0, 1, 2, 0, 2, 0, 0]


def test_entities_behind_max_length_are_counted(tagged: Callable[..., Plan]) -> None:
    rows = [("good the food the best the very good", "B-A O O O B-B I-B O B-A"), ("fine food", "O O")]
    result = prepare_here(tagged(rows, tokens={"max_length": 8}))
    assert any("1 of 3 entities of eval lie behind tokens.max_length 8" in line for line in result["warnings"])
    split = open_split(result["prepared"], "eval")
    assert split.words is not None and split.words.pieces.tolist() == [1, 2, 3, 4, 5, 6, CUT, CUT, 1, 2]
    assert split.loss_weights is not None and split.loss_weights.tolist() == [1] * 6 + [0, 0, 1, 1]
    some = split.take(np.array([1, 0]))
    assert some.words is not None and some.words.offsets.tolist() == [0, 2, 10]
    assert some.labels.tolist() == [0, 0, *split.labels[:8]]


def test_words_of_a_file_are_those_between_spaces_or_tabs(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("# id 1\n# O\na\u00a0b  O \n\n# sent_id\nx O\n \n# B-A\n", encoding="utf-8")
    assert [(line, words) for line, (words, _) in read_conll(path, ReadOptions())] == [
        (2, ["#", "a\u00a0b"]),
        (6, ["x"]),
        (8, ["#"]),
    ]
    path.write_bytes(b"a O\rb O\r\rc O\r\n\r\nd O")  # also those of old Macs, and of Windows
    assert [(line, words) for line, (words, _) in read_conll(path, ReadOptions())] == [
        (1, ["a", "b"]),
        (4, ["c"]),
        (6, ["d"]),
    ]
    path.write_text("# id\n#\tO\nb c\tO\n", encoding="utf-8")
    assert [words for _, (words, _) in read_conll(path, ReadOptions())] == [["#", "b c"]]


def test_a_line_of_another_width_is_refused(plan: Callable[..., Plan], tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("# id 1\ngood O\nfood O\n\nbest\n")
    data = {"files": {"all": str(path)}, **WORDS}
    assert "a.conll, line 5: 1 column, 2 are expected" in refused_here(plan(data=data, **TASK))


def test_whole_groups_are_divided_by_the_types_of_their_entities(plan: Callable[..., Plan], tmp_path: Path) -> None:
    rows = [
        {"tokens": words, "ner_tags": tags, "document": n // 4}
        for n, (words, tags) in enumerate(tiny.tagged_sentences(80, seed=4))
    ]
    path = tiny.write_jsonl(tmp_path / "groups.jsonl", rows)
    data = {"files": {"all": str(path)}, **WORDS, "group": "document", "split_by": "text", "eval": {"fraction": 0.25}}
    result = prepare_here(plan(data=data, **TASK))
    assert result["groups"] == {"train": 15, "eval": 5} and result["rows"] == {"train": 60, "eval": 20}
    assert not [line for line in result["warnings"] if "nothing is measured" in line]
