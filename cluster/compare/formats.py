"""A comparison as text: for a terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cluster.compare.contest import POINTS, Contest, Verdict
from cluster.compare.curves import mean_curve, metric
from cluster.compare.groups import Group
from cluster.compare.reading import read_of
from cluster.compare.table import Cell, Column, Comparison, Table, selecting
from cluster.measures import Measure

if TYPE_CHECKING:
    from rich.console import Console

#: How verdicts look where there is no bold type.
SIGNS: dict[Verdict, str] = {"best": " *", "tied": " †", "worse": " ↓", "": ""}

#: What the verdicts mean, without their signs.
MEANINGS: dict[Verdict, str] = {
    "best": "the best: all it competes with are worse",
    "tied": "not distinguishable from the best mean",
    "worse": "worse than the best",
}

#: Verdicts in CSV files.
WORDS: dict[Verdict, str] = {"best": "best", "tied": "not distinguishable", "worse": "worse", "": ""}

#: Sign of a figure that was measured by an older rule than others of its column, and what it means.
OUTDATED, OUTDATED_MEANING = " ≠", "measured by an older or unknown rule: not to be compared with the others"

#: The test in one line.
TEST = (
    "Verdicts: multiple comparisons with the best, seeds as blocks, 5 % for all groups of a contest together"
)

#: How the figures came about, below every table.
METHOD_NOTE = (
    "Mean ± half of the 95 % interval (Student's t) over seeds; an interval that rounds to 0 is not shown. "
    "Groups compete on the same data, objective, partition and model at the same target sparsity and number "
    "of rounds. "
    f"{TEST}: while the worst mean lies off the best by more than Scheffé's bound, with the error "
    "pooled over those left and degrees of freedom that suffice for unequal variances, it is worse and out. "
    "Only seeds that all of them have count; a single seed gives no verdict. Intervals are of one mean each: "
    "those of two groups may overlap although their differences, seed by seed, tell them apart."
)

#: Columns that fit a terminal, beside what selects, and rows that anyone reads there.
_ON_A_TERMINAL = frozenset(
    {
        "worst_decile",
        "sparsity",
        "uplink_mb",
        "downlink_mb",
        "mb_to_target",
        "for_mb",
        "for_h",
        "for_kj",
        "regrowth",
        "client_cut",
        "consensus",
    }
)
_MOST_ROWS, _LABEL_WIDTH, _MOST_CONTESTS = 40, 24, 6


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the table's main columns, its verdicts and what they rest on, and which runs were left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawn

    columns = comparison.table.columns
    kept = _ON_A_TERMINAL | {measure.key for measure in selecting(comparison.table.groups)}
    table = comparison.table.only([place for place, column in enumerate(columns) if column.key in kept])
    drawn = Drawn(title=comparison.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("group", min_width=min(_LABEL_WIDTH, max(len(group.label) for group in table.groups)))
    for column in table.columns:
        drawn.add_column(column.header, justify="right")
    rows = text_rows(table, plus_minus="±")
    for row in rows[1 : 1 + _MOST_ROWS]:
        drawn.add_row(row[0], *(re.sub(r" ([*†↓≠])", r"\1", cell) for cell in row[2:]))
    console.print(drawn)
    if len(table.groups) > _MOST_ROWS:
        console.print(f"and {len(table.groups) - _MOST_ROWS} more groups in table.csv")
    for line in [*legend(table), *([f"{TEST}."] if table.verdicts else []), *findings(table)]:
        console.print(line, soft_wrap=True)
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
    """Header and one row a group; verdicts as signs."""
    rows = [["group", "seeds", *(column.header for column in table.columns)]]
    for group, cells in zip(table.groups, table.cells, strict=True):
        seeds = len(group.runs)
        texts = [
            cell_text(cell, column, seeds, plus_minus) + SIGNS[cell.verdict] + OUTDATED * cell.outdated
            for cell, column in zip(cells, table.columns, strict=True)
        ]
        rows.append([group.label, str(seeds), *texts])
    return rows


def legend(table: Table) -> list[str]:
    """One line a sign that the table has."""
    lines = [
        f"{SIGNS[verdict].strip()} {MEANINGS[verdict]}" for verdict in MEANINGS if verdict in table.verdicts
    ]
    if any(cell.outdated for row in table.cells for cell in row):
        lines.append(f"{OUTDATED.strip()} {OUTDATED_MEANING}")
    return lines


def findings(table: Table) -> list[str]:
    """What the verdicts on what selects rest on, a line a contest, and which measures' rules differ."""
    contests = table.contests
    lines = [_finding(table, measure, contest) for measure, contest in contests[:_MOST_CONTESTS]]
    if len(contests) > _MOST_CONTESTS:
        what = ", ".join(dict.fromkeys(measure.title for measure, _ in contests))
        lines.append(f"and {len(contests) - _MOST_CONTESTS} more contests of {what}")
    return lines + table.differing_rules


