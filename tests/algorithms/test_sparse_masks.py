"""Layer-wise masks: exact totals, ERK, random masks, prune and grow, nested tiers, the pruned union."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import Entry
from algorithms.core.masks import (
    apportion,
    density_shares,
    exchangeable,
    layer_counts,
    layer_sizes,
    layer_wise_top_k,
    nested_mask,
    prune_and_grow,
    random_mask,
    top_of_union,
)


def layers_of(*shapes: tuple[int, ...]) -> tuple[Entry, ...]:
    entries, start = [], 0
    for index, shape in enumerate(shapes):
        entries.append(Entry(f"{index}.weight", shape, start, start + math.prod(shape)))
        start = entries[-1].stop
    return tuple(entries)


def bools(text: str) -> torch.Tensor:
    return torch.tensor([character == "1" for character in text.replace(" ", "")])


# ------------------------------------------------------------------------------------------ apportionment


@pytest.mark.parametrize(
    ("total", "shares", "capacities", "expected"),
    [
        # 10 by 1:2:2 is 2, 4, 4.
        (10, [1, 2, 2], [9, 9, 9], [2, 4, 4]),
        # 10 by 1:1:1 is 3 1/3 each; the one that is left goes to the first of equals.
        (10, [1, 1, 1], [9, 9, 9], [4, 3, 3]),
        # 7 by 3:2:1 is 3.5, 2.33, 1.17: floors 3, 2, 1, and the largest remainder is the first.
        (7, [3, 2, 1], [9, 9, 9], [4, 2, 1]),
        # 10 by 8:1:1 is 8, 1, 1, but the first holds 4: the other 6 go 3:3.
        (10, [8, 1, 1], [4, 9, 9], [4, 3, 3]),
        # The first two overflow one after the other: 12 by 6:5:1 is 6, 5, 1; 3 fit; 9 by 5:1 is 7.5, 1.5;
        # 6 fit; the last takes 3.
        (12, [6, 5, 1], [3, 6, 9], [3, 6, 3]),
        # Nobody with a claim has room: by the room that is left, 2 of 4:4.
        (3, [1, 0, 0], [1, 4, 4], [1, 1, 1]),
        (0, [1, 1], [3, 3], [0, 0]),
        (6, [1, 5], [3, 3], [3, 3]),
        (2, [float("nan"), 1.0], [3, 3], [0, 2]),
    ],
)
def test_apportion_by_hand(total, shares, capacities, expected):
    assert apportion(total, np.array(shares), np.array(capacities)).tolist() == expected


def test_apportion_says_what_does_not_fit():
    with pytest.raises(ValueError, match="cannot place 7 positions in layers that hold 6"):
        apportion(7, np.array([1, 1]), np.array([3, 3]))


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), min_size=1, max_size=6),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_apportion_is_exact_proportional_and_within_capacities(pairs, fill):
    shares, capacities = np.array([s for s, _ in pairs]), np.array([c for _, c in pairs])
    total = round(fill * capacities.sum())
    counts = apportion(total, shares, capacities)
    assert counts.sum() == total
    assert (counts >= 0).all()
    assert (counts <= capacities).all()
    # Layers with room left share in proportion: within one weight of a common factor times their shares.
    open_layers = [i for i in range(len(pairs)) if counts[i] < capacities[i] and shares[i] > 0]
    for i in open_layers:
        for j in open_layers:
            factor_i = Fraction(int(counts[i]) - 1, int(shares[i]))
            assert factor_i <= Fraction(int(counts[j]) + 1, int(shares[j]))


# ---------------------------------------------------------------------------------------- layer densities


def test_erk_by_hand():
    layers = layers_of((4, 1, 3, 3), (4, 4, 3, 3), (10, 16))  # sizes 36, 144, 160: 340 together
    # ERK density (sum of dims)/(product): parts of 4+1+3+3 = 11, 4+4+3+3 = 14, 10+16 = 26; 51 together.
    assert density_shares("erk", layers).tolist() == [11, 14, 26]
    # 102 weights: twice that.
    assert apportion(102, density_shares("erk", layers), layer_sizes(layers)).tolist() == [22, 28, 52]
    # 240 weights: 51.8 exceeds the first layer's 36; the other 204 by 14:26 are 71.4 and 132.6.
    assert apportion(240, density_shares("erk", layers), layer_sizes(layers)).tolist() == [36, 71, 133]
    # ER: density (in + out)/(in * out), kernels ignored: 36 * 5/4, 144 * 8/16, 160 * 26/160.
    assert density_shares("er", layers).tolist() == [45, 72, 26]
    # Uniform, density .3: 10.8, 43.2, 48.
    assert apportion(102, density_shares("uniform", layers), layer_sizes(layers)).tolist() == [11, 43, 48]


def test_ideal_gas_quotas_by_hand():
    # 1 / (f n + 1) with f = .0153876: densities .393893 and .067345, 39.389 of 100 and 60.611 of 900.
    layers = layers_of((10, 10), (30, 30))
    shares = density_shares("igq", layers, 100)
    assert shares.tolist() == pytest.approx([39.389, 60.611], abs=1e-3)
    assert (100 / shares - 1).tolist() == pytest.approx([0.0153876 * 100, 100 / 60.6106 - 1], rel=1e-4)
    assert density_shares("igq", layers, 200).tolist() == pytest.approx([61.98, 138.02], abs=1e-2)
    assert apportion(100, shares, layer_sizes(layers)).tolist() == [39, 61]
    assert density_shares("igq", layers, 1000).tolist() == pytest.approx([100, 900])


def erk_densities_by_rescaling(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """The textbook loop: scale; layers above 1 go dense; scale the rest to what is left."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        left = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = left / sum(raw[i] * sizes[i] for i in range(len(sizes)) if i not in dense)
        above = {i for i in range(len(sizes)) if i not in dense and scale * raw[i] > 1}
        if not above:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(sizes))]
        dense |= above


