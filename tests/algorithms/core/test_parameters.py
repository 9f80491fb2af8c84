"""The flat layout: order of the spans, views, tied weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from algorithms import ParameterLayout


class Small(nn.Module):
    """A normalisation first, so that module order and flat order differ."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.conv = nn.Conv2d(1, 2, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.conv(self.norm(x)).mean(dim=(2, 3)))


def test_prunable_weights_come_first_then_other_parameters_then_float_buffers():
    layout = ParameterLayout.of(Small(), torch.zeros(2, 1, 4, 4))
    # conv 2*1*2*2 = 8 and head 3*2 = 6 make 14 prunable; norm 1+1, biases 2 and 3 make 7; 2 statistics.
    assert [(e.name, e.shape, e.start, e.stop) for e in layout.prunable] == [
        ("conv.weight", (2, 1, 2, 2), 0, 8),
        ("head.weight", (3, 2), 8, 14),
    ]
    assert [(e.name, e.start, e.stop) for e in layout.other] == [
        ("norm.weight", 14, 15),
        ("norm.bias", 15, 16),
        ("conv.bias", 16, 18),
        ("head.bias", 18, 21),
    ]
    assert [(e.name, e.start, e.stop) for e in layout.buffers] == [
        ("norm.running_mean", 21, 22),
        ("norm.running_var", 22, 23),
    ]
    assert (layout.prunable_size, layout.trained_size, layout.size) == (14, 21, 23)
    assert layout.trained == layout.prunable + layout.other


def test_sizes_without_other_parameters_or_buffers():
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(2, 3, bias=False)))
    assert (layout.prunable_size, layout.trained_size, layout.size) == (6, 6, 6)


def test_flatten_copies_in_flat_order():
    model = Small()
    layout = ParameterLayout.of(model)
    with torch.no_grad():
        model.conv.weight.copy_(torch.arange(8.0).view(2, 1, 2, 2))
        model.norm.running_var.fill_(7.0)
    flat = layout.flatten(model)
    assert flat[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert flat[14:16].tolist() == [1, 0]  # norm weight and bias
    assert flat[22] == 7
    flat[0] = -1
    assert model.conv.weight[0, 0, 0, 0] == 0


def test_bound_parameters_and_buffers_are_views():
    model = Small()
    layout = ParameterLayout.of(model)
    flat = layout.flatten(model)
    layout.bind(model, flat)
    flat[:8] = torch.arange(8.0)
    flat[21] = 0.5
    assert model.conv.weight.flatten().tolist() == list(range(8))
    assert model.norm.running_mean.item() == 0.5
    with torch.no_grad():
        model.head.bias.fill_(9.0)
    model.train()(torch.ones(2, 1, 4, 4))  # the running mean moves from 0.5 by 0.1 of the way to 1
    assert flat[18:21].tolist() == [9, 9, 9]
    assert flat[21].item() == pytest.approx(0.55)
    assert [p.data_ptr() for p in layout.parameters(model)] == [
        flat[e.start :].data_ptr() for e in layout.trained
    ]


def test_split_gives_views_that_fill_a_plain_module():
    model = Small()
    layout = ParameterLayout.of(model)
    flat = torch.arange(float(layout.size))
    tensors = layout.split(flat)
    assert tensors["head.weight"].tolist() == [[8, 9], [10, 11], [12, 13]]
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    assert torch.equal(layout.flatten(model), flat)
    assert list(layout.split(flat, layout.prunable)) == ["conv.weight", "head.weight"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x))


def test_tied_weights_count_once_and_stay_tied():
    model = Tied()
    layout = ParameterLayout.of(model, torch.zeros(1, 3))
    assert [entry.name for entry in layout.trained] == ["encode.weight", "decode.bias"]
    assert layout.size == 12
    flat = layout.flatten(model)
    layout.bind(model, flat)
    flat[:9] = 2.0
    assert model.decode.weight is model.encode.weight
    assert model.decode.weight.unique().tolist() == [2.0]


def test_frozen_parameters_are_not_laid_out():
    model = Small()
    model.conv.weight.requires_grad_(False)
    layout = ParameterLayout.of(model)
    assert [entry.name for entry in layout.prunable] == ["head.weight"]


class Unused(Small):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


def test_a_layer_that_no_forward_pass_calls_is_refused():
    with pytest.raises(ValueError, match=r"a forward pass never calls spare"):
        ParameterLayout.of(Unused(), torch.zeros(2, 1, 4, 4))


def test_the_dry_forward_leaves_the_model_as_it_was():
    model = Small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ParameterLayout.of(model, torch.ones(2, 1, 4, 4))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.conv._forward_hooks


def test_another_dtype_is_refused_by_name():
    model = Small()
    model.head.double()
    with pytest.raises(ValueError, match=r"head\.weight is torch\.float64"):
        ParameterLayout.of(model)
    model = Small()
    model.norm.running_var = model.norm.running_var.half()
    with pytest.raises(ValueError, match=r"norm\.running_var is torch\.float16"):
        ParameterLayout.of(model)


def test_a_model_without_prunable_layers_is_refused():
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        ParameterLayout.of(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)))
