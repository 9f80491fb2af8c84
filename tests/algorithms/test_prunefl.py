"""PruneFL: an adjustment by hand, the stage before round 1, the naive reference, its costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from algorithms import Entry, ParameterLayout
from algorithms.prunefl import PruneFL
from cluster.clients.billing import seconds_of_weights
from cluster.flops import LayerFlops
from cluster.simulation.clock import Device
from tests.algorithms.masked import NaiveMasked, bools
from tests.tiny_experiment import assert_same, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

LAYERS = (Entry("a", (4,), 0, 4), Entry("b", (4,), 4, 8))


def adjusted(method, weights, mask, squares, seconds, number=0):
    found = method.adjusted(
        torch.tensor(weights), bools(mask), torch.tensor(squares), torch.tensor(seconds), LAYERS, number
    )
    return "".join("01"[bit] for bit in found.tolist())


# ------------------------------------------------------------------------------------------------ by hand

W = [3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_weights_come_while_they_raise_the_rate_by_hand():
    # Kept: three weights of cost 1, sum of g^2 4, T_0 1: rate 1. Of 2, 1.1 and .9 the first one comes: 6/5;
    # 1.1 is below that.
    squares = [2.0, 1.0, 1.0, 1.1, 2.0, 0.9, 0.0, 0.0, 0.0]
    method = PruneFL(drop_fraction=0.0)
    assert adjusted(method, W, "11100000", squares, [1.0, 1.0, 1.0]) == "11101000"
    # What else learns raises the rate that has to be exceeded: 4 + 4 over 4.
    assert adjusted(method, W, "11100000", [*squares[:-1], 4.0], [1.0, 1.0, 1.0]) == "11100000"
    # Layer b costs twice as much: kept 4/4, 2 over 2 does not exceed it, 1.1 over 1 does; then 5.1/5 > 1.
    assert adjusted(method, W, "11100000", squares, [1.0, 2.0, 1.0]) == "11110000"


def test_the_smallest_weights_have_to_earn_their_place_by_hand():
    # A third of layer a's three is one weight: the 1.0, whose g^2 is 1. Kept 3 over 1 + 2: rate 1. The 2.0
    # comes, then 5/4: neither the 1.1 nor the dropped one.
    squares = [2.0, 1.0, 1.0, 1.1, 2.0, 0.9, 0.0, 0.0, 0.0]
    method = PruneFL(drop_fraction=0.34, half_life=10)
    assert adjusted(method, W, "11100000", squares, [1.0, 1.0, 1.0]) == "11001000"
    # With g^2 of 3 the dropped one comes back first: 6/4; then 2: 8/5; then 1.1 does not.
    squares[2] = 3.0
    assert adjusted(method, W, "11100000", squares, [1.0, 1.0, 1.0]) == "11101000"
    # Ten rounds on half of the share is less than one of three weights: nothing is dropped.
    squares[2] = 0.0
    assert adjusted(method, W, "11100000", squares, [1.0, 1.0, 1.0], number=10)[:3] == "111"
    assert adjusted(method, W, "11100000", squares, [1.0, 1.0, 1.0], number=0)[:3] == "110"


def test_the_size_is_found_up_to_a_cap_and_equals_go_by_index():
    squares = [1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 0.0]
    assert adjusted(PruneFL(drop_fraction=0.0), W, "11100000", squares, [1.0, 1.0, 1.0]) == "11111111"
    capped = PruneFL(drop_fraction=0.0, max_density=0.625)
    assert adjusted(capped, W, "11100000", squares, [1.0, 1.0, 1.0]) == "11111000"
    # A mask above the cap only does not grow.
    assert (
        adjusted(PruneFL(drop_fraction=0.0, max_density=0.25), W, "11100000", squares, [1.0] * 3)
        == "11100000"
    )


def test_what_a_weight_costs_by_hand():
    layout = ParameterLayout((Entry("a", (4,), 0, 4), Entry("b", (2,), 4, 6)), (Entry("c", (3,), 6, 9),), ())
    flops = LayerFlops(np.array([8.0, 100.0]), np.array([0.0, 1.0]))
    device = Device(compute=1000.0, downlink=32.0, uplink=16.0, latency=0.5)
    # A float takes 1 s down and 2 s up. Ten samples: 2 * 8 * 10 / 4 = 40 FLOP a weight of a,
    # 3 * 100 * 10 / 2 = 1500 of b. The rest: latency and three floats.
    spares = seconds_of_weights(device, flops, layout, 10, spares=True)
    assert spares.tolist() == pytest.approx([3.04, 4.5, 9.5])
    # Where zeros spare nothing, all of it is the rest's: 160 + 3000 FLOP.
    dense = seconds_of_weights(device, flops, layout, 10, spares=False)
    assert dense.tolist() == pytest.approx([3.0, 3.0, 12.66])


# -------------------------------------------------------------------------------------- whole federations


class NaivePruneFL(NaiveMasked):
    """One weight after the other is asked whether it pays, with the figures of the uniform devices."""

    def initial(self, weights):
        self.mask = {name: torch.ones(weights[name].shape, dtype=torch.bool) for name in self.prunable}
        self.squares, self.others = {}, {}
        return weights

    def change_gradients(self, weights, gradients, visit):
        if visit.round % self.options.readjust_interval == 0:
            key = visit.round, visit.client
            sums = self.squares.setdefault(key, {n: torch.zeros(weights[n].shape) for n in self.prunable})
            for name, gradient in gradients.items():
                if name in sums:
                    sums[name] += gradient**2
                else:
                    self.others[key] = self.others.get(key, 0.0) + float((gradient**2).sum())
        super().change_gradients(weights, gradients, visit)

    def server(self, weights, uploads, masks, sizes, round_number):
        stepped = self.masked(self.server_step(weights, self.mean(uploads, sizes)), self.mask)
        if round_number % self.options.readjust_interval:
            return stepped
        whole = sum(sizes.values())
        gains, kept = {}, []
        share = self.options.drop_fraction * 0.5 ** (round_number / self.options.half_life)
        for name in self.prunable:
            mean = sum(
                sizes[c] / whole * self.squares[round_number, c][name].double().flatten() for c in uploads
            )
            bits, values = self.mask[name].flatten().tolist(), stepped[name].flatten().tolist()
            held = [i for _, i in sorted((-abs(values[i]), i) for i, bit in enumerate(bits) if bit)]
            held = held[: len(held) - int(share * len(held))]
            kept += [(name, i) for i in held]
            gains |= {(name, i): float(g) for i, g in enumerate(mean)}
        a_float = 32 / 35.96e6 + 32 / 11.22e6
        others = sum(weights[n].numel() for n in weights if n not in self.prunable)
        flops = sum(sizes[c] * self.flops * sizes[c] for c in uploads) / whole
        gain = sum(sizes[c] / whole * self.others[round_number, c] for c in uploads)
        gain += sum(gains[key] for key in kept)
        cost = 0.04 + a_float * others + flops / 22.5e9 + a_float * len(kept)
        order = {key: place for place, key in enumerate(gains)}
        for key in sorted(gains.keys() - set(kept), key=lambda key: (-gains[key], order[key])):
            if gains[key] / a_float <= gain / cost:
                break
            kept.append(key)
            gain, cost = gain + gains[key], cost + a_float
        mask = {name: torch.zeros(self.mask[name].numel(), dtype=torch.bool) for name in self.prunable}
        for name, i in kept:
            mask[name][i] = True
        self.change_mask({name: bits.view(self.mask[name].shape) for name, bits in mask.items()})
        return self.masked(stepped, self.mask)


OPTIONS = {"name": "prunefl", "readjust_interval": 2, "initial_adjustments": 0}


def test_equals_the_naive_reference(cache, tmp_path):
    config = tiny_federation(cache, algorithm=OPTIONS, rounds=5, server={"name": "fedavg", "momentum": 0.9})
    run = run_inline(config, tmp_path / "run")
    naive = NaivePruneFL(config)
    naive.flops = run.driver.federation.flops.dense(1)
    naive = naive.run()
    assert_same(run, naive)
    sizes = [int(state.mask.sum()) for state in run.states]
    assert sizes[0] == sizes[1] == 684 > sizes[2] == sizes[3] > 0
    assert sizes[4] == sizes[5] != sizes[3]


def test_squares_travel_in_adjusting_rounds_alone(cache, tmp_path):
    run = run_inline(tiny_federation(cache, algorithm=OPTIONS, rounds=3), tmp_path / "run")
    plain = run_inline(tiny_federation(cache, rounds=3), tmp_path / "plain")
    extra = [
        one["comm/uplink_bytes"] - other["comm/uplink_bytes"]
        for one, other in zip(run.lines, plain.lines, strict=True)
    ]
    layers = run.driver.layout.prunable
    assert extra[0] == 0
    assert extra[1] == 4 * 4 * (684 + 1 + len(layers) + 1)
    assert extra[2] < 0
    # None of it goes down.
    assert run.lines[1]["comm/downlink_bytes"] == plain.lines[1]["comm/downlink_bytes"]


def test_an_adjusting_rounds_gradient_is_used_whole(cache, tmp_path):
    """Forward, input gradient and weight gradient: 3 d of a dense step against 2 d + 1, at d of .7."""
    config = tiny_federation(cache, algorithm={**OPTIONS, "max_density": 0.3}, rounds=4)
    run = run_inline(config, tmp_path / "run")
    assert run.states[2].mask.sum() == run.states[3].mask.sum() == 481
    third, fourth = (line["flops/sparse"] / line["flops/dense"] for line in run.lines[2:])
    assert third == pytest.approx(0.7, abs=0.1)
    assert fourth - third == pytest.approx(0.1, abs=0.03)


def test_one_client_finds_the_first_mask(cache, tmp_path):
    options = {**OPTIONS, "initial_adjustments": 12}
    run = run_inline(tiny_federation(cache, algorithm=options, rounds=1), tmp_path / "run")
    stage, first = run.lines
    assert (stage["round"], stage["clients/trained"], stage["clients/steps"]) == (0, 1, 120)
    ((client, support),) = [(c, mask) for (n, c), (_, mask) in run.uploads.items() if n == 0]
    mask = torch.cat([support[layer.name].flatten() for layer in run.driver.layout.prunable])
    assert torch.equal(run.states[1].mask, mask)
    assert 0 < int(mask.sum()) < 684
    values = run.uploads[0, client][0]
    for layer in run.driver.layout.prunable:
        assert torch.equal(run.states[1].weights[layer.span], values[layer.name].flatten())
    assert first["comm/uplink_bytes"] < 4 * 4 * 684  # of the mask alone


def test_the_stage_ends_when_the_size_has_settled(cache, tmp_path, monkeypatch):
    """After five moves of at most a tenth in a row no adjustment follows."""
    sizes = [400, 300, 290, 280, 300, 330, 200, 190, 185, 180, 179, 181, 10, 10, 10]
    asked = []

    def planted(self, weights, mask, squares, seconds, layers, number):
        asked.append(number)
        return torch.arange(len(mask)) < sizes[len(asked) - 1]

    monkeypatch.setattr(PruneFL, "adjusted", planted)
    options = {**OPTIONS, "initial_adjustments": 15}
    run = run_inline(tiny_federation(cache, algorithm=options, rounds=1), tmp_path / "run")
    # 400 to 300 is too much, then 290, 280, 300, 330 (a tenth), 200: too much; 190, 185, 180, 179, 181.
    assert len(asked) == 12
    assert int(run.states[1].mask.sum()) == 181


def test_without_adjustments_it_is_fedavg_bit_for_bit(cache, tmp_path):
    options = {**OPTIONS, "readjust_interval": 100}
    run = run_inline(tiny_federation(cache, algorithm=options), tmp_path / "own")
    plain = run_inline(tiny_federation(cache), tmp_path / "fedavg")
    size = plain.driver.layout.size  # behind it is what would go up alone
    for own, other in zip(run.states, plain.states, strict=True):
        assert torch.equal(own.weights[:size], other.weights)
    for line, other in zip(run.lines, plain.lines, strict=True):
        assert line["comm/uplink_bytes"] == other["comm/uplink_bytes"]
