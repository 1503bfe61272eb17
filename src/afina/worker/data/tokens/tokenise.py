"""Tokenises checked data shard by shard on all cores, writes the splits, and publishes them.

Of a row only numbers stay in memory; the texts are read again in batches. Shards are kept until the data is published
(`afina.worker.data.tokens.shards`), so an interrupted prepare resumes. The format of the result: `afina.worker.data.prepared`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, EnvironmentProblem, RecipeError
from afina.publish import publish, staging
from afina.recipe.keys.data_keys import Data
from afina.recipe.keys.train_keys import Tokens
from afina.run.plan import Plan
from afina.text import size_in_words
from afina.worker.data import prepared
from afina.worker.data.labels.one_feature import check_one_feature
from afina.worker.data.splits.build_splits import CheckedData
from afina.worker.data.splits.duplicates import check_conflicts, check_duplicates
from afina.worker.data.splits.folds import GROUPS
from afina.worker.data.splits.groups import check_shared_groups
from afina.worker.data.tables.data_table import DataSource, Examples
from afina.worker.data.tokens.encode import EncodedBatch, Encoder, join_columns
from afina.worker.data.tokens.shards import Shard, ShardFolder, ShardMissing, discard, plan_shards
from afina.worker.data.tokens.write_split import TEXTS, TokenStats, write_split
from afina.worker.model.tokenizer import check_pad_token, check_tokens, load_tokenizer, vocabulary_size
from afina.worker.progress import Progress

__all__ = ["Tokenising", "build", "shards_folder"]

#: Texts that are tokenised at once, and their bytes: a signal is answered between two batches.
_BATCH_ROWS = 4096
_BATCH_BYTES = 1 << 20
#: Bytes of a token in the estimate of disk space: its id in a shard, and in what is published.
_BYTES_PER_TOKEN = 4
#: Shards may be missing when splits are written, because another process has published; more often is not an accident.
_TRIES = 5

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]


def shards_folder(plan: Plan) -> Path:
    """The folder of all token shards under this scratch."""
    return plan.site.cache / "prepare"


def build(
    plan: Plan, folder: Path, checked: CheckedData, final: Path, content: Mapping[str, Any], say: Say
) -> dict[str, Any]:
    """Tokenise the data and publish it at `final`; returns the manifest.

    Args:
        folder: the model's, for its tokenizer and vocabulary.
        content: the record whose digest is the name of `final`.

    Raises:
        DataError: a text without any token; a file that changed in the meantime.
        EnvironmentProblem: the file system has less room than the estimate.
        InputError: the tokenizer gives tokens that the model does not have.
    """
    recipe = plan.recipe
    tokenizer = load_tokenizer(folder, recipe)
    _check_max_length(tokenizer, recipe.tokens.max_length, len(recipe.data.text))
    size = vocabulary_size(folder)
    check_pad_token(tokenizer, size)
    dtype = np.uint16 if max(len(tokenizer), size or 0) <= 1 << 16 else np.uint32
    tokenising = Tokenising(
        checked,
        recipe.data,
        Encoder(tokenizer, recipe.tokens, spans=checked.labels.task == "token-classification"),
        size,
        dtype,
    )
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "numpy")}
    store = ShardFolder(shards_folder(plan), final.name, versions)
    try:
        _check_disk(plan.site.prepared, checked.splits, recipe.tokens, store.size())
        for _ in range(_TRIES):
            tokenising.make(store, say)
            with staging(final) as aside, contextlib.suppress(ShardMissing):
                splits, warnings, spoiled = tokenising.write_splits(store, aside)
                tokenizer.save_pretrained(aside / "tokenizer")
                about = {
                    "digest": final.name,
                    **_about(plan, checked, tokenizer, content),
                    "splits": splits,
                    "warnings": [*checked.warnings, *warnings],
                    "spoiled": spoiled,
                    "read": dict(checked.read),
                    "made_with": versions,
                    "content": content,
                }
                prepared.seal(aside, about)
                if not publish(aside, final, prepared.is_whole):
                    say(f"another process prepared {final.name[:8]} at the same time; its result is used")
                return prepared.load_manifest(final)
            if prepared.is_whole(final):  # another process has published it and removed the shards
                return prepared.load_manifest(final)
        raise EnvironmentProblem(
            f"{store.folder}: token shards disappeared {_TRIES} times",
            "find out what empties that folder, then run the same command again",
        )
    except Exception:
        discard(shards_folder(plan), final.name)
        raise


def _about(plan: Plan, checked: CheckedData, tokenizer: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's record of task, labels, texts and tokenizer; `repeated`: see `tfidf.without_repeated`."""
    recipe, labels, repeated = plan.recipe, checked.labels, dict[str, list[int]]()
    units = next((e.words.units for e in checked.splits.values() if e.words is not None), None)
    if recipe.tokens.windows is not None:
        special = tokenizer.backend_tokenizer.encode("a").special_tokens_mask
        if 0 in special:  # it may make no token of the letter
            repeated = {"repeated": [special.index(0) + recipe.tokens.windows.stride, special[::-1].index(0)]}
    return {
        "task": labels.task,
        "labels": list(labels.names) if labels.names is not None else None,
        "num_labels": len(labels.names) if labels.names is not None else 1,
        **({"word_units": units} if units else {}),
        "text_columns": list(recipe.data.text),
        "source": content["source"],
        "max_length": recipe.tokens.max_length,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        "padding_side": tokenizer.padding_side,
        **repeated,
    }


