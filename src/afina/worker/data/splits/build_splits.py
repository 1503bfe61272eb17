"""Splits of the data: which rows train, eval and test take, and whether they can be learnt from.

Pure: nothing is read or written, and the same input gives the same rows on every platform.

A split with a `fraction` takes about that share of its source. With `split_by: text` a row's split follows from its text (but for
case and white space), or its `group`, and the seed of `train` alone: rows that are added later move no other row, and equal
texts stay together. Only a label that train would lack, or a sizeable one that another split would lack, takes the row that is
nearest to the border. Without it, as in afina 0.1, rows are shuffled with the seed (NumPy's PCG64), each stratum is divided in
proportion to the fractions, and a rounding remainder is carried to the next stratum: exact shares, another split for other data.
Strata are the labels (single-label) or ten equal groups by rank (regression, by order only); a multi-label source has none.
A `split_column` names the split of each row. `sample` is `datasets.Dataset.shuffle(seed).select(range(sample))`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, RecipeError, nearest
from afina.recipe.keys.data_keys import Data, Part
from afina.worker.data.labels.find_labels import LabelColumns, Labels, find_labels, label_array
from afina.worker.data.labels.label_checks import check_found_labels, check_labels
from afina.worker.data.labels.loss_weights import row_weights
from afina.worker.data.tables.data_table import DataTable, Examples, TextDigests, as_text, list_places

__all__ = ["SPLITS", "build_splits", "choose_sources", "sample_rows", "split_by_key", "stratified_split"]

Array = np.ndarray[Any, Any]

SPLITS = ("train", "eval", "test")
_RANK_GROUPS = 10
_HASH_BITS = 53
#: More values of `data.split_column` than this are not names of splits.
_MOST_SPLITS = 20
#: Names of a split in Hub data sets and in columns, in the order of preference.
_NAMES = {
    "train": ("train", "training"),
    "eval": ("eval", "validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


# -- which rows -------------------------------------------------------------------------------------------------------


def choose_sources(data: Data, known: Sequence[str], warnings: list[str]) -> dict[str, str]:
    """The source of each split of the recipe: a key of `data.files`, or a split of the Hub data set.

    Raises:
        RecipeError: a named split does not exist, or a column is to divide several sources.
        DataError: train has no source.
    """
    hub = data.hub is not None
    what = f"a split of {data.hub}" if hub else "a key of `data.files`"
    if data.split_column is not None:
        if len(known) > 1:
            raise RecipeError(
                f"data.split_column: divides the rows of one source, and there are {', '.join(known)}",
                "leave it out, or choose a data set with one split",
            )
        return dict.fromkeys(_specs(data), known[0])
    return _choose(data, known, what, warnings, named=hub)


def _choose(data: Data, known: Sequence[str], what: str, warnings: list[str], *, named: bool) -> dict[str, str]:
    """Args: what: a word for one of `known`; named: look for the usual other names of a split too."""
    renamed = data.splits or {}
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
        if named:
            usual = [*_NAMES[split][1:], *(["test"] if split == "eval" and data.hub is not None else [])]
            candidates[1:1] = usual
            candidates += _NAMES["train"]
        source = next((c for c in candidates if c in known), None)
        if source is None:
            raise DataError(
                f"data.{split}: no source for this split; there are: {', '.join(known)}",
                f"name one with `data.{split}.split`" + ("" if named else f", or add `{split}:` to `data.files`"),
            )
        if data.hub is not None and split == "eval" and source == "test":
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


def split_by_key(keys: Array, strata: Array | None, shares: Sequence[Fraction], seed: int) -> list[Array]:
    """Disjoint row numbers for each share, ascending, int64: a row's share follows from its key and the seed alone.

    Exceptions, for the sake of small data: a stratum without a row in the first share gives it one, and a stratum (or the
    whole) that should have a row in another share and has none gives it the one whose key is nearest. Rows with one key stay
    together.

    Args:
        keys: uint64 (N, K).
        strata: stratum of each row, int64 (N,), or None.
        shares: of the whole; where they add up to less than 1, some rows are in none.
    """
    place = _hashed(keys, seed)
    total = Fraction(0)
    bounds = [round((total := total + share) * (1 << _HASH_BITS)) for share in shares]
    taken = np.searchsorted(np.array(bounds, np.int64), place, side="right")
    groups = [np.arange(len(place))] if strata is None else _groups(strata)
    division = _Division(place, taken, bounds, shares)
    for rows in groups:
        division.fill(rows)
    division.fill(np.arange(len(place)), kept=groups)
    return [np.flatnonzero(taken == index) for index in range(len(shares))]


def _hashed(keys: Array, seed: int) -> Array:
    """Uniform in [0, 2**53) by SplitMix64's finaliser, int64 (N,)."""
    mixed = np.full(len(keys), seed, np.uint64)
    with np.errstate(over="ignore"):
        for column in np.asarray(keys, np.uint64).T:
            mixed = (mixed ^ column) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(64 - _HASH_BITS)).astype(np.int64)


