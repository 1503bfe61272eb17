"""Splits of the data: which rows train, eval and test take, and whether they can be learnt from.

Pure: nothing is read or written, and the same input gives the same rows on every platform.

A split with a `fraction` takes that share of its source: rows are shuffled with the seed of `train` (NumPy's PCG64), each
stratum is divided in proportion to the fractions, a rounding remainder is carried to the next stratum, and the split's rows
return to the order of the source. Strata are the labels (single-label) or ten equal groups by rank (regression); a multi-label
source has none. `sample` is `datasets.Dataset.shuffle(seed).select(range(sample))`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, RecipeError, nearest
from afina.recipe.schema import Data, Part
from afina.worker.data.label_checks import check_duplicates, check_found_labels, check_labels
from afina.worker.data.labels import LabelColumns, Labels, find_labels, label_array
from afina.worker.data.loss_weights import row_weights
from afina.worker.data.tables import DataTable, Examples, list_places

__all__ = ["SPLITS", "build_splits", "choose_sources", "sample_rows", "stratified_split"]

Array = np.ndarray[Any, Any]

SPLITS = ("train", "eval", "test")
_RANK_GROUPS = 10
#: Names of the eval split in Hub data sets, in the order of preference.
_EVAL_NAMES = ("eval", "validation", "valid", "dev")


# -- which rows -------------------------------------------------------------------------------------------------------


def choose_sources(data: Data, known: Sequence[str], warnings: list[str]) -> dict[str, str]:
    """The source of each split of the recipe: a key of `data.files`, or a split of the Hub data set.

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
    for split, spec in _specs(data).items():
        if spec.split is not None:
            wanted = renamed.get(spec.split, spec.split)
            if wanted not in known:
                raise RecipeError(f"data.{split}.split: `{wanted}` is not {what}", _known(wanted, known))
            chosen[split] = wanted
            continue
        candidates = [renamed.get(split, split), "all", renamed.get("train", "train")]
        if hub and split == "eval":
            candidates[1:1] = [*_EVAL_NAMES[1:], "test"]
        source = next((c for c in candidates if c in known), None)
        if source is None:
            raise DataError(
                f"data.{split}: no source for this split; there are: {', '.join(known)}",
                f"name one with `data.{split}.split`" + ("" if hub else f", or add `{split}:` to `data.files`"),
            )
        if hub and split == "eval" and source == "test":
            warnings.append("eval uses the split `test`: the best checkpoint is chosen on it; name `data.eval.split`")
        chosen[split] = source
    return chosen


def _known(wanted: str, known: Sequence[str]) -> str:
    hint = nearest(wanted, known)
    return f"{hint + ' ' if hint else ''}known: {', '.join(known)}"


def _specs(data: Data) -> dict[str, Part]:
    return {name: spec for name in SPLITS if (spec := getattr(data, name)) is not None}


def _fractions(data: Data, sources: Mapping[str, str], warnings: list[str]) -> dict[str, Fraction]:
    """The share of its source that each split takes; splits that take all of it are left out."""
    shares: dict[str, Fraction] = {}
    for source in dict.fromkeys(sources.values()):
        sharing = [split for split in sources if sources[split] == source]
        asked = {split: Fraction(repr(f)) for split in sharing if (f := getattr(data, split).fraction) is not None}
        without = [split for split in sharing if split not in asked]
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