class Tokenising:
    """Makes shards from checked data, and splits from shards.

    Args:
        data: names the columns.
        size: of the model's vocabulary, if its config states it.
        dtype: of token ids.
    """

    def __init__(self, checked: CheckedData, data: Data, encoder: Encoder, size: int | None, dtype: Any) -> None:
        self.checked, self.encoder, self.size, self.dtype = checked, encoder, size, dtype
        self.names, self.group, self.folded = data.text, data.group, data.fold is not None
        with_texts = {split: e for split, e in checked.splits.items() if split != "train" or self.folded}
        self.shards = {
            source: _shards(number, source, checked.splits, with_texts) for number, source in enumerate(checked.sources)
        }

    def make(self, store: ShardFolder, say: Say) -> None:
        """Tokenise and save the shards that are missing."""
        shards = [shard for each in self.shards.values() for shard in each]
        missing = [shard for shard in shards if not store.has(shard)]
        total, left = (sum(map(len, some)) for some in (shards, missing))
        if not missing:
            return
        if left < total:
            say(f"resuming an interrupted prepare: {total - left:,} of {total:,} texts are tokenised")
        with (
            Progress("tokenising", "tokenised", "texts", total, say, before=total - left) as progress,
            contextlib.closing(self.encoder.encode(self._batches(missing))) as batches,
        ):
            encoded: list[EncodedBatch] = []
            for (shard, columns, is_last), batch in batches:
                self._check(shard, sum(len(e.lengths) for e in encoded), batch)
                encoded.append(batch)
                progress.advance(len(batch.lengths))
                if is_last:
                    store.save(shard, _arrays(shard, columns, encoded, self.dtype))
                    encoded = []

    def write_splits(
        self, store: ShardFolder, aside: Path
    ) -> tuple[dict[str, dict[str, Any]], list[str], dict[str, list[str]]]:
        """Write all splits into `aside`.

        Returns:
            Their entries in the manifest; warnings; those of the warnings that spoil the numbers of a split, by split.

        Raises:
            ShardMissing: a shard has disappeared.
        """
        entries: dict[str, dict[str, Any]] = {}
        warnings: list[str] = []
        keys: dict[str, Array] = {}
        tokenizer = self.encoder.tokenizer
        for split, examples in self.checked.splits.items():
            stats = TokenStats.for_tokenizer(tokenizer)
            shards = self.shards[examples.source]
            entries[split], keys[split] = write_split(
                aside, split, examples, shards, store, self.dtype, stats, texts=split != "train" or self.folded
            )
            warnings += stats.warnings(split, examples, tokenizer, self.encoder.tokens)
            if lost := entries[split].get("entities_cut"):
                warnings.append(
                    f"{lost:,} of {entries[split]['entities']:,} entities of {split} lie behind tokens.max_length "
                    f"{self.encoder.tokens.max_length} and are cut off{'' if split == 'train' else ': they count as missed'}"
                )
        splits = self.checked.splits
        spoiled = check_duplicates(splits, keys)
        if self.group is not None:
            for split, lines in check_shared_groups(self.group, splits).items():
                spoiled.setdefault(split, []).extend(lines)
            for split, examples in splits.items():
                entries[split]["groups"] = len(np.unique(_codes(examples)))
        if self.folded:
            np.save(aside / GROUPS, _codes(splits["train"]))
        warnings += [warning for each in spoiled.values() for warning in each]
        labels, train = self.checked.labels, splits["train"]
        plain = copy.deepcopy(tokenizer)  # a call of it would switch the encoder's truncation off
        one_feature = check_one_feature(
            labels,
            prepared.open_split(aside, "train"),
            lambda token: str(tokenizer.convert_ids_to_tokens(token)),
            lambda text: list(plain([text], add_special_tokens=False)["input_ids"][0]),
        )
        for split in [*splits, *(["eval"] if self.folded else [])]:
            if split != "train" and one_feature:
                spoiled.setdefault(split, []).extend(one_feature)
        warnings += [*one_feature, *check_conflicts(labels, train, keys["train"])]
        if labels.task == "single-label" and labels.names is not None:
            for split, examples in splits.items():
                counts = np.bincount(examples.labels, minlength=len(labels.names))
                entries[split]["largest_class"] = [labels.names[int(counts.argmax())], int(counts.max())]
        return entries, warnings, spoiled

    def _batches(
        self, missing: Sequence[Shard]
    ) -> Iterator[tuple[tuple[Shard, list[pa.Array], bool], list[list[str]]]]:
        """Batches of texts of the missing shards: the shard, its text columns, whether it is its last batch; the texts."""
        for key, source in self.checked.sources.items():
            wanted = [shard for shard in missing if shard.source == key]
            for shard, each in _gather(source, self.names, wanted):
                columns = join_columns(each, self.encoder.tokenizer)
                ends = np.cumsum(shard.sizes)
                start = 0
                while start < len(shard):
                    before = int(ends[start - 1]) if start else 0
                    stop = int(np.searchsorted(ends, before + _BATCH_BYTES, side="right"))
                    stop = min(max(stop, start + 1), start + _BATCH_ROWS, len(shard))
                    texts = [column.slice(start, stop - start).to_pylist() for column in columns]
                    yield (shard, columns, stop == len(shard)), texts
                    start = stop
            if source.state() != self.checked.states[key]:
                raise _changed(source)

    def _check(self, shard: Shard, done: int, batch: EncodedBatch) -> None:
        empty = np.flatnonzero(batch.lengths == 0)
        if len(empty):
            row = shard.rows[done + empty[0]]
            split, examples = next(
                (name, e) for name, e in self.checked.splits.items() if e.source == shard.source and row in e.rows
            )
            place = examples.table.where(int(np.flatnonzero(examples.rows == row)[0]))
            raise DataError(f"{split}: {place}: the tokenizer makes no token of this text", "remove this row")
        check_tokens(int(batch.tokens.max()), self.size)


