"""The laptop's accuracy over rounds beside the authors' own curves, drawn from rows of runs.

    python -m tests.benchmarks.laptop docs/results/laptop.csv                # draws docs/laptop.png

A panel for each width: means over seeds, single seeds as points. Dashed, in every panel, what the authors
logged with the full ResNet-18 (width 64, 10 of 100 clients a round, one run, accuracy on 10 clients' own test
images).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cluster.records.plots import COLOURS
from tests.benchmarks.authors_curves import EARLY_CURVES, EARLY_ROUNDS
from tests.benchmarks.results import Row, read

_METHODS = ("fedavg", "sparsyfed", "topk", "zerofl", "flash")
_COLOUR = dict(zip(_METHODS, COLOURS, strict=False))


def draw(rows: Sequence[Row], path: Path) -> Figure:
    """Draw the methods of :data:`_METHODS` and write the picture; rows of other names are left out."""
    rows = [row for row in rows if row.method in _COLOUR and row.accuracy is not None]
    widths = sorted({row.width or 0 for row in rows})
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.6 * len(widths) + 1.3, 3.2), layout="constrained", dpi=150)
        panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
        for panel, width in zip(panels, widths, strict=True):
            mine = [row for row in rows if (row.width or 0) == width]
            _draw_panel(panel, mine)
            seeds = len({row.seed for row in mine})
            panel.set_title(f"width {width}, {seeds} seed{'s' if seeds > 1 else ''}", fontsize=9)
            panel.set_xlabel("round")
        panels[0].set_ylabel("test accuracy (%)")
        panels[0].set_ylim(0)
        lines = [Line2D([], [], color=_COLOUR[m]) for m in _METHODS]
        authors = Line2D([], [], color="#777777", ls="--", lw=1)
        names = [*_METHODS, "authors' logs,\nwidth 64"]
        figure.legend([*lines, authors], names, loc="outside right upper", frameon=False)
    figure.savefig(path)
    return figure


def _draw_panel(panel: Axes, rows: Sequence[Row]) -> None:
    last = max(row.round for row in rows)
    authors = [number for number in EARLY_ROUNDS if number <= last]
    for method in _METHODS:
        mine = [row for row in rows if row.method == method]
        rounds = sorted({row.round for row in mine})
        means = [np.mean([row.accuracy for row in mine if row.round == number]) for number in rounds]
        colour = _COLOUR[method]
        if mine:
            panel.plot([row.round for row in mine], [row.accuracy for row in mine], ".", ms=3, color=colour)
            panel.plot(rounds, means, color=colour)
        if method in EARLY_CURVES:
            curve = EARLY_CURVES[method][: len(authors)]
            panel.plot(authors, curve, "--", color=colour, lw=1, alpha=0.7)
    panel.set_xticks(range(0, last + 1, 5 if last <= 20 else 10))
    panel.grid(color="#d9d9d9", lw=0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture; 2 for a file that holds no rows."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.laptop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="rows of runs; see tests.benchmarks.results")
    parser.add_argument("--output", type=Path, default=Path("docs/laptop.png"))
    options = parser.parse_args(arguments)
    try:
        draw(read(options.file), options.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
