"""From tables to examples: which rows make a part, and whether they can be learnt from.

Pure: nothing is read or written, the same input gives the same rows on every platform.

A part with a `fraction` is cut from its source: rows are shuffled with the seed of `train` (NumPy's PCG64), each stratum
is dealt out in the proportions of the fractions, what rounding leaves over goes on to the next stratum, and the part's
rows go back to the order of the source. Strata are the labels (single-label) or ten equal groups by rank (regression);
a multi-label source is cut without strata. `sample` is `datasets.Dataset.shuffle(seed).select(range(sample))`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, RecipeError, nearest
from afina.recipe.schema import Data, Part
from afina.worker.data.label_checks import check_found_labels, nearest_label
from afina.worker.data.labels import LabelColumns, Labels, find_labels, label_array, listed
from afina.worker.data.tables import DataTable, examples_of

__all__ = ["Examples", "Labels", "build_examples", "choose_sources", "cut", "sample_rows"]

Array = np.ndarray[Any, Any]

PARTS = ("train", "eval", "test")
_SHOWN = 5
_RANK_GROUPS = 10
#: What Hub data sets call the part that afina calls eval, in the order of preference.
_EVAL_NAMES = ("eval", "validation", "valid", "dev")


@dataclass(frozen=True)
class Examples:
    """One part, ready to be tokenised.

    Attributes:
        source: the key of the table that its rows are of.
        rows: their indices in it, int64 (N,).
        table: its rows, for where they came from; no columns.
        sizes: bytes of the text of each row, of both texts of a pair, int64 (N,).
        labels: int64 (N,) single-label, float32 (N, L) multi-label, float32 (N,) regression.
        ids: large_string (N,), or None where the recipe names no id column.
    """

    source: str
    rows: Array
    table: DataTable
    sizes: Array
    labels: Array
    ids: pa.Array | None

    def __len__(self) -> int:
        return len(self.table)


# -- which rows -------------------------------------------------------------------------------------------------------


def choose_sources(data: Data, known: Sequence[str], warnings: list[str]) -> dict[str, str]:
    """The source of each part that the recipe asks for: a key of `data.files`, or a split of the Hub data set.

    Raises:
        RecipeError: a named split does not exist.
        DataError: train has no source.
    """
    hub = data.hub is not None
    renamed = data.splits or {}
    what = f"a split of {data.hub}" if hub else "a key of `data.files`"
    chosen: dict[str, str] = {}
    for name, target in renamed.items():
        if target not in known:
            raise RecipeError(f"data.splits.{name}: `{target}` is not {what}", _known(target, known))
    for part, spec in _parts(data).items():
        if spec.split is not None:
            wanted = renamed.get(spec.split, spec.split)
            if wanted not in known:
                raise RecipeError(f"data.{part}.split: `{wanted}` is not {what}", _known(wanted, known))
            chosen[part] = wanted
            continue
        candidates = [renamed.get(part, part), "all", renamed.get("train", "train")]
        if hub and part == "eval":
            candidates[1:1] = [*_EVAL_NAMES[1:], "test"]
        source = next((c for c in candidates if c in known), None)
        if source is None:
            raise DataError(
                f"data.{part}: no source for this part; there are: {', '.join(known)}",
                f"name one with `data.{part}.split`" + ("" if hub else f", or add `{part}:` to `data.files`"),
            )
        if hub and part == "eval" and source == "test":
            warnings.append("eval uses the split `test`: the best checkpoint is chosen on it; name `data.eval.split`")
        chosen[part] = source
    return chosen


def _known(wanted: str, known: Sequence[str]) -> str:
    hint = nearest(wanted, known)
    return f"{hint + ' ' if hint else ''}known: {', '.join(known)}"


def _parts(data: Data) -> dict[str, Part]:
    return {name: part for name in PARTS if (part := getattr(data, name)) is not None}


def _fractions(data: Data, sources: Mapping[str, str], warnings: list[str]) -> dict[str, Fraction]:
    """The share of its source that each part takes; parts that take all of it are left out."""
    shares: dict[str, Fraction] = {}
    for source in dict.fromkeys(sources.values()):
        sharing = [part for part in sources if sources[part] == source]
        asked = {part: Fraction(repr(f)) for part in sharing if (f := getattr(data, part).fraction) is not None}
        without = [part for part in sharing if part not in asked]
        if len(sharing) > 1 and not asked:
            if sharing == ["train", "eval"]:
                asked = {"train": Fraction("0.8"), "eval": Fraction("0.2")}
                warnings.append(
                    f"train and eval share `{source}` and the recipe gives no fractions: 0.8 for train, 0.2 for eval"
                )
            elif "train" in sharing:
                raise RecipeError(
                    f"data: {', '.join(sharing)} share `{source}`: how much does each get?",
                    "give each a `fraction`, for example 0.8, 0.1 and 0.1",
                )
            else:
                warnings.append(f"{' and '.join(sharing)} are the same rows: all of `{source}`")
        elif len(sharing) > 1 and without:
            rest = Fraction(1) - sum(asked.values(), Fraction(0))
            if len(without) > 1 or rest <= 0:
                raise RecipeError(
                    f"data: {', '.join(sharing)} share `{source}`, and {' and '.join(without)} would get no rows",
                    f"give `data.{without[0]}` a `fraction`; all fractions add up to at most 1",
                )
            asked[without[0]] = rest
            warnings.append(f"{without[0]} gets the rest of `{source}`: {float(rest):g} of its rows")
        shares |= asked
    return shares


def cut(strata: Array | None, num_rows: int, shares: Sequence[Fraction], seed: int) -> list[Array]:
    """Disjoint row numbers for each share, ascending, int64.

    Args:
        strata: stratum of each row, int64 (num_rows,), or None for a plain cut. A stratum of one row goes to the first
            share, and every stratum leaves at least one row there.
        shares: of the whole; what is left of 1 is left out.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_rows)
    if strata is None:
        groups = [order]
    else:
        by_stratum = order[np.argsort(strata[order], kind="stable")]
        bounds = np.flatnonzero(np.diff(strata[by_stratum])) + 1
        groups = np.split(by_stratum, bounds)
    wanted = [*shares, 1 - sum(shares, Fraction(0))]
    carry = [Fraction(0)] * len(wanted)
    taken: list[list[Array]] = [[] for _ in wanted]
    for group in groups:
        counts = _deal(len(group), wanted, carry)
        start = 0
        for index, count in enumerate(counts):
            taken[index].append(group[start : start + count])
            start += count
    empty = np.empty(0, np.int64)
    return [np.sort(np.concatenate([empty, *pieces])) for pieces in taken[:-1]]