def _codes(examples: Examples) -> Array:
    assert examples.codes is not None
    return examples.codes


def _check_max_length(tokenizer: Any, max_length: int, texts: int) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=texts == 2) + (texts - 1 if texts > 2 else 0)
    if max_length < special + texts:
        what = "text" if texts == 1 else "two texts" if texts == 2 else f"{texts} texts"
        raise RecipeError(
            f"tokens.max_length: {max_length} leaves no room for {what} beside the {special} "
            "special tokens of the model",
            f"set it to {special + texts} or more; 128 to 512 is usual",
        )


def _shards(
    number: int, source: str, splits: Mapping[str, Examples], with_texts: Mapping[str, Examples]
) -> list[Shard]:
    """Shards of the rows of a source that any split uses; texts are kept of the rows of `with_texts`."""
    users = {split: examples for split, examples in splits.items() if examples.source == source}
    if not users:
        return []
    rows, first = np.unique(np.concatenate([e.rows for e in users.values()]), return_index=True)
    sizes = np.concatenate([e.sizes for e in users.values()])[first]
    kept = np.isin(rows, np.concatenate([rows[:0], *(e.rows for e in with_texts.values() if e.source == source)]))
    return plan_shards(number, source, rows, sizes, kept)


def _gather(
    source: DataSource, names: Sequence[str], shards: Sequence[Shard]
) -> Iterator[tuple[Shard, list[pa.Array]]]:
    """The texts of `shards`, which ascend; the source is read as far as they reach.

    Raises:
        DataError: the source has fewer rows than it had.
    """
    waiting = iter(shards)
    shard = next(waiting, None)
    taken: list[list[pa.Array]] = [[] for _ in names]
    start = 0
    for batch in source.stream(names) if shard is not None else ():
        stop = start + len(batch[0])
        while shard is not None and shard.rows[0] < stop:
            low, high = np.searchsorted(shard.rows, [start, stop])
            for column, values in zip(batch, taken, strict=True):
                values.append(column.take(pa.array(shard.rows[low:high] - start)))
            if high < len(shard):
                break
            yield shard, [pa.concat_arrays(values) for values in taken]
            taken = [[] for _ in names]
            shard = next(waiting, None)
        if shard is None:
            return
        start = stop
    if shard is not None:
        raise _changed(source)


