"""Columns of a table as the numbers that a model takes: standardised numbers and one-hot categories.

Train alone decides: numbers lose its mean and are divided by its standard deviation (of all rows, float64), a
text becomes one input for each of its categories, in alphabetical order, 1 for the row's own and 0 for the
others. All inputs of a row lie in one vector, float32, in the order of the columns.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.references import DataError
from cluster.workload import cache
from cluster.workload.labels import names_of
from cluster.workload.tables import Table, as_float32, choose_column, is_numeric, is_text, numbers

#: What pandas writes of an index that it was not told to leave out: a row's number, which says nothing.
_INDEX = re.compile(r"__index_level_\d+__")
#: So many texts are categories in however few rows; more have to come twice each on the mean.
_FEW = 20


def write_columns(
    folder: Path, wanted: Sequence[str] | None, others: Mapping[str, str | None], tables: Mapping[str, Table]
) -> dict[str, Any]:
    """Write the inputs of both splits; returns what each input is made of, for meta.json.

    Args:
        folder: Where to write.
        wanted: Names of the columns; None for all but ``others``.
        others: Columns that are no inputs, by the key that names them.
        tables: Splits, ``train`` first.

    Raises:
        DataError: A column is not there, of another kind, constant, or has a missing or unknown value.
    """
    train = tables["train"]
    taken = {column: key for key, column in others.items() if column is not None}
    if wanted is None:
        wanted = [name for name in train.schema.names if name not in taken and not _INDEX.fullmatch(name)]
    for place, name in enumerate(wanted):
        if name in taken:
            raise DataError(f"data.columns: {name!r} is data.{taken[name]}; an input cannot be that too")
        if name in wanted[:place]:
            raise DataError(f"data.columns: {name!r} is there twice")
    if not wanted:
        raise DataError(f"data.columns: {train.place} has no column beside {sorted(taken)}")
    made: dict[str, list[np.ndarray]] = {split: [] for split in tables}
    inputs = []
    for name in wanted:
        for table in tables.values():
            choose_column(table, "columns", name, [], ())
        found = train.schema.field(name).type
        if is_numeric(found) and train.parts[0].names(name) is None:
            columns, form = _standardised(name, tables)
        elif is_text(found) or is_numeric(found):
            columns, form = _one_hot(name, tables)
        else:
            raise DataError(
                f"column {name!r} of {train.place} holds {found}; allowed are numbers and texts, which are "
                "categories (data.columns names the columns that are inputs)"
            )
        inputs.append({"name": name, **form})
        for split, own in columns.items():
            made[split].append(own)
    for split, parts in made.items():
        cache.save(folder / f"{split}-images.npy", np.concatenate(parts, axis=1))
    return {"inputs": inputs}


def _standardised(name: str, tables: Mapping[str, Table]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A column of numbers, float32 [N, 1] by split."""
    values = {split: numbers(table, name, _place(name, table)) for split, table in tables.items()}
    train = values["train"]
    if train.min() == train.max():
        raise _constant(name, tables["train"], f"{train[0]:g}")
    with np.errstate(over="ignore"):  # told below
        mean, deviation = float(train.mean()), float(train.std())
    if not 0.0 < deviation < np.inf:
        raise DataError(
            f"{_place(name, tables['train'])}: numbers from {train.min():g} to {train.max():g} have the "
            f"standard deviation {deviation:g} in float64; scale them"
        )
    with np.errstate(over="ignore"):
        scaled = {split: (own - mean) / deviation for split, own in values.items()}
    columns = {split: as_float32(own, _place(name, tables[split]))[:, None] for split, own in scaled.items()}
    return columns, {"mean": mean, "deviation": deviation}


def _one_hot(name: str, tables: Mapping[str, Table]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A column of texts, float32 [N, categories] by split."""
    categories: list[str] = []
    columns = {}
    for split, table in tables.items():
        values = _texts(name, table)
        categories = categories or sorted(set(values))
        if len(categories) == 1:
            raise _constant(name, table, repr(categories[0]))
        if split == "train" and len(categories) > max(_FEW, len(values) // 2):
            raise DataError(
                f"{_place(name, table)} holds {len(categories):,} texts in {len(values):,} rows, too many "
                "for categories: leave it out (data.columns names the columns that are inputs), or learn of "
                "the texts themselves (objective.name=sequence_classification)"
            )
        code = {category: index for index, category in enumerate(categories)}
        if unknown := sorted(set(values) - code.keys()):
            raise DataError(
                f"{_place(name, table)} holds {unknown[:5]}, which the training split does not: "
                f"{categories[:20]}{' ...' * (len(categories) > 20)}"
            )
        columns[split] = np.zeros((len(values), len(categories)), np.float32)
        columns[split][np.arange(len(values)), [code[value] for value in values]] = 1.0
    return columns, {"categories": categories}


def _texts(name: str, table: Table) -> list[str]:
    """The texts of a column; codes of named classes as their names."""
    place = _place(name, table)
    values: list[Any] = []
    for part in table.parts:
        stored = [value for batch in part.batches(name) for value in batch.to_pylist()]
        names = part.names(name)
        values += stored if names is None else names_of(stored, names, place)
    values = values if table.kept is None else list(itertools.compress(values, table.kept))
    for row, value in enumerate(values):
        if not isinstance(value, str):
            found = "no value" if value is None else f"the value {value!r}"
            raise DataError(f"{place}: row {row} has {found}; allowed are texts")
    return values


def _constant(name: str, table: Table, value: str) -> DataError:
    return DataError(
        f"{_place(name, table)} is {value} in every row, which says nothing: leave it out (data.columns "
        "names the columns that are inputs)"
    )


def _place(name: str, table: Table) -> str:
    return f"column {name!r} of {table.place}"
