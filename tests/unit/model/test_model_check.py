"""Foreign models in prefetch: what is accepted, what is refused and how, and what the model check finds by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.architectures import architecture_folder

from afina.errors import AfinaError
from afina.prediction.jobs import compose
from afina.recipe.local_model import find_model_folder
from afina.recipe.schema import Recipe
from afina.run.plan import make_plan
from afina.site.settings import Site
from afina.start.find_model import find_model
from afina.worker.checks import model_check
from afina.worker.checks.model_check import check_model_on_rows
from afina.worker.compute import packed_model
from afina.worker.data import prepare as stage
from afina.worker.inference import classifier
from afina.worker.inference.classifier import Classifier
from afina.worker.model import head, padding

pytestmark = pytest.mark.filterwarnings("ignore")
Prefetch = Callable[..., list[str]]


@pytest.fixture
def prefetch(tmp_path: Path, site: Site) -> Prefetch:
    """Prepare reviews (two hold an end-of-text token) for a model folder, in this process; returns the lines that it prints."""
    rows = tiny.tiny_reviews(50, 4, stars=3)
    for number in (3, 7):
        rows[number]["text"] += " </s> good food"
    tiny.write_csv(tmp_path / "d.csv", rows)

    def run(model: Path, **recipe: Any) -> list[str]:
        data = {"files": {"all": str(tmp_path / "d.csv")}, "text": "text", "label": "stars"}
        spec = {"name": "t", "model": str(model), "data": data, "tokens": {"max_length": 64}, **recipe}
        plan, lines = make_plan(Recipe.model_validate(spec), site), []
        result = stage.prepare(plan, lines.append)
        return [*lines, *result["warnings"], *check_model_on_rows(plan, result, lines.append), *lines]

    return run


def named(folder: Path, *names: str) -> Path:
    """Give the outputs of the classifier in `folder` these names."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_line_is_printed_each_time_and_the_model_is_run_once(
    prefetch: Prefetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architecture_folder(tmp_path / "model", "bert", None)
    line = next(line for line in prefetch(model) if line.startswith("model check: 8 rows packed"))
    assert "largest difference of a logit" in line and line.endswith("head: new (the model comes without one)")
    monkeypatch.setattr(head, "build_model", None)
    assert line in prefetch(model)


