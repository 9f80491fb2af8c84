"""FedReg by hand, against a loop of its own, and at its limits."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from algorithms import ParameterLayout, hyperparameter
from algorithms.fedavg import FedAvg
from algorithms.fedreg import FedReg, FedRegClient, overlap
from algorithms.fixed_mask import FixedMask, MaskedClient
from cluster import seeding
from cluster.configuration.trees import ConfigError
from tests.algorithms.by_hand import one_round
from tests.cluster.clients.tiny_visits import broadcast_of, trainer_of
from tests.tiny_experiment import assert_identical, run_inline, tiny_federation, tiny_model

ROWS = np.arange(20)
OFF = {"pseudo": False, "perturbed": False}


def upload(method, weights, sample=(1.0, 0.0), **settings):
    """What one client with one sample of class 0 sends."""
    sent, _ = one_round(method, weights, [(list(sample), 0, 1)], **settings)
    return sent[0]


# W = 0 (2x1), x = 1, y = 0, lr 1: the gradient at 0 is (-.5, .5), twice.
@pytest.mark.parametrize(("gamma", "expected"), [(0.0, 1.0), (0.5, 0.8775), (1.0, 0.7689)])
def test_where_the_gradient_is_taken_by_hand(gamma, expected):
    sent = upload(FedReg(gamma=gamma, **OFF), [[0.0], [0.0]], (1.0,), epochs=2)
    assert np.ravel(sent) == pytest.approx([expected, -expected], abs=1e-4)
    if gamma == 0.0:
        assert sent == [[1.0], [-1.0]]


def left(moved, *gradients):
    moved = torch.tensor(moved)
    for gradient in map(torch.tensor, gradients):
        moved = moved - overlap(moved, gradient) * gradient
    return moved.tolist()


def test_the_two_projections_by_hand():
    assert left((3.0, 4.0), (1.0, 0.0), (1.0, 1.0)) == [-2.0, 2.0]  # a = 3, b = 2
    assert left((-3.0, 4.0), (1.0, 0.0), (1.0, 1.0)) == [-3.5, 3.5]  # a = 0, b = .5
    assert left((3.0, 4.0), (1.0, 1.0), (1.0, 0.0)) == [-0.5, 0.5]  # the order matters
    assert left((3.0, 4.0), (0.0, 0.0)) == [3.0, 4.0]


def test_a_client_of_one_direction_learns_nothing():
    assert np.abs(upload(FedReg(gamma=1.0), [[0.0], [0.0]], (1.0,))).max() < 1e-6


# x_s = (1,0) + sign(0,-1) = (1,-1), x_p = x. After SGD [[.5,1],[-.5,-1]]; g2 is along [[1,-1],[-1,1]], so
# a g2 = [[.25,-.25],[-.25,.25]]; <., g3> < 0, so b = 0. In the batch's range [0,1] x_s is x itself.
def test_a_step_by_hand():
    start = [[0.0, 1.0], [0.0, -1.0]]
    method = FedReg(gamma=1.0, pseudo_step=1.0, generation_steps=1, perturbed_ratio=0.0, clamp="none")
    assert np.allclose(upload(method, start), [[0.25, 1.25], [-0.25, -1.25]], atol=1e-6)
    clamped = upload(replace(method, clamp="batch"), start)
    assert np.allclose(clamped, upload(replace(method, generation_steps=0), start), atol=0)
    assert np.allclose(upload(FedReg(gamma=1.0, **OFF), start), [[0.5, 1.0], [-0.5, -1.0]], atol=1e-6)


def visited(method, model=None, rows=ROWS, **settings):
    trainer = trainer_of(method, model=model, **settings)
    trained = trainer.visit(0, rows, method.sparsity, broadcast_of(trainer, method, None, 1))
    return trainer, replace(trained, values=trained.values.copy())


def test_without_terms_at_gamma_1_it_is_fedavg_bit_for_bit(cache, tmp_path):
    own = {"name": "fedreg", "gamma": 1.0, **OFF}
    run = run_inline(tiny_federation(cache, algorithm=own), tmp_path / "fedreg")
    equal = tiny_federation(cache, aggregation={"weighting": "equal"})
    assert_identical(run, run_inline(equal, tmp_path / "fedavg"))
    assert not FedReg(gamma=1.0, **OFF).reparameterised


def test_a_visit_against_a_loop_of_its_own():
    method = FedReg(gamma=0.3, pseudo_step=0.05, generation_steps=3, perturbed_ratio=0.1)
    trainer = trainer_of(method)
    model = copy.deepcopy(trainer.module).double()
    trained = trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, method, None, 1))
    inputs, targets = (t[:20] for t in trainer._data.of(ROWS))
    inputs = inputs.double()
    order, own = seeding.generator(3, "batches", 1, 0), seeding.generator(3, "method", 1, 0)
    names = [name for name, _ in model.named_parameters()]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    here = {name: p.clone() for name, p in start.items()}

    def at(point, x, y):
        leaves = {name: p.clone().requires_grad_() for name, p in point.items()}
        F.cross_entropy(torch.func.functional_call(model, leaves, (x,)), y).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    def ascended(x, y, step):
        low, high = x.min(), x.max()
        for _ in range(3):
            x = x.clone().requires_grad_()
            F.cross_entropy(torch.func.functional_call(model, start, (x,)), y).backward()
            x = (x.detach() + step * x.grad.sign()).clamp(low, high)
        return x

    pseudo, perturbed = [], []
    rows = own.permutation(20)
    for batch in (rows[:8], rows[8:16], rows[16:]):
        x, y = inputs[batch], targets[batch]
        far = ascended(x, y, 0.05)
        with torch.no_grad():
            pseudo.append((far, torch.func.functional_call(model, start, (far,)).softmax(1)))
        perturbed.append((ascended(x, y, 0.005), y))

    def product(a, b):
        return sum(float((a[name] * b[name]).sum()) for name in names)

    step = 0
    for _ in range(2):
        rows = order.permutation(20)
        for batch in (rows[:8], rows[8:16], rows[16:]):
            mixed = {n: 0.3 * here[n] + 0.7 * start[n] for n in names}
            slope = at(mixed, inputs[batch], targets[batch])
            here = {n: here[n] - 0.2 * (slope[n] + 1e-3 * here[n]) for n in names}
            half = {n: (here[n] + start[n]) / 2 for n in names}
            for data in (pseudo, perturbed):
                slope = at(half, *data[step % 3])
                moved = {n: here[n] - start[n] for n in names}
                share = max(0.0, product(moved, slope) / product(slope, slope))
                here = {n: here[n] - share * slope[n] for n in names}
            step += 1
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(here[name])
    expected = trainer.layout.flatten(model.float()).numpy()
    plain = visited(FedAvg())[1].values
    assert np.abs(trained.values - expected).max() < 2e-5 < 1e-3 < np.abs(expected - plain).max()
    assert {"pseudo_share", "perturbed_share"} <= set(trained.measured.own)


def test_generation_and_both_passes_a_step_are_billed():
    trainer, reg = visited(FedReg(generation_steps=10))
    dense, forward = trainer.flops.dense(len(ROWS)), trainer.flops.forward.sum()
    first = trainer.flops.forward[0]
    # Two epochs: steps and two passes more each; twice ten passes to the inputs' gradient, the first layer's
    # included; one forward pass for the soft targets.
    wanted = 2 * 3 * dense + len(ROWS) * (20 * 2 * forward + forward)
    assert reg.measured.flops_dense == pytest.approx(wanted)
    assert first > 0
    calls = 0

    def called(*_):
        nonlocal calls
        calls += 1

    trainer.module.register_forward_hook(called)
    trainer.visit(0, ROWS, 0.0, broadcast_of(trainer, FedReg(), None, 1))
    assert calls == 2 * 3 * 3 + 3 * (20 + 1)


def test_running_statistics_are_those_of_the_local_steps():
    model = tiny_model(input_shape=(1, 8, 8), classes=3)
    settings = {"epochs": 1, "batch_size": 32}
    (trainer, plain), (_, reg) = (visited(m, model, **settings) for m in (FedAvg(), FedReg(gamma=1.0)))
    buffers = slice(trainer.layout.trained_size, None)
    assert np.array_equal(plain.values[buffers], reg.values[buffers])
    assert not np.array_equal(plain.values[: buffers.start], reg.values[: buffers.start])


def test_other_tasks_are_refused(cache):
    with pytest.raises(ConfigError, match=r"objective.name: regression; fedreg"):
        tiny_federation(cache, algorithm={"name": "fedreg"}, objective={"name": "regression"})


class _InsideClient(FedRegClient, MaskedClient):
    pass


@dataclass(frozen=True, kw_only=True)
class Inside(FedReg, FixedMask):
    name = ""
    client = _InsideClient
    sparsity: float = hyperparameter(0.8, "share outside", low=0.0, high=0.9999)


def test_inside_a_mask_nothing_moves_outside_it():
    trainer, trained = visited(Inside())
    mask = broadcast_of(trainer, Inside(), None, 1).mask
    assert not trained.values[: len(mask)][~mask].any()
    assert trained.values[: len(mask)][mask].all()
    assert np.array_equal(trained.support, mask)


def test_tokens_are_refused_before_anything_starts():
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"fedreg moves samples along a gradient"):
        FedReg().lay_out(ParameterLayout.of(model), model, torch.zeros(2, 3, dtype=torch.int64))
