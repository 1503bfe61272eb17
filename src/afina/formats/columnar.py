"""Parquet and Arrow files in batches of rows; class names that `datasets` wrote; nested and partition columns."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from afina.errors import DataError
from afina.formats.columns import distinct, partitions
from afina.formats.read_options import format_of
from afina.formats.text_files import foreign

__all__ = ["Columnar", "class_names", "count_rows", "is_list", "open_columnar", "readable_columnar"]

_BLOCK_BYTES = 1 << 20


class Columnar:
    """An open file.

    Attributes:
        schema: the file's own.
        names: its columns, nested ones as `a.b` too, then those of a partitioned folder; a second `a` is `a.1`. `a.0` in lists
            is found by `place` alone.
        classes: label names by column.
    """

    def __init__(self, path: Path, file: Any, schema: Any) -> None:
        self.path, self._file, self.schema = path, file, schema
        own = distinct(schema.names)
        self.repeated = {name for name in schema.names if schema.names.count(name) > 1}
        self._places: dict[str, tuple[int, tuple[str, ...]]] = {name: (index, ()) for index, name in enumerate(own)}
        self._added = {key: value for key, value in partitions(path).items() if key not in own}
        self.top = [*own, *self._added]
        for index, field in enumerate(schema):
            for keys in _nested(field.type):
                self._places.setdefault(".".join((own[index], *keys)), (index, keys))
        self.names = [*self._places, *self._added]
        self.classes = class_names(schema.metadata or {})

    def place(self, name: str) -> tuple[int, tuple[str, ...]] | None:
        """Where a column is: its index in the schema, and the keys below it; None where there is none."""
        if name in self._places:
            return self._places[name]
        parent, _, key = name.rpartition(".")
        above = self.place(parent) if parent else None
        if above is None:
            return None
        kind = self.schema.field(above[0]).type
        for step in above[1]:
            kind = kind.value_type if step.isdigit() and is_list(kind) else kind.field(step).type
        known = key.isdigit() if is_list(kind) else hasattr(kind, "names") and key in kind.names
        return (above[0], (*above[1], key)) if known else None

    def has(self, name: str) -> bool:
        return name in self._added or self.place(name) is not None

    def batches(self, names: Sequence[str], most_rows: int, most_bytes: int) -> Iterator[dict[str, Any]]:
        """All rows: Arrow arrays by column."""
        import pyarrow as pa

        places = {name: place for name in names if (place := self.place(name)) is not None}
        for batch in self._read(sorted({index for index, _ in places.values()}), most_rows, most_bytes):
            nested = {name: _value_at(batch[index], keys) for name, (index, keys) in places.items()}
            added = {
                name: pa.array([self._added[name]] * batch[-1], pa.large_string())
                for name in names
                if name not in places
            }
            yield {name: nested[name] if name in nested else added[name] for name in names}

    def _read(self, indices: Sequence[int], most_rows: int, most_bytes: int) -> Iterator[dict[int, Any]]:
        """Batches of the columns at `indices`; of a file without rows one empty batch. And their number of rows, at -1."""
        import pyarrow as pa

        if hasattr(self._file, "iter_batches"):
            names = sorted({self.schema.names[index] for index in indices})
            size = _batch_size(self._file.metadata, names, most_rows, most_bytes)
            batches = self._file.iter_batches(size, columns=names, use_threads=False)
        else:
            batches = _sliced(self._file, most_rows, most_bytes)
        rows = 0
        for batch in batches:
            # Of two columns with one name the first one in the file is the first one here.
            waiting = {name: [i for i, n in enumerate(self.schema.names) if n == name] for name in batch.schema.names}
            columns = {waiting[name].pop(0): batch.column(at) for at, name in enumerate(batch.schema.names)}
            rows += len(batch)
            yield {**{index: columns[index] for index in indices}, -1: len(batch)}
        if not rows:
            yield {**{index: pa.array([], self.schema.field(index).type) for index in indices}, -1: 0}


def _sliced(reader: Any, most_rows: int, most_bytes: int) -> Iterator[Any]:
    import pyarrow as pa

    streamed = isinstance(reader, pa.RecordBatchReader)
    for batch in reader if streamed else map(reader.get_batch, range(reader.num_record_batches)):
        size = max(1, min(most_rows, most_bytes * len(batch) // max(1, batch.nbytes)))
        for start in range(0, len(batch), size):
            yield batch.slice(start, size)


def _batch_size(metadata: Any, names: Sequence[str], most_rows: int, most_bytes: int) -> int:
    """Rows of a batch, by their mean size in the row group with the largest rows."""
    most = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] in names)
        most = max(most, size // max(1, group.num_rows))
    return max(1, min(most_rows, most_bytes // most))


def _nested(kind: Any) -> Iterator[tuple[str, ...]]:
    """The keys below a column of objects."""
    import pyarrow as pa

    for index in range(kind.num_fields) if pa.types.is_struct(kind) else ():
        field = kind.field(index)
        yield (field.name,)
        for keys in _nested(field.type):
            yield (field.name, *keys)


def is_list(kind: Any) -> bool:
    """True of the three kinds of lists that Arrow has."""
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _value_at(column: Any, keys: Sequence[str]) -> Any:
    import pyarrow.compute as pc

    for key in keys:
        column = _element(column, int(key)) if is_list(column.type) else pc.struct_field(column, key)
    return column


def _element(column: Any, number: int) -> Any:
    """That element of each list; null where a list is shorter."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    places = np.cumsum(lengths) - lengths + number
    return pc.list_flatten(column).take(pa.array(places, mask=lengths <= number))


