"""Totals: the same bits for any grouping and order, exact sums, refusals, counts worked by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from algorithms import Entry, Grid, ParameterLayout, Total


def _layout(*prunable: int, other: int = 0, buffers: int = 0) -> ParameterLayout:
    start, entries = 0, []
    for index, size in enumerate(prunable):
        entries.append(Entry(f"layer{index}.weight", (size,), start, start + size))
        start += size
    rest = (Entry("bias", (other,), start, start + other),) if other else ()
    floats = (Entry("mean", (buffers,), start + other, start + other + buffers),) if buffers else ()
    return ParameterLayout(tuple(entries), rest, floats)


LAYOUT = _layout(4, 5, other=2, buffers=1)


def _bits(total: Total) -> tuple[bytes, ...]:
    arrays = [total.high, total.low, total.votes, total.layer_counts, total.mean()]
    if total.mask_samples is not None:
        arrays += [total.mask_samples, total.masked_mean()]
    # Adding 0.0 makes -0.0 and 0.0 one: where nobody has a weight, the sign of zero carries nothing.
    return tuple((array + 0).tobytes() for array in arrays)


@st.composite
def _rounds(draw):
    """Updates of a round as clients make them: float32 values over many magnitudes, some of them sparse."""
    scale = 2.0 ** draw(st.integers(-20, 20))
    # Between 2^-30 and 2^10 times the largest global weight: beyond float32's own precision on both sides.
    magnitude = st.floats(-1.0, 1.0, width=32).flatmap(
        lambda m: st.integers(-30, 10).map(lambda e: m * 2.0**e * scale)
    )
    clients = draw(st.integers(1, 6))
    updates = []
    for client in range(clients):
        values = np.array(draw(st.lists(magnitude, min_size=12, max_size=12)), np.float32)
        support = None
        if draw(st.booleans()):
            support = np.array(draw(st.lists(st.booleans(), min_size=9, max_size=9)))
            values[:9][~support] = 0.0
        updates.append((client, values, support, draw(st.integers(1, 700))))
    return scale, updates


def _fold(grid: Grid, updates, *, masked: bool = True) -> Total:
    total = Total.zero(grid, LAYOUT, masked=masked)
    for client, values, support, samples in updates:
        total.fold(client, values, support, samples, LAYOUT)
    return total


# Shrinking a failure takes minutes; the seeded test below is the one to debug with.
@given(_rounds(), st.randoms(use_true_random=False), st.integers(1, 6))
@settings(max_examples=80, deadline=None, phases=[Phase.generate])
def test_any_grouping_and_any_order_give_the_same_bits(drawn, random, groups):
    scale, updates = drawn
    grid = Grid.for_round(np.full(12, scale, np.float32), sum(u[3] for u in updates))
    expected = _bits(_fold(grid, updates))
    shuffled = random.sample(updates, len(updates))
    parts = [_fold(grid, shuffled[g::groups]) for g in range(groups)]
    random.shuffle(parts)
    merged = Total.zero(grid, LAYOUT, masked=True)
    for part in parts:
        merged.merge(part)
    assert _bits(merged) == expected
    assert sorted(merged.clients) == [u[0] for u in updates]
    assert merged.samples == sum(u[3] for u in updates)


@pytest.mark.parametrize("seed", range(3))
def test_any_grouping_gives_the_same_bits_over_many_magnitudes(seed):
    rng = np.random.default_rng(seed)
    layout = _layout(2000, other=100)
    values = rng.normal(size=(10, 2100)) * 2.0 ** rng.integers(-60, 10, size=(10, 2100))
    updates = values.astype(np.float32)
    supports = [None if client % 3 == 0 else rng.random(2000) < 0.7 for client in range(10)]
    sizes = rng.integers(1, 700, size=10)
    grid = Grid.for_round(np.ones(1, np.float32), int(sizes.sum()))

    def added(groups):
        merged = Total.zero(grid, layout, masked=True)
        for group in groups:
            part = Total.zero(grid, layout, masked=True)
            for client in group:
                part.fold(client, updates[client], supports[client], int(sizes[client]), layout)
            merged.merge(part)
        return _bits(merged)

    assert added([range(10)]) == added([[9, 3], [0, 7, 1], [8], [4, 2, 6, 5]])
    assert added([range(10)]) == added([[client] for client in rng.permutation(10)])


def _round_to_float32(value: Fraction) -> np.float32:
    """The nearest float32, ties to even, by comparing exact distances to the neighbours."""
    near = np.float32(float(value))
    candidates = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    even = [int(c.view(np.uint32)) & 1 for c in candidates]
    return min(
        zip(candidates, even, strict=True), key=lambda pair: (abs(Fraction(float(pair[0])) - value), pair[1])
    )[0]


@given(_rounds())
@settings(max_examples=80, deadline=None, phases=[Phase.generate])
def test_sums_are_exact_within_the_documented_resolution(drawn):
    scale, updates = drawn
    samples = sum(u[3] for u in updates)
    total = _fold(Grid.for_round(np.full(12, scale, np.float32), samples), updates)
    for index in range(12):
        exact = sum(Fraction(float(values[index])) * n for _, values, _, n in updates) / samples
        kept = (Fraction(total.high[index]) + Fraction(total.low[index])) / samples
        assert abs(kept - exact) <= Fraction(scale) / 2**60
        assert np.float32(total.mean()[index]) == pytest.approx(float(exact), rel=2**-23, abs=scale * 2**-59)


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_is_the_correctly_rounded_one_at_ordinary_magnitudes(seed):
    rng = np.random.default_rng(seed)
    layout = _layout(400)
    sizes = rng.integers(1, 700, size=10)
    updates = rng.normal(0.0, 0.05, size=(10, 400)).astype(np.float32)
    total = Total.zero(Grid.for_round(updates[0], int(sizes.sum())), layout)
    for client in range(10):
        total.fold(client, updates[client], None, int(sizes[client]), layout)
    expected = [
        _round_to_float32(
            sum(Fraction(float(updates[c, j])) * int(sizes[c]) for c in range(10)) / int(sizes.sum())
        )
        for j in range(400)
    ]
    assert total.mean().dtype == np.float32
    assert total.mean().tobytes() == np.array(expected).tobytes()


def test_plain_float_sums_would_depend_on_the_order():
    # The reason for the grid: 2^53 + 1 + 1 is 2^53 from the left and 2^53 + 2 from the right.
    assert (2.0**53 + 1.0) + 1.0 != 2.0**53 + (1.0 + 1.0)
    layout = _layout(1)
    values = [np.array([v], np.float32) for v in (2.0**20, 2.0**-32, 2.0**-32)]
    grid = Grid.for_round(np.ones(1, np.float32), 3)
    sums = []
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        total = Total.zero(grid, layout)
        for client in order:
            total.fold(client, values[client], None, 1, layout)
        sums.append(Fraction(total.high[0]) + Fraction(total.low[0]))
    assert sums == [2**20 + Fraction(1, 2**31)] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**20 * 1.01, -(2.0**20) * 1.01])
@pytest.mark.parametrize("index", [0, 8, 9, 11])
def test_what_is_not_finite_or_too_large_is_refused_without_a_trace(bad, index):
    grid = Grid.for_round(np.ones(12, np.float32), 100)
    assert grid.limit == 2.0**20
    total = _fold(grid, [(3, np.ones(12, np.float32), np.ones(9, bool), 7)])
    before = _bits(total)
    values = np.ones(12, np.float32)
    values[index] = bad
    for support in (None, np.ones(9, bool)):
        with pytest.raises(OverflowError, match="not finite or exceeds"):
            total.fold(4, values, support, 5, LAYOUT)
    assert _bits(total) == before
    assert total.samples == 7
    assert total.clients == [3]


def test_the_limit_itself_is_accepted():
    grid = Grid.for_round(np.array([0.75], np.float32), 2)  # 0.75 rounds up to 2^0
    layout = _layout(1)
    total = Total.zero(grid, layout)
    total.fold(0, np.array([2.0**20], np.float32), None, 2, layout)
    assert total.mean() == [2.0**20]


def test_a_model_of_zeros_has_a_grid():
    grid = Grid.for_round(np.zeros(3, np.float32), 0)
    assert (grid.limit, grid.samples) == (2.0**20, 1)


def test_votes_counts_and_means_worked_by_hand():
    # Two prunable layers of 2 and 3 weights, one bias. Client 0 has 1 sample, client 1 has 3.
    layout = _layout(2, 3, other=1)
    total = Total.zero(Grid.for_round(np.ones(6, np.float32), 4), layout, masked=True)
    #                          layer 0     layer 1          bias
    first = np.array([4.0, 0.0, 8.0, 0.0, 0.0, 1.0], np.float32)
    second = np.array([0.0, 0.0, 4.0, 2.0, 0.0, 5.0], np.float32)
    # Client 1's mask holds the first weight of layer 0 too, at value 0.
    total.fold(0, first, np.array([True, False, True, False, False]), 1, layout)
    total.fold(1, second, np.array([True, False, True, True, False]), 3, layout)
    assert total.votes.tolist() == [2, 0, 2, 1, 0]
    # Layer 0: 1*1 + 3*1 = 4. Layer 1: 1*1 + 3*2 = 7.
    assert total.layer_counts.tolist() == [4, 7]
    assert total.mask_samples.tolist() == [4, 0, 4, 3, 0]
    # Mean, absent is 0: 4/4, 0, (8 + 3*4)/4, 3*2/4, 0; bias (1 + 3*5)/4.
    assert total.mean().tolist() == [1.0, 0.0, 5.0, 1.5, 0.0, 4.0]
    # Masked mean: (4 + 3*0)/4 since both hold it, nobody, 20/4, 6/3, nobody; the bias is not masked.
    assert total.masked_mean().tolist() == [1.0, 0.0, 5.0, 2.0, 0.0, 4.0]


def test_a_dense_update_votes_for_every_position():
    layout = _layout(2, 3)
    total = Total.zero(Grid.for_round(np.ones(5, np.float32), 5), layout, masked=True)
    total.fold(0, np.zeros(5, np.float32), None, 2, layout)
    total.fold(1, np.ones(5, np.float32), np.array([False, True, True, True, False]), 3, layout)
    assert total.votes.tolist() == [1, 2, 2, 2, 1]
    assert total.layer_counts.tolist() == [2 * 2 + 3 * 1, 2 * 3 + 3 * 2]
    assert total.mask_samples.tolist() == [2, 5, 5, 5, 2]


def test_values_outside_the_support_are_not_added():
    layout = _layout(2)
    total = Total.zero(Grid.for_round(np.ones(2, np.float32), 1), layout)
    total.fold(0, np.array([1.0, 9.0], np.float32), np.array([True, False]), 1, layout)
    assert total.mean().tolist() == [1.0, 0.0]


def test_a_masked_mean_must_be_asked_for_at_the_start():
    total = _fold(
        Grid.for_round(np.ones(12, np.float32), 1), [(0, np.ones(12, np.float32), None, 1)], masked=False
    )
    with pytest.raises(ValueError, match="not kept for a masked mean"):
        total.masked_mean()


def test_updates_longer_than_a_block_are_added_whole():
    size = (1 << 15) + 3
    layout = _layout(size)
    values = np.arange(size, dtype=np.float32)
    total = Total.zero(Grid.for_round(values, 4), layout)
    total.fold(0, values, None, 1, layout)
    total.fold(1, -values, None, 3, layout)
    assert np.array_equal(total.mean(), values * np.float32(-0.5))
