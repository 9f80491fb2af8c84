"""Statistics of repeated runs: intervals, comparisons with the best, paired tests, best of k trials.

Pure functions of a few numbers. Values of methods are matched where they come from the same seed: such runs
share cohorts, batch order and initialisation, so their differences vary less than they do themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit  # Student's t: (noncentral) distribution, its inverse

#: Largest adjusted p-value at which two methods are called different.
SIGNIFICANCE = 0.05

#: Rounding errors relative to the largest value, which are no differences.
_ROUNDING = 1e-12


class Interval(NamedTuple):
    """A mean with the bounds of its confidence interval; NaN bounds where it is of one value."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much one method is above the reference, over paired runs.

    Attributes:
        interval: Mean difference and its interval at the level at which Holm's procedure tests it: it leaves
            out 0 exactly where ``distinguishable``.
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
    # Holm's procedure tests the smallest p-value at 5 % over the number of tests, the next at 5 % over one
    # fewer, and stops at the first that fails: those left are judged at the level of that one.
    rejected = sum(p <= SIGNIFICANCE for p in adjusted)
    ranks = {index: rank for rank, index in enumerate(sorted(range(len(p_values)), key=adjusted.__getitem__))}
    found = {}
    for index, ((name, own), p, corrected) in enumerate(zip(others.items(), p_values, adjusted, strict=True)):
        level = SIGNIFICANCE / (len(p_values) - min(ranks[index], rejected))
        interval = mean_interval([a - b for a, b in zip(own, base, strict=True)], 1.0 - level)
        found[name] = Difference(interval, p, corrected)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given; NaN (no test) stays and counts as none."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = list(p_values), 0.0
    for rank, (p, index) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        adjusted[index] = highest
    return adjusted


def two_way_error(values: np.ndarray) -> np.ndarray:
    """Standard deviation of one value beside what its method and its seed explain, pooled over methods.

    The root of the residual mean square of the two-way layout, with (methods - 1) (seeds - 1) degrees of
    freedom. The mean of a difference between two methods has the standard error sqrt(2 / seeds) times it.

    Args:
        values: float64[..., seeds, methods], at least two of each.

    Returns:
        float64[...].
    """
    seeds, methods = values.shape[-2:]
    effects = values.mean(-1, keepdims=True) + values.mean(-2, keepdims=True)
    left = values - effects + values.mean((-2, -1), keepdims=True)
    return np.sqrt((left**2).sum((-2, -1)) / ((seeds - 1) * (methods - 1)))


def p_worse_than_best(values: np.ndarray) -> np.ndarray:
    """Multiple comparisons with the best, the seeds as blocks: adjusted p-values of "it is not the best".

    Step down: while several methods are left, the gap between the highest and the lowest mean is tested
    against the two-way error of those left, and if it is significant the lowest method is out. A gap is
    significant where it exceeds Scheffe's bound for any contrast of m means with the degrees of freedom that
    Box (1954) and Geisser and Greenhouse (1958) show to suffice whatever the covariance of the errors::

        gap > t_(seeds - 1)(1 - alpha / 2) sqrt(m - 1) error sqrt(2 / seeds)

    So the methods that are truly the best (or equal) all stay with probability 95 %, also where methods vary
    unequally or answer to a seed differently, as a poor method does to a hard partition. Hsu's (1984)
    critical values for the same question take equal variances for granted, and count a method called worse
    among equals as no error. For two methods it is the paired t test. The elimination is that of a model
    confidence set (Hansen, Lunde and Nason, 2011).

    Args:
        values: float64[..., seeds, methods], higher is better, at least two seeds and two methods.

    Returns:
        float64[..., methods]: the method is worse than the best at the level alpha where it is at most alpha;
        1 for the highest mean.
    """
    seeds, methods = values.shape[-2:]
    means = values.mean(-2)
    order = np.argsort(means, -1, kind="stable")
    ranked = np.take_along_axis(values, order[..., None, :], -1)
    heights = np.take_along_axis(means, order, -1)
    rounding = _ROUNDING * np.abs(values).max((-2, -1))
    in_order = np.ones(means.shape)
    highest = np.zeros(means.shape[:-1])
    for out in range(methods - 1):
        error = two_way_error(ranked[..., out:])
        error = np.where(error > rounding, error, 0.0)
        gap = heights[..., -1] - heights[..., out]
        gap = np.where(gap > rounding, gap, 0.0)
        scale = error * math.sqrt(2.0 * (methods - out - 1) / seeds)
        statistic = np.divide(gap, scale, out=np.where(gap > 0, np.inf, 0.0), where=scale > 0)
        highest = np.maximum(highest, 2.0 * stdtr(seeds - 1, -statistic))
        in_order[..., out] = highest
    p_values = np.empty(means.shape)
    np.put_along_axis(p_values, order, in_order, -1)
    return p_values


def seeds_to_tell(difference: float, error: float, methods: int, power: float = 0.8) -> int | None:
    """Seeds with which :func:`p_worse_than_best` finds one of so many methods worse by ``difference``.

    Args:
        difference: Between its mean and another's, above 0.
        error: Of the two-way layout, the same for all methods; see :func:`two_way_error`.
        methods: How many are compared.
        power: How often it is to be found.

    Returns:
        At least 2; None where a thousand are too few.
    """
    seeds = np.arange(2, 1001)
    bound = stdtrit(seeds - 1, 1.0 - SIGNIFICANCE / 2) * math.sqrt(methods - 1)
    shift = difference / max(error, _ROUNDING * difference) * np.sqrt(seeds / 2)
    found = 1.0 - nctdtr((methods - 1) * (seeds - 1), np.minimum(shift, 1e3), bound)
    enough = np.flatnonzero((found >= power) | (shift > 1e3))
    return int(seeds[enough[0]]) if len(enough) else None


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