def _deal(size: int, wanted: Sequence[Fraction], carry: list[Fraction]) -> list[int]:
    """Whole numbers that add up to `size`, near `wanted * size + carry`; the difference goes into `carry`."""
    if size == 1:
        return [1, *[0] * (len(wanted) - 1)]
    ideal = [share * size + left for share, left in zip(wanted, carry, strict=True)]
    counts = [max(0, int(value)) for value in ideal]
    while sum(counts) > size:
        counts[max(range(len(counts)), key=lambda i: (counts[i] - ideal[i], -i))] -= 1
    while sum(counts) < size:
        counts[max(range(len(counts)), key=lambda i: (ideal[i] - counts[i], -i))] += 1
    if not counts[0]:
        counts[counts.index(max(counts))] -= 1
        counts[0] = 1
    carry[:] = [value - count for value, count in zip(ideal, counts, strict=True)]
    return counts


def sample_rows(num_rows: int, sample: int | None, seed: int) -> Array:
    """Row numbers as `datasets.Dataset.shuffle(seed=seed).select(range(sample))` orders them; all, in order, if None."""
    if sample is None:
        return np.arange(num_rows)
    return np.random.default_rng(seed).permutation(num_rows)[:sample]


# -- all together -----------------------------------------------------------------------------------------------------


def build_examples(
    task: str, data: Data, tables: Mapping[str, DataTable], sources: Mapping[str, str], warnings: list[str]
) -> tuple[Labels, dict[str, Examples]]:
    """Cut, sample, label and check.

    Args:
        task: as the recipe says it.
        tables: by source; of `data.text` they hold what the checks need.
        sources: the source of each part, from `choose_sources`.
        warnings: what is doubtful is appended here.

    Raises:
        DataError, RecipeError: what cannot be trained on, with file and row.
    """
    columns = {source: LabelColumns(tables[source], data) for source in dict.fromkeys(sources.values())}
    for source, column in columns.items():
        if not len(column.table):
            raise DataError(f"{' and '.join(column.table.sources)}: no rows (`{source}`)", "give a file that has rows")
    labels = find_labels(task, data, list(columns.values()))
    check_found_labels(labels, data, list(columns.values()), warnings)
    rows = _choose_rows(data, columns, labels, sources, warnings)
    parts: dict[str, Examples] = {}
    keys: dict[str, Array] = {}
    for part, chosen in rows.items():
        column = columns[sources[part]]
        table = column.table
        _check_rows(part, column, data, chosen)
        ids = _ids(table, data.id, chosen) if data.id else None
        parts[part] = Examples(
            source=sources[part],
            rows=chosen,
            table=table.places(chosen),
            sizes=np.sum([table.texts[name].sizes[chosen] for name in data.text], axis=0),
            labels=label_array(column, labels, chosen),
            ids=ids,
        )
        keys[part] = np.hstack([table.texts[name].keys[chosen] for name in data.text])
    _check_labels(labels, parts, warnings)
    _check_duplicates(labels, parts, keys, warnings)
    return labels, parts


