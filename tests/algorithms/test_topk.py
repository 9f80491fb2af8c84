"""Top-K: a round worked by hand, the naive reference, and FedAvg at sparsity 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.core.masks import cut_to_top_k
from algorithms.topk import TopK
from cluster.simulation.devices import Devices
from tests.algorithms.by_hand import one_round
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation


class NaiveTopK(NaiveFederation):
    """Dense training; one global cut, by sorting; with ``cut_received`` the received model is cut as well."""

    def begin(self, weights, visit):
        if self.options.cut_received and visit.round > 1:
            mask = self.largest(weights, self.kept_count(self.options.sparsity))
            for name, kept in mask.items():
                weights[name].masked_fill_(~kept, 0.0)

    def upload(self, weights, received, visit):
        mask = self.largest(weights, self.kept_count(self.options.sparsity))
        return self.masked(weights, mask), mask


ZEROS = [[0.0, 0.0], [0.0, 0.0]]


def test_a_round_worked_by_hand():
    # W = 0: p = 1/2, dL/dW = (p - onehot) x^T. K = 2 of 4.
    # Client 0, one sample of class 0, x = (1, 1/2): W = [[1/2, 1/4], [-1/2, -1/4]].
    # Client 1, three samples of class 1, x = (1/2, 1): W = [[-1/4, -1/2], [1/4, 1/2]].
    clients = [([1.0, 0.5], 0, 1), ([0.5, 1.0], 1, 3)]
    uploads, [after] = one_round(TopK(sparsity=0.5), ZEROS, clients)
    assert uploads == [[[0.5, 0.0], [-0.5, 0.0]], [[0.0, -0.5], [0.0, 0.5]]]
    # Absent counts as 0: 1 * 1/2 / 4 = 1/8 and 3 * 1/2 / 4 = 3/8.
    assert after == [[0.125, -0.375], [-0.125, 0.375]]


def test_ties_are_broken_by_the_lower_index():
    # x = (1, 1): all four magnitudes are 1/2, and K = round(0.75 * 4) = 3 remain.
    uploads, _ = one_round(TopK(sparsity=0.25), ZEROS, [([1.0, 1.0], 0, 1)])
    assert uploads == [[[0.5, 0.5], [-0.5, 0.0]]]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"local": {"epochs": 2, "lr_final": 0.05, "weight_decay": 0.01}},
        {"model": {"name": "tests.tiny_experiment:tiny_model"}},
        {"algorithm": {"name": "topk", "sparsity": 0.95}, "server": {"name": "fedavg", "momentum": 0.9}},
        {"algorithm": {"name": "topk", "sparsity": 0.8, "cut_received": True}, "rounds": 3},
    ],
    ids=["plain", "schedule", "batch norm", "momentum", "cut received"],
)
def test_equals_the_naive_reference(tmp_path, overrides):
    config = tiny_federation(tmp_path, **{"algorithm": {"name": "topk", "sparsity": 0.8}, **overrides})
    assert_same(run_inline(config, tmp_path / "run"), NaiveTopK(config).run())


def test_every_upload_holds_exactly_k(tmp_path):
    config = tiny_federation(tmp_path, algorithm={"name": "topk", "sparsity": 0.9})
    run = run_inline(config, tmp_path / "run")
    # round(0.1 * 684) = 68
    assert {sum(int(mask.sum()) for mask in support.values()) for _, support in run.uploads.values()} == {68}
    assert all(line["sparsity/upload"] == pytest.approx(1 - 68 / 684) for line in run.lines)


def test_at_sparsity_0_it_is_fedavg_bit_for_bit(tmp_path):
    topk = run_inline(tiny_federation(tmp_path, algorithm={"name": "topk", "sparsity": 0.0}), tmp_path / "t")
    fedavg = run_inline(tiny_federation(tmp_path), tmp_path / "f")
    assert_identical(topk, fedavg)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(topk.states, fedavg.states, strict=True))


def test_a_tier_cuts_what_it_received_to_its_own_budget(tmp_path):
    """With steps of no length a client sends what it made of the model: the top of its own budget."""
    tiers = {"wide": {"share": 0.5, "sparsity": 0.5}, "narrow": {"share": 0.5, "sparsity": 0.9}}
    config = tiny_federation(
        tmp_path,
        cohort=6,
        algorithm={"name": "topk", "sparsity": 0.5, "cut_received": True},
        devices={"tiers": tiers},
        local={"lr": 1e-30, "batch_size": 120},
    )
    run = run_inline(config, tmp_path / "run")
    received = run.states[1].weights[: run.driver.layout.prunable_size]
    devices = Devices(config)
    for client in range(6):
        sparsity = devices.sparsity(client, 0.5, 1)
        expected = cut_to_top_k(received.clone(), round((1 - sparsity) * len(received)))
        found = torch.cat([m.flatten() for m in run.uploads[2, client][1].values()])
        assert torch.equal(found, expected)
    # It is sent that cut alone: the values of K weights (zeros of w_t aside), of biases and norms, and where.
    line, layout = run.lines[1], run.driver.layout
    least = 0
    for client in range(6):
        kept = round((1 - devices.sparsity(client, 0.5, 1)) * len(received))
        least += 44 + 4 * (min(kept, int((received != 0).sum())) + layout.size - layout.prunable_size)
    assert least < line["comm/downlink_bytes"] < least + 6 * (layout.trained_size // 8 + 1)
    # The first step is billed at the density after the cut, not at that of what was received.
    layers, flops = run.driver.layout.prunable, run.driver.federation.flops

    def dense_steps(client):
        kept = torch.cat([m.flatten() for m in run.uploads[2, client][1].values()])
        density = np.array([int(kept[e.span].sum()) / e.size for e in layers])
        ones = np.ones(len(layers))
        return flops.sparse(int(run.driver.federation.sizes[client]), density, ones, ones).sum()

    assert run.lines[1]["flops/sparse"] == pytest.approx(sum(map(dense_steps, range(6))))


def test_the_guard_keeps_a_layer_of_small_weights(tmp_path):
    """The last layer's fan-in is the largest: one threshold empties it, unless it is guarded."""
    emptied = {}
    for guard in (False, True):
        config = tiny_federation(
            tmp_path,
            rounds=1,
            algorithm={"name": "topk", "sparsity": 0.95, "guard_layers": guard},
            model={"name": "tests.algorithms.test_topk:widening"},
            local={"lr": 1e-30},
        )
        run = run_inline(config, tmp_path / f"run-{guard}")
        emptied[guard] = run.lines[-1]["sparsity/layers"][-1] == 1.0
        assert all(sum(int(m.sum()) for m in masks.values()) == 84 for _, masks in run.uploads.values())
    assert emptied == {False: True, True: False}


def widening(*, input_shape, classes):
    """1,600 weights of size .1 and 75 of size .01: K is 84 at 95 %."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 25), nn.ReLU(), nn.Linear(25, classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.1, 0.2, 1600).view(25, 64))
        model[3].weight.fill_(0.01)
    return model
