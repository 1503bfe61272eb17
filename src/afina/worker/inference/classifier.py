"""A trained classifier for use: texts in, logits out in the same order, in the batches that evaluation makes.

Batches are sorted by length and packed where the architecture is proven (`afina.worker.compute.packed_model`), else padded to the
longest; they depend on the texts and the settings alone, so the same texts give the same numbers again. A missing, empty or
blank text is not given to the model: no training sees one, so a score for it would mean nothing. Its logits are NaN, its
prediction is None.

Not covered: several GPUs in one process (each process uses one), models that are not sequence classifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from afina.errors import InputError
from afina.prediction.request import CHUNK_ROWS
from afina.recipe.keys.train_keys import Tokens
from afina.statistics.decision_rule import NO_RULE, probabilities, read_rule
from afina.text import plural
from afina.worker.compute import attention, packed_model
from afina.worker.compute.batches import TOKENS_PER_ROW, EvalBatches, Targets, pool_windows, scored_logits
from afina.worker.data.prepared import Split
from afina.worker.data.tables.row_batches import is_blank
from afina.worker.data.tables.words import Units, find_pieces, given_words, join_words, spans_of_text
from afina.worker.data.tokens.encode import EncodedBatch, Encoder, join_columns
from afina.worker.inference.load_folder import load_folder
from afina.worker.inference.model_folder import export_info
from afina.worker.inference.row_check import choose_rows, logits_alone, require_equal
from afina.worker.model.model_files import check_files
from afina.worker.model.padding import separate_rows
from afina.worker.model.pretrained import max_positions
from afina.worker.model.tokenizer import check_tokens, vocabulary_size
from afina.worker.task.entity_columns import predicted_entities
from afina.worker.task.tasks import prediction_columns, task_of_config
from afina.worker.task.word_places import WordPlaces

__all__ = ["Classifier", "DType", "EncodedTexts"]

Array = np.ndarray[Any, Any]
DType = Literal["float32", "bfloat16", "float16"]

#: Tokens of a text where the model has no limit of its own.
_MAX_LENGTH = 512
_BATCH_ROWS = 32
#: Texts that the tokenizer is given at once; it shares them out over the cores.
_TOKENIZED = 4096


@dataclass(frozen=True)
class EncodedTexts:
    """Tokens of those of N texts that have any.

    Attributes:
        split: tokens of M texts; the labels in it mean nothing.
        rows: their numbers among the N, ascending, int64 (M,).
        truncated: how many were longer than allowed.
        texts: of a token classification, all N; None where blank.
    """

    split: Split
    rows: Array
    truncated: int
    texts: Sequence[str | None] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.split.offsets[-1])


class Classifier:
    """A sequence classifier from a model folder, ready to predict.

    Attributes:
        model, tokenizer: of Transformers, in evaluation mode on `device`.
        task: single-label, multi-label, regression or token-classification.
        labels: names in the order of the logits; None for regression.
        text_columns: what a table's texts were called in training, if that is known; several for pairs and joined texts.
        tokens: how texts become tokens and longer ones are cut, as in training.
        batching: packed or grouped.
        rule: how logits become probabilities and decisions; by default plainly, see `as_fitted`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokens: Tokens | None = None,
        text_columns: Sequence[str] | None = None,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        dtype: DType = "float32",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load it.

        Args:
            tokens, text_columns: by default what `afina export` wrote into the folder; else the model's own limit.
            batch_size: rows of a padded batch (32), and 128 tokens for each of them in a packed one.
            max_tokens: tokens of a packed batch.
            device: `cpu`, `cuda:1`, …; by default the first GPU, or the CPU.

        Raises:
            InputError: a file is missing or damaged, or transformers refuses it.
        """
        path = Path(folder).absolute()
        check_files(path)
        info = export_info(path)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer, self.model = load_folder(path, getattr(torch, dtype), self.device, trust_remote_code)
        config, self._vocabulary = self.model.config, vocabulary_size(path)
        self.words: Units | None = None
        self.task, self.labels = task_of_config(config, path)
        self._folder, self.rule = path, NO_RULE
        if self.task == "token-classification":
            self.words = getattr(config, "word_units", None) or "letters"
        self.text_columns = tuple(text_columns or info.get("text_columns") or ()) or None
        known = {name: info[name] for name in Tokens.model_fields if info.get(name)}
        self.tokens = tokens or Tokens.model_validate({"max_length": _limit(self.tokenizer, config), **known})
        self.batch_size = batch_size or _BATCH_ROWS
        self.max_tokens = max_tokens or self.batch_size * TOKENS_PER_ROW
        self.batching: Literal["packed", "grouped"] = "grouped"
        self._attention = self.model.config._attn_implementation
        attention.disable_cudnn_sdpa(self.device)
        separate_rows(self.model)
        if packed_model.why_not_packed(self.model) is None:
            packed_model.enable_packing(self.model, attention.PLAIN)
            self.batching = "packed"
        if self.tokens.windows is not None:
            pool_windows(self.model, self.tokens.windows.pool)

    def __repr__(self) -> str:
        what = f"{self.task}, {plural(len(self.labels), 'label')}" if self.labels else self.task
        return f"<Classifier {type(self.model).__name__}: {what}, {self.batching}, {self.device}>"

    def as_fitted(self) -> Classifier:
        """This classifier, with the temperature and the thresholds that were fitted for its model, if any were.

        Raises:
            InputError: they cannot be read.
        """
        self.rule = read_rule(self._folder, self.task, self.labels or ()) or NO_RULE
        return self

    @property
    def num_labels(self) -> int:
        """Outputs of the model."""
        return int(self.model.config.num_labels)

    def predict(self, texts: Sequence[Any]) -> list[dict[str, Any]]:
        """A dictionary for each text, in their order: `prediction`, and `scores`, a probability by label name.

        Args:
            texts: texts, or pairs (or more) of texts for a model that was trained on such; of a token classification also lists of words. None and
                blank texts are allowed.

        Returns: `prediction` is a label's name, a list of names (multi-label) or a number (regression, without `scores`);
            None for a blank text. Of a token classification the dictionary has `entities`, a list of start, end, label, text and score
            (None for a blank text), and nothing else.
        """
        if self.words is not None:
            return [{"entities": entities} for entities in self.entities(texts)]
        logits = self.logits(*_parted(texts, self.text_columns))
        columns = {
            name: values.to_pylist()
            for name, values in prediction_columns(self.task, self.labels, logits, self.rule).items()
        }
        decided = columns.pop("prediction")
        if self.labels is None:
            return [{"prediction": value} for value in decided]
        rows = zip(*columns.values(), strict=True)
        return [
            {"prediction": value, "scores": dict(zip(self.labels, row, strict=True))}
            for value, row in zip(decided, rows, strict=True)
        ]

    def predict_proba(self, texts: Sequence[Any]) -> Array:
        """Probabilities, float32 (N, K), columns in the order of `labels`; values (N, 1) for regression. NaN: a blank text."""
        scores: Array = probabilities(self.task, self.rule.scaled(self.logits(*_parted(texts, self.text_columns))))
        return scores

    def logits(
        self,
        *texts: Sequence[str | None],
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Array:
        """Logits, float32 (N, K), in the order of the texts; NaN for a blank text or pair.

        Args:
            texts: one column of texts, or several of equal length.
            advance: called with the number of rows of each batch.
        """
        if self.words is not None:
            raise InputError("a token classification has logits of words, not of texts", "call `predict`")
        columns = [_text_array(column) for column in texts]
        logits = np.full((len(columns[0]), self.num_labels), np.nan, np.float32)
        for start in range(0, len(columns[0]), CHUNK_ROWS):
            encoded = self.encode([column.slice(start, CHUNK_ROWS) for column in columns])
            logits[start + encoded.rows] = self.run(encoded, advance)
        return logits

    def encode(self, columns: Sequence[pa.Array], divided: Array | None = None) -> EncodedTexts:
        """Tokens of the texts that are not blank.

        Args:
            columns: large_string (N,), one, two for pairs, or more, which are joined.
            divided: of a token classification, where the words of each text are that is a list of words, int32 (n, 2), else None; (N,).
        """
        blank = np.stack([is_blank(column) for column in columns])
        # Of several texts that are joined some may be blank.
        rows = np.flatnonzero(~(blank.all(axis=0) if len(columns) > 2 else blank.any(axis=0)))
        columns = join_columns(columns, self.tokenizer)
        starts = range(0, len(rows), _TOKENIZED)
        pieces = ([c.take(pa.array(rows[i : i + _TOKENIZED])).to_pylist() for c in columns] for i in starts)
        # Made for each call: if the user calls `self.tokenizer`, that changes the truncation set in it.
        encoder = Encoder(self.tokenizer, self.tokens, spans=self.words is not None)
        batch = EncodedBatch.joined([batch for _, batch in encoder.encode((None, texts) for texts in pieces)])
        if len(batch.tokens):
            check_tokens(int(batch.tokens.max()), self._vocabulary)
        kept = batch.lengths > 0  # a tokenizer without special tokens may make no token of a text
        offsets = np.concatenate([[0], np.cumsum(batch.lengths[kept])])
        windows = None
        if batch.windows is not None:
            windows = np.concatenate([[0], np.cumsum(batch.windows[0][batch.windows[0] > 0])])
        split = Split(batch.tokens, offsets, np.zeros(len(offsets) - 1, np.int64), batch.types, windows=windows)
        if self.words is None:
            return EncodedTexts(split, rows[kept], int(batch.cut.sum()))
        texts = columns[0].to_pylist()
        some = [(texts[row], None if divided is None else divided[row]) for row in rows[kept].tolist()]
        places = self._places(some, batch.spans, offsets, batch.cut[kept])
        split = replace(split, words=places, labels=np.zeros(len(places.pieces), np.int64))
        known = set(rows[kept].tolist())
        return EncodedTexts(
            split, rows[kept], int(batch.cut.sum()), [t if i in known else None for i, t in enumerate(texts)]
        )

    def _places(
        self, texts: Sequence[tuple[str, Array | None]], spans: Array | None, token_offsets: Array, cut: Array
    ) -> WordPlaces:
        """The words of texts (or where they are, if that is known), as training had them, and the first token of each."""
        assert self.words is not None
        spans = np.empty((0, 2), np.int32) if spans is None else spans
        words = [spans_of_text(text, self.words) if known is None else known for text, known in texts]
        offsets = np.concatenate([[0], np.cumsum([len(each) for each in words])]).astype(np.int64)
        flat = np.concatenate([np.empty((0, 2), np.int32), *words])
        return WordPlaces(offsets, flat, find_pieces(offsets, flat, token_offsets, spans, cut))

    def entities(self, texts: Sequence[str | Sequence[str] | None]) -> list[list[dict[str, Any]] | None]:
        """The entities of each text, in their order: start, end, label, text and score of each; None for a blank text.

        Args:
            texts: a list of words stands for the text that has them with one space between.
        """
        column, result = _text_array([join_words(text) for text in texts]), []
        divided = given_words(texts, lambda number: f"text {number + 1}")
        for start in range(0, len(column), CHUNK_ROWS):
            encoded = self.encode([column.slice(start, CHUNK_ROWS)], divided[start : start + CHUNK_ROWS])
            result += self.entity_column(encoded, self.run(encoded)).to_pylist()
        return result

    def entity_column(self, encoded: EncodedTexts, logits: Array) -> pa.ListArray:
        """The entities of all N texts as `afina.worker.task.entity_columns` makes them.

        Args:
            logits: of the words, (W, K), from `run`.
        """
        words = encoded.split.words
        assert words is not None
        counts = np.zeros(len(encoded.texts), np.int64)
        counts[encoded.rows] = np.diff(words.offsets)
        whole = replace(words, offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))
        return predicted_entities(encoded.texts, logits, whole, self.labels or ())

    def run(self, encoded: EncodedTexts, advance: Callable[[int], None] = lambda rows: None) -> Array:
        """Logits of encoded texts, float32 (M, K), in the order of `encoded.rows`; or of their words, (W, K)."""
        split = encoded.split
        result = np.zeros((len(split.labels), self.num_labels), np.float32)
        waiting: list[tuple[list[int], torch.Tensor]] = []
        for rows, inputs, targets in self._batches(split):
            with torch.inference_mode():
                logits = scored_logits(self.model(**inputs)["logits"].float(), targets)
            if self.device.type == "cpu":
                result[split.scored(rows)] = logits.numpy()
            else:  # a copy would wait for the device after each batch
                waiting.append((rows, logits))
            advance(len(rows))
        for rows, logits in waiting:
            result[split.scored(rows)] = logits.cpu().numpy()
        return result

    def check_rows(self, encoded: EncodedTexts) -> str:
        """Compare up to eight texts, as `run` batches them, with each alone in plain Transformers; returns a line for the log.

        Raises:
            InputError: the logits differ.
        """
        split = encoded.split.sequences
        rows = choose_rows(split, sorted(set(self.tokenizer.all_special_ids)), self.model.num_parameters())
        some = split.take(np.array(rows))
        together = self.run(EncodedTexts(some, np.arange(len(rows)), 0))
        ours = self.model.config._attn_implementation
        try:
            if ours != self._attention:
                self.model.set_attn_implementation(self._attention)
            with torch.inference_mode():
                alone = logits_alone(self.model, some, list(range(len(rows))))
        finally:
            if ours != self._attention:
                self.model.set_attn_implementation(ours)
        if some.words is not None:  # of the words' first tokens among all
            own, row = some.words.scored(np.arange(len(rows)))
            together, alone = together[own], alone[some.offsets[row] + some.words.pieces[own]]
        largest = float(np.abs(together - alone).max(initial=0.0))
        require_equal(largest, alone, f"{len(rows)} of these texts, {self.batching}, have other logits than each alone")
        return (
            f"model check: {plural(len(rows), 'text')} {self.batching} and each alone in transformers: largest difference of a "
            f"logit {largest:.1e}"
        )

    def _batches(self, split: Split) -> Iterator[tuple[list[int], dict[str, Any], Targets]]:
        if not len(split):  # a chunk of blank texts
            return
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        side, max_tokens = self.tokenizer.padding_side, self.max_tokens if self.batching == "packed" else None
        collate = packed_model.collator(
            self.model, split, self.batching, pad, tokenizer_side=side, device=self.device.type
        )
        for rows in EvalBatches(split.lengths, self.batch_size, 0, 1, max_tokens, split.windows_of_rows):
            inputs = collate(rows)
            targets = inputs.pop("labels")
            yield (
                rows,
                {
                    name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                    for name, value in inputs.items()
                },
                targets,
            )


def _limit(tokenizer: Any, config: Any) -> int:
    """The model's own limit; 512 tokens where neither it nor its tokenizer has one."""
    limits = [
        n for n in (tokenizer.model_max_length, max_positions(config)) if isinstance(n, int) and 0 < n < 1_000_000
    ]
    return min(limits, default=_MAX_LENGTH)


