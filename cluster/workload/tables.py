"""Tables of encoded images and clips in Arrow's form: hub repositories and parquet files, read alike."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.references import did_you_mean
from cluster.workload.datasets import DataError


@dataclass(frozen=True)
class Table:
    """One split in Arrow's form: where it is from, its schema, its row count, and its rows batch by batch."""

    place: str
    schema: Any
    rows: int
    batches: Callable[[str], Iterator[Any]]  # column name -> consecutive arrays of that column
    kept: np.ndarray | None = None  # bool [all rows]; None keeps every row

    def column(self, name: str) -> Iterator[Any]:
        """The values of a column as Python objects, in order, a batch in memory at a time."""
        values = itertools.chain.from_iterable(batch.to_pylist() for batch in self.batches(name))
        return values if self.kept is None else itertools.compress(values, self.kept)

    def only(self, kept: np.ndarray) -> "Table":
        """The rows for which `kept`, bool [rows], is true."""
        return replace(self, kept=kept, rows=int(kept.sum()))

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Hugging Face's feature of every column, as stored in the schema; empty for plain parquet files."""
        stored = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored.get("info", {}).get("features", {})
        return {name: feature if isinstance(feature, dict) else {} for name, feature in features.items()}


def hub_table(name: str, split: str, dataset: Any) -> Table:
    """A split that the `datasets` library has loaded."""

    def batches(column: str) -> Iterator[Any]:
        # The Arrow format hands out the encoded bytes, the default one would decode every image.
        for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=512):
            yield table[column]

    return Table(f"split {split!r} of {name!r}", dataset.features.arrow_schema, len(dataset), batches)


def parquet_table(files: list[Path]) -> Table:
    """Parquet files that together are one split."""
    import pyarrow
    import pyarrow.parquet

    parts = []
    for file in files:
        try:
            parts.append(pyarrow.parquet.ParquetFile(file))
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{file} is not a readable parquet file: {error}") from error

    def batches(column: str) -> Iterator[Any]:
        for file, part in zip(files, parts, strict=True):
            if column not in part.schema_arrow.names:
                raise DataError(f"{file} has no column {column!r}, which {files[0].name} has")
            for batch in part.iter_batches(batch_size=512, columns=[column]):
                yield batch.column(column)

    rows = sum(part.metadata.num_rows for part in parts)
    return Table(str(files[0]), parts[0].schema_arrow, rows, batches)


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
