"""What travels beside the model: laid out, billed both ways, averaged exactly, combined by the server."""

import numpy as np
import pytest
import torch
from torch import nn

from algorithms import Algorithm, Carried, Grid, ParameterLayout, ServerOptimizer, ServerState, Total
from cluster.transport import wire
from cluster.transport.downlink import Sender
from tests.keeping_method import Keeping, KeepingClient
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

PLAIN = ParameterLayout.of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))  # 6 weights, 3 biases
LAYOUT = PLAIN.carrying(
    {"down": Carried(2, "down"), "up": Carried(3, "up"), "both": Carried(1), "more": Carried(2, "both")}
)


def test_the_layout_by_hand():
    assert [(entry.name, entry.start, entry.stop) for entry in LAYOUT.carried] == [
        ("both", 9, 10),
        ("more", 10, 12),
        ("up", 12, 15),
        ("down", 15, 17),
    ]
    assert (LAYOUT.model_size, LAYOUT.up_size, LAYOUT.down_size, LAYOUT.size) == (9, 15, 14, 17)
    assert (PLAIN.model_size, PLAIN.up_size, PLAIN.down_size, PLAIN.size) == (9, 9, 9, 9)
    flat = np.arange(17, dtype=np.float32)
    sent = LAYOUT.sent_down(flat)
    assert sent.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 16]
    assert LAYOUT.received_down(sent).tolist() == [*range(12), 0, 0, 0, 15, 16]
    assert PLAIN.sent_down(flat[:9]) is not None


def test_every_float_is_billed_the_way_it_goes():
    header = len(wire.encode(np.zeros(9, np.float32), None, wire.Shape.of(PLAIN))) - 4 * 9
    for direction, floats in (("up", 15), ("down", 14)):
        shape = wire.Shape.of(LAYOUT, direction)
        assert len(wire.encode(np.ones(floats, np.float32), None, shape)) == header + 4 * floats


@pytest.mark.parametrize("value_format", ["float32", "int8"])
def test_a_client_receives_what_goes_down_exactly(value_format):
    weights = torch.linspace(-1, 1, 17)
    parcel = Sender(LAYOUT, value_format).parcel(ServerState(0, weights))
    expected = weights.numpy().copy()
    if value_format == "float32":
        assert parcel.decoded[:9].tobytes() == expected[:9].tobytes()
    assert parcel.decoded[9:12].tobytes() == expected[9:12].tobytes()
    assert parcel.decoded[12:15].tolist() == [0, 0, 0]
    assert parcel.decoded[15:].tobytes() == expected[15:].tobytes()


def advanced(method, share=1.0):
    total = Total.zero(Grid(2.0**20, 8), LAYOUT)
    for client, (value, samples) in enumerate([(1.0, 1), (5.0, 3)]):
        total.fold(client, np.full(15, value, np.float32), None, samples, LAYOUT)
    state = ServerState(0, torch.full((17,), 2.0))
    return method.advance(state, total, ServerOptimizer(), LAYOUT, share).weights.tolist()


def test_the_mean_is_the_next_and_what_only_goes_down_stays():
    assert advanced(Algorithm()) == [4.0] * 15 + [2.0] * 2


def test_the_server_combines_the_mean_with_its_own():
    class Half(Algorithm):
        def next_carried(self, state, means, share, layout):
            own = layout.split(state.weights, layout.carried)
            assert set(means) == {"both", "more", "up"}
            return {"both": own["both"] + share * means["both"], "down": torch.tensor([8.0, 9.0])}

    # own 2 + .25 of the mean 4; what is not named stays; the model is the mean.
    assert advanced(Half(), share=0.25) == [4.0] * 9 + [3.0] + [2.0] * 5 + [8.0, 9.0]


