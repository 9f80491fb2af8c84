"""The decoder: as plain loops have it, causal, drawn by the rules, its FLOPs and pruned gradients by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algorithms.core.layers import ActivationPruning, prune_inputs
from algorithms.core.parameters import ParameterLayout, prunable_layers
from cluster.configuration.choices import ChoiceError
from cluster.flops import LayerFlops
from cluster.workload import models

SMALL = {"layers": 2, "width": 8, "heads": 2, "hidden": 12}


def small(length=5, vocabulary=7, **options):
    return models.build(
        "transformer", input_shape=(length,), classes=vocabulary, seed=3, **{**SMALL, **options}
    )


def some_tokens(rows=3, length=5, vocabulary=7):
    return torch.from_numpy(np.random.default_rng(1).integers(0, vocabulary, (rows, length)))


def by_loops(model, tokens, heads):
    """The same in float64 numpy, one place and one head after the other."""
    weights = {name: value.detach().double().numpy() for name, value in model.named_parameters()}

    def norm(x, name):
        centred = x - x.mean()
        return (
            centred / math.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    def linear(x, name):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def gelu(x):
        return np.array([0.5 * each * (1 + math.erf(each / math.sqrt(2))) for each in x])

    logits = []
    for row in tokens.numpy():
        xs = [weights["tokens.weight"][token] + weights["places.weight"][t] for t, token in enumerate(row)]
        for block in range(sum(name.endswith("feed1.weight") for name in weights)):
            at = f"blocks.{block}"
            normed = [norm(x, f"{at}.norm1") for x in xs]
            q, k, v = ([linear(x, f"{at}.attention.{n}") for x in normed] for n in ("query", "key", "value"))
            size = len(q[0]) // heads
            for t in range(len(xs)):
                mixed = []
                for head in range(heads):
                    part = slice(head * size, (head + 1) * size)
                    scores = [math.exp(q[t][part] @ k[s][part] / math.sqrt(size)) for s in range(t + 1)]
                    mixed += list(sum(w * v[s][part] for s, w in enumerate(scores)) / sum(scores))
                xs[t] = xs[t] + linear(np.array(mixed), f"{at}.attention.output")
            xs = [x + linear(gelu(linear(norm(x, f"{at}.norm2"), f"{at}.feed1")), f"{at}.feed2") for x in xs]
        head = weights.get("head.weight", weights["tokens.weight"])
        logits.append([head @ norm(x, "norm") for x in xs])
    return np.array(logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_outputs_are_those_of_plain_loops(heads, tied):
    model, tokens = small(heads=heads, tied=tied), some_tokens()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        found = model(tokens).numpy()
    assert found.shape == (3, 5, 7)
    np.testing.assert_allclose(found, by_loops(model, tokens, heads), atol=2e-5)


def test_no_place_sees_what_follows():
    model, tokens = small().eval(), some_tokens(rows=1)
    with torch.no_grad():
        before = model(tokens)
        for place in range(5):
            other = tokens.clone()
            other[0, place] = (other[0, place] + 1) % 7
            changed = (model(other) != before).any(-1)[0]
            assert not changed[:place].any()
            assert changed[place]


def test_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    first, second = small(), small()
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
    other = models.build("transformer", input_shape=(5,), classes=7, seed=4, **SMALL)
    assert not torch.equal(other.tokens.weight, first.tokens.weight)


def test_weights_are_drawn_by_the_rules():
    model = models.build("transformer", input_shape=(64,), classes=257, seed=0)
    for name, parameter in model.state_dict().items():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            deviation = 1 / math.sqrt(parameter.shape[1])
            assert float(parameter.std()) == pytest.approx(deviation, rel=0.05), name
            assert float(parameter.abs().max()) <= 2 * deviation / models.TRUNCATED_NORMAL_DEVIATION, name
    assert sum(p.numel() for p in model.parameters()) == 470_784
    assert ParameterLayout.of(model).prunable_size == 426_112


def test_projections_are_prunable_and_embeddings_are_not():
    layers = [
        f"blocks.{block}.{name}"
        for block in range(2)
        for name in (*(f"attention.{each}" for each in ("query", "key", "value", "output")), "feed1", "feed2")
    ]
    assert list(prunable_layers(small())) == [*layers, "head"]
    layout = ParameterLayout.of(small(), some_tokens())
    assert {"tokens.weight", "places.weight"} <= {entry.name for entry in layout.other}
    tied = small(tied=True)
    assert list(prunable_layers(tied)) == layers
    assert "tokens.weight" in {entry.name for entry in ParameterLayout.of(tied, some_tokens()).other}


def test_flops_by_hand():
    model, tokens = small(layers=1), some_tokens(rows=2)
    flops = LayerFlops.of(model, ParameterLayout.of(model), tokens)
    # A sample is 5 tokens. Four projections of 8 to 8: 5 * 8 * 8 * 2 = 640; 8 to 12 and back:
    # 5 * 8 * 12 * 2 = 960; the head, 8 to 7: 5 * 8 * 7 * 2 = 560. The products of attention are not counted.
    np.testing.assert_array_equal(flops.forward, [640, 640, 640, 640, 960, 960, 560])
    # Below the first layers are embeddings, which are trained: every layer has an input gradient.
    assert flops.needs_input_gradient.tolist() == [1.0] * 7
    assert flops.dense(3) == 3 * 3 * (4 * 640 + 2 * 960 + 560)


def test_input_gradients_are_those_of_what_is_trained_below():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.left, self.right = nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(4, 3)
            self.tokens.weight.requires_grad_(False)
            self.last = nn.Linear(3, 2)

        def forward(self, tokens):
            x = self.tokens(tokens)
            return self.last(self.left(x) + self.right(x))

    model = Frozen()
    flops = LayerFlops.of(model, ParameterLayout.of(model), some_tokens())
    assert flops.needs_input_gradient.tolist() == [0.0, 0.0, 1.0]


def check_pruned_gradients(build, given, targets, density):
    """Each weight gradient is that of the input's largest entries over the whole batch of sequences.

    What reaches a layer from above is what the plain model hands down: products of attention are exact.
    """
    pruned, plain = build().double().train(), build().double().train()
    prune_inputs(pruned, lambda name, layer: ActivationPruning(density=density, every_batch=True))

    def gradients(model):
        loss = F.cross_entropy(model(given).flatten(0, -2), targets.flatten())
        named = dict(model.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    seen, upstream = {}, {}

    def look(name, inputs, output):
        seen[name] = inputs[0].detach()
        output.register_hook(lambda gradient: upstream.update({name: gradient.detach()}))

    for name, layer in prunable_layers(plain).items():
        layer.register_forward_hook(lambda _, given, out, name=name: look(name, given, out))
    found, exact = gradients(pruned), gradients(plain)
    for name, gradient in exact.items():
        layer = name.removesuffix(".weight")
        if layer not in seen:
            torch.testing.assert_close(found[name], gradient, atol=1e-13, rtol=1e-11)
            continue
        inputs, above = seen[layer], upstream[layer]
        if gradient.ndim == 4:  # patches that do not overlap: a linear layer on each of them
            size = gradient.shape[-1]
            inputs, above = F.unfold(inputs, size, stride=size).mT, above.flatten(2).mT
        inputs = inputs.reshape(-1, inputs.shape[-1])
        ranked = sorted(map(abs, inputs.flatten().tolist()), reverse=True)
        threshold = ranked[math.ceil(density * len(ranked)) - 1]
        expected = torch.zeros(gradient.shape).double().flatten(1)
        for place, handed_down in enumerate(above.reshape(-1, above.shape[-1])):
            expected += torch.outer(handed_down, inputs[place] * (inputs[place].abs() >= threshold))
        torch.testing.assert_close(found[name].flatten(1), expected, atol=1e-13, rtol=1e-11)
        assert not torch.allclose(found[name], gradient)


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_pruned_gradients_of_the_whole_decoder(density):
    check_pruned_gradients(small, some_tokens(), some_tokens().flip(0), density)


def test_heads_divide_the_width():
    with pytest.raises(ChoiceError, match="model: heads: 3 do not divide the width 8"):
        small(heads=3)
