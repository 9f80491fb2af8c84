"""Clipped sums and what is released of them, by hand and against a reference of plain numpy."""

import math

import numpy as np
import pytest

from algorithms.core.aggregation import Grid, Total
from algorithms.core.clipping import fold_clipped, next_clip, noise_beside_count, released
from algorithms.core.parameters import Entry, ParameterLayout

LAYOUT = ParameterLayout((Entry("a.weight", (2,), 0, 2), Entry("b.weight", (2,), 2, 4)),
                         (Entry("b.bias", (1,), 4, 5),), ())  # fmt: skip
BASE = np.array([1.0, -1.0, 0.5, 0.0, 2.0], np.float32)


def summed(updates, clip, base=BASE, supports=None, masked=False):
    """The total of some updates, by client."""
    total = Total.zero(Grid.for_round(BASE, len(updates)), LAYOUT, masked=masked)
    for client, values in enumerate(updates):
        support = None if supports is None else supports[client]
        fold_clipped(total, client, np.array(values, np.float32), support, base, clip, LAYOUT)
    return total


def test_an_update_is_cut_to_the_clip_by_hand():
    far = BASE + np.array([3, 4, 0, 0, 0], np.float32)  # |(3, 4)| = 5, cut to 2.5
    near = BASE + np.array([0, 0, 0, 0, 0.5], np.float32)
    total = summed([far, near], 2.5)
    assert (total.high + total.low).tolist() == [1.5, 2.0, 0.0, 0.0, 0.5]
    assert (total.unclipped, total.samples, total.clients) == (1, 2, [0, 1])
    # The denominator is what is asked on average, here four, and not the two who came.
    mean = released(total, np.array([0, 0, 4.0, 0, 0]), 4, None, BASE, LAYOUT).mean()
    assert mean.tolist() == [1.375, -0.5, 1.5, 0.0, 2.125]


def test_differences_and_what_is_no_model_are_cut_as_they_are():
    total = summed([[3, 4, 0, 0, 0], [-3, 0, 0, 0, 0]], 2.5, base=None)
    assert (total.high + total.low).tolist() == [-1.0, 2.0, 0.0, 0.0, 0.0]
    assert released(total, np.zeros(5), 2, None, None, LAYOUT).mean().tolist() == [-0.5, 1.0, 0, 0, 0]


def test_sums_are_those_of_a_plain_reference_whatever_clients_leave_out():
    rng = np.random.default_rng(1)
    updates = rng.normal(size=(9, 5)).astype(np.float32) * 2 + BASE
    supports = rng.random((9, 4)) < 0.6
    updates[:, :4][~supports] = 0.0
    noise = rng.normal(size=5)
    expected = np.zeros(5)
    for update in updates.astype(np.float64):
        delta = update - BASE
        expected += delta / max(1.0, math.sqrt((delta**2).sum()) / 1.5)
    found = released(summed(updates, 1.5, supports=supports), noise, 10, None, BASE, LAYOUT).mean()
    np.testing.assert_allclose(found, BASE + (expected + noise) / 10, rtol=1e-7)


def test_the_sum_has_the_same_bits_in_any_grouping():
    updates = np.random.default_rng(4).normal(size=(6, 5)).astype(np.float32)
    grid, parts = Grid.for_round(BASE, 6), []
    for clients in (range(6), (5, 1), (0, 2, 3, 4)):
        parts.append(Total.zero(grid, LAYOUT))
        for client in clients:
            fold_clipped(parts[-1], client, updates[client], None, BASE, 3.0, LAYOUT)
    whole, merged = parts[0], parts[1].merge(parts[2])
    assert (whole.high.tobytes(), whole.low.tobytes()) == (merged.high.tobytes(), merged.low.tobytes())
    assert 0 < whole.unclipped == merged.unclipped


def test_nobody_moves_the_sum_by_more_than_the_clip():
    rng = np.random.default_rng(2)
    for scale in (1e-6, 1.0, 1e6):
        total = summed([BASE + (rng.normal(size=5) * scale).astype(np.float32)], 0.5)
        assert np.linalg.norm(total.high + total.low) <= 0.5 * (1 + 1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_leaves_nothing(value):
    total = Total.zero(Grid.for_round(BASE, 1), LAYOUT)
    update = BASE.copy()
    update[1] = value
    with pytest.raises(OverflowError):
        fold_clipped(total, 0, update, None, BASE, 1.0, LAYOUT)
    assert not total.high.any()
    assert (total.samples, total.unclipped, total.clients) == (0, 0, [])


def test_a_clip_that_nobody_reaches_gives_the_equal_mean():
    rng = np.random.default_rng(3)
    updates = rng.normal(size=(4, 5)).astype(np.float32)
    plain = Total.zero(Grid.for_round(BASE, 4), LAYOUT)
    for client, values in enumerate(updates):
        plain.fold(client, values, None, 1, LAYOUT)
    found = released(summed(updates, 1e9), np.zeros(5), 4, None, BASE, LAYOUT).mean()
    np.testing.assert_allclose(found, plain.mean(), atol=1e-7)


def test_nothing_else_of_the_clients_is_released():
    """Votes and counts are those of the shared mask; outside it there is neither sum nor noise."""
    held = np.array([True, False, True, False])
    one = summed([BASE, BASE + 1], 1.0, supports=[held, held], masked=True)
    other = summed([BASE * 2], 1.0, supports=[np.array([True, False, False, False])], masked=True)
    for total in (one, other):
        public = released(total, np.ones(5), 2, held, BASE, LAYOUT)
        assert public.votes.tolist() == public.mask_samples.tolist() == [1, 0, 1, 0]
        assert public.layer_counts.tolist() == [1, 1]
        assert (public.samples, public.clients, public.unclipped, public.updates) == (1, [], 0, None)
        assert public.mean()[1] == BASE[1]  # a mask's weights are 0 there
        assert public.mean()[3] == BASE[3]


@pytest.mark.parametrize(("cohort", "noise"), [(100, 1.0050), (50, 1.0206)])
def test_what_the_count_leaves_to_the_sum(cohort, noise):
    assert round(noise_beside_count(1.0, cohort), 4) == noise


def test_in_a_small_cohort_the_count_takes_all_of_the_noise():
    assert math.isnan(noise_beside_count(1.0, 10))


def test_the_clip_follows_the_share_of_updates_below_it():
    assert next_clip(2.0, 5, 10, 10, 0.0) == 2.0
    assert next_clip(2.0, 10, 10, 10, 0.0) == pytest.approx(2.0 * math.exp(-0.1))
    assert next_clip(2.0, 0, 10, 10, 0.0) == pytest.approx(2.0 * math.exp(0.1))
    # Two of ten came, both below: (2 - 1) / 10 above one half; a noise of one client counts as much.
    assert next_clip(2.0, 2, 2, 10, 0.0) == pytest.approx(2.0 * math.exp(-0.02))
    assert next_clip(2.0, 1, 2, 10, 1.0) == pytest.approx(2.0 * math.exp(-0.02))
