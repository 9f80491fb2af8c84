"""R-PDRO by hand, against a loop of its own, and at its limits."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from algorithms.fedavg import FedAvg
from algorithms.rpdro import Rpdro, RpdroClient, adversary_loss, ratios_of
from cluster import seeding
from cluster.configuration.trees import ConfigError
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")
ROWS = np.arange(20)
BATCH = torch.tensor([0.0, np.log(3.0)]), torch.tensor([1.0, 2.0])


def test_ratios_and_losses_by_hand():
    scores, losses = BATCH
    ratios, log_ratios = ratios_of(scores, "batch")
    assert ratios.tolist() == pytest.approx([0.5, 1.5])
    assert float((ratios * losses).mean()) == pytest.approx(1.75)
    assert float((ratios * log_ratios).mean()) == pytest.approx(0.130812, abs=1e-6)
    assert float(adversary_loss(scores, losses, Rpdro(tau=0.01))) == pytest.approx(-1.748692, abs=1e-6)


@pytest.mark.parametrize(("tau", "divergence"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_adversarys_gradient_by_hand(tau, divergence):
    scores, losses = BATCH[0].clone().requires_grad_(), BATCH[1]
    adversary_loss(scores, losses, Rpdro(tau=tau)).backward()
    expected = np.array([0.1875, -0.1875]) + divergence * np.array([-0.20599, 0.20599])
    assert scores.grad.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_free_adversary_answers_best_by_hand():
    scores = torch.zeros(2, requires_grad=True)
    for _ in range(4000):
        (slope,) = torch.autograd.grad(adversary_loss(scores, BATCH[1], Rpdro(tau=1.0)), scores)
        scores = (scores - 0.1 * slope).detach().requires_grad_()
    assert ratios_of(scores, "batch")[0].tolist() == pytest.approx([0.537883, 1.462117], abs=1e-4)
    equal = torch.zeros(2, requires_grad=True)
    (slope,) = torch.autograd.grad(adversary_loss(equal, torch.ones(2), Rpdro(tau=0.0)), equal)
    assert slope.abs().max() < 1e-7


@pytest.mark.parametrize("size", [1, 41, 47, 55, 61, 82])
def test_equal_scores_are_ratios_of_exactly_1(size):
    assert ratios_of(torch.full((size,), 3.7), "batch")[0].tolist() == [1.0] * size


@pytest.mark.parametrize("adversary", ["client", "shared"])
def test_an_adversary_that_stays_is_fedavg_bit_for_bit(cache, tmp_path, adversary):
    own = {"name": "rpdro", "adversary_rate": 0.0, "adversary": adversary}
    run = run_inline(tiny_federation(cache, algorithm=own), tmp_path / "rpdro")
    plain = run_inline(tiny_federation(cache), tmp_path / "fedavg")
    size = plain.driver.layout.size
    assert torch.equal(run.state.weights[:size], plain.state.weights)


def test_batches_of_one_are_fedavgs(cache, tmp_path):
    runs = [
        run_inline(
            tiny_federation(cache, algorithm=own, rounds=2, cohort=2, local={"batch_size": 1, "lr": 0.01}),
            tmp_path / own["name"],
        )
        for own in ({"name": "rpdro", "adversary_rate": 5.0}, {"name": "fedavg"})
    ]
    assert_identical(*runs)


def visited(method, kept=None):
    trainer = trainer_of(method)
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, None, 1), kept)
    return trainer, replace(trained, values=trained.values.copy())


def test_a_visit_against_a_loop_of_its_own():
    method = Rpdro(tau=0.2, adversary_rate=3.0)
    trainer, model = trainer_of(method), None
    model = copy.deepcopy(trainer.module).double()
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, None, 1))
    adversary = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adversary[-1].parameters():
            parameter.zero_()
    order = seeding.generator(3, "batches", 1, 0)
    inputs, targets = (t[:20] for t in trainer._data.of(ROWS))
    inputs = inputs.double()
    for _ in range(2):
        rows = order.permutation(20)
        for batch in (rows[:8], rows[8:16], rows[16:]):
            x, y = inputs[batch], targets[batch]
            losses = F.cross_entropy(model(x), y, reduction="none")
            logs = F.log_softmax(adversary(x)[range(len(y)), y], 0) + np.log(len(y))
            slopes = torch.autograd.grad((logs.exp().detach() * losses).mean(), list(model.parameters()))
            climb = -(logs.exp() * losses.detach()).mean() + 0.2 * (logs.exp() * logs).mean()
            others = torch.autograd.grad(climb, list(adversary.parameters()))
            with torch.no_grad():
                for parameter, slope in zip(model.parameters(), slopes, strict=True):
                    parameter -= 0.2 * (slope + 1e-3 * parameter)
                for parameter, slope in zip(adversary.parameters(), others, strict=True):
                    parameter -= 0.6 * slope
    layout = trainer.layout
    assert np.abs(trained.values - layout.flatten(model.float()).numpy()).max() < 1e-5
    psi = layout.flatten(adversary.float()).numpy()
    assert np.abs(trained.kept["adversary"] - psi[: layout.trained_size]).max() < 1e-5
    assert np.abs(trained.values - visited(FedAvg())[1].values).max() > 1e-4
    kl, weight = trained.measured.own["kl"]
    assert kl / weight > 1e-5


def test_a_pass_of_the_adversary_a_step_is_billed():
    (_, plain), (_, own) = visited(FedAvg()), visited(Rpdro())
    assert own.measured.flops_dense == pytest.approx(2 * plain.measured.flops_dense)


def test_a_shared_adversary_doubles_the_bytes_and_one_of_ones_own_none(cache, tmp_path):
    lines = {}
    for name in ("client", "shared"):
        config = tiny_federation(cache, algorithm={"name": "rpdro", "adversary": name})
        lines[name] = run_inline(config, tmp_path / name).lines[-1]
    plain = run_inline(tiny_federation(cache), tmp_path / "fedavg")
    floats = plain.driver.layout.trained_size
    for way in ("uplink", "downlink"):
        found = {name: line[f"comm/{way}_bytes"] for name, line in lines.items()}
        assert found["client"] == plain.lines[-1][f"comm/{way}_bytes"]
        assert found["shared"] - found["client"] == 4 * 4 * floats


def test_across_clients_updates_weigh_by_their_mean_ratio(cache, tmp_path):
    own = {"name": "rpdro", "adversary": "shared", "scope": "across", "adversary_rate": 1.0}
    run = run_inline(tiny_federation(cache, rounds=3, cohort=6, algorithm=own), tmp_path / "run")
    federation, layout = run.driver.federation, run.driver.layout
    trained = layout.trained_size
    start, psi = run.states[2].weights, run.states[2].weights[layout.both[0].span]
    data = run.driver.engine._host._trainer._data
    layout.bind(federation.model, torch.cat([psi, start[trained:]])[: layout.model_size].clone())
    weights, moved = [], []
    for client in range(6):
        inputs, targets = data.of(federation.partition.client(client))
        with torch.no_grad():
            scores = federation.model.eval()(inputs)[range(len(targets)), targets]
        z = float(scores.double().exp().mean())
        weights.append(len(targets) * z)
        sent = torch.cat([t.reshape(-1) for t in run.uploads[3, client][0].values()])[:trained]
        moved.append(sent.double() / z)
    expected = start[:trained].double() + sum(w * d for w, d in zip(weights, moved, strict=True)) / sum(
        weights
    )
    torch.testing.assert_close(run.state.weights[:trained].double(), expected, atol=1e-6, rtol=1e-5)
    assert max(weights[c] / len(federation.partition.client(c)) for c in range(6)) > 1.0001


def test_across_a_client_is_judged_by_what_it_trained(monkeypatch):
    method = Rpdro(adversary="shared", scope="across")
    trainer, trained = trainer_of(method), []
    layout = trainer.layout
    finish = RpdroClient.finish

    def recording(self):
        trained.append((self.visit.weights.clone(), self.z))
        return finish(self)

    monkeypatch.setattr(RpdroClient, "finish", recording)
    received = method.initial_state(layout.flatten(trainer.module), layout, np.random.default_rng(0)).weights
    adversary = layout.split(received, layout.carried)["adversary"]
    adversary.copy_(received[: layout.trained_size])  # with a last layer that is not 0
    sent = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, received.numpy(), 1))
    ((own, z),) = trained
    assert abs(z - 1.0) > 0.02
    weights = torch.from_numpy(sent.values.copy())
    weights[: layout.trained_size] += received[: layout.trained_size]
    found = method.personal_weights(weights, received, {}, layout)[: layout.trained_size]
    torch.testing.assert_close(found, own, atol=1e-6, rtol=1e-5)


def test_at_first_every_client_weighs_its_samples(cache, tmp_path):
    """With f = 0 across is within, up to how differences are added."""
    options = {"name": "rpdro", "adversary": "shared", "adversary_rate": 0.0}
    runs = [
        run_inline(tiny_federation(cache, algorithm={**options, "scope": scope}), tmp_path / scope)
        for scope in ("across", "within")
    ]
    size = runs[0].driver.layout.model_size
    torch.testing.assert_close(*(run.state.weights[:size] for run in runs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"algorithm": {"name": "rpdro", "scope": "across"}},
            r"scope: across compares clients by one adversary",
        ),
        (
            {
                "algorithm": {"name": "rpdro", "scope": "across", "adversary": "shared"},
                "max_update_norm": 3.0,
            },
            r"max_update_norm: 3; with algorithm.scope=across an update is sent times",
        ),
        ({"algorithm": {"name": "rpdro"}, "objective": {"name": "regression"}}, r"rpdro weighs the losses"),
    ],
)
def test_what_it_cannot_do_is_refused(cache, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_federation(cache, **options)
