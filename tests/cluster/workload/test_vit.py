"""The vision transformer: as plain loops have it, what of it is prunable, its FLOPs and pruned gradients."""

import math

import numpy as np
import pytest
import torch

import cluster
from algorithms.core.parameters import ParameterLayout, prunable_layers
from cluster.configuration.choices import ChoiceError
from cluster.flops import LayerFlops
from cluster.workload import models
from cluster.workload.models import ModelError
from tests.cluster.workload.test_transformer import check_pruned_gradients
from tests.tiny_experiment import tiny_federation

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = {"patch": 2, "layers": 2, "width": 8, "heads": 2, "hidden": 12}


def small(shape=(3, 4, 6), **options):
    return models.build("vit", input_shape=shape, classes=5, seed=3, **{**SMALL, **options})


def some_images(rows=3, shape=(3, 4, 6)):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


def by_loops(model, images, heads, patch):
    """The same in float64 numpy, one patch, place and head after the other."""
    weights = {name: value.detach().double().numpy() for name, value in model.named_parameters()}

    def norm(x, name):
        centred = x - x.mean()
        return (
            centred / math.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"]
            + (weights[f"{name}.bias"])
        )

    def linear(x, name):
        return weights[f"{name}.weight"].reshape(-1, x.size) @ x.reshape(-1) + weights[f"{name}.bias"]

    def gelu(x):
        return np.array([0.5 * each * (1 + math.erf(each / math.sqrt(2))) for each in x])

    logits = []
    for image in images.double().numpy():
        corners = [(y, x) for y in range(0, image.shape[1], patch) for x in range(0, image.shape[2], patch)]
        cut = [linear(image[:, y : y + patch, x : x + patch], "patches") for y, x in corners]
        places = weights["places.weight"]
        xs = [places[0], *(one + place for one, place in zip(cut, places[1:], strict=True))]
        for block in range(sum(name.endswith("feed1.weight") for name in weights)):
            at = f"blocks.{block}"
            normed = [norm(x, f"{at}.norm1") for x in xs]
            q, k, v = ([linear(x, f"{at}.attention.{n}") for x in normed] for n in ("query", "key", "value"))
            size = len(q[0]) // heads
            mixed = []
            for asking in q:
                row = []
                for head in range(heads):
                    part = slice(head * size, (head + 1) * size)
                    scores = [math.exp(asking[part] @ key[part] / math.sqrt(size)) for key in k]
                    row += list(
                        sum(w * value[part] for w, value in zip(scores, v, strict=True)) / sum(scores)
                    )
                mixed.append(np.array(row))
            xs = [x + linear(m, f"{at}.attention.output") for x, m in zip(xs, mixed, strict=True)]
            xs = [x + linear(gelu(linear(norm(x, f"{at}.norm2"), f"{at}.feed1")), f"{at}.feed2") for x in xs]
        logits.append(linear(norm(xs[0], "norm"), "head"))
    return np.array(logits)


@pytest.mark.parametrize("heads", [1, 4])
def test_outputs_are_those_of_plain_loops(heads):
    model, images = small(heads=heads), some_images()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        found = model(images).numpy()
    assert found.shape == (3, 5)
    np.testing.assert_allclose(found, by_loops(model, images, heads, 2), atol=2e-5)


def test_patches_and_projections_are_prunable_and_places_are_not():
    layout = ParameterLayout.of(small(), some_images())
    names = ("attention.query", "attention.key", "attention.value", "attention.output", "feed1", "feed2")
    layers = ["patches", *(f"blocks.{block}.{name}" for block in range(2) for name in names), "head"]
    assert list(prunable_layers(small())) == layers
    assert "places.weight" in {entry.name for entry in layout.other}
    usual = models.build("vit", input_shape=(3, 32, 32), classes=10, seed=0)
    # 48 * 128 patches, 4 blocks of 12 * 128 * 128, head 128 * 10; biases and norms, 65 places of 128.
    prunable = 48 * 128 + 4 * 12 * 128 * 128 + 1280
    others = 128 + 4 * (4 * 128 + 512 + 128 + 4 * 128) + 2 * 128 + 10 + 65 * 128
    assert ParameterLayout.of(usual).prunable_size == prunable == 793_856
    assert sum(p.numel() for p in usual.parameters()) == prunable + others == 809_226


def test_flops_by_hand():
    model, images = small(layers=1), some_images(rows=2)
    flops = LayerFlops.of(model, ParameterLayout.of(model), images)
    # 6 patches of 2 * 2 * 3 = 12 pixels to 8: 6 * 12 * 8 * 2 = 1152. Of 7 places: 7 * 8 * 8 * 2 = 896,
    # 8 to 12 and back 7 * 8 * 12 * 2 = 1344. The head sees the class token alone: 8 * 5 * 2 = 80.
    assert flops.forward.tolist() == [1152, 896, 896, 896, 896, 1344, 1344, 80]
    assert flops.needs_input_gradient.tolist() == [0.0] + [1.0] * 7  # below the patches are images


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_pruned_gradients_of_the_whole_model(density):
    check_pruned_gradients(small, some_images().double(), torch.tensor([0, 4, 2]), density)


@pytest.mark.parametrize(
    ("options", "shape", "error", "match"),
    [
        ({"heads": 3}, (3, 4, 6), ChoiceError, "heads: 3 do not divide the width 8"),
        ({"patch": 4}, (3, 4, 6), ModelError, "model.patch = 4 does not divide images of 4x6 pixels"),
        ({}, (9,), ModelError, r"model.name = 'vit' takes images, samples have shape \[9\]"),
    ],
)
def test_what_is_refused(options, shape, error, match):
    with pytest.raises(error, match=match):
        small(shape, **options)


@pytest.mark.parametrize("method", ["sparsyfed", "zerofl"])
def test_it_learns_under_sparse_methods(cache, tmp_path, method):
    config = tiny_federation(
        cache, rounds=8, algorithm={"name": method, "sparsity": 0.5}, model={"name": "vit", **SMALL}
    )
    result = cluster.run(config, tmp_path / "run")
    losses = result.rounds["train/loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    assert result.summary["accuracy"] > 0.5
