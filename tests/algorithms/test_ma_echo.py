"""MA-Echo by hand, against closed forms, and at its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from algorithms import Grid, ParameterLayout, ServerState
from algorithms.ma_echo import MaEcho, meet, narrow
from cluster import seeding
from cluster.configuration.trees import ConfigError
from cluster.federation import Federation
from cluster.workload import models
from cluster.workload.models import ModelError
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")
MLP = {"name": "mlp", "hidden": [12, 8], "bias": False}
ONE_SHOT = {"rounds": 1, "cohort": 6}


def moved(iterations, step=1.0, **options):
    weights = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    projections = [torch.diag(torch.tensor(d)) for d in ([0.0, 1.0], [1.0, 0.0])]
    return meet(weights, projections, MaEcho(iterations=iterations, step=step, **options)).tolist()


# Client 1 has seen (1, 0) alone, client 2 (0, 1): (2, 4) fits both, their mean is (1, 2).
def test_two_clients_meet_by_hand():
    assert moved(0) == [[1.0, 2.0]]
    assert moved(1) == [[1.75, 3.5]]
    assert moved(2) == [[1.875, 3.75]]
    assert moved(3) == [[1.9375, 3.875]]
    assert moved(1, 0.5) == [[1.3125, 2.625]]
    assert moved(2, 0.5) == [[1.515625, 3.03125]]


def test_rows_of_length_1_by_hand():
    # W = (6, 8) / 2 stays with P = I; each moves by (3, 4) / 5 of the step towards it, one by nothing.
    weights = [torch.tensor([[0.0, 0.0]]), torch.tensor([[6.0, 8.0]]), torch.tensor([[3.0, 4.0]])]
    free = [torch.eye(2)] * 3
    result = meet(weights[:1], free[:1], MaEcho(iterations=5, normalise=True))
    assert result.tolist() == [[0.0, 0.0]]  # nothing to divide by
    used = [torch.zeros(2, 2), torch.eye(2)]
    # The first is held, W goes to it: (3,4) - step ((3,4) - 0)/2 = (1.5, 2); the second moves by -(.6, .8).
    result = meet(weights[:2], used, MaEcho(iterations=1, step=1.0, normalise=True))
    torch.testing.assert_close(result, torch.tensor([[(6.0 - 0.6) / 2, (8.0 - 0.8) / 2]]))


def test_projections_by_hand():
    def after(rows, ridge, damping):
        projection = torch.eye(2, dtype=torch.float64)
        narrow(projection, torch.tensor(rows, dtype=torch.float64), ridge, damping)
        return projection.tolist()

    assert after([[1.0, 0.0]], 1.0, 1.0) == [[0.5, 0.0], [0.0, 1.0]]
    assert after([[1.0, 0.0]] * 2, 1.0, 1.0)[0][0] == pytest.approx(1 / 3)
    assert after([[1.0, 0.0]], 1.0, 0.5) == [[0.75, 0.0], [0.0, 1.0]]
    assert after([[1.0, 0.0]] * 2, 1.0, 0.5)[0][0] == pytest.approx(0.589286, abs=1e-6)
    assert np.allclose(after([[3.0, 4.0]], 25.0, 1.0), [[0.82, -0.24], [-0.24, 0.68]], atol=1e-14)


def test_undamped_it_is_the_regularised_inverse():
    rows = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projection = torch.eye(7, dtype=torch.float64)
    narrow(projection, rows, 0.3, 1.0)
    inverse = torch.linalg.inv(torch.eye(7, dtype=torch.float64) + rows.T @ rows / 0.3)
    assert (projection - inverse).abs().max() < 1e-12


def test_projections_that_hold_all_or_nothing_leave_the_mean():
    weights = list(torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    mean = torch.stack(weights).mean(0)
    same = weights[0].float().double()  # as what is sent
    for matrix in (torch.eye(5), torch.zeros(5, 5)):
        found = meet(weights, [matrix.double()] * 3, MaEcho(iterations=30))
        torch.testing.assert_close(found, mean)
    assert torch.equal(meet([same] * 3, [torch.eye(5).double()] * 3, MaEcho()), same)


def total_of(method, layout, sent):
    total = method.zero(Grid(2.0**20, len(sent)), layout)
    for client, values in enumerate(sent):
        total.fold(client, values, None, 1, layout)
    return total


def test_a_row_of_the_last_layer_is_the_mean_over_those_that_have_the_class():
    model = models.build("mlp", input_shape=(1, 2, 2), classes=3, seed=1, hidden=[4])
    layout = ParameterLayout.of(model)
    layout = layout.carrying(MaEcho().carries(layout))
    sent = []
    for client in range(2):
        values = np.full(layout.up_size, client + 1.0, np.float32)
        flat = layout.split(torch.from_numpy(values), layout.up)
        flat["classes"].copy_(torch.eye(3)[client])
        sent.append(values)
    method = MaEcho(iterations=0)
    state = ServerState(0, torch.zeros(layout.size))
    mean = method.aggregate(state, total_of(method, layout, sent), layout)
    weight, bias = (mean[entry.span].view(entry.shape) for entry in layout.head)
    assert weight.tolist() == [[1.0] * 4, [2.0] * 4, [0.0] * 4]
    assert bias.tolist() == [1.0, 2.0, 0.0]
    assert set(mean[layout.prunable[0].span].tolist()) == {1.5}


def test_without_moves_and_from_one_start_it_is_fedavg_bit_for_bit(cache, tmp_path):
    own = {"name": "ma_echo", "iterations": 0, "own_initialisation": False, "split_head": False}
    run = run_inline(tiny_federation(cache, model=MLP, algorithm=own, **ONE_SHOT), tmp_path / "one")
    plain = run_inline(
        tiny_federation(cache, model=MLP, aggregation={"weighting": "equal"}, **ONE_SHOT), tmp_path / "plain"
    )
    size = plain.driver.layout.size
    assert torch.equal(run.state.weights[:size], plain.state.weights)
    # P goes up, and is the only thing that does more: 64, 12 inputs, three classes.
    floats = 64 * 65 // 2 + 12 * 13 // 2 + 3
    more = run.lines[-1]["comm/uplink_bytes"] - plain.lines[-1]["comm/uplink_bytes"]
    assert more == 6 * 4 * floats
    assert run.lines[-1]["comm/downlink_bytes"] == plain.lines[-1]["comm/downlink_bytes"]


def test_a_run_against_the_paper_in_dictionaries(cache, tmp_path):
    """The whole round anew from what was uploaded: P by its rows, W and all W_i by their recursion."""
    own = {"name": "ma_echo", "iterations": 7, "step": 1.2, "damping": 1.0, "ridge": 0.5}
    config = tiny_federation(cache, model=MLP, algorithm=own, local={"batch_size": 8}, **ONE_SHOT)
    run = run_inline(config, tmp_path / "run")
    federation, layout = run.driver.federation, run.driver.layout
    host = run.driver.engine._host
    clients, projections = [], []
    for client in range(6):
        named = {name: t.double() for name, t in run.uploads[1, client][0].items()}
        clients.append(named)
        rows = federation.partition.client(client)
        inputs = host._trainer._data.of(rows)[0].double().flatten(1)
        rng = seeding.generator(config.seed, "method", 1, client)
        for shape in ((12, 64), (8, 12), (3, 8)):
            rng.standard_normal(shape[0] * shape[1])  # its initialisation came first
        order = rng.permutation(len(rows))
        met = {"1.weight": [], "3.weight": []}
        for start in range(0, len(rows), 8):
            batch = inputs[order[start : start + 8]]
            met["1.weight"].append(batch.mean(0))
            met["3.weight"].append(F.relu(batch @ named["1.weight"].T).mean(0))
        own = {}
        for name, means in met.items():
            outer = sum(torch.outer(row, row) for row in means)
            own[name] = torch.linalg.inv(torch.eye(len(outer)).double() + outer / 0.5)
        projections.append(own)
    for name in ("1.weight", "3.weight"):
        each = [named[name].clone() for named in clients]
        common = sum(each) / 6
        for _ in range(7):
            pairs = list(zip(each, (own[name] for own in projections), strict=True))
            common = common + 1.2 * sum((common - w) @ (p - torch.eye(len(p))) for w, p in pairs) / 6
            each = [w + 1.2 * (common - w) @ p for w, p in pairs]
        torch.testing.assert_close(run.weights[name].double(), sum(each) / 6, atol=2e-5, rtol=1e-4)
    labels = federation.dataset.train.targets
    for code in range(3):
        having = [
            named["5.weight"][code]
            for client, named in enumerate(clients)
            if (labels[federation.partition.client(client)] == code).sum() > 1
        ]
        torch.testing.assert_close(run.weights["5.weight"][code].double(), sum(having) / len(having))
    # Initialisations are the clients' own: their models have little in common.
    flat = torch.stack([named["1.weight"].flatten() for named in clients])
    assert torch.corrcoef(flat).fill_diagonal_(0.0).abs().max() < 0.4
    assert layout.up[0].size == 64 * 65 // 2


def test_one_more_forward_pass_is_billed(cache, tmp_path):
    own = {"name": "ma_echo", "own_initialisation": False}
    runs = [
        run_inline(tiny_federation(cache, algorithm=method, **ONE_SHOT), tmp_path / method["name"])
        for method in (own, {"name": "fedavg"})
    ]
    more = runs[0].lines[-1]["flops/dense"] - runs[1].lines[-1]["flops/dense"]
    samples = runs[0].driver.federation.sizes.sum()
    assert more == pytest.approx(samples * runs[0].driver.federation.flops.forward.sum())


def test_who_adds_does_not_matter(cache, tmp_path):
    config = tiny_federation(cache, model=MLP, algorithm={"name": "ma_echo", "iterations": 5}, **ONE_SHOT)
    assert_identical(run_inline(config, tmp_path / "one"), run_inline(config, tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 2}, r"rounds: 2; ma_echo is done after one"),
        ({"cohort": 4}, r"cohort: 4; ma_echo asks all clients at once, set cohort=6"),
        ({"aggregation": {"weighting": "samples"}}, r"weighting: samples; ma_echo's models weigh the same"),
        ({"adapter": {"name": "lora"}}, r"adapter: it is made for its frozen base"),
        ({"max_update_norm": 3.0}, r"max_update_norm: 3; models of their own"),
    ],
)
def test_what_it_cannot_do_is_refused(cache, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_federation(cache, algorithm={"name": "ma_echo"}, **{**ONE_SHOT, **options})


def test_wide_layers_are_refused_by_name(cache):
    config = tiny_federation(cache, model=MLP, algorithm={"name": "ma_echo", "max_fan_in": 50}, **ONE_SHOT)
    with pytest.raises(ModelError, match=r"max_fan_in: 50, but 1.weight has 64 inputs"):
        Federation.of(config)
