"""What is to be learned of a column: classes, numbers, or sets of labels. Train decides, test follows.

Objectives say which by :attr:`cluster.workload.objectives.Objective.targets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.references import DataError
from cluster.workload.labels import LabelCodes, names_of
from cluster.workload.tables import Table, as_float32, numbers


def read_targets(
    kind: str, column: str, tables: Mapping[str, Table]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The targets of every split, and what their codes or columns are called.

    Args:
        kind: ``classes``: int64 [N], codes of the names; ``numbers``: float32 [N], without names;
            ``label_sets``: uint8 [N, labels], 1 where a sample has the label.
        column: Where they are.
        tables: Splits, ``train`` first.

    Raises:
        DataError: A split has no rows, or a cell is none of what is asked for or unknown to train.
    """
    for table in tables.values():
        if table.rows == 0:
            raise DataError(f"{table.place} has no rows")
    read = {"classes": _classes, "numbers": _numbers, "label_sets": _label_sets}[kind]
    return read(column, tables)


def _classes(column: str, tables: Mapping[str, Table]) -> tuple[dict[str, np.ndarray], list[str]]:
    meaning: LabelCodes | None = None
    codes = {}
    for split, table in tables.items():
        place = f"labels in column {column!r} of {table.place}"
        stored, declared = table.labels(column)
        meaning = meaning or LabelCodes.of(stored, declared, place)
        codes[split] = meaning.encode(stored, place)
    assert meaning is not None, "the training split decides the classes"
    return codes, meaning.classes


def _numbers(column: str, tables: Mapping[str, Table]) -> tuple[dict[str, np.ndarray], list[str]]:
    values = {}
    for split, table in tables.items():
        place = f"targets in column {column!r} of {table.place}"
        if any(part.names(column) is not None for part in table.parts):
            raise DataError(
                f"{place} are codes of named classes, which are no quantities; set "
                "objective.name=classification, or name another data.label_column"
            )
        values[split] = as_float32(numbers(table, column, place), place)
    return values, []


def _label_sets(column: str, tables: Mapping[str, Table]) -> tuple[dict[str, np.ndarray], list[str]]:
    meaning: LabelCodes | None = None
    held = {}
    for split, table in tables.items():
        place = f"labels in column {column!r} of {table.place}"
        rows, declared = _sets(column, table, place)
        flat = [label for labels in rows for label in labels]
        if meaning is None:
            if not flat:
                raise DataError(f"{place}: no row holds a label")
            meaning = LabelCodes.of(flat, declared, place)
        held[split] = np.zeros((len(rows), len(meaning.classes)), np.uint8)
        owners = np.repeat(np.arange(len(rows)), [len(labels) for labels in rows])
        if flat:
            held[split][owners, meaning.encode(flat, place)] = 1
    assert meaning is not None, "the training split decides the labels"
    return held, meaning.classes


def _sets(column: str, table: Table, place: str) -> tuple[list[list[Any]], list[str]]:
    """The labels of every row, codes of named ones as their names; and those names in order."""
    rows: list[list[Any]] = []
    declared: dict[str, None] = {}
    first: Any = None
    for part in table.parts:
        names = part.names(column)
        declared |= dict.fromkeys(names or ())
        for batch in part.batches(column):
            for cell in batch.to_pylist():
                row = len(rows)
                if not isinstance(cell, list):
                    raise DataError(f"{place}: row {row} holds {cell!r}; allowed are lists of labels")
                for label in cell:
                    first = label if first is None else first
                    if not isinstance(label, (str, int)) or isinstance(label, str) != isinstance(first, str):
                        raise DataError(
                            f"{place}: row {row} holds the label {label!r}; allowed are integers or texts, "
                            "never both"
                        )
                rows.append(cell if names is None else names_of(cell, names, f"{place}, row {row}"))
    return rows, list(declared)
