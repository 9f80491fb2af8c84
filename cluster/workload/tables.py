"""Tables in Arrow's form: hub repositories, parquet files and what a function returns, read alike."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.references import DataError, did_you_mean
from cluster.workload.labels import LabelCodes, names_of


@dataclass(frozen=True)
class Part:
    """Consecutive rows that share a schema: one parquet file, or all of a split of the hub."""

    place: str
    schema: Any
    rows: int
    batches: Callable[[str], Iterator[Any]]  # column name -> consecutive arrays of that column

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Hugging Face's feature of every column, as stored in the schema; empty for plain parquet files."""
        try:
            stored = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
            features = dict(stored.get("info", {}).get("features", {}))
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{self.place}: the metadata 'huggingface' cannot be read: {error}") from error
        return {name: feature if isinstance(feature, dict) else {} for name, feature in features.items()}

    def names(self, column: str) -> list[str] | None:
        """Names of the classes whose codes a column holds, alone or in lists; None of plain values."""
        feature = self.features.get(column, {})
        if isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
        return None if names is None else [str(name) for name in names]


@dataclass(frozen=True)
class Table:
    """One split: its parts, and which of all rows are kept (bool; None keeps every row)."""

    parts: Sequence[Part]
    kept: np.ndarray | None = None

    @property
    def place(self) -> str:
        """Where it is from."""
        return self.parts[0].place

    @property
    def schema(self) -> Any:
        """Arrow's schema of the first part."""
        return self.parts[0].schema

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """See :class:`Part`; of the first."""
        return self.parts[0].features

    @property
    def rows(self) -> int:
        """Number of rows that are kept."""
        return sum(part.rows for part in self.parts) if self.kept is None else int(self.kept.sum())

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column as Python objects, in order, a batch in memory at a time."""
        values = itertools.chain.from_iterable(
            batch.to_pylist() for part in self.parts for batch in part.batches(name)
        )
        return values if self.kept is None else itertools.compress(values, self.kept)

    def labels(self, column: str) -> tuple[list[Any], list[str]]:
        """The labels of all rows, codes of named classes as their names; and those names in order.

        Every part has its own names: files may list the same classes in another order.
        """
        values: list[Any] = []
        declared: dict[str, None] = {}
        for part in self.parts:
            stored = [value for batch in part.batches(column) for value in batch.to_pylist()]
            names = part.names(column)
            if names is not None:
                place = f"labels in column {column!r} of {part.place}"
                stored = names_of(stored, LabelCodes.named(names, place).classes, place)
                declared |= dict.fromkeys(names)
            values += stored
        return values, list(declared)

    def only(self, kept: np.ndarray) -> "Table":
        """The rows for which `kept`, bool [rows], is true."""
        return replace(self, kept=kept)


def hub_table(name: str, split: str, dataset: Any) -> Table:
    """A split that the `datasets` library has loaded."""

    def batches(column: str) -> Iterator[Any]:
        # The Arrow format hands out the encoded bytes, the default one would decode every image.
        for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=512):
            yield table[column]

    schema = dataset.features.arrow_schema
    return Table([Part(f"split {split!r} of {name!r}", schema, len(dataset), batches)])


def parquet_table(files: list[Path]) -> Table:
    """Parquet files that together are one split."""
    return Table([_parquet_part(file, files[0]) for file in files])


def given_table(place: str, columns: Any) -> Table:
    """A table in memory: Arrow's, pandas', or a dictionary of columns.

    Raises:
        DataError: It is none.
    """
    import pyarrow

    try:
        table = pyarrow.table(columns).combine_chunks()
    except (pyarrow.ArrowException, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{place} is no table ({reason}); allowed are dictionaries of columns of one length, and tables "
            "of Arrow or pandas"
        ) from error
    return Table([Part(place, table.schema, table.num_rows, lambda name: iter([table.column(name)]))])


def digest(table: Table) -> str:
    """Hash of a table in memory: its names, types and values."""
    import pyarrow
    import xxhash

    hashed = xxhash.xxh3_128(table.schema.serialize())  # names of classes too, which its text cuts off
    for name in table.schema.names:
        for part in table.parts:
            for values in part.batches(name):
                sink = pyarrow.BufferOutputStream()
                one = pyarrow.table({name: values})
                with pyarrow.ipc.new_stream(sink, one.schema) as stream:
                    stream.write_table(one)
                hashed.update(sink.getvalue())
    return hashed.hexdigest()


def _parquet_part(file: Path, first: Path) -> Part:
    import pyarrow
    import pyarrow.parquet

    try:
        content = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file: {error}") from error

    def batches(column: str) -> Iterator[Any]:
        if column not in content.schema_arrow.names:
            raise DataError(f"{file} has no column {column!r}, which {first.name} has")
        try:
            for batch in content.iter_batches(batch_size=512, columns=[column]):
                yield batch.column(column)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file}: column {column!r} cannot be read: {error}") from error

    return Part(str(file), content.schema_arrow, content.metadata.num_rows, batches)


def is_numeric(kind: Any) -> bool:
    """Whether an Arrow type is of numbers, truth values (0 and 1) included."""
    import pyarrow.types as types

    return any(is_(kind) for is_ in (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean))


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is of texts, stored one by one or as codes of a dictionary."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(is_(kind) for is_ in (types.is_string, types.is_large_string, types.is_string_view))


def numbers(table: Table, column: str, place: str) -> np.ndarray:
    """The numbers of a column, float64 [rows], all of them finite.

    Args:
        table: The split.
        column: Its name.
        place: What it is, for messages.

    Raises:
        DataError: It holds something else, naming the row.
    """
    import pyarrow

    parts: list[np.ndarray] = []
    for part in table.parts:
        for batch in part.batches(column):
            if len(batch) and not is_numeric(batch.type):
                row = sum(len(values) for values in parts)
                raise DataError(f"{place}: row {row} holds {batch[0].as_py()!r}; allowed are numbers")
            if len(batch):
                values = batch.cast(pyarrow.float64(), safe=False)
                parts.append(values.to_numpy(zero_copy_only=False))
    found = np.concatenate(parts)
    found = found if table.kept is None else found[table.kept]
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        value = "no value" if np.isnan(found[row]) else f"the value {found[row]}"
        raise DataError(f"{place}: row {row} has {value}; allowed are finite numbers")
    return found


def as_float32(values: np.ndarray, place: str) -> np.ndarray:
    """Finite numbers, float64 [rows], as float32.

    Raises:
        DataError: One is beyond what float32 holds, naming the row.
    """
    with np.errstate(over="ignore"):  # told below
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        raise DataError(f"{place}: row {row} becomes {values[row]:g}, more than float32 holds; scale them")
    return found


def image_candidates(table: Table) -> list[str]:
    """Columns with the Image or Audio feature; else structs with encoded bytes that no other claims."""
    import pyarrow.types

    features = table.features
    declared = [name for name, feature in features.items() if feature.get("_type") in ("Image", "Audio")]
    structs = [
        field.name
        for field in table.schema
        if "_type" not in features.get(field.name, {})
        and pyarrow.types.is_struct(field.type)
        and field.type.get_field_index("bytes") >= 0
    ]
    return declared or structs


def text_candidates(table: Table) -> list[str]:
    """Columns of texts that are not the names of classes."""
    import pyarrow.types

    return [
        field.name
        for field in table.schema
        if pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
    ]


def label_candidates(table: Table) -> list[str]:
    """Columns with the ClassLabel feature; `choose_column` falls back to the usual names."""
    return [name for name, feature in table.features.items() if feature.get("_type") == "ClassLabel"]


def choose_column(
    table: Table, key: str, wanted: str | None, candidates: list[str], usual: tuple[str, ...]
) -> str:
    """The column asked for, the only candidate, or the only one with a usual name; otherwise an error."""
    columns = table.schema.names
    if wanted is not None:
        if wanted not in columns:
            raise DataError(
                f"data.{key} = {wanted!r} is no column of {table.place}; columns are {columns}"
                f"{did_you_mean(wanted, columns)}"
            )
        return wanted
    if len(candidates) != 1:
        candidates = [name for name in candidates or columns if name in usual]
    if len(candidates) != 1:
        raise DataError(
            f"data.{key} cannot be inferred for {table.place}: {candidates or 'no column'} would fit; "
            f"name one of the columns {columns}"
        )
    return candidates[0]
