"""Low-rank adapters: a layer by hand, gradients against float64, which layers get one, what is refused."""

import math

import pytest
import torch
from torch import nn

from algorithms import ParameterLayout, pruned_layers
from algorithms.sparsyfed import SparsyFed
from cluster.flops import LayerFlops
from cluster.workload import models
from cluster.workload.adapters import base_of, frozen, head_of, share_base
from cluster.workload.lora import Lora, LoraLinear
from cluster.workload.models import ModelError


def mlp(*hidden, classes=3):
    return models.build("mlp", input_shape=(1, 8, 8), classes=classes, seed=1, hidden=list(hidden))


def decoder(**options):
    sizes = {"layers": 2, "width": 16, "heads": 2, **options}
    return models.build("transformer", input_shape=(6,), classes=11, seed=1, **sizes)


def attached(model, outputs=3, seed=5, **options):
    return model, Lora(**{"rank": 2, **options}).attach(model, outputs, seed)


def trained_names(model):
    return [name for name, own in model.named_parameters() if own.requires_grad]


# --------------------------------------------------------------------------------------------------- by hand


def single(b, alpha=2.0):
    """W = (1/2, -1), b = 1/4, A = (3, 4), rank 1."""
    base = nn.Linear(2, 1)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[0.5, -1.0]]))
        base.bias.fill_(0.25)
    base.requires_grad_(False)
    return LoraLinear(base, torch.tensor([[3.0, 4.0]]), torch.tensor([[b]]), alpha)


def test_the_first_step_moves_b_alone():
    layer, x = single(b=0.0), torch.tensor([1.0, 2.0])
    # y = 1/2 - 2 + 1/4; A x = 3 + 8 = 11; dy/dB = 2 * 11 = 22; dy/dA = 2 * B * x = 0.
    y = layer(x)
    assert y.item() == -1.25
    y.backward()
    assert layer.lora_B.weight.grad.tolist() == [[22.0]]
    assert layer.lora_A.weight.grad.tolist() == [[0.0, 0.0]]
    assert layer.base_layer.weight.grad is None
    assert layer.base_layer.bias.grad is None


def test_the_second_step_by_hand():
    # B = -1/4 after a step: y = -1.25 + 2 * -1/4 * 11 = -6.75; dy/dA = 2 * -1/4 * x = (-1/2, -1).
    layer = single(b=-0.25)
    y = layer(torch.tensor([1.0, 2.0]))
    y.backward()
    assert y.item() == -6.75
    assert layer.lora_A.weight.grad.tolist() == [[-0.5, -1.0]]
    # W + 2 * -1/4 * (3, 4) = (1/2 - 3/2, -1 - 2), for who reads the weight and does not call the layer.
    assert layer.weight.tolist() == [[-1.0, -3.0]]
    model = nn.Sequential(layer)
    Lora(rank=1).merge(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.tolist() == [[-1.0, -3.0]]
    assert model[0].bias.tolist() == [0.25]


def test_the_mean_of_products_is_not_the_product_of_means():
    # Two clients with B A = 1 * 1 and 3 * 3: the mean of the products is 5, the product of the means 4.
    ones = [[(1.0, 1.0), (3.0, 3.0)], [(1.0, 1.0), (1.0, 3.0)]]
    for clients, exact in zip(ones, (False, True), strict=True):
        layers = [
            LoraLinear(nn.Linear(1, 1), torch.tensor([[a]]), torch.tensor([[b]]), 1.0) for a, b in clients
        ]
        products = [layer.weight.item() - layer.base_layer.weight.item() for layer in layers]
        a, b = (torch.tensor(parts).mean() for parts in zip(*clients, strict=True))
        merged = LoraLinear(nn.Linear(1, 1), a.view(1, 1), b.view(1, 1), 1.0)
        found = merged.weight.item() - merged.base_layer.weight.item()
        assert sum(products) / 2 == pytest.approx(2.0 if exact else 5.0, abs=1e-6)
        assert found == pytest.approx(2.0 if exact else 4.0, abs=1e-6)  # exact with one A for all: freeze_a


def test_gradients_are_those_of_float64():
    torch.manual_seed(0)
    base = nn.Linear(5, 4).requires_grad_(False)
    layer = LoraLinear(base, torch.randn(3, 5), torch.randn(4, 3), 1.7)
    x = torch.randn(6, 5, requires_grad=True)
    wanted = [layer.lora_A.weight, layer.lora_B.weight, x]
    found = torch.autograd.grad(layer(x).pow(2).sum(), wanted)
    w, bias, a, b, inputs = (
        t.detach().double().requires_grad_()
        for t in (base.weight, base.bias, layer.lora_A.weight, layer.lora_B.weight, x)
    )
    exact = torch.autograd.grad((inputs @ (w + 1.7 * b @ a).t() + bias).pow(2).sum(), [a, b, inputs])
    for mine, other in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-4)
    assert torch.autograd.gradcheck(layer.double(), x.detach().double().requires_grad_())