@contextlib.contextmanager
def open_columnar(path: Path) -> Iterator[Columnar]:
    """A Parquet or Arrow file; raises as `readable_columnar`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with readable_columnar(path), contextlib.ExitStack() as stack:
        if format_of(path) == "parquet":
            # Not memory-mapped, one column chunk after the other: pages that were read do not stay in this process's memory.
            file = stack.enter_context(pq.ParquetFile(path, buffer_size=_BLOCK_BYTES, pre_buffer=False))
            yield Columnar(path, file, file.schema_arrow)
            return
        source = stack.enter_context(pa.OSFile(os.fspath(path)))
        try:
            reader: Any = stack.enter_context(pa.ipc.open_file(source))
        except pa.ArrowInvalid:  # a stream, as `datasets` writes it
            source.seek(0)
            reader = stack.enter_context(pa.ipc.open_stream(source))
        yield Columnar(path, reader, reader.schema)


@contextlib.contextmanager
def readable_columnar(path: Path) -> Iterator[None]:
    """Around code that reads a Parquet or Arrow file.

    Raises:
        DataError: the file is not of its format, or damaged, or cannot be opened.
    """
    import pyarrow as pa

    kind = "Parquet" if format_of(path) == "parquet" else "Arrow"
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: {os.strerror(error.errno)}", "check the path and its permissions") from None
        with contextlib.suppress(OSError):
            if other := foreign(path):
                raise other from None
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable {kind} file: {reason}", "copy or write the file again") from None


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """ClassLabel names by column, from the schema's metadata that `datasets` writes; those of a list of labels too."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    by_column = {}
    for name, feature in features.items():
        if isinstance(feature, list) and len(feature) == 1:  # a list of them, as datasets before 4 writes it too
            feature = feature[0]
        feature = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            by_column[name] = [str(n) for n in feature["names"]]
    return by_column


def count_rows(path: Path) -> int | None:
    """Rows of a Parquet file; None of an Arrow file."""
    import pyarrow.parquet as pq

    if format_of(path) != "parquet":
        return None
    with readable_columnar(path):
        return int(pq.read_metadata(path).num_rows)