def test_without_memory_the_check_is_left_out_this_time_only(
    prefetch: Prefetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architecture_folder(tmp_path / "model", "bert", None)
    with monkeypatch.context() as patch:
        patch.setattr(model_check, "logits_alone", lambda *_: torch.empty(10**15))
        assert any(line.startswith("model check: left out: [enforce fail at alloc_cpu") for line in prefetch(model))
        patch.setattr(model_check, "free_memory", lambda: 100)
        assert any("of memory, 100 B are free here; a job's first steps try it" in line for line in prefetch(model))
    assert any(line.startswith("model check: 8 rows packed") for line in prefetch(model))


APART = "of equal length together"


@pytest.mark.parametrize(
    ("kind", "way"),
    [("xlnet", "padded to the longest"), ("bart", "padded to the longest"), ("fnet", APART), ("canine", APART), ("convbert", APART)],
)  # fmt: skip
def test_models_whose_rows_depend_on_their_batch_elsewhere(
    prefetch: Prefetch, tmp_path: Path, kind: str, way: str
) -> None:
    assert any(f"rows {way} and each alone" in line for line in prefetch(architecture_folder(tmp_path / kind, kind)))


def _own_head(*_: Any) -> str:
    return "head: the model's own"


BROKEN: dict[str, tuple[str, dict[str, Any], Any, str, Any, str]] = {
    "left": ("xlnet", {}, packed_model, "padding_side", lambda *_: "right", "have other logits than each alone"),
    "learned positions": ("gpt2", {}, packed_model, "padding_side", lambda *_: "left", "have other logits than each alone"),
    "no mask": ("fnet", {}, packed_model, "separate_rows", lambda _: None, "have other logits than each alone"),
    "convolution": ("convbert", {}, packed_model, "separate_rows", lambda _: None, "have other logits than each alone"),
    "end in a text": ("bart", {}, packed_model, "separate_rows", lambda _: None, "must have the same number of <eos> tokens"),
    "padding token": ("llama", {"pad_token_id": 5}, padding, "set_pad_token", lambda *_: None, "have other logits than each alone"),
    "order": ("bert", {"names": ("3", "1", "2")}, head, "_fit_head", _own_head, "not those of the labels' names"),
    "names": ("bert", {"names": ("a", "b", "c")}, head, "_fit_head", _own_head, "its head is for the labels a, b, c"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_finds_what_the_mends_prevent(
    name: str, prefetch: Prefetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes, module, function, broken, message = BROKEN[name]
    names = changes.pop("names", None) if (changes := dict(changes)) else None
    folder = architecture_folder(tmp_path / "model", kind, **changes)
    if names:
        named(folder, *names)
    monkeypatch.setattr(module, function, broken)
    with pytest.raises(AfinaError, match=message):
        prefetch(folder)
    monkeypatch.undo()
    assert any(line.startswith("model check: 8 rows") for line in prefetch(folder))


#: A classifier with code of its own. Its head reads one place of a row; no token knows its neighbours.
OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class OwnConfig(PretrainedConfig):
    model_type = "our_own"
    vocab_size, hidden_size, max_position_embeddings = 99, 8, 64


class OwnClassifier(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        return SequenceClassifierOutput(logits=self.classifier(READ))
"""


def _own_model(folder: Path, read: str, side: str) -> Path:
    """`read`: of `words`, the (B, T, H) embeddings of a batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(architecture_folder(folder / "bert", "bert"))
    tokenizer.padding_side = side
    tokenizer.save_pretrained(model := folder / f"reads {side}")
    (model / "own.py").write_text(OWN_CODE.replace("READ", read.replace("words", "self.words(input_ids)")))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnClassifier"}
    (model / "config.json").write_text(json.dumps({"model_type": "our_own", "auto_map": auto}))
    torch.manual_seed(0)
    weights = {
        "words.weight": torch.randn(99, 8),
        "classifier.weight": torch.randn(2, 8),
        "classifier.bias": torch.zeros(2),
    }
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("read", "works"), [("words[:, -1]", "left"), ("words[:, 0]", "right"), ("words.mean(1)", "neither")]
)
def test_code_of_its_own_is_padded_on_the_side_of_its_tokenizer_and_refused_with_the_other(
    read: str, works: str, prefetch: Prefetch, tmp_path: Path
) -> None:
    """The remedy is followed: `padding_side` in tokenizer_config.json."""
    for side in ("left", "right"):
        folder = _own_model(tmp_path / side, read, side)
        if side == works:
            assert any(line.startswith("model check: 8 rows") for line in prefetch(folder, trust_remote_code=True))
            continue
        with pytest.raises(AfinaError, match="have other logits than each alone") as refused:
            prefetch(folder, trust_remote_code=True)
        assert 'set "padding_side" in its tokenizer_config.json to the other side' in refused.value.remedy
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["padding_side"] == side
        settings["padding_side"] = {"left": "right", "right": "left"}[side]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if works != "neither":
            assert any(line.startswith("model check: 8 rows") for line in prefetch(folder, trust_remote_code=True))


@pytest.mark.parametrize(
    ("kind", "function", "broken"),
    [("bert", None, None), ("xlnet", "padding_side", lambda *_: "right"), ("fnet", "separate_rows", lambda _: None)],
)
def test_predict_checks_a_folder_that_no_run_made(
    kind: str, function: str | None, broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = architecture_folder(tmp_path / "model", kind)
    texts = pa.array([row["text"] for row in tiny.tiny_reviews(20, 4)], pa.large_string())

    def line() -> str:
        model = Classifier(folder)
        return model.check_rows(model.encode([texts]))

    if function is not None:
        # Where the classifier looks them up, and where a training does.
        for module in (packed_model, classifier):
            monkeypatch.setattr(module, function, broken, raising=False)
        with pytest.raises(AfinaError, match="of these texts, grouped, have other logits than each alone"):
            line()
        monkeypatch.undo()
    assert line().startswith(f"model check: 8 texts {'packed' if kind == 'bert' else 'grouped'} and each alone")


# -- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "bart", "gpt2", "xlnet"])
def test_rows_of_the_head_follow_their_labels(kind: str, tmp_path: Path) -> None:
    folder = named(architecture_folder(tmp_path / "model", kind, 2), "bad", "good")
    recipe = Recipe.model_validate(
        {"name": "t", "model": str(folder), "data": {"files": {"all": "a.csv"}, "text": "t", "label": "l"}}
    )
    inputs = torch.tensor([[2, 9, 12, 30, 3]])

    def logits(labels: list[str]) -> tuple[torch.Tensor, str]:
        model, note = head.build_model(recipe, folder, "single-label", labels, len(labels))
        assert [model.config.id2label[i] for i in range(len(labels))] == labels
        with torch.inference_mode():
            return model.eval()(input_ids=inputs).logits, note

    same, note = logits(["bad", "good"])
    assert note == "head: the model's own"
    turned, note = logits(["good", "bad"])
    assert torch.allclose(turned, same[:, [1, 0]], atol=1e-6) and "rows in the recipe's order" in note
    other, note = logits(["good", "poor"])
    assert not torch.allclose(other, same) and note.startswith("head: new; the model's own is not used: its labels are")
    _, note = logits(["bad", "good", "fair"])
    assert note == "head: new, for 3 labels (the model's was for 2)"
    named(folder, "LABEL_0", "LABEL_1")
    unnamed, note = logits(["bad", "good"])
    assert not torch.allclose(unnamed, same) and "its labels have no names" in note
    numbers, note = logits(["0", "1"])
    assert torch.allclose(numbers, same) and note == "head: the model's own"


# -- refused ----------------------------------------------------------------------------------------------------------


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _pickled(folder: Path, keep: float, **options: Any) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: int(keep * len(whole))])


def _adapter_only(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def _larger_tokenizer(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


def _own_tokenizer(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json",):
        (folder / name).unlink()


def _cast(folder: Path, kind: torch.dtype) -> None:
    weights = {name: weight.to(kind) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _without(folder: Path, part: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if part not in n}, folder / "model.safetensors", {"format": "pt"})


def _more_tokens(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["oo"])
    tokenizer.save_pretrained(folder)


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "adapter beside": ("bert", lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter", "merge_and_unload"),
    "adapter only": ("bert", _adapter_only, "holds an adapter", "merge_and_unload"),
    "4 bits": ("bert", lambda f: _config(f, quantization_config={"quant_method": "bitsandbytes"}), "is quantized .bitsandbytes.", "made from"),
    "GPTQ": ("llama", lambda f: _config(f, quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized .gptq.", "made from"),
    "cut": ("bert", lambda f: _pickled(f, 0.8), "is not a whole PyTorch file", "save_pretrained"),
    "cut, old format": ("bert", lambda f: _pickled(f, 0.8, _use_new_zipfile_serialization=False), "cannot load", "download"),
    "pointer": ("bert", _pointer, "pointer of Git LFS", "git lfs pull"),
    "padding beyond": ("gpt2", _larger_tokenizer, r"padding token \[PAD\] is number 99", "resize_token_embeddings"),
    "positions": ("bert", lambda f: _config(f, max_position_embeddings=16), "more than the 16 positions", "16 or less"),
    "integers": ("bert", lambda f: _cast(f, torch.int8), "is quantized .its weights are I8.", "made from"),
    "layers missing": ("bert", lambda f: _config(f, num_hidden_layers=3), "are not in its files and would start", "save_pretrained"),
    "tokens beyond": ("bert", _more_tokens, "gives token 99, its embeddings have 99 rows", "resize_token_embeddings"),
    "tokenizer's code": ("bert", _own_tokenizer, "tokenizer of .* needs Python code", "trust_remote_code: true"),
}  # fmt: skip


PREDICTION_TOO = ("adapter beside", "adapter only", "cut", "pointer")


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_trained_are_refused(name: str, prefetch: Prefetch, tmp_path: Path) -> None:
    kind, change, message, remedy = REFUSED[name]
    folder = architecture_folder(tmp_path / "model", kind, None)
    change(folder)
    with pytest.raises(AfinaError, match=message) as refused:
        prefetch(folder)
    assert remedy in refused.value.remedy and refused.value.exit_code == 2
    if name in PREDICTION_TOO:
        with pytest.raises(AfinaError, match=message):
            Classifier(folder)


#: Classifiers with which nothing can be predicted: what is done to one of three labels, the message, the remedy.
NO_CLASSIFIER: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "names from 1": (lambda f: named(f, "a") and _config(f, id2label={"1": "a", "2": "b", "3": "c"}), "no name for output 0 of 3", "from 0"),
    "one name twice": (lambda f: named(f, "a", "a", "b"), "names several outputs `a`", "of its own"),
    "unknown problem": (lambda f: _config(f, problem_type="junk"), "problem_type is 'junk'", "single_label_classification, "),
    "regression of 3": (lambda f: _config(f, problem_type="regression"), "a regression with 3 outputs", "num_labels"),
    "other head": (lambda f: _config(f, num_labels=5, id2label=None), r"classifier\.\w+ has shape \(3,.*, \(5,", "take both from one model"),
    "no head": (lambda f: _without(f, "classifier"), "was not trained to classify", "train it first"),
    "incomplete": (lambda f: _without(f, "layer.1.output.dense"), "layer.1.output.dense.bias, .*: its files are incomplete", "download it again"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CLASSIFIER)
def test_folders_that_are_no_classifier_are_refused_by_predict(name: str, tmp_path: Path) -> None:
    change, message, remedy = NO_CLASSIFIER[name]
    change(folder := architecture_folder(tmp_path / "model", "bert"))
    with pytest.raises(AfinaError, match=message) as refused:
        Classifier(folder)
    assert remedy in refused.value.remedy and str(folder) in refused.value.message


def test_a_text_with_a_token_that_the_model_does_not_have_is_refused_by_predict(tmp_path: Path) -> None:
    _more_tokens(folder := architecture_folder(tmp_path / "model", "bert"))
    model = Classifier(folder)
    assert model.predict(["nice"])[0]["prediction"]
    with pytest.raises(AfinaError, match="gives token 99, its embeddings have 99 rows"):
        model.predict(["nice oo"])


def test_double_precision_trains_and_a_config_of_fewer_layers_is_a_warning(prefetch: Prefetch, tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path / "model", "bert", None)
    _cast(folder, torch.float64)
    _config(folder, num_hidden_layers=1)
    lines = prefetch(folder)
    assert any(
        "weights in the files of" in line and "have no place by its config.json: encoder.layer.1" in line
        for line in lines
    )


def test_an_exported_folder_as_base_says_what_is_not_checked(prefetch: Prefetch, tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path / "model", "bert")
    (folder / "afina.json").write_text(json.dumps({"afina": "0.2"}))
    assert any("eval and test are not checked against them" in line for line in prefetch(folder))


def test_an_adapter_is_named_by_init_and_predict_too(tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path / "model", "bert", None)
    _adapter_only(folder)
    (folder / "config.json").unlink()  # as peft saves it
    for refuse in (lambda: find_model(str(folder), []), lambda: find_model_folder(str(folder), tmp_path)):
        with pytest.raises(AfinaError, match="holds an adapter"):
            refuse()
    with pytest.raises(AfinaError, match="holds an adapter"):
        compose(folder, [tmp_path / "texts.csv"])


def test_half_precision_that_the_model_cannot_compute_in_is_refused(prefetch: Prefetch, tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path / "model", "deberta", None)
    assert any(line.startswith("model check: 8 rows") for line in prefetch(folder))
    for train in ({"precision": "bf16"}, {"arguments": {"fp16": True}}):
        with pytest.raises(AfinaError, match=r"fails in (bf16|fp16): value cannot be converted") as refused:
            prefetch(folder, train=train)
        assert "train.precision: fp32" in refused.value.remedy


def test_pickled_weights_are_as_good_and_needless_trust_is_a_warning(prefetch: Prefetch, tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path / "model", "bert", None)
    _pickled(folder, 1)
    lines = prefetch(folder, trust_remote_code=True)
    assert any("trust_remote_code: " in line and "has no code of its own" in line for line in lines)
