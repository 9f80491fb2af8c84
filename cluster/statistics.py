"""Statistics of repeated runs: intervals over seeds, paired tests, Holm's correction, best of k trials.

Pure functions of a few numbers. Values of two methods are paired where they come from the same seed: such
runs share partition, cohorts, batch order and initialisation, so their difference varies less than either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t: distribution function and its inverse

#: Largest adjusted p-value at which two methods are called different.
SIGNIFICANCE = 0.05


class Interval(NamedTuple):
    """A mean with the bounds of its confidence interval; NaN bounds where it is of one value."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much one method is above the reference, over paired runs.

    Attributes:
        interval: Mean difference and its 95 % interval.
        p_value: Of the two-sided paired t test; NaN for a single pair.
        adjusted: ``p_value`` by Holm's correction for the number of methods compared.
    """

    interval: Interval
    p_value: float
    adjusted: float

    @property
    def distinguishable(self) -> bool:
        """Whether the test tells the two methods apart after the correction."""
        return self.adjusted <= SIGNIFICANCE


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean and its two-sided Student t interval, mean +- t_(n-1) s / sqrt(n).

    Raises:
        ValueError: There are no values.
    """
    if not len(values):
        raise ValueError("the mean of no values")
    sample = np.asarray(values, np.float64)
    mean = float(sample.mean())
    if len(sample) == 1:
        return Interval(mean, math.nan, math.nan)
    quantile = float(stdtrit(len(sample) - 1, 0.5 + confidence / 2))
    half = quantile * float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return Interval(mean, mean - half, mean + half)


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of the paired t test; 1 where all differences are 0, NaN for fewer than two pairs."""
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if len(differences) < 2:
        return math.nan
    spread, mean = float(differences.std(ddof=1)), float(differences.mean())
    if spread == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    statistic = mean / (spread / math.sqrt(len(differences)))
    return float(2.0 * stdtr(len(differences) - 1, -abs(statistic)))


def welch_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of Welch's t test, for runs that share no seeds; NaN for fewer than two on a side."""
    if min(len(first), len(second)) < 2:
        return math.nan
    samples = [np.asarray(values, np.float64) for values in (first, second)]
    errors = [float(sample.var(ddof=1)) / len(sample) for sample in samples]
    difference = float(samples[0].mean() - samples[1].mean())
    if sum(errors) == 0.0:
        return 1.0 if difference == 0.0 else 0.0
    parts = sum(error**2 / (len(sample) - 1) for error, sample in zip(errors, samples, strict=True))
    freedom = sum(errors) ** 2 / parts
    return float(2.0 * stdtr(freedom, -abs(difference) / math.sqrt(sum(errors))))


def paired_differences(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, Difference]:
    """Every other method against the reference, Holm-corrected together.

    Args:
        values: Each method's values, in one order of seeds for all.
        reference: The method that the others are compared with.

    Raises:
        ValueError: A method has another number of values than the reference.
    """
    base = values[reference]
    others = {name: own for name, own in values.items() if name != reference}
    for name, own in others.items():
        if len(own) != len(base):
            raise ValueError(
                f"{name} has {len(own)} values, {reference} has {len(base)}: they are not paired"
            )
    p_values = [paired_p_value(own, base) for own in others.values()]
    adjusted = holm(p_values)
    return {
        name: Difference(mean_interval([a - b for a, b in zip(own, base, strict=True)]), p, corrected)
        for (name, own), p, corrected in zip(others.items(), p_values, adjusted, strict=True)
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given; NaN (no test) stays and counts as none."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = list(p_values), 0.0
    for rank, (p, index) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        adjusted[index] = highest
    return adjusted


def expected_best(values: Sequence[float]) -> list[float]:
    """Expected maximum of k of n values drawn without replacement, for k = 1 .. n.

    It is the mean of the best-so-far curve over all orders of the trials: the i-th smallest value is the
    maximum of a draw with probability C(i - 1, k - 1) / C(n, k).
    """
    ascending, count = sorted(values), len(values)
    return [
        sum(
            math.comb(place, draws - 1) / math.comb(count, draws) * value
            for place, value in enumerate(ascending)
            if place >= draws - 1
        )
        for draws in range(1, count + 1)
    ]