def _groups(strata: Array) -> list[Array]:
    """Rows of each stratum."""
    order = np.argsort(strata, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(strata[order])) + 1)


@dataclass(frozen=True)
class _Division:
    """Rows and their shares.

    Attributes:
        place: hash of each row, int64 (N,).
        taken: index of each row's share, int64 (N,); `fill` changes it.
        bounds: upper ends of the shares' places.
    """

    place: Array
    taken: Array
    bounds: Sequence[int]
    shares: Sequence[Fraction]

    def fill(self, rows: Array, kept: Sequence[Array] = ()) -> None:
        """Give each share that should have some of `rows`, and has none, the key that is nearest to it.

        Args:
            kept: strata that must keep a row in the first share.
        """
        for index, share in enumerate(self.shares):
            if (self.taken[rows] == index).any() or (index and share * len(rows) < (Fraction(1, 2) if kept else 1)):
                continue
            low = self.bounds[index - 1] if index else 0
            distance = np.where(self.place[rows] < low, low - self.place[rows], self.place[rows] - self.bounds[index])
            for row in rows[np.argsort(distance, kind="stable")]:
                source = self.taken[row]
                alone = len(np.unique(self.place[rows[self.taken[rows] == source]])) < 2
                alone |= any(
                    row in stratum and len(np.unique(self.place[stratum[self.taken[stratum] == 0]])) < 2
                    for stratum in kept
                )
                if index and alone and source < len(self.shares):
                    continue
                self.taken[self.place == self.place[row]] = index
                break


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
    if data.group is not None and data.divides and data.split_by is None:
        raise RecipeError("data.group: `split_by: order` does not keep groups together", "leave `split_by` out")
    columns = {source: LabelColumns(tables[source], data) for source in dict.fromkeys(sources.values())}
    for source, column in columns.items():
        if not len(column.table):
            raise DataError(f"{' and '.join(column.table.sources)}: no rows (`{source}`)", "give a file that has rows")
    labels = find_labels(task, data, list(columns.values()), warnings)
    check_found_labels(labels, data, list(columns.values()), warnings)
    rows = _choose_rows(data, _pools(data, columns, sources, warnings), labels, warnings)
    _check_rows(columns, data, sources, rows)
    splits: dict[str, Examples] = {}
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
    check_labels(labels, splits, warnings)
    if data.group is not None:
        _check_groups(data.group, tables, splits, warnings)
    return labels, splits


def _ids(table: DataTable, name: str, rows: Array) -> pa.Array:
    return pc.fill_null(table.columns[name].take(pa.array(rows)).cast(pa.large_string()), "")


@dataclass(frozen=True)
class _Pool:
    """The rows that some splits share: those of a source, or those with one value of `data.split_column`.

    Attributes:
        column: labels of the source.
        rows: indices in the source, ascending, int64 (N,).
    """

    column: LabelColumns
    rows: Array


