"""Aggregation rules: of which vectors the server takes the mean, where some clients may be out to do harm.

Each rule names vectors whose plain mean, an exact :class:`~algorithms.core.aggregation.Total`, is the result:
FedAvg all updates, a median the middle ones of each coordinate, Krum one client's. So they are as
deterministic as a sum is: updates stand in the order of their clients, and ties go to the lower client.

Median and trimmed mean: Yin et al., ICML 2018, arXiv 1803.01498. Krum: Blanchard et al., NeurIPS 2017, arXiv
1703.02757. Clipping by a norm: Sun et al., 2019, arXiv 1911.07963.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from algorithms.core.aggregation import Total
from algorithms.core.hyperparameters import hyperparameter

_BLOCK = 1 << 14  # coordinates at a time; fixed, so that sums of squares are grouped alike everywhere


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """``mean``: the weighted mean of all updates; nothing of them but their sum is kept."""

    name: ClassVar[str] = "mean"

    #: Whether it looks at every update of a round; clients then weigh the same, as none may buy weight.
    keeps_updates: ClassVar[bool] = False

    def problems(self, cohort: int) -> Iterator[str]:
        """What does not fit rounds of so many clients, a sentence each that begins with the key."""
        yield from ()

    def rows(self, updates: Sequence[np.ndarray], received: np.ndarray, trained: int) -> Sequence[np.ndarray]:
        """The vectors that the server takes the plain mean of, float32 or float64[up_size] each.

        Args:
            updates: What clients sent, in the order of their numbers, float32[up_size] each.
            received: What they would have sent without training, float32[up_size].
            trained: How many of the first positions are trained: distances are those of these alone.
        """
        return updates


@dataclass(frozen=True, kw_only=True)
class _Rule(Aggregation):
    keeps_updates: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Median(_Rule):
    """``median``: of each coordinate the middle value; of an even number the mean of the two middle ones."""

    name: ClassVar[str] = "median"

    def rows(self, updates: Sequence[np.ndarray], received: np.ndarray, trained: int) -> Sequence[np.ndarray]:
        """See :class:`Aggregation`."""
        return _sorted(updates, (len(updates) - 1) // 2)


@dataclass(frozen=True, kw_only=True)
class Trimmed(_Rule):
    """``trimmed``: of each coordinate the mean without the floor(beta m) smallest and largest values."""

    name: ClassVar[str] = "trimmed"

    beta: float = hyperparameter(
        0.2, "share of the updates that is left out at either end", low=0.0, high=0.4999
    )

    def rows(self, updates: Sequence[np.ndarray], received: np.ndarray, trained: int) -> Sequence[np.ndarray]:
        """See :class:`Aggregation`."""
        # 0.29 * 100 is 28.999999999999996.
        return _sorted(updates, math.floor(self.beta * len(updates) + 1e-9))


@dataclass(frozen=True, kw_only=True)
class Krum(_Rule):
    """``krum``: the one update that is nearest to its m - f - 2 nearest others, by squared distances.

    A round that fewer clients answer takes as many others as there are, at least one.
    """

    name: ClassVar[str] = "krum"

    attackers: int = hyperparameter(1, "f: attackers a round that it is made for; 2 f + 3 <= cohort", low=0)

    @property
    def taken(self) -> int:
        """Of how many updates the mean is taken."""
        return 1

    def problems(self, cohort: int) -> Iterator[str]:
        """See :class:`Aggregation`."""
        if cohort < 2 * self.attackers + 3:
            yield (
                f"aggregation.attackers: {self.attackers}, and {self.name} needs a cohort of 2 f + 3 = "
                f"{2 * self.attackers + 3} at least, found cohort: {cohort}"
            )

    def rows(self, updates: Sequence[np.ndarray], received: np.ndarray, trained: int) -> Sequence[np.ndarray]:
        """See :class:`Aggregation`."""
        order = np.argsort(self.scores(updates, trained), kind="stable")
        return [updates[place] for place in order[: self.taken]]

    def scores(self, updates: Sequence[np.ndarray], trained: int) -> np.ndarray:
        """Sum of each one's squared distances to its nearest others, float64[m]; see :class:`Aggregation`."""
        number = len(updates)
        squares = np.zeros((number, number))
        for start in range(0, trained, _BLOCK):
            block = np.stack([update[start : min(start + _BLOCK, trained)] for update in updates])
            block = block.astype(np.float64)
            for one in range(number):
                gaps = block[one] - block[one + 1 :]
                squares[one, one + 1 :] += (gaps * gaps).sum(axis=1)
        squares += squares.T
        nearest = max(1, number - self.attackers - 2)
        np.fill_diagonal(squares, math.inf)
        squares.sort(axis=1)
        return np.where(number > 1, squares[:, : min(nearest, number - 1)].sum(axis=1), 0.0)


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Krum):
    """``multi_krum``: the mean of the q updates with the best scores of ``krum``."""

    name: ClassVar[str] = "multi_krum"

    chosen: int = hyperparameter(2, "q: updates that the mean is taken of, at most cohort - f - 2", low=1)

    @property
    def taken(self) -> int:
        """See :class:`Krum`."""
        return self.chosen

    def problems(self, cohort: int) -> Iterator[str]:
        """See :class:`Aggregation`."""
        yield from super().problems(cohort)
        if self.chosen > max(1, cohort - self.attackers - 2):
            yield (
                f"aggregation.chosen: {self.chosen}, allowed are at most cohort - f - 2 = "
                f"{cohort - self.attackers - 2}"
            )


