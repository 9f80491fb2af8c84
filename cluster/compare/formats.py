"""A comparison as text: for a terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cluster.compare.groups import Group
from cluster.compare.plots import mean_curve, metric
from cluster.compare.reading import METRICS
from cluster.compare.table import Cell, Column, Comparison, Mark, Table

if TYPE_CHECKING:
    from rich.console import Console

#: How marks look where there is no bold type.
SIGNS: dict[Mark, str] = {"best": " *", "tied": " †", "": ""}

#: What the marks mean, without their signs.
MEANINGS: dict[Mark, str] = {
    "best": "significantly better than all it competes with",
    "tied": "not distinguishable from the best mean",
}

#: How the figures came about, below every table.
METHOD_NOTE = (
    "Mean ± half of the 95 % interval (Student's t) over seeds. Groups compete on the same data, partition "
    "and model at the same target sparsity and number of rounds. Each is tested against the best mean by a "
    "t test, paired over shared seeds (Welch's where none are shared), with Holm's correction, at the 5 % "
    "level; one seed distinguishes nothing and has no interval. An interval that rounds to 0 is not shown."
)


#: Columns that fit a terminal, and rows that anyone reads there.
_ON_A_TERMINAL = frozenset(
    {
        "accuracy",
        "worst_decile",
        "sparsity",
        "uplink_mb",
        "downlink_mb",
        "mb_to_target",
        "regrowth",
        "consensus",
    }
)
_MOST_ROWS, _LABEL_WIDTH = 40, 24


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the table's main columns, the meaning of its marks, and which runs were left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawn

    table = comparison.table
    kept = [i for i, column in enumerate(table.columns) if column.key in _ON_A_TERMINAL]
    drawn = Drawn(title=comparison.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("group", min_width=min(_LABEL_WIDTH, max(len(group.label) for group in table.groups)))
    for place in kept:
        drawn.add_column(table.columns[place].header, justify="right")
    rows = text_rows(table, plus_minus="±")
    for row in rows[1 : 1 + _MOST_ROWS]:
        drawn.add_row(row[0], *(row[2 + place].replace(" *", "*").replace(" †", "†") for place in kept))
    console.print(drawn)
    if len(table.groups) > _MOST_ROWS:
        console.print(f"and {len(table.groups) - _MOST_ROWS} more groups in table.csv")
    for line in legend(table):
        console.print(line)
    reasons = [f"left out: {run.name}, {reason}" for run, reason in comparison.grouped.left_out]
    for line in reasons[:_MOST_ROWS]:
        console.print(line)
    if len(reasons) > _MOST_ROWS:
        console.print(f"and {len(reasons) - _MOST_ROWS} more left out, in runs.csv")


def cell_text(cell: Cell, column: Column, seeds: int, plus_minus: str = " ± ") -> str:
    """Mean and half interval; with how many seeds have the value where not all do."""
    if cell.interval is None:
        return "-"
    mean, low, _ = cell.interval
    text = f"{mean:.{column.digits}f}"
    half = f"{mean - low:.{column.digits}f}"
    if not math.isnan(low) and float(half):
        text += plus_minus + half
    return text if len(cell.values) == seeds else f"{text} ({len(cell.values)} of {seeds})"


def text_rows(table: Table, plus_minus: str = " ± ") -> list[list[str]]:
    """Header and one row a group; marks as signs."""
    rows = [["group", "seeds", *(column.header for column in table.columns)]]
    for group, cells in zip(table.groups, table.cells, strict=True):
        seeds = len(group.runs)
        texts = [
            cell_text(cell, column, seeds, plus_minus) + SIGNS[cell.mark]
            for cell, column in zip(cells, table.columns, strict=True)
        ]
        rows.append([group.label, str(seeds), *texts])
    return rows


def legend(table: Table) -> list[str]:
    """One line a mark that the table has."""
    return [f"{SIGNS[mark].strip()} {MEANINGS[mark]}" for mark in MEANINGS if mark in table.marks]


def markdown(table: Table) -> str:
    """A table of Markdown with its legend."""
    rows = [[cell.replace("|", "\\|").replace(" *", " \\*") for cell in row] for row in text_rows(table)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    notes = [line.replace("*", "\\*") for line in legend(table)]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes), METHOD_NOTE]) + "\n"


def latex(table: Table) -> str:
    """A table for the booktabs package: the best in bold, a dagger where it is not distinguishable."""
    bold = {"best": "Bold", "tied": r"$^\dagger$"}
    notes = [f"{bold[mark]}: {MEANINGS[mark]}." for mark in MEANINGS if mark in table.marks]
    tables = "\n".join(_tabular(part) for part in table.parts)
    return "\n".join(
        ["% \\usepackage{booktabs}", tables, *(f"% {note}" for note in [*notes, METHOD_NOTE]), ""]
    )


def _tabular(table: Table) -> str:
    body = [[_escaped(text) for text in ("group", "seeds", *(column.header for column in table.columns))]]
    for group, cells in zip(table.groups, table.cells, strict=True):
        row = [_escaped(group.label), str(len(group.runs))]
        for cell, column in zip(cells, table.columns, strict=True):
            text = _escaped(cell_text(cell, column, len(group.runs))).replace(" ± ", r" $\pm$ ")
            row.append({"best": rf"\textbf{{{text}}}", "tied": rf"{text}$^\dagger$", "": text}[cell.mark])
        body.append(row)
    lines = [" & ".join(row) + r" \\" for row in body]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(body[0]) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV; what is None or NaN stays empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(["" if cell is None or cell != cell else cell for cell in row])
    return text.getvalue()


def number_rows(table: Table) -> Iterator[list[object]]:
    """The table unrounded, one row a group and figure."""
    yield ["group", "figure", "unit", "seeds", "mean", "low", "high", "mark", "adjusted_p"]
    for group, cells in zip(table.groups, table.cells, strict=True):
        for cell, column in zip(cells, table.columns, strict=True):
            interval = cell.interval or (None, None, None)
            marks = {"best": "best", "tied": "not distinguishable", "": ""}
            yield [
                *(group.label, column.key, column.header, len(cell.values), *interval),
                *(marks[cell.mark], cell.adjusted),
            ]


def run_rows(comparison: Comparison) -> Iterator[list[object]]:
    """Every run with its figures, those left out with their reason."""
    table = comparison.table
    yield ["group", "run", "seed", "rounds", *(column.key for column in table.columns), "left_out", "place"]
    for group, cells in zip(table.groups, table.cells, strict=True):
        for run in group.runs:
            figures = [cell.values.get(run.seed) for cell in cells]
            yield [group.label, run.name, run.seed, run.reached, *figures, "", run.place]
    for run, reason in comparison.grouped.left_out:
        yield ["", run.name, run.seed, run.reached, *([None] * len(table.columns)), reason, run.place]


def curve_rows(groups: Sequence[Group]) -> Iterator[list[object]]:
    """What the plots over rounds show: mean and interval of every metric."""
    yield ["group", "metric", "round", "mean", "low", "high"]
    for group in groups:
        for key in METRICS:
            points = np.transpose(mean_curve(group, metric(key)))
            for number, mean, low, high in points.tolist():
                yield [group.label, key, int(number), mean, low, high]


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"‰": r"\textperthousand{}"}
    return "".join(special.get(character, character) for character in text)
