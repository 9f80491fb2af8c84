"""MOON by hand, against a loop of its own, and at its limits; passes with other weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algorithms import Client
from algorithms.fedavg import FedAvg
from algorithms.moon import Moon, contrast
from cluster import seeding
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation, tiny_model

ROWS = np.arange(20)


def visited(method, kept=None, model=None, **settings):
    trainer = trainer_of(method, model=model, **settings)
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, None, 1), kept)
    return trainer, replace(trained, values=trained.values.copy())


def test_the_term_by_hand():
    along, across = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    # cos(z, z_g) = 1 and cos(z, z_b) = 0 at tau .5: log(1 + e^-2).
    assert float(contrast(along, along, across, 0.5)) == pytest.approx(0.126928, abs=1e-6)
    # Where both are the same model there is nothing to choose: log 2 and no gradient.
    own = torch.tensor([[1.0, 2.0]], requires_grad=True)
    same = contrast(own, along, along, 0.5)
    same.backward()
    assert same.item() == pytest.approx(math.log(2.0))
    assert own.grad.abs().max() < 1e-7


def test_the_first_visit_is_fedavgs_bit_for_bit_and_so_is_mu_0():
    (_, plain), (_, first) = visited(FedAvg()), visited(Moon(mu=5.0))
    kept = {"model": first.values * 0.5}
    _, without = visited(Moon(mu=0.0), kept)
    _, later = visited(Moon(mu=5.0), kept)
    assert np.array_equal(plain.values, first.values)
    assert np.array_equal(plain.values, without.values)
    assert not np.array_equal(plain.values, later.values)
    assert np.array_equal(first.kept["model"], first.values)


def test_a_visit_against_a_loop_of_its_own():
    method = Moon(mu=2.0, temperature=0.3)
    trainer = trainer_of(method)
    start, last = copy.deepcopy(trainer.module).double(), copy.deepcopy(trainer.module).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in last.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    kept = {"model": trainer.layout.flatten(copy.deepcopy(last).float()).numpy()}
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, None, 1), kept)
    model = copy.deepcopy(start)
    order = seeding.generator(3, "batches", 1, 0)
    inputs, targets = (t[:20] for t in trainer._data.of(ROWS))
    inputs = inputs.double()
    terms = []
    for _ in range(2):
        rows = order.permutation(20)
        for batch in (rows[:8], rows[8:16], rows[16:]):
            z, near, far = (net[:-1](inputs[batch]) for net in (model, start, last))
            logits = torch.stack(
                [F.cosine_similarity(z, near.detach()), F.cosine_similarity(z, far.detach())], 1
            )
            term = F.cross_entropy(logits / 0.3, torch.zeros(len(batch), dtype=torch.int64))
            terms.append(term.item())
            loss = F.cross_entropy(model(inputs[batch]), targets[batch]) + 2.0 * term
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.2 * (parameter.grad + 1e-3 * parameter)
    expected = trainer.layout.flatten(model.float()).numpy()
    assert np.abs(trained.values - expected).max() < 5e-6
    total, weight = trained.measured.own["contrast"]
    assert total / weight == pytest.approx(np.mean(terms), rel=1e-4)


def test_two_forward_passes_a_step_are_billed():
    (trainer, plain), (_, moon) = visited(FedAvg()), visited(Moon(), {"model": visited(FedAvg())[1].values})
    forward = trainer.flops.forward.sum()
    samples = 2 * len(ROWS)
    more = moon.measured.flops_dense - plain.measured.flops_dense
    assert more == pytest.approx(2 * samples * forward)
    # 5/3 but for the first layer, which never has an input gradient.
    assert 5 / 3 < moon.measured.flops_dense / plain.measured.flops_dense < 1.8


class _AskingClient(Client):
    def begin(self):
        visit = self.visit
        before = visit.model.clone(), visit.gradient.clone(), visit.module.training
        outputs = visit.forward(torch.zeros_like(visit.model), visit.inputs[:4])
        assert not outputs.any()
        here = visit.forward(visit.global_weights, visit.inputs[:4])
        assert torch.equal(visit.model, before[0])
        # By their bits: before the first pass it is whatever lay there, NaN perhaps.
        assert torch.equal(visit.gradient.view(torch.int32), before[1].view(torch.int32))
        assert visit.module.training is before[2] is True
        assert not here.requires_grad
        with torch.no_grad():
            assert torch.equal(here, visit.module.eval()(visit.inputs[:4]))
        visit.module.train()


@dataclass(frozen=True, kw_only=True)
class _Asking(FedAvg):
    client = _AskingClient
    name = ""


def test_a_pass_with_other_weights_changes_nothing():
    model = tiny_model(input_shape=(1, 8, 8), classes=3)
    (_, asked), (trainer, plain) = (visited(m, model=model) for m in (_Asking(), FedAvg()))
    assert np.array_equal(asked.values, plain.values)
    assert asked.measured.flops_dense - plain.measured.flops_dense == 12 * trainer.flops.forward.sum()


def test_all_three_models_see_the_augmented_batch():
    trainer, met = trainer_of(Moon(), crop=2, flip=True), []
    kept = {"model": visited(FedAvg())[1].values}
    trainer.module.register_forward_pre_hook(lambda module, inputs: met.append(inputs[0].clone()))
    trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, Moon(), None, 1), kept)
    assert len(met) == 3 * 6
    for towards, away, own in zip(met[::3], met[1::3], met[2::3], strict=True):
        assert torch.equal(towards, own)
        assert torch.equal(away, own)


def test_a_loss_of_the_visits_own_is_never_recorded():
    recorded = []
    first = visited(Moon())[1].values
    trainer = trainer_of(Moon(), recorded=recorded)
    trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, Moon(), None, 1), {"model": first})
    assert not recorded
    assert not Moon().recordable


def test_a_projection_stands_before_the_last_layer(cache, tmp_path):
    model = {"name": "small_cnn", "channels": [4, 6], "hidden": 16, "norm": "group", "groups": 2}
    config = tiny_federation(cache, algorithm={"name": "moon", "mu": 0.0}, model={**model, "projection": 7})
    run = run_inline(config, tmp_path / "moon")
    assert [entry.shape for entry in run.driver.layout.prunable[-3:]] == [(16, 16), (7, 16), (3, 7)]
    assert [entry.name for entry in run.driver.layout.head] == ["14.weight", "14.bias"]
    other = tiny_federation(cache, model={**model, "projection": 7})
    assert_identical(run, run_inline(other, tmp_path / "fedavg"))


def test_a_run_keeps_models_and_counts_the_term(cache, tmp_path):
    run = run_inline(tiny_federation(cache, rounds=3, algorithm={"name": "moon"}), tmp_path / "run")
    layout = run.driver.layout
    for client, state in run.driver._schedule.kept.states.items():
        number = max(n for n, c in run.uploads if c == client)
        sent = torch.cat([t.reshape(-1) for t in run.uploads[number, client][0].values()])
        assert np.array_equal(state.arrays["model"], sent.numpy())
        assert len(sent) == layout.model_size
    assert "method/contrast" not in run.lines[0]
    assert 0.0 < run.lines[-1]["method/contrast"] < 10.0


def test_the_last_layer_is_what_is_given_the_representation():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    _, trained = visited(Moon(), model=model)
    _, again = visited(Moon(mu=10.0), {"model": trained.values}, model=model)
    # z is the image itself: it does not depend on the weights, and nothing pulls.
    assert np.array_equal(again.values, visited(FedAvg(), model=model)[1].values)
