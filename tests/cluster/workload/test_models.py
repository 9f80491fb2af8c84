"""Models have the shapes, sizes and initial weights that are promised, from their seed alone."""

import fnmatch
import math
import sys

import pytest
import torch
from torch import nn

from cluster.configuration.choices import ChoiceError, names
from cluster.workload.models import ModelError, build, initialise

DIGITS = (1, 8, 8)
CIFAR = (3, 32, 32)
TOKENS = (16,)


#: Without those of libraries, which are tested beside them.
OURS = [name for name in names("model") if name not in ("timm", "transformers")]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def state(model):
    return torch.cat([value.reshape(-1).float() for value in model.state_dict().values()])


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("small_cnn", DIGITS, {}),
        ("small_cnn", (1, 28, 28), {"norm": "batch"}),
        ("small_cnn", CIFAR, {"norm": "none"}),
        ("small_cnn", (1, 4, 5), {"channels": [8, 16], "hidden": 4}),
        ("small_cnn", (2, 64, 9), {"groups": 1}),
        ("resnet18", CIFAR, {"width": 8}),
        ("resnet18", (1, 28, 28), {"width": 8, "norm": "group"}),
        ("resnet18", DIGITS, {"width": 8, "norm": "none"}),
        ("resnet18", (1, 64, 98), {"width": 8, "stem": "imagenet"}),
        ("resnet18", (1, 1, 8_000), {"width": 4, "stem": "imagenet"}),
        ("small_cnn", (1, 64, 98), {}),
        ("mlp", (1, 28, 28), {}),
        ("mlp", CIFAR, {"hidden": [30, 20]}),
        ("mlp", CIFAR, {"hidden": ()}),
    ],
)
def test_logits_have_a_column_for_every_class_and_every_parameter_a_gradient(name, shape, options):
    model = build(name, input_shape=shape, classes=7, seed=1, **options)
    logits = model(torch.rand(4, *shape))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_parameter_counts_by_hand():
    # 3*3*64 + GroupNorm 2*64 + 3*3*64*128 + 2*128 + (2*2*128)*256 + 256 + 256*10 + 10
    expected = 576 + 128 + 73_728 + 256 + 131_072 + 256 + 2_560 + 10
    assert expected == 208_586
    for shape in (DIGITS, (1, 28, 28)):
        assert parameters(build("small_cnn", input_shape=shape, classes=10, seed=1)) == expected
    # Without a norm the convolutions have biases: 64 + 128 instead of 128 + 256.
    plain = build("small_cnn", input_shape=DIGITS, classes=10, seed=1, norm="none")
    assert parameters(plain) == expected - 192
    # 784*200 + 200 + 200*10 + 10
    assert parameters(build("mlp", input_shape=(1, 28, 28), classes=10, seed=1)) == 159_010


def test_resnet18_is_the_published_one():
    model = build("resnet18", input_shape=CIFAR, classes=10, seed=1)
    assert parameters(model) == 11_173_962
    names = dict(model.named_modules())
    convolutions = {name: module for name, module in names.items() if isinstance(module, nn.Conv2d)}
    assert len(convolutions) == 20
    assert all(module.bias is None for module in convolutions.values())
    shortcuts = [name for name in convolutions if fnmatch.fnmatch(name, "*shortcut*")]
    assert shortcuts == ["layer2.0.shortcut.0", "layer3.0.shortcut.0", "layer4.0.shortcut.0"]
    assert all(convolutions[name].kernel_size == (1, 1) for name in shortcuts)
    assert convolutions["conv1"].kernel_size == (3, 3)
    assert convolutions["conv1"].stride == (1, 1)
    group = build("resnet18", input_shape=CIFAR, classes=10, seed=1, norm="group")
    assert {module.num_groups for module in group.modules() if isinstance(module, nn.GroupNorm)} == {2}
    assert parameters(group) == parameters(model)
    # The 7x7 stem on one channel: 49 * 64 weights where 3 * 9 * 64 were.
    large = build("resnet18", input_shape=(1, 64, 101), classes=10, seed=1, stem="imagenet")
    assert parameters(large) == 11_173_962 + 49 * 64 - 27 * 64


def test_no_activation_is_changed_in_place():
    for name in OURS:
        shape = TOKENS if name.startswith("transformer") else CIFAR
        for module in build(name, input_shape=shape, classes=2, seed=1, tokens=2).modules():
            assert not getattr(module, "inplace", False)


@pytest.mark.parametrize("name", OURS)
def test_weights_depend_on_the_seed_alone(name):
    shape = TOKENS if name.startswith("transformer") else CIFAR
    torch.manual_seed(5)
    one = state(build(name, input_shape=shape, classes=10, seed=1, tokens=10))
    torch.manual_seed(6)
    before = torch.get_rng_state()
    other = state(build(name, input_shape=shape, classes=10, seed=1, tokens=10))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is as it was
    assert torch.equal(one, other)
    assert not torch.equal(one, state(build(name, input_shape=shape, classes=10, seed=2, tokens=10)))


