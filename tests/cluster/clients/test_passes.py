"""Passes recorded and replayed against passes launched one by one; arithmetic; a round received once.

Without a GPU the recorder is a stand-in that keeps what a CUDA graph keeps: the memory, and no Python.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.core.layers import ActivationPruning, prune_inputs
from algorithms.fedavg import FedAvg
from cluster.clients.client import _same
from cluster.clients.local_training import Trained
from cluster.clients.passes import WARM_UP
from cluster.configuration.config import resolve
from cluster.configuration.trees import ConfigError
from tests.cluster.clients.tiny_visits import METHODS, broadcast_of, play, trainer_of
from tests.tiny_experiment import tiny_model


def assert_equal_visits(first: list[Trained], second: list[Trained]) -> None:
    for one, other in zip(first, second, strict=True):
        seen, expected = ({**vars(trained), **vars(trained.measured)} for trained in (one, other))
        for name in seen.keys() - {"measured"}:
            assert np.array_equal(seen[name], expected[name]), name


@pytest.mark.parametrize("name", METHODS)
def test_replayed_passes_are_the_launched_ones_bit_for_bit(name):
    method, recorded = METHODS[name], []
    expected = play(trainer_of(method), method)
    trainer = trainer_of(method, recorded=recorded)
    assert_equal_visits(play(trainer, method), expected)
    # Recorded are the kinds of pass that came often enough, each once.
    kinds = trainer._passes._recordings.values()
    assert len(recorded) == sum(one.replay is not None for one in kinds) >= 2
    assert {len(one.targets) for one in kinds} == {1, 4, 8}


def test_a_pass_is_recorded_once_it_is_warm():
    method, recorded = FedAvg(), []
    trainer = trainer_of(method, recorded=recorded)
    broadcast = broadcast_of(trainer, method, None, 1)
    for visit in range(1, 6):
        trainer.visit(visit, np.arange(8), 0.0, broadcast)  # one batch in each of two epochs
        assert len(recorded) == (2 * visit > WARM_UP)


@pytest.mark.parametrize("density", [None, 0.3, 1.0])
@pytest.mark.parametrize("minimum", [0.0, 0.5])
def test_thresholds_drawn_on_the_device_are_those_of_the_host(density, minimum):
    generator = torch.Generator().manual_seed(7)
    for inputs in (
        torch.randn(3, 5, 4, generator=generator),
        torch.relu(torch.randn(3, 5, 4, generator=generator)),
        torch.tensor([1.0, float("nan"), 2.0]),
        torch.zeros(4),
    ):
        weight = torch.randn(40, generator=generator)
        weight[: 0 if density == 1.0 else 33] = 0.0
        found = []
        for on_device in (False, True):
            pruning = ActivationPruning(density=density, every_batch=False, minimum_density=minimum)
            pruning.on_device = on_device
            found.append((float(pruning.threshold(inputs, weight)), pruning.kept))
        assert found[0] == found[1]


def test_a_round_is_received_once_and_a_new_one_replaces_it():
    method = FedAvg()
    trainer = trainer_of(method)
    first = broadcast_of(trainer, method, None, 1)
    rows = np.arange(20)
    expected = trainer.visit(0, rows, 0.0, first).values.copy()
    trainer.visit(1, rows, 0.0, first)
    assert np.array_equal(trainer.visit(0, rows, 0.0, first).values, expected)
    other = replace(first, weights=first.weights * 2)
    assert not np.array_equal(trainer.visit(0, rows, 0.0, other).values, expected)
    assert np.array_equal(trainer.visit(0, rows, 0.0, first).values, expected)


def test_copies_of_a_broadcast_are_one():
    method = FedAvg()
    first = broadcast_of(trainer_of(method), method, None, 1)
    assert _same(first, replace(first))  # as two calls of one round unpack it from the object store
    assert _same(first, replace(first, weights=first.weights.copy()))  # as it comes with each of two calls
    other = first.weights.copy()
    other[-1] += 1
    assert not _same(first, replace(first, weights=other))
    assert not _same(first, replace(first, samples=61))
    assert not _same(first, replace(first, period=1))


@pytest.mark.parametrize("name", ["fedavg", "sparsyfed", "zerofl"])
def test_bfloat16_rounds_products_but_keeps_float32_weights(name):
    method = METHODS[name]
    model = tiny_model(input_shape=(1, 8, 8), classes=3)
    exact, rounded = trainer_of(method, model=model), trainer_of(method, model=model, precision="bfloat16")
    broadcast = broadcast_of(exact, method, None, 1)
    results = [one.visit(0, np.arange(20), method.sparsity, broadcast) for one in (exact, rounded)]
    assert results[1].values.dtype == np.float32
    assert not np.array_equal(results[0].values, results[1].values)
    # bfloat16 has 8 significant bits: an error of 2^-8 in each product, within a few per cent of the loss.
    assert results[1].measured.loss == pytest.approx(results[0].measured.loss, rel=0.05)


def test_bfloat16_pruning_keeps_what_ties_with_the_threshold():
    # 1, 2, 2 and 3 at density 1/2: the threshold is 2, and both entries of 2 stay.
    layer = nn.Sequential(nn.Linear(4, 1, bias=False))
    prune_inputs(layer, lambda name, module: ActivationPruning(density=0.5, every_batch=True))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.tensor([[1.0, -2.0, 2.0, 3.0]]))
    assert output.dtype == torch.bfloat16
    output.backward()
    assert layer[0].weight.grad.tolist() == [[0.0, -2.0, 2.0, 3.0]]


def test_tf32_is_refused_where_there_is_no_gpu():
    with pytest.raises(ConfigError, match="precision: tf32 is arithmetic of GPUs"):
        resolve("quickstart", ["precision=tf32"])
    assert resolve("quickstart", ["precision=bfloat16"]).digest() != resolve("quickstart").digest()
