"""FedDST: a readjustment worked by hand, its schedule, the naive reference, its limits, tiers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import ServerState
from algorithms.feddst import FedDST
from tests.algorithms.masked import NaiveMasked, bools, play
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation


class NaiveFedDST(NaiveMasked):
    """Prune by magnitude, grow by gradient at the trained weights; the server prunes the union."""

    def fraction(self, round_number: int) -> float:
        """a_t in a readjustment round, else 0."""
        half = self.config.rounds / 2
        if round_number % self.options.readjust_interval or round_number >= half:
            return 0.0
        return self.options.readjust_fraction * 0.5 * (1 + math.cos(math.pi * round_number / half))

    def upload(self, weights, received, visit):
        mask, fraction = visit.notes["mask"], self.fraction(visit.round)
        if not fraction:
            return self.sent(weights, mask)
        visit.notes["dense"] = True
        gradients = self.one_more_gradient({n: w.clone() for n, w in weights.items()}, visit)
        counts = self.counts(mask)
        drops = [min(round(round(fraction * c, 6)), s - c) for c, s in zip(counts, self.sizes(), strict=True)]
        magnitudes = {n: weights[n].abs() for n in self.prunable}
        kept = self.tops(magnitudes, [c - d for c, d in zip(counts, drops, strict=True)], [mask])
        outside = {n: ~kept[n] for n in self.prunable}
        grown = self.tops(gradients, drops, [outside])
        after = {n: kept[n] | grown[n] for n in self.prunable}
        return self.sent(self.masked(weights, kept), after)

    def server(self, weights, uploads, masks, sizes, round_number):
        stepped = self.server_step(weights, self.masked_mean(uploads, masks, sizes))
        union = self.union(masks)
        self.change_mask(self.tops(stepped, self.counts(self.mask), [union]))
        return self.masked(stepped, self.mask)


# ------------------------------------------------------------------------------------------------ by hand


def test_a_readjustment_worked_by_hand():
    # 2 classes, 3 inputs, mask 110 110 (4 of 6). Round 1 of 4, the half is 2: a_1 = 1/2 (1 + 0) = 1/2.
    # Each client exchanges 2 of its 4 weights (and 2 zeros are there).
    method = FedDST(sparsity=1 / 3, readjust_interval=1, readjust_fraction=1.0)
    before = ServerState(
        round=0, weights=torch.tensor([2.0, 1.0, 0.0, 2.0, 1.0, 0.0]), mask=bools("110110"), mask_version=5
    )
    clients = [([0.5, 1.0, 2.0], 0, 1), ([2.0, 1.0, 0.5], 1, 3)]
    sent, after = play(method, before, clients, rounds=4)
    # Equal rows: p = 1/2. Client 0, class 0, one step inside the mask: [[2.25, 1.5, 0], [1.75, .5, 0]].
    # The smallest two go (1.5 and .5). |gradient| is the same in both rows and rises with x = (1/2, 1, 2):
    # the last column grows, with value 0.
    assert sent[0].values.tolist() == [2.25, 0.0, 0.0, 1.75, 0.0, 0.0]
    assert sent[0].support.tolist() == bools("101101").tolist()
    # Client 1, class 1: [[1, .5, 0], [3, 1.5, 0]]. .5 and 1 go. Of all zeros these two have the largest
    # gradients, x = 2 and x = 1 (the second row's are alive): both regrow, at 0.
    assert sent[1].values.tolist() == [0.0, 0.0, 0.0, 3.0, 1.5, 0.0]
    assert sent[1].support.tolist() == bools("110110").tolist()
    # Means over holders: (2.25 + 3 * 0)/4 = .5625; 0/3; 0/1; (1.75 + 9)/4 = 2.6875; 4.5/3 = 1.5; 0/1.
    # The union has all six; four remain: 2.6875, 1.5, .5625 and the first of the zeros, in the mask at 0.
    assert after.weights.tolist() == [0.5625, 0.0, 0.0, 2.6875, 1.5, 0.0]
    assert after.mask.tolist() == bools("110110").tolist()
    assert after.mask_version == 5  # the same mask again

    # With client 0 alone the mask moves, and the version counts it.
    _, after = play(method, before, clients[:1], rounds=4)
    assert after.mask.tolist() == bools("101101").tolist()
    assert after.weights.tolist() == [2.25, 0.0, 0.0, 1.75, 0.0, 0.0]
    assert after.mask_version == 6


def test_a_grown_zero_counts_in_the_mean():
    # As above, but client 1 keeps position 0 with value 1 (a share of 1/4: it drops the .5 alone).
    method = FedDST(sparsity=1 / 3, readjust_interval=1, readjust_fraction=0.5)
    before = ServerState(round=0, weights=torch.tensor([2.0, 1.0, 0.0, 2.0, 1.0, 0.0]), mask=bools("110110"))
    sent, after = play(method, before, [([2.0, 1.0, 0.5], 1, 3), ([0.5, 1.0, 2.0], 0, 1)], rounds=4)
    assert sent[0].values.tolist() == [1.0, 0.0, 0.0, 3.0, 1.5, 0.0]
    assert sent[0].support.tolist() == bools("110110").tolist()  # .5 was dropped and regrew, at 0
    # Client 1 drops its .5 (position 4) and grows one of the two equals of the last column.
    assert sent[1].values.tolist() == [2.25, 1.5, 0.0, 1.75, 0.0, 0.0]
    # Position 1: client 0's grown zero counts, (3 * 0 + 1 * 1.5)/4 = .375; without it the mean were 1.5.
    # Position 4: client 0 alone, 1.5.
    assert after.weights.tolist()[:2] == [(3 + 2.25) / 4, 0.375]
    assert after.weights.tolist()[3:5] == [(9 + 1.75) / 4, 1.5]


def test_the_schedule():
    method = FedDST(sparsity=0.5, readjust_interval=5, readjust_fraction=0.4)
    state = ServerState(round=0, weights=torch.zeros(4), mask=bools("1100"))

    def told(round_number: int) -> tuple[str, float]:
        instructions = method.instruct(
            ServerState(round=round_number - 1, weights=state.weights, mask=state.mask), 40, 100
        )
        return instructions.phase, instructions.value

    readjusting = [t for t in range(1, 41) if told(t)[0] == "readjust"]
    assert readjusting == [5, 10, 15]  # 20 is half of the rounds, where a_t is 0
    # a_t = .4/2 (1 + cos(pi t/20)): at a half .2, at a quarter .2 (1 + 1/sqrt 2).
    assert told(10)[1] == pytest.approx(0.2)
    assert told(5)[1] == pytest.approx(0.2 * (1 + 1 / math.sqrt(2)))
    assert told(7) == ("train", 0.0)


# -------------------------------------------------------------------------------------- whole federations


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"local": {"epochs": 2, "weight_decay": 0.01, "proximal": 0.1}},
        {"server": {"name": "fedavg", "momentum": 0.9}},
        {"server": {"name": "fedadam"}},
    ],
    ids=["plain", "decay and proximal", "momentum", "adam"],
)
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_equals_the_naive_reference(tmp_path, overrides, distribution):
    algorithm = {
        "name": "feddst",
        "sparsity": 0.7,
        "layer_density": distribution,
        "readjust_interval": 2,
        "readjust_fraction": 0.8,
    }
    # Readjustments in rounds 2 and 4 of 10; two rounds follow.
    config = tiny_federation(tmp_path, algorithm=algorithm, rounds=10, stop_after=6, **overrides)
    run = run_inline(config, tmp_path / "run")
    assert_same(run, NaiveFedDST(config).run(6))
    versions = [state.mask_version for state in run.states]
    assert versions[:2] == [0, 0]
    assert versions[2] == versions[3] == 1
    assert versions[4] == versions[6]
    # Exactly K = round(.3 * 684) positions always, in unchanged numbers a layer.
    layers = run.driver.layout.prunable
    counts = {tuple(int(s.mask[layer.span].sum()) for layer in layers) for s in run.states}
    assert len(counts) == 1
    assert sum(counts.pop()) == 205
    # A client that readjusts sends as many, elsewhere.
    moved = [support for (number, _), (_, support) in run.uploads.items() if number == 2]
    assert {sum(int(m.sum()) for m in support.values()) for support in moved} == {205}
    for state in run.states:
        for moment in state.moments:
            assert not moment[:684][~state.mask].any()


def test_without_readjustment_it_is_the_fixed_mask(tmp_path):
    options = {"name": "feddst", "sparsity": 0.8, "readjust_interval": 1, "readjust_fraction": 0.0}
    run = run_inline(tiny_federation(tmp_path, algorithm=options, rounds=4), tmp_path / "d")
    fixed = {"name": "fixed_mask", "sparsity": 0.8}
    assert_identical(run, run_inline(tiny_federation(tmp_path, algorithm=fixed, rounds=4), tmp_path / "m"))


# -------------------------------------------------------------------------------------------------- tiers


@given(st.integers(0, 2**32 - 1), st.sampled_from([[0.5, 0.7], [0.5, 0.5], [0.8, 0.8, 0.6]]))
@settings(max_examples=25, deadline=None)
def test_a_cohort_of_small_budgets_does_not_shrink_the_mask(seed, sparsities):
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.permutation(40) < 20)
    weights = torch.from_numpy(rng.normal(size=40).astype(np.float32)).masked_fill(~mask, 0.0)
    method = FedDST(sparsity=0.5, readjust_interval=1, readjust_fraction=0.6)
    clients = [(rng.normal(size=10).tolist(), int(rng.integers(4)), 5) for _ in sparsities]
    sent, after = play(
        method,
        ServerState(round=0, weights=weights, mask=mask),
        clients,
        classes=4,
        epochs=2,
        batch_size=2,
        lr=0.1,
        proximal=0.3,
        sparsities=sparsities,
    )
    for trained, sparsity in zip(sent, sparsities, strict=True):
        assert int(trained.support.sum()) == round((1 - sparsity) * 40)
        assert (trained.values[~trained.support].view(np.uint32) == 0).all()
    assert int(after.mask.sum()) == 20
    assert not after.weights[~after.mask].any()
    # What no client holds but the mask still does, is as it was.
    held = torch.from_numpy(np.any([trained.support for trained in sent], axis=0))
    stayed = after.mask & ~held
    assert torch.equal(after.weights[stayed], weights[stayed])
    assert not (after.mask & ~held & ~mask).any()