def test_initial_weights_follow_the_truncated_normal_distribution():
    layer = nn.Conv2d(64, 128, 3)  # fan_in 576
    initialise(layer, 3)
    sigma = math.sqrt(1 / 576) / 0.87962566103423978
    weight = layer.weight.detach().double()
    assert weight.abs().max() <= 2 * sigma
    assert weight.abs().max() > 1.99 * sigma
    # 73,728 samples: the standard error of the mean is 0.0037 standard deviations, that of the spread less.
    assert abs(weight.mean()) < 4 * 0.0037 / 24
    assert abs(weight.std() * 24 - 1) < 4 * 0.0037  # variance 1/fan_in after the cut
    assert torch.equal(layer.bias, torch.zeros(128))
    grouped = nn.Conv2d(8, 8, 3, groups=8)  # fan_in 9, not 72
    initialise(grouped, 3)
    assert grouped.weight.abs().max() > 1 / 3


def test_initialise_resets_norms_and_keeps_the_rest():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
        model[0].running_mean.fill_(9.0)
    before = torch.get_rng_state()
    initialise(model, 1)
    assert torch.equal(torch.get_rng_state(), before)
    for norm in model[:3]:
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    assert (model[0].running_mean == 0).all()
    assert (model[3].weight == 7).all()
    assert (model[4].bias == 0).all()


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        (
            "resnet81",
            {},
            "'resnet81' is unknown; allowed are small_cnn, resnet18, mlp.*did you mean resnet18",
        ),
        (
            "small_cnn",
            {"chanels": [1, 2]},
            "small_cnn has no such field; .*did you mean channels",
        ),
        (
            "mlp",
            {"norm": "batch"},
            "mlp has no such field; its fields: hidden, .*norm belongs to small_cnn",
        ),
        (
            "small_cnn",
            {"norm": "grup"},
            "model.norm: 'grup' is none of group, batch, none; did you mean group",
        ),
        ("small_cnn", {"groups": 7}, "groups = 7 does not divide a layer's 64 channels"),
        ("small_cnn", {"groups": 0}, "model.groups: 0 is out of range; allowed: 1 to inf"),
        ("small_cnn", {"channels": [8]}, "two numbers"),
        ("small_cnn", {"hidden": 0}, "model.hidden: 0 is out of range; allowed: 1 to inf"),
        ("small_cnn", {"input_shape": (1, 3, 9)}, "at least 4x4 pixels, images have 3x9"),
        ("resnet18", {"stem": "cifer"}, "'cifer' is none of cifar, imagenet; did you mean cifar"),
        ("resnet18", {"width": -1}, "model.width: -1 is out of range"),
        ("resnet18", {"norm": "group", "width": 3}, "does not divide a layer's 3 channels"),
        ("mlp", {"hidden": [5, 0]}, "model.hidden: 0 is out of range"),
        ("my_models:Tny", {}, "has no 'Tny'; did you mean Tiny"),
        ("my_models:Tiny", {"wide": 3}, "model.wide is no option.*allowed are width; did you mean width"),
        ("my_models:nothing", {}, "returned int, not a torch.nn.Module"),
        ("my_modles:Tiny", {}, "there is no module 'my_modles'"),
    ],
)
def test_impossible_models_say_why(own_models, name, options, match):
    with pytest.raises((ChoiceError, ModelError), match=match):
        build(name, **({"input_shape": DIGITS, "classes": 10, "seed": 1} | options))


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """A user's module on the path."""
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "class Tiny(torch.nn.Module):\n"
        "    def __init__(self, *, input_shape, classes, width=2):\n"
        "        super().__init__()\n"
        "        self.first = torch.nn.Linear(input_shape[1] * input_shape[2], width)\n"
        "        self.offset = torch.nn.Parameter(torch.rand(classes) + 5)\n"
        "def nothing(**options): return 7\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_models", None)


def test_own_models_keep_their_initialisation_and_are_deterministic(own_models):
    before = torch.get_rng_state()
    model = build("my_models:Tiny", input_shape=DIGITS, classes=3, seed=4, width=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.first.weight.shape == (6, 64)
    assert (model.offset >= 5).all()
    assert not (model.first.bias == 0).any()  # torch's own, not ours
    torch.rand(3)
    again = build("my_models:Tiny", input_shape=DIGITS, classes=3, seed=4, width=6)
    assert torch.equal(state(model), state(again))
    assert not torch.equal(
        state(model), state(build("my_models:Tiny", input_shape=DIGITS, classes=3, seed=5, width=6))
    )
