"""FLOPs worked by hand: a multiply-add counts two; forward, input gradient, weight gradient."""

import numpy as np
import pytest
import torch
from torch import nn

from algorithms import ParameterLayout
from cluster.flops import LayerFlops


def count(model, example):
    return LayerFlops.of(model, ParameterLayout.of(model), example)


def small():
    """8x8 images of one channel."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),  # 4 x 8 x 8 outputs of 1*3*3 = 9 products: 256 * 9 * 2 = 4608
        nn.ReLU(),
        nn.Conv2d(
            4, 6, 3, stride=2, padding=1, groups=2
        ),  # 6 x 4 x 4 outputs of 2*9 = 18: 96 * 18 * 2 = 3456
        nn.Flatten(),
        nn.Linear(96, 10),  # 10 outputs of 96: 960 * 2 = 1920
    )


FORWARD = np.array([4608.0, 3456.0, 1920.0])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_forward_flops_of_one_sample(batch):
    flops = count(small(), torch.zeros(batch, 1, 8, 8))
    np.testing.assert_array_equal(flops.forward, FORWARD)
    np.testing.assert_array_equal(flops.needs_input_gradient, [False, True, True])


def test_dense_training():
    flops = count(small(), torch.zeros(2, 1, 8, 8))
    # The first layer has no input gradient: 2 * 4608 + 3 * 3456 + 3 * 1920 = 9216 + 10368 + 5760 = 25344.
    assert flops.dense(1) == 25344
    assert flops.dense(7) == 7 * 25344


def test_sparse_training():
    flops = count(small(), torch.zeros(2, 1, 8, 8))
    weights, activations = np.array([0.5, 0.25, 1.0]), np.array([1.0, 0.5, 0.1])
    gradients = np.array([0.5, 1.0, 0.2])
    # conv 1: 4608 * (1 * 0.5 + 1.0 * 0.5) = 4608
    # conv 2: 3456 * (2 * 0.25 + 0.5 * 1.0) = 3456
    # linear: 1920 * (2 * 1.0 + 0.1 * 0.2) = 3878.4
    expected = np.array([4608, 3456, 3878.4])
    np.testing.assert_allclose(flops.sparse(1, weights, activations, gradients), expected)
    np.testing.assert_allclose(flops.sparse(3, weights, activations, gradients), 3 * expected)
    ones = np.ones(3)
    assert flops.sparse(4, ones, ones, ones).sum() == flops.dense(4)


def test_dilation_padding_and_bias_change_nothing_but_the_outputs():
    # 3 x 6 x 6 outputs (8 + 2*1 - 2*(3-1) = 6) of 2*9 = 18 products: 108 * 18 * 2 = 3888.
    model = nn.Conv2d(2, 3, 3, padding=1, dilation=2, bias=True)
    assert count(nn.Sequential(model), torch.zeros(1, 2, 8, 8)).forward.tolist() == [3888]


def test_a_transposed_convolution_multiplies_each_input():
    # Each of 4 * 5 * 5 = 100 inputs meets 3 output channels of 2x2: 100 * 12 * 2 = 2400.
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 2, stride=2))
    assert count(model, torch.zeros(2, 4, 5, 5)).forward.tolist() == [2400]


def test_a_linear_layer_on_a_sequence_counts_every_position():
    # 7 positions of 5 outputs of 3 products: 7 * 5 * 3 * 2 = 210.
    assert count(nn.Sequential(nn.Linear(3, 5)), torch.zeros(2, 7, 3)).forward.tolist() == [210]


class Twice(nn.Module):
    """One layer called twice, and two layers that share one weight; defined in another order than called."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.again = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.again.weight

    def forward(self, x):
        return self.last(self.tied(self.again(self.again(x))))


def test_calls_and_tied_weights_add_up():
    flops = count(Twice(), torch.zeros(3, 4))
    # last: 2 * 4 * 2 = 16; the shared weight: three calls of 4 * 4 * 2 = 32.
    assert flops.forward.tolist() == [16, 96]
    # The layer that is called first has no input gradient then, not the one defined first.
    assert flops.needs_input_gradient.tolist() == [1, 2 / 3]
    assert flops.dense(1) == pytest.approx(3 * 16 + 2 * 96 + 64)


def test_a_parametrised_weight_is_not_prunable():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert count(nn.Sequential(normed, nn.Linear(4, 2)), torch.zeros(1, 4)).forward.tolist() == [16]


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count(model, torch.rand(4, 1, 8, 8))
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_hooks for module in model.modules())
