"""The section `data`: a Hub data set or local files, the columns of texts and labels, and the rows of each split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from afina.formats.read_options import Delimiter, Encoding, Header, Quoting, ReadOptions
from afina.recipe.data_files import NamedSplit
from afina.recipe.keys.section import KeyedError, Names, Section, Text, shown

__all__ = ["Data", "Fold", "Part"]


def _by_order_is_none(value: Any) -> Any:
    return None if value == "order" else value


class Part(Section):
    """One of train, eval, test: the source and number of its rows.

    `split` names a split of a Hub data set, a key of `data.files` or a value of `data.split_column`; without it the source
    of the same name is used, else `all`, else `train`. A `fraction` divides the source, with the seed of `train`.
    `sample` then takes rows by a hash of their texts; of a Hub split that is not divided `shuffle(seed).select(range(sample))`,
    exactly as datasets does.
    """

    split: str | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    sample: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Fold(Section):
    """One fold of cross-validation: eval is the fold `number` of `of`, train are the others. Each `repeat` is another division."""

    of: Annotated[int, Field(ge=2, le=1000)] = 5
    number: Annotated[int, Field(ge=1, le=1000)] = 1
    repeat: Annotated[int, Field(ge=1, le=1000)] = 1

    def problems(self) -> Iterator[KeyedError]:
        if self.number > self.of:
            yield KeyedError(f"fold {self.number} of {self.of}: folds count from 1 to {self.of}", "number")

    def sizes(self, folds: Sequence[Sequence[Mapping[str, int]]]) -> dict[str, dict[str, int]]:
        """Rows, tokens and groups of train and eval, from those of each fold of each repeat."""
        these = folds[self.repeat - 1]
        of_eval = dict(these[self.number - 1])
        return {
            "train": {name: sum(fold[name] for fold in these) - size for name, size in of_eval.items()},
            "eval": of_eval,
        }


class Data(Section):
    """A Hub data set (`hub`) or local `files`, and its columns of texts and labels."""

    added_later = ("weight", "split_by", "split_column", "group", "fold", *ReadOptions.model_fields)

    hub: Text | None = None
    config: str | None = None
    splits: dict[str, str] | None = None
    revision: Text | None = None
    files: Mapping[NamedSplit, Names] | None = None
    text: Names
    label: Names
    labels: tuple[str, ...] | None = None
    label_separator: Text | None = None
    id: str | None = None
    weight: Text | None = None
    encoding: Encoding | None = None
    delimiter: Delimiter | None = None
    header: Header | None = None
    quoting: Quoting | None = None
    field: Text | None = None
    #: None: by the order of the rows, as afina 0.1 did. `afina.recipe.parse` sets `text` for a recipe that leaves it out.
    split_by: Annotated[Literal["text"] | None, BeforeValidator(_by_order_is_none)] = None
    split_column: Text | None = None
    group: Text | None = None
    fold: Fold | None = None
    train: Part = Part()
    eval: Part = Part()
    test: Part | None = None

    @property
    def reading(self) -> ReadOptions:
        """How the files are read."""
        return ReadOptions(**{key: getattr(self, key) for key in ReadOptions.model_fields})

    @field_validator("files", mode="before")
    @classmethod
    def _one_path_is_all(cls, value: Any) -> Any:
        if isinstance(value, str | list):
            return {"all": value}
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"must be a path, a list of paths, or a mapping such as {{train: a.csv, eval: b.csv}}, found {shown(value)}"
            )
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if not value:
            raise ValueError("is an empty list: name the labels, or leave it out to use those of the data")
        for place, name in enumerate(value):
            if name is None or isinstance(name, list | tuple | Mapping) or not str(name).strip():
                raise KeyedError(f"{shown(name)} is not a label; put it in quotes if it is text", str(place))
        return tuple(str(v).strip() for v in value)

    @field_validator("text", "label")
    @classmethod
    def _each_once(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value:
            raise ValueError(f"at least one {info.field_name} column")
        for name in value:
            if value.count(name) > 1:
                raise ValueError(f"names column `{name}` twice")
        return value

    def problems(self) -> Iterator[KeyedError]:
        for name in (name for name in self.label if name in self.text):
            yield KeyedError(f"column `{name}` is the text too: the model would read the label in the text", "label")
        for key in ("weight", "split_column", "group"):
            if getattr(self, key) in (*self.text, *self.label):
                yield KeyedError(f"column `{getattr(self, key)}` is the text or the label too", key)
        if (self.hub is None) == (self.files is None):
            yield KeyedError("give either `hub` (a data set's id) or `files` (local paths), and only one of them")
        elif self.files is None:
            for key in self.reading.given():
                yield KeyedError("is for local files; with `hub` leave it out", key)
        else:
            yield from self._problems_of_files(self.files)
        yield from self._too_much_to_give()

    def _problems_of_files(self, files: Mapping[NamedSplit, Names]) -> Iterator[KeyedError]:
        for key in ("config", "splits", "revision"):
            if getattr(self, key) is not None:
                yield KeyedError("belongs to a Hub data set; with `files` leave it out", key)
        if not files:
            yield KeyedError("is empty: write `{all: reviews.csv}` or `{train: …, eval: …}`", "files")
        for part in (part for part, paths in files.items() if not paths):
            yield KeyedError("names no file", "files", part)
        if self.split_column is not None and len(files) > 1:
            yield KeyedError(
                f"divides the rows of one source, and `files` has {len(files)}",
                "split_column",
                remedy="give `files` as one path or one list, or leave `split_column` out",
            )

    def _source(self, name: str) -> str:
        """The source of a split, as far as it can be known without the data."""
        part: Part = getattr(self, name)
        files = self.files or {}
        own = name if self.files is None or name in files else "all" if "all" in files else "train"
        return part.split or own

    @property
    def unused_files(self) -> list[str]:
        """The keys of `files` that no split is read from."""
        if self.files is None or self.split_column is not None:
            return []
        used = {self._source(name) for name in ("train", "eval", "test") if getattr(self, name) is not None}
        return [name for name in self.files if name not in used]

    @property
    def divides(self) -> bool:
        """True if rows of one source are divided among splits, as far as it can be known without the data."""
        fractions = any(part is not None and part.fraction is not None for part in (self.train, self.eval, self.test))
        shared = self.files is not None and self.split_column is None and self._source("train") == self._source("eval")
        return fractions or shared

    @property
    def chooses_rows(self) -> bool:
        """True if rows are divided or sampled by afina, as far as it can be known without the data."""
        sampled = any(part is not None and part.sample is not None for part in (self.train, self.eval, self.test))
        # A Hub data set may have only one split.
        alone = self.hub is not None and self.eval.split is None and "eval" not in (self.splits or {})
        return self.divides or alone or (sampled and self.files is not None)

    def _too_much_to_give(self) -> Iterator[KeyedError]:
        """Fractions of one source that add up to more than 1, as far as that can be known without the data."""
        if self.split_column is not None:
            return  # the sources are its values
        cut: dict[str, list[str]] = {}
        for name in ("train", "eval", "test"):
            part: Part | None = getattr(self, name)
            if part is None or part.fraction is None:
                continue
            cut.setdefault(self._source(name), []).append(name)
        for source, names in cut.items():
            total = sum(getattr(self, name).fraction for name in names)
            if total > 1 + 1e-9:
                yield KeyedError(
                    f"the fractions of {' and '.join(names)} add up to {total:g}; at most 1 of `{source}` is there to give"
                )
