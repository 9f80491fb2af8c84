"""Aggregation rules: cases worked by hand, a naive reference, and where they are FedAvg bit for bit."""

import itertools

import numpy as np
import pytest
import torch

from algorithms import AGGREGATIONS, Grid, ParameterLayout, Total, registry
from algorithms.core.robust import Clip, Krum, Median, MultiKrum, Trimmed, settled


def columns(*values):
    return [np.array([value], np.float32) for value in values]


def result(rule, updates, received=None, trained=None):
    """What the rule's vectors are on average, in float64."""
    received = np.zeros(len(updates[0]), np.float32) if received is None else received
    rows = rule.rows(updates, received, len(received) if trained is None else trained)
    return np.mean([np.asarray(row, np.float64) for row in rows], axis=0)


# ------------------------------------------------------------------------------------------------ by hand


def test_the_median_is_the_middle_value_or_the_mean_of_the_two_middle_ones():
    assert result(Median(), columns(10, 1, 2)) == [2.0]
    assert result(Median(), columns(4, 1, 100, 2)) == [3.0]
    assert result(Median(), columns(7)) == [7.0]


def test_the_trimmed_mean_leaves_out_the_whole_part_of_beta_m_at_either_end():
    assert result(Trimmed(beta=0.25), columns(1, 100, 3, 2)) == [2.5]
    assert result(Trimmed(beta=0.24), columns(1, 100, 3, 2)) == [26.5]
    # 0.29 * 100 is a little less than 29 in floating point.
    assert len(Trimmed(beta=0.29).rows(columns(*range(100)), np.zeros(1), 1)) == 42


def test_krum_takes_the_update_with_the_nearest_neighbours_and_of_equals_the_lower_client():
    updates = [np.array([value]) for value in (0, 0.1, 0.2, 0.3, 10)]
    scores = Krum(attackers=1).scores(updates, 1)
    # Two others each: .1^2 + .2^2; .1^2 + .1^2; ...; 9.7^2 + 9.8^2.
    assert scores == pytest.approx([0.05, 0.02, 0.02, 0.05, 190.13])
    exact = columns(0, 1, 2, 3, 100)  # clients 1 and 2 score 2 both
    assert result(Krum(attackers=1), exact) == [1.0]
    assert result(MultiKrum(attackers=1, chosen=2), exact) == [1.5]
    assert result(MultiKrum(attackers=1, chosen=2), updates) == pytest.approx([0.15])


def test_clipping_shortens_the_difference_from_the_global_model():
    received = np.array([1.0, 1.0, 5.0], np.float32)
    update = np.array([4.0, 5.0, 9.0], np.float32)  # Delta = (3, 4); the last one is a buffer
    assert result(Clip(norm=2.5), [update], received, trained=2).tolist() == [2.5, 3.0, 9.0]
    assert result(Clip(norm=5.0), [update], received, trained=2).tolist() == [4.0, 5.0, 9.0]
    # Norms 1, 2 and 10: the median is 2.
    assert result(Clip(), columns(1, -2, 10)) == pytest.approx([1 / 3])


# --------------------------------------------------------------------------------- the naive reference


def naive_median(column):
    ordered = sorted(column)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def naive_krum(updates, attackers):
    """The set of m - f - 2 others with the least sum, of all sets that there are."""
    scores = []
    for one, update in enumerate(updates):
        others = [torch.dist(update, other).item() ** 2 for i, other in enumerate(updates) if i != one]
        sets = itertools.combinations(others, len(updates) - attackers - 2)
        scores.append(min(sum(chosen) for chosen in sets))
    return min(range(len(updates)), key=lambda one: scores[one])


@pytest.mark.parametrize("number", [5, 6, 9])
def test_the_rules_agree_with_naive_ones(number):
    rng = np.random.default_rng(number)
    updates = [rng.normal(size=40).astype(np.float32) for _ in range(number)]
    medians = [naive_median([float(u[i]) for u in updates]) for i in range(40)]
    assert result(Median(), updates).tolist() == medians
    tensors = [torch.from_numpy(u.astype(np.float64)) for u in updates]
    assert (result(Krum(attackers=1), updates) == updates[naive_krum(tensors, 1)]).all()
    trimmed = [sum(sorted(float(u[i]) for u in updates)[1:-1]) / (number - 2) for i in range(40)]
    assert result(Trimmed(beta=1.01 / number), updates) == pytest.approx(trimmed)


def test_blocks_do_not_show():
    rng = np.random.default_rng(0)
    updates = [rng.normal(size=40_000).astype(np.float32) for _ in range(5)]
    assert (result(Median(), updates) == np.median(updates, axis=0)).all()
    near = [sum(sorted(float(np.square(a.astype(float) - b).sum()) for b in updates)[1:3]) for a in updates]
    assert Krum(attackers=1).scores(updates, 40_000) == pytest.approx(near)


# ------------------------------------------------------------------------------------------ totals, limits


@pytest.mark.parametrize("rule", [Trimmed(beta=0.0), Clip(norm=1e30)])
def test_nothing_trimmed_and_nothing_clipped_is_fedavg_with_equal_weights_bit_for_bit(rule):
    layout = ParameterLayout.of(torch.nn.Linear(30, 20), torch.zeros(2, 30))
    rng = np.random.default_rng(1)
    weights = rng.normal(size=layout.size).astype(np.float32)
    total = Total.zero(Grid.for_round(weights, 7), layout, updates=True, masked=True)
    for client in rng.permutation(7).tolist():
        values = weights + np.float32(10.0 ** rng.integers(-6, 3)) * rng.normal(size=layout.size)
        total.fold(client, values.astype(np.float32), None, 1, layout)
    updates = [values for values, _ in total.updates.values()]
    after = settled(total, rule.rows(updates, weights, layout.trained_size))
    assert after.mean().tobytes() == total.mean().tobytes()
    assert after.masked_mean().tobytes() == total.masked_mean().tobytes()
    assert settled(total, Median().rows(updates, weights, 1)).mean().tobytes() != total.mean().tobytes()


def test_every_rule_has_its_own_name_and_a_method_says_that_its_clients_share_a_support_itself():
    assert list(AGGREGATIONS) == ["mean", "median", "trimmed", "krum", "multi_krum", "clip"]
    shared = [name for name, method in registry().items() if method.shares_support]
    assert shared == [
        "fedalign", "fedavg", "fedreg", "fedsam", "fixed_mask", "masked_fedalign", "masked_fedreg",
        "masked_fedsam", "masked_moon", "moon",
    ]  # fmt: skip
    assert not any(registry()[name](**{}).uploads_differences for name in shared)
