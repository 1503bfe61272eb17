"""Examples to prepared data: tokenised piece by piece on all cores, put together, sealed, published.

Of a row only numbers stay in memory; the texts are read again in batches. What was tokenised is kept in pieces until it is
published (`afina.worker.data.shards`): a prepare that is killed is gone on with by the next one. What is written where: see
`afina.worker.data.prepared`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, EnvironmentProblem, InputError, RecipeError
from afina.files import readable_size
from afina.publish import publish, staging
from afina.run.plan import Plan
from afina.worker.data import prepared
from afina.worker.data.encode import EncodedBatch, Encoder
from afina.worker.data.shards import Missing, Piece, Pieces, cut_pieces, discard
from afina.worker.data.splits import Examples, Labels
from afina.worker.data.tables import DataSource, examples_of
from afina.worker.data.write_split import TEXTS, Seen, write_part
from afina.worker.model.pretrained import load_tokenizer
from afina.worker.progress import Progress

__all__ = ["Checked", "build", "work_folder"]

#: Texts that are tokenised at once, and their bytes: a signal is answered between two batches.
_BATCH_ROWS = 4096
_BATCH_BYTES = 1 << 20
_TRUNCATED_SHARE = 0.01
_UNKNOWN_SHARE = 0.1
#: Bytes for each token while it is estimated how much room is needed: its id in a piece, and in what is published.
_BYTES_PER_TOKEN = 4
#: How often pieces may be missing when they are put together before it is no accident.
_TRIES = 5

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Checked:
    """Data that can be trained on.

    Attributes:
        sources: where the rows of each source can be read again.
        states: of the files of each source, from before they were read.
    """

    labels: Labels
    parts: Mapping[str, Examples]
    warnings: list[str]
    sources: Mapping[str, DataSource]
    states: Mapping[str, Any]


def work_folder(plan: Plan) -> Path:
    """Where pieces are kept."""
    return plan.site.cache / "prepare"


def build(
    plan: Plan, folder: Path, checked: Checked, final: Path, content: Mapping[str, Any], say: Say
) -> dict[str, Any]:
    """Tokenise what was checked and publish it at `final`; returns the manifest.

    Args:
        folder: the model's, for its tokenizer and vocabulary.
        content: what the digest in `final`'s name is over.

    Raises:
        DataError: a text of which the tokenizer makes nothing; a file that was written into meanwhile.
        EnvironmentProblem: the file system has less room than the estimate.
        InputError: the tokenizer gives tokens that the model does not have.
    """
    recipe = plan.recipe
    tokenizer = load_tokenizer(folder, recipe)
    _check_room_for_text(tokenizer, recipe.tokens.max_length, len(recipe.data.text))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size")
    making = _Making(
        checked,
        recipe.data.text,
        Encoder(tokenizer, recipe.tokens.max_length),
        size if isinstance(size, int) else None,
        np.uint16 if max(len(tokenizer), size if isinstance(size, int) else 0) <= 1 << 16 else np.uint32,
    )
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "numpy")}
    made = Pieces(work_folder(plan), final.name, versions)
    try:
        _check_room(plan.site.prepared, checked.parts, recipe.tokens.max_length, made.size())
        for _ in range(_TRIES):
            making.make(made, say)
            with staging(final) as aside:
                try:
                    splits, warnings = making.put_together(made, aside, recipe.tokens.max_length)
                except Missing:  # another process may have published, and tidied up
                    if prepared.is_whole(final):
                        break
                    continue
                tokenizer.save_pretrained(aside / "tokenizer")
                about = {
                    "digest": final.name,
                    "task": checked.labels.task,
                    "labels": list(checked.labels.names) if checked.labels.names is not None else None,
                    "num_labels": len(checked.labels.names) if checked.labels.names is not None else 1,
                    "text_columns": list(recipe.data.text),
                    "source": content["source"],
                    "max_length": recipe.tokens.max_length,
                    "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                    "splits": splits,
                    "warnings": [*checked.warnings, *warnings],
                    "made_with": versions,
                    "content": content,
                }
                prepared.seal(aside, about)
                if not publish(aside, final, prepared.is_whole):
                    say(f"another process prepared {final.name[:8]} at the same time; its work is taken")
                break
        else:
            raise EnvironmentProblem(
                f"{made.folder}: what was written there has gone again, {_TRIES} times",
                "look for what empties that folder, then run the same command again",
            )
    except Exception:
        discard(work_folder(plan), final.name)
        raise
    return prepared.load_manifest(final)


class _Making:
    """How the pieces are made, and what is made of them.

    Args:
        names: the text columns.
        size: of the model's vocabulary, if its config says so.
        dtype: of token ids.
    """

    def __init__(self, checked: Checked, names: Sequence[str], encoder: Encoder, size: int | None, dtype: Any) -> None:
        self.checked, self.names, self.encoder, self.size, self.dtype = checked, names, encoder, size, dtype
        self.pieces = {source: _pieces(number, source, checked.parts) for number, source in enumerate(checked.sources)}

    def make(self, made: Pieces, say: Say) -> None:
        """Tokenise and save the pieces that are missing."""
        pieces = [piece for each in self.pieces.values() for piece in each]
        missing = [piece for piece in pieces if not made.has(piece)]
        total, left = (sum(map(len, some)) for some in (pieces, missing))
        if not missing:
            return
        if left < total:
            say(f"going on where a prepare was stopped: {total - left:,} of {total:,} texts are tokenised")
        with (
            Progress("tokenising", "tokenised", "texts", total, say, before=total - left) as progress,
            contextlib.closing(self.encoder.encode(self._batches(missing))) as batches,
        ):
            encoded: list[EncodedBatch] = []
            for (piece, columns, is_last), found in batches:
                self._check(piece, sum(len(e.lengths) for e in encoded), found)
                encoded.append(found)
                progress.advance(len(found.lengths))
                if is_last:
                    made.save(piece, _arrays(piece, columns, encoded, self.dtype))
                    encoded = []

    def put_together(self, made: Pieces, aside: Path, max_length: int) -> tuple[dict[str, dict[str, int]], list[str]]:
        """Write all parts into `aside`; what the manifest says of them, and warnings.

        Raises:
            Missing: a piece has gone.
        """
        splits, warnings, tokenizer = {}, [], self.encoder.tokenizer
        for part, examples in self.checked.parts.items():
            texts = TEXTS[: len(self.names)] if part != "train" else ()
            pieces = self.pieces[examples.source]
            unknown = tokenizer.unk_token_id
            special = np.array([i for i in tokenizer.all_special_ids if i != unknown], np.int64)
            seen = Seen(special, unknown)
            splits[part] = write_part(aside, part, examples, pieces, made, self.dtype, texts, seen)
            warnings += _said_of(part, examples, seen, tokenizer, max_length)
        return splits, warnings

    def _batches(
        self, missing: Sequence[Piece]
    ) -> Iterator[tuple[tuple[Piece, list[pa.Array], bool], list[list[str]]]]:
        """Batches of texts of the missing pieces: the piece, its text columns, whether it is its last batch; the texts."""
        for source, rows in self.checked.sources.items():
            wanted = [piece for piece in missing if piece.source == source]
            for piece, columns in _gather(rows, self.names, wanted):
                ends = np.cumsum(piece.sizes)
                start = 0
                while start < len(piece):
                    before = int(ends[start - 1]) if start else 0
                    stop = int(np.searchsorted(ends, before + _BATCH_BYTES, side="right"))
                    stop = min(max(stop, start + 1), start + _BATCH_ROWS, len(piece))
                    texts = [column.slice(start, stop - start).to_pylist() for column in columns]
                    yield (piece, columns, stop == len(piece)), texts
                    start = stop
            if rows.state() != self.checked.states[source]:
                raise _written_into(rows)

    def _check(self, piece: Piece, done: int, found: EncodedBatch) -> None:
        empty = np.flatnonzero(found.lengths == 0)
        if len(empty):
            row = piece.rows[done + empty[0]]
            part, examples = next(
                (p, e) for p, e in self.checked.parts.items() if e.source == piece.source and row in e.rows
            )
            place = examples.table.where(int(np.flatnonzero(examples.rows == row)[0]))
            raise DataError(f"{part}: {place}: the tokenizer makes no token of this text", "remove this row")
        if self.size is not None and found.tokens.max() >= self.size:
            raise InputError(
                f"model: its tokenizer gives token {found.tokens.max()}, its config has vocab_size {self.size}",
                "tokenizer and weights do not belong together: take both from one model",
            )


def _check_room_for_text(tokenizer: Any, max_length: int, texts: int) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if max_length < special + texts:
        raise RecipeError(
            f"tokens.max_length: {max_length} leaves no room for {'two texts' if texts == 2 else 'text'} beside the {special} "
            "special tokens of the model",
            f"set it to {special + texts} or more; 128 to 512 is usual",
        )


def _said_of(part: str, examples: Examples, seen: Seen, tokenizer: Any, max_length: int) -> list[str]:
    """What is doubtful about the tokens of a part."""
    warnings = []
    if seen.cut / len(examples) > _TRUNCATED_SHARE:
        warnings.append(
            f"{seen.cut:,} of {len(examples):,} texts of {part} ({seen.cut / len(examples):.1%}) are longer "
            f"than tokens.max_length {max_length} and were cut"
        )
    if seen.bare:
        where = examples_of(examples.table, np.array(seen.bare))
        warnings.append(
            f"the tokenizer makes nothing of {len(seen.bare):,} texts of {part} but special tokens: {where}"
        )
    if seen.content and seen.unknown / seen.content > _UNKNOWN_SHARE:
        warnings.append(
            f"{seen.unknown / seen.content:.1%} of the tokens of {part} are unknown to the model ({tokenizer.unk_token}): was it "
            "trained on texts of this language and script?"
        )
    return warnings


def _pieces(number: int, source: str, parts: Mapping[str, Examples]) -> list[Piece]:
    """The rows of a source that any part uses, in pieces."""
    mine = {part: examples for part, examples in parts.items() if examples.source == source}
    if not mine:
        return []
    rows, first = np.unique(np.concatenate([e.rows for e in mine.values()]), return_index=True)
    sizes = np.concatenate([e.sizes for e in mine.values()])[first]
    kept = np.isin(rows, np.concatenate([e.rows for part, e in mine.items() if part != "train"] or [rows[:0]]))
    return cut_pieces(number, source, rows, sizes, kept)


def _gather(
    source: DataSource, names: Sequence[str], pieces: Sequence[Piece]
) -> Iterator[tuple[Piece, list[pa.Array]]]:
    """The texts of `pieces`, which ascend; the source is read as far as they go.

    Raises:
        DataError: the source has fewer rows than it had.
    """
    waiting = iter(pieces)
    piece = next(waiting, None)
    taken: list[list[pa.Array]] = [[] for _ in names]
    start = 0
    for batch in source.stream(names) if piece is not None else ():
        stop = start + len(batch[0])
        while piece is not None and piece.rows[0] < stop:
            low, high = np.searchsorted(piece.rows, [start, stop])
            for column, pieces_of in zip(batch, taken, strict=True):
                pieces_of.append(column.take(pa.array(piece.rows[low:high] - start)))
            if high < len(piece):
                break
            yield piece, [pa.concat_arrays(each) for each in taken]
            taken = [[] for _ in names]
            piece = next(waiting, None)
        if piece is None:
            return
        start = stop
    if piece is not None:
        raise _written_into(source)


def _written_into(source: DataSource) -> DataError:
    return DataError(
        f"{', '.join(map(str, source.paths))}: was written into while it was read",
        "run the same command again when nobody writes there",
    )


def _arrays(piece: Piece, columns: Sequence[pa.Array], encoded: Sequence[EncodedBatch], dtype: Any) -> dict[str, Array]:
    whole = EncodedBatch.joined(encoded)
    arrays = {"tokens": whole.tokens.astype(dtype), "lengths": whole.lengths, "cut": whole.cut}
    if whole.types is not None:
        arrays["types"] = whole.types
    if piece.kept.any():
        for name, column in zip(TEXTS, columns, strict=False):
            texts = column.filter(pa.array(piece.kept)).cast(pa.large_binary())
            arrays[name] = np.frombuffer(b"".join(texts.to_pylist()), np.uint8)
            arrays[f"{name}_lengths"] = pc.binary_length(texts).to_numpy(zero_copy_only=False)
    return arrays


def _check_room(folder: Path, parts: Mapping[str, Examples], max_length: int, there: int) -> None:
    """Refuse before writing where the file system has less room than the estimate: a token for every three bytes of text.

    Args:
        there: bytes of pieces that are there already.
    """
    needed = (1 << 20) - there
    for part, examples in parts.items():
        size = int(examples.sizes.sum())
        needed += _BYTES_PER_TOKEN * min(size // 3 + 3 * len(examples), len(examples) * max_length)
        # Texts of eval and test stay beside their tokens, and in the piece until then.
        needed += 0 if part == "train" else 2 * size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentProblem(
            f"{folder}: about {readable_size(needed)} are needed, {readable_size(free)} are free",
            "remove old runs and prepared data there, or point AFINA_SCRATCH at a larger file system",
        )
