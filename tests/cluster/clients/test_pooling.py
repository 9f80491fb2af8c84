"""Max pooling with the channels together against torch's own, bit for bit."""

import copy

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from cluster.clients.pooling import FEWEST_CHANNELS, quicken_pools

#: Values between which nothing but the order of places decides, and those that compare oddly.
VALUES = [0.0, -0.0, 1.0, 1.0, -1.0, 3.5, float("inf"), -float("inf"), float("nan")]


@settings(deadline=None)
@given(
    channels=st.integers(FEWEST_CHANNELS - 1, 19),
    side=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.sampled_from([2, 3, (2, 3)]),
    stride=st.sampled_from([None, 1, 2, (2, 1)]),
    padding=st.sampled_from([0, 1]),
    ceil_mode=st.booleans(),
    dilation=st.sampled_from([1, 1, 2]),
    odd=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_torchs_own_bits(
    channels, side, kernel, stride, padding, ceil_mode, dilation, odd, seed
):
    if dilation == 2 and kernel != 2:
        kernel = 2
    pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    quick = copy.deepcopy(pool)
    quicken_pools(quick)
    rng = np.random.default_rng(seed)
    shape = (2, channels, *side)
    values = rng.choice(VALUES, shape) if odd else np.maximum(rng.standard_normal(shape), 0.0)
    inputs = torch.from_numpy(values.astype(np.float32)).requires_grad_()
    found, expected = quick(inputs), pool(inputs)
    gradient = torch.from_numpy(rng.standard_normal(expected.shape).astype(np.float32))
    (moved,), (own,) = (torch.autograd.grad(each, inputs, gradient) for each in (found, expected))
    for mine, theirs in ((found, expected), (moved, own)):
        assert mine.stride() == theirs.stride()
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


def test_only_plain_pools_are_swapped():
    class Own(nn.MaxPool2d):
        pass

    model = nn.Sequential(nn.MaxPool2d(2), Own(2), nn.MaxPool2d(2, return_indices=True), nn.AvgPool2d(2))
    before = [type(layer) for layer in model]
    quicken_pools(model)
    assert [type(layer) is kind for layer, kind in zip(model, before, strict=True)] == [
        False,
        True,
        True,
        True,
    ]
    assert isinstance(model[0], nn.MaxPool2d)


def test_second_derivatives_are_those_of_torchs_own():
    pool, quick = nn.MaxPool2d(2), nn.MaxPool2d(2)
    quicken_pools(quick)
    inputs = torch.randn((2, 5, 6, 6), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((quick(inputs) ** 3).sum(), inputs, create_graph=True)
    (again,) = torch.autograd.grad((pool(inputs) ** 3).sum(), inputs, create_graph=True)
    assert torch.equal(*(torch.autograd.grad((one**2).sum(), inputs)[0] for one in (first, again)))


def test_transforms_of_torchs_work_as_with_its_own():
    pool, quick = nn.MaxPool2d(2), nn.MaxPool2d(2)
    quicken_pools(quick)
    inputs = torch.randn(3, 5, 6, 6)
    for of_each in (
        lambda layer: torch.func.vmap(torch.func.grad(lambda one: (layer(one[None]) ** 2).sum()))(inputs),
        lambda layer: torch.func.jvp(layer, (inputs,), (inputs,))[1],
        lambda layer: torch.func.hessian(lambda one: (layer(one) ** 3).sum())(inputs[:1]),
    ):
        assert torch.equal(of_each(quick), of_each(pool))
    with forward_ad.dual_level():
        found, expected = (
            forward_ad.unpack_dual(layer(forward_ad.make_dual(inputs, inputs))) for layer in (quick, pool)
        )
    assert torch.equal(found.tangent, expected.tangent)


def test_one_pixel_that_lies_both_ways_comes_out_as_it_does_of_torchs_own():
    pool, quick = nn.MaxPool2d(1), nn.MaxPool2d(1)
    quicken_pools(quick)
    inputs = torch.randn(3, 8, 1, 1).to(memory_format=torch.channels_last)
    assert quick(inputs).stride() == pool(inputs).stride()
