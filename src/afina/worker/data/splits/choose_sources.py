"""The source of each split of a recipe, and the share of it that the split takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from afina.errors import DataError, RecipeError, nearest
from afina.recipe.keys.data_keys import Data, Part

__all__ = ["SPLITS", "SPLIT_NAMES", "choose_sources", "choose_values", "shares_of"]

SPLITS = ("train", "eval", "test")
#: Names of a split in Hub data sets and in columns, in the order of preference.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "eval": ("eval", "validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


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
    return choose_values(data, known, what, warnings, named=hub)


def choose_values(data: Data, known: Sequence[str], what: str, warnings: list[str], *, named: bool) -> dict[str, str]:
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
            usual = [*SPLIT_NAMES[split][1:], *(["test"] if split == "eval" and data.hub is not None else [])]
            candidates[1:1] = usual
            candidates += SPLIT_NAMES["train"]
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


def shares_of(data: Data, sources: Mapping[str, str], warnings: list[str]) -> dict[str, Fraction]:
    """The share of its source that each split takes; splits that take all of it are left out."""
    shares: dict[str, Fraction] = {}
    for source in dict.fromkeys(sources.values()):
        sharing = [split for split in sources if sources[split] == source]
        given = {split: Fraction(repr(f)) for split in sharing if (f := getattr(data, split).fraction) is not None}
        without = [split for split in sharing if split not in given]
        if len(sharing) > 1 and not given:
            if sharing == ["train", "eval"]:
                given = {"train": Fraction("0.8"), "eval": Fraction("0.2")}
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
            rest = Fraction(1) - sum(given.values(), Fraction(0))
            if len(without) > 1 or rest <= 0:
                raise RecipeError(
                    f"data: {', '.join(sharing)} share `{source}`, and {' and '.join(without)} would get no rows",
                    f"give `data.{without[0]}` a `fraction`; all fractions add up to at most 1",
                )
            given[without[0]] = rest
            warnings.append(f"{without[0]} gets the rest of `{source}`: {float(rest):g} of its rows")
        shares |= given
    return shares
