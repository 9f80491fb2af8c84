"""Totals of a round: sums of client updates that do not depend on who adds them, or in which order.

Floating-point sums depend on grouping. Here each term ``n_i * w_i`` is first rounded to a grid common to
the round, in two levels (error-free pre-rounding, Demmel and Nguyen, "Fast reproducible floating-point
summation", ARITH 2013); sums of grid points are exact in float64, so any grouping over actors gives the
same bits.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from algorithms.core.parameters import ParameterLayout

#: An update may hold values up to this many times the largest magnitude of the global model. Beyond it a
#: client has diverged, and its update is refused like a non-finite one.
GROWTH_LIMIT = 2.0**20

#: The same on a grid of one word, where every doubling costs a bit: values beyond it are clamped.
WORD_GROWTH_LIMIT = 2.0**4

_BLOCK = 1 << 14  # floats a block: the temporaries of one block stay in the cache


@dataclass(frozen=True)
class Grid:
    """The round's common grid: two float64 levels, or multiples of the unit of one word of k bits.

    On a grid of words a client itself multiplies, rounds and clamps (:meth:`words`), and any sum of a round
    is a whole number of units below 2**(k-1): it can be taken modulo 2**k.

    Attributes:
        limit: Largest magnitude of a value that may be added.
        samples: Upper bound of the sum of all n_i, hence of the number of terms.
        bits: Bits k of the word; None for the two levels.
    """

    limit: float
    samples: int
    bits: int | None = None

    @classmethod
    def for_round(cls, global_weights: np.ndarray, samples: int, bits: int | None = None) -> Grid:
        """The grid for updates of ``global_weights`` by clients with ``samples`` samples together.

        The resolution of two levels is about 2**-60 of the largest global weight: finer than float32 by far.
        A word leaves k - 5 bits, less those of ``samples``, below the largest global weight.
        """
        largest = float(np.abs(global_weights).max(initial=0.0))
        exponent = math.ceil(math.log2(largest)) if largest > 0 else 0
        growth = GROWTH_LIMIT if bits is None else WORD_GROWTH_LIMIT
        return cls(growth * 2.0**exponent, max(1, samples), bits)

    @classmethod
    def most_samples(cls, bits: int) -> int:
        """The samples of a cohort of whose largest global weight a word still holds the unit."""
        return int(2.0 ** (bits - 1) / WORD_GROWTH_LIMIT) - 1

    def words(self, values: np.ndarray, samples: int) -> tuple[np.ndarray, int]:
        """n_i w_i in whole units of one word, int64[n], and how many values were clamped to the limit.

        Args:
            values: float32[n].
            samples: n_i.

        Raises:
            OverflowError: A value is not finite.
        """
        if not np.isfinite(values).all():
            raise OverflowError("a value is not finite")
        terms = values.astype(np.float64)
        clamped = int(np.count_nonzero(np.abs(terms) > self.limit))
        np.clip(terms, -self.limit, self.limit, out=terms)
        terms *= samples
        high, low = self.integers(terms)
        return high * self.ratio + low, clamped

    def check(self, values: np.ndarray) -> None:
        """That ``values``, float32[n], may be added.

        Raises:
            OverflowError: One is not finite or exceeds the limit.
        """
        _check_limit(values, self.limit)

    def integers(self, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Float64 ``terms`` as whole numbers of coarse and of fine units, int64[n] each; they are used up."""
        high, low = self.split(terms)
        coarse, fine = self.units
        return (high / coarse).astype(np.int64), (low / fine).astype(np.int64)

    def parts(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whole units of one word, int64[n], as (high, low), float64[n] each: their sum without rounding."""
        coarse, fine = self.units
        high = words // self.ratio
        return high * coarse, (words - high * self.ratio) * fine

    def values(self, words: np.ndarray, samples: int) -> np.ndarray:
        """What :meth:`words` were made of, as near as they tell, float32[n]."""
        high, low = self.parts(words)
        return ((high + low) / samples).astype(np.float32)

    @cached_property
    def ratio(self) -> int:
        """Fine units of a coarse one."""
        return int(self.units[0] / self.units[1])

    def split(self, terms: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Round float64 ``terms`` to (high, low), multiples of the coarse and of the fine unit.

        Args:
            terms: float64[n]; the low parts take their place.
            out: float64[n] for the high parts.
        """
        coarse, fine = self._constants
        high = np.add(terms, coarse, out=out)
        high -= coarse
        terms -= high
        terms += fine
        terms -= fine
        return high, terms

    @cached_property
    def _constants(self) -> tuple[float, float]:
        # Adding 1.5 * 2**52 units rounds a float64 to a whole number of units.
        coarse, fine = self.units
        return 1.5 * 2.0**52 * coarse, 1.5 * 2.0**52 * fine

    @cached_property
    def units(self) -> tuple[float, float]:
        """The coarse and the fine unit; a word counts fine ones."""
        if self.bits is not None:
            # |sum of terms| < 2**bits, as samples < 2**samples.bit_length(): no sum is 2**(k-1) units.
            bits = math.ceil(math.log2(self.limit)) + self.samples.bit_length()
            unit = 2.0 ** (bits + 1 - self.bits)
            return max(unit, 2.0 ** (bits - 51)), unit
        # The coarse unit is chosen so that |sum of terms| <= 2**51 units; what is left of a term is at most
        # half a coarse unit.
        bits = math.ceil(math.log2(self.limit * self.samples)) + 1
        coarse_unit = 2.0 ** (bits - 52)
        rest_bits = math.ceil(math.log2(coarse_unit * self.samples)) + 1
        return coarse_unit, 2.0 ** (rest_bits - 52)


@dataclass
class Total:
    """What a set of updates adds up to. A monoid: ``Total.zero``, ``fold`` one update, ``merge`` two totals.

    Attributes:
        grid: The round's common grid.
        high: Coarse parts of sum n_i w_i, float64[up_size].
        low: Fine parts of sum n_i w_i, float64[up_size].
        votes: Number of updates whose support holds a prunable position, int32[prunable]; empty where that
            was hidden.
        layer_counts: sum n_i |support_i in layer l|, int64[prunable layers].
        mask_samples: sum n_i m_i over the prunable span, int64[prunable], or, where clients hold parts of the
            model, over the trained span, int64[trained]; only kept for masked means.
        marked: sum n_i over the positions that clients name beside their updates, int64[prunable]; only kept
            where a method asks for it.
        samples: sum n_i.
        clients: Indices of the clients folded in, ascending.
        updates: Every update by client, ascending, float32[up_size], read-only, and its n_i; only kept where
            a method asks for it.
        unclipped: Updates that were within the clip, where there is one: ``algorithms.core.clipping``.
    """

    grid: Grid
    high: np.ndarray
    low: np.ndarray
    votes: np.ndarray
    layer_counts: np.ndarray
    mask_samples: np.ndarray | None
    samples: int = 0
    clients: list[int] = field(default_factory=list)
    updates: dict[int, tuple[np.ndarray, int]] | None = None
    marked: np.ndarray | None = None
    unclipped: int = 0

    @classmethod
    def zero(
        cls,
        grid: Grid,
        layout: ParameterLayout,
        *,
        masked: bool = False,
        updates: bool = False,
        parts: bool = False,
        marks: bool = False,
    ) -> Total:
        """The total of no update.

        Args:
            grid: The round's common grid.
            layout: The model's layout.
            masked: Keep what a masked mean divides by.
            updates: Keep each update.
            parts: Keep what a masked mean over all of the trained span divides by.
            marks: Keep what positions clients name beside their updates.
        """
        counted = layout.trained_size if parts else layout.prunable_size
        return cls(
            grid,
            np.zeros(layout.up_size),
            np.zeros(layout.up_size),
            np.zeros(layout.prunable_size, np.int32),
            np.zeros(len(layout.prunable), np.int64),
            np.zeros(counted, np.int64) if masked or parts else None,
            updates={} if updates else None,
            marked=np.zeros(layout.prunable_size, np.int64) if marks else None,
        )

    def fold(
        self,
        client: int,
        values: np.ndarray,
        support: np.ndarray | None,
        samples: int,
        layout: ParameterLayout,
        positions: np.ndarray | None = None,
        marks: np.ndarray | None = None,
    ) -> None:
        """Add one client's update.

        Args:
            client: Index of the client.
            values: float32[up_size], 0 outside the support, or int64[up_size] of :meth:`Grid.words`.
            support: bool[prunable], or bool[trained] of a client that holds a part of the model; None when
                everything was sent.
            samples: n_i, the number of samples the client trained on.
            layout: The model's layout.
            positions: Where ``support`` is true, in order, if that is known already.
            marks: Positions that the client names beside it, bool[prunable], or None.

        Raises:
            OverflowError: A value is not finite or exceeds ``grid.limit``; nothing was added.
        """
        spoken = layout.prunable_size if support is None else len(support)
        if support is None:
            self._check(values, samples)
            self._add(slice(0, spoken), values[:spoken], samples)
            self.votes += 1
            self.layer_counts += [samples * entry.size for entry in layout.prunable]
            if self.mask_samples is not None:
                self.mask_samples += samples
        else:
            positions = np.flatnonzero(support) if positions is None else positions
            kept = values[positions]
            self._check(kept, samples)
            self._check(values[spoken:], samples)
            high, low = self._parts(kept, samples)
            _add_at(self.high, positions, high)
            _add_at(self.low, positions, low)
            self.votes += support[: layout.prunable_size]
            edges = np.searchsorted(positions, [0] + [entry.stop for entry in layout.prunable])
            self.layer_counts += samples * np.diff(edges)
            if self.mask_samples is not None:
                _add_at(self.mask_samples, positions, np.full(len(positions), samples))
                self.mask_samples[spoken:] += samples
        self._add(slice(spoken, layout.up_size), values[spoken:], samples)
        if self.marked is not None and marks is not None:
            self.marked[marks] += samples
        self.samples += samples
        insort(self.clients, client)
        if self.updates is not None:
            own = self.grid.values(values, samples) if values.dtype == np.int64 else values.copy()
            own.flags.writeable = False  # as out of the object store
            self.updates = dict(sorted({**self.updates, client: (own, samples)}.items()))

    def shift(self, values: np.ndarray, samples: int) -> None:
        """Add ``samples * values`` to what was folded, without counting an update.

        Args:
            values: float32[n] for the first n positions, none larger than ``grid.limit``.
            samples: The n_i of the update that is moved.

        Raises:
            OverflowError: A value is not finite or exceeds ``grid.limit``; nothing was added.
        """
        if not np.abs(values).max(initial=0.0) <= self.grid.limit:
            raise OverflowError(f"a value is not finite or exceeds {self.grid.limit:.3g}")
        self._add(slice(0, len(values)), values, samples)

    def merge(self, other: Total) -> Total:
        """Add ``other`` to this total, in place."""
        self.high += other.high
        self.low += other.low
        self.votes += other.votes
        if self.mask_samples is not None and other.mask_samples is not None:
            self.mask_samples += other.mask_samples
        if self.marked is not None and other.marked is not None:
            self.marked += other.marked
        return self.merge_rest(other)

    def merge_rest(self, other: Total) -> Total:
        """Add what ``other`` holds beside its entries a position, in place."""
        self.layer_counts += other.layer_counts
        self.samples += other.samples
        self.unclipped += other.unclipped
        self.clients = sorted(self.clients + other.clients)
        if self.updates is not None and other.updates is not None:
            self.updates = dict(sorted({**self.updates, **other.updates}.items()))
        return self

    def copy(self) -> Total:
        """The same in arrays of its own: those out of the object store are read-only."""
        arrays: dict[str, Any] = {
            n: own.copy() for n, own in vars(self).items() if isinstance(own, np.ndarray)
        }
        return replace(self, **arrays, clients=list(self.clients))

    @property
    def held(self) -> np.ndarray:
        """Prunable positions that some update holds, bool[prunable]."""
        if len(self.votes):
            return self.votes > 0
        assert self.mask_samples is not None
        return self.mask_samples > 0

    def mean(self) -> np.ndarray:
        """sum n_i w_i / sum n_i, float32[up_size]: an absent weight counts as 0."""
        return ((self.high + self.low) / self.samples).astype(np.float32)

    def masked_mean(self) -> np.ndarray:
        """sum n_i m_i w_i / sum n_i m_i where holders are counted (0 where there is none), else the mean."""
        if self.mask_samples is None:
            raise ValueError("this total was not kept for a masked mean")
        result = self.mean()
        counted = len(self.mask_samples)
        summed = self.high[:counted] + self.low[:counted]
        result[:counted] = (summed / np.maximum(self.mask_samples, 1)).astype(np.float32)
        return result

    def _check(self, values: np.ndarray, samples: int) -> None:
        limit = self.grid.limit
        if values.dtype == np.int64:  # whole units of n_i w_i; no device that clamps sends more
            limit = samples * limit / self.grid.units[1]
        _check_limit(values, limit)

    def _parts(self, values: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """n_i w_i on the grid, float64[n] each."""
        if values.dtype == np.int64:
            return self.grid.parts(values)
        terms = values.astype(np.float64)
        terms *= samples
        return self.grid.split(terms)

    def _add(self, span: slice, values: np.ndarray, samples: int) -> None:
        highs, lows = self.high[span], self.low[span]
        if values.dtype == np.int64:
            high, low = self.grid.parts(values)
            highs += high
            lows += low
            return
        terms, out = np.empty((2, min(_BLOCK, len(values))))
        for start in range(0, len(values), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(values)))
            part = terms[: block.stop - start]
            part[:] = values[block]
            part *= samples
            high, low = self.grid.split(part, out[: len(part)])
            highs[block] += high
            lows[block] += low


def _check_limit(values: np.ndarray, limit: float) -> None:
    # NaN fails the comparison too.
    if len(values) and not (values.max() <= limit and values.min() >= -limit):
        raise OverflowError(f"a value is not finite or exceeds {limit:.3g}")


def _add_at(sums: np.ndarray, positions: np.ndarray, terms: np.ndarray) -> None:
    """``sums[positions] += terms`` for distinct positions, in one pass where numpy makes two."""
    torch.from_numpy(sums).scatter_add_(0, torch.from_numpy(positions), torch.from_numpy(terms))