# ------------------------------------------------------------------------------------- what gets an adapter


def test_every_linear_layer_but_the_head():
    model, adapted = attached(decoder(), outputs=11)
    inner = ["attention.query", "attention.key", "attention.value", "attention.output", "feed1", "feed2"]
    assert adapted.layers == tuple(f"blocks.{block}.{name}" for block in (0, 1) for name in inner)
    assert adapted.head == "head"
    parts = [f"{name}.lora_{part}.weight" for name in adapted.layers for part in "AB"]
    assert trained_names(model) == [*parts, "head.weight"]
    layout = ParameterLayout.of(model, torch.zeros(2, 6, dtype=torch.int64))
    assert [entry.name for entry in layout.prunable] == trained_names(model)


def test_patterns_name_whole_names_or_their_ends():
    for patterns, count in {("query", "value"): 4, ("blocks.1.*",): 6, ("attention.*", "feed1"): 10}.items():
        assert len(attached(decoder(), outputs=11, layers=patterns)[1].layers) == count


def test_without_layers_the_head_alone_is_trained():
    model, adapted = attached(mlp(12), layers=())
    assert adapted.layers == ()
    assert trained_names(model) == ["3.weight", "3.bias"]


def test_a_tied_head_is_part_of_the_base():
    model, adapted = attached(decoder(tied=True), outputs=11)
    assert adapted.head == ""
    assert all("lora_" in name for name in trained_names(model))
    tied = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11, bias=False))
    tied[1].weight = tied[0].weight
    assert head_of(tied, 11) == ""


def test_what_is_drawn():
    model, _ = attached(mlp(48), rank=16, seed=5)
    a, b = model[1].lora_A.weight.detach(), model[1].lora_B.weight.detach()
    assert float(a.abs().max()) <= 1 / 8  # 1 / sqrt(64)
    assert float(a.var()) == pytest.approx(1 / 3 / 64, rel=0.1)
    assert torch.equal(b, torch.zeros(48, 16))
    state = torch.get_rng_state()
    again, _ = attached(mlp(48), rank=16, seed=5, b_init=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again[1].lora_A.weight, a)  # whatever B is
    assert 0.009 < float(again[1].lora_B.weight.detach().abs().max()) <= 0.01
    assert not torch.equal(attached(mlp(48), rank=16, seed=6)[0][1].lora_A.weight, a)


def test_an_adapted_model_begins_as_its_base_does():
    x, plain = torch.randn(4, 1, 8, 8), mlp(12, 10)
    assert torch.equal(attached(mlp(12, 10))[0](x), plain(x))


def test_a_frozen_a_is_part_of_the_base():
    model, _ = attached(mlp(12), freeze_a=True)
    assert trained_names(model) == ["1.lora_B.weight", "3.weight", "3.bias"]
    assert [name for name, _ in frozen(model)] == [
        "1.base_layer.weight",
        "1.base_layer.bias",
        "1.lora_A.weight",
    ]


def test_a_frozen_head_is_part_of_the_base():
    model, adapted = attached(mlp(12), freeze_head=True)
    assert trained_names(model) == ["1.lora_A.weight", "1.lora_B.weight"]
    assert adapted.head == ""
    assert [name for name, _ in frozen(model)][2:] == ["3.weight", "3.bias"]
    assert Lora(rank=2, freeze_head=True).tensors(model)[1]["modules_to_save"] == []


def test_merged_weights_compute_the_same():
    model, _ = attached(decoder(), outputs=11, b_init=0.5)
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    before = model(tokens).detach()
    assert not torch.allclose(before, decoder()(tokens), atol=1e-3)
    Lora(rank=2).merge(model)
    plain = decoder()
    plain.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(plain(tokens).detach(), before, rtol=1e-5, atol=1e-5)


def test_who_reads_the_weight_instead_of_calling_the_layer_gets_the_adapted_one():
    # In evaluation torch's fused encoder layer calls none of its linear layers.
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 3)
    )
    model, adapted = attached(encoder, b_init=0.5)
    assert adapted.layers == ("0.linear1", "0.linear2")
    x = torch.randn(2, 4, 8)
    slow = model.train()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), slow, rtol=1e-5, atol=1e-5)


def test_the_names_of_the_file():
    model, _ = attached(mlp(12), freeze_a=True, alpha=8.0)
    found, told = Lora(rank=2, alpha=8.0, freeze_a=True).tensors(model)
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {
        "base_model.model.1.lora_A.weight": [2, 64],
        "base_model.model.1.lora_B.weight": [12, 2],
        "base_model.model.3.weight": [3, 12],
        "base_model.model.3.bias": [3],
    }
    assert told == {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8.0,
        "target_modules": ["1"],
        "modules_to_save": ["3"],
    }


