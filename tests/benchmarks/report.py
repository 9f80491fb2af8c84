"""Figures of a benchmark run: a table, a JSON file, and ratios to a stored run."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Figure:
    """One measured number, or the median of several repetitions of it.

    Attributes:
        benchmark: The benchmark's name.
        case: What was measured, such as ``8x8 fedavg cohort 10``.
        metric: Of what, with its unit, such as ``round ms``.
        value: The number; medians unless the metric says otherwise.
        target: What it should not exceed, or None.
        span: The lowest and the highest repetition; None if it was measured once, so that nothing is known of
            its noise.
    """

    benchmark: str
    case: str
    metric: str
    value: float
    target: float | None = None
    span: tuple[float, float] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is a figure of."""
        return self.benchmark, self.case, self.metric


def repeated(figures: Sequence[Figure]) -> list[Figure]:
    """Repetitions of the same figures as one each: their median, with the lowest and the highest."""
    groups: dict[tuple[str, str, str], list[Figure]] = {}
    for figure in figures:
        groups.setdefault(figure.key, []).append(figure)
    found = []
    for group in groups.values():
        values = [figure.value for figure in group]
        span = (min(values), max(values)) if len(values) > 1 else None
        found.append(replace(group[0], value=statistics.median(values), span=span))
    return found


def machine(*, gpu: bool = True) -> dict[str, Any]:
    """What the figures were measured on; asked for the GPU's name, this process becomes one of CUDA's."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if gpu and torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "load": os.getloadavg()[0],
    }


def table(figures: Sequence[Figure]) -> str:
    """One line a case, one column a metric, for each benchmark; ``!`` marks what misses its target."""
    parts = []
    for benchmark in dict.fromkeys(figure.benchmark for figure in figures):
        mine = [figure for figure in figures if figure.benchmark == benchmark]
        metrics = list(dict.fromkeys(figure.metric for figure in mine))
        cells = {(figure.case, figure.metric): _cell(figure) for figure in mine}
        rows = [[benchmark, *metrics]]
        rows += [
            [case, *(cells.get((case, metric), "") for metric in metrics)]
            for case in dict.fromkeys(figure.case for figure in mine)
        ]
        parts.append(_aligned(rows))
    return "\n\n".join(parts)


def write(figures: Sequence[Figure], path: Path) -> None:
    """Store figures and machine as JSON."""
    stored = {"machine": machine(), "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(stored, indent=1) + "\n")


def comparison(figures: Sequence[Figure], path: Path) -> str:
    """Every figure that a stored run has too, as now / then, with both sides' noise.

    The noise of a side is the width of its repetitions over their median. ``*`` marks a ratio that noise does
    not explain: all repetitions of one side lie above all of the other's.
    """
    stored = json.loads(path.read_text())
    then = {figure.key: figure for figure in (Figure(**fields) for fields in stored["figures"])}
    rows = [["case", "metric", "then", "noise", "now", "noise", "ratio", ""]]
    unknown = False
    for figure in figures:
        before = then.get(figure.key)
        if before is None or not before.value:
            continue
        sides = [cell for side in (before, figure) for cell in (_number(side.value), _noise(side))]
        apart = False
        if before.span is None or figure.span is None:
            unknown = True
        else:
            apart = figure.span[0] > before.span[1] or figure.span[1] < before.span[0]
        ratio = f"{figure.value / before.value:.2f}"
        case = f"{figure.benchmark}: {figure.case}"
        rows.append([case, figure.metric, *sides, ratio, "*" if apart else ""])
    about = stored["machine"]
    lines = [f"then: commit {about['commit']}, {about['cores']} x {about['processor']}", _aligned(rows, 2)]
    if any(row[-1] == "*" for row in rows):
        lines.append("* beyond the noise: all repetitions of one side lie above all of the other's")
    if unknown:
        lines.append("without a noise on both sides nothing is marked: store and compare runs of --repeat 3")
    return "\n".join(lines)


def _noise(figure: Figure) -> str:
    if figure.span is None or not figure.value:
        return ""
    return f"{100 * (figure.span[1] - figure.span[0]) / abs(figure.value):.0f}%"


def _cell(figure: Figure) -> str:
    missed = figure.target is not None and figure.value > figure.target
    bound = "" if figure.target is None else f" (<= {figure.target:g})"
    return _number(figure.value) + ("!" if missed else "") + bound


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
