"""The pictures of a comparison, sized and coloured for a column of a paper.

3.4 inches wide, 8 point type, TrueType fonts in the PDF, units on every axis. The colours are those of Okabe
and Ito (2008), which the colour-blind tell apart; line styles and markers tell lines apart without colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cluster.compare.costs import merits
from cluster.compare.curves import Plot, curves
from cluster.compare.endings import endings
from cluster.compare.groups import Group
from cluster.compare.table import selecting
from cluster.measures import Measure
from cluster.records.plots import COLOURS, MARKERS

_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (8, 2, 2, 2)))

#: More lines than this in one picture are a thicket: the best are drawn.
MOST_LINES = 14

_WIDTH, _HEIGHT, _LEGEND_LINE = 3.4, 2.35, 0.155
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture on every machine
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a dollar in a label is a dollar
}


def figures(groups: Sequence[Group]) -> Iterator[tuple[Plot, Figure | None]]:
    """Every picture, one after the other; None where no group has what it shows."""
    drawn = best_of(groups)
    styles = styles_of(drawn)
    for plot in (*curves(selecting(drawn)), *endings(drawn)):
        with rc_context(_STYLE):
            yield plot, _figure(plot, drawn, styles)


def _figure(plot: Plot, groups: Sequence[Group], styles: Sequence[dict[str, Any]]) -> Figure | None:
    figure = Figure()
    axes = figure.subplots()
    if not plot.draw(axes, groups, styles):
        return None
    plot.finish(axes)
    handles, labels = axes.get_legend_handles_labels()
    # Below the axes, where it can hide nothing: as many columns as the longest name allows.
    columns = max(1, min(len(labels), int(_WIDTH / (0.48 + 0.062 * max(map(len, labels))))))
    lines = -(-len(labels) // columns)
    figure.set_size_inches(_WIDTH, _HEIGHT + _LEGEND_LINE * lines)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=2.6
    )
    return figure


def best_of(groups: Sequence[Group]) -> list[Group]:
    """The groups that are drawn, in their order: all, or the :data:`MOST_LINES` best on test data.

    Groups of several objectives take turns: first the best of each.
    """
    if len(groups) <= MOST_LINES:
        return list(groups)
    ranks: dict[int, int] = {}
    for measure in selecting(groups):
        own = [place for place, group in enumerate(groups) if group.runs[0].metrics[:1] == (measure,)]
        own.sort(key=lambda place: -_final_merit(groups[place], measure))
        ranks |= {place: rank for rank, place in enumerate(own)}
    kept = sorted(range(len(groups)), key=lambda place: ranks.get(place, len(groups)))[:MOST_LINES]
    return [groups[place] for place in sorted(kept)]


def _final_merit(group: Group, measure: Measure) -> float:
    key = f"test/{measure.key}"
    finals = [merits(run.series[key], measure)[-1] for run in group.runs if key in run.series]
    return float(np.mean(finals)) if finals else -np.inf


def styles_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A colour a method and a line style for each of its groups; a colour a group if there is one method."""
    methods = list(dict.fromkeys(group.method for group in groups))
    by_method = 1 < len(methods) < len(groups) and len(methods) <= len(COLOURS)
    seen: dict[str, int] = {}
    styles = []
    for place, group in enumerate(groups):
        if by_method:
            colour, turn = methods.index(group.method), seen.get(group.method, 0)
            seen[group.method] = turn + 1
        else:
            colour, turn = place % len(COLOURS), place // len(COLOURS)
        styles.append(
            {
                "color": COLOURS[colour],
                "linestyle": _STYLES[turn % len(_STYLES)] if by_method or turn else "-",
                "marker": MARKERS[(turn if by_method else colour) % len(MARKERS)],
            }
        )
    return styles