@given(
    st.lists(st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple), min_size=1, max_size=5),
    st.floats(0.01, 0.99),
)
@settings(max_examples=200, deadline=None)
def test_erk_sums_to_the_target_and_follows_the_textbook(shapes, density):
    layers = layers_of(*shapes)
    sizes = layer_sizes(layers)
    keep = round(density * sizes.sum())
    counts = apportion(keep, density_shares("erk", layers), sizes)
    assert counts.sum() == keep
    expected = erk_densities_by_rescaling(list(shapes), keep / sizes.sum()) if keep else [0.0] * len(sizes)
    np.testing.assert_array_less(np.abs(counts - np.array(expected) * sizes), 1.0 + 1e-6)


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "igq"])
def test_a_random_mask_has_exactly_its_counts_and_every_position_is_as_likely(distribution):
    layers = layers_of((4, 3), (5, 2, 2))
    counts = apportion(12, density_shares(distribution, layers, 12), layer_sizes(layers))
    seen = torch.zeros(32)
    rng = np.random.default_rng(0)
    for _ in range(400):
        mask = random_mask(counts, layers, rng)
        assert layer_counts(mask, layers).tolist() == counts.tolist()
        seen += mask
    for layer, count in zip(layers, counts, strict=True):
        chance = count / layer.size
        # Five standard deviations of a binomial.
        spread = 5 * math.sqrt(400 * chance * (1 - chance)) + 1e-9
        assert ((seen[layer.span] - 400 * chance).abs() <= spread).all()


# ----------------------------------------------------------------------------------- selections, by layer


def test_layer_wise_top_k_by_hand():
    layers = layers_of((2, 2), (3, 1))
    scores = torch.tensor([5.0, 1.0, 5.0, 5.0, 9.0, 0.0, 2.0])
    # Two of the three fives of the first layer, the lower indices; nine and two of the second.
    assert torch.equal(layer_wise_top_k(scores, np.array([2, 2]), layers), bools("1010 101"))
    # Among some positions only: the first five is none of them; a zero is taken before any other; and where
    # three are asked for and two allowed, two are taken.
    among = bools("0110 011")
    assert torch.equal(layer_wise_top_k(scores, np.array([1, 3]), layers, among), bools("0010 011"))


def test_prune_and_grow_by_hand():
    layers = layers_of((2, 3))
    magnitudes = torch.tensor([4.0, 1.0, 2.0, 0.0, 0.0, 0.0])
    mask = bools("111000")
    # One dropped: 1.0. It may regrow like any other zero: its gradient is the largest.
    gradient = torch.tensor([9.0, 5.0, 9.0, 1.0, 3.0, 2.0])
    kept, grown = prune_and_grow(magnitudes, mask, np.array([1]), np.array([1]), gradient, layers)
    assert torch.equal(kept, bools("101000"))
    assert torch.equal(grown, bools("010000"))
    # Two dropped, two grown, but never where the mask still lives (9.0 twice).
    gradient[1] = 0.0
    kept, grown = prune_and_grow(magnitudes, mask, np.array([2]), np.array([2]), gradient, layers)
    assert torch.equal(kept, bools("100000"))
    assert torch.equal(grown, bools("001010"))