# -------------------------------------------------------------------------------------- the base, and costs


def test_models_stand_on_one_base():
    (one, _), (other, _) = attached(mlp(12)), attached(mlp(12))
    base = base_of(one)
    assert base.size == 64 * 12 + 12
    base.flags.writeable = False  # as what comes out of the object store
    for model in (one, other):
        share_base(model, base)
        assert model[1].base_layer.weight.data_ptr() == base.ctypes.data
        assert model[1].base_layer.bias.data_ptr() == base.ctypes.data + 4 * 64 * 12
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(one(x), mlp(12)(x))


# One sample's forward FLOPs of 64 -> 12 -> 10 -> 3 at rank 2, two a multiply-add.
BASE1, A1, B1, BASE2, A2, B2, HEAD = 1536, 256, 48, 240, 48, 40, 60


def test_flops_by_hand():
    model, _ = attached(mlp(12, 10))
    x = torch.zeros(2, 1, 8, 8)
    flops = LayerFlops.of(model, ParameterLayout.of(model, x), x)
    assert flops.forward.tolist() == [A1, B1, A2, B2, HEAD]
    # The images need no gradient; everything behind the first adapter does. The base has no weight gradient.
    assert flops.needs_input_gradient.tolist() == [0, 1, 1, 1, 1]
    assert flops.frozen == BASE1 + 2 * BASE2
    assert flops.dense(7) == 7 * (2 * A1 + 3 * (B1 + A2 + B2 + HEAD) + BASE1 + 2 * BASE2)


def test_flops_of_a_frozen_a_by_hand():
    model, _ = attached(mlp(12, 10), freeze_a=True)
    x = torch.zeros(2, 1, 8, 8)
    flops = LayerFlops.of(model, ParameterLayout.of(model, x), x)
    assert flops.forward.tolist() == [B1, B2, HEAD]
    assert flops.needs_input_gradient.tolist() == [0, 1, 1]
    assert flops.frozen == BASE1 + A1 + 2 * (BASE2 + A2)
    # An attack takes the gradient of the images, whoever is trained.
    assert flops.attack_frozen(3) == 3 * 2 * (BASE1 + A1 + BASE2 + A2)


def test_what_is_frozen_prunes_no_activations():
    model, _ = attached(mlp(12), freeze_a=True)
    SparsyFed().prepare(model)
    assert list(pruned_layers(model)) == ["1.lora_B.weight", "3.weight"]


# ------------------------------------------------------------------------------------------------- refusals


def two_in_one():
    tied = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    tied[2].weight = tied[1].weight
    return tied


def small_cnn():
    return models.build("small_cnn", input_shape=(1, 8, 8), classes=3, seed=1, channels=[4, 6], groups=2)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (
            mlp(12),
            {"rank": 13},
            "adapter.rank: 13 is more than layer '1' has, with 64 inputs and 12 outputs; .* 1 to 12",
        ),
        (decoder(), {"layers": ("qeury",)}, "'qeury' names no linear layer of Decoder.* did you mean query?"),
        (decoder(), {"layers": ("query", "blocks.0.attention.kye")}, "did you mean blocks.0.attention.key?"),
        (decoder(), {"layers": ("head",)}, "'head' names the head, which is trained in full"),
        (small_cnn(), {"layers": ("0",)}, "'0': 0 is a convolution; adapters are for linear layers"),
        (two_in_one(), {"layers": ("1",)}, "'1': 1 has no weight of its own"),
        (mlp(), {}, "Sequential has no linear layer beside its head 1; it is for linear layers"),
        (nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), {}, "Sequential has no linear layer; it is for"),
    ],
)
def test_what_does_not_fit_is_one_line(model, options, says):
    with pytest.raises(ModelError, match=says) as refused:
        attached(model, outputs=11 if "Decoder" in repr(model) else 3, **options)
    assert "\n" not in str(refused.value)


def test_a_base_of_another_type_is_refused():
    with pytest.raises(ModelError, match=r"1.base_layer.weight is torch.float64; allowed is float32"):
        base_of(attached(mlp(12).double())[0])


def test_in_a_model_of_both_kinds_convolutions_are_frozen():
    model, adapted = attached(small_cnn())
    assert len(adapted.layers) == 1
    assert not [
        name
        for name in trained_names(model)
        if isinstance(model.get_submodule(name.split(".")[0]), nn.Conv2d)
    ]


def test_the_scale_is_alpha_over_the_rank():
    assert attached(mlp(12), rank=4, alpha=6.0)[0][1].scale == 1.5
    assert math.isclose(Lora().alpha / Lora().rank, 2.0)
