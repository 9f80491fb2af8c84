"""What runs spend: how much until a value was reached, and how good they were once so much was spent."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.compare.reading import ComparisonError, Run, Series
from cluster.measures import Measure

KILO, MEGA, GIGA, HOUR = 1e3, 1e6, 1e9, 3600.0


@dataclass(frozen=True)
class Cost:
    """One thing that is spent.

    Attributes:
        unit: As it is typed; in lower case a part of its columns' keys.
        shown: As it is shown.
        scale: Of what is stored in one unit.
        metrics: What adds up to it.
    """

    unit: str
    shown: str
    scale: float
    metrics: tuple[str, ...]

    def spent(self, run: Run) -> Series | None:
        """How much so far, where all of it was measured."""
        found = [run.series[metric] for metric in self.metrics if metric in run.series]
        if len(found) < len(self.metrics):
            return None
        first, *others = found
        for other in others:
            rounds, at, at_other = np.intersect1d(first.rounds, other.rounds, return_indices=True)
            first = Series(rounds, first.values[at] + other.values[at_other])
        return first if len(first.rounds) else None

    def to_reach(self, run: Run, selects: Measure, target: float) -> float | None:
        """How much until what selects first was as good as ``target`` on test data; None if never."""
        measured, cost = run.series.get(f"test/{selects.key}"), self.spent(run)
        if measured is None or cost is None:
            return None
        there = measured.rounds[merits(measured, selects) >= selects.merit(target)]
        at = np.flatnonzero(cost.rounds == there[0]) if len(there) else there
        return float(cost.values[at[0]]) if len(at) else None

    def bought(self, run: Run, selects: Measure, budget: float) -> float | None:
        """What selects on test data when it was last measured with at most ``budget`` spent; None if never.

        Of a run that has spent less in all, that is its last value.
        """
        measured, cost = run.series.get(f"test/{selects.key}"), self.spent(run)
        if measured is None or cost is None:
            return None
        affordable = cost.rounds[cost.values <= budget]
        at = np.flatnonzero(np.isin(measured.rounds, affordable))
        return float(measured.values[at[-1]]) if len(at) else None

    def default_budget(self, runs: Iterable[Run]) -> float | None:
        """What the run that spends least spends in all, rounded up to two digits of the unit.

        None where that pays for every run whole, or a run does not say what it spent.
        """
        spent = [None if (own := self.spent(run)) is None else float(own.values[-1]) for run in runs]
        known = [own for own in spent if own is not None]
        if not known or len(known) < len(spent) or min(known) <= 0.0:
            return None
        least = min(known) / self.scale
        step = 10.0 ** (math.floor(math.log10(least)) - 1)
        budget = math.ceil(least / step - 1e-9) * step * self.scale
        return budget if budget < max(known) else None


BYTES = Cost("MB", "MB", MEGA, ("comm/uplink_bytes_total", "comm/downlink_bytes_total"))
HOURS = Cost("h", "simulated h", HOUR, ("time/simulated_s",))
JOULES = Cost("kJ", "kJ", KILO, ("energy/joules_total",))
COSTS = (BYTES, HOURS, JOULES)


def budgets_of(texts: Sequence[str]) -> dict[str, float]:
    """Budgets by unit, as they are stored, from such as ``50MB``.

    Raises:
        ComparisonError: One is none, or two are of one unit.
    """
    scales = {cost.unit: cost.scale for cost in COSTS}
    budgets: dict[str, float] = {}
    for text in texts:
        found = re.fullmatch(rf"([0-9.]+(?:e[0-9]+)?) ?({'|'.join(scales)})", text)
        try:
            value = float(found[1]) if found else 0.0
        except ValueError:
            value = 0.0
        if found is None or not 0.0 < value < math.inf:
            raise ComparisonError(
                f"--budget {text}: expected a number and {', '.join(scales)} (simulated hours), such as 50MB"
            )
        if found[2] in budgets:
            raise ComparisonError(
                f"--budget {text}: there is another one in {found[2]}; name one of each unit"
            )
        budgets[found[2]] = value * scales[found[2]]
    return budgets


def merits(series: Series, measure: Measure) -> np.ndarray:
    """A series with the sign by which better values are larger."""
    return -series.values if measure.better == "lower" else series.values


def budgets_for(runs: Sequence[Run], asked: Mapping[str, float]) -> dict[str, float]:
    """The budgets whose columns there are, by unit: those asked for, else the default of each cost."""
    chosen = {cost.unit: asked.get(cost.unit) if asked else cost.default_budget(runs) for cost in COSTS}
    return {unit: budget for unit, budget in chosen.items() if budget is not None}
