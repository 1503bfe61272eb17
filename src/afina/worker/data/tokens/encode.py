"""Tokenisation on all cores: the Rust tokenizer's own threads, with batches encoded ahead of the caller.

There are as many threads as this process may use cores, or `RAYON_NUM_THREADS`; the tokens do not depend on it. A tokenizer
written in Python, or one that changes in Python what the Rust one returns, runs on one core.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import InputError, RecipeError
from afina.recipe.keys.train_keys import Tokens

__all__ = ["EncodedBatch", "Encoder", "join_columns"]

Array = np.ndarray[Any, Any]
T = TypeVar("T")

#: Batches encoded ahead: enough that neither side waits for the other.
_AHEAD = 2
#: Characters of a text in a pair, times `max_length`, above which it may have more tokens than are kept.
_CHARACTERS = 4
#: Methods that a tokenizer's class must not override if its Rust tokenizer is to be called directly.
_PLAIN = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of N texts with T tokens.

    Attributes:
        tokens: ids, the texts one after the other, uint32 (T,).
        lengths: tokens of each text, of all its windows, int64 (N,).
        types: token types, uint8 (T,); None where all are 0.
        cut: the text was longer than the recipe allows, bool (N,).
        windows: tokens of each window, of the texts one after the other, int64 (W,), and windows of each text, int64 (N,); None: texts
            have none.
        spans: first character of each token in its text, and the one behind its last, int32 (T, 2); -1 of special
            tokens; None where nobody needs them.
    """

    tokens: Array
    lengths: Array
    types: Array | None
    cut: Array
    windows: tuple[Array, Array] | None = None
    spans: Array | None = None

    @classmethod
    def joined(cls, batches: Sequence[EncodedBatch]) -> EncodedBatch:
        """Batches as one; `batches` may be empty."""
        types = None
        if any(batch.types is not None for batch in batches):
            zeros = [np.zeros(len(batch.tokens), np.uint8) for batch in batches]
            types = np.concatenate([z if b.types is None else b.types for z, b in zip(zeros, batches, strict=True)])
        tokens = np.concatenate([np.empty(0, np.uint32), *(batch.tokens for batch in batches)])
        lengths = np.concatenate([np.empty(0, np.int64), *(batch.lengths for batch in batches)])
        cut = np.concatenate([np.empty(0, bool), *(batch.cut for batch in batches)])
        of = [batch.windows for batch in batches if batch.windows is not None]
        windows = (np.concatenate([each for each, _ in of]), np.concatenate([n for _, n in of])) if of else None
        spans = [batch.spans for batch in batches if batch.spans is not None]
        return cls(tokens, lengths, types, cut, windows, np.concatenate(spans) if spans else None)


