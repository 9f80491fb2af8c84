"""FedAvg: a round worked by hand, and the naive reference."""

from __future__ import annotations

import pytest
import torch

from algorithms.core.server_optimizers import ServerOptimizer
from algorithms.fedavg import FedAvg
from tests.algorithms.by_hand import one_round
from tests.naive import NaiveFederation
from tests.tiny_experiment import assert_same, run_inline, tiny_federation

ZEROS = [[0.0], [0.0]]
# W = 0, so both classes have probability 1/2 and dL/dW = (p - onehot) x. Client 0 has one sample x = 1 of
# class 0: gradient (-1/2, 1/2). Client 1 has three of class 1: gradient (1/2, -1/2).
CLIENTS = [([1.0], 0, 1), ([1.0], 1, 3)]


def test_a_round_worked_by_hand():
    uploads, [after] = one_round(FedAvg(), ZEROS, CLIENTS)
    assert uploads == [[[0.5], [-0.5]], [[-0.5], [0.5]]]
    # (1 * 0.5 + 3 * -0.5) / 4
    assert after == [[-0.25], [0.25]]


def test_weight_decay_and_the_proximal_term_worked_by_hand():
    # W = (1, 1): still p = 1/2. Decay 1/4 adds W/4 to the gradient: (-1/4, 3/4); lr 1/2: W = (9/8, 5/8).
    uploads, _ = one_round(FedAvg(), [[1.0], [1.0]], CLIENTS[:1], lr=0.5, weight_decay=0.25)
    assert uploads == [[[1.125], [0.625]]]
    # mu (w - w_t) is 0 in the first step. With x = 0 the loss has no gradient: decay and mu alone are seen.
    uploads, _ = one_round(FedAvg(), [[1.0], [1.0]], [([0.0], 0, 1)], lr=0.5, proximal=1.0, weight_decay=0.5)
    assert uploads == [[[0.75], [0.75]]]  # 1 - 0.5 * 0.5
    uploads, _ = one_round(
        FedAvg(), [[1.0], [1.0]], [([0.0], 0, 1)], lr=0.5, proximal=1.0, weight_decay=0.5, epochs=2
    )
    # Second step: gradient 0.5 * 0.75 + 1 * (0.75 - 1) = 0.125; 0.75 - 0.0625.
    assert uploads == [[[0.6875], [0.6875]]]


def test_a_server_learning_rate_acts_on_the_difference():
    _, [after] = one_round(FedAvg(), ZEROS, CLIENTS, server=ServerOptimizer(lr=2.0))
    assert after == [[-0.5], [0.5]]


LONGER = {"epochs": 2, "lr_final": 0.05, "weight_decay": 0.01, "proximal": 0.1}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"local": LONGER, "rounds": 3},
        {"model": {"name": "tests.tiny_experiment:tiny_model"}},  # BatchNorm: float buffers are averaged
        {
            "model": {"name": "tests.tiny_experiment:tiny_model"},
            "server": {"name": "fedavg", "lr": 0.7, "momentum": 0.9},
        },
        {"server": {"name": "fedadagrad", "lr": 0.1}},
        {"server": {"name": "fedadam", "lr": 0.05}},
        {"server": {"name": "fedyogi", "lr": 0.05}},
    ],
    ids=["plain", "schedule", "batch norm", "momentum", "fedadagrad", "fedadam", "fedyogi"],
)
def test_equals_the_naive_reference(tmp_path, overrides):
    config = tiny_federation(tmp_path, **overrides)
    adaptive = config.server.name != "fedavg"
    # Delta / (sqrt(v) + tau) multiplies a rounding difference of Delta by up to 1 / tau.
    assert_same(
        run_inline(config, tmp_path / "run"), NaiveFederation(config).run(), atol=5e-5 if adaptive else 2e-6
    )


def test_the_reference_notices_a_different_learning_rate(tmp_path):
    run = run_inline(tiny_federation(tmp_path), tmp_path / "run")
    other = NaiveFederation(tiny_federation(tmp_path, local={"lr": 0.2001})).run()
    with pytest.raises(AssertionError):
        assert_same(run, other)


def test_the_models_file_holds_the_weights_themselves(tmp_path):
    from safetensors.torch import load_file

    run = run_inline(tiny_federation(tmp_path), tmp_path / "run")
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in run.weights.items())