def test_a_grown_zero_inside_the_mask_outranks_every_zero_outside():
    layers = layers_of((4, 1))
    # Weight 3 is in the mask with value 0: dropping one takes it, not a zero outside, and keeps the 1.
    kept, _ = prune_and_grow(
        torch.tensor([0.0, 1.0, 0.0, 0.0]), bools("0101"), np.array([1]), np.array([0]), torch.ones(4), layers
    )
    assert torch.equal(kept, bools("0100"))


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0.05, 1))
@settings(max_examples=100, deadline=None)
def test_prune_and_grow_keeps_the_total_and_grows_only_outside_the_live_mask(seed, rate, density):
    rng = np.random.default_rng(seed)
    layers = layers_of((3, 4), (2, 5), (6, 2, 2))
    sizes = layer_sizes(layers)
    mask = random_mask(apportion(round(density * sizes.sum()), sizes, sizes), layers, rng)
    magnitudes = (
        torch.from_numpy(rng.choice([0.0, 0.5, 1.0, 2.0], size=sizes.sum()).astype(np.float32)) * mask
    )
    counts = layer_counts(mask, layers)
    drops = exchangeable(rate, counts, layers)
    growths = apportion(int(drops.sum()), rng.random(3), sizes - counts + drops)
    scores = torch.from_numpy(rng.random(int(sizes.sum()), dtype=np.float32))
    kept, grown = prune_and_grow(magnitudes, mask, drops, growths, scores, layers)
    assert not (kept & ~mask).any()
    assert not (kept & grown).any()
    assert layer_counts(kept, layers).tolist() == (counts - drops).tolist()
    assert layer_counts(grown, layers).tolist() == growths.tolist()
    assert int((kept | grown).sum()) == int(mask.sum())
    for layer in layers:
        gone, left = (
            magnitudes[layer.span][(mask & ~kept)[layer.span]],
            magnitudes[layer.span][kept[layer.span]],
        )
        assert not len(gone) or not len(left) or gone.max() <= left.min()


def test_what_a_layer_can_exchange():
    layers = layers_of((2, 5), (2, 5), (2, 5))
    # A quarter of 8 is 2, and 2 zeros are there; of 9 it is 2.25 but only 1 zero; a dense layer has none.
    assert exchangeable(0.25, np.array([8, 9, 10]), layers).tolist() == [2, 1, 0]
    assert exchangeable(0.0, np.array([5, 5, 5]), layers).tolist() == [0, 0, 0]


def test_top_of_union_by_hand():
    layers = layers_of((5, 1), (4, 1))
    magnitudes = torch.tensor([1.0, 5.0, 3.0, 0.0, 9.0, 3.0, 0.0, 7.0, 2.0])
    union, before = bools("11110 1000"), bools("01001 1101")
    mask = top_of_union(magnitudes, union, before, np.array([2, 2]), layers)
    # First layer: 5 and 3 of the union; 9 is nobody's. Second: the 3, the union's one position, then the 2
    # of the old mask, which holds the 3 as well; 7 is in neither.
    assert torch.equal(mask, bools("01100 1001"))


def test_top_of_union_without_an_old_mask_is_filled_with_zeros_of_lower_index():
    mask = top_of_union(torch.tensor([0.0, 0.0, 4.0]), bools("001"), None, np.array([2]), layers_of((3, 1)))
    assert torch.equal(mask, bools("101"))


# ---------------------------------------------------------------------------------------------- the tiers


def test_nested_mask_by_hand():
    layers = layers_of((2, 3), (2, 2))
    magnitudes = torch.tensor([4.0, 1.0, 3.0, 2.0, 9.0, 0.5, 0.25, 8.0, 8.0, 0.0])
    mask = bools("111100 1100")
    # In the mask: 4, 1, 3, 2 of the first layer; .25 and 8 (positions 6, 7) of the second. 9.0 is outside.
    # Quantiles (1 - (rank + .5)/n): 4: .875, 3: .625, 2: .375, 1: .125; 8: .75, .25: .25.
    # Half of the mask, 3: half of each layer's four is 4 and 3, of the second's two it is 8.
    assert torch.equal(nested_mask(magnitudes, mask, 3, layers), bools("101000 0100"))
    # 4: the next quantile is .375, the 2 of the first layer.
    assert torch.equal(nested_mask(magnitudes, mask, 4, layers), bools("101100 0100"))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_masks_of_smaller_budgets_are_nested_and_keep_the_layers_shares(seed):
    rng = np.random.default_rng(seed)
    layers = layers_of((5, 4), (3, 3), (8, 2, 2))
    sizes = layer_sizes(layers)
    mask = random_mask(apportion(30, rng.random(3), sizes), layers, rng)
    magnitudes = torch.from_numpy(rng.choice([0.0, 1.0, 1.0, 3.0], size=sizes.sum()).astype(np.float32))
    larger = mask
    for budget in range(30, -1, -1):
        smaller = nested_mask(magnitudes, mask, budget, layers)
        assert int(smaller.sum()) == budget
        assert not (smaller & ~larger).any()
        share = layer_counts(mask, layers) * budget / 30
        assert (np.abs(layer_counts(smaller, layers) - share) <= 1.0 + 1e-6).all()
        larger = smaller
