"""Sparsity of every layer after some rounds, by method: which layers a cut empties.

    python -m tests.benchmarks.layers --collect runs/paper-laptop --rounds 1 5 20      # rows, as CSV
    python -m tests.benchmarks.layers docs/results/laptop-layers.csv                  # draws docs/layers.png

A panel a method, means over seeds; the layers in the order of the model.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cluster.compare.reading import find_folders
from cluster.records.plots import COLOURS
from cluster.records.run_folder import RunFolder

NAMES = ("method", "seed", "round", "layer", "sparsity")
Row = tuple[str, int, int, str, float]


def rows_of(folders: Iterable[Path], rounds: Sequence[int]) -> list[Row]:
    """(method, seed, round, layer, percent of zeros) of the finished runs among and below ``folders``."""
    rows: list[Row] = []
    for path in find_folders(folders):
        folder = RunFolder.open(path)
        if folder.result() is None:
            continue
        config = folder.config()
        with (path / "sparsity_per_layer.csv").open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                number = int(line.pop("round"))
                if number in rounds:
                    method = config.algorithm.name
                    rows += [
                        (method, config.seed, number, layer.removesuffix(".weight"), 100 * float(share))
                        for layer, share in line.items()
                    ]
    return rows


def read(path: Path) -> list[Row]:
    """The rows of a file that ``--collect`` printed."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            (r["method"], int(r["seed"]), int(r["round"]), r["layer"], float(r["sparsity"]))
            for r in csv.DictReader(file)
        ]


def draw(rows: Sequence[Row], path: Path) -> Figure:
    """Draw a panel a method and write the picture."""
    methods = list(dict.fromkeys(row[0] for row in rows))
    layers = list(dict.fromkeys(row[3] for row in rows))
    rounds = sorted({row[2] for row in rows})
    with rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2.6 * len(methods) + 0.6, 3.0), layout="constrained", dpi=150)
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for panel, method in zip(panels, methods, strict=True):
            for number, colour in zip(rounds, COLOURS, strict=False):
                means = [
                    np.mean([s for m, _, r, name, s in rows if (m, r, name) == (method, number, layer)])
                    for layer in layers
                ]
                panel.plot(means, ".-", ms=4, lw=1, color=colour, label=f"round {number}")
            panel.set_title(method, fontsize=9)
            panel.set_xticks(range(len(layers)), layers, rotation=90, fontsize=5)
            panel.grid(color="#d9d9d9", lw=0.5)
        panels[0].set_ylabel("zeros in the layer (%)")
        panels[0].set_ylim(0, 102)
        panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(path)
    return figure


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=Path, help="draw these rows")
    source.add_argument("--collect", nargs="+", type=Path, metavar="FOLDER", help="print the rows of runs")
    result.add_argument("--rounds", nargs="+", type=int, default=[1, 5, 20])
    result.add_argument("--output", type=Path, default=Path("docs/layers.png"))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print rows, or draw them."""
    options = parser().parse_args(arguments)
    if options.collect:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(NAMES)
        found = rows_of(options.collect, options.rounds)
        writer.writerows((*row[:4], f"{row[4]:.4g}") for row in found)
    else:
        draw(read(options.file), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
