"""Parts of the model: what clients of a budget get, train, send and are billed for; the mean of holders."""

import itertools

import numpy as np
import pytest
import torch

from algorithms import Grid, ParameterLayout, ServerOptimizer, ServerState, registry
from algorithms.fedrolex import FedRolex
from algorithms.heterofl import HeteroFL
from cluster.exchange import Broadcast
from cluster.transport import wire
from cluster.transport.downlink import Part, Sender
from cluster.workload import models
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

ROWS = np.arange(20)
SUBMODELS = [name for name, method in registry().items() if method.confined]
HEADER = len(wire.encode(np.zeros(1, np.float32), None, wire.Shape(1, 1, 1, ((0, 1),)))) - 4


def tiers(**sparsities):
    return {"tiers": {name: {"share": 1 / len(sparsities), "sparsity": s} for name, s in sparsities.items()}}


@pytest.mark.parametrize("method", SUBMODELS)
def test_budget_1_is_fedavg_bit_for_bit(cache, tmp_path, method):
    equal = {"aggregation": {"weighting": "equal"}}
    local = {"weight_decay": 1e-3, "optimizer": {"name": "sgd", "momentum": 0.9}}
    one = {"splitmix": {"bases": 1}, "fjord": {"levels": 1}}.get(method, {})
    whole = tiny_federation(
        cache, algorithm={"name": method, **one}, local=local, devices=tiers(a=0.0, b=0.0), **equal
    )
    plain = tiny_federation(cache, local=local, **equal)
    runs = [run_inline(whole, tmp_path / "whole"), run_inline(plain, tmp_path / "plain")]
    assert_identical(*runs)
    for one, other in zip(*(run.lines for run in runs), strict=True):
        for key in ("comm/uplink_bytes", "comm/downlink_bytes", "flops/dense", "time/simulated_s"):
            assert one[key] == other[key]


# ------------------------------------------------------------------------------------------- the server


def layout_of(*widths):
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return ParameterLayout.of(torch.nn.Sequential(*layers))


@pytest.mark.parametrize(("weights", "expected"), [((1, 3), [5, 5, 7]), ((1, 1), [4, 5, 7])])
@pytest.mark.parametrize("parts", [2, 3])
def test_the_mean_of_holders_by_hand(weights, expected, parts):
    """Clients with the part {0}: 2, and with {0, 1}: 6 and 5; w_t is 7. The last position is a bias."""
    layout = layout_of(2, 1)
    method, total = HeteroFL(), HeteroFL().zero(Grid(2.0**20, 4), layout)
    sent = [[2, 0, 0], [6, 5, 0]]
    for client, (values, held) in enumerate(zip(sent, ([1, 0, 0], [1, 1, 0]), strict=True)):
        order = [0, 1, 2] if parts == 3 else [2, 1, 0]  # what is counted does not end with the weights
        values, held = np.array(values, np.float32)[order], np.array(held, bool)[order]
        total.fold(client, values, held, weights[client], layout)
    state = ServerState(0, torch.full((3,), 7.0))
    found = method.advance(state, total, ServerOptimizer(), layout).weights.tolist()
    assert (found if parts == 3 else found[::-1]) == expected


def test_whoever_holds_all_counts_for_every_coordinate():
    layout = layout_of(2, 1)
    total = HeteroFL().zero(Grid(2.0**20, 4), layout)
    total.fold(0, np.array([1, 2, 3], np.float32), None, 1, layout)
    total.fold(1, np.array([5, 0, 0], np.float32), np.array([True, False, False]), 1, layout)
    assert total.mask_samples.tolist() == [2, 1, 1]
    assert total.masked_mean().tolist() == [3, 2, 3]
    assert total.votes.tolist() == [2, 1]


# ------------------------------------------------------------------------------------------- the client


def half(method, trainer, number=1):
    """The part of half of the width, and the broadcast that it is of."""
    broadcast = broadcast_of(trainer, method, None, number)
    weights = torch.from_numpy(broadcast.exact.copy())
    support = method.submodel(weights, broadcast.instructions, 0, 0.5, trainer.layout)
    parcel = Sender(trainer.layout, "float32").parcel(ServerState(number - 1, weights))
    place = parcel.part(support.numpy(), known=True, confined=True)
    return broadcast, parcel.parts[place]