def test_a_run_bills_and_averages_it(cache, tmp_path):
    usual = {"rounds": 3, "algorithm": {"name": "tests.keeping_method:Keeping"}}
    run = run_inline(tiny_federation(cache, **usual), tmp_path / "run")
    plain = run_inline(tiny_federation(cache, rounds=3), tmp_path / "plain")
    for line, other in zip(run.lines, plain.lines, strict=True):
        assert line["comm/uplink_bytes"] - other["comm/uplink_bytes"] == 4 * 4 * (2 + 1 + 1)
        assert line["comm/downlink_bytes"] - other["comm/downlink_bytes"] == 4 * 4 * (2 + 1)
    layout, sizes = run.driver.layout, run.driver.federation.sizes
    for number, state in enumerate(run.states[1:], start=1):
        cohort = [client for n, client in run.uploads if n == number]
        counts = [sum(c == client and n <= number for n, c in run.uploads) for client in cohort]
        expected = sum(int(sizes[c]) * n for c, n in zip(cohort, counts, strict=True)) / sizes[cohort].sum()
        found = layout.split(state.weights, layout.carried)
        assert found["visits"].item() == pytest.approx(expected, rel=1e-6)
        share = sizes[cohort].sum() / sizes.sum()
        assert found["pull"].item() == pytest.approx(0.01 * found["moved"].item() * share, rel=1e-6)


def test_all_updates_weigh_the_same_where_that_is_asked(cache, tmp_path):
    equal = tiny_federation(cache, rounds=1, aggregation={"weighting": "equal"})
    run = run_inline(equal, tmp_path / "run")
    names = run.weights.keys()
    for name in names:
        mean = sum(values[name].double() for values, _ in run.uploads.values()) / len(run.uploads)
        assert torch.allclose(run.weights[name].double(), mean, atol=1e-7), name
    weighted = run_inline(tiny_federation(cache, rounds=1), tmp_path / "weighted")
    assert not torch.equal(run.state.weights, weighted.state.weights)
    # The loss of a round is a mean over samples all the same.
    assert run.lines[0]["train/loss"] == weighted.lines[0]["train/loss"]
    assert equal.digest() != tiny_federation(cache, rounds=1).digest()


def test_single_updates_are_there_for_a_method_that_asks(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Keeping, "keeps_updates", True)
    seen = []
    aggregate = Keeping.aggregate

    def looking(self, state, total, layout):
        seen.append(total.updates)
        return aggregate(self, state, total, layout)

    monkeypatch.setattr(Keeping, "aggregate", looking)
    config = tiny_federation(cache, algorithm={"name": "tests.keeping_method:Keeping"})
    run = run_inline(config, tmp_path / "run")
    for number, updates in enumerate(seen, start=1):
        assert sorted(updates) == [client for n, client in run.uploads if n == number]
        for client, (values, samples) in updates.items():
            by_name, _ = run.uploads[number, client]
            sent = run.driver.layout.split(torch.from_numpy(values))
            assert all(torch.equal(sent[name], by_name[name]) for name in by_name)
            assert samples == run.driver.federation.sizes[client]


@pytest.mark.parametrize("downlink", ["float32", "float16"])
def test_what_only_goes_up_no_client_receives(cache, tmp_path, monkeypatch, downlink):
    seen, begin = [], KeepingClient.begin

    def looking(self):
        seen.append([float(self.visit.carried[name][0]) for name in ("moved", "visits", "sum")])
        begin(self)

    monkeypatch.setattr(KeepingClient, "begin", looking)
    algorithm = {"name": "tests.keeping_method:Keeping"}
    config = tiny_federation(cache, rounds=2, algorithm=algorithm, wire={"downlink": downlink})
    run = run_inline(config, tmp_path / "run")
    assert seen == [[0.0, 0.0, 0.0]] * 4 + [[0.0, 0.0, 1.0]] * 4
    assert run.driver.layout.split(run.state.weights, run.driver.layout.up)["moved"] > 0  # the server's


def test_updates_of_two_totals_are_together_in_order():
    one, other = (Total.zero(Grid(2.0**20, 8), PLAIN, updates=True) for _ in range(2))
    one.fold(3, np.ones(9, np.float32), None, 2, PLAIN)
    other.fold(1, np.zeros(9, np.float32), None, 4, PLAIN)
    merged = one.merge(other)
    assert list(merged.updates) == [1, 3]
    assert merged.updates[3][0].tolist() == [1] * 9
    assert merged.updates[3][1] == 2


def test_updates_are_in_order_and_read_only_whoever_folds_them_in_which_order():
    """An actor plays long visits first; what comes out of the object store cannot be written."""
    total = Total.zero(Grid(2.0**20, 8), PLAIN, updates=True)
    for client in (3, 1, 2):
        total.fold(client, np.full(9, client, np.float32), None, 1, PLAIN)
    assert (list(total.updates), total.clients) == ([1, 2, 3], [1, 2, 3])
    assert [values[0] for values, _ in total.updates.values()] == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        total.updates[1][0][:] = 0