class Encoder:
    """Args:
    tokenizer: as Transformers loads it.
    tokens: of the recipe. Of a pair the longer text is cut first.
    spans: keep where each token is in its text.

    Raises:
        InputError: a tokenizer that does not say where its tokens are, and `spans`.
    """

    def __init__(self, tokenizer: Any, tokens: Tokens, *, spans: bool = False) -> None:
        self.tokenizer, self.tokens, self.spans = tokenizer, tokens, spans
        self._options = {"truncation": True, "max_length": tokens.max_length, "return_attention_mask": False}
        if tokens.truncation == "head+tail":  # the middle is cut out of the whole text's tokens
            self._options = {"truncation": False, "return_attention_mask": False, "verbose": False}
        if tokens.windows is not None:
            self._options |= {"stride": tokens.windows.stride, "return_overflowing_tokens": True}
            if not (plain := _is_plain(tokenizer)) or tokenizer.truncation_side != "right":
                why = "cuts texts at their beginning" if plain else "has no fast tokenizer of Transformers"
                raise RecipeError(f"tokens.windows: the model {why}", "leave it out, or train another model")
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        self._backend: Any = None
        if _is_plain(tokenizer):
            # This call sets the Rust tokenizer's truncation, padding and treatment of special tokens.
            tokenizer(["a"], **self._options)
            self._backend = tokenizer.backend_tokenizer
        if spans and not tokenizer.is_fast:
            raise InputError(
                f"token classification: {type(tokenizer).__name__} does not tell where its tokens are in the text",
                "choose a model with a tokenizer.json (`is_fast`)",
            )

    def encode(self, batches: Iterable[tuple[T, Sequence[Sequence[str]]]]) -> Generator[tuple[T, EncodedBatch]]:
        """Encode batches, in their order.

        Args:
            batches: the caller's own description of a batch, passed through; and its one or two columns of texts.
        """
        ahead: deque[tuple[T, Future[Any]]] = deque()
        pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
        try:
            for about, columns in batches:
                ahead.append((about, pool.submit(self._call, columns)))
                if len(ahead) > _AHEAD:
                    yield self._next(ahead)
            while ahead:
                yield self._next(ahead)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _next(self, ahead: deque[tuple[T, Future[Any]]]) -> tuple[T, EncodedBatch]:
        about, future = ahead.popleft()
        return about, self._flatten(*future.result())

    def _call(self, columns: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[list[int]] | None, Any]:
        """Token ids, token types, and the Rust tokenizer's encodings if it has one."""
        if self._backend is None:
            batch = self.tokenizer(*map(list, columns), **self._options)
            types = batch.get("token_type_ids")
            return batch["input_ids"], types, getattr(batch, "encodings", None)
        texts = list(columns[0]) if len(columns) == 1 else self._shortened(list(zip(*columns, strict=True)))
        # `fast`: without the offsets of each token in its text, a sixth of the work.
        encode = self._backend.encode_batch if self.spans else self._backend.encode_batch_fast
        encodings = encode(texts)
        types = [e.type_ids for e in encodings] if self._has_types else None
        return [e.ids for e in encodings], types, encodings

    def _shortened(self, pairs: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Pairs whose long texts are cut to two or three times `max_length`, the longer one of a pair being longer still.

        The Rust tokenizer makes what it cuts off too, of pairs every part of one text with every part of the other: gigabytes for two of 20,000 words.
        """
        limit = _CHARACTERS * self.tokens.max_length
        long = [i for i, pair in enumerate(pairs) if max(map(len, pair)) > limit]
        sides = [self._backend.encode_batch([pairs[i][side] for i in long]) for side in (0, 1)]
        for i, both in zip(long, zip(*sides, strict=True), strict=True):
            counts = [len(encoding.ids) + sum(len(part.ids) for part in encoding.overflowing) for encoding in both]
            texts = list(pairs[i])
            for side, encoding in enumerate(both):
                last = 0 if counts[side] <= counts[1 - side] else 1
                if len(encoding.overflowing) > last + 1:
                    texts[side] = texts[side][: max(end for _, end in encoding.overflowing[last].offsets)]
            pairs[i] = tuple(texts)
        return pairs

    def _windows(self, encodings: Any, most: int) -> EncodedBatch:
        counts = np.array([1 + len(e.overflowing) for e in encodings], np.int64)
        parts = [[e, *e.overflowing][:most] for e in encodings]
        flat = [window for windows in parts for window in windows]
        types = [w.type_ids for w in flat] if self._has_types else None
        batch = self._flatten([w.ids for w in flat], types, None)
        cut, counts = counts > most, np.minimum(counts, most)
        lengths = np.add.reduceat(batch.lengths, np.cumsum(counts) - counts) if len(counts) else batch.lengths
        return EncodedBatch(batch.tokens, lengths, batch.types, cut, (batch.lengths, counts))

    def _flatten(self, ids: list[list[int]], types: list[list[int]] | None, encodings: Any) -> EncodedBatch:
        if self.tokens.windows is not None and encodings is not None:
            return self._windows(encodings, self.tokens.windows.max_windows)
        if self.tokens.truncation == "head+tail":
            encodings, whole = None, np.array([len(row) for row in ids], np.int64)
            ids = self._without_middle(ids)
            types = self._without_middle(types) if types is not None else None
        lengths = np.array([len(row) for row in ids], np.int64)
        total = int(lengths.sum())
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.uint32, total)
        flat_types = np.fromiter(itertools.chain.from_iterable(types), np.uint8, total) if types is not None else None
        cut = lengths >= self.tokens.max_length
        if self.tokens.truncation == "head+tail":
            cut = whole > self.tokens.max_length
        elif encodings is not None:
            for i in np.flatnonzero(cut):
                cut[i] = bool(encodings[i].overflowing)
        spans = None
        if self.spans:
            places = itertools.chain.from_iterable(itertools.chain.from_iterable(e.offsets for e in encodings))
            spans = np.fromiter(places, np.int32, 2 * total).reshape(-1, 2)
            special = itertools.chain.from_iterable(e.special_tokens_mask for e in encodings)
            spans[np.fromiter(special, bool, total)] = -1
        return EncodedBatch(
            flat, lengths, flat_types if flat_types is not None and flat_types.any() else None, cut, spans=spans
        )

    def _without_middle(self, rows: list[list[int]]) -> list[list[int]]:
        head, tail = self.tokens.head_and_tail
        return [row if len(row) <= head + tail else row[:head] + row[-tail:] for row in rows]


def join_columns(columns: Sequence[pa.Array], tokenizer: Any) -> list[pa.Array]:
    """More than two columns of texts as one, joined by the tokenizer's separator (a line break where it has none); one column
    and pairs as they are."""
    if len(columns) <= 2:
        return list(columns)
    between = f" {tokenizer.sep_token} " if tokenizer.sep_token else "\n"
    joint = pa.scalar(between, pa.large_string())
    return [pc.binary_join_element_wise(*columns, joint, null_handling="replace", null_replacement="")]


def _is_plain(tokenizer: Any) -> bool:
    """True if the Rust tokenizer, called directly, returns the same as this tokenizer."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    return isinstance(tokenizer, TokenizersBackend) and all(
        getattr(type(tokenizer), name) is getattr(TokenizersBackend, name) for name in _PLAIN
    )
