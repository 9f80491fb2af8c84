"""The contest: which groups are worse than the best of those that do the same task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.statistics import SIGNIFICANCE, p_worse_than_best, seeds_to_tell, two_way_error

#: "best": all others are worse; "tied": not distinguishable from the best mean; "worse": worse than the best;
#: "": no verdict, for there is no contest, or too few seeds.
Verdict = Literal["best", "tied", "worse", ""]

#: Difference whose number of seeds is told: points of a share, else percent of the best mean.
POINTS = 3.0


@dataclass(frozen=True)
class Contest:
    """One contest of one figure.

    Attributes:
        places: Which groups compete, by place in the table.
        seeds: Seeds that all of them have.
        most: Seeds of the group that has most.
        verdicts: In order of ``places``.
        p_values: In order of ``places``: adjusted p-values of being worse than the best; NaN without verdict.
        left: How many are not told apart from the best, it included.
        error: Standard deviation beside method and seed, of those that the last test was about; NaN without
            verdict.
        best: The best mean.
    """

    places: tuple[int, ...]
    seeds: int
    most: int
    verdicts: tuple[Verdict, ...]
    p_values: tuple[float, ...]
    left: int
    error: float
    best: float

    def seeds_to_tell(self, difference: float) -> int | None:
        """Seeds that a difference among those of the last test takes, at 80 % power."""
        return seeds_to_tell(difference, self.error, max(2, self.left))


def contest(
    places: Sequence[int], values: Sequence[Mapping[str, float]], better: Literal["higher", "lower"]
) -> Contest | None:
    """Compare groups with the best of them; None where fewer than two compete.

    A group of a single seed has no verdict and keeps none from the others: these are compared over the seeds
    that all of them have, and have no verdict where those are fewer than two.

    Args:
        places: The groups' places in the table.
        values: Their values by seed.
        better: What counts as better.
    """
    if len(places) < 2:
        return None
    most = max(map(len, values))
    chosen = [turn for turn, own in enumerate(values) if len(own) >= 2]
    if len(chosen) < 2:
        chosen = list(range(len(values)))
    seeds = [seed for seed in values[chosen[0]] if all(seed in values[turn] for turn in chosen)]
    competing = tuple(places[turn] for turn in chosen)
    if len(seeds) < 2:
        none: list[Verdict] = [""] * len(chosen)
        unknown = (math.nan,) * len(chosen)
        return Contest(competing, len(seeds), most, tuple(none), unknown, len(chosen), math.nan, math.nan)
    table = np.array([[values[turn][seed] for turn in chosen] for seed in seeds], np.float64)
    if better == "lower":
        table = -table
    p_values = p_worse_than_best(table)
    left = int(np.sum(p_values > SIGNIFICANCE))
    stays: Verdict = "tied" if left > 1 else "best"
    verdicts: list[Verdict] = [stays if p > SIGNIFICANCE else "worse" for p in p_values.tolist()]
    # What the last test was about: those not told apart, or the best and the next one.
    last = np.argsort(-table.mean(0), kind="stable")[: max(2, left)]
    return Contest(
        competing,
        len(seeds),
        most,
        tuple(verdicts),
        tuple(p_values.tolist()),
        left,
        float(two_way_error(table[:, last])),
        abs(float(table.mean(0).max())),
    )
