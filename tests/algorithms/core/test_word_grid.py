"""Grids of one word: units, sums that cannot overflow, what is clamped, and what is lost."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import Entry, Grid, ParameterLayout, Total

FLAT = ParameterLayout((Entry("w", (4,), 0, 4),), (Entry("b", (2,), 4, 6),), ())


@pytest.mark.parametrize(("bits", "below"), [(64, 46), (48, 30), (32, 14)])
def test_a_word_is_a_sign_four_bits_of_growth_those_of_the_samples_and_the_rest(bits, below):
    # 1 + 4 + 13 + 46 = 64: 5,000 samples take 13 bits.
    grid = Grid.for_round(np.array([0.9, -0.6], np.float32), 5000, bits)
    assert grid.limit == 16.0
    assert grid.units[1] == 2.0**-below
    assert Grid.for_round(np.array([0.0], np.float32), 5000, bits) == grid  # as of weights up to 1
    # As many samples as there are make the next bit, so that no sum is 2**(bits - 1) units.
    assert Grid.for_round(np.array([1.0]), 8191, bits).units[1] == 2.0**-below
    assert Grid.for_round(np.array([1.0]), 8192, bits).units[1] == 2.0 ** -(below - 1)
    # At the most samples the unit is the largest weight, and the sum of the samples fits too.
    most = Grid.most_samples(bits)
    assert most == 2 ** (bits - 5) - 1
    assert Grid.for_round(np.array([1.0]), most, bits).units[1] == 1.0


def test_words_by_hand():
    grid = Grid(16.0, 5000, 32)  # a unit is 2**-14
    values = np.array([2.0**-14, 0.5 * 2.0**-14, 1.5 * 2.0**-14, -1.0, 3e-9, 17.0, -16.0], np.float32)
    words, clamped = grid.words(values, 1)
    assert words.tolist() == [1, 0, 2, -(2**14), 0, 2**18, -(2**18)]  # ties to even; 17 is clamped to 16
    assert clamped == 1
    words, _ = grid.words(values, 3)  # n_i multiplies before the rounding: 3 x .5 and 3 x 1.5 units
    assert words.tolist()[:3] == [3, 2, 4]
    assert grid.values(words, 3).tolist()[3:] == [-1.0, 0.0, 16.0, -16.0]
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(OverflowError, match="not finite"):
            grid.words(np.array([1.0, wrong], np.float32), 1)


@pytest.mark.parametrize("bits", [64, 48, 32])
def test_the_largest_sum_is_one_step_from_overflowing(bits):
    grid = Grid(16.0, 8191, bits)
    extreme = np.array([1e30, -1e30], np.float32)
    total = sum(int(grid.words(extreme, samples)[0][0]) for samples in (1, 190, 8000))
    assert total == 8191 * 2 ** (bits - 1 - 13) < 2 ** (bits - 1)
    assert grid.words(extreme, 8191)[0].tolist() == [total, -total]


@given(st.integers(1, 7), st.sampled_from([64, 48, 32]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_totals_are_exact_sums_of_whole_units_in_any_grouping(cohort, bits, seed):
    rng = np.random.default_rng(seed)
    samples = rng.integers(1, 900, cohort)
    updates = (rng.normal(size=(cohort, 6)) * 10.0 ** rng.integers(-7, 2, (cohort, 6))).astype(np.float32)
    grid = Grid.for_round(np.array([0.3], np.float32), int(samples.sum()), bits)
    unit, limit = Fraction(grid.units[1]), Fraction(grid.limit)
    expected = [0] * 6
    for weight, update in zip(samples, updates, strict=True):
        for place, value in enumerate(update):
            held = max(-limit, min(limit, Fraction(float(value))))
            expected[place] += round(held * int(weight) / unit)  # Python rounds ties to even too
    totals = [Total.zero(grid, FLAT) for _ in range(3)]
    for client, (weight, update) in enumerate(zip(samples, updates, strict=True)):
        words, _ = grid.words(update, int(weight))
        totals[rng.integers(3)].fold(client, words, None, int(weight), FLAT)
    first, *others = totals
    for other in others:
        first.merge(other)
    assert [Fraction(h) + Fraction(low) for h, low in zip(first.high, first.low, strict=True)] == [
        unit * number for number in expected
    ]
    # One rounding to float64 of the whole sum, then the division: the same however high and low share it.
    mean = np.array([float(unit * number) for number in expected]) / int(samples.sum())
    assert first.mean().tobytes() == mean.astype(np.float32).tobytes()


def test_a_word_that_no_device_that_clamps_would_send_is_refused_and_nothing_added():
    grid = Grid(16.0, 8, 48)
    words, _ = grid.words(np.full(6, 16.0, np.float32), 2)
    total = Total.zero(grid, FLAT)
    with pytest.raises(OverflowError):
        total.fold(0, words + 1, None, 2, FLAT)
    with pytest.raises(OverflowError):
        total.fold(0, np.where(np.arange(6) == 5, -words - 1, words), np.ones(4, bool), 2, FLAT)
    assert total.clients == []
    total.fold(0, words, np.array([True, False, True, True]), 2, FLAT)
    assert total.mean().tolist() == [16.0, 0.0, 16.0, 16.0, 16.0, 16.0]


def test_kept_updates_are_what_the_words_say():
    grid = Grid(16.0, 8, 32)
    total = Total.zero(grid, FLAT, updates=True)
    values = np.array([1.0, 0.1, -3.0, 0.0, 1e-9, 15.0], np.float32)
    total.fold(4, grid.words(values, 3)[0], None, 3, FLAT)
    kept, samples = total.updates[4]
    assert samples == 3
    assert kept.dtype == np.float32
    assert np.abs(kept - values).max() <= 0.5 * grid.units[1] / 3 + 1e-7 * math.pi
    assert kept[4] == 0.0