def _pools(
    data: Data, columns: Mapping[str, LabelColumns], sources: Mapping[str, str], warnings: list[str]
) -> dict[str, tuple[str, _Pool]]:
    """The name of each split's pool, and the pool."""
    if data.split_column is None:
        whole = {source: _Pool(column, np.arange(len(column.table))) for source, column in columns.items()}
        return {split: (source, whole[source]) for split, source in sources.items()}
    (column,) = columns.values()
    table = column.table
    values = pc.utf8_lower(as_text(table.columns[data.split_column]))
    values = pc.if_else(pc.equal(values, ""), None, values)
    if values.null_count:
        empty = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
        raise DataError(
            f"{len(empty):,} rows have no split (`{data.split_column}`): {list_places(table, empty)}",
            "name the split of these rows, or remove them",
        )
    known = sorted(pc.unique(values).to_pylist())
    if len(known) > _MOST_SPLITS:
        raise DataError(
            f"{table.sources[0]}: column `{data.split_column}` has {len(known):,} different values",
            "`data.split_column` is a column that says train, eval or test",
        )
    chosen = _choose(data, known, f"a value of column `{data.split_column}`", warnings, named=True)
    for value in known:
        if value not in chosen.values():
            count = pc.sum(pc.equal(values, value)).as_py()
            name = next((split for split, names in _NAMES.items() if value in names), None)
            use = f"add `{name}: {{}}` to `data` to use them" if name else "name it with `split:` to use it"
            warnings.append(f"{count:,} rows whose `{data.split_column}` is {value!r} are in no split: {use}")
    pools = {v: _Pool(column, np.flatnonzero(pc.equal(values, v).to_numpy(zero_copy_only=False))) for v in known}
    return {split: (value, pools[value]) for split, value in chosen.items()}


def _choose_rows(
    data: Data, pools: Mapping[str, tuple[str, _Pool]], labels: Labels, warnings: list[str]
) -> dict[str, Array]:
    """The rows of each split, as indices in its source."""
    names = {split: name for split, (name, _) in pools.items()}
    shares = _fractions(data, names, warnings)
    rows: dict[str, Array] = {}
    for name, pool in dict(pools.values()).items():
        sharing = [split for split in names if names[split] == name]
        dividing = [split for split in sharing if split in shares]
        if dividing:
            if labels.task == "multi-label":
                warnings.append(f"`{name}` is divided at random: multi-label rows are not stratified")
            divided = _divide_pool(data, pool, labels, [shares[split] for split in dividing])
            rows |= {split: pool.rows[some] for split, some in zip(dividing, divided, strict=True)}
        rows |= {split: pool.rows for split in sharing if split not in shares}
    for split, (_, pool) in pools.items():
        spec = getattr(data, split)
        if not len(rows[split]):
            raise _nothing_left(split, shares.get(split), pool.column, data, labels)
        if spec.sample is not None and spec.sample > len(rows[split]):
            raise DataError(
                f"data.{split}.sample: {spec.sample:,} rows are asked for, {len(rows[split]):,} exist",
                f"ask for at most {len(rows[split])}, or leave `sample` out to take all",
            )
        rows[split] = rows[split][sample_rows(len(rows[split]), spec.sample, spec.seed)]
    return {split: rows[split] for split in pools}


def _divide_pool(data: Data, pool: _Pool, labels: Labels, shares: Sequence[Fraction]) -> list[Array]:
    """Positions in the pool for each share."""
    if data.split_by is None:
        strata = _strata(pool.column, labels)
        return stratified_split(None if strata is None else strata[pool.rows], len(pool.rows), shares, data.train.seed)
    strata = _strata(pool.column, labels) if labels.task == "single-label" else None
    keys = _split_keys(data, pool.column.table)[pool.rows]
    return split_by_key(keys, None if strata is None else strata[pool.rows], shares, data.train.seed)


def _split_keys(data: Data, table: DataTable) -> Array:
    """What decides a row's split, uint64 (N, K): its group, or its text where it has none."""
    keys = np.hstack([table.texts[name].keys for name in data.text])
    if data.group is None:
        return keys
    groups = as_text(table.columns[data.group])
    named = pc.fill_null(pc.not_equal(groups, ""), False).to_numpy(zero_copy_only=False)
    keys[named] = 0
    keys[named, :2] = TextDigests.of(groups.filter(pa.array(named))).keys
    return keys


def _check_groups(
    name: str, tables: Mapping[str, DataTable], splits: Mapping[str, Examples], warnings: list[str]
) -> None:
    """Warn of groups that two splits share."""
    groups = {
        split: as_text(tables[examples.source].columns[name]).take(pa.array(examples.rows))
        for split, examples in splits.items()
    }
    for first, second in itertools.combinations(splits, 2):
        here, there = (set(pc.unique(groups[split]).to_pylist()) - {None, ""} for split in (first, second))
        if shared := sorted(here & there):
            row = pc.index(groups[second], pa.scalar(shared[0], pa.large_string())).as_py()
            warnings.append(
                f"{len(shared):,} groups (`{name}`) of {second} are in {first} too: {shared[0]!r} "
                f"({splits[second].table.where(row)})"
            )


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
