"""FedAlign by hand, against finite differences, and at its limits."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algorithms.fedalign import FedAlign, find_block, lipschitz, narrowed, run_part
from algorithms.fedavg import FedAvg
from cluster.configuration.trees import ConfigError
from cluster.workload import models
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation

ROWS = np.arange(20)


def convolutional(norm="group", seed=1):
    return models.build(
        "small_cnn",
        input_shape=(1, 8, 8),
        classes=3,
        seed=seed,
        channels=[16, 32],
        hidden=16,
        groups=2,
        norm=norm,
    )


def visited(method, model=None, **settings):
    trainer = trainer_of(method, model=model or convolutional(), **settings)
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, None, 1))
    return trainer, replace(trained, values=trained.values.copy())


def column(*values):
    return torch.tensor([values], dtype=torch.float64)


def test_the_constants_by_hand():
    # A = (6, 8)^T: 10; (3): 3.
    assert float(lipschitz(column(3.0, 4.0), column(2.0), 10)) == pytest.approx(10.0)
    assert float(lipschitz(column(3.0), column(1.0), 10)) == pytest.approx(3.0)
    # Two pixels of one channel: A = (1 x 2 + 3 x 4) / 2 = 7.
    pixels = lipschitz(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 4.0]]]]), 10)
    assert float(pixels) == pytest.approx(7.0)
    # F0 = diag, F1 = 2 x identity over two pixels: A = diag(6, 2), K = diag(36, 4).
    first = torch.tensor([[[[6.0, 0.0]], [[0.0, 2.0]]]])
    second = 2.0 * torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert float(lipschitz(first, second, 10)) == pytest.approx(6.0, abs=1e-4)
    assert float(lipschitz(first, second, 1)) == pytest.approx(6.0184, abs=1e-4)


def test_a_larger_map_is_averaged_to_the_smaller_ones_pixels():
    small = lipschitz(torch.tensor([[[[2.0]]]]), torch.tensor([[[[5.0]]]]), 10)
    large = lipschitz(torch.tensor([[[[1.0, 3.0], [0.0, 4.0]]]]), torch.tensor([[[[5.0]]]]), 10)
    assert torch.equal(small, large)


# d lip / d S1 = 2 (3 - 10) 3 = -42; with a loss of 1 and mu .45: -42 x .45 / 49 = -.3857.
def test_the_term_by_hand():
    part = torch.tensor([[1.0]], requires_grad=True)
    whole = lipschitz(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]), 10)
    outputs = torch.zeros(1), whole, lipschitz(torch.tensor([[3.0]]), part, 10)
    loss = FedAlign().loss(outputs, torch.zeros(1), lambda outputs, targets: torch.ones(()))
    loss.backward()
    assert loss.item() == 1.0
    assert part.grad.item() == pytest.approx(-42.0 * 0.45 / 49.0, rel=1e-5)


@pytest.mark.parametrize(
    ("channels", "part"), [(256, 64), (128, 32), (64, 16), (6, 6), (40, 16), (8, 8), (1, 1)]
)
def test_channels_of_a_quarter(channels, part):
    assert narrowed(channels, 0.25) == part


def test_a_block_of_nothing_is_no_nan():
    nothing = torch.zeros(2, 3, 2, 2, requires_grad=True)
    lipschitz(torch.ones(2, 3, 2, 2), nothing, 10).sum().backward()
    assert not nothing.grad.any()
    # A = (1, -1)^T, to which ones are orthogonal.
    assert torch.isfinite(lipschitz(column(1.0, -1.0), column(1.0), 10)).all()


@pytest.mark.parametrize(("setting", "value"), [("mu", 0.0), ("width", 1.0)])
def test_its_limits_are_fedavg_bit_for_bit(cache, tmp_path, setting, value):
    model = {"name": "small_cnn", "channels": [16, 32], "hidden": 16, "norm": "group", "groups": 2}
    config = tiny_federation(cache, model=model, algorithm={"name": "fedalign", setting: value})
    run = run_inline(config, tmp_path / "fedalign")
    assert_identical(run, run_inline(tiny_federation(cache, model=model), tmp_path / "fedavg"))


def test_the_term_reaches_the_leading_channels_of_the_block_alone():
    trainer = trainer_of(FedAlign(), model=convolutional())
    layout, module = trainer.layout, trainer.module.train()
    inputs, targets = (t[:8] for t in trainer._data.of(ROWS))

    def slopes(method):
        trainer._gradient.zero_()
        loss = method.loss(module(inputs), targets, F.cross_entropy)
        found = torch.autograd.grad(loss, trainer._parameters)
        return dict(zip((entry.name for entry in layout.trained), found, strict=True))

    with_term, without = slopes(FedAlign()), slopes(FedAlign(mu=0.0))
    moved = {name: (with_term[name] - without[name]).abs() for name in with_term}
    block = {"4.weight", "5.weight", "5.bias"}  # convolution and norm behind the first four children
    assert {name for name, difference in moved.items() if difference.any()} == block
    assert not moved["4.weight"][8:].any()
    assert not moved["4.weight"][:, 8:].any()
    assert moved["4.weight"][:8, :8].all()
    assert not moved["5.weight"][8:].any()


def test_the_gradient_against_finite_differences():
    module = convolutional().double()
    FedAlign().prepare(module)
    inputs = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = module[4].weight
    block = find_block(module)
    module.eval()
    with torch.no_grad():
        before = module[:4](inputs)
        after = nn.Sequential(*module[4 : 4 + len(block)])(before)
        whole = lipschitz(before, after, 10).double()

    def lip():
        part = lipschitz(before[:, :8], run_part(block, before[:, :8], 0.25), 10)
        return (part.double() - whole).square().mean()

    slope = torch.autograd.grad(lip(), weight)[0]
    for place in ((0, 0, 1, 1), (3, 5, 0, 2), (7, 7, 2, 0)):
        values = []
        for shift in (1e-3, -1e-3):
            with torch.no_grad():
                weight[place] += shift
                values.append(float(lip()))
                weight[place] -= shift
        assert float(slope[place]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.02, abs=1e-5)


def test_the_part_is_billed():
    (trainer, plain), (_, align) = visited(FedAvg()), visited(FedAlign())
    # 16 to 32 channels become 8 to 8: an eighth of the layer, forward and weight gradient twice, for which
    # there is no gradient of the inputs.
    place = [entry.name for entry in trainer.layout.prunable].index("4.weight")
    more = align.measured.flops_dense - plain.measured.flops_dense
    assert more == pytest.approx(2 * len(ROWS) * 2 * trainer.flops.forward[place] / 8)
    assert not FedAlign().recordable
    nonzero = align.measured.flops_sparse.sum() - plain.measured.flops_sparse.sum()
    assert nonzero == pytest.approx(more)
    assert {"lipschitz_gap"} == set(align.measured.own)


def test_batch_norm_sees_the_block_once():
    model = convolutional("batch")
    settings = {"epochs": 1, "batch_size": 32}
    (trainer, plain), (other, align) = (visited(m, model, **settings) for m in (FedAvg(), FedAlign()))
    buffers = slice(trainer.layout.trained_size, None)
    assert np.array_equal(plain.values[buffers], align.values[buffers])
    assert int(other.module[5].num_batches_tracked) == 1
    assert not np.array_equal(plain.values[: buffers.start], align.values[: buffers.start])


def test_evaluation_sees_the_logits():
    module = convolutional()
    plain = copy.deepcopy(module).eval()
    FedAlign().prepare(module)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(module.eval()(images), plain(images))
    assert len(module.train()(images)) == 3


def test_which_block():
    resnet = models.build("resnet18", input_shape=(3, 8, 8), classes=3, seed=1, width=8, norm="group")
    assert find_block(resnet) == [resnet.layer4]
    assert find_block(resnet, ["layer3"]) == [resnet.layer3]
    mlp = models.build("mlp", input_shape=(1, 8, 8), classes=3, seed=1, hidden=[9, 7])
    assert find_block(mlp) == list(mlp[3:5])
    with pytest.raises(ValueError, match=r"algorithm.block: .* are the names of 0 modules"):
        find_block(resnet, ["stage*"])
    with pytest.raises(ValueError, match="finds no block"):
        find_block(models.build("linear", input_shape=(1, 8, 8), classes=3, seed=1))


def test_a_residual_block_and_a_hidden_layer_run_in_part():
    resnet = models.build("resnet18", input_shape=(3, 8, 8), classes=3, seed=1, width=8, norm="batch")
    mlp = models.build("mlp", input_shape=(3, 8, 8), classes=3, seed=1, hidden=[64, 64])
    for model in (resnet, mlp):
        FedAlign().prepare(model)
        logits, whole, part = model(torch.rand(2, 3, 8, 8))
        assert whole.shape == part.shape == (2,)
        loss = FedAlign().loss((logits, whole, part), torch.tensor([0, 1]), F.cross_entropy)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_what_has_no_channels_is_refused(cache):
    with pytest.raises(ConfigError, match=r"model.name: linear has no block"):
        tiny_federation(cache, algorithm={"name": "fedalign"}, model={"name": "linear"})
