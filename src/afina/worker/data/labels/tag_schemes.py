"""Tag schemes of entity labels, recognised and converted to IOB2: IOB1, IOB2, BIOES (IOBES, BMES, BMEWO), BILOU, and tags without prefix.

    IOB2    B- begins every entity, I- continues it
    IOB1    I- begins an entity too; B- only one right behind another of its type
    BIOES   also E- (or L-) for the last word, S- (or U-, W-) for an entity of one word; M- is I-
    IO      no prefix: neighbouring words of one tag are one entity
    B, I, O without a name (or B, I, E, S): as the schemes above, and all entities are of one type

What fits none of them is refused by name, with the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from afina.errors import DataError
from afina.statistics.entities import entity_types, iob2_names
from afina.text import plural
from afina.worker.data.labels.find_labels import LabelColumns, Labels
from afina.worker.data.tables.data_table import DataTable, Examples, list_places
from afina.worker.data.tables.words import TaggedWords

__all__ = ["check_entities", "entity_flags", "find_entities"]

Array = np.ndarray[Any, Any]

_PREFIXED = re.compile(r"([BIOESLUMW])[-_](.+)")
#: Tags of other schemes, which would be taken for names without prefix.
_ALMOST = re.compile(r"[biesluomw][-_].+|.+[-_][BIESLU]")
_SHOWN = 5
_BEGIN, _INSIDE, _LAST, _SINGLE = range(1, 5)
_ROLES = {"B": _BEGIN, "I": _INSIDE, "M": _INSIDE, "E": _LAST, "L": _LAST, "S": _SINGLE, "U": _SINGLE, "W": _SINGLE}
#: The type of entities whose tags name none.
_UNNAMED = "entity"
_SCHEMES = "IOB2 (B-PER, I-PER, O), IOB1, BIOES, BILOU, or names without prefix"


def find_entities(columns: Sequence[LabelColumns], warnings: list[str]) -> Labels:
    """The label names of all sources in IOB2, and the number of each word's label, which `columns` get.

    Raises:
        DataError: tags of no known scheme; sources of different ones.
    """
    tables = [column.table for column in columns]
    every = dict.fromkeys(tag for table in tables for tag in _words(table).tags)
    if not any(tag != "O" for tag in every):
        raise DataError(
            "token classification: no word has a tag but O: there is nothing to learn", "check `data.label`"
        )
    roles, plain = _roles(tables, every, warnings)
    types = sorted({name for _, name in roles.values()})
    like_tags = [name for name in types if name == "O" or _PREFIXED.fullmatch(name)]
    if like_tags:
        warnings.append(
            f"types of entities are called as tags are: {', '.join(like_tags[:_SHOWN])}: a span reaches over all words of its entity, and its label is the "
            "name of the type alone (PER, not B-PER); words outside have no span"
        )
    schemes = {}
    for column, table in zip(columns, tables, strict=True):
        numbers, scheme = _numbered(table, roles, types)
        column.words = replace(_words(table), codes=numbers)
        schemes[" and ".join(table.sources)] = "IO" if plain else scheme
    for source, scheme in schemes.items():
        if scheme not in ("IOB2", ""):
            what = (
                "have no prefix: neighbouring words of one tag are one entity" if scheme == "IO" else f"are in {scheme}"
            )
            warnings.append(f"the tags of {source} {what}; converted to IOB2, which the model's labels are")
    for table in tables:
        if (widened := np.flatnonzero(_words(table).widened)).size:
            warnings.append(
                f"{plural(len(widened), 'row has', 'rows have')} spans that cut a word, widened to whole words: {list_places(table, widened)}"
            )
    return Labels("token-classification", tuple(iob2_names(types)))


def _roles(
    tables: Sequence[DataTable], every: Iterable[str], warnings: list[str]
) -> tuple[dict[str, tuple[int, str]], bool]:
    """Role and type of each tag but O; and whether the tags have no prefix.

    Raises:
        DataError: tags of no known scheme.
    """
    parsed = {tag: _PREFIXED.fullmatch(tag) for tag in every if tag != "O"}
    if parsed.keys() <= _ROLES.keys() and "B" in parsed and len(parsed) > 1:
        parsed = {tag: _PREFIXED.fullmatch(f"{tag}-{_UNNAMED}") for tag in parsed}
        warnings.append(f"the tags name no type ({', '.join(parsed)}): all entities are of type {_UNNAMED!r}")
    plain = [tag for tag, match in parsed.items() if match is None]
    if plain and len(plain) < len(parsed):
        prefixed = next(tag for tag, match in parsed.items() if match)
        raise DataError(
            f"{_place(tables, plain[0])}: tag {plain[0]!r} has no prefix, and {prefixed!r} has one",
            f"write all tags in one scheme: {_SCHEMES}",
        )
    if plain and all(_ALMOST.fullmatch(tag) for tag in plain):
        raise DataError(
            f"{_place(tables, plain[0])}: tag {plain[0]!r} is of no known scheme: the prefix is a capital letter before the name",
            f"write tags as {_SCHEMES}",
        )
    if plain and "O" not in every:
        raise DataError(
            f"{_place(tables, plain[0])}: no word is outside of all entities (O): such tags, of parts of speech for example, are not entities",
            f"afina measures entities; write tags as {_SCHEMES}",
        )
    roles = {
        tag: (_INSIDE, tag) if match is None else (_ROLES.get(match[1], 0), match[2]) for tag, match in parsed.items()
    }
    odd = next((tag for tag, (role, _) in roles.items() if not role), None)
    if odd is not None:
        raise DataError(f"{_place(tables, odd)}: tag {odd!r} belongs to no scheme", f"write tags as {_SCHEMES}")
    return roles, bool(plain)


def _words(table: DataTable) -> TaggedWords:
    assert table.words is not None
    return table.words


def _place(tables: Sequence[DataTable], tag: str) -> str:
    """Row and word where a tag occurs first."""
    for table in tables:
        if tag in _words(table).tags:
            return _where(table, int(np.flatnonzero(_words(table).codes == _words(table).tags.index(tag))[0]))
    raise AssertionError(tag)


def _where(table: DataTable, word: int) -> str:
    offsets = _words(table).offsets
    row = int(np.searchsorted(offsets, word, side="right")) - 1
    return f"{table.where(row)}, word {word - int(offsets[row]) + 1}"


def _numbered(table: DataTable, roles: dict[str, tuple[int, str]], types: Sequence[str]) -> tuple[Array, str]:
    """Each word's label, int64 (W,); and the name of the scheme, empty where there is no entity."""
    words = _words(table)
    role = np.array([0 if tag == "O" else roles[tag][0] for tag in words.tags] or [0])[words.codes]
    kind = np.array([-1 if tag == "O" else types.index(roles[tag][1]) for tag in words.tags] or [-1])[words.codes]
    if not role.any():
        return np.zeros(len(role), np.int64), ""
    joined = np.zeros(len(role), bool)  # the word before it, in the same row, is of the same type
    joined[1:] = kind[1:] == kind[:-1]
    joined[words.offsets[:-1][words.offsets[:-1] < len(role)]] = False
    used = set(np.unique(role).tolist())
    inside = (role == _INSIDE) | (role == _LAST)
    if used & {_LAST, _SINGLE}:
        opens = (role == _BEGIN) | (role == _INSIDE)  # more words of the entity follow
        continued = inside & joined & np.concatenate([[False], opens[:-1]])
        _refuse(table, inside & ~continued, "continues no entity")
        _refuse(table, opens & ~np.concatenate([continued[1:], [False]]), "has no last word (E-) behind it")
        begins, scheme = ~inside, "BIOES"
    else:
        opening, behind = np.flatnonzero(inside & ~joined), np.flatnonzero((role == _BEGIN) & ~joined)
        if len(opening) and len(behind):
            one, two = (f"{_where(table, int(w[0]))}: {words.tags[words.codes[w[0]]]}" for w in (opening, behind))
            raise DataError(
                f"{one} begins an entity ({plural(len(opening), 'such word')}), as in IOB1, and {two} too ({len(behind):,}), as in IOB2",
                "correct the smaller number of them: in IOB2 every entity begins with B-",
            )
        begins = (role == _BEGIN) | (inside & ~joined)
        scheme = "IOB1" if len(opening) else "IOB2"
    return np.where(role == 0, 0, 2 + 2 * kind - begins), scheme