def narrow(tensor, *dimensions):
    for dimension, kept in enumerate(dimensions):
        if kept is not None:
            tensor = tensor.index_select(dimension, torch.tensor(kept))
    return tensor


@pytest.mark.parametrize(
    ("method", "number", "a", "b", "c"),
    [
        (HeteroFL(share_of="width"), 1, [0, 1], [0, 1, 2], range(8)),
        (FedRolex(share_of="width"), 2, [2, 3], [3, 4, 5], range(1, 9)),
        (FedRolex(share_of="width"), 13, [0, 1], [0, 1, 2], [12, 13, 14, 15, 0, 1, 2, 3]),
    ],
)
def test_a_client_trains_the_narrow_network(method, number, a, b, c):
    """The same steps as a model of half the channels, built by itself and filled with the weights kept."""
    options = {"weight_decay": 1e-2, "proximal": 0.1}
    wide = trainer_of(method, **options)
    broadcast, part = half(method, wide, number)
    full = wide.layout.split(torch.from_numpy(broadcast.exact.copy()))
    c, pixels = list(c), [4 * channel + i for channel in b for i in range(4)]
    kept = {"0.weight": (a,), "1.weight": (a,), "1.bias": (a,), "4.weight": (b, a), "5.weight": (b,)}
    kept |= {"5.bias": (b,), "9.weight": (c, pixels), "9.bias": (c,), "11.weight": (None, c), "11.bias": ()}
    own = models.build(
        "small_cnn", input_shape=(1, 8, 8), classes=3, seed=1, channels=[2, 3], hidden=8, groups=1
    )
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(narrow(full[name], *kept[name]))
    small = trainer_of(registry()["fedavg"](), model=own, **options)
    plain = broadcast_of(small, registry()["fedavg"](), None, number)
    expected = small.visit(0, ROWS, 0.0, plain)
    values, flops = (
        small.layout.split(torch.from_numpy(expected.values.copy())),
        expected.measured.flops_dense,
    )
    trained = wide.visit(0, ROWS, 0.5, broadcast, part=part)
    found = wide.layout.split(torch.from_numpy(trained.values.copy()))
    for name, tensor in values.items():
        torch.testing.assert_close(narrow(found[name], *kept[name]), tensor, atol=2e-6, rtol=1e-5)
    assert not trained.values[: len(part.held)][~part.held].any()
    assert trained.measured.flops_dense == pytest.approx(flops, rel=1e-12)
    sparse = expected.measured.flops_sparse
    np.testing.assert_allclose(trained.measured.flops_sparse, sparse, rtol=1e-12)
    # One trainer plays clients with other parts, and with none.
    whole = wide.visit(0, ROWS, 0.0, broadcast).values
    assert np.count_nonzero(whole) > np.count_nonzero(part.weights)


def test_adam_with_momentum_stays_inside_the_part():
    from algorithms.core.local_optimizers import AdamW

    method = HeteroFL(share_of="width")
    trainer = trainer_of(method, weight_decay=0.1, optimizer=AdamW(), clip_norm=1.0)
    broadcast, part = half(method, trainer)
    trained = trainer.visit(0, ROWS, 0.5, broadcast, part=part)
    assert not trained.values[: len(part.held)][~part.held].any()
    assert (trained.values != part.weights).any()


# -------------------------------------------------------------------------------------- bytes, both ways

#: Of the tiny small_cnn at half the width: convolutions 2x9 and 3x2x9, norms 2x2 and 2x3, 8x12 + 8, 3x8 + 3.
HALF = 18 + 54 + 4 + 6 + 96 + 8 + 24 + 3