def _changed(source: DataSource) -> DataError:
    return DataError(
        f"{', '.join(map(str, source.paths))}: changed while it was read",
        "run the same command again when no other program writes to it",
    )


def _arrays(shard: Shard, columns: Sequence[pa.Array], encoded: Sequence[EncodedBatch], dtype: Any) -> dict[str, Array]:
    """The arrays of a shard: tokens, lengths, cut; places of the tokens, types and texts where there are any."""
    whole = EncodedBatch.joined(encoded)
    arrays = {"tokens": whole.tokens.astype(dtype), "lengths": whole.lengths, "cut": whole.cut}
    if whole.windows is not None:
        arrays["windows"], arrays["windows_lengths"] = whole.windows
    if whole.spans is not None:
        arrays |= {"starts": whole.spans[:, 0], "ends": whole.spans[:, 1]}
    if whole.types is not None:
        arrays["types"] = whole.types
    if shard.kept.any():
        for name, column in zip(TEXTS, columns, strict=False):
            texts = column.filter(pa.array(shard.kept)).cast(pa.large_binary())
            arrays[name] = np.frombuffer(b"".join(texts.to_pylist()), np.uint8)
            arrays[f"{name}_lengths"] = pc.binary_length(texts).to_numpy(zero_copy_only=False)
    return arrays


def _check_disk(folder: Path, splits: Mapping[str, Examples], tokens: Tokens, there: int) -> None:
    """Refuse before writing if the file system has less room than the estimate: a token for every three bytes of text.

    Args:
        there: bytes of existing shards.
    """
    needed = (1 << 20) - there
    longest, repeated = tokens.max_length, 1
    if tokens.windows is not None:  # windows share up to half of their tokens
        longest, repeated = longest * tokens.windows.max_windows, 2
    for split, examples in splits.items():
        size = int(examples.sizes.sum())
        needed += _BYTES_PER_TOKEN * min(size // 3 * repeated + 3 * len(examples), len(examples) * longest)
        # Texts of eval and test stay beside their tokens, and in the shard until then.
        needed += 0 if split == "train" else 2 * size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentProblem(
            f"{folder}: about {size_in_words(needed)} are needed, {size_in_words(free)} are free",
            "remove old runs and prepared data there, or point AFINA_SCRATCH at a larger file system",
        )
