"""A model of one's own is tried before the first round; attention is trained dense and stays honest."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import cluster
from algorithms import ParameterLayout
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
        (Returns(crash), r"fails on inputs of shape \[2, 1, 8, 8\]: Runt.*test_own_models.py, line 38"),
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


def frozen_attention(*, input_shape, classes):
    return with_frozen_projections(Attention(input_shape[0], classes, encoder=False))


def frozen_encoder(*, input_shape, classes):
    return with_frozen_projections(Attention(input_shape[0], classes, encoder=True))


def with_frozen_projections(model):
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.requires_grad_(False)
            module.out_proj.weight.requires_grad_(False)
    return model


class Multiplied(nn.Module):
    """A matrix of its own, used in one of several ways."""

    def __init__(self, use):
        super().__init__()
        self.use, self.inner = use, nn.Module()
        self.inner.matrix = nn.Parameter(torch.randn(8, 8))
        self.cell, self.tokens = nn.LSTMCell(8, 8), nn.Embedding(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.use(self, images[:, 0, 0]))


STRAY = r"^inner.matrix: a trained matrix that is multiplied with outside of any .* make it an nn.Linear"


@pytest.mark.parametrize(
    "use",
    [
        lambda model, x: x @ model.inner.matrix,
        lambda model, x: nn.functional.linear(x, model.inner.matrix),
        lambda model, x: nn.functional.linear(x, model.inner.matrix[:8]),
        lambda model, x: torch.addmm(torch.zeros(8), x, model.inner.matrix),  # as GPT-2's Conv1D does
        lambda model, x: torch.einsum("bi,ij->bj", x, model.inner.matrix),
        lambda model, x: nn.functional.conv1d(x[:, :, None], model.inner.matrix[:, :, None])[..., 0],
    ],
)
def test_a_layer_in_another_form_is_refused_by_name(use):
    with pytest.raises(ValueError, match=STRAY):
        ParameterLayout.of(Multiplied(use), IMAGES)
    frozen = Multiplied(use)
    frozen.inner.matrix.requires_grad_(False)
    assert [entry.name for entry in ParameterLayout.of(frozen, IMAGES).prunable] == ["head.weight"]


@pytest.mark.parametrize(
    "use",
    [
        lambda model, x: x + model.inner.matrix[0],  # a table of places
        lambda model, x: x * model.inner.matrix[0],  # a scale
        lambda model, x: model.inner.matrix[:2],  # what a layer looks up with
        lambda model, x: model.cell(x)[0],
        lambda model, x: nn.functional.pad(x @ model.tokens.weight.t(), (0, 3)),
    ],
)
def test_what_is_no_layer_is_not(use):
    assert [entry.name for entry in ParameterLayout.of(Multiplied(use), IMAGES).prunable] == ["head.weight"]


@pytest.mark.parametrize("encoder", [False, True])
def test_packed_projections_of_attention_are_refused_by_name(encoder):
    at = "attention.self_attn" if encoder else "attention"
    with pytest.raises(ValueError, match=rf"^{at}.in_proj_weight, {at}.out_proj.weight: a trained matrix"):
        ParameterLayout.of(Attention(1, 3, encoder), IMAGES)


def test_frozen_projections_of_attention_are_neither_pruned_nor_billed():
    model = frozen_attention(input_shape=(1, 8, 8), classes=3)
    layout = ParameterLayout.of(model, IMAGES)
    assert [entry.name for entry in layout.prunable] == ["patches.weight", "head.weight"]
    # 4 patches of 16 channels, dot products of 16 pixels; 3 logits, dot products of 16 channels.
    assert LayerFlops.of(model, layout, IMAGES).forward.tolist() == [2 * 4 * 16 * 16, 2 * 3 * 16]


def test_logits_by_a_table_of_embeddings_are_not_pruned():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, tokens):
            return self.head(self.mix(self.tokens(tokens)))

    layout = ParameterLayout.of(Tied(), torch.zeros(2, 3, dtype=torch.int64))
    assert [entry.name for entry in layout.prunable] == ["mix.weight"]
    assert [entry.name for entry in layout.other] == ["tokens.weight", "mix.bias"]


@pytest.mark.parametrize("training", [True, False])
def test_layers_of_an_encoder_are_seen_although_evaluation_has_a_fast_path(training):
    model = frozen_encoder(input_shape=(1, 8, 8), classes=3).train(training)
    layout = ParameterLayout.of(model, IMAGES)
    assert [entry.name for entry in layout.prunable] == [
        "patches.weight", "attention.linear1.weight", "attention.linear2.weight", "head.weight",
    ]  # fmt: skip
    assert model.training == training
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("model", ["frozen_attention", "frozen_encoder"])
@pytest.mark.parametrize("method", ["fedavg", "sparsyfed", "zerofl"])
def test_models_with_attention_train(cache, tmp_path, model, method):
    algorithm = {"name": method} | ({} if method == "fedavg" else {"sparsity": 0.5})
    options = {"rounds": 1, "algorithm": algorithm, "model": {"name": f"{__name__}:{model}"}}
    config = tiny_federation(cache, **options)
    result = cluster.run(config, tmp_path / "run")
    weights, start = result.model().state_dict(), Federation.of(config).model.state_dict()
    for name in ("out_proj.weight", "in_proj_weight"):
        (full,) = [key for key in weights if key.endswith(name)]
        assert torch.equal(weights[full], start[full])
    # The exported model computes what was logged, whichever path torch takes in evaluation.
    dataset = Federation.of(config).dataset
    images = torch.from_numpy(dataset.test.inputs.copy()).float().div(255).sub(0.5).div(0.5)
    right = int((result.model()(images).argmax(1).numpy() == dataset.test.targets).sum())
    assert right / len(images) == pytest.approx(result.summary["accuracy"])
