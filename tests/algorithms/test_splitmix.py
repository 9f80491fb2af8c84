"""Split-Mix by hand: blocks, logits of each base, who trains what; bases are narrow models by themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from algorithms import Instructions, ParameterLayout, ServerState, registry
from algorithms.splitmix import BaseLogits, SplitMix
from cluster.exchange import Broadcast
from cluster.federation import Federation
from cluster.transport.downlink import Sender
from cluster.workload import models
from cluster.workload.models import ModelError
from tests.cluster.clients.tiny_visits import trainer_of
from tests.tiny_experiment import run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")
TOLD = Instructions(round=1, rounds=1)


def laid_out(method, model, example):
    return method.lay_out(ParameterLayout.of(model, example), model, example)


def test_the_blocks_of_small_cnn():
    """576 + 9,216 + 16,384 + 2,560 of its 207,936 weights; a base has 72 + 1,152 + 2,048 + 320."""
    method, model = SplitMix(), models.build("small_cnn", input_shape=(1, 28, 28), classes=10, seed=1)
    layout = laid_out(method, model, torch.randn(2, 1, 28, 28))
    whole, one = method.part(range(8), layout), method.part([5], layout)
    counts = [int(whole[entry.span].sum()) for entry in layout.prunable]
    assert counts == [576, 9216, 16384, 2560]
    assert [int(one[entry.span].sum()) for entry in layout.prunable] == [72, 1152, 2048, 320]
    state = method.initial_state(layout.flatten(model), layout, np.random.default_rng(0))
    prunable = layout.prunable_size
    assert torch.equal(state.weights[:prunable] != 0, whole[:prunable])
    first = next(entry for entry in layout.trained if entry.name == "0.weight")
    assert torch.nonzero(one[first.span]).min() == 5 * 8 * 9


def test_two_bases_with_logits_of_their_own():
    """(2, 0) and (0, 4): the mean is (1, 2), and the first alone gives (2, 0)."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False))
    method, inputs = SplitMix(bases=2), torch.ones(1, 1)
    layout = laid_out(method, model, torch.ones(2, 1))
    weights = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0, 4.0])
    method.prepare(model)
    layout.bind(model, weights)
    assert model(inputs).tolist() == [[[2, 0], [0, 4]]]
    assert isinstance(model[1], BaseLogits)
    alone = weights * method.submodel(weights, TOLD, None, 0.5, layout)
    for flat, expected in ((weights, [1, 2]), (alone, [2, 0])):
        layout.bind(model, method.effective_weights(flat, layout))
        assert model.eval()(inputs).tolist() == [expected]
    model.train()
    layout.bind(model, alone)
    assert model(inputs).tolist() == [[[2], [0]]]  # logits of the base that is there
    layout.bind(model, weights)
    loss = method.loss(model(inputs), torch.tensor([1]), nn.functional.cross_entropy)
    by_hand = sum(-torch.log_softmax(torch.tensor(z), 0)[1] for z in ([2.0, 0.0], [0.0, 4.0]))
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    masked = SplitMix(bases=2, mask_absent_classes=True)
    loss = masked.loss(model(inputs), torch.tensor([1]), nn.functional.cross_entropy)
    by_hand = sum(-torch.log_softmax(torch.tensor(z), 0)[1] for z in ([0.0, 0.0], [0.0, 4.0]))
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)


def mlp(hidden):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 3, bias=False))


def test_each_base_is_a_narrow_model_trained_by_itself():
    method, rows = SplitMix(bases=2), np.arange(20)
    model = mlp(8)
    wide = trainer_of(method, model=model)
    flat = method.initial_state(wide.layout.flatten(model), wide.layout, np.random.default_rng(0)).weights
    parcel = Sender(wide.layout, "float32").parcel(ServerState(0, flat))
    for held in ([0, 1], [1]):
        support = method.part(held, wide.layout).numpy()
        part = parcel.parts[parcel.part(support, known=True, confined=True)]
        broadcast = Broadcast(flat.numpy(), flat.numpy(), None, TOLD, 0.2, 2.0**20, 60, parts=(part,))
        trained = wide.visit(0, rows, 0.0, broadcast, part=part)
        found = wide.layout.split(torch.from_numpy(trained.values.copy()))
        for base in (0, 1):
            units, own = slice(4 * base, 4 * base + 4), mlp(4)
            start = wide.layout.split(flat)
            with torch.no_grad():
                own[1].weight.copy_(start["1.weight"][units])
                own[1].bias.copy_(start["1.bias"][units])
                own[3].weight.copy_(start["3.weight"][:, units])
            narrow = trainer_of(registry()["fedavg"](), model=own)
            values = narrow.layout.flatten(own).numpy()
            alone = Broadcast(values, values, None, TOLD, 0.2, 2.0**20, 60)
            expected = narrow.visit(0, rows, 0.0, alone)
            sent = narrow.layout.split(torch.from_numpy(expected.values.copy()))
            scale = 1.0 if base in held else 0.0
            for name, piece in (("1.weight", units), ("1.bias", units), ("3.weight", (slice(None), units))):
                torch.testing.assert_close(found[name][piece], scale * sent[name], atol=2e-6, rtol=1e-5)
        # The weights that would join bases are 0, and a base costs what a narrow model costs.
        assert not trained.values[: len(support)][~support].any()
        share = len(held) * expected.measured.flops_dense
        assert trained.measured.flops_dense == pytest.approx(share, rel=1e-9)


