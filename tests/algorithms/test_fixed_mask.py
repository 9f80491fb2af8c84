"""Fixed mask: rounds worked by hand, tiers, the naive reference, FedAvg at sparsity 0, what is billed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from algorithms import ParameterLayout, ServerState
from algorithms.fixed_mask import FixedMask
from cluster.transport import wire
from tests.algorithms.masked import NaiveMasked, bools, play
from tests.tiny_experiment import assert_identical, assert_same, run_inline, tiny_federation


def state_of(weights: list[list[float]], mask: str) -> ServerState:
    return ServerState(round=0, weights=torch.tensor(weights).flatten(), mask=bools(mask))


# ------------------------------------------------------------------------------------------------ by hand


def test_a_round_worked_by_hand():
    # W = 0: p = 1/2, dL/dW = (p - onehot) x^T; position 1 is outside the mask.
    # Client 0, one sample of class 0, x = (1, 1/2): W = [[1/2, -], [-1/2, -1/4]].
    # Client 1, three samples of class 1, x = (1/2, 1): W = [[-1/4, -], [1/4, 1/2]].
    clients = [([1.0, 0.5], 0, 1), ([0.5, 1.0], 1, 3)]
    before = state_of([[0.0, 0.0], [0.0, 0.0]], "1011")
    sent, after = play(FixedMask(sparsity=0.25), before, clients)
    assert sent[0].values.tolist() == [0.5, 0.0, -0.5, -0.25]
    assert sent[1].values.tolist() == [-0.25, 0.0, 0.25, 0.5]
    assert all(np.array_equal(s.support, before.mask.numpy()) for s in sent)
    # (1 * 1/2 - 3 * 1/4)/4 = -1/16; (-1/2 + 3/4)/4 = 1/16; (-1/4 + 3/2)/4 = 5/16.
    assert after.weights.tolist() == [-0.0625, 0.0, 0.0625, 0.3125]
    assert after.mask is before.mask
    assert after.mask_version == 0


def test_a_smaller_budget_trains_the_top_of_the_mask():
    # Equal rows: p = 1/2. Client 0 may hold two of the four: the twos (ties: lower index first), so it trains
    # [[2, 0], [2, 0]] with x = (1, 1/2), class 0: [[2.5, 0], [1.5, 0]].
    # Client 1 holds all; x = (1/2, 1), class 1: [[1.75, .5], [2.25, 1.5]].
    method = FixedMask(sparsity=0.0)
    before = state_of([[2.0, 1.0], [2.0, 1.0]], "1111")
    clients = [([1.0, 0.5], 0, 1), ([0.5, 1.0], 1, 3)]
    sent, after = play(method, before, clients, sparsities=[0.5, 0.0])
    assert sent[0].support.tolist() == [True, False, True, False]
    assert sent[0].values.tolist() == [2.5, 0.0, 1.5, 0.0]
    # The first column by n: (2.5 + 3 * 1.75)/4 and (1.5 + 3 * 2.25)/4; the second is client 1's alone.
    assert after.weights.tolist() == [1.9375, 0.5, 2.0625, 1.5]
    # Where nobody holds a weight of the mask, it stays as it was.
    _, after = play(method, before, clients[:1], sparsities=[0.5])
    assert after.weights.tolist() == [2.5, 1.0, 1.5, 1.0]


def test_tiers_are_nested_and_a_proximal_term_does_not_refill_them():
    rng = np.random.default_rng(3)
    mask = torch.from_numpy(rng.random(20) < 0.8)
    weights = torch.from_numpy(rng.normal(size=20).astype(np.float32)).masked_fill(~mask, 0.0)
    before = ServerState(round=0, weights=weights, mask=mask)
    clients = [(rng.normal(size=10).tolist(), 0, 4) for _ in range(4)]
    sparsity = 1 - int(mask.sum()) / 20
    sent, _ = play(
        FixedMask(sparsity=sparsity),
        before,
        clients,
        sparsities=[sparsity, 0.5, 0.7, 0.9],
        epochs=2,
        batch_size=2,
        proximal=0.5,
        weight_decay=0.01,
    )
    supports = [trained.support for trained in sent]
    assert np.array_equal(supports[0], mask.numpy())
    assert [int(support.sum()) for support in supports[1:]] == [10, 6, 2]
    for larger, smaller in itertools.pairwise(supports):
        assert not (smaller & ~larger).any()
    for trained in sent:
        assert (trained.values[~trained.support].view(np.uint32) == 0).all()  # +0.0, no other zero
        # |w_t| of what was kept is at least that of what was left out.
        kept, out = np.abs(before.weights.numpy())[trained.support], trained.support | ~mask.numpy()
        assert out.all() or kept.min() >= np.abs(before.weights.numpy())[~out].max()


def test_flops_count_the_mask_and_not_the_nonzeros():
    # Six of eight weights are in the mask, and x has a zero: its column never leaves 0, and is computed.
    mask = "1110 1110"
    sent, _ = play(FixedMask(sparsity=0.25), state_of([[0.0] * 4] * 2, mask), [([1.0, 0.0, 1.0, 1.0], 0, 4)])
    # One batch of four is the first forward (w_t all zero): 4 samples * 16 FLOPs * (0 + 6/8 of
    # the weight gradient).
    assert sent[0].measured.flops_sparse.tolist() == [48.0]
    sent, _ = play(
        FixedMask(sparsity=0.25),
        state_of([[0.0] * 4] * 2, mask),
        [([1.0, 0.0, 1.0, 1.0], 0, 4)],
        batch_size=2,
    )
    # Two samples as before, then two at density 6/8: 24 + 2 * 16 * (.75 + .75) = 72.
    assert sent[0].measured.flops_sparse.tolist() == [72.0]


# -------------------------------------------------------------------------------------- whole federations


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"algorithm": {"name": "fixed_mask", "sparsity": 0.7, "layer_density": "uniform"}},
        {"algorithm": {"name": "fixed_mask", "sparsity": 0.5, "layer_density": "er"}},
        {"local": {"epochs": 2, "weight_decay": 0.01, "proximal": 0.1}, "server": {"name": "fedadam"}},
        {"model": {"name": "tests.tiny_experiment:tiny_model"}},
    ],
    ids=["erk", "uniform", "er", "decay, proximal, adam", "batch norm"],
)
def test_equals_the_naive_reference(tmp_path, overrides):
    config = tiny_federation(
        tmp_path, **{"algorithm": {"name": "fixed_mask", "sparsity": 0.8}, "rounds": 3, **overrides}
    )
    assert_same(run_inline(config, tmp_path / "run"), NaiveMasked(config).run())


@pytest.mark.parametrize("name", ["fixed_mask", "feddst"])
def test_at_sparsity_0_it_is_fedavg_bit_for_bit(tmp_path, name):
    # FedDST too: a dense layer has nothing to exchange, and its extra batch leaves no trace.
    options = {"name": name, "sparsity": 0.0}
    if name == "feddst":
        options |= {"readjust_interval": 1, "readjust_fraction": 0.5}
    model = {"name": "tests.tiny_experiment:tiny_model"}  # with BatchNorm
    run = run_inline(tiny_federation(tmp_path, algorithm=options, model=model, rounds=4), tmp_path / "m")
    fedavg = run_inline(tiny_federation(tmp_path, model=model, rounds=4), tmp_path / "f")
    assert_identical(run, fedavg)


def test_the_mask_holds_exactly_k_and_zeros_stay_exactly_zero(tmp_path):
    config = tiny_federation(
        tmp_path,
        algorithm={"name": "fixed_mask", "sparsity": 0.9},
        local={"epochs": 2, "weight_decay": 0.1, "proximal": 0.5},
        server={"name": "fedyogi"},
        rounds=3,
    )
    run = run_inline(config, tmp_path / "run")
    mask = run.states[0].mask
    assert int(mask.sum()) == 68  # round(.1 * 684)
    for state in run.states:
        assert torch.equal(state.mask, mask)
        assert (state.weights[:684][~mask].numpy().view(np.uint32) == 0).all()
    assert all(line["masks/regrowth"] == 0 for line in run.lines)


# ------------------------------------------------------------------------------------------------- billed


def expected_downlink(run) -> list[int]:
    """Each round's bytes down, from the states and cohorts alone."""
    held, bills = {}, []
    shape = run.driver._schedule.uplink.shape
    for before, line in zip(run.states, run.lines, strict=False):
        exact, mask = before.weights.numpy(), before.mask
        support = exact[: shape.prunable] != 0 if mask is None else mask.numpy()
        full = len(wire.encode(exact, support, shape))
        # Values alone: the header, K masked and all other values, 4 bytes each.
        header = wire.describe(wire.encode(exact, support, shape))["header_bytes"]
        values = header + 4 * (int(support.sum()) + shape.size - shape.prunable)
        bill = 0
        for client in sorted(client for number, client in run.uploads if number == line["round"]):
            knows = mask is not None and held.get(client) == before.mask_version
            bill += values if knows else full
            if mask is not None:
                held[client] = before.mask_version
        bills.append(bill)
    return bills


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "fixed_mask", "sparsity": 0.8},
        {"name": "flash", "sparsity": 0.8, "refresh_interval": 3},
        {"name": "flash", "sparsity": 0.8, "stage1": "sensitivity", "init_epochs": 2, "init_fraction": 0.5},
        {"name": "feddst", "sparsity": 0.8, "readjust_interval": 2, "readjust_fraction": 1.0},
    ],
    ids=["fixed", "jmwst", "sensitivity", "feddst"],
)
def test_who_holds_the_mask_gets_values_alone_and_who_is_stale_gets_it_again(tmp_path, algorithm):
    run = run_inline(tiny_federation(tmp_path, algorithm=algorithm, rounds=8), tmp_path / "run")
    bills = expected_downlink(run)
    assert [line["comm/downlink_bytes"] for line in run.lines] == bills
    versions = [state.mask_version for state in run.states]
    assert versions == sorted(versions)
    assert (len(set(versions)) > 1) == (algorithm["name"] != "fixed_mask")
    if algorithm["name"] == "fixed_mask":
        assert bills[0] > min(bills)  # in round 1 nobody holds the mask
        # Six clients, four a round: before the last round each has got it, and it is never sent again.
        shape = run.driver._schedule.uplink.shape
        header = wire.describe(wire.encode(run.state.weights.numpy(), None, shape))["header_bytes"]
        assert bills[-1] == 4 * (header + 4 * (137 + shape.size - 684))  # K = round(.2 * 684)
        assert run.lines[-1]["comm/uplink_bytes"] == bills[-1]


def test_an_initial_mask_by_magnitude():
    # Uniform density 1/2 of two layers of 4: the two largest |w| of each, whatever the other layer holds.
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    layout = ParameterLayout.of(model)
    weights = torch.tensor([0.1, -0.4, 0.3, 0.2, 5.0, -7.0, 6.0, 8.0])
    method = FixedMask(sparsity=0.5, layer_density="uniform", initial_mask="magnitude")
    state = method.initial_state(weights, layout, np.random.default_rng(0))
    assert state.weights.tolist() == torch.tensor([0, -0.4, 0.3, 0, 0, -7.0, 0, 8.0]).tolist()
    assert state.mask.tolist() == [False, True, True, False, False, True, False, True]