def test_bytes_of_a_slice_by_hand(cache, tmp_path):
    devices = tiers(whole=0.0, half=0.5)
    algorithm = {"name": "heterofl", "share_of": "width"}
    run = run_inline(tiny_federation(cache, algorithm=algorithm, devices=devices), tmp_path / "run")
    schedule, layout = run.driver._schedule, run.driver.layout
    small = schedule.devices.tiers == 1
    for number, line in enumerate(run.lines, start=1):
        cohort = [client for n, client in run.uploads if n == number]
        count = [HEADER + 4 * (HALF if small[client] else layout.size) for client in cohort]
        assert line["comm/uplink_bytes"] == line["comm/downlink_bytes"] == sum(count)
    assert small.sum() == 3
    assert "tiers/half/accuracy" in run.lines[0]


def test_a_support_that_the_client_cannot_know_travels_down_alone(cache, tmp_path):
    run = run_inline(
        tiny_federation(cache, algorithm={"name": "fiarse", "sparsity": 0.5}, rounds=1), tmp_path / "run"
    )
    layout, line = run.driver.layout, run.lines[0]
    ranked = layout.trained_size - 2 * (4 + 6)
    held = ranked // 2 + 2 * (4 + 6)
    assert line["comm/uplink_bytes"] == 4 * (HEADER + 4 * held)
    support = line["comm/downlink_bytes"] / 4 - HEADER - 4 * held
    assert 0 < support <= (layout.trained_size + 7) // 8
    assert line["sparsity/upload"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("value_format", ["float32", "int8"])
def test_a_part_is_encoded_once_and_read_as_it_was_sent(known, value_format):
    layout = layout_of(4, 3)
    weights = torch.linspace(-1, 2, layout.size)
    parcel = Sender(layout, value_format).parcel(ServerState(0, weights))
    support = np.arange(layout.trained_size) % 2 == 0
    first = parcel.part(support, known=known, confined=True)
    other = parcel.part(~support, known=known, confined=False)
    assert parcel.part(support.copy(), known=known, confined=True) == first != other
    assert len(parcel.parts) == 2
    part = parcel.parts[first]
    assert not part.weights[~support].any()
    np.testing.assert_allclose(
        part.weights[support], weights[support], atol=0 if value_format == "float32" else 0.01
    )
    scales, width = (2, 1) if value_format == "int8" else (0, 4)
    assert part.nbytes == HEADER + 4 * scales + width * 8 + (0 if known else 2)
    assert part.held.tolist() == support.tolist()
    assert parcel.parts[other].held is None


def test_the_part_of_a_lossy_downlink_is_what_clients_train_from(cache, tmp_path):
    settings = {"algorithm": {"name": "heterofl", "sparsity": 0.5}, "rounds": 1}
    runs = [
        run_inline(tiny_federation(cache, **settings, wire={"downlink": form}), tmp_path / form)
        for form in ("float32", "int8")
    ]
    assert runs[1].lines[0]["comm/downlink_bytes"] < runs[0].lines[0]["comm/downlink_bytes"] / 2
    assert not torch.equal(runs[0].state.weights, runs[1].state.weights)


def test_a_broadcast_tells_what_each_client_knows():
    whole, mine = np.ones(3, np.float32), np.array([1, 0, 1], np.float32)
    mask, held = np.array([True, True]), np.array([True, False, True])
    parts = (Part(mine, held, 9, 8), Part(mine, None, 9, 8))
    told = registry()["fedavg"]().instruct(ServerState(0, torch.ones(3)), 1, 1)
    broadcast = Broadcast(whole, whole, mask, told, 0.1, 8.0, 1, parts=parts)
    assert broadcast.base(None) is whole
    assert broadcast.base(0) is mine
    assert broadcast.held(None) is mask is broadcast.held(1)
    assert broadcast.held(0) is held


def test_what_an_update_cuts_of_a_part_is_held_by_nobody():
    """A support over the weights alone speaks of no bias: those of the part all count."""
    layout = layout_of(2, 1)
    total = HeteroFL().zero(Grid(2.0**20, 4), layout)
    total.fold(0, np.array([1, 0, 3], np.float32), np.array([True, False]), 2, layout)
    assert total.mask_samples.tolist() == [2, 0, 2]
    assert total.masked_mean().tolist() == [1, 0, 3]