def _refuse(table: DataTable, wrong: Array, what: str) -> None:
    """Raise if any word is `wrong`, bool (W,), in BIOES."""
    words, found = _words(table), np.flatnonzero(wrong)
    if len(found):
        raise DataError(
            f"{_where(table, int(found[0]))}: {words.tags[words.codes[found[0]]]} {what}, as BIOES has it ({plural(len(found), 'such word')})",
            f"correct these tags: {_SCHEMES}",
        )


def check_entities(labels: Labels, splits: dict[str, Examples], warnings: list[str]) -> None:
    """Check that train shows entities, and that the other splits measure them.

    Raises:
        DataError: train has no entity.
    """
    assert labels.names is not None
    types = entity_types(labels.names)
    counts = {
        split: np.bincount((e.labels[e.labels % 2 == 1] - 1) // 2, minlength=len(types)) for split, e in splits.items()
    }
    if not counts["train"].any():
        raise DataError("train: no row has an entity: there is nothing to learn", "use a larger `data.train`")
    for split, each in counts.items():
        lacking = [types[i] for i in np.flatnonzero((counts["train"] == 0) & (each > 0))]
        absent = [types[i] for i in np.flatnonzero((counts["train"] > 0) & (each == 0))]
        if lacking:
            warnings.append(f"train has no entity of type {', '.join(lacking)}, {split} has")
        if absent:
            warnings.append(f"{split} has no entity of type {', '.join(absent)}: nothing is measured for it")


def entity_flags(words: TaggedWords, labels: Labels) -> Array:
    """The types of entities in each row, bool (N, T).

    Args:
        words: their codes are numbers of labels.
    """
    assert labels.names is not None
    flags = np.zeros((len(words), len(labels.names) // 2), bool)
    row = np.repeat(np.arange(len(words)), np.diff(words.offsets))
    begins = words.codes % 2 == 1
    flags[row[begins], (words.codes[begins] - 1) // 2] = True
    return flags
