"""Tables as CSV that a spreadsheet may open."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

#: With what a cell begins that a spreadsheet takes for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\n")

#: What may begin with a sign: a number, with its half interval, infinity, and the dash of an empty cell.
_NUMBER = re.compile(r"[-+]?(\d[\d.,]*|\.\d+|inf)(e[-+]?\d+)?( ± [\d.,]+)?|-")


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV; what is None or NaN stays empty, and text that would be a formula begins with ``'``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(["" if cell is None or cell != cell else _inert(cell) for cell in row])
    return text.getvalue()


def _inert(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r", " ")  # the csv module writes it bare, which readers take for the end of a row
    return f"'{cell}" if cell.lstrip(" ").startswith(_FORMULA) and not _NUMBER.fullmatch(cell) else cell