def _ids(table: DataTable, name: str, rows: Array) -> pa.Array:
    ids = table.columns[name]
    if pa.types.is_list(ids.type):
        raise DataError(
            f"{table.sources[0]}: column `{name}` holds lists, an id is one value", "name another `data.id`"
        )
    return pc.fill_null(ids.take(pa.array(rows)).cast(pa.large_string()), "")


def _choose_rows(
    data: Data, columns: Mapping[str, LabelColumns], labels: Labels, sources: Mapping[str, str], warnings: list[str]
) -> dict[str, Array]:
    shares = _fractions(data, sources, warnings)
    rows: dict[str, Array] = {}
    for source, column in columns.items():
        sharing = [part for part in sources if sources[part] == source]
        cutting = [part for part in sharing if part in shares]
        if cutting:
            if labels.task == "multi-label":
                warnings.append(f"`{source}` is cut at random: multi-label rows are not stratified")
            pieces = cut(_strata(column, labels), len(column.table), [shares[p] for p in cutting], data.train.seed)
            rows |= dict(zip(cutting, pieces, strict=True))
        rows |= {part: np.arange(len(column.table)) for part in sharing if part not in shares}
    for part in sources:
        spec = getattr(data, part)
        if not len(rows[part]):
            raise _nothing_left(part, shares.get(part), columns[sources[part]], data, labels)
        if spec.sample is not None and spec.sample > len(rows[part]):
            raise DataError(
                f"data.{part}.sample: {spec.sample:,} rows are asked for, {len(rows[part]):,} are there",
                f"ask for at most {len(rows[part])}, or leave `sample` out to take all",
            )
        rows[part] = rows[part][sample_rows(len(rows[part]), spec.sample, spec.seed)]
    return {part: rows[part] for part in sources}


def _nothing_left(part: str, share: Fraction | None, column: LabelColumns, data: Data, labels: Labels) -> DataError:
    source, count = " and ".join(column.table.sources), len(column.table)
    said = f"{source}: {count:,} row{'s' * (count > 1)}"
    if labels.task == "single-label" and count > 1 and len(pc.unique(column.text())) == count:
        return DataError(
            f"data.{part}: no rows are left for this part: {said}, and as many labels (`{data.label[0]}`): each occurs once, "
            "in train",
            "is that the label's column, not the one of texts or ids? else add rows, or name a file for each part",
        )
    part_of = f" and {float(share):g} of them are asked for" if share is not None else ""
    return DataError(
        f"data.{part}: no rows are left for this part: {said}{part_of}",
        "give it a larger `fraction`, more data, or a file of its own",
    )