def _text_array(texts: Sequence[str | None]) -> pa.Array:
    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError as error:
        raise InputError(f"a text is not Unicode: {error}", "decode it anew, or leave the half of a pair out") from None
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        wrong = next(text for text in texts if text is not None and not isinstance(text, str))
        raise InputError(f"{wrong!r} is not a text", "give texts, or None where there is none") from None


def _parted(texts: Sequence[Any], trained: Sequence[str] | None) -> list[list[str | None]]:
    """Texts, or several texts a row, as one list for each column; as many as there were in training, if that is known."""
    if isinstance(texts, str):
        raise InputError("one text was given, a list of texts is expected", "put it into a list: predict([text])")
    rows = list(texts)
    several = [len(row) for row in rows if isinstance(row, (tuple, list))]
    if trained and rows and {len(trained)} != set(several or [1]):
        how = "a text" if len(trained) == 1 else plural(len(trained), "text")
        raise InputError(
            f"the model reads {how} a row (in training: {', '.join(trained)}), {max(several or [1])} {'were' if several else 'was'} given",
            "give texts" if len(trained) == 1 else f"give tuples of {len(trained)} texts, in this order",
        )
    if not several:
        return [rows]
    if any(not isinstance(row, (tuple, list)) or len(row) != len(rows[0]) for row in rows):
        raise InputError("single texts and pairs of texts are mixed", 'give pairs only: [("a", "b"), …]')
    return [list(column) for column in zip(*rows, strict=True)]
