"""How values are written: times, shares, amounts, paths."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.measures import Measure

Line = Mapping[str, Any]


def duration(seconds: float | None) -> str:
    """Minutes and seconds, such as 1:05 or 2:00:01; a dash for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float | None) -> str:
    """A share as percent with one digit; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f}%"


def number(value: float | None, form: str) -> str:
    """A number in ``form``; a dash for None."""
    return "-" if value is None else format(value, form)


def megabytes(line: Line, direction: str) -> str:
    """Megabytes so far in one direction, with about three digits."""
    value = line[f"comm/{direction}_bytes_total"] / 1e6
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def amount(value: float, unit: str) -> str:
    """A quantity with two decimals and the decimal prefix that fits, such as 12.40 MB."""
    step = next((step for step in range(6) if value < 1000.0 ** (step + 1)), 6)
    return f"{value / 1000.0**step:.2f} {('', 'k', 'M', 'G', 'T', 'P', 'E')[step]}{unit}"


def shown(path: Path) -> str:
    """A path as a user would type it here."""
    absolute = path.absolute()
    near = absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute
    return shlex.quote(str(near))


def evaluated(line: Line, selects: Measure) -> float | None:
    """What selects in a round's line, on test data where that is read; None where nothing was evaluated."""
    value: float | None = line.get(f"test/{selects.key}", line.get(f"val/{selects.key}"))
    return value


def fitting(widths: Sequence[int], wanted: Sequence[int], room: int) -> list[int]:
    """Which of some columns fit side by side, in the order in which they stand; the most wanted always.

    Args:
        widths: Of each column.
        wanted: Places of columns, the most wanted first; the first that does not fit ends it, as what follows
            is wanted less.
        room: Width of the terminal.
    """
    kept: list[int] = []
    for place in wanted:
        if place < len(widths):
            if kept and widths[place] > room:
                break
            kept.append(place)
            room -= widths[place]
    return sorted(kept)
