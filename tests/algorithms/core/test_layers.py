"""Custom gradients against explicit formulas and autograd, in float64; exponents; thresholds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from algorithms.core.layers import (
    ActivationPruning,
    Powerpropagation,
    inverse_power,
    power,
    prune_inputs,
    pruned_layers,
    spectral_exponent,
)


def _prune_all(model: nn.Module, density: float | None, *, every_batch: bool = True) -> nn.Module:
    prune_inputs(model, lambda name, layer: ActivationPruning(density=density, every_batch=every_batch))
    return model


def _kept_largest(inputs: torch.Tensor, density: float) -> torch.Tensor:
    """``inputs`` with zeros outside its ceil(density * numel) largest magnitudes, by sorting."""
    ranked = sorted((abs(v) for v in inputs.flatten().tolist()), reverse=True)
    threshold = ranked[math.ceil(density * inputs.numel()) - 1]
    return torch.where(inputs.abs() >= threshold, inputs, torch.zeros((), dtype=inputs.dtype))


LAYERS = {
    "conv2d": (nn.Conv2d(3, 4, 3), (2, 3, 6, 7)),
    "stride and padding": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "uneven stride and padding": (nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(0, 1)), (2, 2, 5, 6)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), (2, 4, 5, 5)),
    "depthwise, dilated": (nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=4), (2, 4, 6, 6)),
    "conv1d": (nn.Conv1d(2, 3, 5, stride=2, padding=2, dilation=1), (3, 2, 11)),
    "conv1d dilated": (nn.Conv1d(2, 4, 3, dilation=3, groups=2, bias=False), (3, 2, 12)),
    "linear": (nn.Linear(5, 4), (6, 5)),
    "linear on sequences": (nn.Linear(5, 4, bias=False), (2, 3, 5)),
}


@pytest.mark.parametrize("density", [0.03, 0.4, 0.9])
@pytest.mark.parametrize("which", LAYERS)
def test_gradients_are_those_of_the_formula(which, density):
    layer, shape = LAYERS[which]
    generator = torch.Generator().manual_seed(len(which))
    plain = copy.deepcopy(layer).double()
    pruned = _prune_all(nn.Sequential(copy.deepcopy(layer).double()), density)[0]
    inputs = torch.randn(shape, dtype=torch.float64, generator=generator)
    x = inputs.clone().requires_grad_()
    output = pruned(x)
    upstream = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad(output, [x, *pruned.parameters()], upstream)

    # Forward, input gradient and bias gradient: exactly the plain layer's on the unpruned input.
    y = inputs.clone().requires_grad_()
    expected_output = plain(y)
    exact = torch.autograd.grad(expected_output, [y, *plain.parameters()], upstream)
    assert torch.equal(output, expected_output)
    torch.testing.assert_close(found[0], exact[0], atol=1e-13, rtol=1e-13)
    if plain.bias is not None:
        torch.testing.assert_close(found[2], exact[2], atol=1e-13, rtol=1e-13)

    # Weight gradient: the plain layer's on the pruned input, with the same gradient from above.
    kept = _kept_largest(inputs, density)
    assert 0 < int((kept != 0).sum()) < inputs.numel()
    expected = torch.autograd.grad(plain(kept), plain.weight, upstream)[0]
    torch.testing.assert_close(found[1], expected, atol=1e-13, rtol=1e-13)
    assert not torch.allclose(found[1], exact[1])


@pytest.mark.parametrize("which", LAYERS)
def test_at_density_1_the_layer_is_the_plain_one_bit_for_bit(which):
    layer, shape = LAYERS[which]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    results = []
    for model in (copy.deepcopy(layer), _prune_all(nn.Sequential(copy.deepcopy(layer)), None)[0]):
        x = inputs.clone().requires_grad_()
        output = model(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_first_layer_needs_no_input_gradient():
    model = _prune_all(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), 0.5)
    gradients = torch.autograd.grad(model(torch.randn(3, 1, 4, 4)).sum(), list(model.parameters()))
    assert [g.shape for g in gradients] == [p.shape for p in model.parameters()]


def test_pruning_worked_by_hand():
    # Density 1/2 of [[1, -4], [3, 2]] keeps -4 and 3. dL/dy = [[1], [10]]:
    # dW = 1 * (0, -4) + 10 * (3, 0) = (30, -4), unpruned it would be (31, 16); dx = dL/dy w.
    layer = _prune_all(nn.Sequential(nn.Linear(2, 1)), 0.5)[0]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 0.5]]))
    inputs = torch.tensor([[1.0, -4.0], [3.0, 2.0]], requires_grad=True)
    layer(inputs).backward(torch.tensor([[1.0], [10.0]]))
    assert layer.weight.grad.tolist() == [[30.0, -4.0]]
    assert layer.bias.grad.tolist() == [11.0]
    assert inputs.grad.tolist() == [[2.0, 0.5], [20.0, 5.0]]
    assert layer.pruning.kept == 0.5


def test_entries_equal_to_the_threshold_are_all_kept():
    layer = _prune_all(nn.Sequential(nn.Linear(4, 1, bias=False)), 0.25)[0]
    layer(torch.tensor([[3.0, -3.0, 1.0, 3.0]])).backward()
    assert layer.weight.grad.tolist() == [[3.0, -3.0, 0.0, 3.0]]
    assert layer.pruning.kept == 0.75


def test_density_follows_the_layers_own_weight():
    # 3 of 8 weights are nonzero: ceil(3/8 * 4) = ceil(1.5) = 2 entries of the input stay.
    layer = _prune_all(nn.Sequential(nn.Linear(4, 2, bias=False)), None)[0]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 3]]))
    layer(torch.tensor([[1.0, 2, 3, 4]])).sum().backward()
    assert layer.weight.grad.tolist() == [[0, 0, 3, 4], [0, 0, 3, 4]]


@pytest.mark.parametrize(("nonzeros", "size"), [(7, 100), (14, 100), (29, 50), (57, 100)])
def test_the_number_kept_is_the_exact_ceiling(nonzeros, size):
    # In floats 0.07 * 100 = 7.000000000000001, whose ceiling is 8; the weight has 7 nonzeros.
    layer = _prune_all(nn.Sequential(nn.Linear(size, 1, bias=False)), None)[0]
    with torch.no_grad():
        layer.weight.zero_()[:, :nonzeros] = 1.0
    inputs = torch.arange(1.0, size + 1).view(1, size)
    layer(inputs).backward()
    assert int(layer.weight.grad.count_nonzero()) == nonzeros


def test_a_lower_bound_of_the_density():
    pruning = ActivationPruning(density=None, every_batch=True, minimum_density=0.5)
    # A weight of zeros: density 0, but half of the input is kept: the threshold is the second largest.
    assert pruning.threshold(torch.tensor([1.0, -5.0, 2.0, 3.0]), torch.zeros(3)) == 3.0
    # Without the bound one entry stays at least: ceil(1e-7 * 4) = 1.
    pruning = ActivationPruning(density=None, every_batch=True, minimum_density=1e-7)
    assert pruning.threshold(torch.tensor([1.0, -5.0, 2.0, 3.0]), torch.zeros(3)) == 5.0


def test_first_batch_reuses_its_threshold_until_reset():
    pruning = ActivationPruning(density=0.5, every_batch=False)
    weight = torch.ones(2)
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert pruning.threshold(first, weight) == 3.0
    assert pruning.threshold(second, weight) == 3.0
    pruning.reset()
    assert pruning.kept == 1.0
    assert pruning.threshold(second, weight) == 30.0


def test_first_batch_of_a_dense_layer_prunes_nothing_for_the_whole_visit():
    pruning = ActivationPruning(density=None, every_batch=False)
    assert pruning.threshold(torch.arange(4.0), torch.ones(2)) == 0.0
    assert pruning.threshold(torch.arange(4.0), torch.tensor([1.0, 0.0])) == 0.0


def test_every_batch_draws_anew():
    pruning = ActivationPruning(density=0.5, every_batch=True)
    assert pruning.threshold(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(2)) == 3.0
    assert pruning.threshold(torch.tensor([10.0, 20.0, 30.0, 40.0]), torch.ones(2)) == 30.0


def test_non_finite_inputs_prune_nothing():
    pruning = ActivationPruning(density=0.5, every_batch=True)
    inputs = torch.tensor([1.0, math.nan, math.nan, math.nan])
    assert pruning.threshold(inputs, torch.ones(2)) == 0.0


def test_evaluation_draws_no_threshold():
    model = _prune_all(nn.Sequential(nn.Linear(4, 2)), 0.5, every_batch=False)
    model.eval()(torch.randn(3, 4))
    assert not model[0].pruning.drawn


def test_swapping_leaves_names_weights_and_other_layers_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 2, 3), nn.Linear(2, 2), nn.ReLU())
    reflecting = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    model.append(reflecting)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_inputs(
        model,
        lambda name, layer: None if name == "2" else ActivationPruning(density=0.5, every_batch=True),
    )
    assert list(pruned_layers(model)) == ["0.weight"]
    assert type(model[1]) is nn.ConvTranspose2d
    assert type(model[2]) is nn.Linear
    assert type(reflecting) is nn.Conv2d
    assert isinstance(model[0], nn.Conv2d)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_by_name_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"))
    with pytest.raises(ValueError, match="0: padding='same' by name"):
        _prune_all(model, 0.5)


# ------------------------------------------------------------------------------------- Powerpropagation


def _autograd_power(weights, exponents, upstream):
    """theta and dL/dw of theta = sign(w) |w|^beta by float64 autograd; w itself where beta is 1."""
    w = weights.double().clone().requires_grad_()
    theta = torch.cat(
        [w[span] if beta == 1.0 else w[span].sign() * w[span].abs() ** beta for span, beta in exponents]
    )
    return theta.detach(), torch.autograd.grad(theta, w, upstream.double())[0]


@pytest.mark.parametrize("density", [1.0, 0.7, 0.2, 0.0], ids=["full", "dense path", "gathered", "empty"])
@pytest.mark.parametrize(
    "exponents",
    [
        [(slice(0, 600), 1.25)],
        [(slice(0, 600), 3.0)],
        [(slice(0, 200), 1.25), (slice(200, 400), 1.25), (slice(400, 600), 1.25)],
        [(slice(0, 200), 1.1), (slice(200, 210), 1.0), (slice(210, 600), 1.7)],
        [(slice(0, 300), 1.0), (slice(300, 600), 1.0)],
    ],
    ids=["one", "cubic", "merged", "mixed", "none"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_map_and_its_gradient(exponents, density, dtype):
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(600, generator=generator, dtype=dtype)
    weights[torch.rand(600, generator=generator) >= density] = 0.0
    effective = torch.full((600,), math.nan, dtype=dtype)
    powers = Powerpropagation(weights, effective, exponents)
    gathered = [positions is not None for _, beta, positions in powers._parts if beta != 1.0]
    assert all(gathered) if density < 0.5 else not any(gathered)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for _ in range(2):
        powers.refresh()
        upstream = torch.randn(600, generator=generator, dtype=dtype)
        theta, expected = _autograd_power(weights, exponents, upstream)
        torch.testing.assert_close(effective.double(), theta, atol=tolerance, rtol=tolerance)
        gradient = upstream.clone()
        powers.chain(gradient)
        torch.testing.assert_close(gradient.double(), expected, atol=tolerance, rtol=tolerance)
        for span, beta in exponents:
            if beta > 1.0:  # exactly 0, so that such a weight never regrows locally
                zero = weights[span] == 0
                assert not gradient[span][zero].any()
                assert not effective[span][zero].any()
        # Local training moves nonzero weights, and with beta 1 all of them.
        weights -= 0.1 * gradient


def test_the_map_worked_by_hand():
    # beta 2: theta = sign(w) w^2, dtheta/dw = 2 |w|.
    weights = torch.tensor([3.0, -0.5, 0.0, 2.0])
    effective = torch.empty(4)
    powers = Powerpropagation(weights, effective, [(slice(0, 3), 2.0), (slice(3, 4), 1.0)])
    powers.refresh()
    assert effective.tolist() == [9.0, -0.25, 0.0, 2.0]
    gradient = torch.tensor([1.0, 1.0, 1.0, 1.0])
    powers.chain(gradient)
    assert gradient.tolist() == [6.0, 1.0, 0.0, 1.0]


def test_the_server_computes_the_same_theta():
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    for sparse in (False, True):
        if sparse:
            weights[torch.rand(1000, generator=torch.Generator().manual_seed(4)) < 0.9] = 0.0
        effective = torch.empty(1000)
        Powerpropagation(weights, effective, [(slice(0, 1000), 1.25)]).refresh()
        # To the last bit but one: vectorised and scalar powers differ in it.
        torch.testing.assert_close(power(weights, 1.25), effective, atol=0.0, rtol=3e-7)


def test_inverse_power():
    assert inverse_power(torch.tensor([4.0, -9.0, 0.0]), 2.0).tolist() == [2.0, -3.0, 0.0]
    theta = torch.randn(100, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(power(inverse_power(theta, 1.25), 1.25), theta)


@pytest.mark.parametrize("shape", [(8, 5), (16, 4, 3, 3), (6, 2, 7), (1, 9)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_the_spectral_exponent_is_that_of_a_singular_value_decomposition(shape, sparsity):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < sparsity] = 0.0
    weight.view(-1)[0] = 0.3  # never empty
    matrix = weight.abs().double().reshape(shape[0], -1)
    expected = 1.0 + float(matrix.mean() / torch.linalg.svdvals(matrix)[0])
    assert spectral_exponent(weight) == pytest.approx(expected, abs=1e-5)


def test_the_spectral_exponent_worked_by_hand():
    # |W| = [[3, 0], [0, 4]]: sigma 4, mean 7/4, beta = 1 + 7/16.
    assert spectral_exponent(torch.tensor([[3.0, 0.0], [0.0, -4.0]])) == pytest.approx(1.4375, abs=1e-4)
    assert spectral_exponent(torch.zeros(3, 3)) == 1.0
    assert spectral_exponent(torch.tensor([[math.nan, 1.0], [1.0, 1.0]])) == 1.0
