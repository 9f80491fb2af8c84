"""Server optimizers: one and two steps of each, computed by hand."""

from __future__ import annotations

import pytest
import torch

from algorithms import SERVER_OPTIMIZERS
from algorithms.core.server_optimizers import FedAdagrad, FedAdam, FedYogi, ServerOptimizer

W = torch.tensor([1.0, -2.0])
MEAN = torch.tensor([1.5, -2.25])  # Delta = (0.5, -0.25)


def test_lr_1_without_momentum_returns_the_mean_itself():
    weights, moments = ServerOptimizer().step(W, MEAN, ())
    assert weights is MEAN
    assert moments == ()


def test_a_server_learning_rate():
    # 1 + 0.5 * 0.5 and -2 + 0.5 * -0.25
    weights, moments = ServerOptimizer(lr=0.5).step(W, MEAN, ())
    assert weights.tolist() == [1.25, -2.125]
    assert moments == ()


def test_momentum():
    optimizer = ServerOptimizer(lr=0.5, momentum=0.5)
    # Step 1: v = (0.5, -0.25), w = (1.25, -2.125).
    weights, moments = optimizer.step(W, MEAN, ())
    assert moments[0].tolist() == [0.5, -0.25]
    assert weights.tolist() == [1.25, -2.125]
    # Step 2, mean (1.25, -2): Delta = (0, 0.125); v = Delta + v/2 = (0.25, 0); w + v/2 = (1.375, -2.125).
    weights, moments = optimizer.step(weights, torch.tensor([1.25, -2.0]), moments)
    assert moments[0].tolist() == [0.25, 0.0]
    assert weights.tolist() == [1.375, -2.125]


# eta 0.1, beta_1 0.5, beta_2 0.75, tau 0.5: v_0 = 0.25. First step, Delta = (0.5, -0.25), m = Delta / 2 =
# (0.25, -0.125), Delta^2 = (0.25, 0.0625):
#   adagrad v = (0.25 + 0.25, 0.25 + 0.0625) = (0.5, 0.3125)
#   adam    v = (0.75 * 0.25 + 0.25 * 0.25, 0.75 * 0.25 + 0.25 * 0.0625) = (0.25, 0.203125)
#   yogi    v = (0.25 - 0.25 * 0.25 * sign(0), 0.25 - 0.25 * 0.0625 * 1) = (0.25, 0.234375)
# Second step with Delta = (1, 0): m = (0.25 / 2 + 0.5, -0.125 / 2) = (0.625, -0.0625), Delta^2 = (1, 0):
#   adagrad v = (1.5, 0.3125)
#   adam    v = (0.75 * 0.25 + 0.25, 0.75 * 0.203125) = (0.4375, 0.15234375)
#   yogi    v = (0.25 - 0.25 * 1 * sign(0.25 - 1), 0.234375 - 0) = (0.5, 0.234375)
# and each step adds 0.1 m / (sqrt(v) + 0.5).
SECOND_MOMENTS = {
    FedAdagrad: ([0.5, 0.3125], [1.5, 0.3125]),
    FedAdam: ([0.25, 0.203125], [0.4375, 0.15234375]),
    FedYogi: ([0.25, 0.234375], [0.5, 0.234375]),
}


@pytest.mark.parametrize("kind", SECOND_MOMENTS, ids=lambda kind: kind.name)
def test_two_steps_of_the_adaptive_ones(kind):
    optimizer = kind(lr=0.1, momentum=0.5, beta2=0.75, tau=0.5)
    weights, moments = W, ()
    expected = [1.0, -2.0]
    deltas = ([0.5, -0.25], [1.0, 0.0])
    firsts = ([0.25, -0.125], [0.625, -0.0625])
    for delta, first, second in zip(deltas, firsts, SECOND_MOMENTS[kind], strict=True):
        weights, moments = optimizer.step(weights, weights + torch.tensor(delta), moments)
        expected = [e + 0.1 * m / (v**0.5 + 0.5) for e, m, v in zip(expected, first, second, strict=True)]
        assert moments[0].tolist() == pytest.approx(first, abs=1e-6)
        assert moments[1].tolist() == pytest.approx(second, abs=1e-6)
        assert weights.tolist() == pytest.approx(expected, abs=1e-6)


def test_nothing_passed_in_is_written_to():
    for kind in SERVER_OPTIMIZERS.values():
        optimizer = kind(momentum=0.5)
        weights, mean = W.clone(), MEAN.clone()
        _, moments = optimizer.step(weights, mean, ())
        kept = tuple(moment.clone() for moment in moments)
        optimizer.step(weights, mean, moments)
        assert torch.equal(weights, W)
        assert torch.equal(mean, MEAN)
        assert all(torch.equal(a, b) for a, b in zip(kept, moments, strict=True))


def test_the_published_defaults():
    # Reddi et al., section 5: beta_1 .9, beta_2 .99; eta .01 and tau 1e-3 as in ALGORITHMS.
    for kind in (FedAdagrad, FedAdam, FedYogi):
        optimizer = kind()
        assert (optimizer.lr, optimizer.momentum, optimizer.beta2, optimizer.tau) == (0.01, 0.9, 0.99, 1e-3)
    assert list(SERVER_OPTIMIZERS) == ["fedavg", "fedadagrad", "fedadam", "fedyogi", "fedadamw"]