def _finding(table: Table, measure: Measure, contest: Contest) -> str:
    labels = [table.groups[place].label for place in contest.places]
    who = measure.title[:1].upper() + measure.title[1:]
    who += "" if len(table.contests) == 1 else " of " + _some(labels)
    if math.isnan(contest.error):
        shared = f"{contest.seeds} common seed" + ("s" if contest.seeds != 1 else "")
        return f"{who}: no verdict, which takes two seeds that all {len(labels)} groups have; found {shared}"
    over = f"the {contest.seeds} seeds" + (f" of {contest.most}" if contest.seeds < contest.most else "")
    what = f"the {contest.left} not told apart" if contest.left > 1 else "the best and the next"
    points = measure.unit == "share"
    difference = POINTS if points else POINTS / 100 * contest.best
    needed, unit = contest.seeds_to_tell(difference), " points" if points else ""
    text = (
        f"{who}: {len(labels)} groups over {over} in common. A difference of {difference:.3g}{unit} between"
    )
    takes = "takes more than a thousand" if needed is None else f"takes about {needed}"
    return f"{text} {what} {takes} seeds to tell (80 % power, error {contest.error:.2g}{unit})"


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
    return ", ".join(labels[:2]) + more


def markdown(table: Table) -> str:
    """A table of Markdown with its legend."""
    rows = [[cell.replace("|", "\\|").replace(" *", " \\*") for cell in row] for row in text_rows(table)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    notes = [line.replace("*", "\\*") for line in [*legend(table), *findings(table)]]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes), METHOD_NOTE]) + "\n"


def latex(table: Table) -> str:
    """A table for the booktabs package: the best in bold, a dagger where it is not distinguishable."""
    signs: dict[Verdict, str] = {"best": "Bold", "tied": r"$^\dagger$", "worse": r"$\downarrow$"}
    notes = [f"{signs[verdict]}: {MEANINGS[verdict]}." for verdict in MEANINGS if verdict in table.verdicts]
    notes += [_escaped(line) for line in findings(table)]
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
            text += r" $\neq$" if cell.outdated else ""
            shown = {"best": rf"\textbf{{{text}}}", "tied": rf"{text}$^\dagger$"}
            shown["worse"] = rf"{text}$\downarrow$"
            row.append(shown.get(cell.verdict, text))
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


def number_rows(table: Table) -> Iterator[list[object]]:
    """The table unrounded, one row a group and figure."""
    yield ["group", "figure", "unit", "seeds", "mean", "low", "high", "verdict", "adjusted_p", "rule"]
    for group, cells in zip(table.groups, table.cells, strict=True):
        for cell, column in zip(cells, table.columns, strict=True):
            interval = cell.interval or (None, None, None)
            yield [
                *(group.label, column.key, column.header, len(cell.values), *interval),
                *(WORDS[cell.verdict], cell.adjusted, "outdated" if cell.outdated else ""),
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
        for key in read_of(group.runs[0].metrics):
            points = np.transpose(mean_curve(group, metric(key)))
            for number, mean, low, high in points.tolist():
                yield [group.label, key, int(number), mean, low, high]


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"‰": r"\textperthousand{}"}
    return "".join(special.get(character, character) for character in text)