def stratified_split(strata: Array | None, num_rows: int, shares: Sequence[Fraction], seed: int) -> list[Array]:
    """Disjoint row numbers for each share, ascending, int64.

    Args:
        strata: stratum of each row, int64 (num_rows,), or None. A stratum of one row goes to the first share, and every
            stratum has at least one row there.
        shares: of the whole; where they add up to less than 1, some rows are in none.
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
        counts = _divide(len(group), wanted, carry)
        start = 0
        for index, count in enumerate(counts):
            taken[index].append(group[start : start + count])
            start += count
    empty = np.empty(0, np.int64)
    return [np.sort(np.concatenate([empty, *some])) for some in taken[:-1]]


def _divide(size: int, wanted: Sequence[Fraction], carry: list[Fraction]) -> list[int]:
    """Whole numbers that add up to `size`, near `wanted * size + carry`; `carry` is set to the difference."""
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


def build_splits(
    task: str, data: Data, tables: Mapping[str, DataTable], sources: Mapping[str, str], warnings: list[str]
) -> tuple[Labels, dict[str, Examples]]:
    """Divide the rows, sample, label and check them.

    Args:
        task: the recipe's.
        tables: by source; with digests of `data.text`.
        sources: the source of each split, from `choose_sources`.
        warnings: doubts are appended here.

    Raises:
        DataError, RecipeError: data that cannot be trained on, with file and row.
    """
    columns = {source: LabelColumns(tables[source], data) for source in dict.fromkeys(sources.values())}
    for source, column in columns.items():
        if not len(column.table):
            raise DataError(f"{' and '.join(column.table.sources)}: no rows (`{source}`)", "give a file that has rows")
    labels = find_labels(task, data, list(columns.values()), warnings)
    check_found_labels(labels, data, list(columns.values()), warnings)
    rows = _choose_rows(data, columns, labels, sources, warnings)
    _check_rows(columns, data, sources, rows)
    splits: dict[str, Examples] = {}
    keys: dict[str, Array] = {}
    for split, chosen in rows.items():
        column = columns[sources[split]]
        table = column.table
        ids = _ids(table, data.id, chosen) if data.id else None
        splits[split] = Examples(
            source=sources[split],
            rows=chosen,
            table=table.places(chosen),
            sizes=np.sum([table.texts[name].sizes[chosen] for name in data.text], axis=0),
            labels=label_array(column, labels, chosen),
            ids=ids,
            weights=row_weights(split, table, data.weight, chosen) if data.weight else None,
        )
        keys[split] = np.hstack([table.texts[name].keys[chosen] for name in data.text])
    check_labels(labels, splits, warnings)
    check_duplicates(labels, splits, keys, warnings)
    return labels, splits


def _ids(table: DataTable, name: str, rows: Array) -> pa.Array:
    return pc.fill_null(table.columns[name].take(pa.array(rows)).cast(pa.large_string()), "")


def _choose_rows(
    data: Data, columns: Mapping[str, LabelColumns], labels: Labels, sources: Mapping[str, str], warnings: list[str]
) -> dict[str, Array]:
    shares = _fractions(data, sources, warnings)
    rows: dict[str, Array] = {}
    for source, column in columns.items():
        sharing = [split for split in sources if sources[split] == source]
        dividing = [split for split in sharing if split in shares]
        if dividing:
            if labels.task == "multi-label":
                warnings.append(f"`{source}` is divided at random: multi-label rows are not stratified")
            strata = _strata(column, labels)
            divided = stratified_split(strata, len(column.table), [shares[s] for s in dividing], data.train.seed)
            rows |= dict(zip(dividing, divided, strict=True))
        rows |= {split: np.arange(len(column.table)) for split in sharing if split not in shares}
    for split in sources:
        spec = getattr(data, split)
        if not len(rows[split]):
            raise _nothing_left(split, shares.get(split), columns[sources[split]], data, labels)
        if spec.sample is not None and spec.sample > len(rows[split]):
            raise DataError(
                f"data.{split}.sample: {spec.sample:,} rows are asked for, {len(rows[split]):,} exist",
                f"ask for at most {len(rows[split])}, or leave `sample` out to take all",
            )
        rows[split] = rows[split][sample_rows(len(rows[split]), spec.sample, spec.seed)]
    return {split: rows[split] for split in sources}


def _nothing_left(split: str, share: Fraction | None, column: LabelColumns, data: Data, labels: Labels) -> DataError:
    source, count = " and ".join(column.table.sources), len(column.table)
    found = f"{source}: {count:,} row{'s' * (count > 1)}"
    if labels.task == "single-label" and count > 1 and len(pc.unique(column.text())) == count:
        return DataError(
            f"data.{split}: no rows are left for this split: {found}, and as many labels (`{data.label[0]}`): each occurs once, "
            "in train",
            "is that the label's column, not the one of texts or ids? else add rows, or name a file for each split",
        )
    part_of = f" and {float(share):g} of them are asked for" if share is not None else ""
    return DataError(
        f"data.{split}: no rows are left for this split: {found}{part_of}",
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


def _check_rows(
    columns: Mapping[str, LabelColumns], data: Data, sources: Mapping[str, str], rows: Mapping[str, Array]
) -> None:
    """Refuse rows without a label or a text; of several texts, which are joined, one is enough."""
    absent = {source: ~column.present() for source, column in columns.items()}
    _refuse(
        columns, sources, rows, absent, f"no label (`{'`, `'.join(data.label)}`)", "label these rows or remove them"
    )
    for names in [data.text] if len(data.text) > 2 else [(name,) for name in data.text]:
        empty = {s: np.all([c.table.texts[name].blank for name in names], axis=0) for s, c in columns.items()}
        _refuse(columns, sources, rows, empty, f"an empty text (`{'`, `'.join(names)}`)", "remove these rows")


def _refuse(
    columns: Mapping[str, LabelColumns],
    sources: Mapping[str, str],
    rows: Mapping[str, Array],
    wrong: Mapping[str, Array],
    what: str,
    remedy: str,
) -> None:
    """Refuse the rows that are `wrong`, of all splits together."""
    of = {split: chosen[wrong[sources[split]][chosen]] for split, chosen in rows.items()}
    splits = [split for split, chosen in of.items() if len(chosen)]
    if splits:
        no_rows = np.empty(0, np.int64)
        by_source = {
            s: np.unique(np.concatenate([no_rows, *(of[k] for k in splits if sources[k] == s)])) for s in columns
        }
        count = sum(map(len, by_source.values()))
        places = "; ".join(list_places(columns[s].table, found) for s, found in by_source.items() if len(found))
        raise DataError(f"{' and '.join(splits)}: {count:,} rows have {what}: {places}", remedy)
