"""FedRTS: outcomes and posteriors by hand, the naive reference, its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from algorithms import Entry, Grid, ParameterLayout, ServerState, Total
from algorithms.fedrts import FedRTS, drawn_mask, exchanged, outcomes_of
from cluster import seeding
from tests.algorithms.masked import NaiveMasked, bools
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

LAYERS = (Entry("w", (6,), 0, 6),)
LAYOUT = ParameterLayout(LAYERS, (), ())
MASK = bools("111110")


def near(values):
    return pytest.approx(values, abs=1e-6)


class Means:
    """A generator whose draws are the means."""

    def beta(self, wins, losses):
        return wins / (wins + losses)


# ------------------------------------------------------------------------------------------------ by hand


def two_clients():
    """A, one sample, whose three largest are {0, 1, 3}; B, three, with {0, 2, 3}; of the mean {0, 1, 2}."""
    total = Total.zero(Grid(2.0**20, 4), LAYOUT, masked=True, updates=True, marks=True)
    for client, values, samples in (
        (0, [10.0, -40.0, 1.0, 2.0, 0.5, 0.0], 1),
        (1, [10.0, 0.5, -4.0, 3.0, 0.1, 0.0], 3),
    ):
        # Both name weight 5.
        total.fold(client, np.float32(values), MASK.numpy(), samples, LAYOUT, marks=bools("000001").numpy())
    weights = torch.tensor([10.0, -10.4, 3.25, 2.75, 0.2, 0.0])
    return total, weights


def test_outcomes_and_posteriors_by_hand():
    total, weights = two_clients()
    outcomes = outcomes_of(weights, MASK, total, np.array([2]), LAYERS, 0.5)
    assert outcomes.tolist() == near([1.0, 0.625, 0.875, 0.5, 0.0, 0.75])
    wins, losses = 1.0 + 10.0 * outcomes, 1.0 + 10.0 * (1.0 - outcomes)
    assert wins.tolist() == near([11.0, 7.25, 9.75, 6.0, 1.0, 8.5])
    assert losses.tolist() == near([1.0, 4.75, 2.25, 6.0, 11.0, 3.5])
    means = wins / (wins + losses)
    assert [round(mean, 3) for mean in means.tolist()] == [0.917, 0.604, 0.812, 0.5, 0.083, 0.708]
    # By means 4 leaves and 5 enters.
    assert drawn_mask(wins, losses, np.array([5]), LAYERS, Means()).tolist() == bools("111101").tolist()


def test_the_clients_weight_is_gamma():
    total, weights = two_clients()
    servers = outcomes_of(weights, MASK, total, np.array([2]), LAYERS, 0.0)
    assert servers.tolist() == near([1.0, 1.0, 1.0, 0.0, 0.0, 0.5])  # of the absent it knows nothing
    clients = outcomes_of(weights, MASK, total, np.array([2]), LAYERS, 1.0)
    assert clients.tolist() == near([1.0, 0.25, 0.75, 1.0, 0.0, 1.0])


def test_no_more_is_exchanged_than_is_absent():
    assert exchanged(0.4, MASK, LAYERS).tolist() == [1]  # floor(.4 * 5) = 2
    assert exchanged(0.4, bools("111000"), LAYERS).tolist() == [1]  # floor(1.2)
    assert exchanged(0.2, MASK, LAYERS).tolist() == [1]
    assert exchanged(0.2, bools("111100"), LAYERS).tolist() == [0]


def test_the_schedule_ends_where_the_formula_rises_again():
    method = FedRTS(readjust_fraction=0.4, readjust_interval=5, readjust_until=20)
    assert method.rate(10) == pytest.approx(0.2)
    assert method.rate(5) == pytest.approx(0.2 * (1 + 1 / math.sqrt(2)))
    assert [method.rate(number) for number in (20, 21, 40)] == [0.0] * 3
    state = ServerState(round=0, weights=torch.zeros(6), mask=MASK)
    told = {
        t: method.instruct(ServerState(t - 1, state.weights, state.mask), 50, 10).phase for t in range(1, 51)
    }
    assert [t for t, phase in told.items() if phase == "adjust"] == [5, 10, 15]


# -------------------------------------------------------------------------------------- whole federations


class NaiveFedRTS(NaiveMasked):
    """Votes one by one; draws as documented: Beta of all weights in order, keyed by a seed and the round."""

    def initial(self, weights):
        rng = seeding.generator(self.config.seed, "server")
        keep = self.kept_count(self.options.sparsity)
        shares = self.density_shares("uniform")
        counts = [round(keep * share / sum(shares)) for share in shares]
        assert sum(counts) == keep
        self.mask = self.draw(counts, rng)
        self.seed = int(rng.integers(2**63 - 1))
        self.wins = {n: torch.ones(weights[n].shape, dtype=torch.float64) for n in self.prunable}
        self.losses = {n: w.clone() for n, w in self.wins.items()}
        return self.masked(weights, self.mask)

    def stakes(self, round_number):
        """k_l of every layer."""
        end = self.options.readjust_until
        rate = 0.0
        if round_number < end:
            rate = self.options.readjust_fraction * 0.5 * (1 + math.cos(math.pi * round_number / end))
        return [
            min(math.floor(rate * count + 1e-9), size - count)
            for count, size in zip(self.counts(self.mask), self.sizes(), strict=True)
        ]

    def adjusting(self, round_number):
        return (
            round_number % self.options.readjust_interval == 0 and round_number < self.options.readjust_until
        )

    def upload(self, weights, received, visit):
        if self.adjusting(visit.round):
            visit.notes["dense"] = True
            gradients = self.one_more_gradient({n: w.clone() for n, w in weights.items()}, visit)
            absent = {n: ~self.mask[n] for n in self.prunable}
            self.named = getattr(self, "named", {})
            self.named[visit.round, visit.client] = self.tops(gradients, self.stakes(visit.round), [absent])
        return self.sent(weights, visit.notes["mask"])

    def server(self, weights, uploads, masks, sizes, round_number):
        stepped = self.masked(self.server_step(weights, self.masked_mean(uploads, masks, sizes)), self.mask)
        if round_number >= self.options.readjust_until:
            return stepped
        tops = [c - k for c, k in zip(self.counts(self.mask), self.stakes(round_number), strict=True)]
        whole, gamma = sum(sizes.values()), self.options.client_votes

        def kept(values):
            return self.tops({n: values[n].abs() for n in self.prunable}, tops, [self.mask])

        own = kept(stepped)
        for name in self.prunable:
            votes = sum(sizes[c] / whole * kept(uploads[c])[name].double() for c in uploads)
            outcome = (1 - gamma) * own[name].double() + gamma * votes
            tried = self.mask[name].double()
            if self.adjusting(round_number):
                named = sum(sizes[c] / whole * self.named[round_number, c][name].double() for c in uploads)
                outcome = torch.where(self.mask[name], outcome, (1 - gamma) * 0.5 + gamma * named)
                tried = torch.ones_like(tried)
            self.wins[name] += self.options.vote * outcome * tried
            self.losses[name] += self.options.vote * (1 - outcome) * tried
        if not self.adjusting(round_number):
            return stepped
        rng = np.random.default_rng([self.seed, round_number])
        flat = [torch.cat([p[n].flatten() for n in self.prunable]).numpy() for p in (self.wins, self.losses)]
        drawn = np.split(rng.beta(*flat), np.cumsum(self.sizes())[:-1])
        scores = {
            n: torch.from_numpy(d).view(weights[n].shape) for n, d in zip(self.prunable, drawn, strict=True)
        }
        self.change_mask(self.tops(scores, self.counts(self.mask)))
        return self.masked(stepped, self.mask)


OPTIONS = {
    "name": "fedrts",
    "sparsity": 0.75,  # 171 of 684, a quarter of each layer
    "layer_density": "uniform",
    "readjust_interval": 2,
    "readjust_fraction": 0.4,
    "readjust_until": 5,
}


def test_equals_the_naive_reference(cache, tmp_path):
    more = {"server": {"name": "fedavg", "momentum": 0.9}, "local": {"proximal": 0.1}}
    config = tiny_federation(cache, algorithm=OPTIONS, rounds=5, **more)
    run = run_inline(config, tmp_path / "run")
    assert_same(run, NaiveFedRTS(config).run())
    assert [state.mask_version for state in run.states] == [0, 0, 1, 1, 2, 2]
    layers = run.driver.layout.prunable
    counts = {tuple(int(s.mask[layer.span].sum()) for layer in layers) for s in run.states}
    assert counts == {(9, 54, 96, 12)}
    # Uploads hold nothing outside the mask they were trained in.
    for (number, _), (_, support) in run.uploads.items():
        flat = torch.cat([support[layer.name].flatten() for layer in layers])
        assert torch.equal(flat, run.states[number - 1].mask)
    for state in run.states:
        for moment in state.moments:
            assert not moment[:684][~state.mask].any()


def test_named_positions_cost_less_than_floats(cache, tmp_path):
    """Four clients name 3 + 19 + 34 + 4 = 60 absent weights each: a byte or so for each, and a header."""
    run = run_inline(tiny_federation(cache, algorithm=OPTIONS, rounds=2), tmp_path / "run")
    first, second = (line["comm/uplink_bytes"] for line in run.lines)
    named = sum(exchanged(FedRTS(**{k: v for k, v in OPTIONS.items() if k != "name"}).rate(2),
                          run.states[1].mask, run.driver.layout.prunable))  # fmt: skip
    assert 0 < second - first <= 4 * (64 + 1.3 * named)


def test_without_adjustments_it_is_the_fixed_mask(cache, tmp_path):
    options = {**OPTIONS, "readjust_fraction": 0.0}
    run = run_inline(tiny_federation(cache, algorithm=options, rounds=4), tmp_path / "r")
    fixed = {"name": "fixed_mask", "sparsity": 0.75, "layer_density": "uniform"}
    assert_identical(run, run_inline(tiny_federation(cache, algorithm=fixed, rounds=4), tmp_path / "m"))


def test_without_votes_masks_are_uniform_whatever_is_learned(cache, tmp_path):
    masks = []
    for lr in (0.2, 0.01):
        config = tiny_federation(cache, algorithm={**OPTIONS, "vote": 0.0}, rounds=5, local={"lr": lr})
        run = run_inline(config, tmp_path / f"run-{lr}")
        masks.append([state.mask for state in run.states])
        assert all((state.arrays[n] == 1.0).all() for state in run.states for n in ("wins", "losses"))
    assert all(torch.equal(one, other) for one, other in zip(*masks, strict=True))
    # Two independent masks of density d have d^2 in common: 171 / 4 = 43, standard deviation below 6.
    assert 25 < int((masks[0][2] & masks[0][1]).sum()) < 61
