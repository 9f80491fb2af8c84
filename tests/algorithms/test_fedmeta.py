"""Federated meta-learning by hand, against a loop of its own, and at its limits."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algorithms import Instructions
from algorithms.fedavg import FedAvg
from algorithms.fedmeta import FedMeta
from cluster import seeding
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.configuration.config import resolve
from cluster.exchange import Broadcast
from cluster.workload.datasets import Split
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation, tiny_model

ROWS = np.arange(20)


class Bowl:
    """f = (theta - c)^2 / 2 of one weight, as half the squared distance of an output from a target."""

    measures = ()

    def loss(self, outputs, targets):
        return (outputs.reshape(-1) - targets).square().mean() / 2


def theta_after(method, start, c, *, kept=None, lr=0.2, rows=2, adapts=False):
    """Where one step from ``start`` on so many equal rows ends, and what was measured."""
    split = Split(np.ones((rows, 1), np.float32), np.full(rows, c, np.float32), None)
    settings = LocalSettings(0, 1, rows, 0.0, 0.0)
    device = torch.device("cpu")
    trainer = Trainer(nn.Linear(1, 1, bias=False), method, settings, split, device, Bowl())
    weights = np.array([start], np.float32)
    told = Instructions(round=1, rounds=1, adapts=adapts)
    kept = None if kept is None else {"model": np.array([kept], np.float32)}
    trained = trainer.visit(
        0, np.arange(rows), 0.0, Broadcast(weights, weights, None, told, lr, 2.0**20, rows), kept
    )
    return float(trained.values[0]), trained.measured.own


# theta 1, c 0, inner .5: theta' = .5, whose gradient .5 is applied at 1 with .2.
def test_a_step_by_hand():
    assert theta_after(FedMeta(inner_lr=0.5), 1.0, 0.0)[0] == pytest.approx(0.9)
    assert theta_after(FedMeta(inner_lr=0.5, inner_steps=2), 1.0, 0.0)[0] == pytest.approx(0.95)
    assert theta_after(FedMeta(inner_steps=0), 1.0, 0.0)[0] == pytest.approx(0.8)
    assert theta_after(FedMeta(), 1.0, 0.0, rows=1)[0] == pytest.approx(0.8)  # nothing to split
    # A new client that adapts takes plain steps of the inner rate.
    assert theta_after(FedMeta(inner_lr=0.5), 1.0, 0.0, adapts=True)[0] == pytest.approx(0.5)


@pytest.mark.parametrize(("c", "share"), [(0.3, 0.3), (2.0, 1.0), (-1.0, 0.0)])
def test_the_start_on_the_line_by_hand(c, share):
    method = FedMeta(interpolation="line", inner_steps=0)
    end, own = theta_after(method, 0.0, c, kept=1.0, lr=0.5)
    assert own["interpolation"][0] == pytest.approx(share)
    assert end == pytest.approx(share + 0.5 * (c - share))
    assert "interpolation" not in theta_after(method, 0.0, c)[1]


def visited(method, model=None, kept=None, **settings):
    trainer = trainer_of(method, model=model, **settings)
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, None, 1), kept)
    return trainer, replace(trained, values=trained.values.copy())


@pytest.mark.parametrize("options", [{}, {"interpolation": "fixed", "interpolation_weight": 0.0}])
def test_without_inner_steps_it_is_fedavg_bit_for_bit(cache, tmp_path, options):
    config = tiny_federation(cache, rounds=3, algorithm={"name": "fedmeta", "inner_steps": 0, **options})
    run = run_inline(config, tmp_path / "fedmeta")
    assert_identical(run, run_inline(tiny_federation(cache, rounds=3), tmp_path / "fedavg"))


def test_at_weight_1_clients_train_on_their_own(cache, tmp_path):
    options = {"inner_steps": 0, "interpolation": "fixed", "interpolation_weight": 1.0}
    config = tiny_federation(cache, rounds=2, cohort=6, algorithm={"name": "fedmeta", **options})
    run = run_inline(config, tmp_path / "run")
    # Client 2 alone, its rows in the batches of both rounds, never sees a global model.
    trainer = run.driver.engine._host._trainer
    rows = run.driver.federation.partition.client(2)
    broadcast = run.driver._schedule.broadcast(
        run.driver._schedule.sender.parcel(run.states[1]),
        run.driver._schedule.instruct(run.states[1]),
        np.array([2]),
        [],
    )
    first = torch.cat([t.reshape(-1) for t in run.uploads[1, 2][0].values()])
    second = torch.cat([t.reshape(-1) for t in run.uploads[2, 2][0].values()])
    alone = replace(broadcast, weights=first.numpy(), exact=first.numpy())
    trained = trainer.visit(2, rows, 0.0, alone)
    assert np.array_equal(trained.values, second.numpy())


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_a_visit_against_a_loop_of_its_own(adapt):
    method = FedMeta(inner_lr=0.3, inner_steps=2, support=0.4, adapt=adapt)
    trainer = trainer_of(method)
    model = copy.deepcopy(trainer.module).double()
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, None, 1))
    inputs, targets = (t[:20] for t in trainer._data.of(ROWS))
    inputs = inputs.double()
    order = seeding.generator(3, "batches", 1, 0)
    moves = [name for name, _ in model.named_parameters() if adapt == "all" or name.startswith("11.")]
    assert trainer.layout.head[0].name == "11.weight"

    def slopes(net, rows):
        loss = F.cross_entropy(net(inputs[rows]), targets[rows])
        return dict(
            zip(dict(net.named_parameters()), torch.autograd.grad(loss, net.parameters()), strict=True)
        )

    for _ in range(2):
        rows = order.permutation(20)
        for batch in (rows[:8], rows[8:16], rows[16:]):
            cut = round(0.4 * len(batch))
            inner = copy.deepcopy(model)
            for _ in range(2):
                found = slopes(inner, batch[:cut])
                with torch.no_grad():
                    for name, parameter in inner.named_parameters():
                        parameter -= 0.3 * found[name] * (name in moves)
            found = slopes(inner, batch[cut:])
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter -= 0.2 * (found[name] + 1e-3 * parameter)
    expected = trainer.layout.flatten(model.float()).numpy()
    assert np.abs(trained.values - expected).max() < 5e-6
    assert np.abs(expected - visited(FedAvg())[1].values).max() > 1e-3


def test_passes_of_both_loops_and_of_the_line_are_billed():
    (trainer, plain), (_, meta) = visited(FedAvg()), visited(FedMeta(support=0.5))
    assert meta.measured.flops_dense == plain.measured.flops_dense  # each row once
    _, twice = visited(FedMeta(inner_steps=3))
    assert twice.measured.flops_dense == pytest.approx(2 * plain.measured.flops_dense)
    _, line = visited(FedMeta(interpolation="line"), kept={"model": plain.values})
    more = line.measured.flops_dense - meta.measured.flops_dense
    assert more == pytest.approx(11 * 10 * trainer.flops.forward.sum())


def test_support_rows_leave_no_trace_in_running_statistics():
    model = tiny_model(input_shape=(1, 8, 8), classes=3)
    trainer, met = trainer_of(FedMeta(inner_lr=0.0), model=model, epochs=1, batch_size=32), []
    trainer.module[1].register_forward_pre_hook(lambda m, inputs: met.append(inputs[0].detach().clone()))
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, FedMeta(), None, 1))
    means = dict(trainer.layout.split(torch.from_numpy(trained.values)))["1.running_mean"]
    assert len(met) == 2
    torch.testing.assert_close(means, 0.1 * met[1].mean((0, 2, 3)), atol=1e-6, rtol=1e-5)


def test_new_clients_move_their_head_alone(cache, tmp_path):
    options = {"name": "fedmeta", "adapt": "head", "inner_lr": 0.3}
    section = {"every": 1, "unseen": 2, "shots": [2], "adapt_steps": 3}
    config = tiny_federation(cache, rounds=1, cohort=3, algorithm=options, evaluate_clients=section)
    run = run_inline(config, tmp_path / "run")
    schedule, host, layout = run.driver._schedule, run.driver.engine._host, run.driver.layout
    told = schedule.instruct(run.state)
    broadcast = schedule.broadcast(schedule.sender.parcel(run.state), told, np.empty(0, np.int64), [])
    moved = host._locally_trained(broadcast, 5, 2) != broadcast.weights
    head = np.zeros(layout.size, bool)
    for entry in layout.head:
        head[entry.span] = True
    assert moved[head].any()
    assert not moved[~head].any()


def test_the_preset_says_what_it_is():
    config = resolve("refml-like")
    assert (config.method.adapt, config.method.interpolation) == ("head", "line")
    assert config.evaluate_clients.unseen
