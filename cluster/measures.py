"""What is measured, and how it is read: its name, its unit, whether more of it is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What counts as better; None where it is no contest.
Better = Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        key: Its name, as in ``accuracy``.
        title: The same in words.
        unit: ``share`` (of 1, shown in percent), ``bytes``, ``FLOP``, ``s`` ...; empty for a plain number.
        meaning: One sentence.
        better: What counts as better.
    """

    key: str
    title: str
    unit: str
    meaning: str
    better: Better = None

    def merit(self, value: float) -> float:
        """``value`` with a sign by which the better one is the larger one."""
        return -value if self.better == "lower" else value
