"""FedSAM: worked by hand, against a loop of its own, its limit rho = 0, and what must not move twice."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algorithms import Instructions, hyperparameter
from algorithms.fedavg import FedAvg
from algorithms.fedsam import FedSAM, FedSAMClient
from algorithms.fixed_mask import FixedMask, MaskedClient
from algorithms.sparsyfed import SparsyFed, SparsyFedClient
from cluster import seeding
from cluster.clients.local_training import LocalSettings, Trainer
from cluster.exchange import Broadcast
from cluster.workload.datasets import Split
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import tiny_model

ROWS = np.arange(20)


@dataclass(frozen=True, kw_only=True)
class OnBowl(FedSAM):
    """f = (w1^2 + 10 w2^2) / 2, as half the squared outputs for the inputs (1, 0) and (0, sqrt 10)."""

    def loss(self, outputs, targets, objective):
        return outputs.square().sum() / 2


def one_step_on_bowl(start: list[float], rho: float, **settings) -> tuple[list[float], float]:
    inputs = np.array([[1.0, 0.0], [0.0, np.sqrt(10.0)]], np.float32)
    options = replace(LocalSettings(0, 1, 2, 0.0, 0.0), **settings)
    trainer = Trainer(
        nn.Linear(2, 1, bias=False),
        OnBowl(rho=rho),
        options,
        Split(inputs, np.zeros(2, np.int64), None),
        torch.device("cpu"),
    )
    weights = np.array(start, np.float32)
    broadcast = Broadcast(weights, weights, None, Instructions(round=1, rounds=1), 0.1, 2.0**20, 2)
    trained = trainer.visit(0, np.arange(2), 0.0, broadcast)
    return trained.values.tolist(), trained.measured.loss


# g = (1, 1), |g| = sqrt 2, w + e = (1.1, 0.2), g' = (1.1, 2): w - 0.1 g' = (0.89, -0.1). Plain: (0.9, 0).
def test_a_step_by_hand():
    stepped, loss = one_step_on_bowl([1.0, 0.1], rho=0.1 * np.sqrt(2.0))
    assert stepped == pytest.approx([0.89, -0.1], abs=1e-6)
    assert loss == pytest.approx((1.0 + 10 * 0.01) / 2)  # at w, not at w + e
    assert one_step_on_bowl([1.0, 0.1], rho=0.0)[0] == pytest.approx([0.9, 0.0], abs=1e-6)


# Decay 0.5 adds 0.5 w = (0.5, 0.05) to g' alone: w - 0.1 (1.6, 2.05) = (0.84, -0.105).
def test_weight_decay_belongs_to_the_step():
    stepped, _ = one_step_on_bowl([1.0, 0.1], rho=0.1 * np.sqrt(2.0), weight_decay=0.5)
    assert stepped == pytest.approx([0.84, -0.105], abs=1e-6)


def test_without_a_gradient_nothing_moves():
    assert one_step_on_bowl([0.0, 0.0], rho=1.0)[0] == [0.0, 0.0]


def visited(method, model=None, steps=None, **settings):
    trainer = trainer_of(method, model=model, **settings)
    broadcast = broadcast_of(trainer, method, None, 1)
    told = replace(broadcast.instructions, steps=steps)
    trained = trainer.visit(0, ROWS, method.sparsity, replace(broadcast, instructions=told))
    return trainer, replace(trained, values=trained.values.copy())


def test_a_radius_of_zero_is_fedavg_bit_for_bit_and_costs_no_more():
    (_, plain), (_, none) = visited(FedAvg()), visited(FedSAM(rho=0.0))
    assert np.array_equal(plain.values, none.values)
    assert plain.measured.flops_dense == none.measured.flops_dense


def test_flops_double():
    (_, plain), (_, twice) = visited(FedAvg()), visited(FedSAM())
    assert twice.measured.flops_dense == 2 * plain.measured.flops_dense
    # The first pass meets the weights as received, all others those of training: dense ones here.
    assert twice.measured.flops_sparse == pytest.approx(2 * plain.measured.flops_sparse)
    assert len(twice.values) == len(plain.values)


def test_a_visit_against_a_loop_of_its_own():
    trainer = trainer_of(FedSAM(rho=0.3), weight_decay=0.01)
    model = copy.deepcopy(trainer.module).double()
    split = trainer._data._split
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, FedSAM(), None, 1))
    order = seeding.generator(3, "batches", 1, 0)
    inputs = trainer._data.of(ROWS)[0].double()
    targets = torch.from_numpy(split.targets[ROWS])

    def slopes(rows):
        model.zero_grad()
        F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    for _ in range(2):
        rows = order.permutation(20)
        for batch in (rows[:8], rows[8:16], rows[16:]):
            before = copy.deepcopy(model.state_dict())
            first = slopes(batch)
            length = sum(float((g**2).sum()) for g in first.values()) ** 0.5
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p += 0.3 * first[name] / length
            second = slopes(batch)
            model.load_state_dict(before)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p -= 0.2 * (second[name] + 0.01 * p)
    expected = trainer.layout.flatten(model.float()).numpy()
    assert np.abs(trained.values - expected).max() < 2e-6
    assert np.abs(expected - visited(FedAvg(), weight_decay=0.01)[1].values).max() > 1e-3


def test_running_statistics_are_those_of_the_weights_that_travel():
    model = tiny_model(input_shape=(1, 8, 8), classes=3)
    (trainer, plain), (_, sam) = (visited(m, model, steps=1) for m in (FedAvg(), FedSAM(rho=1.0)))
    buffers = slice(trainer.layout.trained_size, None)
    assert np.array_equal(plain.values[buffers], sam.values[buffers])
    assert not np.array_equal(plain.values[: buffers.start], sam.values[: buffers.start])


def test_both_passes_of_a_step_drop_the_same_units():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 3))
    dropped = []
    trainer = trainer_of(FedSAM(rho=0.1), model=model)
    trainer.module[2].register_forward_hook(lambda m, i, output: dropped.append((output == 0).numpy()))
    trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, FedSAM(), None, 1))
    assert len(dropped) == 12  # two passes of three steps in each of two epochs
    assert all(np.array_equal(*dropped[i : i + 2]) for i in range(0, 12, 2))
    assert not np.array_equal(dropped[0], dropped[2])


# ------------------------------------------------------------------------- inside masks and under theta


moved: list[torch.Tensor] = []


class _Noting:
    """Notes the weights of every pass."""

    def gradient(self, compute):
        def noting():
            moved.append(self.visit.weights.clone())
            return compute()

        return super().gradient(noting)


class _InsideClient(_Noting, FedSAMClient, MaskedClient):
    pass


@dataclass(frozen=True, kw_only=True)
class Inside(FixedMask):
    client = _InsideClient
    rho: float = hyperparameter(0.1, "radius", low=0.0, high=10.0)
    least_passes = 2.0


class _UnderClient(_Noting, FedSAMClient, SparsyFedClient):
    pass


@dataclass(frozen=True, kw_only=True)
class Under(SparsyFed):
    client = _UnderClient
    rho: float = hyperparameter(0.1, "radius", low=0.0, high=10.0)
    least_passes = 2.0


@pytest.mark.parametrize("method", [Inside(sparsity=0.8), Under(sparsity=0.8)], ids=["mask", "theta"])
def test_the_ascent_has_its_length_inside_a_mask_and_in_w(method):
    moved.clear()
    trainer, trained = visited(method, steps=3)
    assert len(moved) == 6
    for here, there in zip(moved[::2], moved[1::2], strict=True):
        assert float((there - here).norm()) == pytest.approx(0.1, rel=1e-5)
    if isinstance(method, FixedMask):
        outside = ~broadcast_of(trainer, method, None, 1).mask
        assert not any(weights[: len(outside)][torch.from_numpy(outside)].any() for weights in moved)
        assert not trained.values[: len(outside)][outside].any()