def _strata(column: LabelColumns, labels: Labels) -> Array | None:
    if labels.task == "multi-label":
        return None
    if labels.task == "regression":
        ranks = np.argsort(np.argsort(column.numbers(), kind="stable"), kind="stable")
        groups = max(1, min(_RANK_GROUPS, len(ranks) // _RANK_GROUPS))
        return ranks * groups // max(1, len(ranks))
    assert labels.names is not None
    ids = pc.index_in(column.text(), pa.array(labels.names, pa.large_string()))
    return np.asarray(pc.fill_null(ids, -1).cast(pa.int64()).to_numpy(zero_copy_only=False))


def _check_rows(part: str, column: LabelColumns, data: Data, rows: Array) -> None:
    table = column.table
    absent = rows[~column.present()[rows]]
    if len(absent):
        raise DataError(
            f"{part}: {len(absent):,} rows have no label (`{'`, `'.join(data.label)}`): {examples_of(table, np.sort(absent))}",
            "label these rows or remove them",
        )
    for name in data.text:
        empty = rows[table.texts[name].blank[rows]]
        if len(empty):
            raise DataError(
                f"{part}: {len(empty):,} rows have an empty text (`{name}`): {examples_of(table, np.sort(empty))}",
                "remove these rows",
            )


def _check_labels(labels: Labels, parts: Mapping[str, Examples], warnings: list[str]) -> None:
    train = parts["train"]
    if labels.task == "regression":
        if len(np.unique(train.labels)) < 2:
            raise DataError(
                f"train: every label is {train.labels[0]:g}: there is nothing to learn", "check `data.label`"
            )
        return
    assert labels.names is not None
    names = np.array(labels.names, dtype=object)
    counts = {
        part: np.bincount(e.labels, minlength=len(names)) if labels.task == "single-label" else e.labels.sum(0)
        for part, e in parts.items()
    }
    if labels.task == "single-label" and (counts["train"] > 0).sum() < 2:
        only = names[counts["train"] > 0][0]
        raise DataError(
            f"train: every row has the label {only!r}; at least two labels are needed",
            "check `data.label`, or add rows",
        )
    if labels.task == "multi-label" and not counts["train"].any():
        raise DataError("train: no row has any label: there is nothing to learn", "check `data.label`")
    for part in parts:
        if part == "train":
            continue
        lacking = names[(counts["train"] == 0) & (counts[part] > 0)]
        if len(lacking) and labels.task == "single-label":
            row = int(np.flatnonzero(np.isin(parts[part].labels, np.flatnonzero(names == lacking[0])))[0])
            there = [str(name) for name in names[counts["train"] > 0]]
            hint = nearest_label(lacking[0], there)
            raise DataError(
                f"train has no row with label {listed(lacking)}, {part} has ({parts[part].table.where(row)})",
                f"{hint + ' ' if hint else ''}train has {listed(there)}; add such rows to train, or take a "
                "larger `data.train.sample` or another seed",
            )
        if len(lacking):
            warnings.append(f"train has no row with label {listed(lacking)}, {part} has")
        absent = names[(counts[part] == 0) & (counts["train"] > 0)]
        if len(absent):
            warnings.append(f"{part} has no row with label {listed(absent)}: nothing is measured for it")
    nowhere = names[sum(counts.values()) == 0]
    if len(nowhere):
        warnings.append(f"no row with label {listed(nowhere)} in any part; the model keeps an output for it")
    for index in np.flatnonzero(counts["train"] == 1)[:_SHOWN]:
        row = np.flatnonzero(train.labels == index if labels.task == "single-label" else train.labels[:, index])[0]
        warnings.append(f"label {names[index]!r} occurs once in train ({train.table.where(int(row))})")
    more = int((counts["train"] == 1).sum()) - _SHOWN
    if more > 0:
        warnings.append(f"{more} more labels occur once in train")


def _first_alike(keys: Array) -> Array:
    """For each row the first one with the same key, int64 (N,); keys are uint64 (N, K)."""
    order = np.lexsort(keys.T)  # stable: rows that are alike stay in their order
    new = np.ones(len(keys), bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[new][np.cumsum(new) - 1]
    return first


def _beside(table: DataTable, index: int, train: DataTable, twin: int) -> str:
    there = train.where(twin)
    if table.sources[table.source[index]] == train.sources[train.source[twin]]:
        there = f"{train.unit} {train.row[twin]}"
    return f"{table.where(index)} = {there}"


def _check_duplicates(
    labels: Labels, parts: Mapping[str, Examples], keys: Mapping[str, Array], warnings: list[str]
) -> None:
    train = parts["train"].table
    for part, examples in parts.items():
        if part == "train":
            continue
        twins = _first_alike(np.concatenate([keys["train"], keys[part]]))[len(train) :]
        both = np.flatnonzero(twins < len(train))
        if len(both):
            shown = "; ".join(_beside(examples.table, int(i), train, int(twins[i])) for i in both[:_SHOWN])
            warnings.append(
                f"{len(both):,} of {len(examples):,} rows of {part} are in train too, word for word: {shown}"
            )
    if labels.task == "regression":
        return
    codes = _first_alike(keys["train"])
    values = parts["train"].labels
    if values.ndim == 2:
        values = np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)
    pairs = np.unique(codes * (int(values.max()) + 1) + values)
    texts, times = np.unique(pairs // (int(values.max()) + 1), return_counts=True)
    conflicting = texts[times > 1]
    if len(conflicting):
        groups = [examples_of(train, np.flatnonzero(codes == code)) for code in conflicting[:_SHOWN]]
        warnings.append(
            f"{len(conflicting):,} texts of train are there more than once with different labels: " + " | ".join(groups)
        )
