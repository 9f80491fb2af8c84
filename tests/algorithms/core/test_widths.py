"""Slices of hidden units: by hand, of every built-in model, and what is refused by the layer's name."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from algorithms import Instructions, ParameterLayout
from algorithms.core.widths import UnitLayout, widest
from algorithms.fedrolex import FedRolex
from algorithms.heterofl import HeteroFL
from cluster.federation import Federation
from cluster.workload import models
from cluster.workload.models import ModelError
from tests.tiny_experiment import tiny_federation

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def laid_out(model, example=EXAMPLE):
    return UnitLayout.over(ParameterLayout.of(model, example), model, example)


def mlp(*widths):
    layers = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rows(layout, part, name):
    return part[next(entry.span for entry in layout.trained if entry.name == name)].tolist()


def told(number):
    return Instructions(round=number, rounds=9)


def test_half_of_three_units_is_two():
    """in 2, hidden 3, out 2: the first two units, their biases, their columns in the last layer."""
    layout = laid_out(mlp(2, 3, 2), torch.randn(2, 2))
    part = HeteroFL(share_of="width").submodel(torch.zeros(17), told(1), 0, 0.5, layout)
    assert rows(layout, part, "1.weight") == [True, True, True, True, False, False]
    assert rows(layout, part, "1.bias") == [True, True, False]
    assert rows(layout, part, "3.weight") == [True, True, False, True, True, False]
    assert rows(layout, part, "3.bias") == [True, True]
    assert int(part[:12].sum()) == 8 == layout.weights(0.5)


def test_the_window_rolls_by_a_unit_a_round():
    layout = laid_out(mlp(1, 4, 1), torch.randn(2, 1))
    method, found = FedRolex(share_of="width"), []
    for number in (1, 2, 3, 4, 5):
        part = method.submodel(torch.zeros(layout.size), told(number), 3, 0.5, layout)
        found.append(np.flatnonzero(rows(layout, part, "1.bias")).tolist())
    assert found == [[0, 1], [1, 2], [2, 3], [0, 3], [0, 1]]


@pytest.mark.parametrize(
    ("name", "options", "blocks"),
    [
        ("small_cnn", {"channels": [4, 6], "hidden": 5, "groups": 2}, {4: 2, 6: 2, 5: 5}),
        ("small_cnn", {"channels": [4, 6], "hidden": 5, "norm": "none"}, {4: 4, 6: 6, 5: 5}),
        ("mlp", {"hidden": [6, 4]}, {6: 6, 4: 4}),
        ("resnet18", {"width": 4, "norm": "group", "groups": 2}, {4: 2, 8: 2, 16: 2, 32: 2}),
        ("resnet18", {"width": 4, "norm": "none"}, {4: 4, 8: 8, 16: 16, 32: 32}),
        ("linear", {}, {}),
    ],
)
def test_the_built_in_models(name, options, blocks):
    model = models.build(name, input_shape=(1, 8, 8), classes=10, seed=1, **options)
    layout = laid_out(model)
    assert dict(layout.blocks) == blocks
    for ratio in (0.01, 0.5, 0.75, 1.0):
        part = HeteroFL(share_of="width").submodel(torch.zeros(layout.size), told(1), 0, ratio, layout)
        assert int(part[: layout.prunable_size].sum()) == layout.weights(ratio)
    assert bool(part.all())


def test_a_share_of_the_weights_is_the_widest_slice_that_fits():
    layout = laid_out(mlp(64, 30, 20, 10))
    assert (widest(layout, 1.0), layout.weights(1.0)) == (1.0, layout.prunable_size)
    for share in (0.5, 0.25, 0.1):
        ratio = widest(layout, share)
        more = min(r for r in (i / b for _, b in layout.blocks for i in range(1, b + 1)) if r > ratio)
        assert layout.weights(ratio) <= share * layout.prunable_size < layout.weights(more)
    assert layout.counts(widest(layout, 1e-6)) == {30: 1, 20: 1}  # one unit is the least


class Reordered(nn.Module):
    """Flattens with the channels last, so that a unit's pixels are apart."""

    def __init__(self, by_pixel):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 64, 3)
        self.by_pixel = by_pixel

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.out((x.permute(0, 2, 3, 1) if self.by_pixel else x).flatten(1))


def sequence(*middle, out=4):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *middle, nn.Conv2d(out, 3, 8), nn.Flatten())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (sequence(nn.BatchNorm2d(4)), "1: its running statistics are averaged"),
        (sequence(nn.LayerNorm([4, 8, 8])), "1.weight: not known which of it belongs"),
        (sequence(nn.LayerNorm([4, 8, 8], elementwise_affine=False)), "2: it depends on units"),
        (sequence(nn.Softmax(dim=1)), "2: it depends on units"),
        (sequence(nn.ConvTranspose2d(4, 4, 1)), "1: units cannot be left out of a grouped or a transposed"),
        (sequence(nn.Conv2d(4, 4, 1, groups=4)), "1: units cannot be left out of a grouped or a transposed"),
        (
            sequence(nn.PixelShuffle(2), nn.AvgPool2d(2), out=1),
            "3: its 1 inputs are not those of the 4 units",
        ),
        (Reordered(True), "out: it depends on units"),
        (nn.Sequential(nn.GroupNorm(1, 1), *sequence()), "0: it normalises 1 values, which no hidden layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_whose_zeros_are_no_narrower_model_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        laid_out(model)


@pytest.mark.parametrize(
    "model",
    [
        sequence(nn.Sigmoid()),  # what is left out puts out a half, which meets no weight
        sequence(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
        sequence(nn.GroupNorm(2, 4)),
        sequence(nn.InstanceNorm2d(4)),
        Reordered(False),
    ],
)
def test_others_are_taken(model):
    assert dict(laid_out(model).blocks)[4] in (2, 4)


def test_a_refusal_is_a_line_before_anything_starts(cache):
    config = tiny_federation(
        cache,
        algorithm={"name": "heterofl"},
        model={"name": "tests.tiny_experiment:tiny_model"},
    )
    with pytest.raises(ModelError, match=r"^model.name = 'tests.*tiny_model': 3: units cannot be left out"):
        Federation.of(config)
