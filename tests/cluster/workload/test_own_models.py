"""A model of one's own is tried before the first round; attention is trained dense and stays honest."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import cluster
from algorithms import ParameterLayout
from algorithms.core.parameters import prunable_layers
from cluster.federation import Federation
from cluster.flops import LayerFlops
from cluster.workload.models import ModelError, check_model
from cluster.workload.objectives import Classification
from tests.tiny_experiment import tiny_federation

IMAGES = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)


class Returns(nn.Module):
    """A linear classifier of which ``change`` makes something else."""

    def __init__(self, change, classes=3):
        super().__init__()
        self.change = change
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    def forward(self, images):
        return self.change(self.net(images))


def check(model):
    check_model(model, "mine:m", IMAGES, np.zeros(len(IMAGES), np.int64), Classification(), 3)


def crash(logits):
    return logits.reshape(5, 7)


def frozen():
    return Returns(lambda logits: logits).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Returns(lambda logits: (logits, None)), r"a value of type tuple; expected float32 \[2, 3\]: logits"),
        (Returns(lambda logits: {"logits": logits}), "returns a value of type dict"),
        (Returns(lambda logits: None), "returns a value of type NoneType"),
        (Returns(lambda logits: logits, classes=2), r"float32 \[2, 2\] for inputs \[2, 1, 8, 8\]; expected"),
        (Returns(lambda logits: logits.sum(1)), r"returns float32 \[2\]"),
        (Returns(lambda logits: logits[None]), r"returns float32 \[1, 2, 3\]"),
        (Returns(lambda logits: logits.argmax(1, keepdim=True).repeat(1, 3)), r"returns int64 \[2, 3\]"),
        (Returns(lambda logits: logits.detach()), "depends on none of its parameters"),
        (Returns(torch.zeros_like), "depends on none of its parameters"),
        (Returns(lambda logits: logits * math.nan), "returns nan for inputs .* before any training"),
        (Returns(lambda logits: logits / 0.0), "returns -?inf for inputs"),
        (frozen(), "no parameter that is trained"),
        (Returns(crash), r"fails on inputs of shape \[2, 1, 8, 8\]: Runt.*test_own_models.py, line 39"),
        (nn.Sequential(nn.Flatten(), nn.Linear(63, 3)), "fails on .*RuntimeError: mat1 and mat2 shapes"),
    ],
)  # fmt: skip
def test_what_a_forward_pass_can_tell(model, match):
    with pytest.raises(ModelError, match=r"^model.name = 'mine:m'.*" + match):
        check(model)


def test_a_check_leaves_no_trace():
    model = Returns(lambda logits: logits + nn.functional.dropout(torch.ones(()), 0.5, True)).train()
    before = torch.random.get_rng_state()
    check(model)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    check(Returns(lambda logits: logits, classes=5))  # more logits are only waste


# --- attention


class Attention(nn.Module):
    def __init__(self, depth, classes, encoder):
        super().__init__()
        self.patches = nn.Conv2d(depth, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.attention = layer if encoder else nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, classes)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        if isinstance(self.attention, nn.MultiheadAttention):
            return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))
        return self.head(self.attention(tokens).mean(1))


def attention(*, input_shape, classes):
    return Attention(input_shape[0], classes, encoder=False)


def encoder(*, input_shape, classes):
    return Attention(input_shape[0], classes, encoder=True)


def test_projections_of_attention_are_trained_dense_and_not_billed():
    model = attention(input_shape=(1, 8, 8), classes=3)
    assert list(prunable_layers(model)) == ["patches", "head"]
    layout = ParameterLayout.of(model, IMAGES)
    assert [entry.name for entry in layout.prunable] == ["patches.weight", "head.weight"]
    other = {entry.name for entry in layout.other}
    assert {"attention.in_proj_weight", "attention.out_proj.weight", "attention.out_proj.bias"} <= other
    # 4 patches of 16 channels, dot products of 16 pixels; 3 logits, dot products of 16 channels.
    assert LayerFlops.of(model, layout, IMAGES).forward.tolist() == [2 * 4 * 16 * 16, 2 * 3 * 16]


@pytest.mark.parametrize("training", [True, False])
def test_layers_of_an_encoder_are_seen_although_evaluation_has_a_fast_path(training):
    model = encoder(input_shape=(1, 8, 8), classes=3).train(training)
    layout = ParameterLayout.of(model, IMAGES)
    assert [entry.name for entry in layout.prunable] == [
        "patches.weight", "attention.linear1.weight", "attention.linear2.weight", "head.weight",
    ]  # fmt: skip
    assert model.training == training
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("model", ["attention", "encoder"])
@pytest.mark.parametrize("method", ["fedavg", "sparsyfed", "zerofl"])
def test_models_with_attention_train(cache, tmp_path, model, method):
    algorithm = {"name": method} | ({} if method == "fedavg" else {"sparsity": 0.5})
    options = {"rounds": 1, "algorithm": algorithm, "model": {"name": f"{__name__}:{model}"}}
    config = tiny_federation(cache, **options)
    result = cluster.run(config, tmp_path / "run")
    weights, start = result.model().state_dict(), Federation.of(config).model.state_dict()
    for name in ("out_proj.weight", "in_proj_weight"):
        (full,) = [key for key in weights if key.endswith(name)]
        assert int(weights[full].count_nonzero()) == weights[full].numel()  # never pruned
        assert not torch.equal(weights[full], start[full])
    # The exported model computes what was logged, whichever path torch takes in evaluation.
    dataset = Federation.of(config).dataset
    images = torch.from_numpy(dataset.test.inputs.copy()).float().div(255).sub(0.5).div(0.5)
    right = int((result.model()(images).argmax(1).numpy() == dataset.test.targets).sum())
    assert right / len(images) == pytest.approx(result.summary["accuracy"])
