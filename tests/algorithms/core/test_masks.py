"""Masks: exactly K, ties by lower index, consensus against brute force, overlap."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.core.masks import (
    ceiling_count,
    consensus,
    cut_globally,
    cut_to_top_k,
    intersection_over_union,
    kth_largest,
    target_count,
    top_k_mask,
)
from algorithms.core.parameters import Entry

# Few distinct values, so that ties are the rule.
TIED = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 3.0]), min_size=1, max_size=40)


@given(TIED, st.data())
@settings(max_examples=100, deadline=None)
def test_exactly_the_k_largest_and_ties_go_to_the_lower_index(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    mask = top_k_mask(torch.tensor(scores), k)
    # A stable sort by descending score: among equals the lower index comes first.
    ranked = sorted(range(len(scores)), key=lambda index: -scores[index])
    assert torch.nonzero(mask).flatten().tolist() == sorted(ranked[:k])


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=40), st.data())
@settings(max_examples=100, deadline=None)
def test_a_cut_keeps_values_and_leaves_positive_zeros(values, data):
    k = data.draw(st.integers(0, len(values)))
    weights = torch.tensor(values)
    mask = cut_to_top_k(weights, k)
    assert int(mask.sum()) == k
    assert torch.equal(weights[mask], torch.tensor(values)[mask])
    assert not torch.signbit(weights[~mask]).any()
    assert not weights[~mask].any()
    smallest_kept = weights[mask].abs().min() if k else math.inf
    assert torch.tensor(values)[~mask].abs().max().item() <= smallest_kept if k < len(values) else True


def test_worked_by_hand():
    weights = torch.tensor([-2.0, 1.0, 0.5, -1.0, 3.0])
    # K = 3: 3, 2 and the first of the two ones.
    assert cut_to_top_k(weights, 3).tolist() == [True, True, False, False, True]
    assert weights.tolist() == [-2.0, 1.0, 0.0, 0.0, 3.0]


def test_a_cut_may_keep_zeros():
    # K positions even where fewer are nonzero: a mask may hold weights whose value is 0.
    assert cut_to_top_k(torch.tensor([0.0, 0.0, 5.0, 0.0]), 2).tolist() == [True, False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_scores_do_not_raise_and_still_give_k(bad):
    # They stay in the update, so that the aggregation refuses it.
    weights = torch.tensor([1.0, bad, 2.0, 3.0])
    mask = cut_to_top_k(weights, 2)
    assert int(mask.sum()) == 2
    assert mask[1]
    assert not torch.isfinite(weights).all()


def test_the_sum_of_large_finite_scores_may_overflow():
    scores = torch.tensor([3e38, 2e38, 1e38, 3.2e38])
    assert top_k_mask(scores, 2).tolist() == [True, False, False, True]


@given(TIED, st.data())
@settings(max_examples=50, deadline=None)
def test_kth_largest(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    tensor = torch.tensor(scores)
    assert kth_largest(tensor, k) == sorted(scores, reverse=True)[k - 1]
    assert tensor.tolist() == scores  # the selection works on a copy


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"),
    [(684, 0.95, 34), (10, 0.0, 10), (11_164_362, 0.999, 11_164), (1000, 0.9999, 0)],
)
def test_target_count(size, sparsity, expected):
    # 684 * 0.05 = 34.2; 11164362 * 0.001 = 11164.4; 1000 * 0.0001 = 0.1
    assert target_count(size, sparsity) == expected


@given(
    st.integers(2, 6).flatmap(
        lambda m: st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=1, max_size=25)
    )
)
@settings(max_examples=80, deadline=None)
def test_consensus_is_the_mean_overlap_of_all_pairs(columns):
    masks = np.array(columns).T  # [m, n]
    count = len(masks)
    pairs = [int((a & b).sum()) for a, b in itertools.combinations(masks, 2)]
    mean_size = masks.sum() / count
    found = consensus(masks.sum(axis=0), count)
    if mean_size == 0:
        assert found is None
    else:
        assert found == pytest.approx(np.mean(pairs) / mean_size)
        assert 0.0 <= found <= 1.0


def test_consensus_worked_by_hand():
    # Three masks of two: {0, 1}, {0, 2}, {0, 1}. Votes 3, 2, 1, 0. Pairs: C(3,2) + C(2,2) = 3 + 1 = 4,
    # of C(3,2) * 2 = 6 possible.
    assert consensus(np.array([3, 2, 1, 0], np.int32), 3) == pytest.approx(4 / 6)
    assert consensus(np.array([3, 3, 0], np.int32), 3) == 1.0
    assert consensus(np.array([1, 1, 1], np.int32), 3) == 0.0


def test_consensus_of_one_mask_or_of_nothing_is_absent():
    assert consensus(np.array([1, 0, 1], np.int32), 1) is None
    assert consensus(np.zeros(3, np.int32), 4) is None


def test_consensus_does_not_overflow():
    # 1000 clients over 11 million positions: 5.5e12 pairs, beyond int32.
    assert consensus(np.full(11_000_000, 1000, np.int32), 1000) == 1.0


def test_intersection_over_union():
    first, second = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert intersection_over_union(first, second) == pytest.approx(1 / 3)
    assert intersection_over_union(first, first) == 1.0
    assert intersection_over_union(~first & first, ~second & second) is None


@pytest.mark.parametrize(
    ("size", "sparsity", "count"),
    [
        (180, 0.95, 9),  # in floats (1 - .95) * 180 is 9.000000000000007
        (100, 0.07, 93),
        (10, 0.55, 5),  # 4.5
        (21, 0.5, 11),  # 10.5, where rounding to even takes 10
        (7, 0.9999, 1),
        (7, 0.0, 7),
        (4, 0.9 - 0.2, 2),  # 0.7000000000000001: 1.2
        (21, 1 / 3, 14),  # a third is not a decimal
        (3 * 10**6, 2 / 3, 10**6),
    ],
)
def test_the_ceiling_of_a_layers_share_is_exact(size, sparsity, count):
    assert ceiling_count(size, sparsity) == count


def layers(*sizes):
    edges = [0, *itertools.accumulate(sizes)]
    return [Entry(f"{i}.weight", (n,), edges[i], edges[i + 1]) for i, n in enumerate(sizes)]


def test_a_guarded_layer_keeps_its_share_of_k():
    weights = torch.tensor([9.0, -8.0, 7.0, 6.0, 5.0, 4.0, 0.3, -0.4, 0.1, 0.2])
    # K = 5 of ten: the first layer's 9 to 5. The second layer of 4 would be empty: round(5 * 4 / 10) = 2 stay
    # of it, and three of the first.
    mask = cut_globally(weights, 5, layers(6, 4), guard=True)
    assert weights.tolist() == torch.tensor([9.0, -8, 7, 0, 0, 0, 0.3, -0.4, 0, 0]).tolist()
    assert mask.tolist() == [w != 0 for w in weights.tolist()]


def test_guarding_one_layer_may_empty_the_next():
    # K = 2 of 6: 5 and 4 of the first; the last two layers get max(1, round(2 / 3)) = 1 each, and nothing is
    # left of K for the first, which keeps its share of one too: a weight a layer, more than K.
    weights = torch.tensor([5.0, 4.0, 1.0, 2.0, 0.1, 0.2])
    cut_globally(weights, 2, layers(2, 2, 2), guard=True)
    assert weights.tolist() == torch.tensor([5.0, 0, 0, 2.0, 0, 0.2]).tolist()


def test_a_guarded_layer_leaves_a_weight_to_each_of_the_others():
    # K = 2 of 12 equal weights: the first layer's 3 come first, and the second would take its share, 2.
    mask = cut_globally(torch.zeros(12), 2, layers(3, 9), guard=True)
    assert torch.nonzero(mask).reshape(-1).tolist() == [0, 3]


@given(st.lists(st.sampled_from([0.0, 0.5, -1.0, 2.0]), min_size=6, max_size=12), st.data())
def test_a_guard_leaves_no_layer_empty_and_is_a_plain_cut_elsewhere(values, data):
    weights, k = torch.tensor(values), data.draw(st.integers(1, len(values)))
    parts = layers(3, len(values) - 3)
    plain, guarded = weights.clone(), weights.clone()
    global_mask = cut_globally(plain, k, parts, guard=False)
    mask = cut_globally(guarded, k, parts, guard=True)
    assert all(mask[part.span].any() for part in parts)
    assert int(mask.sum()) == max(k, len(parts))
    if all(global_mask[part.span].any() for part in parts):
        assert torch.equal(mask, global_mask)
        assert torch.equal(plain, guarded)