@dataclass(frozen=True, kw_only=True)
class Clip(_Rule):
    """``clip``: the mean of updates whose distance from the global model is cut to a norm.

    Delta_i min(1, C / |Delta_i|), with Delta_i = w_i - w_t over what is trained; buffers take the plain mean.
    """

    name: ClassVar[str] = "clip"

    norm: float | None = hyperparameter(
        None, "C: largest distance from the global model; null: the median of the round's", above=0.0
    )

    def rows(self, updates: Sequence[np.ndarray], received: np.ndarray, trained: int) -> Sequence[np.ndarray]:
        """See :class:`Aggregation`."""
        distances = [distance(update, received, trained) for update in updates]
        norm = float(np.median(distances)) if self.norm is None else self.norm
        return [
            update if far <= norm else shortened(update, received, trained, norm / far)
            for update, far in zip(updates, distances, strict=True)
        ]


AGGREGATIONS: dict[str, type[Aggregation]] = {
    rule.name: rule for rule in (Aggregation, Median, Trimmed, Krum, MultiKrum, Clip)
}


def settled(total: Total, rows: Sequence[np.ndarray], weights: Sequence[int] | None = None) -> Total:
    """A round's total whose mean is that of ``rows``, on the support that its clients share.

    Args:
        total: The round's.
        rows: What :meth:`Aggregation.rows` gave, none larger than ``total.grid.limit``.
        weights: What each weighs; by default 1.
    """
    zeros = np.zeros((2, len(total.high)))
    fresh = replace(total, high=zeros[0], low=zeros[1], samples=0)
    for row, weight in zip(rows, weights or [1] * len(rows), strict=True):
        fresh.shift(row, weight)
        fresh.samples += weight
    if total.mask_samples is not None:
        fresh.mask_samples = np.where(total.mask_samples > 0, fresh.samples, 0)
    return fresh


def distance(update: np.ndarray, received: np.ndarray, trained: int) -> float:
    """|update - received| over the first ``trained`` positions, in float64 and fixed blocks."""
    square = 0.0
    for start in range(0, trained, _BLOCK):
        block = slice(start, min(start + _BLOCK, trained))
        gaps = update[block].astype(np.float64) - received[block]
        square += float((gaps * gaps).sum())
    return math.sqrt(square)


def shortened(update: np.ndarray, received: np.ndarray, trained: int, share: float) -> np.ndarray:
    """``received`` and ``share`` of the way from there to ``update``, float64; unchanged beyond that."""
    result = update.astype(np.float64)
    base = received[:trained].astype(np.float64)
    result[:trained] = base + share * (result[:trained] - base)
    return result


def _sorted(updates: Sequence[np.ndarray], left_out: int) -> Sequence[np.ndarray]:
    """Each coordinate's values in order, float32[m - 2 left_out, up_size], without those at either end."""
    number, size = len(updates), len(updates[0])
    result = np.empty((number - 2 * left_out, size), updates[0].dtype)
    for start in range(0, size, _BLOCK):
        block = np.stack([update[start : start + _BLOCK] for update in updates])
        block.sort(axis=0)
        result[:, start : start + _BLOCK] = block[left_out : number - left_out]
    return list(result)
