"""Splits of the data: which rows train, eval and test take, and whether they can be learnt from.

Pure: nothing is read or written, and the same input gives the same rows on every platform.

A split with a `fraction` takes about that share of its source. With `split_by: text` a row's split follows from its text (but for
case and white space) and the seed of `train` alone: rows that are added later move no other row, and equal
texts stay together. Only a label that train would lack, or a sizeable one that another split would lack, takes the row that is
nearest to the border. With `group` whole groups are divided, so that each split has about its share of the rows of each label; a row
without a group is one with the rows of the same text. Without it, as in afina 0.1, rows are shuffled with the seed (NumPy's PCG64), each stratum is divided in
proportion to the fractions, and a rounding remainder is carried to the next stratum: exact shares, another split for other data.
Strata are the labels (single-label) or ten equal groups of the numbers (regression); a multi-label source has none. A
`split_column` names the split of each row.

With `split_by: text` a `sample` follows from the rows' texts too; of a Hub split that is not divided, and without `split_by`, it is
`datasets.Dataset.shuffle(seed).select(range(sample))`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afina.errors import DataError, RecipeError
from afina.recipe.keys.data_keys import Data
from afina.run.plan import Plan
from afina.text import plural
from afina.worker.data.labels.find_labels import LabelColumns, Labels, find_labels, label_array
from afina.worker.data.labels.label_checks import check_found_labels, check_labels
from afina.worker.data.labels.loss_weights import row_weights
from afina.worker.data.labels.tag_schemes import check_entities, entity_flags, find_entities
from afina.worker.data.splits.choose_sources import SPLIT_NAMES, choose_sources, choose_values, shares_of
from afina.worker.data.splits.divide import (
    rank_groups,
    sample_by_key,
    sample_rows,
    split_by_key,
    stratified_split,
    value_groups,
)
from afina.worker.data.splits.groups import check_group_names, check_groups, divide_groups, group_codes, group_names
from afina.worker.data.tables.data_table import DataSource, DataTable, Examples, as_text, list_places
from afina.worker.hub.datasets import HubData
from afina.worker.progress import Progress

__all__ = ["CheckedData", "build_splits", "read_splits"]

Array = np.ndarray[Any, Any]

#: A number that is none to Python: 0,5 or 45 % or $ 3.
_WRITTEN_NUMBER = re.compile(r"[^\w\s]?\s*\d[\d.,]*\s*[^\w\s]?|[-+]?\d[\d.,]*")
#: More values of `data.split_column` than this are not names of splits.
_MOST_SPLITS = 20


@dataclass(frozen=True)
class CheckedData:
    """Data that can be trained on.

    Attributes:
        labels: task and label names.
        splits: by name: train, eval, test.
        warnings: of the checks.
        sources: where the rows of each source can be read again.
        states: of the files of each source, from before they were read.
        read: rows of each file.
    """

    labels: Labels
    splits: Mapping[str, Examples]
    warnings: list[str]
    sources: Mapping[str, DataSource]
    states: Mapping[str, Any]
    read: Mapping[str, int] = field(default_factory=dict)


def read_splits(plan: Plan, data: HubData | None, states: Mapping[str, Any], say: Callable[[str], None]) -> CheckedData:
    """Read the data once, divide and check them.

    Args:
        data: of a data set from the Hub.
        states: of the files of each key of `data.files`, from before they were read.

    Raises:
        DataError, RecipeError: data that cannot be trained on, with file and row.
    """
    spec = plan.recipe.data
    warnings: list[str] = []
    chosen = choose_sources(spec, list(data.splits if data is not None else plan.files), warnings)
    keys = list(dict.fromkeys(chosen.values()))
    tags = spec.label[0] if plan.recipe.task == "token-classification" else None
    sources = {
        key: DataSource((data.file(key),), f"{data.id}/{key}", tags=tags)
        if data is not None
        else DataSource(tuple(plan.files[key]), reading=spec.reading, tags=tags)
        for key in keys
    }
    if data is not None:
        states = {key: source.state() for key, source in sources.items()}
    columns = [*spec.label, *filter(None, (spec.id, spec.weight, spec.split_column, spec.group))]
    with Progress("reading", "read", "rows", None, say) as progress:
        # Names, not numbers: each digit counts.
        ids = [n for n in (spec.id, spec.group, spec.split_column) if n and n not in (*spec.label, spec.weight)]
        tables = {key: source.read(columns, spec.text, progress.advance, ids=ids) for key, source in sources.items()}
    warnings += [line for table in tables.values() for line in table.warnings]
    labels, splits = build_splits(plan.recipe.task, spec, tables, chosen, warnings)
    read: dict[str, int] = {}
    for table in tables.values():
        read |= dict(zip(table.sources, np.bincount(table.source, minlength=len(table.sources)).tolist(), strict=True))
    return CheckedData(labels, splits, warnings, sources, states, read)


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
    if task == "token-classification":
        labels = find_entities(list(columns.values()), warnings)
    else:
        labels = find_labels(task, data, list(columns.values()), warnings)
        check_found_labels(labels, data, list(columns.values()), warnings)
    rows = _choose_rows(data, _pools(data, columns, sources, warnings), labels, warnings if data.fold is None else [])
    if data.fold is not None:
        rows = _pool_of_folds(rows, sources, warnings)
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
            **_labelled(column, labels, chosen),
            ids=ids,
            weights=row_weights(split, table, data.weight, chosen) if data.weight else None,
            groups=(groups := group_names(table.columns[data.group]).take(pa.array(chosen)) if data.group else None),
            codes=group_codes(groups, _text_keys(data, table)[chosen]) if data.group or data.fold else None,
        )
    (check_entities if task == "token-classification" else check_labels)(labels, splits, warnings)
    if data.group is not None:
        check_group_names(data.group, [column.table for column in columns.values()], warnings)
        check_groups(data.group, splits, warnings)
    return labels, splits


def _labelled(column: LabelColumns, labels: Labels, rows: Array) -> dict[str, Any]:
    """`labels` of some rows, and their `words` where those have the labels."""
    if column.words is None:
        return {"labels": label_array(column, labels, rows)}
    numbered = column.words.take(rows)
    return {"labels": numbered.codes, "words": numbered}


def _pool_of_folds(rows: Mapping[str, Array], sources: Mapping[str, str], warnings: list[str]) -> dict[str, Array]:
    """Folds divide the rows of train and eval, of one source; those of test stay apart."""
    pool = {**rows}
    eval_rows = pool.pop("eval")
    if sources["eval"] == sources["train"]:
        pool["train"] = np.union1d(pool["train"], eval_rows)
    elif sources["eval"] not in [sources[split] for split in pool]:
        warnings.append(
            f"folds divide the rows of train (`{sources['train']}`); the {len(eval_rows):,} of `{sources['eval']}` are not used"
        )
    return pool


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
            f"{plural(len(empty), 'row has', 'rows have')} no split (`{data.split_column}`): {list_places(table, empty)}",
            "name the split of these rows, or remove them",
        )
    known = sorted(pc.unique(values).to_pylist())
    if len(known) > _MOST_SPLITS:
        raise DataError(
            f"{table.sources[0]}: column `{data.split_column}` has {len(known):,} different values",
            "`data.split_column` is a column that says train, eval or test",
        )
    chosen = choose_values(data, known, f"a value of column `{data.split_column}`", warnings, named=True)
    for value in known:
        if value not in chosen.values():
            count = pc.sum(pc.equal(values, value)).as_py()
            name = next((split for split, names in SPLIT_NAMES.items() if value in names), None)
            use = f"add `{name}: {{}}` to `data` to use them" if name else "name it with `split:` to use it"
            warnings.append(f"{count:,} rows whose `{data.split_column}` is {value!r} are in no split: {use}")
    pools = {v: _Pool(column, np.flatnonzero(pc.equal(values, v).to_numpy(zero_copy_only=False))) for v in known}
    return {split: (value, pools[value]) for split, value in chosen.items()}


def _choose_rows(
    data: Data, pools: Mapping[str, tuple[str, _Pool]], labels: Labels, warnings: list[str]
) -> dict[str, Array]:
    """The rows of each split, as indices in its source."""
    names = {split: name for split, (name, _) in pools.items()}
    shares = shares_of(data, names, warnings)
    rows: dict[str, Array] = {}
    for name, pool in dict(pools.values()).items():
        sharing = [split for split in names if names[split] == name]
        dividing = [split for split in sharing if split in shares]
        if dividing:
            if labels.task in ("multi-label", "token-classification") and data.group is None:
                what = "multi-label rows" if labels.task == "multi-label" else "rows of several entities"
                warnings.append(f"`{name}` is divided at random: {what} are not stratified")
            divided = _divide_pool(data, pool, labels, {split: shares[split] for split in dividing}, warnings)
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
        if spec.sample is not None and data.split_by is not None and (split in shares or data.hub is None):
            rows[split] = rows[split][
                sample_by_key(_text_keys(data, pool.column.table)[rows[split]], spec.sample, spec.seed)
            ]
        else:
            rows[split] = rows[split][sample_rows(len(rows[split]), spec.sample, spec.seed)]
    return {split: rows[split] for split in pools}


def _divide_pool(
    data: Data, pool: _Pool, labels: Labels, shares: Mapping[str, Fraction], warnings: list[str]
) -> list[Array]:
    """Positions in the pool for each share."""
    wanted, seed, table = list(shares.values()), data.train.seed, pool.column.table
    if data.split_by is None:
        return stratified_split(_strata(pool, labels, rank_groups), len(pool.rows), wanted, seed)
    if data.group is None:
        return split_by_key(_text_keys(data, table)[pool.rows], _strata(pool, labels, value_groups), wanted, seed)
    codes = group_codes(group_names(table.columns[data.group]), _text_keys(data, table))[pool.rows]
    codes = np.unique(codes, return_inverse=True)[1].reshape(-1)
    if pool.column.words is not None:
        strata: Array | None = entity_flags(pool.column.words.take(pool.rows), labels)
    elif labels.task == "multi-label":
        strata = label_array(pool.column, labels, pool.rows) > 0
    else:
        strata = _strata(pool, labels, value_groups)
    return divide_groups(data.group, codes, strata, shares, seed, warnings)


def _text_keys(data: Data, table: DataTable) -> Array:
    return np.hstack([table.texts[name].keys for name in data.text])


def _nothing_left(split: str, share: Fraction | None, column: LabelColumns, data: Data, labels: Labels) -> DataError:
    source, count = " and ".join(column.table.sources), len(column.table)
    rows_there = f"{source}: {plural(count, 'row')}"
    if labels.task == "single-label" and count > 1 and len(pc.unique(column.text())) == count:
        written = [name for name in labels.names or () if _WRITTEN_NUMBER.fullmatch(name)]
        remedy = "is that the label's column, not the one of texts or ids? else add rows, or name a file for each split"
        if len(written) == count:
            remedy = f"for a regression write plain numbers: 0.5, not {written[0]!r}"
        return DataError(
            f"data.{split}: no rows are left for this split: {rows_there}, and as many labels (`{data.label[0]}`): each occurs "
            "once, in train",
            remedy,
        )
    part_of = f" and {float(share):g} of them are asked for" if share is not None else ""
    return DataError(
        f"data.{split}: no rows are left for this split: {rows_there}{part_of}",
        "give it a larger `fraction`, more data, or a file of its own",
    )


def _strata(pool: _Pool, labels: Labels, groups: Callable[[Array], Array]) -> Array | None:
    """The stratum of each row: its label, or its group of numbers; None where a row has several labels."""
    if labels.task in ("multi-label", "token-classification"):
        return None
    if labels.task == "regression":
        return groups(pool.column.numbers()[pool.rows])
    assert labels.names is not None
    ids = pc.index_in(pool.column.text(), pa.array(labels.names, pa.large_string()))
    return np.asarray(pc.fill_null(ids, -1).cast(pa.int64()).to_numpy(zero_copy_only=False))[pool.rows]


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
        places = "; ".join(list_places(columns[s].table, indices) for s, indices in by_source.items() if len(indices))
        raise DataError(f"{' and '.join(splits)}: {plural(count, 'row has', 'rows have')} {what}: {places}", remedy)