def test_weights_between_two_bases_stay_0_all_through_a_visit():
    method = SplitMix(bases=2)
    trainer = trainer_of(method)
    flat = trainer.layout.flatten(trainer.module)
    state = method.initial_state(flat, trainer.layout, np.random.default_rng(0))
    support = method.part([0, 1], trainer.layout).numpy()
    parcel = Sender(trainer.layout, "float32").parcel(state)
    part = parcel.parts[parcel.part(support, known=True, confined=True)]
    weights = state.weights.numpy()
    broadcast = Broadcast(weights, weights, None, TOLD, 0.2, 2.0**20, 60, parts=(part,))
    trained = trainer.visit(0, np.arange(20), 0.0, broadcast, part=part)
    assert (~support).any()
    assert not trained.values[: len(support)][~support].any()


def test_all_bases_come_equally_often_and_none_twice():
    method, model = SplitMix(), models.build("mlp", input_shape=(4,), classes=3, seed=1, hidden=[8])
    layout = laid_out(method, model, torch.randn(2, 4))

    def bases(place, budget):
        part = method.submodel(torch.zeros(layout.size), TOLD, place, budget, layout)
        return torch.nonzero(part[layout.other[0].span]).reshape(-1).tolist()

    for turn in range(3):
        assert sorted(
            base for place in range(8 * turn, 8 * turn + 8) for base in bases(place, 0.125)
        ) == list(range(8))
    assert [len(bases(5, budget)) for budget in (0.01, 0.125, 0.25, 0.5, 1.0)] == [1, 1, 2, 4, 8]
    assert bases(11, 0.125)[0] in bases(11, 0.25)
    assert bases(None, 0.25) == [0, 1]
    assert bases(11, 0.25) == bases(11, 0.25) != bases(13, 0.25)


def test_eight_clients_of_one_base_train_all_eight(cache, tmp_path):
    config = tiny_federation(
        cache,
        algorithm={"name": "splitmix", "sparsity": 0.875},
        model={"name": "small_cnn", "channels": [8, 16], "hidden": 16, "norm": "group", "groups": 8},
        partition={"clients": 8, "name": "iid"},
        cohort=8,
        rounds=1,
    )
    run = run_inline(config, tmp_path / "run")
    layout, method = run.driver.layout, run.driver.method
    moved = run.states[1].weights[: layout.trained_size] != run.states[0].weights[: layout.trained_size]
    for base in range(8):
        part = method.part([base], layout)[: layout.prunable_size]
        assert moved[: layout.prunable_size][part].float().mean() > 0.5  # a unit may be dead
    inside = method.part(range(8), layout)
    assert not run.states[1].weights[: layout.trained_size][~inside].any()
    # Convolutions 9 and 2 x 9, norms 2 and 4, hidden 2 x (2 x 4) + 2, last 2 x 3 + 3: 60 floats a base.
    assert run.lines[0]["comm/uplink_bytes"] == 8 * (44 + 4 * (9 + 18 + 2 + 4 + 16 + 2 + 6 + 3))
    assert run.lines[0]["comm/downlink_bytes"] == run.lines[0]["comm/uplink_bytes"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "small_cnn", "channels": [8, 16], "groups": 4}, "0.weight: its 8 units in 4 groups do not"),
        ({"name": "mlp", "hidden": [12]}, "1.weight: its 12 units do not divide among algorithm.bases=8"),
        ({"name": "resnet18", "norm": "batch"}, "norm1: its running statistics"),
    ],
)
def test_models_that_do_not_divide_are_refused(cache, model, message):
    with pytest.raises(ModelError, match=message):
        Federation.of(tiny_federation(cache, algorithm={"name": "splitmix"}, model=model))
